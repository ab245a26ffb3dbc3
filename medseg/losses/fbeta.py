"""The F-beta loss."""

import math

import torch
from torch import Tensor

from medseg.errors import ConfigError

from .overlap import OverlapLoss


class FBetaLoss(OverlapLoss):
    """One minus F-beta of each image's whole mask: a Dice loss that weighs sensitivity β times as much as PPV.

    ``squared=True`` is the loss of the PET/CT thesis (equation 2.77 with r = s = 2)::

        1 - (1 + β²) Σ y ŷ / (β² Σ y² + Σ ŷ²)

    and ``squared=False`` has no squares below, which makes it MONAI's ``TverskyLoss(alpha=1 / (1 + β²),
    beta=β² / (1 + β²))``. β = 1 is the Dice loss, in the form of Milletari (squares) or the linear one. The sums go
    over one image and class; classes, each against the rest, are averaged.

    An image whose truth is empty has the loss 1 − smooth / (smooth + c Σ ŷ), with c = 1 / (1 + β²) (and ŷ² with
    squares): nearly 1 as soon as anything is predicted, nearly without gradient, and 0 for an empty prediction. It
    does no harm and teaches little, so that a network trained on it finds tumors where there are none; take
    ``batch=True`` where slices without truth count.

    Args:
        beta: weight of sensitivity; 1 is Dice. With squares at least 1: below, the loss is not smallest at the truth,
            since ŷ = β on the positive voxels scores better than ŷ = 1 (at β = 0.5 the loss falls to −0.25).
        squared: whether the denominator holds squares.
        include_background: False leaves channel 0 out, where there are several.
        sigmoid: whether to apply a sigmoid to the input.
        softmax: whether to apply a softmax over the channels of the input.
        to_onehot_y: whether the target is a label map ``(B, 1, *spatial)``, to be split into channels.
        smooth: added above and below the fraction once both are divided by 1 + β², where MONAI adds ``smooth_nr`` and
            ``smooth_dr``.
        reduction: "mean" over images, "sum" over images as in the thesis (classes are averaged all the same), or
            "none" for ``(B, C)``.
        batch: whether the sums go over all images of the batch, as if they were one (``B`` is then 1).

    Shape:
        input ``(B, C, *spatial)``, of probabilities or, with ``sigmoid`` or ``softmax``, logits; target of the same
        shape or a label map. Half precision is computed in float32, so sums do not overflow.

    Raises:
        ConfigError: for arguments that contradict each other, β < 1 with squares, a label that is no class, or
            anything beyond 0 to 1 where there should be probabilities.
        GeometryError: where input and target differ in shape.

    Source:
        Moe 2019, Deep learning for automatic delineation of tumours from PET/CT images; Milletari et al. 2016, V-Net;
        Salehi et al. 2017, Tversky loss.

    Example:
        >>> pred, truth = torch.tensor([[[0.5, 1.0, 0.0]]]), torch.tensor([[[1.0, 1.0, 0.0]]])
        >>> round(FBetaLoss(beta=2)(pred, truth).item(), 4)  # 1 - 5 * 1.5 / (4 * 2 + 1.25)
        0.1892
        >>> round(FBetaLoss(beta=2, squared=False)(pred, truth).item(), 4)  # 1 - 5 * 1.5 / (4 * 2 + 1.5)
        0.2105
    """

    def __init__(
        self,
        beta: float = 1.0,
        squared: bool = True,
        include_background: bool = True,
        sigmoid: bool = False,
        softmax: bool = False,
        to_onehot_y: bool = False,
        smooth: float = 1e-5,
        reduction: str = "mean",
        batch: bool = False,
    ) -> None:
        super().__init__(include_background, sigmoid, softmax, to_onehot_y, smooth, reduction)
        if not (0 < beta < math.inf):
            raise ConfigError(f"beta is {beta}; expected a positive number")
        if squared and beta < 1:
            raise ConfigError(
                f"beta {beta} < 1 with squared=True: this loss is not smallest at the true mask but where positive "
                f"voxels are predicted as {beta}; use squared=False for beta < 1"
            )
        if reduction not in ("mean", "sum", "none"):
            raise ConfigError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")
        self.beta = float(beta)
        self.squared = squared
        self.batch = batch

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of a batch."""
        tp, positive, true = self.sums(input, target, self.squared)
        if self.batch:
            tp, positive, true = (s.sum(0, keepdim=True) for s in (tp, positive, true))
        # Both sides of the fraction are divided by 1 + β².
        score = (tp + self.smooth) / (torch.lerp(true, positive, 1 / (1 + self.beta**2)) + self.smooth)
        if self.reduction == "none":
            return 1 - score
        if self.reduction == "sum":
            return (1 - score.mean(1)).sum()
        return 1 - score.mean()
