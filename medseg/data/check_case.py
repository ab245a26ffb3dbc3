"""What the check of a dataset finds in the files of one case."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from medseg.data.alignment import find_shift
from medseg.data.duplicates import signature
from medseg.data.folder import pixel_hash
from medseg.data.plausibility import implausible_hu, implausible_suv, labels_in_air
from medseg.data.problem import ERROR, WARNING, Problem
from medseg.errors import MedsegError
from medseg.io.channel_names import is_ct, is_pet
from medseg.io.image import load
from medseg.io.position import is_picture, position_index
from medseg.io.same_grid import millimeters_apart
from medseg.io.text import one_line

REBUILD = "build the dataset again"
LOOK = "look at its picture in report.html"

#: What may look at a case while it is in memory: it is given the row of cases.csv, the channels [x, y, z], the label
#: [x, y, z] or None, and the affine that all have (RAS mm).
Look = Callable[[Mapping[str, Any], Sequence[NDArray[np.float32]], NDArray[Any] | None, NDArray[np.float64]], None]

_EXPECTED = ("shape", "spacing", "image_sha256", "label_sha256")
_OUTSIDE = "does it belong to this image?"


@dataclass(frozen=True)
class CaseFiles:
    """A case as it should be: its files, and its row of cases.csv.

    Attributes:
        label: None of a classification.
        labels: name of each value, background among them.
        row: of cases.csv.
    """

    case: str
    images: tuple[Path, ...]
    label: Path | None
    attachments: tuple[Path, ...]
    channels: tuple[str, ...]
    labels: Mapping[int, str]
    row: Mapping[str, Any]


@dataclass
class Finding:
    """A case as it is.

    Attributes:
        problems: what is wrong with it by itself.
        hashes: of each channel by its name (of one channel, of the image); constant channels are left out, since they
            equal each other by nature.
        signature: of its first channel, to find near-duplicates by.
        axes: the orientation of its voxels (``LPS``); empty for a picture.
        at_edge: labels that touch a face of the image.
    """

    case: str
    problems: list[Problem] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    signature: NDArray[np.float32] | None = None
    axes: str = ""
    at_edge: tuple[str, ...] = ()

    def add(self, what: str, advice: str, topic: str, severity: str = ERROR) -> None:
        """Note a problem."""
        self.problems.append(Problem(self.case, what, advice, topic, severity))


@dataclass
class _Image:
    voxels: NDArray[Any]  # float32; of a label uint8, unless it has other values
    affine: NDArray[np.float64]

    @property
    def is_picture(self) -> bool:
        return is_picture(self.voxels.shape, self.affine)


def check_case(files: CaseFiles, look: Look | None = None) -> Finding:
    """Read all files of a case and compare them with each other, with cases.csv and with what images can be.

    ``look`` is called where all files were read and lie on one grid.
    """
    finding = Finding(files.case)
    channels = [_read(path, finding) for path in files.images]
    label = _read(files.label, finding) if files.label else None
    usable = {
        name: channel
        for name, channel in zip(files.channels, channels, strict=True)
        if channel is not None and _has_values(name, channel, finding)
    }
    if label is not None:
        label = _as_bytes(label)
        _check_label(label, files.labels, finding)
    odd = set(_odd_grids(files, channels, label, finding))
    known = [channel for channel in channels if channel is not None]
    image_hash = ""
    if len(known) == len(channels) and odd <= {"label"}:
        image_hash = pixel_hash(np.stack([channel.voxels for channel in known]))
        if look is not None and not odd and (label is not None or files.label is None):
            look(
                files.row,
                [channel.voxels for channel in known],
                None if label is None else label.voxels,
                known[0].affine,
            )
    one = image_hash if len(channels) == 1 else ""
    finding.hashes = {name: one or pixel_hash(channel.voxels) for name, channel in usable.items()}
    _check_twins(finding)
    _compare_with_row(files.row, channels[0], image_hash, label, finding)
    for path in files.attachments:
        _check_attachment(path, finding)

    for name, channel in usable.items():
        _check_values(name, channel, finding)
    if label is not None and "label" not in odd:
        finding.at_edge = tuple(_at_edge(label.voxels, files.labels))
        for name, channel in usable.items():
            if is_ct(name) and name not in odd:
                _check_air(name, channel, label, files.labels, finding)
    first = channels[0]
    if first is not None and files.channels[0] in usable:
        finding.signature = signature(first.voxels, first.affine)
        finding.axes = "" if first.is_picture else "".join(nib.orientations.aff2axcodes(first.affine))
        for name, channel in list(usable.items())[1:]:
            if name not in odd and not first.is_picture:
                _check_alignment(files.channels[0], first, name, channel, finding)
    if first is not None:
        _check_position(str(files.row.get("position", "")), first, finding)
    return finding


def _has_values(name: str, channel: _Image, finding: Finding) -> bool:
    """Whether a channel is finite and not constant."""
    bad = int(np.count_nonzero(~np.isfinite(channel.voxels)))
    if bad:
        finding.add(f"channel {name}: {bad} voxels are NaN or infinite", "mend or leave out the source", "values")
    elif channel.voxels.min() == channel.voxels.max():
        what = f"channel {name}: every voxel is {channel.voxels.flat[0]:g}"
        finding.add(what, "look at the source: the image is empty", "values")
    else:
        return True
    return False


def _as_bytes(label: _Image) -> _Image:
    """The label as uint8, which is much faster to count, unless it has values that are none."""
    with np.errstate(invalid="ignore"):
        voxels = label.voxels.astype(np.uint8)
    return _Image(voxels, label.affine) if np.array_equal(voxels, label.voxels) else label


def _check_label(label: _Image, names: Mapping[int, str], finding: Finding) -> None:
    values = np.unique(label.voxels)
    unknown = [value for value in values if value not in names]
    if unknown:
        finding.add(
            f"label: value(s) {', '.join(f'{value:g}' for value in unknown[:5])} found, "
            f"{', '.join(map(str, names))} expected",
            "name them in dataset.json or remap them when building",
            "label",
        )
    if not values.any():
        advice = "look at the delineation, unless there is nothing to delineate"
        finding.add("label: no foreground", advice, "label", WARNING)


def _odd_grids(
    files: CaseFiles, channels: Sequence[_Image | None], label: _Image | None, finding: Finding
) -> Iterator[str]:
    """Give the channels, and ``label``, that are on another grid than the first channel."""
    for name, other in zip((*files.channels[1:], "label"), (*channels[1:], label), strict=True):
        if other is None or channels[0] is None:
            continue
        difference = _grid_difference(channels[0], other)
        if difference:
            what = name if name == "label" else f"channel {name}"
            advice = f"bring them onto one grid: {REBUILD}"
            finding.add(f"{what}: {difference} channel {files.channels[0]}", advice, "grid")
            yield name


def _check_twins(finding: Finding) -> None:
    """Tell channels that are copies of another."""
    first: dict[str, str] = {}
    for name, digest in finding.hashes.items():
        twin = first.setdefault(digest, name)
        if twin != name:
            advice = "look for the image that was meant, or build with one of them"
            finding.add(f"channel {name}: the same voxels as channel {twin}", advice, "duplicate", WARNING)


def _compare_with_row(
    row: Mapping[str, Any],
    first: _Image | None,
    image_hash: str,
    label: _Image | None,
    finding: Finding,
) -> None:
    """Compare with what cases.csv says that the build wrote."""
    found: dict[str, str] = {}
    if first is not None:
        found["shape"] = "x".join(map(str, first.voxels.shape))
        found["spacing"] = "x".join(f"{step:.6g}" for step in np.linalg.norm(first.affine[:3, :3], axis=0))
    if image_hash:
        found["image_sha256"] = image_hash
    if label is not None and label.voxels.dtype == np.uint8:
        found["label_sha256"] = pixel_hash(label.voxels)
    for key in _EXPECTED:
        value, expected = found.get(key, ""), str(row.get(key, ""))
        if not value or not expected or value == expected or (key == "spacing" and _same_spacing(value, expected)):
            continue
        what, topic = f"{key}: {value} in the image, {expected} in cases.csv", "grid"
        if key.endswith("_sha256"):
            what = f"{key.removesuffix('_sha256')}: its voxels changed since the build (hash in cases.csv)"
            topic = "files"
        finding.add(what, REBUILD, topic)


def _check_attachment(path: Path, finding: Finding) -> None:
    name = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        finding.add(f"{name} is missing", REBUILD, "files")
    elif path.suffix == ".png":
        try:
            with Image.open(path) as picture:
                picture.verify()
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
            finding.add(f"{name} is no readable PNG picture", REBUILD, "files")


def _check_values(name: str, channel: _Image, finding: Finding) -> None:
    if is_ct(name) and not channel.is_picture:
        for what in implausible_hu(channel.voxels):
            finding.add(f"channel {name}: {what}", "give it in Hounsfield units, or another name", "HU", WARNING)
    elif is_pet(name) and not channel.is_picture:
        for what in implausible_suv(channel.voxels):
            finding.add(f"channel {name}: {what}", "give it in SUV, or another name", "SUV", WARNING)


def _at_edge(label: NDArray[Any], names: Mapping[int, str]) -> Iterator[str]:
    """Labels with voxels on a face of the image, where it is more than one voxel thick."""
    faces = [label.take((0, -1), axis=axis).ravel() for axis in range(3) if label.shape[axis] > 1]
    touching = set(np.unique(np.concatenate(faces)).tolist()) if faces else set()
    yield from (name for value, name in names.items() if value and value in touching)


def _check_air(name: str, channel: _Image, label: _Image, names: Mapping[int, str], finding: Finding) -> None:
    foreground = {value: text for value, text in names.items() if value}
    for text, share in labels_in_air(channel.voxels, label.voxels, foreground, channel.affine):
        what = f"label {text}: {share:.0%} of it lies in the air around the body on channel {name}"
        finding.add(what, f"{LOOK}: {_OUTSIDE}", "alignment", WARNING)


def _check_alignment(first_name: str, first: _Image, name: str, channel: _Image, finding: Finding) -> None:
    shift = find_shift(first.voxels, channel.voxels, np.linalg.norm(first.affine[:3, :3], axis=0))
    if shift is None:
        return
    # The shift of the array's axes as that of the patient's.
    steps = first.affine[:3, :3] / np.linalg.norm(first.affine[:3, :3], axis=0) @ -np.asarray(shift.mm)
    where = ", ".join(
        f"{abs(step):.0f} mm {ends[int(step < 0)]}"
        for step, ends in zip(steps, (("right", "left"), ("front", "back"), ("up", "down")), strict=True)
        if abs(step) >= 1
    )
    finding.add(
        f"channel {name}: lies better on channel {first_name} when it is moved {shift.length:.0f} mm ({where}): "
        f"they then share {shift.after:.2f} instead of {shift.before:.2f} of their information",
        f"{LOOK}; register the channels, or leave the case out",
        "alignment",
        WARNING,
    )


def _check_position(text: str, image: _Image, finding: Finding) -> None:
    """Compare the position of a lesion with the image around it."""
    if not text.strip():
        return
    index = position_index(text, image.voxels.shape, image.affine)
    if index is None:
        what = f"position: {text!r} found, three numbers expected (RAS mm; of a picture, its column and row)"
        finding.add(what, "correct it in the source", "position")
        return
    beyond = np.maximum(np.maximum(-1 - index, index - np.asarray(image.voxels.shape)), 0)
    if beyond.any():
        unit = "pixels" if image.is_picture else "mm"
        distance = float(np.linalg.norm(beyond * np.linalg.norm(image.affine[:3, :3], axis=0)))
        finding.add(f"position: {distance:.1f} {unit} outside of the image", _OUTSIDE, "position", WARNING)


def _read(path: Path, finding: Finding) -> _Image | None:
    """One file as [x, y, z], or None with a problem noted."""
    name = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        finding.add(f"{name} is missing", REBUILD, "files")
        return None
    try:
        volume, _ = load(path)
    except (MedsegError, OSError) as error:
        finding.add(one_line(str(error).replace(str(path), name)), REBUILD, "files")
        return None
    if len(volume.voxels) != 1:
        finding.add(f"{name}: {len(volume.voxels)} channels in one file, 1 expected", REBUILD, "files")
        return None
    if volume.voxels.ndim != 4:
        shape = "x".join(map(str, volume.voxels.shape[1:]))
        finding.add(f"{name}: shape {shape}, 3 axes expected (of a flat image {shape}x1)", REBUILD, "grid")
        return None
    return _Image(np.ascontiguousarray(volume.voxels[0]), volume.affine)


def _grid_difference(one: _Image, other: _Image) -> str:
    """How the grid of an image differs from another's, in words that end before that other's name; or nothing."""
    if one.voxels.shape != other.voxels.shape:
        shapes = ["x".join(map(str, image.voxels.shape)) for image in (other, one)]
        return f"shape {shapes[0]}, {shapes[1]} expected as of"
    apart = millimeters_apart(one.voxels.shape, one.affine, other.affine)
    return f"its grid (affine) is up to {apart:.3g} mm away from that of" if apart else ""


def _same_spacing(found: str, expected: str) -> bool:
    try:
        steps = [float(step) for step in expected.split("x")]
    except ValueError:
        return False
    values = [float(step) for step in found.split("x")]
    return len(steps) == len(values) and np.allclose(values, steps, rtol=1e-4)
