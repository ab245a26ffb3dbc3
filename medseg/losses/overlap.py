"""What the losses of overlap share: from logits and label maps to sums."""

import math
from typing import Any

import torch
from monai.networks import one_hot
from torch import Tensor
from torch.nn.modules.loss import _Loss

from medseg.errors import ConfigError, GeometryError
from medseg.metrics.counts import check_probabilities, check_range, plain, soft_sums


class OverlapLoss(_Loss):
    """Base of losses that are a function of Σ y ŷ, Σ ŷ and Σ y. Arguments as in MONAI's losses."""

    def __init__(
        self,
        include_background: bool,
        sigmoid: bool,
        softmax: bool,
        to_onehot_y: bool,
        smooth: float,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        if sigmoid and softmax:
            raise ConfigError("sigmoid and softmax are both on; expected at most one")
        if not 0 <= smooth < math.inf:
            raise ConfigError(f"smooth is {smooth}; expected a number from 0")
        self.include_background = include_background
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.to_onehot_y = to_onehot_y
        self.smooth = float(smooth)

    def sums(self, input: Tensor, target: Tensor, squared: bool = False) -> tuple[Any, Any, Any]:
        """Return Σ y ŷ, Σ ŷ and Σ y of each image and class, ``(B, C)``; with squares, Σ ŷ² and Σ y²."""
        channels = input.shape[1]
        if channels == 1 and (self.softmax or self.to_onehot_y):
            raise ConfigError("input has one channel, which softmax and to_onehot_y make meaningless; use sigmoid=True")
        input, target = plain(input), plain(target)
        # Before the sigmoid: in half precision it rounds to 0 and 1 long before it is sure.
        pred = input.to(torch.promote_types(input.dtype, torch.float32))
        if self.sigmoid:
            pred = pred.sigmoid()
        elif self.softmax:
            pred = pred.softmax(1)
        else:
            check_probabilities(pred, "prediction")
        if self.to_onehot_y:
            if target.shape[1] != 1:
                raise GeometryError(
                    f"target of shape {tuple(target.shape)}: with to_onehot_y, expected a label map "
                    "(batch, 1, *spatial); leave to_onehot_y out for a channel per class"
                )
            target = channel_per_class(target, channels, pred.dtype)
        else:
            check_probabilities(target, "truth")
        if not self.include_background and channels > 1:
            pred, target = pred[:, 1:], target[:, 1:]
        return soft_sums(pred, target, squared)


def channel_per_class(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Return a label map as a channel per class; a label that is no class, or between two, is refused."""
    if labels.is_floating_point() and not torch.compiler.is_compiling() and (labels % 1 != 0).any():
        raise ConfigError("target holds fractions; expected a label map, so resample labels with mode nearest")
    check_range(labels, "target", classes - 1, f"labels from 0 to {classes - 1}, one for each channel of the input")
    return one_hot(labels.long(), classes, dtype=dtype)
