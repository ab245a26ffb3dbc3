"""What would spoil a training, found before it starts."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.data.folder import FILE_ENDING, DatasetFolder, pixel_hash
from medseg.data.slices import in_order, source_hash, stored_source_hash
from medseg.data.splits import find_split_errors
from medseg.errors import DatasetError, LeakageError, MedsegError
from medseg.io import read_image

#: Two grids are one when their corners are nearer than this share of a voxel.
GRID_TOLERANCE = 0.01


@dataclass(frozen=True, order=True)
class Problem:
    """Something wrong with a dataset.

    Attributes:
        case: the case, or the file where it is not one case's.
        what: what was found, and what was expected.
        advice: what to do.
    """

    case: str
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.case}: {self.what}; {self.advice}"


def check_dataset(
    root: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> list[Problem]:
    """Read every file of a dataset and list what is wrong.

    Found are: files missing, unreadable or belonging to no case; channels or labels on another grid than the first
    channel (shape, affine); values that are not finite; constant channels; label values that ``dataset.json`` does not
    name; labels without foreground; shape, spacing and pixel hashes other than in ``cases.csv``; cases with the same
    pixels, with the parts and patients that they stand in; patients in two parts of a split; cases in no part;
    ``dataset.json`` and ``splits_final.json`` that do not follow ``splits.json``; slice stores that are damaged or
    older than the split or the images.

    Args:
        root: the dataset folder.
        progress: called with (cases done, cases in all).
        workers: threads that read cases; default: one per core.

    Returns:
        the problems, sorted by case; an empty list when nothing wrong was found.

    Raises:
        DatasetError: the folder is no dataset, or its dataset.json or cases.csv cannot be read.
    """
    folder = DatasetFolder(root)
    jobs = [
        _Job(
            case=str(row["case"]),
            images=tuple(folder.image_paths(str(row["case"]))),
            label=folder.label_path(str(row["case"])),
            channel_names=tuple(folder.channel_names),
            values=tuple(folder.labels.values()),
            expected={key: str(row[key]) for key in _EXPECTED if key in row},
        )
        for row in folder.cases.to_dict("records")
    ]
    findings = []
    for finding in in_order(_check_case, jobs, workers or len(os.sched_getaffinity(0))):
        findings.append(finding)
        if progress:
            progress(len(findings), len(jobs))

    problems = [problem for finding in findings for problem in finding.problems]
    problems += _stray_files(folder)
    splits, split_problems = _splits(folder)
    problems += split_problems
    problems += _duplicates(folder, findings, splits)
    if splits is not None and not split_problems:
        problems += _lists(folder, splits)
        problems += _slice_stores(folder, splits)
    return sorted(problems)


_EXPECTED = ("shape", "spacing", "image_sha256", "label_sha256")
_REBUILD = "build the dataset again"


@dataclass(frozen=True)
class _Job:
    case: str
    images: tuple[Path, ...]
    label: Path
    channel_names: tuple[str, ...]
    values: tuple[int, ...]
    expected: Mapping[str, str]


@dataclass
class _Finding:
    case: str
    problems: list[Problem] = field(default_factory=list)
    # Hash of each channel by its name; constant channels are left out, since they equal each other by nature.
    hashes: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, advice: str) -> None:
        self.problems.append(Problem(self.case, what, advice))


def _check_case(job: _Job) -> _Finding:
    finding = _Finding(job.case)
    channels = [_read(path, finding) for path in job.images]
    label = _read(job.label, finding)
    for name, channel in zip(job.channel_names, channels, strict=True):
        if channel is None:
            continue
        bad = int(np.count_nonzero(~np.isfinite(channel.voxels)))
        if bad:
            finding.add(f"channel {name}: {bad} voxels are NaN or infinite", "mend or leave out the source")
        elif channel.voxels.min() == channel.voxels.max():
            finding.add(
                f"channel {name}: every voxel is {channel.voxels.flat[0]:g}", "look at the source: the image is empty"
            )
        else:
            finding.hashes[name] = pixel_hash(channel.voxels)
    if label is not None:
        values = np.unique(label.voxels)
        unknown = [value for value in values if value not in job.values]
        if unknown:
            finding.add(
                f"label: value(s) {', '.join(f'{value:g}' for value in unknown[:5])} found, "
                f"{', '.join(map(str, job.values))} expected",
                "name them in dataset.json or remap them when building",
            )
        if not values.any():
            finding.add("label: no foreground", "look at the delineation, or leave the case out")

    known = [channel for channel in channels if channel is not None]
    one_grid = len(known) == len(channels)
    for name, other in zip((*job.channel_names[1:], "label"), (*channels[1:], label), strict=True):
        if other is None or channels[0] is None:
            continue
        difference = _grid_difference(channels[0], other)
        if difference:
            one_grid = one_grid and name == "label"
            what = name if name == "label" else f"channel {name}"
            finding.add(f"{what}: {difference} channel {job.channel_names[0]}", "bring them onto one grid: " + _REBUILD)

    found: dict[str, str] = {}
    if channels and channels[0] is not None:
        found["shape"] = "x".join(map(str, channels[0].voxels.shape))
        found["spacing"] = "x".join(f"{step:.6g}" for step in np.linalg.norm(channels[0].affine[:3, :3], axis=0))
    if one_grid:
        found["image_sha256"] = pixel_hash(np.stack([channel.voxels for channel in known]))
    if label is not None and np.array_equal(label.voxels, label.voxels.astype(np.uint8)):
        found["label_sha256"] = pixel_hash(label.voxels.astype(np.uint8))
    for key, value in found.items():
        expected = job.expected.get(key, "")
        same = _same_spacing(value, expected) if key == "spacing" else value == expected
        if expected and not same:
            if key.endswith("_sha256"):
                what = f"{key.removesuffix('_sha256')}: its voxels changed since the build (hash in cases.csv)"
            else:
                what = f"{key}: {value} in the image, {expected} in cases.csv"
            finding.add(what, _REBUILD)
    return finding


@dataclass
class _Image:
    voxels: NDArray[np.float32]
    affine: NDArray[np.float64]


def _read(path: Path, finding: _Finding) -> _Image | None:
    """One file as [x, y, z], or None with a problem noted."""
    name = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        finding.add(f"{name} is missing", _REBUILD)
        return None
    try:
        image = read_image(path)
    except (MedsegError, OSError) as error:
        finding.add(" ".join(str(error).split()).replace(str(path), name), _REBUILD)
        return None
    if len(image) != 1:
        finding.add(f"{name}: {len(image)} channels in one file, 1 expected", _REBUILD)
        return None
    return _Image(image.numpy()[0].astype(np.float32, copy=False), np.asarray(image.affine, dtype=np.float64))


def _grid_difference(one: _Image, other: _Image) -> str:
    """How the grid of an image differs from another's, in words that end before that other's name; or nothing."""
    if one.voxels.shape != other.voxels.shape:
        shapes = ["x".join(map(str, image.voxels.shape)) for image in (other, one)]
        return f"shape {shapes[0]}, {shapes[1]} expected as of"
    corners = np.array([(*corner, 1) for corner in product(*((0, n - 1) for n in one.voxels.shape))])
    distance = np.linalg.norm((corners @ (one.affine - other.affine).T)[:, :3], axis=1).max()
    if distance > GRID_TOLERANCE * np.linalg.norm(one.affine[:3, :3], axis=0).min():
        return f"its grid (affine) is up to {distance:.3g} mm away from that of"
    return ""


def _same_spacing(found: str, expected: str) -> bool:
    try:
        steps = [float(step) for step in expected.split("x")]
    except ValueError:
        return False
    values = [float(step) for step in found.split("x")]
    return len(steps) == len(values) and np.allclose(values, steps, rtol=1e-4)


def _stray_files(folder: DatasetFolder) -> Iterator[Problem]:
    names = [str(case) for case in folder.cases["case"]]
    expected = {path for case in names for path in (*folder.image_paths(case), folder.label_path(case))}
    for place in ("imagesTr", "labelsTr"):
        for path in sorted((folder.root / place).glob("*")):
            if path in expected:
                continue
            if path.name.startswith(".tmp-"):
                yield Problem(f"{place}/{path.name}", "the rest of an interrupted run", "delete it")
            else:
                advice = "delete it" if path.name.endswith(FILE_ENDING) else "move it elsewhere"
                yield Problem(f"{place}/{path.name}", "belongs to no case of cases.csv", advice)


def _splits(folder: DatasetFolder) -> tuple[Mapping[str, Any] | None, list[Problem]]:
    """The splits, if there are any that can be read, and what is wrong with them."""
    path = folder.root / "splits.json"
    if not path.exists():
        return None, []
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return None, [Problem(path.name, f"cannot be read ({error})", "run `data_prep split --force`")]
    problems = []
    for found in find_split_errors(splits, folder.cases):
        what, _, advice = str(found).removeprefix(f"{path.name}: ").rpartition("; ")
        problems.append(Problem(path.name, what or advice, advice if what else "run `data_prep split --force`"))
    readable = isinstance(splits, dict) and isinstance(splits.get("folds"), list)
    return splits if readable else None, problems


def _duplicates(folder: DatasetFolder, findings: list[_Finding], splits: Mapping[str, Any] | None) -> Iterator[Problem]:
    patient_of = dict(zip(folder.cases["case"], folder.cases["patient"], strict=True))
    parts: dict[str, set[str]] = {}
    for part, cases in _members(splits):
        for case in cases:
            parts.setdefault(case, set()).add(part)
    first: dict[str, str] = {}
    for finding in sorted(findings, key=lambda finding: finding.case):
        twins: dict[str, list[str]] = {}
        for name, digest in finding.hashes.items():
            twin = first.setdefault(digest, finding.case)
            if twin != finding.case:
                twins.setdefault(twin, []).append(name)
        for twin, names in twins.items():
            channels = "image" if len(names) == len(folder.channel_names) else f"channel {', '.join(names)}"
            if patient_of[twin] == patient_of[finding.case]:
                whose, advice = f"of the same patient {patient_of[twin]}", "leave one of them out"
            else:
                whose = f"of another patient ({patient_of[finding.case]} here, {patient_of[twin]} there)"
                advice = "find out whose image it is, or leave one of them out"
            apart = parts.get(twin, set()) ^ parts.get(finding.case, set())
            where = f", and the two stand in different parts ({', '.join(sorted(apart))})" if apart else ""
            yield Problem(finding.case, f"{channels}: the same voxels as case {twin} {whose}{where}", advice)


def _members(splits: Mapping[str, Any] | None) -> Iterator[tuple[str, list[str]]]:
    """Parts that a case is in for good (fold k: validates in fold k), and their cases."""
    folds = splits["folds"] if splits else []
    for number, fold in enumerate(folds):
        if isinstance(fold, Mapping):
            if len(folds) == 1:
                yield "train", list(fold.get("train") or [])
            yield "val" if len(folds) == 1 else f"fold {number}", list(fold.get("val") or [])
    if splits:
        yield "test", list(splits.get("test") or [])


def _lists(folder: DatasetFolder, splits: Mapping[str, Any]) -> Iterator[Problem]:
    """Compare what nnU-Net and MONAI read with splits.json."""
    advice = "run `data_prep split --force` with the arguments of the split"
    info = folder.info
    used = {case for fold in splits["folds"] for part in ("train", "val") for case in fold[part]}
    if set(info.get("dataset", {})) != used or info.get("numTraining") != len(used):
        locked = sorted(set(info.get("dataset", {})) & set(splits["test"]))
        what = (
            f"nnU-Net would train on test case {locked[0]}" if locked else "its cases for nnU-Net are not the split's"
        )
        yield Problem("dataset.json", f"{what} (keys dataset and numTraining)", advice)
    listed = {name: {entry["case"] for entry in info.get(name, [])} for name in ("training", "validation", "test")}
    if listed["training"] | listed["validation"] != used or listed["test"] != set(splits["test"]):
        yield Problem("dataset.json", "its lists training, validation and test are not those of splits.json", advice)
    path = folder.root / "splits_final.json"
    try:
        final = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield Problem(path.name, f"cannot be read ({error.__class__.__name__})", advice)
        return
    if final != splits["folds"]:
        yield Problem(path.name, "its folds are not those of splits.json", advice)


def _slice_stores(folder: DatasetFolder, splits: Mapping[str, Any]) -> Iterator[Problem]:
    for path in sorted(folder.root.glob("*.h5")):
        if path.name.startswith(".tmp-"):
            yield Problem(path.name, "the rest of an interrupted run", "delete it")
            continue
        try:
            fold, stored = stored_source_hash(path)
        except DatasetError as error:
            kind = "a patient in two groups" if isinstance(error, LeakageError) else "not a complete slice store"
            yield Problem(path.name, f"{kind} ({str(error).removeprefix(f'{path}: ')})", "run `data_prep slices` again")
            continue
        if fold >= len(splits["folds"]) or source_hash(folder.cases, splits, fold) != stored:
            yield Problem(
                path.name,
                f"older than the images or the split (fold {fold}) that it was made from",
                "run `data_prep slices` again",
            )
