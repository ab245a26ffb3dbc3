"""A loss per output of a network with several."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg.errors import ConfigError, GeometryError
from medseg.metrics.counts import plain


class HeadsLoss(nn.Module):
    """The weighted sum of a loss per head, of a network that trains with several and is used with the first.

    Two losses, two heads: one trained with F1, one with cross-entropy. One loss, deep supervision: every head is an
    output at another depth, at full size, and weights that halve make the deeper ones count less, as in MONAI's
    ``DeepSupervisionLoss``, which takes a list of outputs and scales the target to each.

    All heads have one target. Logits and target are given to the losses in float32 at least, so that those of MONAI,
    which sum in the precision they are given, do not overflow.

    Args:
        loss: the loss of every head, or a list of one per head.
        weights: a number per head; default: 1. The sum is not divided by theirs.

    Shape:
        input ``(B, heads, C, *spatial)`` in training, or ``(B, C, *spatial)``, the first head alone, whose loss is then
        returned without weight; target as the losses take it, with its channel: ``(B, 1 or C, *spatial)``.

    Raises:
        ConfigError: where losses or weights are none, not as many as each other, or a weight is negative.
        GeometryError: where the heads are not as many as these, or input and target do not fit.

    Source:
        Pröve 2017 (two heads, both losses back-propagated as one sum); Lee et al. 2015, Deeply-supervised nets.

    Example:
        >>> from monai.losses import DiceCELoss, DiceLoss
        >>> logits, truth = torch.randn(4, 2, 1, 8, 8), torch.randint(0, 2, (4, 1, 8, 8))
        >>> two = HeadsLoss([DiceLoss(sigmoid=True), DiceCELoss(sigmoid=True, lambda_dice=0)])
        >>> bool(two(logits, truth) == two.losses[0](logits[:, 0], truth) + two.losses[1](logits[:, 1], truth))
        True
        >>> deep = HeadsLoss(DiceLoss(sigmoid=True), weights=[1, 0.5])
        >>> deep(logits[:, 0], truth) == DiceLoss(sigmoid=True)(logits[:, 0], truth)  # in evaluation
        tensor(True)
    """

    def __init__(self, loss: nn.Module | Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.losses = nn.ModuleList([loss] if isinstance(loss, nn.Module) else loss)
        self.weights = None if weights is None else [float(weight) for weight in weights]
        if not self.losses or (weights is not None and len(self.losses) not in (1, len(weights))) or weights == []:
            raise ConfigError(
                f"loss, weights: {len(self.losses)} and {None if weights is None else len(weights)} given, expected "
                "one loss for all heads or one for each, and a weight for each or none"
            )
        if not all(0 <= weight < math.inf for weight in self.weights or []):
            raise ConfigError(f"weights: {self.weights} given, numbers from 0 expected")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the sum of the heads' losses, or the first loss alone."""
        logits, target = _not_half(input), _not_half(target)
        if input.ndim == target.ndim:
            return self.losses[0](logits, target)
        heads = input.shape[1]
        losses = list(self.losses) * heads if len(self.losses) == 1 else list(self.losses)
        weights = self.weights or [1.0] * len(losses)
        if input.ndim != target.ndim + 1 or not heads == len(losses) == len(weights):
            raise GeometryError(
                f"input of shape {tuple(input.shape)} against target of shape {tuple(target.shape)}: expected "
                f"(batch, {len(weights)} heads, classes, *spatial) or (batch, classes, *spatial), "
                "and a target with its channel, (batch, 1 or classes, *spatial)"
            )
        parts = zip(weights, losses, logits.unbind(1), strict=True)
        return torch.stack([weight * loss(head, target) for weight, loss, head in parts]).sum()


def _not_half(values: Tensor) -> Tensor:
    values = plain(values)
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
