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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from ..errors import GeometryError, MedsegError, ReadError
from .dicom_header import quiet
from .kinds import kind_of
from .series import Series, find_series
from .text import one_line
from .volume import Volume

if TYPE_CHECKING:
    from monai.data import MetaTensor

_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


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
    contours: list[np.ndarray] = field(default_factory=list)  # closed ones: points × 3, LPS millimetres


@dataclass
class _StructureSet:
    path: Path
    study_uid: str
    patient_hash: str
    series_uids: frozenset[str]
    rois: list[_Roi]


@dataclass
class _Reference:
    name: str
    shape: tuple[int, ...]
    affine: np.ndarray
    identity: dict[str, str]


def list_rois(path: str | os.PathLike[str]) -> list[RoiSummary]:
    """Return number, name and contour types (with their counts) of every ROI, in the order of the file.

    Raises:
        ReadError: not a readable RTSTRUCT.
    """
    structures = _read_structures(Path(path), with_points=False)
    return [RoiSummary(roi.number, roi.name, dict(roi.types)) for roi in structures.rois]


def read_rtstruct(
    path: str | os.PathLike[str],
    reference: "MetaTensor | Series | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]",
    rois: str | Sequence[str] | None = None,
) -> "dict[str, MetaTensor]":
    """Read a structure set as one mask per ROI on the grid of a reference image.

    A voxel belongs to an ROI when its center lies inside the contours of its slice. Identical contours (the same
    points, wherever they start and whichever way they run) count once; then the even-odd rule makes holes of nested
    contours and leaves keyhole contours as they are meant. A contour belongs to the slice whose center is nearest;
    where the planes of an ROI are regularly spaced wider than the slices, each contour stands for a slab as thick as
    that distance, and where they are denser the nearest plane of each slice is taken. Points and open contours make no
    mask.

    The structure set must belong to the reference: the patient must not differ, and each ROI's frame of reference, or
    the referenced series, or (where a frame of reference is absent) the study must be that of the reference. A
    reference without DICOM identity, such as a NIfTI file, is judged by geometry alone.

    Args:
        path: the RTSTRUCT file.
        reference: an image from `read_image` (also a resampled or reoriented one), a `Series`, or the path of a DICOM
            folder or an image file.
        rois: names, or patterns with ``*`` and ``?`` as in `fnmatch` (case counts); by default every ROI that has a
            closed contour. A name is first taken literally.

    Returns:
        uint8 masks [1, X, Y, Z] by ROI name, in the order of the file. ``meta["roi"]`` tells ``name``, ``number``,
        ``contours`` (closed ones), ``duplicates``, ``outside`` (contours that lie outside the grid) and ``degenerate``
        (fewer than three points); ``meta["matched_by"]`` tells what tied the structure set to the reference. The second
        of two ROIs with one name gets its number appended.

    Raises:
        ReadError: not an RTSTRUCT, damaged, a name that no ROI has, or an ROI without closed contours.
        GeometryError: the structure set belongs to another study or patient, its contours are not parallel to the
            slices, or an ROI with closed contours has no voxel on the grid.
    """
    with quiet():
        structures = _read_structures(Path(path), with_points=True)
        grid = _reference(reference, structures.series_uids)
    chosen = _choose(structures, [rois] if isinstance(rois, str) else rois)
    matched_by = _check_identity(structures, grid, chosen)
    masks: dict[str, MetaTensor] = {}
    for roi in chosen:
        voxels, counts = _mask(structures.path, roi, grid)
        volume = Volume(voxels[None], grid.affine.copy(), modality="RTSTRUCT", units="mask", dicom=dict(grid.identity))
        mask = volume.tensor(str(structures.path))
        mask.meta["roi"] = {"name": roi.name, "number": roi.number, **counts}
        mask.meta["matched_by"] = matched_by
        masks[roi.name if roi.name not in masks else f"{roi.name} ({roi.number})"] = mask
    return masks


def _read_structures(path: Path, *, with_points: bool) -> _StructureSet:
    if not path.is_file():
        raise ReadError(f"{path}: no such file: expected an RTSTRUCT")
    if kind_of(path) != "dicom":
        raise ReadError(f"{path}: not DICOM: expected an RTSTRUCT")
    try:
        with quiet():
            ds = pydicom.dcmread(path, force=True)
            modality = one_line(ds.get("Modality") or "unknown")
            if modality != "RTSTRUCT":
                raise ReadError(f"{path}: a DICOM object of modality {modality[:16]}: expected RTSTRUCT")
            return _structures(path, ds, with_points)
    except MedsegError:
        raise
    except Exception as error:  # pydicom raises many kinds on damaged files, with values of the file in their text
        raise ReadError(f"{path}: damaged RTSTRUCT: it cannot be parsed ({type(error).__name__})") from error


def _structures(path: Path, ds: Dataset, with_points: bool) -> _StructureSet:
    frames = list(ds.get("ReferencedFrameOfReferenceSequence") or [])
    only_frame = str(frames[0].get("FrameOfReferenceUID") or "") if len(frames) == 1 else ""
    series_uids = frozenset(
        str(series.get("SeriesInstanceUID") or "")
        for frame in frames
        for study in frame.get("RTReferencedStudySequence") or []
        for series in study.get("RTReferencedSeriesSequence") or []
    ) - {""}
    rois: dict[int, _Roi] = {}
    for item in ds.get("StructureSetROISequence") or []:
        number = int(item.ROINumber)
        frame = str(item.get("ReferencedFrameOfReferenceUID") or "") or only_frame
        rois[number] = _Roi(number, one_line(item.get("ROIName") or f"ROI {number}"), frame)
    for item in ds.get("ROIContourSequence") or []:
        number = int(item.ReferencedROINumber)
        roi = rois.setdefault(number, _Roi(number, f"ROI {number}", only_frame))
        for contour in item.get("ContourSequence") or []:
            kind = one_line(contour.get("ContourGeometricType") or "unknown")
            roi.types[kind] = roi.types.get(kind, 0) + 1
            if with_points and kind in _CLOSED:
                roi.contours.append(_points(path, roi, contour))
    patient = one_line(ds.get("PatientID") or "")
    hashed = hashlib.sha256(b"medseg patient " + patient.encode()).hexdigest()[:32] if patient else ""
    return _StructureSet(path, str(ds.get("StudyInstanceUID") or ""), hashed, series_uids, list(rois.values()))


def _points(path: Path, roi: _Roi, contour: Dataset) -> np.ndarray:
    # The raw text is parsed at once: pydicom would make an object of every number.
    raw = contour.get_item("ContourData")
    value = getattr(raw, "value", None)
    try:
        if isinstance(value, bytes):
            numbers = np.array(value.strip(b" \0").split(b"\\") if value.strip(b" \0") else []).astype(np.float64)
        else:
            numbers = np.array([float(number) for number in (value or [])])
        points = numbers.reshape(-1, 3)
    except ValueError as error:
        raise ReadError(
            f"{path}: ROI {roi.name!r} has ContourData (3006,0050) that is not triples of numbers"
        ) from error
    if not np.isfinite(points).all():
        raise ReadError(f"{path}: ROI {roi.name!r} has ContourData (3006,0050) with NaN or infinite numbers")
    return points


def _reference(reference: Any, series_uids: frozenset[str]) -> _Reference:
    if isinstance(reference, (str, os.PathLike)):
        images = [series for series in find_series(reference) if series.is_image]
        if len(images) > 1:
            images = [series for series in images if series.series_uid in series_uids] or images
        if len(images) != 1:
            raise ReadError(
                f"{reference}: {len(images)} images found: expected one to be the reference of the contours"
            )
        reference = images[0]
    elif not isinstance(reference, Series) and not hasattr(reference, "affine"):
        from .dicom_geometry import assemble
        from .dicom_header import read_instance

        instances = [read_instance(Path(item), force=True) for item in reference]
        grid = assemble(instances)
        first = instances[0]
        identity = _identity(first.study_uid, first.series_uid, first.frame_of_reference_uid, first.patient_id)
        return _Reference(str(first.path.parent), grid.shape, grid.affine, identity)
    if isinstance(reference, Series):
        name = str(reference.files[0].parent if reference.n_files > 1 else reference.files[0])
        if reference.problems and reference.affine is None:
            raise GeometryError(reference.problems[0])
        if reference.affine is None or len(reference.shape) != 3:
            raise GeometryError(f"{name}: not a volume with geometry: contours need one")
        identity = _identity(
            reference.study_uid, reference.series_uid, reference.frame_of_reference_uid, reference.patient_id
        )
        return _Reference(name, reference.shape, np.asarray(reference.affine, dtype=np.float64), identity)
    meta = getattr(reference, "meta", {})
    name = str(meta.get("filename_or_obj", "the reference image"))
    if not meta.get("has_geometry", True) or reference.ndim != 4:
        raise GeometryError(f"{name}: not a volume with geometry: contours need one")
    affine = np.asarray(reference.affine.detach().cpu().numpy(), dtype=np.float64)
    return _Reference(name, tuple(reference.shape[1:]), affine, dict(meta.get("dicom") or {}))


def _identity(study_uid: str, series_uid: str, frame_uid: str, patient_id: str) -> dict[str, str]:
    if not (study_uid or series_uid or frame_uid):
        return {}
    hashed = hashlib.sha256(b"medseg patient " + patient_id.encode()).hexdigest()[:32] if patient_id else ""
    return {
        "study_uid": study_uid,
        "series_uid": series_uid,
        "frame_of_reference_uid": frame_uid,
        "patient_hash": hashed,
    }


def _choose(structures: _StructureSet, wanted: Sequence[str] | None) -> list[_Roi]:
    """Return the ROIs that are asked for, in the order of the file."""
    if wanted is None:
        chosen = [roi for roi in structures.rois if roi.contours]
        if not chosen:
            raise ReadError(f"{structures.path}: none of its {len(structures.rois)} ROIs has a closed contour")
        return chosen
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
    return [roi for roi in structures.rois if roi.number in numbers]


def _check_identity(structures: _StructureSet, grid: _Reference, chosen: Sequence[_Roi]) -> str:
    """Return what ties the structure set to the reference; refuse one of another patient, study or frame."""
    identity = grid.identity
    if not any(identity.get(key) for key in ("study_uid", "frame_of_reference_uid", "series_uid")):
        return "geometry"
    name = f"{structures.path}: the structure set"
    mine, theirs = identity.get("patient_hash"), structures.patient_hash
    if mine and theirs and mine != theirs:
        raise GeometryError(f"{name} belongs to another patient than {grid.name}: PatientID (0010,0020) differs")
    if identity.get("series_uid") and identity["series_uid"] in structures.series_uids:
        return "series"
    frame = identity.get("frame_of_reference_uid")
    frames = {roi.frame_of_reference_uid for roi in chosen}
    same_study = bool(identity.get("study_uid")) and identity.get("study_uid") == structures.study_uid
    if frame and "" not in frames:
        other = [roi for roi in chosen if roi.frame_of_reference_uid != frame]
        if not other:
            return "frame of reference"
        where = "in another frame of reference" if same_study else "in another study and frame of reference"
        raise GeometryError(
            f"{name} was drawn {where} than {grid.name} (ROI {other[0].name!r}): "
            "FrameOfReferenceUID (0020,0052) differs"
        )
    if same_study:
        return "study"
    if structures.study_uid and identity.get("study_uid"):
        raise GeometryError(f"{name} belongs to another study than {grid.name}: StudyInstanceUID (0020,000D) differs")
    return "geometry"


def _mask(path: Path, roi: _Roi, grid: _Reference) -> tuple[np.ndarray, dict[str, int]]:
    """Rasterize the closed contours of one ROI; return the mask [X, Y, Z] and what was counted."""
    unique: dict[bytes, np.ndarray] = {}
    degenerate = 0
    for points in roi.contours:
        if len(points) > 1 and np.allclose(points[0], points[-1], atol=1e-4):
            points = points[:-1]
        if len(points) < 3:
            degenerate += 1
            continue
        unique.setdefault(_contour_key(points), points)
    duplicates = len(roi.contours) - degenerate - len(unique)
    counts = {"contours": len(roi.contours), "duplicates": duplicates, "outside": 0, "degenerate": degenerate}

    inverse = np.linalg.inv(grid.affine)
    to_ras = np.array([-1.0, -1.0, 1.0])
    # Rounding keeps points that lie on voxel centers from falling to either side by the noise of the inverse.
    contours = [np.round(points * to_ras @ inverse[:3, :3].T + inverse[:3, 3], 6) for points in unique.values()]
    # Slices lie together in memory, as in the image that `read_image` gives.
    buffer = np.zeros(grid.shape[::-1], dtype=np.uint8)
    voxels = buffer.transpose(2, 1, 0)
    if contours:
        sizes = np.linalg.norm(grid.affine[:3, :3], axis=0)
        spans = np.array([np.ptp(contour, axis=0) for contour in contours])
        axis = int(np.argmin(np.median(spans * sizes, axis=0)))
        if spans[:, axis].max() > 0.5:
            worst = int(spans[:, axis].argmax())
            raise GeometryError(
                f"{path}: ROI {roi.name!r} has a contour that is not parallel to the slices of {grid.name}: it spans "
                f"{spans[worst, axis] * sizes[axis]:.2f} mm across them, where slices are {sizes[axis]:.2f} mm apart"
            )
        heights = np.array([contour[:, axis].mean() for contour in contours])
        planes, members = _planes(heights)
        flat = [np.delete(contour, axis, axis=1)[:, ::-1] for contour in contours]
        slices = _planes_of_slices(planes, grid.shape[axis])
        view = np.moveaxis(buffer, 2 - axis, 0)
        for number, plane in slices.items():
            fill_even_odd([flat[i] for i in members[plane]], view[number])
        half = max(0.5, _slab(planes) / 2)
        low, high = -half, grid.shape[axis] - 1 + half
        size = np.array(view.shape[1:])
        for contour, height in zip(flat, heights, strict=True):
            beyond = (contour.max(axis=0) < -0.5).any() or (contour.min(axis=0) > size - 0.5).any()
            counts["outside"] += int(beyond or not low <= height <= high)
    if not voxels.any():
        where = f"; {counts['outside']} of them lie outside the grid" if counts["outside"] else ""
        raise GeometryError(
            f"{path}: ROI {roi.name!r} has {len(roi.contours)} closed contours and no voxel of {grid.name}{where}: "
            "the structure set does not fit this image, or the contours are smaller than a voxel"
        )
    return voxels, counts


def _contour_key(points: np.ndarray) -> bytes:
    """Return a key that identical contours share, wherever they start and whichever way they run."""
    rounded = np.round(points * 1000).astype(np.int64)
    smallest = rounded[np.lexsort(rounded.T[::-1])[0]]
    starts = np.flatnonzero((rounded == smallest).all(axis=1))
    both = [np.roll(rounded, -start, axis=0) for start in starts]
    both += [np.roll(rounded[::-1], -(len(rounded) - 1 - start), axis=0) for start in starts]
    return min(np.ascontiguousarray(turned).tobytes() for turned in both)


def _planes(heights: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """Group contours by height (in slices); return the heights of the planes and the contours in each."""
    order = np.argsort(heights, kind="stable")
    members: list[list[int]] = []
    last = -np.inf
    for i in order:
        if heights[i] - last > 0.02:
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


def fill_even_odd(polygons: Sequence[np.ndarray], out: np.ndarray) -> None:
    """Set the pixels whose centers lie inside closed polygons, by the even-odd rule over all of them.

    A center on an edge belongs to the polygon on its upper side along both axes, so that polygons that share an edge
    neither overlap nor leave a gap, and the two edges of a keyhole cancel exactly.

    Args:
        polygons: points × 2 each, in pixel coordinates (the center of the first pixel is 0, 0).
        out: uint8 array of two axes, zero; becomes 1 inside.

    Example:
        >>> square = np.array([[0.5, 0.5], [3.5, 0.5], [3.5, 2.5], [0.5, 2.5]])
        >>> mask = np.zeros((5, 4), np.uint8)
        >>> fill_even_odd([square], mask)
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
    first = np.clip(np.ceil(start[:, 0]), 0, out.shape[0]).astype(np.int64)
    last = np.clip(np.ceil(end[:, 0]), 0, out.shape[0]).astype(np.int64)
    steps = last - first
    edge = np.repeat(np.arange(len(steps)), steps)
    line = np.arange(len(edge)) - np.repeat(np.cumsum(steps) - steps, steps) + first[edge]
    slope = (end[edge, 1] - start[edge, 1]) / (end[edge, 0] - start[edge, 0])
    crossing = start[edge, 1] + (line - start[edge, 0]) * slope
    column = np.clip(np.ceil(np.round(crossing, 9)), 0, out.shape[1]).astype(np.int64)
    if not len(line):
        return
    # Only the box around the polygons is worked on: an ROI is small in its image.
    top, left = line.min(), column.min()
    height, width = line.max() + 1 - top, column.max() - left
    flips = np.bincount((line - top) * (width + 1) + column - left, minlength=height * (width + 1))
    flips = (flips.reshape(height, width + 1)[:, :width] & 1).astype(np.uint8)
    np.bitwise_xor.accumulate(flips, axis=1, out=out[top : top + height, left : left + width])
