"""Whether two images lie on the same voxels: an equal shape does not say so."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

#: Grids that are nearer to each other than this part of a voxel are one.
SAME_GRID = 0.05


def millimeters_apart(shape: Sequence[int], affine: Any, other: Any) -> float:
    """How far the same voxel of two grids lies apart at most; 0 where that is so little that the two are one grid.

    Args:
        shape: voxels along each axis, of both.
        affine: 4 × 4, voxel index to mm; an array or a tensor.
        other: of the other grid.

    Returns:
        mm; NaN, which is as true as a distance, where an affine has no finite numbers.

    Example:
        >>> affine = np.diag([2.0, 2.0, 4.0, 1.0])
        >>> millimeters_apart((9, 9, 5), affine, affine + 1e-6)
        0.0
        >>> millimeters_apart((9, 9, 5), affine, affine @ np.diag([-1.0, 1.0, 1.0, 1.0]))
        32.0
    """
    one, another = (np.asarray(each, dtype=np.float64) for each in (affine, other))
    rest = [0] * (len(one) - 1 - len(shape))  # a picture has two axes
    corners = np.array([(*corner, *rest, 1) for corner in product(*((0, n - 1) for n in shape))])
    apart = float(np.linalg.norm((corners @ (one - another).T)[:, :-1], axis=1).max())
    return 0.0 if apart <= SAME_GRID * np.linalg.norm(one[:-1, :-1], axis=0).min() else apart
