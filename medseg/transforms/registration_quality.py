"""How good a registration is: its figures, and which of them are not to be trusted."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from medseg.errors import GeometryError

if TYPE_CHECKING:
    import SimpleITK as sitk

# A result is refused below these; and where mutual information fell and points moved by more than half a voxel, the
# finest side: an image registered to itself may end a hair from where it began.
MINIMUM_OVERLAP = 0.25  # of the smaller of the two volumes
MINIMUM_JACOBIAN = 0.1  # of the local volume; 0 is a fold
MINIMUM_INFORMATION = 0.02  # nats beyond what chance gives

#: Voxels that an image has at least along each axis.
MINIMUM_SIZE = 4
#: Of the joint histogram of which mutual information is made, along each side.
BINS = 32
#: Of all random points; SimpleITK takes 0 for the clock.
SEED = 1
_SAMPLES = 1_000_000


class Probe:
    """Looks at both images at the same points: one at a random place in each cell of a grid over the fixed image.

    At voxel centers, images that share a grid need no interpolation, and mutual information would prefer them unmoved.
    """

    def __init__(self, fixed: "sitk.Image", moving: "sitk.Image") -> None:
        import SimpleITK as sitk

        self.fixed_image, self.moving_image = fixed, moving
        stride = max(1, math.ceil((fixed.GetNumberOfPixels() / _SAMPLES) ** (1 / 3)))
        self.grid = sitk.BinShrink(fixed, [min(stride, size // MINIMUM_SIZE) for size in fixed.GetSize()])
        size, spacing = self.grid.GetSize(), self.grid.GetSpacing()
        direction = np.array(self.grid.GetDirection()).reshape(3, 3)
        rng = np.random.default_rng(SEED)
        shift = rng.uniform(-0.5, 0.5, (*reversed(size), 3)) * spacing @ direction.T
        displacement = sitk.GetImageFromArray(shift, isVector=True)
        displacement.CopyInformation(self.grid)
        self.jitter = sitk.DisplacementFieldTransform(displacement)
        self.fixed = self._values(fixed, self.jitter)
        self.unmoved = self._moved(sitk.Transform(3, sitk.sitkIdentity))

    def start(self) -> "sitk.Euler3DTransform":
        """Return where to start: the headers, or the centers of mass where those agree better."""
        import SimpleITK as sitk

        centered = sitk.Euler3DTransform(
            sitk.CenteredTransformInitializer(
                self.fixed_image,
                self.moving_image,
                sitk.Euler3DTransform(),
                sitk.CenteredTransformInitializerFilter.MOMENTS,
            )
        )
        moved = self._moved(centered)
        if max(self._overlap(self.unmoved), self._overlap(moved)) < MINIMUM_OVERLAP:
            raise GeometryError(
                f"the images overlap by {self._overlap(self.unmoved):.2f} of the smaller one where the headers put "
                f"them, and by {self._overlap(moved):.2f} with their centers of mass on each other: expected at least "
                f"{MINIMUM_OVERLAP}; check that both show the same part of the body"
            )
        before, after = self._informations(moved)
        if self._overlap(moved) < MINIMUM_OVERLAP or after <= before:
            centered.SetTranslation((0.0, 0.0, 0.0))
        return centered

    def figures(self, transform: "sitk.Transform") -> dict[str, float]:
        """Return the quality figures of a transform; see :class:`Registration`."""
        import SimpleITK as sitk

        moved = self._moved(transform)
        before, after = self._informations(moved)
        grid = self.grid
        shift = sitk.TransformToDisplacementField(
            transform, sitk.sitkVectorFloat64, grid.GetSize(), grid.GetOrigin(), grid.GetSpacing(), grid.GetDirection()
        )
        vectors = sitk.GetArrayFromImage(shift)
        # ITK's own filter for this takes the grid's axes for those of the patient.
        along_axes = np.stack(np.gradient(vectors, *grid.GetSpacing()[::-1], axis=(0, 1, 2))[::-1], axis=-1)
        jacobians = np.eye(3) + along_axes @ np.array(grid.GetDirection()).reshape(3, 3).T
        inside = ~np.isnan(moved)
        inside = inside if inside.any() else ~inside
        lengths = np.linalg.norm(vectors.reshape(-1, 3)[inside], axis=1)
        center = grid.TransformContinuousIndexToPhysicalPoint([(size - 1) / 2 for size in grid.GetSize()])
        figures = {
            "mutual_information_before": before,
            "mutual_information_after": after,
            "overlap": self._overlap(moved),
            "rotation_deg": _rotation(jacobians.reshape(-1, 3, 3)[inside].mean(axis=0)),
            "translation_mm": math.dist(transform.TransformPoint(center), center),
            "displacement_mean_mm": lengths.mean(),
            "displacement_max_mm": lengths.max(),
            "jacobian_min": np.linalg.det(jacobians).min(),
        }
        # No more digits than sums in any order agree on.
        return {name: float(f"{value:.6g}") for name, value in figures.items()}

    def _values(self, image: "sitk.Image", transform: "sitk.Transform") -> np.ndarray:
        import SimpleITK as sitk

        resampled = sitk.Resample(image, self.grid, transform, sitk.sitkLinear, math.nan)
        return sitk.GetArrayFromImage(resampled).ravel()

    def _moved(self, transform: "sitk.Transform") -> np.ndarray:
        """Return the moving image's values at the points, NaN where it has none."""
        import SimpleITK as sitk

        return self._values(self.moving_image, sitk.CompositeTransform([transform, self.jitter]))

    def _overlap(self, moved: np.ndarray) -> float:
        volumes = [np.prod(i.GetSpacing()) * i.GetNumberOfPixels() for i in (self.fixed_image, self.moving_image)]
        return float(min(1.0, np.mean(~np.isnan(moved)) * volumes[0] / min(volumes)))

    def _informations(self, moved: np.ndarray) -> tuple[float, float]:
        """Return mutual information with the headers alone and as moved, over the points that both have.

        Headers which do not bring the images together have none.
        """
        inside = ~np.isnan(self.fixed) & ~np.isnan(moved)
        if self._overlap(self.unmoved) < MINIMUM_OVERLAP:
            return 0.0, mutual_information(self.fixed[inside], moved[inside])
        inside &= ~np.isnan(self.unmoved)
        fixed = self.fixed[inside]
        return mutual_information(fixed, self.unmoved[inside]), mutual_information(fixed, moved[inside])


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Return mutual information in nats, less what independent values would have (Miller and Madow's correction)."""
    if a.size == 0:
        return 0.0
    joint = np.histogram2d(a, b, BINS, [[0, 1], [0, 1]])[0]
    rows, columns = joint.sum(1), joint.sum(0)
    filled = joint > 0
    expected = np.outer(rows, columns)[filled] / a.size
    nats = float((joint[filled] * np.log(joint[filled] / expected)).sum() / a.size)
    return nats - (np.count_nonzero(rows) - 1) * (np.count_nonzero(columns) - 1) / (2 * a.size)


def _rotation(matrix: np.ndarray) -> float:
    """Return the angle of the rotation nearest to a matrix, in degrees."""
    u, _, v = np.linalg.svd(matrix)
    return math.degrees(math.acos(min(1.0, max(-1.0, (np.trace(u @ v) - 1) / 2))))


def require_better(figures: Mapping[str, float], negligible: float) -> None:
    """Raise a GeometryError that names the figures of a registration which is not to be trusted.

    Displacements up to `negligible` mm are taken for none.
    """
    before, after = figures["mutual_information_before"], figures["mutual_information_after"]
    named = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    if figures["overlap"] < MINIMUM_OVERLAP:
        reason = f"the images hardly overlap (expected at least {MINIMUM_OVERLAP})"
    elif figures["jacobian_min"] < MINIMUM_JACOBIAN:
        reason = f"the transform folds space (expected jacobian_min of at least {MINIMUM_JACOBIAN})"
    elif after < MINIMUM_INFORMATION:
        reason = f"the images tell nothing of each other (expected at least {MINIMUM_INFORMATION} nats)"
    elif after < before and figures["displacement_max_mm"] > negligible:
        reason = "the registration made it worse than the headers alone"
    else:
        return
    raise GeometryError(f"registration refused: {reason}: {named}; try another kind, or check the images")
