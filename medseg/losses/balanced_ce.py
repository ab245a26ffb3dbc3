"""Cross-entropy that the shares of the classes balance."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.modules.loss import _Loss

from medseg.errors import GeometryError
from medseg.metrics.counts import check_range, plain

from .overlap import channel_per_class


class BalancedCELoss(_Loss):
    """Cross-entropy in which a voxel counts the more, the rarer its class is in the image.

    For one class, with p the sigmoid of the logits::

        - mean(β y log p + (1 - β) (1 - y) log(1 - p)),  β = 1 - share of positives in the image

    Of several classes, each has the weight 1 − share of the class, which is the same for two. For a β or class weights
    that are fixed, such as those of the training set, take MONAI's ``FocalLoss(gamma=0, alpha=β)`` and
    ``DiceCELoss(lambda_dice=0, weight=…)``; see :doc:`/explanation/losses`.

    An image of one class only has the loss 0 and no gradient, so that slices without truth teach nothing: with
    ``batch=True`` they do, where other slices of the batch have some.

    Args:
        batch: whether the shares are those of the whole batch, as if it were one image.

    Shape:
        input ``(B, C, *spatial)``, logits: one channel for the positive class, or a channel per class; target a label
        map ``(B, 1, *spatial)`` or, of the shape of the input, a channel per class. Half precision is computed in
        float32.

    Raises:
        GeometryError: where input and target do not fit.
        ConfigError: where the target holds a label that is no class, or anything beyond 0 to 1.

    Source:
        Xie and Tu 2015, Holistically-nested edge detection, equation 2, as a mean instead of a sum; Detko 2020, who
        leaves β open.

    Example:
        >>> logits, truth = torch.tensor([[[2.0, -1.0, 0.5, -3.0]]]), torch.tensor([[[1, 0, 0, 0]]])
        >>> round(BalancedCELoss()(logits, truth).item(), 4)  # β = 3 / 4
        0.1073
    """

    def __init__(self, batch: bool = False) -> None:
        super().__init__()
        self.batch = batch

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of a batch."""
        logits, truth = plain(input), plain(target)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        channels = logits.shape[1]
        if truth.shape[1:2] == (1,) and channels > 1:
            truth = channel_per_class(truth, channels, logits.dtype)
        if truth.shape != logits.shape or logits.ndim < 3:
            raise GeometryError(
                f"input of shape {tuple(input.shape)} against target of shape {tuple(target.shape)}: expected "
                "(batch, channels, *spatial), and the same or a label map of one channel"
            )
        truth = truth.to(logits.dtype)
        check_range(truth, "target", 1, "0 to 1, or a label map of one channel for an input of several")
        if channels == 1:
            truth = torch.cat([1 - truth, truth], 1)
            logp = torch.cat([logsigmoid(-logits), logsigmoid(logits)], 1)
        else:
            logp = logits.log_softmax(1)
        axes = tuple(range(2, truth.ndim))
        share = truth.mean(axes)
        if self.batch:
            share = share.mean(0, keepdim=True)
        return ((share - 1) * (truth * logp).mean(axes)).sum(1).mean()
