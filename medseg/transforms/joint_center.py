"""Where femur and tibia meet on a coronal knee MR, and the square crop around it."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import CropForeground, CropForegroundd, MapTransform
from numpy.typing import NDArray
from scipy import ndimage

from medseg.errors import ConfigError, GeometryError

#: The tilts that are tried, in degrees.
TILTS = range(-12, 13, 3)
#: What a joint must have at least: a dark gap this wide (mm), this much of it (mm of wholly dark gap), and this many
#: times as much as any other place more than 10 mm above or below.
LEAST_WIDTH, LEAST_GAP, LEAST_CLARITY = 40.0, 12.0, 4.0
#: The least field of view along both axes of a slice, in mm.
LEAST_FIELD = 60.0


@dataclass(frozen=True)
class JointCenter:
    """Where femur and tibia meet.

    Attributes:
        index: voxel index along the three array axes; along the slices it is the middle of the stack.
        clarity: how many times as much dark gap there is as at any other height of the image.
    """

    index: tuple[float, float, float]
    clarity: float


def find_joint_center(image: MetaTensor) -> JointCenter:
    """Find where femur and tibia meet, from the image alone, so that it can be done for a new patient just so.

    The joint is the one dark gap that two bright, broad bodies of marrow face from above and from below. In detail:

    1. The middle half of the slices, at 1 mm in the plane, is slightly smoothed and closed (gray values) by a 4 mm
       line along the leg. That fills growth plates and cortex, which are dark and parallel to the joint but thin.
    2. At each pixel, ``gap`` is the mean over 3 mm along the leg, and ``side`` the smaller of the means over the 9 mm
       that begin 4.5 mm above and below. Its evidence is ``1 - gap / side``, which no coil's fall-off changes, weighted
       from 0 to 1 while ``side`` rises from 35 to 65 % of the image's bright level (95th percentile).
    3. Evidence is averaged over the slices and summed over rows, for tilts of the leg from -12 to 12° in steps of 3°.
       The row with most of it is the height of the joint; the middle between the 5th and the 95th percentile of the
       evidence along it is its center from left to right.

    It was made and tested on phantoms (their true center is met to 3 mm) and shown real MR of other regions, all of
    which it refuses. **It was not tried on real knees**: look at the crops that it makes. It needs marrow that is
    brighter than cartilage and menisci (T1, or proton density without fat saturation), at least 15 mm of both bones in
    the image, and a leg within about 15° of upright. Expected to fail, mostly by refusal: fat saturation, a bright
    effusion, metal, a knee bent or turned far, a joint space of less than 4 mm from marrow to marrow.

    Args:
        image: [C, X, Y, Z] with its affine (RAS mm), coronal slices in any stored order; its first channel is used.

    Raises:
        GeometryError: the slices are not coronal, show less than 60 mm, or no gap is clear enough to be the joint.

    Source:
        The thesis (Knee bones in MRI, 2017) says that "an algorithm" detects where tibia and femur meet, and not which;
        this one is medseg's own.
    """
    leftright, updown, slices = _axes(image)
    spacing = np.linalg.norm(np.asarray(image.affine)[:3, :3], axis=0)
    shape = image.shape[1 + leftright], image.shape[1 + updown]
    field = [round(float(n * spacing[axis])) for n, axis in zip(shape, (leftright, updown), strict=True)]
    if min(field) < LEAST_FIELD:
        raise GeometryError(
            f"the slices show {field[0]} x {field[1]} mm: at least {LEAST_FIELD:g} expected to find a knee's joint in"
        )
    stack = image.as_tensor()[0].permute(slices, leftright, updown)
    margin = len(stack) // 4
    pictures = stack[margin : len(stack) - margin, None].float()
    pictures = torch.nn.functional.interpolate(pictures, field, mode="bilinear", antialias=True)[:, 0].numpy()

    evidence = {tilt: _gap_evidence(ndimage.rotate(pictures, tilt, (1, 2), reshape=False, order=1)) for tilt in TILTS}
    gaps = {tilt: ndimage.uniform_filter1d(found.sum(0), 3) for tilt, found in evidence.items()}
    tilt = max(TILTS, key=lambda tilt: float(gaps[tilt].max()))
    gap, row = gaps[tilt], int(gaps[tilt].argmax())
    near = evidence[tilt][:, max(0, row - 2) : row + 3].mean(1)
    elsewhere = float(np.concatenate([gap[: max(0, row - 10)], gap[row + 11 :]]).max())
    clarity = float(gap[row]) / max(elsewhere, 1e-3)
    width = int(np.count_nonzero(near > 0.15))
    if width < LEAST_WIDTH or gap[row] < LEAST_GAP or clarity < LEAST_CLARITY:
        raise GeometryError(
            f"no joint found: the clearest dark gap between bright bone is {width} mm wide (at least {LEAST_WIDTH:g} "
            f"expected) and {clarity:.1f} times as clear as the next (at least {LEAST_CLARITY:g}); is it a coronal "
            "knee with bright marrow, without fat saturation? Else give the center"
        )
    left, right = np.searchsorted(np.cumsum(near) / near.sum(), (0.05, 0.95))
    middle = (np.array(field) - 1) / 2
    angle = np.deg2rad(tilt)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    place = turn @ (np.array([(left + right) / 2, row]) - middle) + middle
    index = [(n - 1) / 2 for n in image.shape[1:]]
    for axis, mm, n, edge in zip((leftright, updown), place, shape, field, strict=True):
        index[axis] = float((mm + 0.5) * n / edge - 0.5)
    return JointCenter((index[0], index[1], index[2]), clarity)


def joint_center_of_bones(femur: MetaTensor, tibia: MetaTensor) -> tuple[float, float, float]:
    """Find where femur and tibia meet, from their masks: what :func:`find_joint_center` is compared with.

    From left to right it is the middle between the 5th and the 95th percentile of the lines along the leg that meet
    both bones. The height is the mean of that of the left and that of the right half: on the quarter of their lines on
    which the bones are nearest, the median of the middle between the lowest voxel of the femur and the highest of the
    tibia.

    Args:
        femur: [1, X, Y, Z], above 0 inside, with its affine (RAS mm); coronal slices in any stored order.
        tibia: likewise, on the same grid.

    Returns:
        voxel index along the three array axes; along the slices it is the middle of the stack.

    Raises:
        GeometryError: the slices are not coronal, or no line along the leg meets both bones.
    """
    leftright, updown, slices = _axes(femur)
    up = np.asarray(femur.affine)[2, updown] > 0
    above, below = (
        np.asarray(mask)[0].transpose(leftright, slices, updown)[..., :: -1 if up else 1] > 0 for mask in (femur, tibia)
    )
    both = above.any(-1) & below.any(-1)
    if not both.any():
        raise GeometryError("the masks of femur and tibia lie above each other nowhere: expected a joint between them")
    n = above.shape[-1]
    lowest, highest = n - 1 - above[both][:, ::-1].argmax(-1), below[both].argmax(-1)
    across, space = np.nonzero(both)[0], highest - lowest
    middle = float(np.percentile(across, (5, 95)).mean())
    heights = []
    for half in (across <= middle, across >= middle):
        nearest = half & (space <= np.quantile(space[half], 0.25))
        heights.append(float(np.median((lowest + highest)[nearest])) / 2)
    height = sum(heights) / 2
    index = [(edge - 1) / 2 for edge in femur.shape[1:]]
    index[updown] = n - 1 - height if up else height
    index[leftright] = middle
    return index[0], index[1], index[2]


class CropToJointCenter(CropForeground):
    """Crop the slices of a knee to a square around the place where femur and tibia meet.

    The place is that of :func:`find_joint_center`; its limits hold. All slices are kept. Sides are whole voxels,
    ``round(size_mm / spacing)``, so the square is one in millimeters, also where pixels are not square. Where it juts
    out of the image there is 0.

    Args:
        size_mm: side of the square.

    Shape:
        ``(C, X, Y, Z)`` -> the two axes of the slices cropped; type kept. The affine follows. It can be inverted.

    Raises:
        ConfigError: a size that is not positive.
        GeometryError: no joint was found.
    """

    def __init__(self, size_mm: float = 120.0) -> None:
        if not size_mm > 0:
            raise ConfigError(f"size_mm {size_mm:g}: positive mm expected")
        super().__init__(allow_smaller=False)
        self.size_mm = size_mm

    def compute_bounding_box(self, img: torch.Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First voxel of the square around the joint, and the one after its last; they may lie outside."""
        return self.box(img, find_joint_center(img).index)

    def box(self, img: torch.Tensor, center: tuple[float, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The same around a given voxel index; :meth:`crop_pad` takes what is returned."""
        spacing = np.linalg.norm(np.asarray(img.affine)[:3, :3], axis=0)
        n = np.maximum(1, np.rint(self.size_mm / spacing)).astype(np.int64)
        start = np.rint(np.asarray(center) - (n - 1) / 2).astype(np.int64)
        slices = _axes(img)[2]
        n[slices], start[slices] = img.shape[1 + slices], 0
        return start, start + n


class CropToJointCenterd(CropForegroundd):
    """Dictionary twin of :class:`CropToJointCenter`.

    Args:
        keys: images and labels on one grid.
        source_key: the image in which the joint is looked for.
        size_mm: as there.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ConfigError, GeometryError: as there; the message of the latter names the key.
    """

    def __init__(
        self, keys: KeysCollection, source_key: str, size_mm: float = 120.0, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, source_key, start_coord_key=None, end_coord_key=None)
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.cropper = CropToJointCenter(size_mm)

    def __call__(self, data: Mapping[Hashable, torch.Tensor], lazy: bool | None = None) -> dict[Hashable, torch.Tensor]:
        """Return the dictionary with its images cropped."""
        try:
            result: dict[Hashable, torch.Tensor] = super().__call__(data, lazy)
        except GeometryError as error:
            raise GeometryError(f"{self.source_key}: {error}") from error
        return result


def _gap_evidence(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    """Steps 1 and 2 of :func:`find_joint_center`: [slice, across, along the leg] at 1 mm -> [across, along]."""
    smooth = ndimage.gaussian_filter(pictures, (0, 1, 0.7))
    closed = ndimage.grey_closing(smooth, (1, 1, 4))
    gap = ndimage.uniform_filter1d(closed, 3, axis=2)
    bone = np.pad(ndimage.uniform_filter1d(closed, 9, axis=2), ((0, 0), (0, 0), (9, 9)))
    side = np.minimum(bone[..., :-18], bone[..., 18:])
    bright = max(float(np.quantile(smooth, 0.95)), 1e-6)
    weight = np.clip((side / bright - 0.35) / 0.3, 0, 1)
    evidence: NDArray[np.float32] = (np.clip(1 - gap / np.maximum(side, 1e-6), 0, 1) * weight).mean(0)
    return evidence


def _axes(image: torch.Tensor) -> tuple[int, int, int]:
    """Array axes of a coronal stack that run from left to right, along the body, and across the slices.

    Raises:
        GeometryError: the image has no geometry, or its slices are not coronal.
    """
    if not isinstance(image, MetaTensor) or image.ndim != 4:
        raise GeometryError("an image without affine: expected a MetaTensor [C, X, Y, Z], as read_image gives it")
    affine = np.asarray(image.affine, dtype=np.float64)
    world = [int(axis) for axis in nib.orientations.io_orientation(affine)[:, 0]]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    leftright, frontback, updown = (world.index(axis) for axis in range(3))
    if spacing[frontback] < 0.99 * spacing.max():
        thick = int(spacing.argmax())
        plane = {leftright: "sagittal", updown: "axial"}[thick]
        raise GeometryError(
            f"the slices are {plane} (the axis of {spacing[thick]:.3g} mm): coronal ones expected; is the orientation "
            "in the file's header right?"
        )
    return leftright, updown, frontback
