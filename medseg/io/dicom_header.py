"""The header of a DICOM file: what a series needs to know of each of its instances."""

import contextlib
import hashlib
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pydicom
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from ..errors import GeometryError, MedsegError, ReadError
from .dicom_scan import scan
from .dicom_traits import frame_traits, traits
from .dicom_values import first_item as first_item
from .dicom_values import integer as integer
from .dicom_values import numbers as numbers
from .text import one_line

# Objects that have Rows and Columns, or none, and are no image volume: they are listed, not read as images.
NON_IMAGES = frozenset(
    {"RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "SEG", "SR", "PR", "KO", "REG", "FID", "DOC", "RWV"}
)

# Values longer than this (pixels above all) stay in the file until they are asked for.
_DEFER_BYTES = 4096

_DEFLATED = DeflatedExplicitVRLittleEndian.encode()
# What a deflated file may grow to: deflate shrinks zeros a thousand times.
_MOST_BYTES = 1 << 28

# A film of an hour has as many frames.
_MOST_FRAMES = 100_000

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
    """Where one frame lies, in DICOM's own LPS millimetres, and what tells it from others at its place.

    None stands for an absent attribute. `traits` are pairs of a name and a value, the absent left out (`dicom_traits`).
    """

    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    thickness: float | None
    traits: tuple[tuple[str, Any], ...] = ()


@dataclass(slots=True)
class Instance:
    """The header of one DICOM file, as far as a series needs it.

    `samples` is 3 for color. In a Siemens mosaic `tiles` is the number of tiles in a row of the picture, each tile is a
    frame, and `rows` and `columns` are those of a tile. `problem` says why the image in a sound file cannot be read.
    `dataset` is kept only where pixels shall be read.
    """

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
    samples: int = 1
    tiles: int = 0
    problem: str = ""
    dataset: Dataset | None = None

    @property
    def is_image(self) -> bool:
        """Whether this is an image, as opposed to a structure set, a report and so on."""
        return self.rows > 0 and self.columns > 0 and self.modality not in NON_IMAGES


def hash_patient(patient_id: object) -> str:
    """Return the hash by which images and other objects of one patient know each other; nothing for no PatientID."""
    text = one_line(patient_id or "")
    return hashlib.sha256(b"medseg patient " + text.encode()).hexdigest()[:32] if text else ""


def modality_of(ds: Dataset) -> str:
    """Return the modality; in a damaged file it may be anything, a name among it, and is nothing then."""
    modality = one_line(ds.get("Modality") or "")
    return modality if re.fullmatch("[A-Z0-9_ ]{1,16}", modality) else ""


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
        with contextlib.nullcontext(file) if file else source.open("rb") as opened:
            dataset = scan(source, opened, pixels=pixels, defer=_DEFER_BYTES)
        if dataset is None:
            with contextlib.nullcontext(file) if file else source.open("rb") as opened:
                opened.seek(0)
                check_deflated(source, opened.read(1024))
                opened.seek(0)
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


def check_deflated(path: Path, start: bytes) -> None:
    """Inflate a file that is deflated once, in pieces, before pydicom inflates it into memory at once.

    Args:
        path: the file.
        start: its first bytes, 512 or more.

    Raises:
        ReadError: it becomes far larger than an image of its kind.
    """
    if start[128:132] != b"DICM" or _DEFLATED not in start:
        return
    if pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    # The group of the file's meta information begins with its own length (PS3.10 7.1).
    length = int.from_bytes(start[140:144], "little") if start[132:136] == b"\x02\0\0\0" else 0
    stream, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as file:
        file.seek(144 + length)
        while not stream.eof and (chunk := file.read(1 << 16)):
            while chunk:
                size += len(stream.decompress(chunk, 1 << 24))
                chunk = stream.unconsumed_tail
                if size > _MOST_BYTES:
                    raise ReadError(f"{path}: inflates to more than {_MOST_BYTES:,} bytes: damaged or forged")


def _instance(path: Path, ds: Dataset) -> Instance:
    def text(keyword: str) -> str:
        value = ds.get(keyword)
        if value is None:
            return ""
        parts = [value] if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
        return "\\".join(one_line(part) for part in parts)

    rows, columns = integer(ds, "Rows") or 0, integer(ds, "Columns") or 0
    modality = modality_of(ds)
    planes: tuple[Plane, ...] = ()
    tiles, problem = 0, ""
    if rows and columns and modality not in NON_IMAGES:
        planes = tuple(_planes(ds, modality))
        promised = integer(ds, "NumberOfFrames") or 1
        if promised != len(planes):
            problem = (
                f"{path}: NumberOfFrames (0028,0008) is {promised}, but the header describes {len(planes)} frames: "
                "damaged or forged"
            )
        elif "MOSAIC" in text("ImageType").upper().split("\\"):
            from .mosaic import cut

            try:
                tiles, rows, columns, planes = cut(path, ds, planes[0])
            except GeometryError as error:
                problem = str(error)
    color = integer(ds, "SamplesPerPixel") == 3 or ds.get("PhotometricInterpretation") == "PALETTE COLOR"
    return Instance(
        path=path,
        series_uid=text("SeriesInstanceUID"),
        study_uid=text("StudyInstanceUID"),
        frame_of_reference_uid=text("FrameOfReferenceUID"),
        patient_id=text("PatientID"),
        modality=modality,
        description=text("SeriesDescription"),
        number=integer(ds, "SeriesNumber"),
        study_date=text("StudyDate"),
        sop_uid=text("SOPInstanceUID"),
        rows=rows,
        columns=columns,
        planes=planes,
        tags={keyword: value for keyword in _SHOWN if (value := text(keyword))},
        samples=3 if color else 1,
        tiles=tiles,
        problem=problem,
    )


def _planes(ds: Dataset, modality: str) -> Iterator[Plane]:
    """Give the plane of every frame, from functional groups where the object is enhanced."""
    frames = integer(ds, "NumberOfFrames") or 1
    per_frame = ds.get("PerFrameFunctionalGroupsSequence")
    if not per_frame:
        plane = _plane(ds, ds, ds, traits(ds, modality))
        yield from (plane for _ in range(min(frames, _MOST_FRAMES)))
        return
    shared = (ds.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    for group in per_frame:
        yield _plane(
            first_item(group, shared, "PlanePositionSequence"),
            first_item(group, shared, "PlaneOrientationSequence"),
            first_item(group, shared, "PixelMeasuresSequence"),
            frame_traits(ds, group, shared),
        )


def _plane(position: Dataset, orientation: Dataset, measures: Dataset, traits: tuple[tuple[str, Any], ...]) -> Plane:
    between = numbers(measures, "SpacingBetweenSlices", 1)
    thickness = numbers(measures, "SliceThickness", 1)
    gap = next((abs(value[0]) for value in (between, thickness) if value and value[0]), None)
    return Plane(
        position=numbers(position, "ImagePositionPatient", 3),
        orientation=numbers(orientation, "ImageOrientationPatient", 6),
        spacing=numbers(measures, "PixelSpacing", 2),
        thickness=gap,
        traits=traits,
    )


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


def place_of(instances: Sequence[Instance]) -> str:
    """Return what a message calls these instances: the file, or the folder of several."""
    first = instances[0].path
    return str(first) if len(instances) == 1 else str(first.parent)
