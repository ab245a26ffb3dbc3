"""Whether the channels of a case lie on each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import entropy

from medseg.data.shrink import shrink

#: A shift below this length (mm) is no finding: organs move, and images are distorted, by as much.
LEAST_SHIFT = 8.0
#: By how much the information that two channels share must grow when one is shifted.
LEAST_GAIN = 0.3
#: Share of the smaller entropy that two channels must have in common before their alignment can be judged.
LEAST_SHARED = 0.03

_SPACING = 4.0  # mm
_MOST_VOXELS = 500_000
_REACH = 30.0  # mm
_BINS = 24


@dataclass(frozen=True)
class Shift:
    """A shift of one channel that makes it lie better on another.

    Attributes:
        mm: along the axes of the array.
        before: mutual information as a share of the smaller entropy, as the channels lie.
        after: the same after the shift.
    """

    mm: tuple[float, ...]
    before: float
    after: float

    @property
    def length(self) -> float:
        """How far, in mm."""
        return float(np.linalg.norm(self.mm))


def find_shift(
    one: NDArray[np.float32], other: NDArray[np.float32], spacing: Sequence[float] | NDArray[np.float64]
) -> Shift | None:
    """Look for a shift of ``other`` that makes it lie clearly better on ``one``.

    Both are averaged to voxels of about 4 mm, and the mutual information (Viola and Wells 1997; Maes et al. 1997) is
    followed uphill from no shift, up to 30 mm and a fifth of the image along each axis, in steps from half of that down
    to a voxel. It is counted over the same part of ``one`` at each shift.

    Args:
        one: [x, y, z], finite.
        other: on the same grid.
        spacing: mm along the axes.

    Returns:
        the shift, if it is at least :data:`LEAST_SHIFT` and one and a half voxels long and the mutual information grows
        by :data:`LEAST_GAIN` or more; None otherwise, and where the images are too small or have too little in common
        to judge.

    Example:
        >>> blobs = np.random.default_rng(0).random((5, 5, 5)).repeat(6, 0).repeat(6, 1).repeat(6, 2)
        >>> find_shift(blobs, 1 - blobs, (4, 4, 4)) is None
        True
        >>> find_shift(blobs, 1 - np.roll(blobs, 3, axis=1), (4, 4, 4)).mm
        (0.0, 12.0, 0.0)
    """
    extent = np.asarray(spacing, dtype=np.float64) * one.shape
    step = max(_SPACING, float(np.prod(extent) / _MOST_VOXELS) ** (1 / 3))
    shape = np.clip(np.rint(extent / step), 1, one.shape).astype(int)
    if sorted(shape)[1] < 24 or min(shape) < 5:
        return None
    steps = extent / shape
    first, second = (_binned(shrink(volume, shape)) for volume in (one, other))
    reach = np.minimum(_REACH / steps, shape / 5).astype(int)
    best = np.zeros(3, dtype=int)
    before = after = _shared(first, second, best, reach)
    stride = np.maximum(reach // 2, 1)
    while True:
        moved = False
        for axis in range(3):
            for sign in (1, -1):
                trial = best.copy()
                trial[axis] += sign * stride[axis]
                if abs(trial[axis]) > reach[axis]:
                    continue
                value = _shared(first, second, trial, reach)
                if value > after:
                    best, after, moved = trial, value, True
        if not moved:
            if (stride == 1).all():
                break
            stride = np.maximum(stride // 2, 1)
    shift = Shift(tuple(float(x) for x in best * steps), before, after)
    clear = after >= (1 + LEAST_GAIN) * before and after >= LEAST_SHARED
    far = shift.length >= max(LEAST_SHIFT, 1.5 * float(np.max(steps * (best != 0))))
    return shift if clear and far else None


def _binned(volume: NDArray[np.float32]) -> NDArray[np.int64]:
    low, high = np.percentile(volume, (1, 99))
    return np.clip((volume - low) * (_BINS / max(high - low, 1e-9)), 0, _BINS - 1).astype(np.int64)


def _shared(
    one: NDArray[np.int64], other: NDArray[np.int64], shift: NDArray[np.int_], margin: NDArray[np.int_]
) -> float:
    """Mutual information of the middle of one with the other shifted, as a share of the smaller entropy."""
    middle = tuple(slice(m, n - m) for m, n in zip(margin, one.shape, strict=True))
    moved = tuple(slice(m + s, n - m + s) for m, s, n in zip(margin, shift, one.shape, strict=True))
    joint = np.bincount((one[middle] * _BINS + other[moved]).ravel(), minlength=_BINS**2).reshape(_BINS, _BINS)
    entropies = entropy(joint.sum(0)), entropy(joint.sum(1))
    if min(entropies) < 1e-6:
        return 0.0
    return float((sum(entropies) - entropy(joint, axis=None)) / min(entropies))
