"""DICOM image series, assembled by where their slices are and not by how their files are called.

The geometry is that of DICOM PS3.3 C.7.6.2 (Image Plane) and, for enhanced multi-frame objects, C.7.6.16 (functional
groups). What does not form one regular volume is refused with the reason; nothing is stretched or left out quietly.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pydicom
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, get_decoder

from ..errors import ConfigError, GeometryError, MedsegError, MissingTagError, ReadError
from .suv import suv_factor
from .text import one_line
from .volume import Volume

PET_UNITS = ("SUVbw", "stored")

# Objects that have Rows and Columns, or none, and are no image volume: they are listed, not read as images.
NON_IMAGES = frozenset(
    {"RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "SEG", "SR", "PR", "KO", "REG", "FID", "DOC", "RWV"}
)

# Values longer than this (pixels above all) stay in the file until they are asked for.
_DEFER_BYTES = 4096

# The extra attributes that a listing of series may show.
_SHOWN = (
    "ImageType",
    "BodyPartExamined",
    "PatientSex",
    "PatientAge",
    "Manufacturer",
    "ProtocolName",
    "CorrectedImage",
    "Units",
    "DecayCorrection",
)


class DicomIndexError(ReadError):
    """A DICOMDIR: sound, yet no object of its own."""


@dataclass(frozen=True, slots=True)
class Plane:
    """Where one frame lies, in DICOM's own LPS millimetres. None stands for an absent attribute."""

    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    thickness: float | None


@dataclass(slots=True)
class Instance:
    """The header of one DICOM file, as far as a series needs it. `dataset` is kept only where pixels shall be read."""

    path: Path
    series_uid: str
    study_uid: str
    frame_of_reference_uid: str
    patient_id: str
    modality: str
    description: str
    number: int | None
    study_date: str
    sop_uid: str
    rows: int
    columns: int
    planes: tuple[Plane, ...]
    tags: dict[str, str]
    dataset: Dataset | None = None

    @property
    def is_image(self) -> bool:
        """Whether this is an image, as opposed to a structure set, a report and so on."""
        return self.rows > 0 and self.columns > 0 and self.modality not in NON_IMAGES

    def hashed_patient(self) -> str:
        """Return a hash that tells patients apart without naming them; empty where there is no PatientID."""
        if not self.patient_id:
            return ""
        return hashlib.sha256(b"medseg patient " + self.patient_id.encode()).hexdigest()[:32]


def read_instance(
    source: Path, file: IO[bytes] | None = None, *, pixels: bool = False, force: bool = False
) -> Instance:
    """Read the header of one DICOM file.

    Args:
        source: the file; its name is used in messages.
        file: the same file, already open at its start.
        pixels: keep the dataset, from which the pixels can be read later.
        force: read also where the DICM mark is missing.

    Raises:
        ReadError: not DICOM, or damaged.
    """
    try:
        dataset = pydicom.dcmread(
            file or source, stop_before_pixels=not pixels, defer_size=_DEFER_BYTES if pixels else None, force=force
        )
        if "SOPClassUID" not in dataset and "Rows" not in dataset:
            if "DirectoryRecordSequence" in dataset:
                raise DicomIndexError(
                    f"{source}: a DICOMDIR, an index of other files: give the folder of the series itself"
                )
            raise ReadError(f"{source}: not a DICOM image: it has neither SOPClassUID nor Rows")
        instance = _instance(source, dataset)
    except MedsegError:
        raise
    except Exception as error:  # pydicom raises many kinds on damaged files, with values of the file in their text
        raise ReadError(f"{source}: damaged DICOM: its header cannot be parsed ({type(error).__name__})") from error
    if pixels:
        instance.dataset = dataset
    return instance


def _instance(path: Path, ds: Dataset) -> Instance:
    def text(keyword: str) -> str:
        value = ds.get(keyword)
        if value is None:
            return ""
        parts = [value] if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
        return "\\".join(one_line(part) for part in parts)

    rows, columns = _integer(ds, "Rows") or 0, _integer(ds, "Columns") or 0
    modality = text("Modality")
    planes: tuple[Plane, ...] = ()
    if rows and columns and modality not in NON_IMAGES:
        planes = tuple(_planes(ds))
    return Instance(
        path=path,
        series_uid=text("SeriesInstanceUID"),
        study_uid=text("StudyInstanceUID"),
        frame_of_reference_uid=text("FrameOfReferenceUID"),
        patient_id=text("PatientID"),
        modality=modality,
        description=text("SeriesDescription"),
        number=_integer(ds, "SeriesNumber"),
        study_date=text("StudyDate"),
        sop_uid=text("SOPInstanceUID"),
        rows=rows,
        columns=columns,
        planes=planes,
        tags={keyword: value for keyword in _SHOWN if (value := text(keyword))},
    )


def _integer(ds: Dataset, keyword: str) -> int | None:
    value = ds.get(keyword)
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _floats(ds: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    value = ds.get(keyword)
    if value is None or value == "":
        return None
    try:
        numbers = tuple(float(number) for number in (value if isinstance(value, Sequence) else [value]))
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(np.isfinite(numbers)) else None


def _planes(ds: Dataset) -> Iterator[Plane]:
    """Give the plane of every frame, from functional groups where the object is enhanced."""
    frames = _integer(ds, "NumberOfFrames") or 1
    per_frame = ds.get("PerFrameFunctionalGroupsSequence")
    if not per_frame:
        plane = _plane(ds, ds, ds)
        yield from (plane for _ in range(min(frames, 1_000_000)))
        return
    shared = (ds.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    for group in per_frame:
        yield _plane(
            _group(group, shared, "PlanePositionSequence"),
            _group(group, shared, "PlaneOrientationSequence"),
            _group(group, shared, "PixelMeasuresSequence"),
        )


def _plane(position: Dataset, orientation: Dataset, measures: Dataset) -> Plane:
    between = _floats(measures, "SpacingBetweenSlices", 1)
    thickness = _floats(measures, "SliceThickness", 1)
    gap = next((abs(value[0]) for value in (between, thickness) if value and value[0]), None)
    return Plane(
        position=_floats(position, "ImagePositionPatient", 3),
        orientation=_floats(orientation, "ImageOrientationPatient", 6),
        spacing=_floats(measures, "PixelSpacing", 2),
        thickness=gap,
    )


def _group(group: Dataset, shared: Dataset, keyword: str) -> Dataset:
    """Return the first item of a functional group, per frame before shared."""
    for place in (group, shared):
        if items := place.get(keyword):
            return items[0]
    return Dataset()


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
    where = _where(instances)
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


def read_volume(instances: Sequence[Instance], *, pet_units: str = "SUVbw") -> Volume:
    """Read the pixels of one series, whose instances hold their datasets (``read_instance(..., pixels=True)``).

    Raises:
        ReadError: no pixels, pixels that cannot be decoded, or several series.
        GeometryError: see `assemble`.
        MissingTagError: an attribute that SUVbw needs is absent (PET only).
    """
    if pet_units not in PET_UNITS:
        raise ConfigError(f"pet_units: {pet_units!r} found, expected one of {', '.join(PET_UNITS)}")
    try:
        return _volume(instances, pet_units)
    except MedsegError:
        raise
    except Exception as error:  # values of damaged elements, which pydicom parses only when they are asked for
        raise ReadError(
            f"{_where(instances)}: damaged DICOM: an element cannot be parsed ({type(error).__name__})"
        ) from error


def _volume(instances: Sequence[Instance], pet_units: str) -> Volume:
    where = _where(instances)
    first = instances[0]
    for item in instances:
        if not item.is_image:
            raise ReadError(f"{item.path}: no image: a DICOM object of modality {item.modality or 'unknown'}")
    if len({item.patient_id for item in instances}) > 1:
        raise ReadError(f"{where}: files of different patients share one SeriesInstanceUID: set them apart")
    grid = assemble(instances)
    columns, rows, count = grid.shape
    samples = {_integer(_dataset(item), "SamplesPerPixel") or 1 for item in instances}
    palette = _dataset(first).get("PhotometricInterpretation") == "PALETTE COLOR"
    channels = 3 if palette else samples.pop()
    if samples and not palette:
        raise GeometryError(f"{where}: gray and color slices in one series")
    _check_promise(instances, columns * rows * count * channels)

    stack = np.empty((count, rows, columns, channels), dtype=np.float32)
    slots: dict[int, list[tuple[int, int]]] = {}
    for slot, (i, frame) in enumerate(grid.order):
        slots.setdefault(i, []).append((frame, slot))
    units = set()
    for i, wanted in slots.items():
        item = instances[i]
        ds = _dataset(item)
        pet = suv_factor(ds, name=str(item.path)) if item.modality == "PT" and pet_units == "SUVbw" else None
        frames = sorted(wanted)
        for (frame, slot), pixels in zip(frames, _decode(item, [frame for frame, _ in frames]), strict=True):
            if pixels.shape[:2] != (rows, columns):
                raise ReadError(f"{item.path}: pixels of {pixels.shape}, expected {rows} rows and {columns} columns")
            units.add(_rescale(item, frame, pixels, stack[slot]))
            if pet is not None:
                stack[slot] *= np.float32(pet)
        _forget_pixels(ds)
    unit = "SUVbw" if first.modality == "PT" and pet_units == "SUVbw" else units.pop() if len(units) == 1 else "stored"
    return Volume(
        voxels=stack.transpose(3, 2, 1, 0),
        affine=grid.affine,
        modality=first.modality,
        units=unit,
        has_geometry=grid.has_geometry,
        dicom={
            "study_uid": first.study_uid,
            "series_uid": first.series_uid,
            "frame_of_reference_uid": first.frame_of_reference_uid,
            "patient_hash": first.hashed_patient(),
        },
    )


def _decode(item: Instance, frames: list[int]) -> Iterator[np.ndarray]:
    """Give the stored values of the wanted frames, in order, as [rows, columns] or [rows, columns, 3] (RGB)."""
    ds = _dataset(item)
    syntax = ds.file_meta.get("TransferSyntaxUID") if hasattr(ds, "file_meta") else None
    try:
        if not any(keyword in ds for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise ReadError(f"{item.path}: no pixels: the file has a header and no PixelData (7FE0,0010)")
        if syntax is None:
            syntax = (
                pydicom.uid.ImplicitVRLittleEndian if ds.original_encoding[0] else pydicom.uid.ExplicitVRLittleEndian
            )
        decoder = get_decoder(syntax)
        if not decoder.is_available:
            raise ReadError(
                f"{item.path}: its pixels cannot be decoded: no decoder for {one_line(syntax.name)} is at work here; "
                "install python-gdcm, pyjpegls, pylibjpeg with pylibjpeg-openjpeg and pylibjpeg-rle"
            )
        for pixels, _ in decoder.iter_array(ds, indices=frames, raw=False):
            if ds.PhotometricInterpretation == "PALETTE COLOR":
                pixels = apply_color_lut(pixels, ds)
                if pixels.dtype == np.uint16:  # palettes of 16 bits are meant to be shown with 8
                    pixels = pixels >> 8
            yield pixels
    except (MedsegError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a decoder in Rust is no Exception
        kind = one_line(getattr(syntax, "name", "an unknown transfer syntax"))
        raise ReadError(f"{item.path}: its pixels cannot be decoded ({kind}, {type(error).__name__})") from error


def _rescale(item: Instance, frame: int, pixels: np.ndarray, out: np.ndarray) -> str:
    """Write the values of one frame into ``out`` [rows, columns, channels]; return their unit."""
    if pixels.ndim == 3:
        out[...] = pixels
        return "stored"
    ds = _dataset(item)
    quantity = item.modality in ("CT", "PT", "NM", "MR")
    if not quantity and ds.get("PhotometricInterpretation") == "MONOCHROME1":
        # In MONOCHROME1 the lowest value is shown white. Quantities keep their values, pictures get white high.
        bits = int(ds.BitsStored)
        signed = bool(ds.PixelRepresentation)
        pixels = (-1 if signed else (1 << bits) - 1) - pixels.astype(np.int64)
    source = ds
    if groups := ds.get("PerFrameFunctionalGroupsSequence"):
        shared = (ds.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
        source = _group(groups[frame], shared, "PixelValueTransformationSequence") or ds
    if source.get("ModalityLUTSequence"):
        out[..., 0] = apply_modality_lut(pixels, source)
        return one_line(source.ModalityLUTSequence[0].get("ModalityLUTType") or "stored")
    slope, intercept = _floats(source, "RescaleSlope", 1), _floats(source, "RescaleIntercept", 1)
    out[..., 0] = pixels
    if slope is None and intercept is None:
        return "stored"
    if slope is None or intercept is None:
        absent = "RescaleSlope (0028,1053)" if slope is None else "RescaleIntercept (0028,1052)"
        raise MissingTagError(f"{item.path}: {absent} is missing or unusable although its partner is present")
    if slope[0] != 1:
        out *= np.float32(slope[0])
    if intercept[0] != 0:
        out += np.float32(intercept[0])
    kind = one_line(source.get("RescaleType") or ("HU" if item.modality == "CT" else "stored"))
    return "stored" if kind == "US" else kind


def _check_promise(instances: Sequence[Instance], voxels: int) -> None:
    """Refuse before any memory is taken when the headers promise far more than the files can hold."""
    held = sum(item.path.stat().st_size for item in instances)
    if voxels > 3000 * held + (1 << 24):
        raise ReadError(
            f"{_where(instances)}: the header promises {voxels:,} voxels, the files have {held:,} bytes: "
            "damaged or forged"
        )
    for item in instances:
        ds = _dataset(item)
        syntax = ds.file_meta.get("TransferSyntaxUID") if hasattr(ds, "file_meta") else None
        if syntax is None or syntax.is_compressed or syntax.is_deflated:
            continue
        needed = item.rows * item.columns * len(item.planes) * (_integer(ds, "BitsAllocated") or 8) // 8
        if needed > item.path.stat().st_size:
            raise ReadError(
                f"{item.path}: cut short: its header promises {needed:,} bytes of pixels, the file has "
                f"{item.path.stat().st_size:,}; copy it again from its source"
            )


def _dataset(item: Instance) -> Dataset:
    if item.dataset is None:
        raise ValueError("the instance was read without its dataset")
    return item.dataset


def _forget_pixels(ds: Dataset) -> None:
    """Free the pixels of a slice once they are in the volume."""
    for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"):
        if keyword in ds:
            del ds[keyword]
    ds._pixel_array = None


def _where(instances: Sequence[Instance]) -> str:
    first = instances[0].path
    return str(first) if len(instances) == 1 else str(first.parent)


def _commonest(rows: np.ndarray) -> np.ndarray:
    """Return the row that occurs most often, up to rounding."""
    _, first, counts = np.unique(np.round(rows, 4), axis=0, return_index=True, return_counts=True)
    return rows[first[counts.argmax()]]


def _odd_one(values: list[Any]) -> int:
    """Return the place of a value of the rarest kind."""
    return min(range(len(values)), key=lambda i: values.count(values[i]))


class quiet:
    """Keep pydicom's remarks on odd values off the terminal: they quote the file, names included."""

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        self._validation = disable_value_validation()
        self._validation.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._validation.__exit__(*error)
        self._warnings.__exit__(*error)
