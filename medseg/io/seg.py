"""DICOM segmentations (SEG) as masks, by highdicom.

Attributes are those of DICOM PS3.3 C.8.20 (Segmentation) and C.7.6.16 (functional groups).
"""

import difflib
import fnmatch
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydicom.dataset import Dataset

from ..errors import GeometryError, MedsegError, ReadError
from .dicom_header import first_item, hash_patient, integer, numbers, quiet
from .dicom_object import read_object
from .reference import Reference, find_reference, matched_by, uid_of
from .text import one_line
from .volume import Volume

if TYPE_CHECKING:
    from monai.data import MetaTensor

    from .series import Series

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")

# Frames say where they lie, so a few of them can claim a huge grid: no series has so many slices.
_MOST_SLICES = 4000
_MOST_PIXELS = 1 << 24


@dataclass(frozen=True, eq=False)
class Segment:
    """One segment, and how its voxels are read: [X, Y, Z], uint8 or (fractional) float32."""

    number: int
    label: str
    algorithm_type: str
    voxels: Callable[[], np.ndarray]


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What a SEG file holds; the grid is that of its own frames."""

    path: Path
    kind: str
    grid: Reference
    thickness: float
    series_uids: frozenset[str]
    segments: list[Segment]

    @property
    def problems(self) -> tuple[str, ...]:
        """What is open about the grid of the frames."""
        apart = float(self.grid.spacing[2])
        if self.grid.shape[2] == 1 or self.thickness > 0.95 * apart:
            return ()
        return (
            f"slices of {self.thickness:.4g} mm lie {apart:.4g} mm apart, without SpacingBetweenSlices (0018,0088): "
            "whether empty frames between them were left out is unknown",
        )


def read_seg(
    path: str | os.PathLike[str],
    reference: "MetaTensor | Series | str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None" = None,
    segments: int | str | Sequence[int | str] | None = None,
    *,
    probabilities: bool = False,
) -> "dict[str, MetaTensor]":
    """Read a DICOM segmentation as one mask per segment.

    Without a reference the grid is that of the frames: it begins at the first slice that holds any segment and ends at
    the last. With one, the masks lie on its grid. Where the frames are slices of the reference, voxels are copied and
    frames that the file leaves out, as it may, are empty. Otherwise the voxel of the segmentation that is nearest to
    each voxel of the reference decides.

    Args:
        path: the SEG file: binary, fractional or a label map.
        reference: an image from `read_image`, a `Series`, the path of a DICOM folder or an image file, or the files of
            one DICOM series.
        segments: numbers, or labels, which may be patterns with ``*`` and ``?`` as in `fnmatch` (case counts); by
            default all. The background of a label map is none.
        probabilities: give a fractional segmentation as it is, float32 from 0 to 1; by default a voxel belongs to a
            segment from 0.5 on.

    Returns:
        uint8 masks [1, X, Y, Z] by segment label, in the order of the file; the second of two with one label gets its
        number appended. ``meta["segment"]`` tells ``number``, ``label``, ``algorithm_type``, ``outside`` (voxels that
        lie outside the reference) and ``resampled`` (1 where the grids differ). ``meta["matched_by"]`` tells what
        tied the segmentation to the reference: ``"series"``, ``"frame of reference"``, ``"study"``, ``"geometry"``;
        it is empty without one.

    Raises:
        ReadError: not a SEG, damaged, a segmentation of a microscope's slide, or a segment that it does not have.
        GeometryError: its frames form no regular volume; or the reference is of another patient, frame of reference or
            study, or holds no voxel of a segment that has some.
    """
    with quiet():
        seg = open_seg(Path(path), probabilities)
        chosen = _choose(seg, [segments] if isinstance(segments, (int, str)) else segments)
        target, tied_by, strict = seg.grid, "", False
        problems = seg.problems if reference is None else ()
        if reference is not None:
            target = find_reference(reference, "segments", seg.series_uids)
            tied_by, strict = _tie(seg, target)
        masks: dict[str, MetaTensor] = {}
        for segment in chosen:
            voxels = read_voxels(seg, segment)
            outside, resampled = 0, False
            if reference is not None:
                voxels, outside, resampled = _onto(seg, segment, voxels, target)
                if strict and (outside or resampled):
                    raise GeometryError(
                        f"{seg.path}: nothing but geometry ties the segmentation to {target.name}, and its frames are "
                        "no slices of it"
                    )
            volume = Volume(
                voxels[None],
                target.affine.copy(),
                modality="SEG",
                units="mask",
                problems=problems,
                dicom=dict(target.identity),
            )
            mask = volume.tensor(str(seg.path))
            mask.meta["segment"] = {
                "number": segment.number,
                "label": segment.label,
                "algorithm_type": segment.algorithm_type,
                "outside": outside,
                "resampled": int(resampled),
            }
            mask.meta["matched_by"] = tied_by
            key = segment.label
            while key in masks:
                key = f"{key} ({segment.number})"
            masks[key] = mask
    return masks


def open_seg(path: Path, probabilities: bool = False) -> Segmentation:
    """Read everything of a SEG but its voxels.

    Raises:
        ReadError: not a SEG, damaged, or of a microscope's slide.
        GeometryError: its frames form no regular volume.
    """
    try:
        with quiet():
            return _segmentation(path, read_object(path, "SEG"), probabilities)
    except MedsegError:
        raise
    except Exception as error:  # pydicom and highdicom raise many kinds on damaged files, with values in their text
        raise ReadError(
            f"{path}: damaged SEG, or not as the standard has it: it cannot be parsed ({type(error).__name__})"
        ) from error


def read_voxels(seg: Segmentation, segment: Segment) -> np.ndarray:
    """Return the voxels of a segment on the grid of the file, [X, Y, Z].

    Raises:
        ReadError: they cannot be decoded.
    """
    try:
        return segment.voxels()
    except Exception as error:
        raise ReadError(
            f"{seg.path}: the frames of segment {segment.number} cannot be decoded ({type(error).__name__})"
        ) from error


def _segmentation(path: Path, ds: Dataset, probabilities: bool) -> Segmentation:
    import highdicom

    syntax = ds.file_meta.TransferSyntaxUID
    if not syntax.is_little_endian:
        raise ReadError(f"{path}: a SEG in {one_line(syntax.name)}, which highdicom does not read: convert it first")
    if "TotalPixelMatrixColumns" in ds and "TotalPixelMatrixOriginSequence" in ds:
        raise ReadError(f"{path}: a segmentation of a microscope's slide: expected one of a volume in a patient")
    _check_size(path, ds)
    series_uids = frozenset(uid_of(item.get("SeriesInstanceUID")) for item in ds.get("ReferencedSeriesSequence") or [])
    shared = (ds.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    frames = ds.get("PerFrameFunctionalGroupsSequence") or [Dataset()]
    count = integer(ds, "NumberOfFrames") or 1
    if len(frames) != count and "PerFrameFunctionalGroupsSequence" in ds:
        raise ReadError(
            f"{path}: {count} frame{'s' if count > 1 else ''} by NumberOfFrames (0028,0008) and {len(frames)} by "
            "PerFrameFunctionalGroupsSequence (5200,9230): some are missing; copy it again from its source"
        )
    measures = first_item(frames[0], shared, "PixelMeasuresSequence")
    for keyword in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence"):
        if not first_item(frames[0], shared, keyword):
            raise GeometryError(
                f"{path}: its frames have no {keyword}: they lie nowhere in the patient (it segments a flat image)"
            )
    found = highdicom.seg.Segmentation.from_dataset(ds, copy=False)
    geometry = found.get_volume_geometry()
    if geometry is None:
        raise GeometryError(
            f"{path}: its frames form no regular volume: their distances are no multiples of one distance, or they "
            "shift sideways"
        )
    slices, rows, columns = geometry.spatial_shape
    if slices > _MOST_SLICES:
        raise GeometryError(
            f"{path}: its {len(frames)} frames span {slices:,} slices: expected at most {_MOST_SLICES:,}; is "
            "SpacingBetweenSlices (0018,0088) right?"
        )
    # highdicom counts slice, row, column in LPS; here it is column, row, slice in RAS, slices along the normal.
    lps = geometry.affine[:, [2, 1, 0, 3]].copy()
    turned = float(np.linalg.det(lps[:3, :3])) < 0
    if turned:
        lps[:3, 3] += lps[:3, 2] * (slices - 1)
        lps[:3, 2] *= -1
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    declared = numbers(measures, "SpacingBetweenSlices", 1) or numbers(measures, "SliceThickness", 1)
    grid = Reference(
        str(path),
        (columns, rows, slices),
        np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps,
        {
            "study_uid": uid_of(ds.get("StudyInstanceUID")),
            "series_uid": uid_of(ds.get("SeriesInstanceUID")),
            "frame_of_reference_uid": uid_of(ds.get("FrameOfReferenceUID")),
            "patient_hash": hash_patient(ds.get("PatientID")),
        },
    )
    kind = found.segmentation_type.value

    def voxels(number: int) -> np.ndarray:
        if kind == "LABELMAP":
            array = found.get_volume(combine_segments=True, skip_overlap_checks=True).array == number
        else:
            array = found.get_volume(segment_numbers=[number]).array[..., 0]
        if kind == "FRACTIONAL" and probabilities:
            array = array.astype(np.float32, copy=False)
        elif kind == "FRACTIONAL":
            array = (array >= 0.5).astype(np.uint8)
        else:
            array = array.astype(np.uint8, copy=False)
        return (array[::-1] if turned else array).copy().transpose(2, 1, 0)

    described = []
    for item in found.SegmentSequence:
        number = int(item.SegmentNumber)
        if number == 0 and kind == "LABELMAP":
            continue
        label = one_line(item.get("SegmentLabel") or f"segment {number}")
        described.append(
            Segment(
                number,
                label,
                one_line(item.get("SegmentAlgorithmType") or ""),
                lambda number=number: voxels(number),  # type: ignore[misc]
            )
        )
    if not described:
        raise ReadError(f"{path}: a SEG without any segment")
    thickness = abs(declared[0]) if declared and declared[0] else float(spacing[2])
    return Segmentation(path, kind, grid, thickness, series_uids, described)


def _check_size(path: Path, ds: Dataset) -> None:
    """Refuse a header that promises more pixels than the file can hold."""
    rows, columns, frames = (integer(ds, keyword) or 1 for keyword in ("Rows", "Columns", "NumberOfFrames"))
    keyword = next((keyword for keyword in _PIXELS if keyword in ds), None)
    if keyword is None:
        raise ReadError(f"{path}: no pixels: the file has a header and no PixelData (7FE0,0010)")
    if rows * columns > _MOST_PIXELS:
        raise ReadError(f"{path}: frames of {columns} x {rows} pixels: expected at most {_MOST_PIXELS:,} pixels")
    if ds.file_meta.TransferSyntaxUID.is_encapsulated:
        return
    promised = (rows * columns * frames * (integer(ds, "BitsAllocated") or 8) + 7) // 8
    held = len(ds.get_item(keyword).value or b"")
    if held < promised:
        raise ReadError(f"{path}: cut short: {held:,} bytes of pixels, its header promises {promised:,}")


def _choose(seg: Segmentation, wanted: Sequence[int | str] | None) -> list[Segment]:
    """Return the segments that are asked for, in the order of the file."""
    if wanted is None:
        return seg.segments
    taken: set[int] = set()
    for entry in wanted:
        if isinstance(entry, str):
            exact = [segment for segment in seg.segments if segment.label == entry]
            if len(exact) > 1:
                listed = ", ".join(str(segment.number) for segment in exact)
                raise ReadError(
                    f"{seg.path}: {len(exact)} segments are named {entry!r}: choose by number, one of {listed}"
                )
            found = exact or [segment for segment in seg.segments if fnmatch.fnmatchcase(segment.label, entry)]
        else:
            found = [segment for segment in seg.segments if segment.number == entry]
        if not found:
            near = difflib.get_close_matches(str(entry), [segment.label for segment in seg.segments], cutoff=0.5)
            order = sorted(seg.segments, key=lambda segment: segment.label not in near)
            listed = ", ".join(f"{segment.number} {segment.label!r}" for segment in order[:20])
            more = f" and {len(order) - 20} more" if len(order) > 20 else ""
            raise ReadError(f"{seg.path}: no segment is {entry!r}: it has {listed}{more}")
        taken.update(segment.number for segment in found)
    return [segment for segment in seg.segments if segment.number in taken]


def _tie(seg: Segmentation, target: Reference) -> tuple[str, bool]:
    own = seg.grid.identity
    return matched_by(
        target,
        f"{seg.path}: the segmentation",
        patient_hash=own["patient_hash"],
        study_uid=own["study_uid"],
        series_uids=seg.series_uids | {own["series_uid"]} - {""},
        frames={own["frame_of_reference_uid"]: "the whole file"},
    )


def _onto(seg: Segmentation, segment: Segment, voxels: np.ndarray, target: Reference) -> tuple[np.ndarray, int, bool]:
    """Bring a segment to another grid; return it, how many of its voxels lie outside, and whether it was resampled."""
    step = np.linalg.inv(target.affine) @ seg.grid.affine
    # Slices lie together in memory, as in the image that `read_image` gives.
    out = np.zeros(tuple(target.shape)[::-1], dtype=voxels.dtype).transpose(2, 1, 0)
    occupied = np.flatnonzero(voxels.any(axis=(0, 1)))
    # Frames of the very slices of the target are copied: a slice whose frame was left out stays empty.
    copied = _same_planes(seg, step, target, occupied)
    held = outside = 0
    for number in occupied:
        columns, rows = np.nonzero(voxels[:, :, number])
        places = np.stack([columns, rows, np.full_like(rows, number)], axis=1) @ step[:3, :3].T + step[:3, 3]
        nearest = np.rint(places).astype(np.int64)
        inside = ((nearest >= 0) & (nearest < target.shape)).all(axis=1)
        held += len(inside)
        outside += int((~inside).sum())
        if copied:
            out[tuple(nearest[inside].T)] = voxels[columns[inside], rows[inside], number]
    if not copied:
        from scipy.ndimage import affine_transform

        back = np.linalg.inv(step)
        # The tiny shift keeps voxels that lie halfway between two from falling to either side by noise.
        affine_transform(
            voxels, back[:3, :3], back[:3, 3] + 1e-6, tuple(target.shape), output=out, order=0, mode="grid-constant"
        )
    if held and not out.any():
        raise GeometryError(
            f"{seg.path}: segment {segment.number} {segment.label!r} has {held:,} voxels and none of them on the grid "
            f"of {target.name}: it does not fit this image, or is smaller than its voxels"
        )
    return out, outside, not copied


def _same_planes(seg: Segmentation, step: np.ndarray, target: Reference, occupied: np.ndarray) -> bool:
    """Whether the frames are slices of the target: the same pixels, at the places of slices, and no thicker."""
    whole = np.rint(step[:3, :2])
    if (np.abs(whole).sum(axis=0) != 1).any() or np.abs(whole).sum(axis=1).max() != 1:
        return False
    columns, rows, _ = seg.grid.shape
    corners = np.array([(x, y, z) for x in (0, columns - 1) for y in (0, rows - 1) for z in occupied], dtype=np.float64)
    places = corners.reshape(-1, 3) @ step[:3, :3].T + step[:3, 3]
    if len(places) and np.abs(places - np.rint(places)).max() > 0.1:
        return False
    through = int(np.flatnonzero(np.abs(whole).sum(axis=1) == 0)[0])
    return seg.thickness <= 1.05 * float(target.spacing[through])
