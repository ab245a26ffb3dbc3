"""A score of overlap of all images and classes together."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medseg.errors import ConfigError

from .counts import Counts
from .scores import real


def class_weights(alpha: float, beta: float, weight: Sequence[float] | Tensor | None) -> Tensor | None:
    """Check the numbers of a pooled index before there are any counts, and return those of the classes as a tensor."""
    if not (0 <= alpha < math.inf and 0 <= beta < math.inf and alpha + beta > 0):
        raise ConfigError(f"alpha {alpha}, beta {beta}: expected no negative number, and a positive one")
    factors = None if weight is None else torch.as_tensor(weight, dtype=torch.float32)
    if factors is None or (factors.ndim == 1 and factors.isfinite().all() and (factors >= 0).all() and factors.any()):
        return factors
    raise ConfigError(f"weight: {weight} given, a list of a number from 0 per class expected, one positive")


def pooled_tversky(
    counts: Counts,
    alpha: float = 0.5,
    beta: float = 0.5,
    weight: Sequence[float] | Tensor | None = None,
    smooth: float = 1e-6,
) -> Tensor:
    """Tversky index of all images and classes at once, the counts of a class multiplied by its weight.

    That is::

        Σ w TP / (Σ w (TP + α FP + β FN))

    Both sums go over images and classes, so a large object counts more than a small one, and an image without any adds
    its false positives. With α = β = ½ it is Dice, with α = β = 1 Jaccard. With the class weights of the training set
    and soft counts (:func:`medseg.metrics.confusion_counts` of probabilities) these are DC_w, whose complement the KiTS
    thesis trained with, and JC_w, by which it chose its models: not the mean of the cases' Dice or Jaccard.

    Args:
        counts: of shape ``(..., C)``, tensors, arrays or lists; ``tn`` is not used.
        alpha: weight of false positives.
        beta: weight of false negatives.
        weight: a number per class; default: 1.
        smooth: added above and below the fraction, so that nothing found where nothing is gives 1.

    Returns:
        a tensor of one number from 0 to 1.

    Raises:
        ConfigError: where the weights are not as many as the classes.

    Source:
        Detko 2020 and the author's public code; Tversky 1977, Features of similarity; Salehi et al. 2017, Tversky loss.

    Example:
        >>> counts = Counts(tp=[[8, 0], [6, 1]], fp=[[0, 0], [4, 1]], tn=None, fn=[[2, 0], [0, 3]])
        >>> round(float(pooled_tversky(counts)), 4)  # 15 / (15 + 5 / 2 + 5 / 2)
        0.75
        >>> round(float(pooled_tversky(counts, alpha=1, beta=1, weight=[1, 10])), 4)  # 24 / (24 + 14 + 32)
        0.3429
    """
    tp, fp, fn = (torch.as_tensor(real(count)) for count in (counts.tp, counts.fp, counts.fn))
    whole = tp + alpha * fp + beta * fn
    if weight is not None:
        factor = torch.as_tensor(weight, dtype=tp.dtype, device=tp.device)
        if factor.shape != tp.shape[-1:]:
            raise ConfigError(
                f"weight: {factor.tolist()} given, a number for each of {tp.shape[-1]} classes expected "
                "(with include_background=False, none for channel 0)"
            )
        tp, whole = tp * factor, whole * factor
    return (tp.sum() + smooth) / (whole.sum() + smooth)
