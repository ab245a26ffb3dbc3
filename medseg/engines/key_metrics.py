"""Scores of a validation, as key metrics that choose a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from monai.handlers import IgniteMetricHandler, from_engine
from monai.metrics import CumulativeIterationMetric
from monai.metrics.utils import ignore_background
from monai.utils import CommonKeys

from medseg import metrics
from medseg.errors import ConfigError
from medseg.metrics.pooled import class_weights


class _OfCounts(CumulativeIterationMetric):
    """The counts of every sample, kept until the end of the epoch, and the score of them all."""

    def __init__(self, score: Callable[[metrics.Counts], torch.Tensor], include_background: bool) -> None:
        super().__init__()
        self.score, self.include_background = score, include_background

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if not self.include_background:
            y_pred, y = ignore_background(y_pred, y)
        return torch.stack(metrics.confusion_counts(y_pred, y), 1).double()

    def aggregate(self) -> torch.Tensor:
        return self.score(metrics.Counts(*torch.as_tensor(self.get_buffer()).unbind(1)))


class MeanScore(IgniteMetricHandler):
    """The mean of a score over samples and classes, as an Ignite metric for the validator's `key_val_metric`.

    Empty masks count by the conventions of :doc:`/explanation/conventions`; where a score has no value it is left out
    of the mean. In a distributed run the samples of all processes count.

    Args:
        score: a function of counts in :mod:`medseg.metrics`: `dice`, `f_beta`, `sensitivity`, `specificity` or `ppv`.
        include_background: False leaves channel 0 of prediction and truth out, where there are several (one-hot of a
            softmax).
        options: further arguments of the score, such as `beta` for `f_beta`.

    Raises:
        ConfigError: if there is no such score, or it takes no such option; and when it is computed, of what are no
            masks or probabilities.
    """

    def __init__(self, score: str = "dice", include_background: bool = True, **options: float) -> None:
        names = ("dice", "f_beta", "sensitivity", "specificity", "ppv")
        if score not in names:
            raise ConfigError(f"score: found {score!r}, expected one of {', '.join(names)}")
        of_counts = partial(getattr(metrics, score), **options)
        try:
            of_counts(metrics.Counts(1, 1, 1, 1))
        except TypeError as error:
            raise ConfigError(
                f"options: {options} given, but medseg.metrics.{score} takes no such ({error})"
            ) from error
        super().__init__(
            metric_fn=_OfCounts(lambda counts: of_counts(counts).nanmean(), include_background),
            output_transform=from_engine([CommonKeys.PRED, CommonKeys.LABEL]),
            save_details=False,
        )


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
        include_background: False leaves channel 0 of prediction and truth out, where there are several; `weight` then
            has no number for it.
        keys: where prediction and truth are, one channel per class each. `CopyItemsd("pred", names="probability")`
            before `AsDiscreted` keeps the probabilities beside the masks.

    Raises:
        ConfigError: for negative numbers; and when it is computed, where the weights are not as many as the classes, or
            of what are no masks or probabilities.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        weight: Sequence[float] | None = None,
        include_background: bool = True,
        keys: Sequence[str] = (CommonKeys.PRED, CommonKeys.LABEL),
    ) -> None:
        score = partial(metrics.pooled_tversky, alpha=alpha, beta=beta, weight=class_weights(alpha, beta, weight))
        super().__init__(
            metric_fn=_OfCounts(score, include_background),
            output_transform=from_engine(list(keys)),
            save_details=False,
        )
