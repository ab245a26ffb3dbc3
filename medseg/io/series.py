"""What lies in a folder: `find_series` reads headers only and tells what is right and wrong about each series."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MedsegError, ReadError
from .dicom_geometry import Stack, choose, grid_of, stacks_of
from .dicom_header import DicomIndexError, Instance, place_of, quiet, read_instance
from .dicomdir import dicomdir_files, is_dicomdir
from .header_cache import FileState, Header, HeaderCache, pack, unpack
from .kinds import claimed_kind, kind_by_content, kind_of
from .text import one_line
from .workers import WorkerDied, Workers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Series:
    """A DICOM series, or one file of another kind, with what its headers say.

    Attributes:
        kind: ``"dicom"``, ``"nifti"``, ``"mhd"``, ``"nrrd"`` or ``"picture"``; ``"folder"`` for a folder that cannot be
            opened.
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
        volumes: the names of the volumes that `read_image` makes channels of, empty for a single one.
        stack: the name of the stack where one SeriesInstanceUID holds several (other orientation, size or spacing);
            each is a series of its own here.
        notes: what reading mends or leaves out, one line each: copies, gantry tilt, localizers set apart.
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
    volumes: tuple[str, ...] = ()
    stack: str = ""
    notes: tuple[str, ...] = ()

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


def walk(root: Path, unreadable: Callable[[Path, OSError], None] | None = None) -> Iterator[Path]:
    """Give the files below a folder, in the order of their names, hidden ones left out; links cannot make a loop.

    Args:
        root: the folder.
        unreadable: called with every folder that cannot be opened, every link that leads nowhere, and why.
    """
    seen: set[tuple[int, int]] = set()
    pending = [root]
    while pending:
        folder = pending.pop()
        names, folders = [], []
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    with suppress(OSError):  # a link in a circle
                        if entry.is_dir():
                            folders.append(entry.name)
                        elif entry.is_file():
                            names.append(entry.name)
                        elif entry.is_symlink() and unreadable:
                            unreadable(folder / entry.name, FileNotFoundError())
        except OSError as error:
            if unreadable:
                unreadable(folder, error)
            continue
        for name in sorted(names):
            yield folder / name
        pending.extend(folder / name for name in sorted(folders, reverse=True))


def find_series(
    root: str | os.PathLike[str],
    *,
    progress: Callable[[int], None] | None = None,
    workers: int = 1,
    cache: str | os.PathLike[str] | None = None,
) -> list[Series]:
    """Find every image and every DICOM object below a folder, from headers alone.

    DICOM files are grouped by PatientID, StudyInstanceUID and SeriesInstanceUID wherever they lie; every NIfTI,
    MHD/MHA, NRRD and picture file is a series by itself. Nothing that a file holds makes this fail: a file that claims
    to be an image and is none (a text named ``.dcm``, one cut short) is a series with a problem, and so is a folder
    that cannot be opened. Files that claim nothing and are no image are passed over. Hidden files and folders are left
    out; a link is followed, in a circle once.

    Files are walked and read in lots; what is kept of each is what its header says, about a kilobyte. The result does
    not depend on ``workers`` or ``cache``.

    Args:
        root: a folder, a single file, or a DICOMDIR: then the files that it names, inside its folder only; those that
            are absent are a problem.
        progress: called with the number of files seen so far.
        workers: processes that read. With more than one, a file whose reader crashes is a series with a problem, and
            the calling script needs the ``if __name__ == "__main__":`` that every use of `multiprocessing` needs.
        cache: an SQLite file in which headers are kept for the next time, made where it is absent. A file is read again
            when its size or its time of change (ns) is another; a change that keeps both cannot be seen. It holds
            PatientIDs: only its owner may read it (mode 600). Headers that may speak of another file (MHD, NRRD, NIfTI
            pairs) and files with a problem are read every time.

    Returns:
        the series, sorted by patient, study, number and path; an empty list where there is none.

    Raises:
        ReadError: the root does not exist.
        ConfigError: the cache is a database of something else.

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
    found: list[Series] = []
    groups: dict[tuple[str, ...], list[tuple[int, Instance]]] = {}

    def unreadable(path: Path, error: OSError) -> None:
        if path.is_symlink() and not path.exists():
            kind, why = claimed_kind(path) or "dicom", f"{path}: a link to a file that is not there"
        else:
            kind = "folder"
            why = f"{path}: the folder cannot be opened ({error.strerror}): what lies in it was not looked at"
        found.append(Series(kind=kind, files=(path,), description=path.name, problems=(why,)))

    files: Iterable[Path] = [root]
    if root.is_dir():
        files = walk(root, unreadable)
    elif is_dicomdir(root):
        files, problems = dicomdir_files(root)
        if problems:
            found.append(Series(kind="dicom", files=(root,), description=root.name, problems=tuple(problems)))
    done = 0

    def take(read: Iterable[_Outcome]) -> None:
        nonlocal done
        for number, path, header in read:
            done += 1
            if isinstance(header, Instance):
                key = (header.patient_id, header.study_uid, header.series_uid) if header.series_uid else (str(path),)
                groups.setdefault(key, []).append((number, header))
            elif isinstance(header, Series):
                found.append(header)
            elif header is not None:
                kind = claimed_kind(path) or "dicom"
                found.append(Series(kind=kind, files=(path,), description=path.name, problems=(header,)))
            if progress:
                progress(done)

    with nullcontext() if cache is None else HeaderCache(cache) as kept:
        _read(files, take, workers, kept)
    with quiet():
        while groups:  # each group is let go of as it becomes a series
            _, items = groups.popitem()
            found.extend(_assembled([item for _, item in sorted(items, key=lambda pair: pair[0])]))
    found = [_printable(series) for series in found]
    return sorted(found, key=lambda s: (s.patient_id, s.study_uid, s.number or 0, s.series_uid, str(s.files[0])))


# Files of one lot: they are looked up, sent to a worker and kept together.
_LOT = 200
_NO_IMAGE = Header("", "")
# The mark of the header of a file that is a series by itself.
_FILE = "file"

# (number in the order of the walk, file, what it is: None for no image, a text for what is wrong with it)
_Outcome = tuple[int, Path, Instance | Series | str | None]
# (number, file, its state before it is read where a cache wants to know)
_Unread = tuple[int, Path, FileState | None]


def _read(
    files: Iterable[Path], take: Callable[[Iterable[_Outcome]], None], workers: int, kept: HeaderCache | None
) -> None:
    """Hand the headers of files to ``take``: from the cache, or read here or by worker processes."""

    def unread() -> Iterator[tuple[list[_Unread], tuple[list[Path]]]]:
        numbered = enumerate(files)
        while lot := list(islice(numbered, _LOT)):
            here: list[_Unread] = [(number, path, None) for number, path in lot]
            if kept:
                known, here = _from_cache(lot, kept)
                take(known)
            if here:
                yield here, ([path for _, path, _ in here],)

    def done(lot: list[_Unread], headers: list[Header | str]) -> None:
        if kept:
            kept.put(
                {
                    state: header
                    for (_, _, state), header in zip(lot, headers, strict=True)
                    if state is not None and isinstance(header, Header)
                }
            )
        take(
            (number, path, header if isinstance(header, str) else _meaning(header, path))
            for (number, path, _), header in zip(lot, headers, strict=True)
        )

    lots = unread()
    # A few files are read before a worker process would have started.
    for pool, some in ((Workers(1), islice(lots, 2 if workers > 1 else None)), (Workers(workers), lots)):
        dead: list[_Unread] = []
        with pool:
            first = list(islice(some, 1))
            if pool.jobs > 1 and first and not _starts(pool):
                pool.jobs = 1
            for lot, headers in pool.each(read_headers, chain(first, some), ahead=pool.jobs):
                if isinstance(headers, WorkerDied):
                    dead.extend(lot)
                else:
                    done(lot, headers)
            for lot, headers in pool.each(read_headers, (([file], ([file[1]],)) for file in dead)):
                died = isinstance(headers, WorkerDied)
                done(lot, [f"{lot[0][1]}: its header cannot be read: {headers}"] if died else headers)


def _from_cache(lot: list[tuple[int, Path]], kept: HeaderCache) -> tuple[list[_Outcome], list[_Unread]]:
    """Return what is known of files, and the others with their states as they are before they are read."""
    states: list[FileState | None] = []
    for _, path in lot:
        try:
            states.append(FileState.of(path))
        except OSError:  # whoever reads it will say what is wrong
            states.append(None)
    headers = kept.get([state for state in states if state is not None])
    known: list[_Outcome] = []
    unread: list[_Unread] = []
    for (number, path), state in zip(lot, states, strict=True):
        header = headers.get(state.path) if state is not None else None
        try:
            if header is None:
                raise KeyError
            known.append((number, path, _meaning(header, path)))
        except (KeyError, TypeError, ValueError):  # not there, or damaged
            unread.append((number, path, state))
    return known, unread


def _meaning(header: Header, path: Path) -> Instance | Series | None:
    """Return what the header of a file says."""
    if not header.common:
        return None
    if header.common != _FILE:
        return unpack(header, path)
    values: dict[str, Any] = json.loads(header.own)
    values |= {name: tuple(values[name]) for name in ("shape", "spacing", "notes")}
    affine = values.pop("affine")
    affine = None if affine is None else np.array(affine)
    return Series(files=(path,), description=path.name, affine=affine, **values)


def _starts(pool: Workers) -> bool:
    """Whether worker processes can be started: not from a script without its ``if __name__ == "__main__":``."""
    ((_, answer),) = pool.each(os.getpid, [("", ())])
    if isinstance(answer, WorkerDied):
        logger.warning('no worker process can be started (a script needs `if __name__ == "__main__":`): reading here')
        return False
    return True


def read_headers(files: Sequence[Path]) -> list[Header | str]:
    """Read the header of every file, once; a text says what is wrong with one."""
    with quiet():
        return [_read_header(path) for path in files]


def _read_header(path: Path) -> Header | str:
    try:
        # Most headers of DICOM lie within the first buffer.
        with path.open("rb", buffering=1 << 14) as file:
            start = file.read(1024)
            if claimed_kind(path) is None and kind_by_content(start) is None:
                return _NO_IMAGE
            kind = kind_of(path, start)
            if kind == "dicom":
                file.seek(0)
                return pack(read_instance(path, file, force=True))
        return _file_header(path, kind)
    except DicomIndexError:
        return _NO_IMAGE
    except MedsegError as error:
        return str(error)
    except OSError as error:
        return f"{path}: cannot be opened ({error.strerror})"
    except Exception as error:  # whatever a file holds, the others are read
        return f"{path}: its header cannot be read ({type(error).__name__})"


def _assembled(items: list[Instance]) -> list[Series]:
    """Return the series of some objects; whatever they hold, the others are found."""
    try:
        return _dicom_series(items)
    except Exception as error:
        problem = f"{place_of(items)}: its headers cannot be put together ({type(error).__name__})"
        return [_one_series(items, tuple(item.path for item in items), problems=(problem,))]


def _dicom_series(items: list[Instance]) -> list[Series]:
    """Return the series of the objects of one SeriesInstanceUID: one, or one for each stack that it holds."""
    first = items[0]
    images = [item for item in items if item.is_image]
    if not images:
        return [_one_series(items, tuple(item.path for item in items))]
    if len(images) < len(items):
        problem = f"{first.path.parent}: one series with images and other objects"
        return [_one_series(items, tuple(item.path for item in items), problems=(problem,))]
    try:
        stacks = stacks_of(items)
    except MedsegError as error:
        shape = (first.columns, first.rows, sum(len(item.planes) for item in items))
        return [_one_series(items, tuple(item.path for item in items), shape=shape, problems=(str(error),))]
    found = []
    of_stack = [sorted({i for i, _ in stack.slots}) for stack in stacks]
    apart = sum(len(numbers) for numbers in of_stack) == len(items)
    for stack, numbers in zip(stacks, of_stack, strict=True):
        these = [items[i] for i in numbers] if apart else items
        found.append(_stack_series(items, these, stack))
    if len(stacks) > 1:
        with suppress(MedsegError):
            chosen, notes = choose(items, stacks)
            found = [
                replace(series, notes=(*notes, *series.notes)) if stack is chosen else series
                for stack, series in zip(stacks, found, strict=True)
            ]
    return found


def _stack_series(items: list[Instance], these: list[Instance], stack: Stack) -> Series:
    first = items[stack.slots[0][0]]
    files = tuple(item.path for item in these)
    shape: tuple[int, ...] = (first.columns, first.rows, len(stack.slots))
    try:
        grid = grid_of(items, stack)
    except MedsegError as error:
        return _one_series([first], files, shape=shape, stack=stack.name, problems=(str(error),))
    return _one_series(
        [first],
        tuple(dict.fromkeys([*(items[i].path for i, _ in grid.order), *files])),
        shape=grid.shape,
        spacing=tuple(float(n) for n in np.linalg.norm(grid.affine[:3, :3], axis=0)) if grid.has_geometry else (),
        affine=grid.affine if grid.has_geometry else None,
        channels=len(grid.volumes) * grid.samples,
        volumes=tuple(grid.volumes) if len(grid.volumes) > 1 else (),
        stack=stack.name,
        notes=(*grid.mended, *grid.notes),
    )


def _one_series(items: list[Instance], files: tuple[Path, ...], **more: Any) -> Series:
    first = items[0]
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
        number=first.number,
        tags=first.tags,
        **more,
    )


def _file_header(path: Path, kind: str) -> Header:
    """Read the header of a file that is a series by itself."""
    affine: np.ndarray | None = None
    notes: Iterable[str] = ()
    alone = kind == "picture"
    if kind == "nifti":
        from .nifti import nifti_affine, read_nifti_header

        header, notes = read_nifti_header(path)
        full = tuple(int(n) for n in header.get_data_shape())
        shape, channels = full[:3], int(np.prod(full[3:])) if len(full) > 3 else 1
        affine = nifti_affine(path, header)
        alone = bytes(header["magic"]).startswith(b"n+")  # not the half of a pair
    elif kind == "picture":
        from .picture import picture_size

        shape, channels = picture_size(path)
    else:
        from .itk_formats import read_itk_header

        itk = read_itk_header(path, kind)
        shape, channels, affine, notes = itk.shape, itk.channels, itk.affine, itk.problems
    values = {
        "kind": kind,
        "shape": shape,
        "spacing": [] if affine is None else np.linalg.norm(affine[:3, : len(shape)], axis=0).tolist(),
        "affine": None if affine is None else affine.tolist(),
        "channels": channels,
        "notes": tuple(notes),
    }
    return Header(_FILE, json.dumps(values), kept=alone)


def _printable(series: Series) -> Series:
    """Return the series with its texts on one line each: the names of files may hold anything."""
    return replace(
        series,
        description=one_line(series.description),
        problems=tuple(map(one_line, series.problems)),
        notes=tuple(map(one_line, series.notes)),
    )


def match_series(series: Iterable[Series], modalities: Sequence[str] = ("CT", "PT")) -> list[Study]:
    """Find the studies that have an image of every wanted modality on one frame of reference.

    Localizers (ImageType) are left aside, and so are series with problems where there is one without. Where more than
    one series of a modality is left, or one that holds several volumes (times, phases), the study says so in its
    `problems` and carries the first by number.

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
        and not item.stack.startswith(("localizer", "without position"))
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
        if sound[0].volumes:
            listed = ", ".join(sound[0].volumes[:6]) + (" …" if len(sound[0].volumes) > 6 else "")
            problems.append(
                f"{wanted} series {sound[0].number} holds {len(sound[0].volumes)} volumes ({listed}): choose one"
            )
    structures = tuple(item for item in items if item.modality == "RTSTRUCT")
    return Study(items[0].study_uid, items[0].patient_id, chosen, structures, tuple(problems))
