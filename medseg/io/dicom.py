"""A DICOM image series as volumes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import nan

import numpy as np

from ..errors import ConfigError, GeometryError, MedsegError, ReadError
from .dicom_geometry import Grid, Slot, assemble, grids_of, stacks_of
from .dicom_header import Instance, hash_patient, place_of
from .dicom_pixels import check_promise, dataset_of, decode, forget_pixels, rescale, window_of
from .mosaic import picture_of, tile_of
from .suv import suv_factors
from .volume import Volume

PET_UNITS = ("SUVbw", "stored")

# What an upright grid holds where it reaches beyond the slices of a CT (HU); elsewhere it is 0.
_AIR = -1024.0


def read_volume(
    instances: Sequence[Instance],
    *,
    pet_units: str = "SUVbw",
    tilt: str = "correct",
    gaps: str = "refuse",
    stack: str = "",
) -> Volume:
    """Read the image of a series. Volumes that lie on one grid become its channels.

    Args:
        instances: the series with its datasets (``read_instance(..., pixels=True)``).
        pet_units: see `read_image`.
        tilt: see `read_image`.
        gaps: see `read_image`.
        stack: the name of the stack to read where the series has several.

    Raises:
        ReadError: no pixels, pixels that cannot be decoded, or objects that are no image.
        GeometryError: see `assemble`.
        MissingTagError: an attribute that SUVbw needs is absent (PET only).
    """
    with _parsing(instances):
        _check(instances, pet_units)
        grid = assemble(instances, tilt=tilt, gaps=gaps, stack=stack)
        if grid.samples > 1 and len(grid.volumes) > 1:
            raise GeometryError(
                f"{place_of(instances)}: {len(grid.volumes)} color images in one series: they are no channels of one "
                "image; read_volumes reads each by its name"
            )
        voxels = np.empty((len(grid.volumes), *_stored_shape(grid)), dtype=np.float32)
        read = _read(instances, grid, list(voxels), pet_units)
        if len(read.names) < len(voxels):
            voxels = voxels[[list(grid.volumes).index(name) for name in read.names]]
        voxels = np.moveaxis(voxels[0], -1, 0) if grid.samples > 1 else voxels[..., 0]
        names = tuple(read.names) if len(read.names) > 1 else ()
        units = set(read.units.values())
        return _volume(
            instances, grid, read, read.names[0], voxels, units.pop() if len(units) == 1 else "stored", names
        )


def read_all(
    instances: Sequence[Instance],
    *,
    pet_units: str = "SUVbw",
    tilt: str = "correct",
    gaps: str = "refuse",
    stack: str = "",
) -> dict[str, Volume]:
    """Read each volume of each stack of a series by its name; arguments and errors as those of `read_volume`."""
    with _parsing(instances):
        _check(instances, pet_units)
        stacks = stacks_of(instances)
        if stack in {one.name for one in stacks}:
            stacks = [one for one in stacks if one.name == stack]
        # All are looked at before the first is read: a stack that must be refused is refused at once.
        grids = [(one, grids_of(instances, one, tilt=tilt, gaps=gaps)) for one in stacks]
        volumes: dict[str, Volume] = {}
        for one, of_stack in grids:
            for grid in of_stack:
                outs = {name: np.empty(_stored_shape(grid), dtype=np.float32) for name in grid.volumes}
                read = _read(instances, grid, list(outs.values()), pet_units)
                for name in read.names:
                    own = name if len(read.names) > 1 or len(of_stack) > 1 else ""
                    full = ", ".join(filter(None, (one.name if len(stacks) > 1 else "", own)))
                    voxels = np.moveaxis(outs[name], -1, 0)
                    volumes[full] = _volume(instances, grid, read, name, voxels, read.units[name], ())
        return volumes


@contextmanager
def _parsing(instances: Sequence[Instance]) -> Iterator[None]:
    try:
        yield
    except MedsegError:
        raise
    except Exception as error:  # values of damaged elements, which pydicom parses only when they are asked for
        raise ReadError(
            f"{place_of(instances)}: damaged DICOM: an element cannot be parsed ({type(error).__name__})"
        ) from error


def _check(instances: Sequence[Instance], pet_units: str) -> None:
    if pet_units not in PET_UNITS:
        raise ConfigError(f"pet_units: {pet_units!r} found, expected one of {', '.join(PET_UNITS)}")
    for item in instances:
        if not item.is_image:
            raise ReadError(f"{item.path}: no image: a DICOM object of modality {item.modality or 'unknown'}")
    if len({item.patient_id for item in instances}) > 1:
        raise ReadError(
            f"{place_of(instances)}: files of different patients share one SeriesInstanceUID: set them apart"
        )


def _stored_shape(grid: Grid) -> tuple[int, int, int, int]:
    """Slices, rows, columns and samples, the order in which pixels are stored."""
    columns, rows, slices = grid.shape
    return slices, rows, columns, grid.samples


@dataclass
class _Read:
    """What came to light while pixels were read: volumes in place, their units and windows, and what was mended."""

    names: list[str]
    units: dict[str, str] = field(default_factory=dict)
    windows: dict[str, tuple[float, float, str]] = field(default_factory=dict)
    mended: list[str] = field(default_factory=list)


def _read(instances: Sequence[Instance], grid: Grid, outs: list[np.ndarray], pet_units: str) -> _Read:
    """Read the pixels of the volumes of a grid, each into its array [slices, rows, columns, samples]."""
    slots = {slot: (v, k) for v, order in enumerate(grid.volumes.values()) for k, slot in enumerate(order)}
    copies: dict[int, list[tuple[Slot, Slot]]] = {}
    for copy, original in grid.copies:
        copies.setdefault(original[0], []).append((copy, original))
    per_instance: dict[int, list[int]] = {}
    for i, frame in slots:
        per_instance.setdefault(i, []).append(frame)
    used = [instances[i] for i in per_instance]
    check_promise(used, used[0].rows * used[0].columns * len(slots) * grid.samples)
    names = list(grid.volumes)
    units: dict[str, set[str]] = {name: set() for name in names}
    read = _Read(names)
    put = _Puts(grid, _AIR if used[0].modality == "CT" else 0.0)
    if grid.sources is not None:
        for out in outs:
            out.fill(0)
    factors = _factors(instances, sorted({*per_instance, *(copy[0] for copy, _ in grid.copies)}), pet_units)
    for i, frames in per_instance.items():
        item = instances[i]
        factor = factors.get(i)
        frames.sort()
        for frame, pixels in zip(frames, _pixels(item, frames), strict=True):
            volume, k = slots[i, frame]
            target = put.target(outs[volume], k, pixels.shape[:2])
            units[names[volume]].add(_values(item, frame, pixels, factor, target))
            put.done(outs[volume], k, target)
            if k == len(grid.volumes[names[volume]]) // 2:
                read.windows[names[volume]] = window_of(dataset_of(item), frame, 1.0 if factor is None else factor)
        for copy, original in copies.get(i, ()):
            _same_pixels(instances, copy, original, factors)
        forget_pixels(dataset_of(item))
        for j in {copy[0] for copy, _ in copies.get(i, ())} - per_instance.keys():
            forget_pixels(dataset_of(instances[j]))
    pet = used[0].modality == "PT" and pet_units == "SUVbw"
    read.units = {
        name: "SUVbw" if pet else found.pop() if len(found) == 1 else "stored" for name, found in units.items()
    }
    if grid.copies:
        read.mended.append(f"{len(grid.copies)} × copy of a slice left out")
    if grid.by_number:
        _drop_equal(read, dict(zip(names, outs, strict=True)))
    return read


class _Puts:
    """Puts stored slices where they belong on a grid: as they are, moved in their plane, or shared among slices."""

    def __init__(self, grid: Grid, padding: float) -> None:
        self.shifts, self.padding = grid.shifts, padding
        self.shares: dict[int, list[tuple[int, float]]] | None = None
        if grid.sources is not None:
            self.shares = {}
            for k, (lower, upper, weight) in enumerate(grid.sources):
                self.shares.setdefault(lower, []).append((k, 1 - weight))
                if weight:
                    self.shares.setdefault(upper, []).append((k, weight))

    def target(self, out: np.ndarray, k: int, size: tuple[int, ...]) -> np.ndarray:
        """Return where the values of a stored slice are to be written."""
        if self.shifts is None and self.shares is None:
            return np.asarray(out[k])
        return np.empty((*size, out.shape[-1]), dtype=np.float32)

    def done(self, out: np.ndarray, k: int, values: np.ndarray) -> None:
        """Take a stored slice to where it belongs."""
        if self.shifts is None and self.shares is None:
            return
        if self.shifts is not None:
            values = moved(values, self.shifts[k], out.shape[1:3], self.padding)
        if self.shares is None:
            out[k] = values
            return
        for place, weight in self.shares.get(k, ()):
            if weight == 1:
                out[place] = values
            else:
                out[place] += np.float32(weight) * values


def moved(values: np.ndarray, shift: np.ndarray, size: tuple[int, ...], padding: float) -> np.ndarray:
    """Move a slice [rows, columns, samples] by parts of a pixel, linearly; what lies outside it becomes ``padding``.

    Args:
        values: the slice.
        shift: pixels to the right and down, not negative.
        size: rows and columns of the result.
        padding: what a pixel gets whose center lies beyond the centers of the outermost pixels.

    Example:
        >>> moved(np.float32([[0, 4, 8]])[..., None], np.array([1.25, 0]), (1, 5), -1)[..., 0].tolist()
        [[-1.0, -1.0, 3.0, 7.0, -1.0]]
    """
    out = values
    for axis, by in ((1, float(shift[0])), (0, float(shift[1]))):
        whole = int(np.floor(by + 1e-6))
        part = np.float32(max(by - whole, 0.0) if by - whole > 1e-6 else 0.0)
        out = np.moveaxis(out, axis, 0)
        if part:
            out = (1 - part) * out[1:] + part * out[:-1]
            whole += 1
        wide = np.full((size[axis], *out.shape[1:]), np.float32(padding), dtype=np.float32)
        wide[whole : whole + len(out)] = out
        out = np.moveaxis(wide, 0, axis)
    return out


def _factors(instances: Sequence[Instance], wanted: Sequence[int], pet_units: str) -> dict[int, float]:
    """Return the factors to SUVbw by the number of the instance; none where nothing is to be multiplied."""
    pet = [i for i in wanted if instances[i].modality == "PT" and pet_units == "SUVbw"]
    if not pet:
        return {}
    headers, names = [dataset_of(instances[i]) for i in pet], [str(instances[i].path) for i in pet]
    return dict(zip(pet, suv_factors(headers, names=names), strict=True))


def _pixels(item: Instance, frames: Sequence[int]) -> Iterator[np.ndarray]:
    """Give the stored values of frames, in ascending order; those of a mosaic are its tiles."""
    if not item.tiles:
        yield from decode(item, frames)
        return
    (picture,) = decode(picture_of(item), [0])
    for frame in frames:
        yield tile_of(item, picture, frame)


def _values(item: Instance, frame: int, pixels: np.ndarray, factor: float | None, out: np.ndarray) -> str:
    """Write the values of a frame into ``out`` [rows, columns, samples]; return their unit."""
    if pixels.shape[:2] != out.shape[:2] or pixels.shape[2:] not in ((), out.shape[2:]):
        raise ReadError(f"{item.path}: pixels of {pixels.shape}, expected {item.rows} rows and {item.columns} columns")
    unit = rescale(item, 0 if item.tiles else frame, pixels, out)
    if factor is not None:
        out *= np.float32(factor)
    return unit


def _same_pixels(instances: Sequence[Instance], copy: Slot, original: Slot, factors: dict[int, float]) -> None:
    """Refuse a frame that is called a copy and shows something else."""
    one, other = instances[original[0]], instances[copy[0]]
    if not other.is_image:
        raise ReadError(f"{other.path}: no image")
    found = []
    for i, frame in (original, copy):
        item = instances[i]
        (pixels,) = _pixels(item, [frame])
        values = np.empty((*pixels.shape[:2], item.samples), dtype=np.float32)
        _values(item, frame, pixels, factors.get(i), values)
        found.append(values)
    if np.array_equal(found[0], found[1], equal_nan=True):
        return
    names = f"{one.path.name} and {other.path.name}"
    if one.path.name == other.path.name:
        names = f"{one.path} and {other.path}"
    if one.sop_uid and one.sop_uid == other.sop_uid:
        raise GeometryError(
            f"{place_of(instances)}: two files with one SOPInstanceUID and different pixels ({names}): one of them was "
            "changed; keep the right one"
        )
    raise GeometryError(
        f"{place_of(instances)}: two slices at the same position ({names}) with different pixels, and nothing in their "
        "headers tells volumes apart: keep the right ones"
    )


def _drop_equal(read: _Read, outs: dict[str, np.ndarray]) -> None:
    """Leave out volumes that only InstanceNumber told apart and that hold the same voxels."""
    kept: list[str] = []
    for name in read.names:
        if not any(np.array_equal(outs[name], outs[other], equal_nan=True) for other in kept):
            kept.append(name)
    if len(kept) < len(read.names):
        read.mended.append(f"{len(read.names) - len(kept)} × copy of the whole volume left out")
        read.names = kept


def _volume(
    instances: Sequence[Instance],
    grid: Grid,
    read: _Read,
    name: str,
    voxels: np.ndarray,
    unit: str,
    names: tuple[str, ...],
) -> Volume:
    first = instances[grid.volumes[name][0][0]]
    center, width, function = read.windows.get(name, (nan, nan, "LINEAR"))
    return Volume(
        voxels=voxels.transpose(0, 3, 2, 1),
        affine=grid.affine,
        modality=first.modality,
        units=unit,
        has_geometry=grid.has_geometry,
        problems=grid.notes if len(read.names) == len(grid.volumes) else (),
        mended=(*grid.mended, *read.mended),
        volumes=names,
        window=(center, width),
        window_function=function,
        dicom={
            "study_uid": first.study_uid,
            "series_uid": first.series_uid,
            "frame_of_reference_uid": first.frame_of_reference_uid,
            "patient_hash": hash_patient(first.patient_id),
        },
    )
