"""How sure a score is: bootstrap intervals over patients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import numpy as np
from scipy import stats

from medseg.errors import ConfigError

Statistic = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Example:
        >>> str(Interval(0.812, 0.7634, 0.8571))
        '0.81 (0.76 to 0.86)'
    """

    estimate: float
    low: float
    high: float
    level: float = 0.95

    def __str__(self) -> str:
        if isnan(self.low):
            return f"{self.estimate:.2f} (no interval)"
        return f"{self.estimate:.2f} ({self.low:.2f} to {self.high:.2f})"


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Any] | np.ndarray | None = None,
    statistic: Statistic = np.mean,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a statistic, resampling patients.

    Slices and cases of one patient are alike, so resampling them one by one claims a precision that is not there. A
    drawn patient brings all of his or her values, and a patient with more values weighs more.

    Args:
        values: one score per slice or case; nan (an undefined score) is left out.
        groups: the patient of each value; None takes each value for a patient of its own.
        statistic: of all values together, such as ``np.mean`` or ``np.median``.
        level: confidence level.
        resamples: number of resamples.
        seed: the same seed gives the same interval; where there are groups, in whatever order the values come.

    Returns:
        The statistic of the values and its interval. The bounds are nan for fewer than two patients, the estimate too
        for none.

    Raises:
        ConfigError: where values and groups differ in number, or a level is not between 0 and 1.

    Source:
        Efron and Tibshirani 1993, An introduction to the bootstrap; Field and Welsh 2007, Bootstrapping clustered
        data.

    Example:
        >>> dice = [0.9, 0.8, 0.7, 0.8, 0.3, 0.6]
        >>> print(bootstrap_interval(dice, groups=["a", "a", "b", "b", "c", "d"]))
        0.68 (0.45 to 0.81)
    """
    return _bootstrap(
        [values], groups, lambda columns: statistic(columns[0]), statistic is np.mean, level, resamples, seed
    )


def paired_bootstrap_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    groups: Sequence[Any] | np.ndarray | None = None,
    statistic: Statistic = np.mean,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of statistic(a) − statistic(b) for two models scored on the same patients.

    Both are resampled together, so what makes a patient easy or hard for both cancels.

    Args:
        a: scores of one model; a pair with a nan is left out.
        b: scores of the other, value by value of the same slice or case.
        groups: the patient of each pair; None takes each pair for a patient of its own.
        statistic: of all values of one model together.
        level: confidence level.
        resamples: number of resamples.
        seed: the same seed gives the same interval.

    Returns:
        The difference and its interval; one without 0 speaks for a difference.

    Raises:
        ConfigError: where a, b and groups differ in number, or a level is not between 0 and 1.

    Example:
        >>> print(paired_bootstrap_difference([0.9, 0.7, 0.5, 0.8], [0.8, 0.6, 0.3, 0.6]))
        0.15 (0.10 to 0.20)
    """

    def difference(columns: np.ndarray) -> float:
        return statistic(columns[0]) - statistic(columns[1])

    return _bootstrap([a, b], groups, difference, statistic is np.mean, level, resamples, seed)


def _bootstrap(
    columns: list, groups: Any, statistic: Statistic, is_mean: bool, level: float, resamples: int, seed: int
) -> Interval:
    lengths = {len(column) for column in columns} | ({len(groups)} if groups is not None else set())
    if len(lengths) > 1:
        raise ConfigError(f"values and groups of {sorted(lengths)} entries; expected as many of each")
    if not 0 < level < 1 or resamples < 1:
        raise ConfigError(f"level {level}, resamples {resamples}; expected a level between 0 and 1 and at least one")
    values = np.asarray(columns, dtype=float)
    patients = np.arange(values.shape[1]) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    kept = ~np.isnan(values).any(axis=0)
    values = values[:, kept]
    patients = np.unique(patients[kept], return_inverse=True)[1]
    if not kept.any():
        return Interval(nan, nan, nan, level)
    estimate = float(statistic(values))
    count = int(patients.max()) + 1
    if count < 2:
        return Interval(estimate, nan, nan, level)

    if is_mean:
        # A mean needs of each patient the sum and the number of values only: all resamples at once.
        total = np.bincount(patients, weights=values[0] if len(values) == 1 else values[0] - values[1])
        number = np.bincount(patients)

        def resampled(drawn: np.ndarray, axis: int = -1) -> Any:
            return total[drawn].sum(axis) / number[drawn].sum(axis)
    else:
        order = np.argsort(patients, kind="stable")
        of_patient = np.split(values[:, order], np.cumsum(np.bincount(patients))[:-1], axis=1)

        def resampled(drawn: np.ndarray, axis: int = -1) -> Any:
            return statistic(np.concatenate([of_patient[i] for i in drawn], axis=1))

    result = stats.bootstrap(
        (np.arange(count),),
        resampled,
        n_resamples=resamples,
        batch=max(1, 1_000_000 // count),
        vectorized=is_mean,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Interval(estimate, float(result.confidence_interval.low), float(result.confidence_interval.high), level)
