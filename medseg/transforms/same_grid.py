"""Whether two images lie on the same voxels: an equal shape does not say so."""

from itertools import product

import numpy as np
from monai.data import MetaTensor

#: Grids that are nearer than this share of a voxel are one.
SAME_GRID = 0.05


def voxels_apart(image: MetaTensor, other: MetaTensor) -> float:
    """How far the same corner of two images of one shape can lie apart, in voxels of the first, its finest side.

    Example:
        >>> import torch
        >>> image = MetaTensor(torch.zeros(1, 9, 9, 5), affine=np.diag([2.0, 2.0, 4.0, 1.0]))
        >>> mirrored = MetaTensor(torch.zeros(1, 9, 9, 5), affine=np.diag([-2.0, 2.0, 4.0, 1.0]))
        >>> voxels_apart(image, image), voxels_apart(image, mirrored)
        (0.0, 16.0)
    """
    sides = [(0, size - 1) for size in image.shape[1:]]
    corners = np.array([(*corner, *[0] * (3 - len(sides)), 1) for corner in product(*sides)])
    affine, moved = (np.asarray(each.affine, dtype=np.float64) for each in (image, other))
    distances = np.linalg.norm((corners @ (affine - moved).T)[:, :3], axis=1)
    return float(distances.max() / np.linalg.norm(affine[:3, :3], axis=0).min())
