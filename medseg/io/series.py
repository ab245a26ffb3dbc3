"""What lies in a folder: `find_series` reads headers only and tells what is right and wrong about each series."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import MedsegError, ReadError
from .dicom_geometry import assemble
from .dicom_header import DicomIndexError, Instance, quiet, read_instance
from .kinds import claimed_kind, kind_by_content, kind_of, read_start


@dataclass(frozen=True)
class Series:
    """A DICOM series, or one file of another kind, with what its headers say.

    Attributes:
        kind: ``"dicom"``, ``"nifti"``, ``"mhd"``, ``"nrrd"`` or ``"picture"``.
        files: the files, of an image series in the order of their position along the normal.
        modality: the DICOM modality; ``"RTSTRUCT"``, ``"SEG"`` and so on are series without image; empty elsewhere.
        description: SeriesDescription, or the name of the file.
        series_uid, study_uid, frame_of_reference_uid: DICOM's identifiers; empty elsewhere.
        patient_id: PatientID. It is for grouping in memory: never write or print it.
        study_date: YYYYMMDD.
        shape: voxels along X, Y and Z (X and Y for pictures); empty where there is no image.
        spacing: millimetres along these axes; empty where unknown.
        affine: 4 × 4, voxel index to RAS millimetres; None where unknown.
        channels: number of channels.
        number: SeriesNumber.
        tags: further DICOM attributes by keyword (ImageType, BodyPartExamined, PatientSex, PatientAge, Units …).
        problems: what is wrong, one line each; empty where the series can be read.
    """

    kind: str
    files: tuple[Path, ...] = field(repr=False)
    modality: str = ""
    description: str = ""
    series_uid: str = ""
    study_uid: str = ""
    frame_of_reference_uid: str = ""
    patient_id: str = field(default="", repr=False)
    study_date: str = ""
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    affine: np.ndarray | None = field(default=None, repr=False, compare=False)
    channels: int = 1
    number: int | None = None
    tags: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    problems: tuple[str, ...] = ()

    @property
    def n_files(self) -> int:
        """The number of files."""
        return len(self.files)

    @property
    def is_image(self) -> bool:
        """Whether the series holds an image, be it readable or not."""
        return bool(self.shape)


@dataclass(frozen=True)
class Study:
    """Series of one study that belong together.

    Attributes:
        study_uid: StudyInstanceUID.
        patient_id: PatientID, for grouping in memory: never write or print it.
        series: one series per wanted modality, all of one frame of reference.
        structures: the structure sets of the study.
        problems: what a person must decide, such as two CT series; the first by number is then in `series`.
    """

    study_uid: str
    patient_id: str = field(repr=False)
    series: dict[str, Series]
    structures: tuple[Series, ...]
    problems: tuple[str, ...] = ()


def walk(root: Path) -> Iterator[Path]:
    """Give the files below a folder, in the order of their names, hidden ones left out; links cannot make a loop."""
    seen: set[tuple[int, int]] = set()
    pending = [root]
    while pending:
        folder = pending.pop()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            continue
        folders = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    folders.append(Path(entry.path))
                elif entry.is_file():
                    yield Path(entry.path)
            except OSError:
                continue
        pending.extend(reversed(folders))


def find_series(root: str | os.PathLike[str], *, progress: Callable[[int], None] | None = None) -> list[Series]:
    """Find every image and every DICOM object below a folder, from headers alone.

    DICOM files are grouped by SeriesInstanceUID wherever they lie; every NIfTI, MHD/MHA, NRRD and picture file is a
    series by itself. Nothing that a file holds makes this fail: a file that claims to be an image and is none (a text
    named ``.dcm``, one cut short) is a series with a problem. Files that claim nothing and are no image are passed
    over.

    Args:
        root: a folder or a single file.
        progress: called with the number of files seen so far, after each.

    Returns:
        the series, sorted by patient, study, number and path; an empty list where there is none.

    Raises:
        ReadError: the root does not exist.

    Example:
        >>> import tempfile
        >>> from medseg.io import write_nifti
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_nifti((np.zeros((4, 5, 6), np.uint8), np.eye(4)), folder / "label.nii.gz")
        >>> [(series.kind, series.shape) for series in find_series(folder)]
        [('nifti', (4, 5, 6))]
    """
    root = Path(root)
    if not root.exists():
        raise ReadError(f"{root}: no such file or folder")
    groups: dict[str, list[Instance]] = {}
    found: list[Series] = []
    with quiet():
        for count, path in enumerate(walk(root) if root.is_dir() else [root], start=1):
            try:
                start = read_start(path)
                if claimed_kind(path) is None and kind_by_content(start) is None:
                    continue
                kind = kind_of(path, start)
                if kind == "dicom":
                    item = read_instance(path, force=True)
                    groups.setdefault(item.series_uid or str(path), []).append(item)
                else:
                    found.append(_file_series(path, kind))
            except DicomIndexError:
                continue
            except MedsegError as error:
                kind = claimed_kind(path) or "dicom"
                found.append(Series(kind=kind, files=(path,), description=path.name, problems=(str(error),)))
            finally:
                if progress:
                    progress(count)
        found.extend(_dicom_series(items) for items in groups.values())
    return sorted(found, key=lambda s: (s.patient_id, s.study_uid, s.number or 0, s.series_uid, str(s.files[0])))


def _dicom_series(items: list[Instance]) -> Series:
    first = items[0]
    problems: list[str] = []
    for keyword, values in (("StudyInstanceUID", "study_uid"), ("PatientID", "patient_id")):
        if len({getattr(item, values) for item in items}) > 1:
            problems.append(f"{first.path.parent}: the files of one SeriesInstanceUID have different {keyword}")
    files = tuple(item.path for item in items)
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    affine = None
    if all(item.is_image for item in items):
        shape = (first.columns, first.rows, sum(len(item.planes) for item in items))
        try:
            grid = assemble(items)
            files = tuple(dict.fromkeys(items[i].path for i, _ in grid.order))
            shape = grid.shape
            if grid.has_geometry:
                affine = grid.affine
                spacing = tuple(float(n) for n in np.linalg.norm(affine[:3, :3], axis=0))
        except MedsegError as error:
            problems.append(str(error))
    elif any(item.is_image for item in items):
        problems.append(f"{first.path.parent}: one series with images and other objects")
    return Series(
        kind="dicom",
        files=files,
        modality=first.modality,
        description=first.description,
        series_uid=first.series_uid,
        study_uid=first.study_uid,
        frame_of_reference_uid=first.frame_of_reference_uid,
        patient_id=first.patient_id,
        study_date=first.study_date,
        shape=shape,
        spacing=spacing,
        affine=affine,
        number=first.number,
        tags=first.tags,
        problems=tuple(problems),
    )


def _file_series(path: Path, kind: str) -> Series:
    affine: np.ndarray | None
    problems: Iterable[str] = ()
    if kind == "nifti":
        from .nifti import read_nifti_header

        header, problems = read_nifti_header(path)
        full = tuple(int(n) for n in header.get_data_shape())
        shape, channels = full[:3], int(np.prod(full[3:])) if len(full) > 3 else 1
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        problems = [f"{path}: {problem}" for problem in problems]
    elif kind == "picture":
        from .picture import picture_size

        shape, channels = picture_size(path)
        affine = None
    else:
        from .itk_formats import read_itk_header

        itk = read_itk_header(path, kind)
        shape, channels, affine = itk.shape, itk.channels, itk.affine
    spacing = () if affine is None else tuple(float(n) for n in np.linalg.norm(affine[:3, : len(shape)], axis=0))
    return Series(
        kind=kind,
        files=(path,),
        description=path.name,
        shape=shape,
        spacing=spacing,
        affine=affine,
        channels=channels,
        problems=tuple(problems),
    )


def match_series(series: Iterable[Series], modalities: Sequence[str] = ("CT", "PT")) -> list[Study]:
    """Find the studies that have an image of every wanted modality on one frame of reference.

    Localizers (ImageType) are left aside, and so are series with problems where there is one without. Where more than
    one series of a modality is left, the study says so in its `problems` and carries the first by number.

    Args:
        series: what `find_series` gave.
        modalities: DICOM modalities, such as ``("CT", "PT")`` or ``("MR",)``.

    Returns:
        one study per StudyInstanceUID that has them all, in the order of the series given.
    """
    studies: dict[str, list[Series]] = {}
    for item in series:
        if item.kind == "dicom" and item.study_uid:
            studies.setdefault(item.study_uid, []).append(item)
    return [study for items in studies.values() if (study := _match(items, modalities)) is not None]


def _match(items: list[Series], modalities: Sequence[str]) -> Study | None:
    candidates = [
        item
        for item in items
        if item.is_image
        and item.modality in modalities
        and "LOCALIZER" not in item.tags.get("ImageType", "").split("\\")
    ]
    frames = dict.fromkeys(item.frame_of_reference_uid for item in candidates)
    complete = []
    for frame in frames:
        here = [item for item in candidates if item.frame_of_reference_uid == frame]
        if all(any(item.modality == wanted for item in here) for wanted in modalities):
            complete.append(here)
    if not complete:
        return None
    problems: list[str] = []
    if len(complete) > 1:
        problems.append(f"{len(complete)} frames of reference in one study have {' and '.join(modalities)}: choose one")
    chosen: dict[str, Series] = {}
    for wanted in modalities:
        these = [item for item in complete[0] if item.modality == wanted]
        sound = [item for item in these if not item.problems] or these
        chosen[wanted] = sound[0]
        if len(sound) > 1:
            listed = ", ".join(f"{item.number} {item.description[:40]!r} ({item.n_files} files)" for item in sound)
            problems.append(f"{len(sound)} {wanted} series in one study: {listed}: choose one")
        problems.extend(sound[0].problems)
    structures = tuple(item for item in items if item.modality == "RTSTRUCT")
    return Study(items[0].study_uid, items[0].patient_id, chosen, structures, tuple(problems))
