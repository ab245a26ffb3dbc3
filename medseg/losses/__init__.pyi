from .balanced_ce import BalancedCELoss as BalancedCELoss
from .fbeta import FBetaLoss as FBetaLoss
from .heads import HeadsLoss as HeadsLoss
from .pooled_tversky import PooledTverskyLoss as PooledTverskyLoss

__all__ = ["BalancedCELoss", "FBetaLoss", "HeadsLoss", "PooledTverskyLoss"]
