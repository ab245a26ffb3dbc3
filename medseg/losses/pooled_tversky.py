"""The Tversky loss of a whole batch, with class weights inside the sums."""

from collections.abc import Sequence

from torch import Tensor

from medseg.metrics import Counts, pooled_tversky
from medseg.metrics.pooled import class_weights

from .overlap import OverlapLoss


class PooledTverskyLoss(OverlapLoss):
    """One minus the Tversky index of all images and classes of the batch together, each class with its weight.

    That is::

        1 - Σ w TP / (Σ w (TP + α FP + β FN))

    With α = β = ½ and class weights this is DCL_w, the loss of the KiTS thesis; with α = β = 1, JCL_w. MONAI's
    ``DiceLoss(batch=True, weight=w)`` is another: it multiplies each class's loss by its weight, so its value is not
    below 1. Its ``GeneralizedDiceLoss(batch=True)`` has these sums, with weights from each batch's own volumes.

    An image without an object adds its false positives to the sums, so that false alarms cost. Where a whole batch is
    without (and no channel is of the background), the loss is 1 − smooth / (smooth + α Σ w ŷ): nearly 1, and nearly
    without gradient, as soon as anything is predicted, and 0 for an empty prediction.

    Args:
        alpha: weight of false positives.
        beta: weight of false negatives.
        weight: a number per class, such as ``class_weights`` of :func:`medseg.data.training_statistics`; default: 1.
        include_background: False leaves channel 0 out, where there are several; ``weight`` then has no number for it.
        sigmoid: whether to apply a sigmoid to the input.
        softmax: whether to apply a softmax over the channels of the input.
        to_onehot_y: whether the target is a label map ``(B, 1, *spatial)``, to be split into channels.
        smooth: added above and below the fraction.

    Shape:
        as of :class:`medseg.losses.FBetaLoss`.

    Raises:
        ConfigError: for arguments that contradict each other, weights that are not as many as the classes, and as of
            :class:`medseg.losses.FBetaLoss`.
        GeometryError: where input and target differ in shape.

    Source:
        as of :func:`medseg.metrics.pooled_tversky`, which this is one minus. The KiTS thesis discusses two weights and
        prints one, β and 1 − β; here there are two.

    Example:
        >>> import torch
        >>> pred = torch.tensor([[[0.5, 1.0, 0.0], [0.5, 0.0, 1.0]]])
        >>> truth = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
        >>> round(PooledTverskyLoss(weight=[1, 4])(pred, truth).item(), 4)  # 1 - 5.5 / (5.5 + 4 · 0.5 / 2 + 0.5 / 2)
        0.1852
    """

    weight: Tensor | None

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        weight: Sequence[float] | Tensor | None = None,
        include_background: bool = True,
        sigmoid: bool = False,
        softmax: bool = False,
        to_onehot_y: bool = False,
        smooth: float = 1e-6,
    ) -> None:
        super().__init__(include_background, sigmoid, softmax, to_onehot_y, smooth)
        self.register_buffer("weight", class_weights(alpha, beta, weight))
        self.alpha, self.beta = float(alpha), float(beta)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of a batch."""
        tp, positive, true = self.sums(input, target)
        counts = Counts(tp=tp, fp=positive - tp, tn=None, fn=true - tp)
        return 1 - pooled_tversky(counts, self.alpha, self.beta, self.weight, self.smooth)
