"""MetaImage (MHD/MHA, with RAW or ZRAW) and NRRD, through SimpleITK."""

import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ..errors import GeometryError, ReadError
from .text import one_line
from .volume import Volume

_DEFLATE_LIMIT = 1040
_META_BYTES = {
    "MET_CHAR": 1,
    "MET_UCHAR": 1,
    "MET_SHORT": 2,
    "MET_USHORT": 2,
    "MET_INT": 4,
    "MET_UINT": 4,
    "MET_LONG": 4,
    "MET_ULONG": 4,
    "MET_LONG_LONG": 8,
    "MET_ULONG_LONG": 8,
    "MET_FLOAT": 4,
    "MET_DOUBLE": 8,
}
_NRRD_BYTES = {"char": 1, "short": 2, "int": 4, "long long": 8, "float": 4, "double": 8}


@dataclass(frozen=True, eq=False)
class ItkHeader:
    """Size and geometry of an image, without its voxels."""

    shape: tuple[int, ...]
    channels: int
    affine: np.ndarray


def read_itk_header(path: Path, kind: str) -> ItkHeader:
    """Read the header of an MHD, MHA or NRRD file and check that the voxels it promises are there.

    Raises:
        ReadError: a header that cannot be parsed, voxels in a file that is absent, too small, or a git-LFS pointer.
        GeometryError: axes that do not span space.
    """
    (_check_meta if kind == "mhd" else _check_nrrd)(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("MetaImageIO" if kind == "mhd" else "NrrdImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ReadError(f"{path}: its header cannot be read: {_reason(error)}") from error
    size: tuple[int, ...] = tuple(int(n) for n in reader.GetSize())
    affine = _affine(path, reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())
    channels = int(reader.GetNumberOfComponents())
    return ItkHeader(size[:3], channels * int(np.prod(size[3:])), affine)


def read_itk(path: Path, kind: str) -> Volume:
    """Read an MHD, MHA or NRRD file as channels first, float32, with its affine in RAS.

    A fourth axis (time) and vector components become channels.

    Raises:
        ReadError: see `read_itk_header`; or voxels that cannot be read.
        GeometryError: axes that do not span space.
    """
    header = read_itk_header(path, kind)
    (_check_meta if kind == "mhd" else _check_nrrd)(path, voxels=True)
    try:
        image = sitk.ReadImage(str(path), imageIO="MetaImageIO" if kind == "mhd" else "NrrdImageIO")
    except RuntimeError as error:
        raise ReadError(f"{path}: its voxels cannot be read: {_reason(error)}") from error
    if "complex" in image.GetPixelIDTypeAsString():
        raise ReadError(f"{path}: holds complex values: expected a real image")
    array = sitk.GetArrayViewFromImage(image)
    dimension = image.GetDimension()
    axes = tuple(range(dimension - 1, -1, -1))
    voxels = array.transpose(*axes, *range(dimension, array.ndim)).astype(np.float32)
    if dimension == 4:
        voxels = voxels.reshape(*voxels.shape[:3], -1)
        dimension = 3
    voxels = np.moveaxis(voxels, -1, 0) if voxels.ndim > dimension else voxels[None]
    return Volume(voxels, header.affine)


def _affine(path: Path, spacing: tuple, origin: tuple, direction: tuple) -> np.ndarray:
    """Turn ITK's LPS geometry of 2, 3 or 4 axes into a 4 × 4 RAS affine."""
    count = len(spacing)
    if count not in (2, 3, 4):
        raise ReadError(f"{path}: an image of {count} axes: expected 2 to 4")
    axes = min(count, 3)
    matrix = np.eye(4)
    matrix[:axes, :axes] = (np.array(direction).reshape(count, count) * np.array(spacing))[:axes, :axes]
    matrix[:axes, 3] = origin[:axes]
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:3, :3])) < 1e-12:
        raise GeometryError(f"{path}: its axes do not span space: the direction or spacing is not usable")
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix


def _check_meta(path: Path, *, voxels: bool = False) -> None:
    with path.open("rb") as file:
        start = file.read(1 << 16)
    keys: dict[str, str] = {}
    offset = 0
    for line in start.splitlines(keepends=True):
        offset += len(line)
        key, _, value = line.decode("latin-1").partition("=")
        keys[key.strip()] = value.strip()
        if key.strip() == "ElementDataFile":
            break
    missing = [key for key in ("DimSize", "ElementType", "ElementDataFile") if not keys.get(key)]
    if missing:
        raise ReadError(f"{path}: its header has no {missing[0]}: not a complete MetaImage")
    try:
        size = [int(n) for n in keys["DimSize"].split()]
        channels = int(keys.get("ElementNumberOfChannels", "1"))
    except ValueError as error:
        raise ReadError(f"{path}: DimSize or ElementNumberOfChannels is not a whole number") from error
    if not size or min(size) < 1 or channels < 1 or keys.get("NDims", str(len(size))) != str(len(size)):
        found = one_line(f"DimSize is {keys['DimSize'][:40]}, NDims {keys.get('NDims', '')[:40]}")
        raise ReadError(f"{path}: {found}: they do not fit together")
    if keys["ElementType"] not in _META_BYTES:
        raise ReadError(
            f"{path}: ElementType is {one_line(keys['ElementType'])[:40]}: expected one of {', '.join(_META_BYTES)}"
        )
    needed = int(np.prod([*size, channels, _META_BYTES[keys["ElementType"]]], dtype=object))
    compressed = keys.get("CompressedData", "False").lower() == "true"
    least = needed // _DEFLATE_LIMIT if compressed else needed
    source = keys["ElementDataFile"]
    if source == "LOCAL":
        data = path
        _check_size(path, path, least + offset, "")
    elif source.startswith("LIST") or "%" in source:
        raise ReadError(f"{path}: ElementDataFile is a list of files: expected one file")
    else:
        data, offset = _inside(path, source), 0
        _check_size(path, data, least, "ElementDataFile ")
    if compressed and voxels:
        _check_stream(path, data, offset, needed)


def _check_stream(path: Path, data: Path, offset: int, needed: int) -> None:
    """Inflate compressed voxels once and check their sum, for ITK takes a damaged stream without a word."""
    stream, length = zlib.decompressobj(wbits=47), 0  # zlib or gzip, as its head says
    try:
        with data.open("rb") as file:
            file.seek(offset)
            while length <= needed and not stream.eof and (chunk := file.read(1 << 20)):
                while chunk and length <= needed:
                    length += len(stream.decompress(chunk, 1 << 24))
                    chunk = stream.unconsumed_tail
    except zlib.error as error:
        raise ReadError(
            f"{path}: the compressed voxels are damaged; copy {data.name!r} again from its source"
        ) from error
    if length != needed or not stream.eof:
        raise ReadError(
            f"{path}: the compressed voxels are cut short or damaged ({length:,} of {needed:,} bytes); "
            f"copy {data.name!r} again from its source"
        )


def _check_nrrd(path: Path, *, voxels: bool = False) -> None:
    with path.open("rb") as file:
        start = file.read(1 << 16)
    ends = [place + len(mark) for mark in (b"\n\n", b"\r\n\r\n") if (place := start.find(mark)) >= 0]
    end = min(ends, default=len(start))
    keys: dict[str, str] = {}
    for line in start[:end].decode("latin-1").splitlines():
        key, _, value = line.partition(":")
        keys[key.strip().lower().replace(" ", "")] = value.strip()
    try:
        size = [int(n) for n in keys["sizes"].split()]
    except (KeyError, ValueError) as error:
        raise ReadError(f"{path}: its header has no usable `sizes`: not a complete NRRD") from error
    if not size or min(size) < 1:
        raise ReadError(f"{path}: sizes is {one_line(keys['sizes'])[:40]}: expected whole numbers above zero")
    kind = re.sub(r"^(unsigned|signed) ", "", keys.get("type", ""))
    kind = re.sub(r"^u?int(\d+)(_t)?$", r"\1", kind)
    width = {"8": 1, "16": 2, "32": 4, "64": 8, "uchar": 1, "ushort": 2, "uint": 4, **_NRRD_BYTES}.get(
        re.sub(r" int$", "", kind) if kind != "int" else kind, 1
    )
    full = needed = int(np.prod([*size, width], dtype=object))
    if keys.get("encoding", "raw") not in ("raw", "txt", "text", "ascii"):
        needed //= _DEFLATE_LIMIT * 4  # bzip2 shrinks constant images further than deflate
    elif keys.get("encoding") != "raw":
        needed //= width
    source = keys.get("datafile")
    if source is None:
        data = path
        _check_size(path, path, needed + end, "")
    elif source.startswith("LIST") or "%" in source:
        raise ReadError(f"{path}: `data file` is a list of files: expected one file")
    else:
        data, end = _inside(path, source), 0
        _check_size(path, data, needed, "data file ")
    if voxels and keys.get("encoding") in ("gzip", "gz") and not {"lineskip", "byteskip"} & keys.keys():
        _check_stream(path, data, end, full)


def _inside(path: Path, source: str) -> Path:
    """Return the file of the voxels, which must lie beside the header or below: a header may not reach elsewhere."""
    if Path(source).is_absolute() or ".." in Path(source).parts:
        raise ReadError(
            f"{path}: its voxels are said to be in {Path(source).name!r} in another folder: expected beside it"
        )
    return path.parent / source


def _check_size(path: Path, data: Path, needed: int, role: str) -> None:
    if not data.is_file():
        raise ReadError(f"{path}: {role}{data.name!r} is absent: the voxels are not there; put it beside the header")
    size = data.stat().st_size
    with data.open("rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise ReadError(
                f"{path}: {role}{data.name!r} is a git-LFS pointer; fetch the file itself with `git lfs pull`"
            )
    if size < needed:
        raise ReadError(
            f"{path}: {role}{data.name!r} is too small: {size:,} bytes, the header promises at least {needed:,}; "
            "copy it again from its source"
        )


def _reason(error: RuntimeError) -> str:
    """Return the last line of ITK's message, which says what happened; the rest says where in ITK."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(lines[-1])[:160] if lines else "unknown reason"
