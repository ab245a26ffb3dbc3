"""Grids in space, and images brought from one to another."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.errors import GeometryError

if TYPE_CHECKING:
    from monai.data import MetaTensor


@dataclass(frozen=True, eq=False)
class Grid:
    """Where voxels lie: how many along each axis, and the 4×4 affine from index to RAS mm."""

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    @classmethod
    def of(cls, image: "MetaTensor") -> "Grid":
        """The grid of an image [channel, x, y, z]."""
        x, y, z = image.shape[1:]
        return cls((int(x), int(y), int(z)), np.asarray(image.affine, dtype=np.float64))

    @property
    def spacing(self) -> NDArray[np.float64]:
        """Voxel size in mm along each axis."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))

    def part(self, start: NDArray[np.int64], shape: tuple[int, int, int]) -> "Grid":
        """The grid that begins at the index ``start`` of this one; it may reach beyond it."""
        affine = self.affine.copy()
        affine[:3, 3] = self.affine[:3, :3] @ start + self.affine[:3, 3]
        return Grid(shape, affine)


def spaced_grid(image: "MetaTensor", spacing: tuple[float, float, float]) -> Grid:
    """The grid of another spacing over the same field of view, with the same axes and the same center.

    The number of voxels is that of the field of view rounded to whole voxels, at least one.

    Args:
        image: [channel, x, y, z].
        spacing: mm along x, y, z of the stored axes.
    """
    grid = Grid.of(image)
    old, new = grid.spacing, np.asarray(spacing, dtype=np.float64)
    x, y, z = (int(n) for n in np.maximum(1, np.rint(np.array(grid.shape) * old / new)))
    affine = grid.affine.copy()
    affine[:3, :3] = grid.affine[:3, :3] * (new / old)
    center = grid.affine[:3, :3] @ ((np.array(grid.shape) - 1) / 2) + grid.affine[:3, 3]
    affine[:3, 3] = center - affine[:3, :3] @ ((np.array([x, y, z]) - 1) / 2)
    return Grid((x, y, z), affine)


def resample(
    image: "MetaTensor", grid: Grid, mode: Literal["linear", "nearest"], *, outside: float = 0, edge: bool = False
) -> "MetaTensor":
    """Bring an image to another grid.

    As in ITK, a voxel is a box: up to half a voxel beyond the outermost centers the value of the edge holds, and
    farther out there is nothing. There is no smoothing before a coarser grid.

    Args:
        image: [channel, x, y, z].
        grid: where the result lies.
        mode: ``linear`` (float32), or ``nearest`` (the type of the image; a tie goes to the even index).
        outside: value where the image has nothing.
        edge: continue the edge outside instead; for grids that jut out by a rounding of their size.

    Returns:
        [channel, *grid.shape].
    """
    import torch
    from monai.data import MetaTensor
    from scipy import ndimage

    own = Grid.of(image)
    to_own = np.linalg.inv(own.affine) @ grid.affine
    matrix, offset = _clean(to_own[:3, :3]), _clean(to_own[:3, 3])
    if own.shape == grid.shape and np.allclose(to_own, np.eye(4), atol=1e-6):
        return MetaTensor(image.as_tensor(), affine=torch.as_tensor(grid.affine))
    # A diagonal matrix given as a vector takes scipy's separable way, which is several times as fast.
    form = np.diag(matrix) if np.array_equal(matrix, np.diag(np.diag(matrix))) else matrix
    linear = mode == "linear"
    voxels = np.asarray(image, dtype=np.float32) if linear else np.asarray(image)
    result = np.stack(
        [
            ndimage.affine_transform(
                channel, form, offset, grid.shape, order=1 if linear else 0, mode="nearest", prefilter=False
            )
            for channel in voxels
        ]
    )
    if not edge:
        covered = ndimage.affine_transform(
            np.ones(own.shape, np.uint8), form, offset, grid.shape, order=0, mode="grid-constant", prefilter=False
        )
        result[:, covered == 0] = outside
    return MetaTensor(torch.from_numpy(result), affine=torch.as_tensor(grid.affine))


def check_same_grid(reference: "MetaTensor", other: "MetaTensor", other_name: str, reference_name: str) -> None:
    """Refuse two images that do not lie on the same voxels.

    Raises:
        GeometryError: another shape, or the same voxel lies elsewhere.
    """
    from medseg.io.same_grid import millimeters_apart

    a, b = Grid.of(reference), Grid.of(other)
    if a.shape != b.shape:
        raise GeometryError(
            f"{other_name} has the shape {_by(b.shape)}, {reference_name} {_by(a.shape)}: expected the same"
        )
    if apart := millimeters_apart(a.shape, a.affine, b.affine):
        raise GeometryError(
            f"{other_name} lies up to {apart:.3g} mm away from {reference_name}: expected the same grid "
            "(spacing, origin and axes); resample the one to the other first"
        )


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _clean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without the rounding errors of an inversion, which would turn whole steps into almost whole ones."""
    nearest = np.rint(values * 1e6) / 1e6
    return np.where(np.abs(values - nearest) < 1e-9, nearest, values)
