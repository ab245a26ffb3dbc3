"""Values that lie far from the others."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def outliers(values: ArrayLike, log: bool = False, reach: float = 1.5) -> NDArray[np.bool_]:
    """Which values lie beyond Tukey's fences (Exploratory Data Analysis, 1977).

    Below five values nothing is flagged, and so is nothing within 1 % of the quartiles.

    Args:
        values: numbers; what is not finite is never flagged.
        log: judge the logarithm, for quantities that vary by factors; 0 and less is then never flagged.
        reach: how far the fences stand from the quartiles, in interquartile ranges: 1.5 for what Tukey calls outside, 3
            for far out. Of normally distributed values 0.7 % lie beyond 1.5 and 0.0002 % beyond 3.

    Example:
        >>> outliers([1.0, 1.0, 1.0, 1.0, 3.0]).tolist()
        [False, False, False, False, True]
    """
    array = np.asarray(values, float)
    usable = np.isfinite(array) & ((array > 0) if log else True)
    if usable.sum() < 5:
        return np.zeros(len(array), bool)
    scaled = np.log(array, where=usable, out=np.full(len(array), np.nan)) if log else array
    low, high = np.percentile(scaled[usable], (25, 75))
    margin_low, margin_high = (0.01, 0.01) if log else (0.01 * abs(low), 0.01 * abs(high))
    span = reach * (high - low)
    below, above = scaled < low - max(span, margin_low), scaled > high + max(span, margin_high)
    return usable & (below | above)
