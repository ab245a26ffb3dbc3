"""The grid that the frames of a DICOM series form, by where they lie and not by how their files are called.

The geometry is that of DICOM PS3.3 C.7.6.2 (Image Plane) and, for enhanced multi-frame objects, C.7.6.16 (functional
groups). What does not form one regular volume is refused with the reason; nothing is stretched or left out quietly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import GeometryError
from .dicom_header import Instance, place_of


@dataclass(frozen=True, eq=False)
class Grid:
    """The regular grid that the frames of a series form.

    Attributes:
        shape: columns, rows, slices.
        affine: 4 × 4, voxel index (column, row, slice) to RAS millimetres; slices ascend along the normal.
        order: (number of the instance, number of the frame in it) of every slice.
        has_geometry: False for a single picture without position.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    order: tuple[tuple[int, int], ...]
    has_geometry: bool = True


def assemble(instances: Sequence[Instance]) -> Grid:
    """Find the grid of a series from the positions of its frames.

    The slices are ordered along the normal of ImageOrientationPatient (row direction × column direction). File names
    and InstanceNumber play no part.

    Raises:
        GeometryError: frames of different size, spacing or orientation; two frames at one position; a missing slice or
            changing gaps; slices that shift sideways (gantry tilt); a frame without position among several.
    """
    where = place_of(instances)
    sizes = {(item.columns, item.rows) for item in instances}
    if len(sizes) > 1:
        found = ", ".join(f"{c}×{r}" for c, r in sorted(sizes))
        odd = _odd_one([(item.columns, item.rows) for item in instances])
        raise GeometryError(f"{where}: slices of different size ({found} pixels; {instances[odd].path.name} differs)")
    columns, rows = sizes.pop()
    if any("MOSAIC" in item.tags.get("ImageType", "").upper().split("\\") for item in instances):
        raise GeometryError(f"{where}: a Siemens mosaic (many slices tiled in one picture) is not supported")
    order = [(i, frame) for i, item in enumerate(instances) for frame in range(len(item.planes))]
    planes = [instances[i].planes[frame] for i, frame in order]
    if not planes:
        raise GeometryError(f"{where}: the image has no frame")

    def name(slot: int) -> str:
        i, frame = order[slot]
        return instances[i].path.name + (f" frame {frame + 1}" if len(instances[i].planes) > 1 else "")

    if len(planes) == 1 and (planes[0].position is None or planes[0].orientation is None):
        return Grid((columns, rows, 1), np.eye(4), tuple(order), has_geometry=False)
    for slot, plane in enumerate(planes):
        for value, keyword in (
            (plane.position, "ImagePositionPatient (0020,0032)"),
            (plane.orientation, "ImageOrientationPatient (0020,0037)"),
            (plane.spacing, "PixelSpacing (0028,0030)"),
        ):
            if value is None:
                raise GeometryError(f"{where}: {name(slot)} has no usable {keyword}: its place is unknown")
    orientation = np.array([plane.orientation for plane in planes], dtype=np.float64)
    spacing = np.array([plane.spacing for plane in planes], dtype=np.float64)
    position = np.array([plane.position for plane in planes], dtype=np.float64)

    off = np.abs(orientation - _commonest(orientation)).max(axis=1)
    if off.max() > 1e-3:
        raise GeometryError(
            f"{where}: slices of different orientation ({int((off > 1e-3).sum())} of {len(planes)} differ from the "
            f"others, such as {name(int(off.argmax()))}): set localizers and other views apart"
        )
    typical = _commonest(spacing)
    off = np.abs(spacing - typical).max(axis=1)
    # Over a row of a thousand pixels this is a hundredth of a pixel.
    if off.max() > 1e-5 * float(np.abs(typical).max()):
        slot = int(off.argmax())
        raise GeometryError(
            f"{where}: slices of different pixel spacing ({name(slot)} has {spacing[slot][0]:g} × {spacing[slot][1]:g} "
            f"mm, most have {typical[0]:g} × {typical[1]:g} mm)"
        )
    row, column = orientation[0, :3], orientation[0, 3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(length - 1) for length in lengths) > 1e-2 or abs(float(row @ column)) > 1e-2:
        raise GeometryError(f"{where}: ImageOrientationPatient (0020,0037) is not two perpendicular unit vectors")
    if spacing[0].min() <= 0:
        raise GeometryError(f"{where}: PixelSpacing (0028,0030) is not positive")
    normal = np.cross(row, column)
    along = position @ normal
    ranks = np.argsort(along, kind="stable")
    step = _regular_step(where, along[ranks], position[ranks], normal, [name(int(slot)) for slot in ranks])
    if step is None:
        step = planes[0].thickness or 1.0

    lps = np.eye(4)
    lps[:3, 0] = row * spacing[0, 1]
    lps[:3, 1] = column * spacing[0, 0]
    lps[:3, 2] = normal * step
    lps[:3, 3] = position[ranks[0]]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps
    return Grid((columns, rows, len(planes)), affine, tuple(order[int(slot)] for slot in ranks))


def _regular_step(
    where: str, along: np.ndarray, position: np.ndarray, normal: np.ndarray, names: list[str]
) -> float | None:
    """Return the distance between neighbouring slices, or None for a single one; refuse what is not regular."""
    if len(along) == 1:
        return None
    gaps = np.diff(along)
    same = np.flatnonzero(gaps < 1e-3)
    if len(same):
        here = int(same[0])
        distinct = 1 + int((gaps >= 1e-3).sum())
        hint = ""
        if distinct and len(along) % distinct == 0 and distinct < len(along):
            hint = (
                f": {len(along) // distinct} frames at each of {distinct} positions look like times, echoes or b-values"
            )
        raise GeometryError(
            f"{where}: two slices at the same position ({along[here]:.2f} mm along the normal: {names[here]} and "
            f"{names[here + 1]}){hint}"
        )
    typical = float(np.median(gaps))
    step = float(along[-1] - along[0]) / len(gaps)
    # Positions are written with few decimals, hence the twentieth of a millimetre; thin slices get a tighter one.
    tolerance = max(0.01 * typical, min(0.05, 0.25 * typical))
    if np.abs(along - (along[0] + step * np.arange(len(along)))).max() > tolerance:
        far = np.abs(gaps / typical - 1) > 0.1
        whole = np.abs(gaps / typical - np.rint(gaps / typical)) < 0.1
        if far.any() and whole[far].all() and (gaps[far] > typical).all() and far.sum() < len(gaps):
            places = ", ".join(f"{along[i]:.2f} and {along[i + 1]:.2f} mm" for i in np.flatnonzero(far)[:3])
            missing = int((np.rint(gaps[far] / typical) - 1).sum())
            raise GeometryError(
                f"{where}: {missing} slice{'s' if missing > 1 else ''} missing: a gap of {gaps[far][0]:.2f} mm where "
                f"the others are {typical:.2f} mm, between {places} along the normal "
                f"({names[int(np.flatnonzero(far)[0])]} and the next); find the missing files"
            )
        raise GeometryError(
            f"{where}: the gap between slices changes (from {gaps.min():.2f} to {gaps.max():.2f} mm, first at "
            f"{along[int(np.abs(gaps - gaps[0]).argmax())]:.2f} mm along the normal): not a regular volume"
        )
    sideways = position - position[0] - np.outer(along - along[0], normal)
    shift = np.linalg.norm(sideways[-1])
    if np.linalg.norm(sideways, axis=1).max() > 0.1:
        if shift > 0.1:
            angle = np.degrees(np.arctan2(shift, along[-1] - along[0]))
            raise GeometryError(
                f"{where}: gantry tilt of {angle:.1f} degrees (the slices shift sideways by {shift:.1f} mm from first "
                "to last): not a rectangular volume"
            )
        raise GeometryError(f"{where}: the slices do not lie on one line: they shift sideways along the series")
    return step


def _commonest(rows: np.ndarray) -> np.ndarray:
    """Return the row that occurs most often, up to rounding."""
    _, first, counts = np.unique(np.round(rows, 4), axis=0, return_index=True, return_counts=True)
    return rows[first[counts.argmax()]]


def _odd_one(values: list[Any]) -> int:
    """Return the place of a value of the rarest kind."""
    return min(range(len(values)), key=lambda i: values.count(values[i]))
