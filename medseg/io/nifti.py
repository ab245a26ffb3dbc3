"""NIfTI-1 and NIfTI-2, plain and gzipped, in and out."""

import gzip
import io
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from ..errors import GeometryError, ReadError
from .atomic import atomic_path
from .text import one_line
from .volume import Volume

if TYPE_CHECKING:
    from monai.data import MetaTensor
    from numpy.typing import ArrayLike, DTypeLike

# Deflate cannot shrink zeros further than 1032 to 1, so a header that promises more is forged or the file is cut.
_DEFLATE_LIMIT = 1040


def read_nifti_header(path: Path) -> tuple[Any, list[str]]:
    """Read the header of a NIfTI file and check it against the size of the file.

    Returns:
        the nibabel header, and what is odd about it (one line each).

    Raises:
        ReadError: not NIfTI, or the file is too short for the image that its header promises.
    """
    size = path.stat().st_size
    try:
        with _open(path) as file:
            start = file.read(544)
    except (OSError, EOFError, zlib.error) as error:
        raise ReadError(f"{path}: cut short or damaged: the gzip stream does not decompress") from error
    kind = nib.Nifti2Header if start[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") else nib.Nifti1Header
    try:
        header = kind(start[: kind.sizeof_hdr], check=True)
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
    except (HeaderDataError, WrapStructError, ValueError, KeyError, OverflowError) as error:
        raise ReadError(f"{path}: not a valid NIfTI header: {one_line(error)[:120]}") from error
    if not shape or min(shape) < 1:
        raise ReadError(f"{path}: the NIfTI header gives the shape {shape}: expected at least one voxel")
    needed = int(header["vox_offset"]) + int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
    if needed > (size * _DEFLATE_LIMIT if _is_gzip(path) else size) and _is_single(header):
        raise ReadError(
            f"{path}: cut short: the header promises {needed:,} bytes (shape {shape}, {dtype}), the file has {size:,}"
            f"{' compressed' if _is_gzip(path) else ''}; copy it again from its source"
        )
    problems = []
    sform, sform_code = header.get_sform(coded=True)
    try:
        qform, qform_code = header.get_qform(coded=True)
    except (HeaderDataError, ValueError, np.linalg.LinAlgError):
        qform, qform_code = None, 0
    if sform_code and qform_code and not np.allclose(sform, qform, atol=1e-2):
        distance = float(np.abs(sform - qform).max())
        problems.append(f"sform and qform disagree by up to {distance:.3g} mm: the sform is used")
    if not sform_code and not qform_code:
        problems.append("neither sform nor qform is coded: position and orientation are unknown")
    return header, problems


def read_nifti(path: Path) -> Volume:
    """Read a NIfTI file as channels first, float32, in stored voxel order.

    The affine is the sform where it is coded, else the qform, else nibabel's fallback (voxel sizes, centered).

    Raises:
        ReadError: not NIfTI, cut short, damaged, or of a kind that is no image (complex values).
        GeometryError: an affine that cannot be inverted.
    """
    header, problems = read_nifti_header(path)
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    if not _is_single(header):
        raise ReadError(f"{path}: one half of a pair .hdr/.img: expected a single .nii or .nii.gz")
    dtype = header.get_data_dtype()
    if dtype.kind == "c":
        raise ReadError(f"{path}: holds complex values ({dtype}): expected a real image")
    image: Any
    try:
        if _is_gzip(path):
            # One pass that also checks the CRC at the end, and never reads more than the header promises.
            needed = int(header["vox_offset"]) + int(np.prod(header.get_data_shape())) * dtype.itemsize
            with gzip.open(path, "rb") as file:
                content = file.read(needed)
                file.read(1 << 20)
            if len(content) < needed:
                raise EOFError
            image = image_class.from_bytes(content)
        else:
            image = image_class.from_filename(path)
        if dtype.fields:  # RGB24 and RGBA32
            colors = np.asanyarray(image.dataobj)
            voxels = np.stack([colors[name] for name in dtype.names], axis=0).astype(np.float32)
            voxels = voxels.reshape(voxels.shape[0], *_spatial(colors.shape, path))
        else:
            voxels = np.asanyarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
            voxels = _channels_first(voxels, path)
        affine = np.asarray(image.affine, dtype=np.float64)
    except (EOFError, zlib.error, OSError, ImageFileError, HeaderDataError, WrapStructError, ValueError) as error:
        raise ReadError(f"{path}: cut short or damaged: its voxels cannot be read ({type(error).__name__})") from error
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise GeometryError(f"{path}: the affine of the header cannot be inverted: the image has no usable geometry")
    return Volume(voxels, affine, problems=tuple(problems))


def write_nifti(
    image: "MetaTensor | tuple[ArrayLike, ArrayLike]", path: str | os.PathLike[str], dtype: "DTypeLike | None" = None
) -> None:
    """Write an image as NIfTI-1, whole or not at all, byte for byte the same for the same image.

    The sform and the qform hold the affine (RAS, millimetres) with code 1; an affine with shear, which a qform cannot
    hold, gets the sform alone. A name ending in ``.gz`` is compressed at level 1 with no name and no time inside.

    Args:
        image: a ``MetaTensor``, channel first: [C, X, Y, Z] or [C, X, Y]; or a pair (array, affine) where the array is
            [X, Y, Z] or [C, X, Y, Z]. One channel is written as X×Y×Z, several as X×Y×Z×C; a flat image gets Z = 1.
        path: where to write, ending in ``.nii`` or ``.nii.gz``.
        dtype: type of the stored voxels; by default that of the array (``bool`` becomes uint8, 64-bit integers int32).

    Raises:
        GeometryError: the array has another number of axes, or the affine is not a finite 4 × 4 matrix.
        ValueError: voxels that do not fit ``dtype``, or a name that is not NIfTI's.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "zeros.nii.gz"
        >>> write_nifti((np.zeros((4, 5, 6), np.uint8), np.diag([1, 1, 3, 1])), path)
        >>> nib.load(path).shape
        (4, 5, 6)
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: a NIfTI file is named .nii or .nii.gz")
    if isinstance(image, tuple):
        array, affine = np.asarray(image[0]), np.asarray(image[1], dtype=np.float64)
        if array.ndim == 3:
            array = array[None]
    else:
        array, affine = image.detach().cpu().numpy(), image.affine.detach().cpu().numpy().astype(np.float64)
        if array.ndim == 3:
            array = array[..., None]
    if array.ndim != 4:
        raise GeometryError(f"{path}: an image of shape {array.shape} cannot be written: expected channel, X, Y, Z")
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise GeometryError(f"{path}: the affine is not a finite 4 × 4 matrix")
    array = array[0] if array.shape[0] == 1 else np.moveaxis(array, 0, -1)
    array = _as_stored(array, np.dtype(dtype) if dtype is not None else None, path)

    nifti = nib.Nifti1Image(array, affine)
    nifti.header.set_xyzt_units("mm")
    nifti.set_sform(affine, code=1)
    nifti.set_qform(affine, code=1, strip_shears=True)
    if not np.allclose(nifti.get_qform(), affine, atol=1e-3):
        nifti.set_qform(None, code=0)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        if path.name.endswith(".gz"):
            with gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as stream:
                stream.write(nifti.to_bytes())
        else:
            file.write(nifti.to_bytes())


def _as_stored(array: np.ndarray, dtype: np.dtype | None, path: Path) -> np.ndarray:
    if dtype is None:
        dtype = array.dtype
        if dtype.kind == "b":
            dtype = np.dtype(np.uint8)
        elif dtype in (np.int64, np.uint64):
            dtype = np.dtype(np.int32)
        elif dtype == np.float16:
            dtype = np.dtype(np.float32)
    if dtype.kind in "iu" and array.dtype != dtype and array.size:
        if array.dtype.kind == "f":
            if not np.isfinite(array).all():
                raise ValueError(f"{path}: NaN or infinite voxels cannot be stored as {dtype}")
            array = np.rint(array)
        low, high = array.min(), array.max()
        limits = np.iinfo(dtype)
        if low < limits.min or high > limits.max:
            raise ValueError(f"{path}: voxels from {low} to {high} do not fit {dtype}")
    return array.astype(dtype, copy=False)


def _channels_first(voxels: np.ndarray, path: Path) -> np.ndarray:
    """Bring NIfTI's x, y, z, t, vector to channel, x, y, z: times or vector components become channels."""
    if voxels.ndim > 4 and voxels.shape[3] == 1 and voxels.ndim == 5:
        voxels = voxels[:, :, :, 0, :]
    if voxels.ndim <= 3:
        return voxels[None]
    if voxels.ndim == 4:
        return np.moveaxis(voxels, -1, 0)
    raise ReadError(f"{path}: an image of shape {voxels.shape}: expected 2 to 4 axes, or 5 with a single time")


def _spatial(shape: tuple[int, ...], path: Path) -> tuple[int, ...]:
    if len(shape) > 3 and any(n != 1 for n in shape[3:]):
        raise ReadError(f"{path}: a color image of shape {shape}: expected at most three axes")
    return shape[:3]


def _is_single(header: Any) -> bool:
    """Whether header and voxels share one file (a pair .hdr/.img does not)."""
    return bytes(header["magic"]).startswith(b"n+")


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if _is_gzip(path) else path.open("rb")
