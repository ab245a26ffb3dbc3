"""A volume in few voxels, each the mean over the place that it takes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def shrink(voxels: NDArray[np.float32], shape: Sequence[int]) -> NDArray[np.float32]:
    """Average a volume over a coarser grid of the same extent; voxels on a border count for both sides by their share.

    Args:
        voxels: [x, y, z].
        shape: of the result.

    Example:
        >>> shrink(np.array([[[0.0]], [[3.0]], [[9.0]]]), (2, 1, 1)).ravel()
        array([1., 7.])
    """
    for axis, size in enumerate(shape):
        n = voxels.shape[axis]
        if n != size:
            edges = np.linspace(0, n, size + 1)
            overlap = np.minimum(edges[1:, None], np.arange(1, n + 1)) - np.maximum(edges[:-1, None], np.arange(n))
            weights = np.clip(overlap, 0, None).astype(voxels.dtype) * np.asarray(size / n, voxels.dtype)
            voxels = np.moveaxis(np.tensordot(weights, voxels, axes=(1, axis)), 0, axis)
    return voxels
