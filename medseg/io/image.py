"""One door for every image: `read_image`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GeometryError, MedsegError, ReadError
from .kinds import claimed_kind, kind_by_content, kind_of, read_start
from .volume import Volume

if TYPE_CHECKING:
    from monai.data import MetaTensor

    from .dicom_header import Instance, quiet
    from .series import Series

PathLike = str | os.PathLike[str]


def read_image(
    path: PathLike | Sequence[PathLike], *, pet_units: str = "SUVbw", tilt: str = "correct", gaps: str = "refuse"
) -> "MetaTensor":
    """Read an image of any kind with its geometry.

    Args:
        path: a folder with one DICOM series, a DICOM file, a list of the DICOM files of one series; a NIfTI (``.nii``,
            ``.nii.gz``), MHD/MHA, NRRD or picture file (PNG, JPEG, TIFF, GIF, BMP); or a list of such files on one
            grid, which become channels in that order. The kind is told by content, then by name.
        pet_units: ``"SUVbw"``, or ``"stored"`` for PET values as stored (rescaled).
        tilt: what to do with a DICOM series whose slices shift sideways (gantry tilt). ``"correct"`` resamples each
            slice in its plane, linearly, onto an upright grid that holds every slice (what lies outside is -1024 HU in
            a CT, else 0); ``"keep"`` leaves the voxels as stored and gives a sheared affine; ``"refuse"`` refuses.
        gaps: what to do with missing DICOM slices or gaps that change. ``"refuse"`` refuses; ``"interpolate"`` makes a
            regular grid, linearly between neighboring slices: missing slices are filled in and the others left as they
            are, or, where gaps change, all slices are resampled to the smallest usual gap.

    Returns:
        float32 ``MetaTensor``, channel first, [C, X, Y, Z], or [C, X, Y] for pictures and other flat images, in stored
        voxel order; a DICOM series runs along column, row and slice, slices ascending along their normal. The affine
        takes voxel indices to RAS millimetres. CT is in HU. ``meta`` tells ``modality``, ``units``, ``has_geometry``
        (False for pictures, whose affine is the identity) and, for DICOM, the identity of the study under ``dicom``.
        Several volumes of one DICOM series on one grid (times, echoes, b-values, magnitude and phase) are channels;
        ``meta["volumes"]`` names them, joined by ``"; "``. ``meta["mended"]`` says what was changed: tilt, missing
        slices, copies left out, localizers set apart. ``meta["window"]`` is the display window of the header (center,
        width; NaN where it has none) and ``meta["window_function"]`` its function.

    Raises:
        ReadError: no image, several series in the folder, a damaged file.
        MissingTagError: an attribute that SUVbw needs is absent.
        GeometryError: slices that do not form one regular volume, several stacks, or channels on different grids.

    Example:
        >>> import tempfile
        >>> from medseg.io import write_nifti
        >>> path = Path(tempfile.mkdtemp()) / "image.nii.gz"
        >>> write_nifti((np.ones((4, 5, 6), np.float32), np.diag([2, 2, 3, 1])), path)
        >>> image = read_image(path)
        >>> tuple(image.shape), image.pixdim.tolist()
        ((1, 4, 5, 6), [2.0, 2.0, 3.0])
    """
    volume, name = load(path, pet_units=pet_units, tilt=tilt, gaps=gaps)
    return volume.tensor(name)


def read_series(
    series: "Series | Sequence[PathLike]", *, pet_units: str = "SUVbw", tilt: str = "correct", gaps: str = "refuse"
) -> "MetaTensor":
    """Read a series found by `find_series`, or a list of the DICOM files of one series. See `read_image`.

    Raises:
        ReadError: the series is no image (a structure set), or a file is damaged.
        MissingTagError, GeometryError: as `read_image`.
    """
    files, stack = _files(series)
    volume, name = load(files, pet_units=pet_units, tilt=tilt, gaps=gaps, stack=stack)
    return volume.tensor(name)


def read_volumes(
    source: "Series | PathLike | Sequence[PathLike]",
    *,
    pet_units: str = "SUVbw",
    tilt: str = "correct",
    gaps: str = "refuse",
) -> "dict[str, MetaTensor]":
    """Read each volume of a DICOM series as an image of its own.

    Where `read_image` makes channels of the volumes on one grid, and refuses a series with several stacks or with a
    volume that lacks slices, this gives them all: times, echoes, b-values and stacks of other orientation or size,
    localizers among them. A volume that has not all positions of its series is on the grid of its own slices and says
    so in ``meta["problems"]``.

    Args:
        source: what `read_image` takes, or a `Series`.
        pet_units: as in `read_image`.
        tilt: as in `read_image`.
        gaps: as in `read_image`.

    Returns:
        an image [1, X, Y, Z] (three channels for color) by name: ``"b=50"``, ``"echo 2 (TE 4.92 ms)"``, ``"time 3"``,
        ``"phase image"``, ``"sagittal"``, ``"axial 2, b=50"``; ``""`` for the only one, and for a file that is not
        DICOM.

    Raises:
        ReadError, MissingTagError, GeometryError: as `read_image`.

    Example:
        >>> import tempfile
        >>> from medseg.io import write_nifti
        >>> path = Path(tempfile.mkdtemp()) / "image.nii.gz"
        >>> write_nifti((np.ones((4, 5, 6), np.float32), np.eye(4)), path)
        >>> {name: tuple(image.shape) for name, image in read_volumes(path).items()}
        {'': (1, 4, 5, 6)}
    """
    from .dicom import read_all

    files, stack = _files(source)
    options = {"pet_units": pet_units, "tilt": tilt, "gaps": gaps}
    paths = _paths(files)
    instances = _instances(paths)
    if instances is None:
        volume, name = load(files, **options)
        return {"": volume.tensor(name)}
    with _quiet():
        volumes = read_all(instances, stack=stack, **options)
    return {name: volume.tensor(str(paths[0])) for name, volume in volumes.items()}


def load(
    path: PathLike | Sequence[PathLike],
    *,
    pet_units: str = "SUVbw",
    tilt: str = "correct",
    gaps: str = "refuse",
    stack: str = "",
) -> tuple[Volume, str]:
    """Read what `read_image` reads; return it with the name of the first file or of the folder."""
    paths = _paths(path)
    name = str(paths[0])
    instances = _instances(paths)
    if instances is not None:
        from .dicom import read_volume

        with _quiet():
            return read_volume(instances, pet_units=pet_units, tilt=tilt, gaps=gaps, stack=stack), name
    if len(paths) == 1:
        return _load_file(paths[0]), name
    return _stack(paths, [load(item, pet_units=pet_units, tilt=tilt, gaps=gaps)[0] for item in paths]), name


def _paths(path: PathLike | Sequence[PathLike]) -> list[Path]:
    if isinstance(path, (str, os.PathLike)):
        return [Path(path)]
    paths = [Path(item) for item in path]
    if not paths:
        raise ReadError("an empty list of files: expected at least one image")
    return paths


def _instances(paths: Sequence[Path]) -> "list[Instance] | None":
    """Return the objects of one DICOM series, given its folder or its files; None where it is something else."""
    from .dicom_header import read_instance

    if any(item.is_dir() for item in paths):
        return _of_folder(paths[0]) if len(paths) == 1 else None
    if absent := [item for item in paths if not item.exists()]:
        raise ReadError(f"{absent[0]}: no such file or folder")
    if {kind_of(item) for item in paths} != {"dicom"}:
        return None
    with _quiet():
        instances = [read_instance(item, pixels=True, force=True) for item in paths]
    found = {_series_of(item) for item in instances}
    if len(found) > 1:
        raise ReadError(
            f"{paths[0].parent}: the files belong to {len(found)} DICOM series: expected one; read each by itself"
        )
    return instances


def _series_of(item: "Instance") -> tuple[str, str, str]:
    return item.patient_id, item.study_uid, item.series_uid


def _load_file(path: Path) -> Volume:
    kind = kind_of(path)
    if kind == "nifti":
        from .nifti import read_nifti

        return read_nifti(path)
    if kind == "picture":
        from .picture import read_picture

        return read_picture(path)
    from .itk_formats import read_itk

    return read_itk(path, kind)


def _of_folder(folder: Path) -> "list[Instance]":
    from .dicom_header import DicomIndexError, read_instance
    from .series import walk

    instances, others, damaged = [], 0, []
    with _quiet():
        for path in walk(folder):
            start = read_start(path)
            kind = kind_by_content(start)
            if kind is None and claimed_kind(path) != "dicom":
                continue
            try:
                if kind_of(path, start) != "dicom":
                    others += 1
                    continue
                instances.append(read_instance(path, pixels=True, force=True))
            except DicomIndexError:
                continue
            except MedsegError as error:
                damaged.append(str(error))
    images: dict[tuple[str, str, str], list[Instance]] = {}
    for item in instances:
        if item.is_image:
            images.setdefault(_series_of(item), []).append(item)
    if damaged:
        more = f" (and {len(damaged) - 1} more such files)" if len(damaged) > 1 else ""
        raise ReadError(damaged[0] + more)
    if not images:
        also = f"; it holds {others} image file{'s' if others > 1 else ''} of other kinds: name one" if others else ""
        raise ReadError(f"{folder}: no image in this folder: expected the files of one DICOM series{also}")
    if len(images) > 1:
        listed = "; ".join(
            f"{items[0].modality or '?'} series {items[0].number if items[0].number is not None else '?'} "
            f"{items[0].description[:40]!r} with {len(items)} file{'s' if len(items) > 1 else ''} "
            f"such as {items[0].path.relative_to(folder)}"
            for items in list(images.values())[:6]
        )
        more = f"; and {len(images) - 6} more" if len(images) > 6 else ""
        raise ReadError(
            f"{folder}: {len(images)} DICOM series in one folder: expected one: {listed}{more}; "
            "give the files of one series, or use find_series"
        )
    return next(iter(images.values()))


def _quiet() -> "quiet":
    from .dicom_header import quiet

    return quiet()


def _stack(paths: Sequence[Path], volumes: Sequence[Volume]) -> Volume:
    first = volumes[0]
    for path, volume in zip(paths, volumes, strict=True):
        if volume.voxels.shape[1:] != first.voxels.shape[1:]:
            raise GeometryError(
                f"{path}: a grid of {_times(volume.voxels.shape[1:])}, but {paths[0].name} has "
                f"{_times(first.voxels.shape[1:])}: channels must lie on one grid"
            )
        if not np.allclose(volume.affine, first.affine, atol=1e-3):
            raise GeometryError(
                f"{path}: its affine differs from that of {paths[0].name}: channels must lie on one grid"
            )
    return Volume(
        np.concatenate([volume.voxels for volume in volumes], axis=0),
        first.affine,
        modality=first.modality if len({volume.modality for volume in volumes}) == 1 else "",
        units=first.units if len({volume.units for volume in volumes}) == 1 else "",
        has_geometry=first.has_geometry,
        problems=tuple(dict.fromkeys(problem for volume in volumes for problem in volume.problems)),
        mended=tuple(dict.fromkeys(line for volume in volumes for line in volume.mended)),
        dicom=first.dicom,
    )


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(str(n) for n in shape)


def _files(source: "Series | PathLike | Sequence[PathLike]") -> "tuple[PathLike | Sequence[PathLike], str]":
    from .series import Series

    return (source.files, source.stack) if isinstance(source, Series) else (source, "")
