from .fbeta import FBetaLoss as FBetaLoss

__all__ = ["FBetaLoss"]
