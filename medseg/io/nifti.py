"""NIfTI-1 and NIfTI-2, plain and gzipped, single files and pairs, in and out."""

import contextlib
import gzip
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from ..errors import GeometryError, ReadError
from .atomic import atomic_path
from .metaimage import DEFLATE_LIMIT
from .text import one_line
from .volume import Volume

if TYPE_CHECKING:
    from monai.data import MetaTensor
    from numpy.typing import ArrayLike, DTypeLike

# Codes of xyzt_units, in millimetres. 0 means unknown, which the world writes for millimetres.
_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_UNITS = {1: "metres", 3: "microns"}
# What is worked on at a time, so that a conversion needs no second volume.
_CHUNK_BYTES = 1 << 20
# nibabel would print what it mends in a header; what matters of it is among the problems here.
_SILENT = logging.Logger("medseg.io.nifti", level=logging.CRITICAL + 1)


def read_nifti_header(path: Path) -> tuple[Any, list[str]]:
    """Read the header of a NIfTI file and check it against the size of the file.

    Returns:
        the nibabel header, and what is odd about it (one line each).

    Raises:
        ReadError: not NIfTI, or the voxels that its header promises are not there, or more than those.
    """
    size = path.stat().st_size
    try:
        with _open(path) as file:
            start = file.read(544)
    except (OSError, EOFError, zlib.error) as error:
        raise ReadError(f"{path}: cut short or damaged: the gzip stream does not decompress") from error
    kind = nib.Nifti2Header if start[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") else nib.Nifti1Header
    try:
        header = kind(start[: kind.sizeof_hdr], check=False)
        zooms = np.array(header["pixdim"][1:4], dtype=np.float64)
        header.check_fix(logger=_SILENT, error_level=40)
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        offset = float(header["vox_offset"])
        if not 0 <= offset < 1 << 62 or offset != int(offset):
            raise ValueError(f"vox_offset is {offset}")
    except (HeaderDataError, WrapStructError, ValueError, KeyError, OverflowError) as error:
        raise ReadError(f"{path}: not a valid NIfTI header: {one_line(error)[:120]}") from error
    if not shape or min(shape) < 1:
        raise ReadError(f"{path}: the NIfTI header gives the shape {shape}: expected at least one voxel")
    if np.isinf(header["scl_slope"]) or np.isinf(header["scl_inter"]):
        raise ReadError(f"{path}: the scale factors scl_slope and scl_inter are infinite: a damaged header")
    data = _voxel_file(path, header)
    needed = _begin(header) + int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
    held = data.stat().st_size
    packed = _is_gzip(data)
    if needed > (held * DEFLATE_LIMIT if packed else held):
        raise ReadError(
            f"{path}: cut short: the header promises {needed:,} bytes (shape {shape}, {dtype}), "
            f"{'the file' if data == path else repr(data.name)} has {size if data == path else held:,}"
            f"{' compressed' if packed else ''}; copy it again from its source"
        )
    if not packed:
        _check_surplus(path, held - needed, shape, dtype)

    problems = []
    units = int(header["xyzt_units"]) & 7
    if units in _UNITS:
        problems.append(f"its unit of length is {_UNITS[units]}: turned into millimetres")
    elif units not in _MILLIMETRES:
        problems.append(f"its unit of length has no meaning (xyzt_units {int(header['xyzt_units'])}): taken as mm")
    sform_code, qform_code = int(header["sform_code"]), int(header["qform_code"])
    if not sform_code:
        odd = ~(zooms[: min(len(shape), 3)] > 0)
        if odd.any():
            listed = ", ".join(f"{n:g}" for n in zooms)
            problems.append(f"a voxel size that is not positive (pixdim {listed}): its absolute value, or 1, is used")
    if sform_code and qform_code:
        with contextlib.suppress(HeaderDataError, ValueError, np.linalg.LinAlgError):
            corners = np.array(np.meshgrid(*[(0, n - 1) for n in (*shape, 1, 1)[:3]])).reshape(3, -1)
            apart = (header.get_sform() - header.get_qform())[:3] @ np.vstack([corners, np.ones(8)])
            distance = float(np.linalg.norm(apart, axis=0).max()) * _MILLIMETRES.get(units, 1.0)
            if not distance <= 0.1:
                problems.append(f"sform and qform disagree by up to {distance:.3g} mm: the sform is used")
    if not sform_code and not qform_code:
        problems.append("neither sform nor qform is coded: position and orientation are unknown")
    return header, problems


def nifti_affine(path: Path, header: Any) -> np.ndarray:
    """Return the 4 × 4 affine in RAS millimetres: the sform where it is coded, else the qform, else the voxel sizes.

    Raises:
        GeometryError: an affine that cannot be inverted.
    """
    try:
        affine = np.array(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError, np.linalg.LinAlgError) as error:
        raise GeometryError(f"{path}: the qform of the header is no rotation: no usable geometry") from error
    affine[:3] *= _MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    with np.errstate(all="ignore"):
        if not np.isfinite(affine).all() or not abs(np.linalg.det(affine[:3, :3])) > 1e-12:
            raise GeometryError(
                f"{path}: the affine of the header cannot be inverted: the image has no usable geometry"
            )
    return affine


def read_nifti(path: Path) -> Volume:
    """Read a NIfTI file, or the pair of an ``.hdr`` and its ``.img``, as channels first, float32, in stored order.

    Times, or the components of a vector, become channels, and so do the colors of RGB24 and RGBA32. ``scl_slope`` and
    ``scl_inter`` are applied in double precision, except to colors; a slope of zero or NaN means none. Metres and
    microns are turned into millimetres.

    The affine is the sform where it is coded, else the qform, else nibabel's fallback (voxel sizes, centered).

    Raises:
        ReadError: not NIfTI, cut short, damaged, or of a kind that is no image (complex values).
        GeometryError: an affine that cannot be inverted.
    """
    header, problems = read_nifti_header(path)
    dtype = header.get_data_dtype()
    if dtype.kind == "c":
        raise ReadError(f"{path}: holds complex values ({dtype}): expected a real image")
    affine = nifti_affine(path, header)
    shape = tuple(int(n) for n in header.get_data_shape())
    further = [n for n in shape[3:] if n > 1]
    if len(shape) < 2 or len(further) > 1 or (dtype.fields and further):
        what = "a color image" if dtype.fields else "an image"
        raise ReadError(f"{path}: {what} of shape {shape}: expected 2 or 3 axes and at most one more, times or vector")
    try:
        stored = _stored(path, header, shape)
    except (EOFError, zlib.error, OSError) as error:
        raise ReadError(f"{path}: cut short or damaged: its voxels cannot be read ({type(error).__name__})") from error
    if dtype.fields:
        voxels = np.stack([stored[name] for name in dtype.names], axis=0).astype(np.float32)
        return Volume(voxels.reshape(-1, *shape[:3]), affine, problems=tuple(problems))
    voxels, rounded = _scaled(path, header, stored)
    if rounded:
        problems.append("values above 16,777,216 are rounded: float32 holds no larger whole numbers exactly")
    voxels = voxels.reshape(*shape[:3], *further, order="F")
    voxels = np.moveaxis(voxels, -1, 0) if further else voxels[None]
    return Volume(voxels, affine, problems=tuple(problems))


def _stored(path: Path, header: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Read the voxels as they are stored; check the sum at the end of a gzip stream."""
    data, begin, dtype = _voxel_file(path, header), _begin(header), header.get_data_dtype()
    size = int(np.prod(shape)) * dtype.itemsize
    packed = _is_gzip(data)
    if packed and (voxels := _unpacked(data, begin, size, shape[0] * dtype.itemsize)) is not None:
        return voxels.view(dtype).reshape(shape, order="F")
    voxels = np.empty(size, dtype=np.uint8)
    with _open(data) as file:
        file.seek(begin)
        read = 0
        while read < size:
            count = file.readinto(voxels[read : read + _CHUNK_BYTES].data)
            if not count:
                raise EOFError
            read += count
        if packed:
            _check_surplus(path, len(file.read(1 << 20)), shape, dtype)
    return voxels.view(dtype).reshape(shape, order="F")


def _unpacked(path: Path, begin: int, size: int, surplus: int) -> np.ndarray | None:
    """Return the ``size`` bytes after the first ``begin`` of a sound gzip file of one member, None for any other file.

    libdeflate unpacks in half the time of zlib, but in one piece, and does not tell where a member ends.
    """
    import imagecodecs

    packed = path.read_bytes()
    # The first voxel lies where numbers of any type may lie.
    buffer = np.empty(-begin % 16 + begin + size + surplus - 1, dtype=np.uint8)[-begin % 16 :]
    try:
        found = len(imagecodecs.gzip_decode(packed, out=buffer.data))
    except imagecodecs.GzipError:  # damaged, or longer than promised
        return None
    # A member ends in its length: where these bytes stand nowhere but at the end of the file, the member ends there.
    end = (found & 0xFFFFFFFF).to_bytes(4, "little")
    if found < begin + size or packed.find(end) != len(packed) - 4:
        return None
    return buffer[begin : begin + size]


def _scaled(path: Path, header: Any, stored: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return the values as float32, and whether whole numbers were rounded; the scale is applied chunk by chunk."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    scaled = np.isfinite(slope) and slope != 0 and (slope, inter) != (1, 0)
    if scaled and not np.isfinite(inter):
        raise ReadError(f"{path}: scl_slope is {slope:g}, but scl_inter is no number: its values are unknown")
    if stored.dtype == np.float32 and stored.dtype.isnative and not scaled:
        return stored, False
    flat = stored.reshape(-1, order="F")
    out = np.empty(flat.shape, dtype=np.float32)
    wide = stored.dtype.kind in "iu" and stored.dtype.itemsize > 2
    step = _CHUNK_BYTES // 8
    rounded = False
    try:
        with np.errstate(over="raise", invalid="ignore"):
            for at in range(0, len(flat), step):
                part = flat[at : at + step]
                if wide and not rounded:
                    rounded = bool(int(part.max()) > 1 << 24 or int(part.min()) < -(1 << 24))
                out[at : at + step] = part.astype(np.float64) * slope + inter if scaled else part
    except FloatingPointError as error:
        raise ReadError(f"{path}: values that float32 cannot hold: a damaged file, or not an image") from error
    return out, rounded


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
            Values are rounded to the nearest whole number where this is an integer.

    Raises:
        GeometryError: the array has another number of axes or no voxel, the affine is not a finite 4 × 4 matrix, or
            lazy transforms are pending.
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
        if image.pending_operations:
            raise GeometryError(f"{path}: the image has pending lazy transforms: apply them first (apply_pending)")
        array, affine = image.detach().cpu().numpy(), image.affine.detach().cpu().numpy().astype(np.float64)
        if array.ndim == 3:
            array = array[..., None]
    if array.ndim != 4:
        raise GeometryError(f"{path}: an image of shape {array.shape} cannot be written: expected channel, X, Y, Z")
    if not 1 <= min(array.shape) <= max(array.shape) <= 32767:
        raise GeometryError(f"{path}: an image of shape {array.shape} cannot be written: NIfTI-1 counts 1 to 32,767")
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise GeometryError(f"{path}: the affine is not a finite 4 × 4 matrix")

    header = nib.Nifti1Header()
    stored_as = _stored_type(array.dtype if dtype is None else np.dtype(dtype))
    try:
        header.set_data_dtype(stored_as)
    except HeaderDataError as error:
        raise ValueError(f"{path}: NIfTI stores no {stored_as}") from error
    header.set_data_shape(array.shape[1:] if array.shape[0] == 1 else (*array.shape[1:], array.shape[0]))
    header.set_zooms((*np.linalg.norm(affine[:3, :3], axis=0), 1)[: len(header.get_data_shape())])
    header.set_xyzt_units("mm")
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1, strip_shears=True)
    if not np.allclose(header.get_qform(), affine, atol=1e-3):
        header.set_qform(None, code=0)
    header["magic"], header["vox_offset"] = header.single_magic, header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = 1, 0
    start = header.binaryblock + b"\0" * 4
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        if path.name.endswith(".gz"):
            import imagecodecs  # its libdeflate packs three times as fast as zlib, but in one piece

            whole = bytearray(len(start) + array.size * stored_as.itemsize)
            whole[: len(start)] = start
            target, at = np.frombuffer(whole, dtype=np.uint8), len(start)
            for part in _slabs(array):
                stored = _as_stored(part, stored_as, path).reshape(-1, order="F").view(np.uint8)
                target[at : at + stored.size] = stored
                at += stored.size
            file.write(imagecodecs.gzip_encode(whole, level=1))
        else:
            file.write(start)
            for part in _slabs(array):
                file.write(_as_stored(part, stored_as, path).reshape(-1, order="F").data)


def _slabs(array: np.ndarray) -> Iterator[np.ndarray]:
    """Give the voxels of [C, X, Y, Z] in the order of NIfTI, a few slices [X, Y, slices] at a time, X fastest."""
    step = max(1, _CHUNK_BYTES // max(1, array.itemsize * array.shape[1] * array.shape[2]))
    for channel in array:
        for at in range(0, channel.shape[2], step):
            yield np.asfortranarray(channel[..., at : at + step])


def _stored_type(dtype: np.dtype) -> np.dtype:
    """Return the type that NIfTI stores for one that it, or some of its readers, lack."""
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype in (np.int64, np.uint64):
        return np.dtype(np.int32)
    return np.dtype(np.float32) if dtype == np.float16 else dtype.newbyteorder("<")


def _as_stored(part: np.ndarray, dtype: np.dtype, path: Path) -> np.ndarray:
    if dtype.kind in "iu" and part.dtype.kind in "iuf" and not np.can_cast(part.dtype, dtype, "safe") and part.size:
        low, high = part.min(), part.max()
        limits = np.iinfo(dtype)
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(f"{path}: NaN or infinite voxels cannot be stored as {dtype}")
        if part.dtype.kind == "f":
            part, low, high = np.rint(part), np.rint(low), np.rint(high)
        if low < limits.min or high > limits.max:
            raise ValueError(f"{path}: voxels from {low} to {high} do not fit {dtype}")
    try:
        with np.errstate(over="raise"):
            return part.astype(dtype, order="F", copy=False)
    except FloatingPointError as error:
        raise ValueError(f"{path}: voxels do not fit {dtype}") from error


def _check_surplus(path: Path, surplus: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuse a file that goes on for a row or more behind its voxels: its dimensions or its type are doubtful."""
    if surplus >= shape[0] * dtype.itemsize:
        raise ReadError(
            f"{path}: it holds at least {surplus:,} bytes more than the header promises (shape {shape}, {dtype}): "
            "which of the two is right is unknown; export it again from its source"
        )


def _begin(header: Any) -> int:
    """Return the place of the first voxel in the file that holds them."""
    return int(header["vox_offset"]) or (int(header.single_vox_offset) if _is_single(header) else 0)


def _is_single(header: Any) -> bool:
    """Whether header and voxels share one file (a pair .hdr/.img does not)."""
    return bytes(header["magic"]).startswith(b"n+")


def _voxel_file(path: Path, header: Any) -> Path:
    if _is_single(header):
        return path
    stem = path.name[: -len(".hdr.gz")] if path.name.lower().endswith(".hdr.gz") else path.stem
    for name in (f"{stem}.img", f"{stem}.IMG", f"{stem}.img.gz"):
        if path.with_name(name).is_file():
            return path.with_name(name)
    raise ReadError(f"{path}: the header of a pair, but {stem + '.img'!r} with its voxels is absent; put it beside")


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if _is_gzip(path) else path.open("rb")
