"""`data_prep png`: pictures of every image below a folder, through the same reading code as everything else."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import time
import traceback
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import nibabel as nib
import numpy as np
from PIL import Image, PngImagePlugin

from data_prep.identity import mask, words_of
from data_prep.progress import progress_bar
from data_prep.recipes.reading import with_voxels
from medseg.errors import ConfigError, GeometryError, MedsegError, ReadError
from medseg.io import atomic_path, atomic_write_text, find_series, read_volumes
from medseg.io.dicom_header import DicomIndexError, quiet, read_instance
from medseg.io.dicom_pixels import check_promise, dataset_of, decode, rescale, window_of
from medseg.io.kinds import SUFFIXES, claimed_kind, kind_by_content, kind_of, read_start
from medseg.io.series import walk
from medseg.io.text import one_line
from medseg.io.workers import WorkerDied, Workers
from medseg.version import __version__

if TYPE_CHECKING:
    from monai.data import MetaTensor

PROBLEMS = "png_problems.txt"
_MARK = "medseg png"
_PROBLEMS_HEAD = f"# {_MARK}: files of which no picture could be made\n"
#: What a picture adds to the name of its source: time or channel, and slice.
_NUMBER = re.compile(r"(?:_t\d+)?(?:_[xyz]\d+)?$")
_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{16}(\.[^.]*)?\.png")
_LARGEST_SIDE = 20_000
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Look:
    """How an image becomes pictures.

    Attributes:
        axis: ``"slices"`` for the slices as they are stored (the third axis of a volume; every DICOM file by itself),
            or the patient's axis along which volumes are cut: ``"x"`` (sagittal pictures), ``"y"`` (coronal), ``"z"``
            (axial). Without geometry these are the axes of the array. A flat image is shown as it is.
        window: center and width, in HU, SUVbw or what the image holds. By default the window of the DICOM tags, and
            from minimum to maximum of the image where there is none.
        percentiles: instead of a window, from this percentile of the image to that; (0, 100) is minimum to maximum.
        bits: of a gray pixel.
        labels: write the values as they are, for label images.
        as_stored: pixel for pixel as stored. Otherwise pictures with geometry are turned upright, with the patient's
            right on the left, and stretched where pixels are not square.
    """

    axis: Literal["slices", "x", "y", "z"] = "slices"
    window: tuple[float, float] | None = None
    percentiles: tuple[float, float] | None = None
    bits: Literal[8, 16] = 8
    labels: bool = False
    as_stored: bool = False

    @property
    def top(self) -> int:
        """The brightest gray level."""
        return (1 << self.bits) - 1


class Pictures:
    """The pictures of one image, made one by one.

    Args:
        image: ``MetaTensor`` as `medseg.io.read_image` gives it, [C, X, Y] or [C, X, Y, Z].
        look: how they shall look.
        color: whether the channels are the colors of one picture, not times or components.

    Raises:
        ReadError: values that are no labels, or no colors of 8 bits; pixels so long that the picture would be huge.

    Example:
        >>> import torch
        >>> from monai.data import MetaTensor
        >>> ramp = MetaTensor(torch.arange(6.0).reshape(1, 3, 2), meta={"has_geometry": False})
        >>> pictures = Pictures(ramp, Look())
        >>> pictures.names, pictures[0].tolist()
        ([''], [[0, 102, 204], [51, 153, 255]])
    """

    def __init__(self, image: "MetaTensor", look: Look, color: bool = False) -> None:
        values = image.numpy()
        self.values = values[..., None] if values.ndim == 3 else values
        self.look = look
        self.color = color
        # Upright pictures run from the patient's right to left, front to back, head to foot: against all axes of RAS.
        self.patient, self.sign = np.array([0, 1, 2]), np.array([-1, -1, -1])
        self.spacing = np.ones(3)
        if image.meta.get("has_geometry", False):
            affine = image.affine.numpy()
            self.patient, self.sign = nib.io_orientation(affine).astype(int).T
            self.spacing = np.linalg.norm(affine[:3, :3], axis=0)
        self.axis = self._cut()
        in_plane = [axis for axis in range(3) if axis != self.axis]
        self.column, self.row = in_plane if look.as_stored else sorted(in_plane, key=lambda axis: self.patient[axis])
        self.size = self._size()
        if color:
            self._require_whole(255, "colors of 8 bits")
        elif look.labels:
            self._require_whole(look.top, f"labels of {look.bits} bits")
        else:
            self._gray = self._gray_levels(image)
        times = 1 if color else self.values.shape[0]
        slices = self.values.shape[1 + self.axis]
        self._places = [(t, n) for t in range(times) for n in range(slices)]
        letter = "xyz"[self.patient[self.axis]]
        self.names = [
            (f"_t{t:0{max(2, len(str(times - 1)))}d}" if times > 1 else "")
            + (f"_{letter}{n:0{max(3, len(str(slices - 1)))}d}" if slices > 1 else "")
            for t, n in self._places
        ]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one picture, [rows, columns] or [rows, columns, 3 or 4], uint8 or uint16."""
        time, number = self._places[index]
        planes = np.moveaxis(self.values, (1 + self.axis, 1 + self.row, 1 + self.column), (1, 2, 3))[:, number]
        channels = [self._stretch(plane) for plane in (planes if self.color else planes[time : time + 1])]
        if self.color:
            return np.stack(channels, axis=-1).round().clip(0, 255).astype(np.uint8)
        if self.look.labels:
            return channels[0].round().astype(np.uint8 if self.look.bits == 8 else np.uint16)
        return self._gray(channels[0])

    def _cut(self) -> int:
        thin = [axis for axis in range(3) if self.values.shape[1 + axis] == 1]
        if len(thin) == 1:
            return thin[0]
        return 2 if self.look.axis == "slices" else int(np.flatnonzero(self.patient == "xyz".index(self.look.axis))[0])

    def _size(self) -> tuple[int, int]:
        """Columns and rows of a picture."""
        axes = [self.column, self.row]
        stored, spacing = np.array(self.values.shape[1:])[axes], self.spacing[axes]
        if self.look.as_stored or spacing.max() < 1.01 * spacing.min():
            columns, rows = stored
        else:
            columns, rows = np.maximum(1, np.rint(stored * spacing / spacing.min()))
            if max(columns, rows) > _LARGEST_SIDE:
                raise ReadError(
                    f"pixels of {spacing[0]:.3g} × {spacing[1]:.3g} mm would need a picture of {columns:.0f} × "
                    f"{rows:.0f} pixels to be shown square; give --as-stored"
                )
        return int(columns), int(rows)

    def _stretch(self, plane: np.ndarray) -> np.ndarray:
        """Turn a plane [rows, columns] upright and its pixels square."""
        if self.look.as_stored:
            return plane
        plane = plane[:: -self.sign[self.row], :: -self.sign[self.column]]
        if self.size == plane.shape[::-1]:
            return plane
        how = Image.Resampling.NEAREST if self.look.labels else Image.Resampling.BILINEAR
        return np.array(Image.fromarray(np.ascontiguousarray(plane, np.float32)).resize(self.size, how))

    def _require_whole(self, top: int, what: str) -> None:
        values = self.values
        if not (np.isfinite(values).all() and np.abs(values - values.round()).max(initial=0) < 1e-3):
            raise ReadError(f"not {what}: expected whole numbers from 0 to {top}")
        low, high = values.min(initial=0), values.max(initial=0)
        if low < -1e-3 or high > top + 1e-3:
            raise ReadError(f"not {what}: values from {low:g} to {high:g} found, expected 0 to {top}")

    def _gray_levels(self, image: "MetaTensor") -> Callable[[np.ndarray], np.ndarray]:
        from medseg.transforms import DicomWindow, RescaleTo8Bit

        look, top = self.look, self.look.top
        kind = np.uint8 if look.bits == 8 else np.uint16
        if look.window is not None:
            window = DicomWindow(*look.window, high=top)
        elif look.percentiles is None and all(np.isfinite(image.meta.get("window", (np.nan, np.nan)))):
            center, width = map(float, image.meta["window"])
            window = DicomWindow(center, width, image.meta.get("window_function") or "LINEAR", high=top)
        else:
            lower, upper = look.percentiles or (0, 100)
            low, high = RescaleTo8Bit(lower=lower, upper=upper).bounds(self.values)
            if low == high:
                return lambda plane: np.zeros(plane.shape, kind)
            if look.bits == 8:
                return RescaleTo8Bit(low, high)
            window = DicomWindow((low + high) / 2, high - low, "LINEAR_EXACT", high=top)
        return lambda plane: np.nan_to_num(window(plane)).round().astype(kind)


@dataclass
class Source:
    """An image to be shown: its files, and what its pictures are called.

    Attributes:
        files: one file, or the files of a DICOM series.
        shown: its name in messages, relative to the folder that was searched.
        kind: ``"dicom"``, ``"nifti"``, ``"mhd"`` or ``"nrrd"``.
        folder: where its pictures go.
        name: what their names start with.
        there: pictures in the folder whose names start so.
    """

    files: tuple[Path, ...]
    shown: str
    kind: str
    folder: Path
    name: str
    there: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of one source.

    Attributes:
        written: how many pictures.
        kept: how many were there already, made from the same file in the same way.
        passed: whether it is a DICOM object without image.
        problem: why there is none, on one line; it may say who the patient is.
        words: what the header says of who the patient is, where there is a problem.
        full: whether the disk is.
        trace: of an error that nobody foresaw.
    """

    written: int = 0
    kept: int = 0
    passed: bool = False
    problem: str = ""
    words: frozenset[str] = frozenset()
    full: bool = False
    trace: str = ""


@dataclass
class Result:
    """What came of all.

    Attributes:
        sources: how many images were found.
        written: pictures written.
        kept: pictures that were there already.
        passed: DICOM objects without image.
        failed: (name for the terminal, reason) of every image of which no picture could be made.
        traces: of errors that nobody foresaw.
    """

    sources: int = 0
    written: int = 0
    kept: int = 0
    passed: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)


def write_pictures(
    root: Path, *, out: Path | None = None, look: Look | None = None, jobs: int | None = None, force: bool = False
) -> Result:
    """Write PNG pictures of every DICOM, NIfTI, MHD/MHA and NRRD file below a folder.

    A picture is called as its source, with the number of the slice from 0 where there are several (``NAME_z012.png``),
    and of the time, echo or component before it (``NAME_t03_z012.png``). What the files hold never becomes part of a
    name. A source whose pictures are there already, made from the same file in the same way, is passed over.

    Args:
        root: a folder, or a single file.
        out: write the pictures below this folder, in the same tree of folders; by default beside their sources.
        look: how they shall look.
        jobs: how many images at once, each in a process; by default one per core.
        force: also replace pictures that are up to date, and files of these names that medseg did not make.

    Raises:
        ReadError: there is no such folder, or no image in it.
        ConfigError: the window or the percentiles are impossible, or ``out`` is a file.
        OSError: ``out`` cannot be made, or the disk is full.
    """
    look = look or Look()
    _check(look)
    root = Path(root)
    if not root.exists():
        raise ReadError(f"{root}: no such file or folder")
    top = Path(out) if out is not None else root if root.is_dir() else root.parent
    if top.exists() and not top.is_dir():
        raise ConfigError(f"{top}: a file; give a folder for the pictures")
    listing = top / PROBLEMS
    if os.path.lexists(listing) and not _starts_with(listing, _PROBLEMS_HEAD):
        raise ConfigError(
            f"{listing}: not written by medseg; move it away, bad files are listed in a file of that name"
        )
    result = Result()
    lines: list[str] = []

    def fail(shown: str, outcome: Outcome) -> None:
        result.failed.append((mask(shown, {}, outcome.words), mask(outcome.problem, {}, outcome.words)))
        lines.append(f"{one_line(shown)}\t{one_line(outcome.problem)}\n")

    with progress_bar("Looking for images") as show:
        found = _find(root, look, lambda count: show(count, count), fail)
    if not found and not lines:
        raise ReadError(f"{root}: no image found; expected DICOM, NIfTI, MHD or NRRD files somewhere below it")
    top.mkdir(parents=True, exist_ok=True)
    sources = _name(found, root if root.is_dir() else root.parent, top, fail)
    result.sources = len(found)
    jobs = min(jobs or len(os.sched_getaffinity(0)), max(1, len(sources)))
    with Workers(jobs) as workers, progress_bar("Writing pictures") as show:
        tasks = [(source.shown, (source, look, force)) for source in sources]
        for done, (shown, outcome) in enumerate(workers.each(_write, tasks), start=1):
            if isinstance(outcome, WorkerDied):
                outcome = Outcome(problem=str(outcome))
            if outcome.full:
                raise OSError(errno.ENOSPC, "No space left on device; make room and run the same command again")
            result.written += outcome.written
            result.kept += outcome.kept
            result.passed += outcome.passed
            result.traces += [outcome.trace] if outcome.trace else []
            if outcome.problem:
                fail(shown, outcome)
            show(done, len(sources))
    if lines:
        atomic_write_text(listing, _PROBLEMS_HEAD + "".join(sorted(lines)))
    else:
        listing.unlink(missing_ok=True)
    return result


def _check(look: Look) -> None:
    """Refuse an impossible window before the first file is read."""
    from medseg.transforms import DicomWindow, RescaleTo8Bit

    if sum((look.window is not None, look.percentiles is not None, look.labels)) > 1:
        raise ConfigError("a window, percentiles and labels exclude each other: give one")
    if look.window is not None:
        DicomWindow(*look.window)
    if look.percentiles is not None:
        RescaleTo8Bit(lower=look.percentiles[0], upper=look.percentiles[1])


def _find(
    root: Path, look: Look, progress: Callable[[int], None], fail: Callable[[str, Outcome], None]
) -> list[tuple[str, tuple[Path, ...]]]:
    """Return (kind, files) of every image; what claims to be one and is none is a failure."""
    above = root if root.is_dir() else root.parent
    if look.axis != "slices":
        images: dict[tuple[str, tuple[Path, ...]], None] = {}  # stacks in one file are several series of that file
        for series in find_series(root, progress=progress):
            if series.kind == "picture":
                continue
            if series.is_image or series.kind != "dicom":
                images[series.kind, series.files] = None
            elif series.problems:
                words = frozenset({series.patient_id})
                problem = _reason(series.problems[0], series.files[0])
                fail(str(series.files[0].relative_to(above)), Outcome(problem=problem, words=words))
        return list(images)
    found: list[tuple[str, tuple[Path, ...]]] = []
    for count, path in enumerate(walk(root) if root.is_dir() else [root], start=1):
        try:
            start = read_start(path)
            if claimed_kind(path) is None and kind_by_content(start) is None:
                continue
            kind = kind_of(path, start)
            if kind != "picture":
                found.append((kind, (path,)))
        except ReadError as error:
            if claimed_kind(path) != "picture":
                fail(str(path.relative_to(above)), Outcome(problem=_reason(str(error), path)))
        finally:
            progress(count)
    return found


def _name(
    found: Iterable[tuple[str, tuple[Path, ...]]],
    above: Path,
    top: Path,
    fail: Callable[[str, Outcome], None],
) -> list[Source]:
    """Give every image the folder and the name of its pictures, such that no two share a picture."""
    folders: dict[Path, list[Source]] = {}
    for kind, files in found:
        first = min(files)
        shown = first.relative_to(above)
        source = Source(files, str(shown), kind, top / shown.parent, first.name)
        folders.setdefault(source.folder, []).append(source)
    sources = []
    for folder, here in folders.items():
        if not folder.resolve().is_relative_to(top.resolve()):
            for source in here:
                why = "its pictures would lie outside of the folder for pictures, by a link; give another --out"
                fail(source.shown, Outcome(problem=why))
            continue
        clashing = _settle_names(here)
        for source in clashing:
            fail(source.shown, Outcome(problem="its pictures would have the names of another file's; rename it"))
        names = _pictures_in(folder)
        for source in here:
            if source not in clashing:
                low, high = bisect_left(names, source.name), bisect_left(names, source.name + "\U0010ffff")
                source.there = tuple(names[low:high])
                sources.append(source)
    return sources


def _settle_names(sources: Sequence[Source]) -> list[Source]:
    """Name the pictures of each source by its stem, or by its full name where stems clash; return what clashes still.

    Stems clash where they are the same but for case, or but for the number of a slice.
    """
    full = {id(source): source.name for source in sources}
    for source in sources:
        source.name = _stem(source.name)
    while True:
        clashing = _clashing(sources)
        short = [source for source in clashing if source.name != full[id(source)]]
        if not short:
            return clashing
        for source in short:
            source.name = full[id(source)]


def _clashing(sources: Sequence[Source]) -> list[Source]:
    names = Counter(source.name.casefold() for source in sources)

    def clashes(name: str) -> bool:
        without = _NUMBER.sub("", name)
        return names[name] > 1 or (without != name and without in names)

    return [source for source in sources if clashes(source.name.casefold())]


def _stem(name: str) -> str:
    """Return a file's name without the suffix of an image: DICOM names such as 1.2.840.7 have none."""
    if name.lower().endswith(".nii.gz"):
        return name[:-7] or name
    stem, _, suffix = name.rpartition(".")
    return stem if stem and f".{suffix.lower()}" in SUFFIXES else name


def _pictures_in(folder: Path) -> list[str]:
    """Return the PNG files of a folder by name, and remove what a killed run left half-written there a while ago."""
    names = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".png"):
                names.append(entry.name)
                if _TEMPORARY.fullmatch(entry.name) and time.time() - entry.stat(follow_symlinks=False).st_mtime > 60:
                    Path(entry.path).unlink(missing_ok=True)
    return sorted(names)


def _write(source: Source, look: Look, force: bool) -> Outcome:
    """Write the pictures of one source; what goes wrong is an answer, so that the others go on."""
    path = source.files[0]
    trace = ""
    try:
        with quiet(), warnings.catch_warnings(action="ignore"):
            return _write_one(source, look, force)
    except DicomIndexError:
        return Outcome(passed=True)
    except MedsegError as error:
        problem = _reason(str(error), path)
    except MemoryError:
        problem = "not enough memory"
    except OSError as error:
        if error.errno in _DISK_FULL:
            return Outcome(full=True)
        problem = f"{Path(error.filename).name if error.filename else path.name}: {error.strerror or error}"
    except Exception as error:  # a defect of ours or of a library, met by one file of many
        problem, trace = f"unexpected {type(error).__name__}", traceback.format_exc()
    return Outcome(problem=problem, words=frozenset(words_of(path)), trace=trace)


def _write_one(source: Source, look: Look, force: bool) -> Outcome:
    path = source.files[0]
    digest = _digest(source, look)
    there = [name for name in source.there if _number(name, source) is not None]
    ours = {name: mark for name in there if (mark := _mark(source.folder / name))}
    same = {name: mark for name, mark in ours.items() if mark[0] == digest}
    if not force and same and len(same) == next(iter(same.values()))[1]:
        return Outcome(kept=len(same))
    if source.kind == "dicom" and look.axis == "slices" and not read_instance(path, force=True).is_image:
        return Outcome(passed=True)
    made = [Pictures(image, look, _is_color(image, source)) for image in _images(source, look)]
    parts = [f"_t{n:0{max(2, len(str(len(made) - 1)))}d}" if len(made) > 1 else "" for n in range(len(made))]
    pictures = {
        f"{source.name}{part}{number}.png": (one, index)
        for part, one in zip(parts, made, strict=True)
        for index, number in enumerate(one.names)
    }
    names = list(pictures)
    if not force:
        for name in names:
            if os.path.lexists(source.folder / name) and name not in ours and not _mark(source.folder / name):
                raise ReadError(f"{name} is there already, and medseg did not make it: give --out, or --force")
    source.folder.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", f"{_MARK} {digest} {len(names)}")
    written = 0
    for name, (one, index) in pictures.items():
        if name in same and not force:
            continue
        with atomic_path(source.folder / name) as temporary:
            Image.fromarray(one[index]).save(temporary, format="PNG", pnginfo=info)
        written += 1
    # Pictures of slices that the source no longer has would pass for its own.
    axes = {number.rstrip("0123456789")[-1:] for one in made for number in one.names}
    for name in ours.keys() - pictures.keys():
        if (_number(name, source) or "").rstrip("0123456789")[-1:] in axes:
            (source.folder / name).unlink(missing_ok=True)
    return Outcome(written, len(names) - written)


def _images(source: Source, look: Look) -> "Sequence[MetaTensor]":
    """Read the images of a source: one, or the volumes of a DICOM file or series in their order."""
    # The window of a PET's tags is in the units that are stored; one that is given is in SUV.
    units = "stored" if look.window is None else "SUVbw"
    # Slices as they are stored are not resampled to an upright grid.
    tilt = "keep" if look.axis == "slices" else "correct"
    try:
        return list(read_volumes(source.files, pet_units=units, tilt=tilt).values())
    except GeometryError:
        frames = _frames(source.files[0]) if source.kind == "dicom" and look.axis == "slices" else None
        if frames is None:
            raise
        return [frames]


def _is_color(image: "MetaTensor", source: Source) -> bool:
    """Whether the channels are the colors of one picture: only the file's own type tells them from times."""
    if image.shape[0] not in (3, 4):
        return False
    if source.kind == "dicom":
        return True
    path = source.files[0]
    if source.kind == "nifti":
        from medseg.io.nifti import read_nifti_header

        return bool(read_nifti_header(path)[0].get_data_dtype().fields)
    if source.kind == "mhd":
        from medseg.io.metaimage import read_meta_header

        header = read_meta_header(path)
        return header.channels == image.shape[0] and header.dtype == np.uint8
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO")
    reader.ReadImageInformation()
    return reader.GetNumberOfComponents() == image.shape[0] and reader.GetPixelID() == sitk.sitkVectorUInt8


def _frames(path: Path) -> "MetaTensor | None":
    """Return the frames of a DICOM file that form no volume (a slice is missing); None for a single one."""
    from monai.data import MetaTensor

    item = read_instance(path, pixels=True, force=True)
    count = len(item.planes)
    if count < 2:
        return None
    check_promise([item], item.rows * item.columns * count)
    frames = []
    for frame, pixels in enumerate(decode(item, range(count))):
        values = np.empty((*pixels.shape[:2], pixels.shape[2] if pixels.ndim == 3 else 1), np.float32)
        rescale(item, frame, pixels, values)
        frames.append(values)
    center, width, function = window_of(dataset_of(item))
    meta = {"has_geometry": False, "window": (center, width), "window_function": function}
    return MetaTensor(np.stack(frames).transpose(3, 2, 1, 0), meta=meta)


def _number(name: str, source: Source) -> str | None:
    """Return what the name of a picture adds to that of the source, None where it is not called after it."""
    number = name.removeprefix(source.name).removesuffix(".png")
    return number if f"{source.name}{number}.png" == name and _NUMBER.fullmatch(number) else None


def _digest(source: Source, look: Look) -> str:
    """Tell one state of a source and one look from another."""
    states = [(status.st_size, status.st_mtime_ns) for status in (path.stat() for path in _files(source))]
    content = json.dumps([__version__, asdict(look), sorted(states)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _files(source: Source) -> set[Path]:
    """Return the files that a source is made of, those of the voxels beside a header too."""
    path = source.files[0]
    files = {*source.files, *with_voxels(path)}
    if ".hdr" in path.suffixes:  # these may be compressed, both or one
        files |= set(path.parent.glob(f"{glob.escape(path.name.removesuffix('.gz').removesuffix('.hdr'))}.img*"))
    return files


def _mark(path: Path) -> tuple[str, int] | None:
    """Return the digest in a picture that medseg made, and how many pictures its source has."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            match = re.fullmatch(rf"{_MARK} ([0-9a-f]{{16}}) (\d+)", str(picture.info.get("Software")))
    except Exception:  # Pillow's plugins raise many kinds on damaged files
        return None
    return (match[1], int(match[2])) if match else None


def _reason(message: str, path: Path) -> str:
    """Return a message without the name of the file or folder that it starts with, and without other paths above."""
    for name in (str(path), str(path.parent)):
        message = message.removeprefix(f"{name}: ")
    return message.replace(f"{path.parent}{os.sep}", "").replace(str(path.parent), "the folder")


def _starts_with(path: Path, head: str) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(len(head)) == head
    except OSError:
        return False


def show_written(root: Path, *, out: Path | None, look: Look, jobs: int | None, force: bool, debug: bool) -> bool:
    """Write pictures for the command line: problems on stderr, what was done on stdout.

    Returns:
        whether all went well.
    """
    import click

    try:
        result = write_pictures(root, out=out, look=look, jobs=jobs, force=force)
    except KeyboardInterrupt:
        click.echo("interrupted; run the same command again to go on", err=True)
        raise SystemExit(130) from None
    for shown, problem in sorted(result.failed):
        click.echo(f"failed: {shown}: {problem}", err=True)
    for trace in result.traces if debug else ():
        click.echo(trace, err=True)
    counts = {
        f"{'picture' if result.written == 1 else 'pictures'} written": result.written,
        "already there": result.kept,
        "without image passed over": result.passed,
        "failed": len(result.failed),
    }
    where = out if out is not None else root
    click.echo(f"{where}: " + ", ".join(f"{n} {what}" for what, n in counts.items() if n or "written" in what))
    if result.failed:
        top = where if where.is_dir() else where.parent
        click.echo(f"the failed files are listed in {top / PROBLEMS}", err=True)
    return not result.failed
