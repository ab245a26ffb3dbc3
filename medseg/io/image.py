"""One door for every image: `read_image`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GeometryError, ReadError
from .kinds import claimed_kind, kind_by_content, kind_of, read_start
from .volume import Volume

if TYPE_CHECKING:
    from monai.data import MetaTensor

    from .series import Series

PathLike = str | os.PathLike[str]


def read_image(path: PathLike | Sequence[PathLike], *, pet_units: str = "SUVbw") -> "MetaTensor":
    """Read an image of any kind with its geometry.

    Args:
        path: a folder with one DICOM series, a DICOM file, a list of the DICOM files of one series; a NIfTI (``.nii``,
            ``.nii.gz``), MHD/MHA, NRRD or picture file (PNG, JPEG, TIFF, GIF, BMP); or a list of such files on one
            grid, which become channels in that order. The kind is told by content, then by name.
        pet_units: ``"SUVbw"``, or ``"stored"`` for PET values as stored (rescaled).

    Returns:
        float32 ``MetaTensor``, channel first, [C, X, Y, Z], or [C, X, Y] for pictures and other flat images, in stored
        voxel order; a DICOM series runs along column, row and slice, slices ascending along their normal. The affine
        takes voxel indices to RAS millimetres. CT is in HU. ``meta`` tells ``modality``, ``units``, ``has_geometry``
        (False for pictures, whose affine is the identity) and, for DICOM, the identity of the study under ``dicom``.

    Raises:
        ReadError: no image, several series in the folder, a damaged file.
        MissingTagError: an attribute that SUVbw needs is absent.
        GeometryError: slices that do not form one regular volume, or channels on different grids.

    Example:
        >>> import tempfile
        >>> from medseg.io import write_nifti
        >>> path = Path(tempfile.mkdtemp()) / "image.nii.gz"
        >>> write_nifti((np.ones((4, 5, 6), np.float32), np.diag([2, 2, 3, 1])), path)
        >>> image = read_image(path)
        >>> tuple(image.shape), image.pixdim.tolist()
        ((1, 4, 5, 6), [2.0, 2.0, 3.0])
    """
    volume, name = load(path, pet_units=pet_units)
    return volume.tensor(name)


def read_series(series: "Series | Sequence[PathLike]", *, pet_units: str = "SUVbw") -> "MetaTensor":
    """Read a series found by `find_series`, or a list of the DICOM files of one series. See `read_image`.

    Raises:
        ReadError: the series is no image (a structure set), or a file is damaged.
        MissingTagError, GeometryError: as `read_image`.
    """
    return read_image(_files(series), pet_units=pet_units)


def load(path: PathLike | Sequence[PathLike], *, pet_units: str = "SUVbw") -> tuple[Volume, str]:
    """Read what `read_image` reads; return it with the name of the first file or of the folder."""
    if isinstance(path, (str, os.PathLike)):
        paths = [Path(path)]
    else:
        paths = [Path(item) for item in path]
        if not paths:
            raise ReadError("an empty list of files: expected at least one image")
    name = str(paths[0])
    if len(paths) == 1:
        return _load_one(paths[0], pet_units), name
    if any(item.is_dir() for item in paths):
        return _stack(paths, [_load_one(item, pet_units) for item in paths]), name
    starts = [read_start(item) for item in paths]
    kinds = [kind_of(item, start) for item, start in zip(paths, starts, strict=True)]
    if set(kinds) == {"dicom"}:
        return _load_dicom(paths, pet_units), name
    return _stack(paths, [_load_one(item, pet_units) for item in paths]), name


def _load_one(path: Path, pet_units: str) -> Volume:
    if path.is_dir():
        return _load_folder(path, pet_units)
    if not path.exists():
        raise ReadError(f"{path}: no such file or folder")
    kind = kind_of(path)
    if kind == "dicom":
        return _load_dicom([path], pet_units)
    if kind == "nifti":
        from .nifti import read_nifti

        return read_nifti(path)
    if kind == "picture":
        from .picture import read_picture

        return read_picture(path)
    from .itk_formats import read_itk

    return read_itk(path, kind)


def _load_dicom(paths: Sequence[Path], pet_units: str) -> Volume:
    from .dicom import read_volume
    from .dicom_header import quiet, read_instance

    with quiet():
        instances = [read_instance(item, pixels=True, force=True) for item in paths]
        uids = {item.series_uid for item in instances}
        if len(uids) > 1:
            raise ReadError(
                f"{paths[0].parent}: the files belong to {len(uids)} DICOM series: expected one; read each by itself"
            )
        return read_volume(instances, pet_units=pet_units)


def _load_folder(folder: Path, pet_units: str) -> Volume:
    from .dicom import read_volume
    from .dicom_header import DicomIndexError, quiet, read_instance
    from .series import walk

    with quiet():
        instances, others, damaged = [], 0, []
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
            except ReadError as error:
                damaged.append(str(error))
        images: dict[str, list] = {}
        for item in instances:
            if item.is_image:
                images.setdefault(item.series_uid, []).append(item)
        if damaged:
            more = f" (and {len(damaged) - 1} more such files)" if len(damaged) > 1 else ""
            raise ReadError(damaged[0] + more)
        if not images:
            also = (
                f"; it holds {others} image file{'s' if others > 1 else ''} of other kinds: name one" if others else ""
            )
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
        return read_volume(next(iter(images.values())), pet_units=pet_units)


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
        dicom=first.dicom,
    )


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(str(n) for n in shape)


def _files(series: "Series | Sequence[PathLike]") -> Sequence[PathLike]:
    from .series import Series

    return series.files if isinstance(series, Series) else series
