"""DICOM structure sets (RTSTRUCT) as masks on the grid of an image.

Attributes are those of DICOM PS3.3 C.8.8.5 (Structure Set) and C.8.8.6 (ROI Contour).
"""

import difflib
import fnmatch
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pydicom.dataset import Dataset

from ..errors import ConfigError, GeometryError, MedsegError, ReadError
from .dicom_header import hash_patient, integer, quiet
from .dicom_object import read_object
from .reference import Reference, check_patient, find_reference, matched_by, uid_of
from .text import one_line
from .volume import Volume

if TYPE_CHECKING:
    from monai.data import MetaTensor

    from .series import Series

IDENTITY = ("check", "geometry")

_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")

# A coordinate beyond a kilometer (in mm) is damage: it has no place in a patient.
_FARTHEST = 1e6

# Crossings of contours and rows that are worked on at once: what a contour costs in memory is bounded.
_CHUNK = 1 << 21


class RoiSummary(NamedTuple):
    """One ROI of a structure set, as `list_rois` gives it."""

    number: int
    name: str
    contour_types: dict[str, int]


@dataclass
class _Roi:
    number: int
    name: str
    frame_of_reference_uid: str
    types: dict[str, int] = field(default_factory=dict)
    contours: list[Dataset] = field(default_factory=list)  # closed ones; their points are parsed when they are wanted
    problem: str = ""


@dataclass
class _StructureSet:
    path: Path
    study_uid: str
    patient_hash: str
    series_uids: frozenset[str]
    rois: list[_Roi]


def list_rois(path: str | os.PathLike[str]) -> list[RoiSummary]:
    """Return number, name and contour types (with their counts) of every ROI, in the order of the file.

    Raises:
        ReadError: not a readable RTSTRUCT.
    """
    structures = _read_structures(Path(path))
    return [RoiSummary(roi.number, roi.name, dict(roi.types)) for roi in structures.rois]


def read_rtstruct(
    path: str | os.PathLike[str],
    reference: "MetaTensor | Series | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]",
    rois: str | Sequence[str] | None = None,
    *,
    identity: str = "check",
) -> "dict[str, MetaTensor]":
    """Read a structure set as one mask per ROI on the grid of a reference image.

    A voxel belongs to an ROI when its center lies inside the contours of its slice. Identical contours (the same
    points, wherever they start and whichever way they run) count once; then the even-odd rule, which is the standard's
    own for CLOSEDPLANAR_XOR, makes holes of nested contours and leaves keyhole contours as they are meant. A contour
    belongs to the slice whose center is nearest; where the planes of an ROI are regularly spaced wider than the slices,
    each contour stands for a slab as thick as that distance, and where they are denser the nearest plane of each slice
    is taken. Points and open contours make no mask.

    The structure set must belong to the reference. One of another patient (PatientID present in both, and different) is
    never read. With ``identity="check"`` neither is one whose ROIs name another frame of reference, nor, where none is
    named, one of another study. Where its references match nothing and contradict nothing (they are absent, or no
    UIDs), geometry decides; with ``identity="geometry"`` it decides always: then every contour must lie on a slice (to
    10 % of the distance between slices) and inside the grid. A reference without DICOM identity, such as a NIfTI file,
    may have been resampled or cropped: with ``identity="check"`` it is enough that every ROI has voxels in it.

    Args:
        path: the RTSTRUCT file.
        reference: an image from `read_image` (also a resampled or reoriented one), a `Series`, or the path of a DICOM
            folder or an image file.
        rois: names, or patterns with ``*`` and ``?`` as in `fnmatch` (case counts); by default every ROI that has a
            closed contour. A name is first taken literally.
        identity: ``"check"``, or ``"geometry"`` where you know that the references are wrong.

    Returns:
        uint8 masks [1, X, Y, Z] by ROI name, in the order of the file. A name is what the file says: it may hold
        slashes, and is no file name. The second of two ROIs with one name gets its number appended.
        ``meta["matched_by"]`` tells what tied the structure set to the reference: ``"series"``,
        ``"frame of reference"``, ``"study"`` or ``"geometry"``. ``meta["roi"]`` tells ``name``, ``number``,
        ``contours`` (closed ones), ``not_closed``, and how many of the contours are ``between`` slices (off a slice's
        center by more than 10 % of the distance), ``cut`` by the border of the grid, ``crossing`` another one of
        their plane (where the even-odd rule may not be what was meant), ``duplicates``, ``outside`` the grid and
        ``degenerate`` (of fewer than three points).

    Raises:
        ReadError: not an RTSTRUCT, damaged, a name that no ROI has, or an ROI without closed contours.
        GeometryError: the structure set belongs to another patient, frame of reference or study, its contours are not
            parallel to the slices, or an ROI with closed contours has no voxel on the grid.
        ConfigError: ``identity`` is none of the two.
    """
    if identity not in IDENTITY:
        raise ConfigError(f"identity: {identity!r} found, expected one of {', '.join(IDENTITY)}")
    with quiet():
        structures = _read_structures(Path(path))
        grid = find_reference(reference, "contours", structures.series_uids)
    chosen = _choose(structures, [rois] if isinstance(rois, str) else rois)
    tied_by, strict = _tie(structures, grid, chosen, identity)
    masks: dict[str, MetaTensor] = {}
    for roi in chosen:
        voxels, counts = _mask(structures.path, roi, grid, strict)
        problems = (
            [f"{counts['crossing']} of the contours of ROI {roi.name!r} cross others of their plane"]
            if counts["crossing"]
            else []
        )
        volume = Volume(
            voxels[None],
            grid.affine.copy(),
            modality="RTSTRUCT",
            units="mask",
            problems=tuple(problems),
            dicom=dict(grid.identity),
        )
        mask = volume.tensor(str(structures.path))
        mask.meta["roi"] = {"name": roi.name, "number": roi.number, **counts}
        mask.meta["matched_by"] = tied_by
        key = roi.name
        while key in masks:
            key = f"{key} ({roi.number})"
        masks[key] = mask
    return masks


def _read_structures(path: Path) -> _StructureSet:
    try:
        with quiet():
            return _structures(path, read_object(path, "RTSTRUCT"))
    except MedsegError:
        raise
    except Exception as error:  # pydicom raises many kinds on damaged files, with values of the file in their text
        raise ReadError(f"{path}: damaged RTSTRUCT: it cannot be parsed ({type(error).__name__})") from error


def _structures(path: Path, ds: Dataset) -> _StructureSet:
    frames = list(ds.get("ReferencedFrameOfReferenceSequence") or [])
    only_frame = uid_of(frames[0].get("FrameOfReferenceUID")) if len(frames) == 1 else ""
    series_uids = frozenset(
        uid_of(series.get("SeriesInstanceUID"))
        for frame in frames
        for study in frame.get("RTReferencedStudySequence") or []
        for series in study.get("RTReferencedSeriesSequence") or []
    ) - {""}
    rois: dict[int, _Roi] = {}
    for item in ds.get("StructureSetROISequence") or []:
        if item.get("ROINumber") is None:
            raise ReadError(f"{path}: an ROI without ROINumber (3006,0022): its contours cannot be found")
        number = int(item.ROINumber)
        frame = uid_of(item.get("ReferencedFrameOfReferenceUID")) or only_frame
        roi = _Roi(number, one_line(item.get("ROIName") or f"ROI {number}"), frame)
        if number in rois:
            roi.problem = rois[number].problem
            if rois[number].name != roi.name:
                roi.problem = f"ROINumber (3006,0022) {number} stands for {rois[number].name!r} and for {roi.name!r}"
        rois[number] = roi
    for item in ds.get("ROIContourSequence") or []:
        if item.get("ReferencedROINumber") is None:
            raise ReadError(
                f"{path}: contours without ReferencedROINumber (3006,0084): of which ROI they are is unknown"
            )
        number = int(item.ReferencedROINumber)
        roi = rois.setdefault(number, _Roi(number, f"ROI {number}", only_frame))
        for contour in item.get("ContourSequence") or []:
            kind = one_line(contour.get("ContourGeometricType") or "unknown")
            roi.types[kind] = roi.types.get(kind, 0) + 1
            if kind in _CLOSED:
                roi.contours.append(contour)
    return _StructureSet(
        path,
        uid_of(ds.get("StudyInstanceUID")),
        hash_patient(ds.get("PatientID")),
        series_uids,
        list(rois.values()),
    )


def _points(path: Path, roi: _Roi, contour: Dataset) -> np.ndarray:
    """Return the points of a contour, points × 3 in LPS millimetres."""
    # The raw text is parsed at once: pydicom would make an object of every number.
    raw = contour.get_item("ContourData")
    value = getattr(raw, "value", None)
    place = f"{path}: ROI {roi.name!r} has ContourData (3006,0050)"
    try:
        if isinstance(value, bytes):
            text = value.strip(b" \0")
            numbers = np.fromstring(text, sep="\\") if text else np.empty(0)
            if text and len(numbers) != text.count(b"\\") + 1:  # older NumPy stops at what is no number
                raise ValueError
        else:
            numbers = np.array([float(number) for number in (value or [])])
        points = numbers.reshape(-1, 3)
    except ValueError as error:
        raise ReadError(f"{place} that is not triples of numbers") from error
    if not np.isfinite(points).all():
        raise ReadError(f"{place} with NaN or infinite numbers")
    if len(points) and np.abs(points).max() > _FARTHEST:
        raise ReadError(f"{place} with a coordinate of {np.abs(points).max():.3g} mm: damaged; export it again")
    promised = integer(contour, "NumberOfContourPoints")
    if promised is not None and promised > len(points):
        raise ReadError(
            f"{place} of {len(points)} points where NumberOfContourPoints (3006,0046) is {promised}: "
            "points are missing; export it again"
        )
    return points


def _choose(structures: _StructureSet, wanted: Sequence[str] | None) -> list[_Roi]:
    """Return the ROIs that are asked for, in the order of the file."""
    if wanted is None:
        chosen = [roi for roi in structures.rois if roi.contours]
        if not chosen:
            raise ReadError(f"{structures.path}: none of its {len(structures.rois)} ROIs has a closed contour")
        return _sound(structures.path, chosen)
    names = [roi.name for roi in structures.rois]
    numbers: set[int] = set()
    for entry in wanted:
        exact = [roi for roi in structures.rois if roi.name == entry]
        if len(exact) > 1:
            listed = ", ".join(str(roi.number) for roi in exact)
            raise ReadError(
                f"{structures.path}: {len(exact)} ROIs are named {entry!r} (numbers {listed}): not told apart"
            )
        found = exact or [roi for roi in structures.rois if roi.contours and fnmatch.fnmatchcase(roi.name, entry)]
        if not found:
            lowered = {name.lower(): name for name in names}
            near = [lowered[low] for low in difflib.get_close_matches(entry.lower(), list(lowered), n=5, cutoff=0.5)]
            listed = ", ".join(repr(name) for name in [*near, *(name for name in names if name not in near)])
            raise ReadError(f"{structures.path}: no ROI with closed contours is named {entry!r}: it has {listed}")
        for roi in exact:
            if not roi.contours:
                kinds = ", ".join(roi.types) or "no contour at all"
                raise ReadError(f"{structures.path}: ROI {roi.name!r} has no closed contour (it has {kinds})")
        numbers.update(roi.number for roi in found)
    return _sound(structures.path, [roi for roi in structures.rois if roi.number in numbers])


def _sound(path: Path, chosen: list[_Roi]) -> list[_Roi]:
    for roi in chosen:
        if roi.problem:
            raise ReadError(f"{path}: {roi.problem}: whose the contours are is unknown; export it again")
    return chosen


def _tie(structures: _StructureSet, grid: Reference, chosen: Sequence[_Roi], identity: str) -> tuple[str, bool]:
    """Return what ties the structure set to the reference, and whether its geometry must prove it."""
    name = f"{structures.path}: the structure set"
    if identity == "geometry":
        check_patient(grid, name, structures.patient_hash)
        return "geometry", True
    return matched_by(
        grid,
        name,
        patient_hash=structures.patient_hash,
        study_uid=structures.study_uid,
        series_uids=structures.series_uids,
        frames={roi.frame_of_reference_uid: f"ROI {roi.name!r}" for roi in reversed(chosen)},
        advice='if it belongs there all the same, identity="geometry" lets its geometry decide',
    )


def _mask(path: Path, roi: _Roi, grid: Reference, strict: bool) -> tuple[np.ndarray, dict[str, int]]:
    """Rasterize the closed contours of one ROI; return the mask [X, Y, Z] and what was counted."""
    try:
        with quiet():
            points, duplicates, degenerate = _distinct([_points(path, roi, contour) for contour in roi.contours])
    except MedsegError:
        raise
    except Exception as error:  # elements that pydicom parses only now
        raise ReadError(
            f"{path}: ROI {roi.name!r} has a damaged contour: it cannot be parsed ({type(error).__name__})"
        ) from error
    counts = {
        "contours": len(roi.contours),
        "not_closed": sum(roi.types.values()) - len(roi.contours),
        "between": 0,
        "cut": 0,
        "crossing": 0,
        "duplicates": duplicates,
        "outside": 0,
        "degenerate": degenerate,
    }
    inverse = np.linalg.inv(grid.affine)
    to_ras = np.array([-1.0, -1.0, 1.0])
    # Rounding keeps points that lie on voxel centers from falling to either side by the noise of the inverse.
    contours = [np.round(contour * to_ras @ inverse[:3, :3].T + inverse[:3, 3], 6) for contour in points]
    # Slices lie together in memory, as in the image that `read_image` gives.
    buffer = np.zeros(grid.shape[::-1], dtype=np.uint8)
    filled = False
    if contours:
        sizes = grid.spacing
        spans = np.array([np.ptp(contour, axis=0) for contour in contours])
        axis = int(np.argmin(np.median(spans * sizes, axis=0)))
        if spans[:, axis].max() > 0.5:
            worst = int(spans[:, axis].argmax())
            raise GeometryError(
                f"{path}: ROI {roi.name!r} has a contour that is not parallel to the slices of {grid.name}: it spans "
                f"{spans[worst, axis] * sizes[axis]:.2f} mm across them, where slices are {sizes[axis]:.2f} mm apart"
            )
        heights = np.array([contour[:, axis].mean() for contour in contours])
        # Rounded coordinates put the contours of one oblique plane at heights as uneven as their own points.
        planes, members = _planes(heights, tolerance=float(np.clip(spans[:, axis].max(), 0.02, 0.25)))
        flat = [np.delete(contour, axis, axis=1)[:, ::-1] for contour in contours]
        view = np.moveaxis(buffer, 2 - axis, 0)
        size = np.array(view.shape[1:])
        half = max(0.5, _slab(planes) / 2)
        low, high = -half, len(view) - 1 + half
        for contour, height in zip(flat, heights, strict=True):
            beyond = (contour.max(axis=0) < -0.5).any() or (contour.min(axis=0) > size - 0.5).any()
            outside = bool(beyond) or not low <= height <= high
            # A contour along the border of the image may lie on the outer edge of its voxels, and a bit beyond.
            counts["cut"] += int(
                not outside and bool((contour.min(axis=0) < -1).any() or (contour.max(axis=0) > size).any())
            )
            counts["outside"] += int(outside)
        counts["between"] = int((np.abs(heights - np.rint(heights)) > 0.1).sum())
        off = counts["outside"] + counts["cut"]
        if strict and (counts["between"] or off):
            raise GeometryError(
                f"{path}: the geometry of ROI {roi.name!r}, which has to decide, does not fit {grid.name}: of "
                f"{len(contours)} contours {counts['between']} lie between the slices and {off} reach beyond the grid"
            )
        for number, plane in _planes_of_slices(planes, len(view)).items():
            polygons = [flat[i] for i in members[plane]]
            fill_even_odd(polygons, view[number])
            filled = filled or bool(view[number].any())
        for group in members:
            counts["crossing"] += _crossing([flat[i] for i in group], view.shape[1:])
    if not filled:
        where = f"; {counts['outside']} of them lie outside the grid" if counts["outside"] else ""
        raise GeometryError(
            f"{path}: ROI {roi.name!r} has {len(roi.contours)} closed contours and no voxel of {grid.name}{where}: "
            "the structure set does not fit this image, or the contours are smaller than a voxel; "
            "choose other ROIs by name to leave it out"
        )
    return buffer.transpose(2, 1, 0), counts


def _distinct(contours: Sequence[np.ndarray]) -> tuple[list[np.ndarray], int, int]:
    """Return the contours of at least three points, each once; and how many were duplicates and how many degenerate."""
    unique: list[np.ndarray] = []
    alike: dict[bytes, dict[bytes | None, np.ndarray]] = {}
    duplicates = degenerate = 0
    for points in contours:
        if len(points) > 1 and np.abs(points[0] - points[-1]).max() < 1e-4:
            points = points[:-1]
        if len(points) < 3:
            degenerate += 1
            continue
        # Most contours differ in their box already; the exact key is made only where another has the same.
        box = np.rint(np.concatenate([points.min(axis=0), points.max(axis=0)]) * 1000).astype(np.int64)
        others = alike.setdefault(np.append(box, len(points)).tobytes(), {})
        if others:
            if None in others:
                first = others.pop(None)
                others[_contour_key(first)] = first
            key = _contour_key(points)
            if key in others:
                duplicates += 1
                continue
            others[key] = points
        else:
            others[None] = points
        unique.append(points)
    return unique, duplicates, degenerate


def _contour_key(points: np.ndarray) -> bytes:
    """Return a key that identical contours share, wherever they start and whichever way they run: their edges."""
    start = np.rint(points * 1000).astype(np.int64)
    edges = np.concatenate([start, np.roll(start, -1, axis=0)], axis=1)
    turned = edges[:, [3, 4, 5, 0, 1, 2]]
    # An edge runs from the smaller of its ends, compared by x, then y, then z.
    step = edges[:, 3:] - edges[:, :3]
    leading = np.take_along_axis(step, (step != 0).argmax(axis=1)[:, None], axis=1)
    edges = np.where(leading < 0, turned, edges)
    return hashlib.sha256(edges[np.lexsort(edges.T)].tobytes()).digest()


def _crossing(polygons: Sequence[np.ndarray], shape: tuple[int, ...]) -> int:
    """Count the polygons of one plane that overlap another without lying inside it, as far as voxels show it."""
    if len(polygons) < 2:
        return 0
    # From the largest to the smallest: one that lies inside another, or apart, covers pixels of one kind only.
    inside = np.zeros(shape, dtype=np.int32)
    one = np.zeros(shape, dtype=np.uint8)
    crossing = 0
    for number, polygon in enumerate(sorted(polygons, key=_area, reverse=True), start=1):
        box = fill_even_odd([polygon], one)
        covered = one[box] == 1
        kinds = inside[box][covered]
        crossing += int(kinds.size > 0 and bool((kinds != kinds[0]).any()))
        inside[box][covered] = number
        one[box] = 0
    return crossing


def _area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _planes(heights: np.ndarray, tolerance: float) -> tuple[np.ndarray, list[list[int]]]:
    """Group contours by height (in slices); return the heights of the planes and the contours in each."""
    order = np.argsort(heights, kind="stable")
    members: list[list[int]] = []
    last = -np.inf
    for i in order:
        if heights[i] - last > tolerance:
            members.append([])
        members[-1].append(int(i))
        last = heights[i]
    return np.array([heights[group].mean() for group in members]), members


def _slab(planes: np.ndarray) -> float:
    """Return how many slices one contour stands for: more than one only where the planes are regular and wide."""
    if len(planes) < 3:
        return 1.0
    gaps = np.diff(planes)
    least = float(gaps.min())
    regular = np.abs(gaps - least) < 0.1
    return max(1.0, least) if regular.mean() > 0.5 and least > 1.05 else 1.0


def _planes_of_slices(planes: np.ndarray, count: int) -> dict[int, int]:
    """Return which plane each slice takes: the nearest within half a slab, the far end of the slab left out."""
    half = _slab(planes) / 2
    chosen: dict[int, int] = {}
    nearest: dict[int, float] = {}
    for plane, height in enumerate(planes):
        first = max(0, int(np.ceil(height - half - 1e-3)))
        last = min(count - 1, int(np.ceil(height + half - 1e-3)) - 1)
        for number in range(first, last + 1):
            distance = abs(number - height)
            if distance < nearest.get(number, np.inf) - 1e-3:
                chosen[number], nearest[number] = plane, distance
    return chosen


def fill_even_odd(polygons: Sequence[np.ndarray], out: np.ndarray) -> tuple[slice, slice]:
    """Set the pixels whose centers lie inside closed polygons, by the even-odd rule over all of them.

    A center on an edge belongs to the polygon on its upper side along both axes, so that polygons that share an edge
    neither overlap nor leave a gap, and the two edges of a keyhole cancel exactly.

    Args:
        polygons: points × 2 each, in pixel coordinates (the center of the first pixel is 0, 0).
        out: uint8 array of two axes, zero; becomes 1 inside.

    Returns:
        the box of pixels outside which nothing was set.

    Example:
        >>> square = np.array([[0.5, 0.5], [3.5, 0.5], [3.5, 2.5], [0.5, 2.5]])
        >>> mask = np.zeros((5, 4), np.uint8)
        >>> fill_even_odd([square], mask)
        (slice(1, 4, None), slice(1, 3, None))
        >>> mask
        array([[0, 0, 0, 0],
               [0, 1, 1, 0],
               [0, 1, 1, 0],
               [0, 1, 1, 0],
               [0, 0, 0, 0]], dtype=uint8)
    """
    # Differences below a billionth of a pixel are noise, and an edge of such a height has no slope.
    rounded = [np.round(polygon, 9) for polygon in polygons]
    start = np.concatenate(rounded)
    end = np.concatenate([np.roll(polygon, -1, axis=0) for polygon in rounded])
    # Every edge runs upwards, so that an edge walked twice crosses each line at the very same number.
    down = start[:, 0] > end[:, 0]
    start[down], end[down] = end[down], start[down]
    # Only the box around the polygons is worked on: an ROI is small in its image.
    limits = np.array(out.shape)
    low = np.clip(np.ceil(start.min(axis=0)), 0, limits).astype(np.int64)
    low[1] = min(low[1], np.clip(np.ceil(end[:, 1].min()), 0, limits[1]))
    high = np.clip(np.ceil(end.max(axis=0)), 0, limits).astype(np.int64)
    high[1] = max(high[1], np.clip(np.ceil(start[:, 1].max()), 0, limits[1]))
    box = slice(int(low[0]), int(high[0])), slice(int(low[1]), int(high[1]))
    height, width = (high - low).tolist()
    if height <= 0 or width <= 0:
        return box
    first = np.clip(np.ceil(start[:, 0]), low[0], high[0]).astype(np.int64)
    steps = np.clip(np.ceil(end[:, 0]), low[0], high[0]).astype(np.int64) - first
    crossed = np.flatnonzero(steps)
    start, end, first, steps = start[crossed], end[crossed], first[crossed], steps[crossed]
    slope = (end[:, 1] - start[:, 1]) / (end[:, 0] - start[:, 0])
    flips = np.zeros(height * (width + 1), dtype=np.uint8)
    total = np.cumsum(steps)
    done = 0
    while done < len(steps):
        until = max(done + 1, int(np.searchsorted(total, (total[done - 1] if done else 0) + _CHUNK, side="right")))
        part = slice(done, until)
        edge = np.repeat(np.arange(done, until), steps[part])
        before = total[done - 1] if done else 0
        line = np.arange(before, total[until - 1]) - (total - steps)[edge] + first[edge]
        crossing = start[edge, 1] + (line - start[edge, 0]) * slope[edge]
        column = np.clip(np.ceil(np.round(crossing, 9)), low[1], high[1]).astype(np.int64)
        place = (line - low[0]) * (width + 1) + column - low[1]
        flips ^= (np.bincount(place, minlength=len(flips)) & 1).astype(np.uint8)
        done = until
    np.bitwise_xor.accumulate(flips.reshape(height, width + 1)[:, :width], axis=1, out=out[box])
    return box
