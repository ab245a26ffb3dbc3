from .ensemble import Ensemble as Ensemble
from .ensemble import pool_logits as pool_logits
from .flips import FlipInferer as FlipInferer

__all__ = ["Ensemble", "FlipInferer", "pool_logits"]
