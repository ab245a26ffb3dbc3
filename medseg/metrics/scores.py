"""Scores of overlap, computed from counts.

What they say of an empty mask is a convention, the same in all of medseg: see :doc:`/explanation/conventions`. A false
alarm where there is nothing to find costs, and finding nothing there is right. Such slices are many and easy: rows of
scores say ``truth_empty`` and ``pred_empty``, and a report keeps them apart.
"""

from math import nan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg.errors import ConfigError

from .counts import Counts


def dice(counts: Counts, empty: float = 1.0) -> Any:
    """Dice coefficient, 2TP / (2TP + FP + FN).

    Args:
        counts: tensors, arrays or numbers.
        empty: the value where truth and prediction are both empty.

    Returns:
        Scores from 0 to 1 in the shape of the counts, as a tensor for tensors and an array (or a number) else.

    Source:
        Dice 1945, Measures of the amount of ecologic association between species.

    Example:
        >>> float(dice(Counts(tp=3, fp=1, tn=10, fn=1)))
        0.75
        >>> float(dice(Counts(tp=0, fp=0, tn=10, fn=0)))
        1.0
    """
    return f_beta(counts, beta=1.0, empty=empty)


def f_beta(counts: Counts, beta: float = 2.0, empty: float = 1.0) -> Any:
    """F-beta, (1 + β²)TP / ((1 + β²)TP + β²FN + FP): the harmonic mean of PPV and sensitivity, weighted 1 to β².

    Args:
        counts: tensors, arrays or numbers.
        beta: 1 is Dice; 2 counts sensitivity twice as important as PPV.
        empty: the value where truth and prediction are both empty.

    Returns:
        Scores from 0 to 1 in the shape of the counts.

    Raises:
        ConfigError: for a β which is not positive.

    Source:
        van Rijsbergen 1979, Information Retrieval; equation 2.59 of Moe 2019.

    Example:
        >>> float(f_beta(Counts(tp=2, fp=0, tn=10, fn=2), beta=2))
        0.5555555555555556
    """
    if not beta > 0:
        raise ConfigError(f"beta is {beta}; expected a positive number")
    return _share((1 + beta**2) * real(counts.tp), beta**2 * real(counts.fn) + real(counts.fp), empty)


def sensitivity(counts: Counts, empty: float = nan) -> Any:
    """Sensitivity (recall), TP / (TP + FN): the share of the truth that was found.

    Args:
        counts: tensors, arrays or numbers.
        empty: the value where the truth is empty.

    Returns:
        Scores from 0 to 1 in the shape of the counts.

    Example:
        >>> float(sensitivity(Counts(tp=3, fp=0, tn=10, fn=1)))
        0.75
    """
    return _share(counts.tp, counts.fn, empty)


def specificity(counts: Counts, empty: float = nan) -> Any:
    """Specificity, TN / (TN + FP): the share of the background that was left alone.

    Args:
        counts: tensors, arrays or numbers.
        empty: the value where the truth leaves no background.

    Returns:
        Scores from 0 to 1 in the shape of the counts.

    Example:
        >>> float(specificity(Counts(tp=3, fp=2, tn=8, fn=1)))
        0.8
    """
    return _share(counts.tn, counts.fp, empty)


def ppv(counts: Counts, empty: float = nan) -> Any:
    """Positive predictive value (precision), TP / (TP + FP): the share of the prediction that is right.

    Args:
        counts: tensors, arrays or numbers.
        empty: the value where the prediction is empty.

    Returns:
        Scores from 0 to 1 in the shape of the counts.

    Example:
        >>> float(ppv(Counts(tp=3, fp=1, tn=10, fn=0)))
        0.75
    """
    return _share(counts.tp, counts.fp, empty)


def real(count: Any) -> Any:
    """Return counts as numbers that can be divided, a tensor for a tensor and an array else."""
    if isinstance(count, Tensor):
        return count if count.is_floating_point() else count.double()
    return np.asarray(count, dtype=float)


def _share(part: Any, rest: Any, empty: float) -> Any:
    part, rest = real(part), real(rest)
    whole = part + rest
    where = torch.where if isinstance(whole, Tensor) else np.where
    nothing = whole == 0
    # The division is made safe before it is done, so that no gradient is nan either.
    score = where(nothing, empty, part / where(nothing, 1.0, whole))
    return score if isinstance(score, Tensor) else score[()]
