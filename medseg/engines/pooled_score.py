"""A key metric of all validation images and classes together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.handlers import IgniteMetricHandler, from_engine
from monai.metrics import CumulativeIterationMetric
from monai.utils import CommonKeys

from medseg.metrics import Counts, confusion_counts, pooled_tversky


class _PooledTversky(CumulativeIterationMetric):
    """The counts of every sample, kept until the end of the epoch."""

    def __init__(self, include_background: bool, **options: Any) -> None:
        super().__init__()
        self.include_background, self.options = include_background, options

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if not self.include_background:
            y_pred, y = y_pred[:, 1:], None if y is None else y[:, 1:]
        return torch.stack(confusion_counts(y_pred, y), 1).double()

    def aggregate(self) -> torch.Tensor:
        return pooled_tversky(Counts(*torch.as_tensor(self.get_buffer()).unbind(1)), **self.options)


class PooledScore(IgniteMetricHandler):
    """The Tversky index of all images and classes together, as an Ignite metric for `key_val_metric`.

    It is :func:`medseg.metrics.pooled_tversky` of the whole validation part, whatever its batch size, in a distributed
    run of the samples of all processes. Of probabilities (a postprocessing that ends with `Activationsd`) it is soft,
    of masks it is hard. With `alpha=1, beta=1` and class weights, of probabilities, it is JC_w, by which the KiTS
    thesis chose its models; Keras takes its mean over batches.

    Args:
        alpha: weight of false positives; with `beta`, 0.5 each is Dice and 1 each is Jaccard.
        beta: weight of false negatives.
        weight: a number per class; default: 1.
        include_background: False leaves channel 0 of prediction and truth out; `weight` then has no number for it.
        keys: where prediction and truth are, one channel per class each. `CopyItemsd("pred", names="probability")`
            before `AsDiscreted` keeps the probabilities beside the masks.

    Raises:
        ConfigError: when it is computed, where the weights are not as many as the classes.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        weight: Sequence[float] | None = None,
        include_background: bool = True,
        keys: Sequence[str] = (CommonKeys.PRED, CommonKeys.LABEL),
    ) -> None:
        super().__init__(
            metric_fn=_PooledTversky(include_background, alpha=alpha, beta=beta, weight=weight),
            output_transform=from_engine(list(keys)),
            save_details=False,
        )
