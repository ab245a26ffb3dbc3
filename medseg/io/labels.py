"""Label maps: images whose voxels are whole numbers, and contours in text files and pictures of single slices."""

import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError, GeometryError, ReadError
from .kinds import kind_by_content, kind_of, read_start
from .reference import Reference, find_reference
from .rtstruct import fill_even_odd
from .same_grid import millimeters_apart
from .volume import Volume

if TYPE_CHECKING:
    from monai.data import MetaTensor

    from .series import Series

ORDERS = ("instance", "position", "number")

# float32, in which images are read, holds whole numbers exactly up to here.
_LARGEST = 1 << 24

# What a rounding error may be.
_ROUNDING = 1e-3

_MOST_POINTS = 1_000_000


def read_label(
    path: str | os.PathLike[str],
    reference: "MetaTensor | Series | str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None" = None,
    *,
    order: str | None = None,
    pattern: str = "*",
    first_pixel: float = 0.0,
) -> "MetaTensor":
    """Read one label map: every voxel a whole number, 0 for background.

    What ``path`` may be:

    - A NIfTI, MHD/MHA or NRRD file, or a picture; values as stored (a mask of 0 and 255 keeps its 255). 0.99999997 is
      taken for 1; what is further than 0.001 from a whole number is refused, as a mask that was interpolated. So is
      JPEG, which does not keep values. A picture in color must have equal channels.
    - A DICOM segmentation: the voxels hold segment numbers. Segments that overlap are refused; `read_seg` gives them
      one by one.
    - A folder of pictures, one per slice of a DICOM series, which ``reference`` must be. ``order`` says how they
      belong: ``"instance"``: sorted by name (numbers by value), they follow InstanceNumber; ``"position"``: they follow
      the slices along the normal, as in the image of `read_image`; ``"number"``: the last whole number in the name is
      the InstanceNumber, and slices without picture are empty. Columns and rows are those of the slice.
    - A text file with the contour of one slice, or a folder of them, as in the Sunnybrook cardiac data: a line
      ``x y`` per point (blank or comma between), in pixels, columns first; the last number in the name that stands by
      itself is the InstanceNumber (59 in ``IM-0001-0059-icontour-manual.txt``). ``reference`` must be the DICOM series.
      The voxels inside are 1, by the rule of `read_rtstruct`: a center on the edge belongs to one side only.

    Args:
        path: a file or a folder.
        reference: the image that the label belongs to, as in `read_rtstruct`. Where the label has a grid of its own, it
            must be that of the reference: nothing is resampled.
        order: for a folder of pictures; there is no default.
        pattern: which files of the folder are meant, such as ``"*icontour*"``: those that `fnmatch` finds.
        first_pixel: the coordinate of the center of the first pixel in contour files: 0, or 0.5 where coordinates count
            from the corner of the image, or 1 as in MATLAB.

    Returns:
        [1, X, Y, Z] (a picture by itself [1, X, Y]), uint8, or int32 where values exceed 255. ``meta["units"]`` is
        ``"label"``.

    Raises:
        ReadError: a value that is negative, no whole number or NaN (with its voxel); several channels; a folder whose
            files do not fit the slices; contours that cannot be parsed.
        GeometryError: the grid is not that of the reference.
        ConfigError: ``order`` is missing or unknown.

    Example:
        >>> import tempfile
        >>> from medseg.io import write_nifti
        >>> path = Path(tempfile.mkdtemp()) / "label.nii.gz"
        >>> write_nifti((np.array([[[0, 0.99999997], [2, 1]]], np.float32), np.eye(4)), path)
        >>> label = read_label(path)
        >>> label.dtype, label.unique().tolist()
        (torch.uint8, [0, 1, 2])
    """
    path = Path(path)
    if order is not None and order not in ORDERS:
        raise ConfigError(f"order: {order!r} found, expected one of {', '.join(ORDERS)}")
    if not path.exists():
        raise ReadError(f"{path}: no such file or folder")
    if path.is_dir():
        files = sorted(item for item in path.glob(pattern) if item.is_file() and not item.name.startswith("."))
        if not files:
            raise ReadError(f"{path}: no file in this folder fits {pattern!r}: expected pictures or contour files")
        kinds = {_kind(item) for item in files}
        if len(kinds) > 1:
            raise ReadError(
                f"{path}: files of several kinds ({', '.join(sorted(kinds))}): expected contour files or pictures of "
                "one series; choose some by pattern"
            )
        kind = kinds.pop()
        if kind == "picture":
            return _of_pictures(path, files, reference, order)
        if kind == "text":
            return _of_contours(path, files, reference, first_pixel)
        if len(files) > 1:
            raise ReadError(f"{path}: {len(files)} {kind} files: expected one label; name it")
        path = files[0]
    else:
        kind = _kind(path)
        if kind == "text":
            return _of_contours(path, [path], reference, first_pixel)
    label = _of_seg(path) if kind == "dicom" else _of_image(path, kind)
    if reference is not None:
        _check_grid(path, label, reference)
    return label.tensor(str(path))


def _kind(path: Path) -> str:
    start = read_start(path)
    if kind_by_content(start) is None and path.suffix.lower() == ".txt":
        return "text"
    return kind_of(path, start)


def _of_image(path: Path, kind: str) -> Volume:
    from .image import read_image

    if kind == "picture" and read_start(path).startswith(b"\xff\xd8\xff"):
        raise ReadError(f"{path}: a JPEG, which does not keep the values of a label: expected PNG, TIFF or GIF")
    image = read_image(path)
    values = image.as_tensor().numpy()
    return Volume(
        _whole(str(path), _one_channel(path, values)),
        np.asarray(image.affine, dtype=np.float64),
        units="label",
        has_geometry=bool(image.meta["has_geometry"]),
        problems=tuple(filter(None, str(image.meta["problems"]).split("; "))),
    )


def _one_channel(path: Path, values: np.ndarray) -> np.ndarray:
    """Return one channel; a picture that was saved in color may have several equal ones."""
    if len(values) > 1 and (len(values) > 4 or any(not np.array_equal(values[0], other) for other in values[1:3])):
        raise ReadError(f"{path}: {len(values)} channels: expected a label of one, each voxel a whole number")
    return values[:1]


def _whole(name: str, values: np.ndarray) -> np.ndarray:
    """Return values as uint8 or int32; refuse what is no label, naming the voxel."""

    def voxel(wrong: np.ndarray) -> str:
        place = np.unravel_index(int(wrong.argmax()), wrong.shape)[1:]
        return "(" + ", ".join(str(int(n)) for n in place) + ")"

    with np.errstate(invalid="ignore"):  # NaN or above 255: then it does not equal its copy
        small = values.astype(np.uint8)
    if np.array_equal(small, values):  # most labels, at a quarter of the memory that what follows takes
        return small
    rounded = np.rint(values)
    # NaN fails every comparison, hence the negation; infinity less infinity is NaN.
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(values - rounded) <= _ROUNDING)
    if wrong.any():
        found = float(values.reshape(-1)[int(wrong.argmax())])
        hint = "a mask interpolated linearly? Resample it with nearest neighbor" if np.isfinite(found) else "damaged"
        raise ReadError(
            f"{name}: {int(wrong.sum()):,} voxels are no whole numbers, such as {found:.6g} at voxel {voxel(wrong)}: "
            f"expected a label; {hint}"
        )
    low, high = (float(rounded.min()), float(rounded.max())) if rounded.size else (0.0, 0.0)
    if low < 0:
        raise ReadError(
            f"{name}: a voxel is {low:.9g} (at voxel {voxel(rounded == low)}): expected a label, of whole numbers from "
            "0 on; is this an image?"
        )
    if high >= _LARGEST:
        raise ReadError(
            f"{name}: a voxel is {high:.9g} (at voxel {voxel(rounded == high)}): expected labels below {_LARGEST:,}"
        )
    return rounded.astype(np.uint8 if high <= 255 else np.int32)


def _of_seg(path: Path) -> Volume:
    from .seg import open_seg, read_voxels

    seg = open_seg(path)
    largest = max(segment.number for segment in seg.segments)
    combined = np.zeros(seg.grid.shape[::-1], dtype=np.uint8 if largest <= 255 else np.int32).transpose(2, 1, 0)
    for segment in seg.segments:
        inside = read_voxels(seg, segment) > 0
        both = inside & (combined > 0)
        if both.any():
            other = int(combined[both][0])
            raise ReadError(
                f"{path}: segments {other} and {segment.number} overlap in {int(both.sum()):,} voxels: no single label "
                "map can hold them; read them one by one with read_seg"
            )
        combined[inside] = segment.number
    return Volume(
        combined[None],
        seg.grid.affine,
        modality="SEG",
        units="label",
        problems=seg.problems,
        dicom=dict(seg.grid.identity),
    )


def _check_grid(path: Path, label: Volume, reference: object) -> None:
    shape = tuple(label.voxels.shape[1:])
    meta = getattr(reference, "meta", {})
    if not label.has_geometry and hasattr(reference, "shape") and not meta.get("has_geometry", True):
        if shape != tuple(reference.shape[1:]):
            raise GeometryError(f"{path}: {_by(shape)} pixels, the reference has {_by(reference.shape[1:])}")
        return
    if not label.has_geometry:
        raise GeometryError(f"{path}: a single picture lies nowhere in the patient: expected a label with geometry")
    grid = find_reference(reference, "labels")
    if shape != grid.shape:
        raise GeometryError(
            f"{path}: {_by(shape)} voxels, {grid.name} has {_by(grid.shape)}: a label must lie on the grid of its "
            "image; resample it with nearest neighbor first"
        )
    if apart := millimeters_apart(shape, grid.affine, label.affine):
        raise GeometryError(
            f"{path}: lies up to {apart:.3g} mm away from {grid.name}: a label must lie on the grid of its image "
            "(spacing, origin and axes); reorient or resample it first"
        )


def _of_pictures(folder: Path, files: list[Path], reference: object, order: str | None) -> "MetaTensor":
    if order is None:
        raise ConfigError(
            f"{folder}: {len(files)} pictures: order must say how they belong to slices, one of {', '.join(ORDERS)}"
        )
    grid, numbers = _slices(folder, "pictures", reference)
    columns, rows, count = grid.shape
    if order == "number":
        slots = [_slot(path, numbers, grid) for path in files]
        _check_once(files, slots)
    else:
        files = sorted(files, key=_natural)
        for first, second in pairwise(files):
            if _natural(first) == _natural(second):
                raise ReadError(f"{folder}: {first.name} and {second.name} have the same number: which comes first?")
        if len(files) != count:
            raise ReadError(
                f"{folder}: {len(files)} pictures, {grid.name} has {count} slices: expected one each; where their "
                'names hold InstanceNumber, use order="number"'
            )
        if order == "position":
            slots = list(range(count))
        else:
            if len(set(numbers)) < count or None in numbers:
                raise ReadError(
                    f"{grid.name}: InstanceNumber (0020,0013) is absent or not unique: the pictures cannot follow it; "
                    'use order="position" if they follow the position'
                )
            slots = sorted(range(count), key=lambda slot: numbers[slot] or 0)
    values = np.zeros((count, rows, columns), dtype=np.int32)
    for path, slot in zip(files, slots, strict=True):
        picture = _of_image(path, "picture").voxels
        if picture.shape[1:] != (columns, rows):
            raise GeometryError(
                f"{path}: {_by(picture.shape[1:])} pixels, the slices of {grid.name} have {_by((columns, rows))}"
            )
        values[slot] = picture[0].T
    if values.max(initial=0) <= 255:
        values = values.astype(np.uint8)
    return _on(grid, values, str(folder))


def _of_contours(path: Path, files: list[Path], reference: object, first_pixel: float) -> "MetaTensor":
    grid, numbers = _slices(path, "contours", reference)
    columns, rows, count = grid.shape
    slots = [_slot(file, numbers, grid) for file in files]
    _check_once(files, slots)
    values = np.zeros((count, rows, columns), dtype=np.uint8)
    for file, slot in zip(files, slots, strict=True):
        points = _contour(file) - first_pixel
        low, high = points.min(axis=0), points.max(axis=0)
        if (low < -1).any() or (high > np.array([columns, rows])).any():
            raise GeometryError(
                f"{file}: points from {_pair(low)} to {_pair(high)}: beyond the {_by((columns, rows))} pixels of "
                f"{grid.name}"
            )
        fill_even_odd([points[:, ::-1]], values[slot])
        if not values[slot].any():
            raise GeometryError(f"{file}: its contour holds no pixel of {grid.name}: is it in pixels?")
    return _on(grid, values, str(path))


def _contour(path: Path) -> np.ndarray:
    """Return the points of a contour file, points × 2 (x, y)."""
    points: list[tuple[float, float]] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if len(line) > 200 or len(points) > _MOST_POINTS:
                    raise ReadError(f"{path}: line {number} is too long, or it has too many: expected x y on a line")
                parts = line.replace(b",", b" ").split()
                if parts:
                    x, y = parts
                    points.append((float(x), float(y)))
    except ValueError as error:
        raise ReadError(f"{path}: line {number} is not two numbers: expected x y in pixels") from error
    array = np.array(points).reshape(-1, 2)
    if len(array) < 3:
        raise ReadError(f"{path}: {len(array)} points: expected at least three")
    if not np.isfinite(array).all():
        raise ReadError(f"{path}: a point is NaN or infinite")
    return array


def _slices(path: Path, what: str, reference: object) -> tuple[Reference, list[int | None]]:
    """Return the grid of a DICOM series and the InstanceNumber of each of its slices."""
    import pydicom

    from .dicom_header import integer, quiet, read_instance

    if reference is None or hasattr(reference, "meta"):
        raise GeometryError(f"{path}: {what} of slices: give the DICOM series (its folder, say) as the reference")
    grid = find_reference(reference, what)
    if not grid.slices:
        raise GeometryError(f"{grid.name}: not a DICOM series with a file per slice: the {what} of {path} need one")
    numbers: list[int | None] = []
    with quiet():
        for slot, file in enumerate(grid.slices):
            (plane,) = read_instance(file, force=True).planes
            place = np.array([-1.0, -1.0, 1.0]) * (plane.position or (np.nan,) * 3)
            if not np.linalg.norm(grid.affine @ [0, 0, slot, 1] - [*place, 1]) < 0.05 * float(grid.spacing.min()):
                raise GeometryError(
                    f"{grid.name}: its grid is not that of its slices ({file.name} lies elsewhere, as in a tilted "
                    f"series that is corrected): the {what} of {path} are in pixels of the slices"
                )
            header = pydicom.dcmread(file, specific_tags=["InstanceNumber"], force=True)
            numbers.append(integer(header, "InstanceNumber"))
    return grid, numbers


def _slot(path: Path, numbers: list[int | None], grid: Reference) -> int:
    """Return the slice whose InstanceNumber is the last number that stands by itself in the name."""
    found = [part for part in re.split(r"[^0-9A-Za-z]+", path.stem) if part.isascii() and part.isdigit()]
    if not found:
        raise ReadError(f"{path}: no number stands by itself in its name: expected the InstanceNumber of its slice")
    number = int(found[-1][:18])
    slots = [slot for slot, other in enumerate(numbers) if other == number]
    if len(slots) != 1:
        raise ReadError(
            f"{path}: its name says InstanceNumber {number}: {len(slots)} slices of {grid.name} have it, expected one"
        )
    return slots[0]


def _check_once(files: Sequence[Path], slots: Sequence[int]) -> None:
    seen: dict[int, Path] = {}
    for path, slot in zip(files, slots, strict=True):
        if slot in seen:
            raise ReadError(
                f"{path}: {seen[slot].name} is of the same slice: expected one file for each; choose by pattern"
            )
        seen[slot] = path


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Sort names as people do: numbers by value."""
    parts = re.findall(r"[0-9]+|[^0-9]+", path.name)
    return [(0, int(part[:18])) if part.isdigit() else (1, part) for part in parts]


def _on(grid: Reference, values: np.ndarray, name: str) -> "MetaTensor":
    volume = Volume(values.transpose(2, 1, 0)[None], grid.affine.copy(), units="label", dicom=dict(grid.identity))
    return volume.tensor(name)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(str(int(n)) for n in shape)


def _pair(point: np.ndarray) -> str:
    return f"({point[0]:.4g}, {point[1]:.4g})"
