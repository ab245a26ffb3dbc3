"""MetaImage (MHD/MHA, with RAW or ZRAW): text header and plain voxels, after ITK's description of the format.

It is read here and not by ITK, whose reader gives arbitrary voxels where CompressedDataSize is too small, and prints.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import GeometryError, ReadError
from .text import one_line
from .volume import Volume

# Deflate cannot shrink zeros further than 1032 to 1: a header that promises more is forged, or the file is cut.
DEFLATE_LIMIT = 1040
_HEADER_BYTES = 1 << 20
_CHUNK = 1 << 22
_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
# Keys with several names. ElementSize is meant to be the size of a voxel, where ElementSpacing is the step to the next.
_SPACING = ("ElementSpacing", "ElementSize")
_ORIGIN = ("Offset", "Position", "Origin")
_AXES = ("TransformMatrix", "Rotation", "Orientation")
_ORDER = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
_KNOWN = (*_SPACING, *_ORIGIN, *_AXES, *_ORDER, "CompressedData", "HeaderSize", "ElementNumberOfChannels", "BinaryData")


@dataclass(frozen=True, eq=False)
class MetaHeader:
    """What the header of a MetaImage says, checked.

    Attributes:
        size: voxels along every axis, the fastest first.
        channels: components of a voxel.
        dtype: the stored type, in its byte order.
        affine: 4 × 4, voxel index to RAS millimetres.
        files: the file of the voxels; several where each holds one slice.
        offset: where the voxels begin in each file; -1 counts from its end.
        compressed: the voxels are one zlib or gzip stream.
        text: the voxels are written as text.
        problems: what a careful reader should know.
    """

    size: tuple[int, ...]
    channels: int
    dtype: np.dtype
    affine: np.ndarray
    files: tuple[Path, ...]
    offset: int
    compressed: bool
    text: bool
    problems: tuple[str, ...]

    @property
    def count(self) -> int:
        """The number of values."""
        return int(np.prod([*self.size, self.channels], dtype=object))


def read_meta_header(path: Path) -> MetaHeader:
    """Read the header of an MHD or MHA file and check that the voxels it promises are there.

    Raises:
        ReadError: a header that is incomplete or contradicts itself; voxels in a file that is absent, too small, larger
            by a row or more, elsewhere, or a git-LFS pointer.
        GeometryError: axes that do not span space.
    """
    keys, begin, listed = _keys(path)
    missing = [key for key in ("DimSize", "ElementType", "ElementDataFile") if not keys.get(key)]
    if missing:
        raise ReadError(f"{path}: its header has no {missing[0]}: not a complete MetaImage")
    size = _whole(path, keys, "DimSize")
    channels = _whole(path, keys, "ElementNumberOfChannels", "1")[0]
    if not size or min(size) < 1 or channels < 1 or keys.get("NDims", str(len(size))) != str(len(size)):
        found = one_line(f"DimSize is {keys['DimSize'][:40]}, NDims {keys.get('NDims', '')[:40]}")
        raise ReadError(f"{path}: {found}: they do not fit together")
    if len(size) not in (2, 3, 4):
        raise ReadError(f"{path}: an image of {len(size)} axes: expected 2 to 4")
    if keys["ElementType"] not in _TYPES:
        raise ReadError(
            f"{path}: ElementType is {one_line(keys['ElementType'])[:40]}: expected one of {', '.join(_TYPES)}"
        )
    for names in (_ORDER, _ORIGIN, _AXES):
        if len({keys[name].lower() for name in names if name in keys}) > 1:
            raise ReadError(
                f"{path}: its header has {' and '.join(n for n in names if n in keys)} with different values"
            )
    compressed, text = _yes(keys, "CompressedData"), not _yes(keys, "BinaryData", "True")
    offset = _whole(path, keys, "HeaderSize", "0")[0]
    if compressed and (offset or text or listed):
        raise ReadError(f"{path}: compressed voxels with HeaderSize, as text or in several files: not read here")
    if offset < -1:
        raise ReadError(f"{path}: HeaderSize is {offset}: expected -1 or a number of bytes")
    source = keys["ElementDataFile"]
    local = source.upper() == "LOCAL"
    files = _files(path, source, listed, size) if not local else (path,)
    if local and offset != -1:
        offset += begin
    problems = []
    if not any(key in keys for key in _SPACING):
        problems.append("no ElementSpacing: 1 mm between voxels is assumed")
    slope, shift = keys.get("ElementToIntensityFunctionSlope", "1"), keys.get("ElementToIntensityFunctionOffset", "0")
    if _numbers(path, "ElementToIntensityFunctionSlope", slope, 1)[0] != 1 or (
        _numbers(path, "ElementToIntensityFunctionOffset", shift, 1)[0] != 0
    ):
        problems.append("ElementToIntensityFunction is not applied, as in ITK: the values are those stored")
    lowered = {key.lower(): key for key in _KNOWN}
    for key in keys:
        if key not in _KNOWN and (meant := lowered.get(key.lower())):
            raise ReadError(f"{path}: its header has {one_line(key)[:40]}: write {meant}, or no reader sees it")
    header = MetaHeader(
        size,
        channels,
        np.dtype((">" if any(_yes(keys, name) for name in _ORDER) else "<") + _TYPES[keys["ElementType"]]),
        _affine(path, keys, len(size)),
        files,
        offset,
        compressed,
        text,
        tuple(problems),
    )
    extra = _check_size(path, header, "" if local else "ElementDataFile ")
    if extra:
        problems.append(f"{extra} bytes follow the voxels: ignored, less than a row")
        return MetaHeader(**{**header.__dict__, "problems": tuple(problems)})
    return header


def read_meta(path: Path) -> Volume:
    """Read an MHD or MHA file as channels first, float32, with its affine in RAS.

    A fourth axis (time) and the components of a voxel become channels. A list of files, one per slice, is read where
    they lie beside the header or below.

    Raises:
        ReadError: see `read_meta_header`; or voxels that are damaged.
        GeometryError: axes that do not span space.
    """
    header = read_meta_header(path)
    try:
        values = np.empty(header.count, dtype=np.float32)
        at = 0
        with np.errstate(over="raise", invalid="ignore"):
            for part in _parts(path, header):
                values[at : at + len(part)] = part
                at += len(part)
    except FloatingPointError as error:
        raise ReadError(f"{path}: values that float32 cannot hold: a damaged file, or not an image") from error
    except OSError as error:
        raise ReadError(f"{path}: its voxels cannot be read ({type(error).__name__})") from error
    if at < len(values):
        raise ReadError(f"{path}: its voxels are cut short: {at:,} values, the header promises {len(values):,}")
    voxels = values.reshape(header.channels, *header.size, order="F")
    if len(header.size) == 4:  # times before components
        voxels = np.moveaxis(voxels, -1, 0).reshape(-1, *header.size[:3])
    return Volume(np.asarray(voxels), header.affine, problems=header.problems)


def _parts(path: Path, header: MetaHeader) -> Iterator[np.ndarray]:
    """Give the values in the order of the file, some million at a time."""
    each = header.count * header.dtype.itemsize // len(header.files)
    for data in header.files:
        with data.open("rb") as file:
            file.seek(header.offset if header.offset >= 0 else data.stat().st_size - each)
            if header.text:
                yield _text(path, file, header.count // len(header.files))
                continue
            source = inflated(path, data, file, each) if header.compressed else _blocks(file, each)
            rest = b""
            for block in source:
                block = rest + block
                whole = len(block) // header.dtype.itemsize
                rest = block[whole * header.dtype.itemsize :]
                yield np.frombuffer(block, dtype=header.dtype, count=whole)


def _blocks(file: IO[bytes], length: int) -> Iterator[bytes]:
    while length > 0 and (block := file.read(min(length, _CHUNK))):
        length -= len(block)
        yield block


def inflated(path: Path, data: Path, file: IO[bytes], needed: int) -> Iterator[bytes]:
    """Inflate a zlib or gzip stream, to its end and its sum, and no further than the header promises."""
    stream, length = zlib.decompressobj(wbits=47), 0
    try:
        while length <= needed and not stream.eof and (chunk := file.read(1 << 20)):
            while chunk and length <= needed:
                block = stream.decompress(chunk, _CHUNK)
                chunk = stream.unconsumed_tail
                length += len(block)
                if length <= needed:
                    yield block
    except zlib.error as error:
        raise ReadError(
            f"{path}: the compressed voxels are damaged; copy {data.name!r} again from its source"
        ) from error
    if length != needed or not stream.eof:
        raise ReadError(
            f"{path}: the compressed voxels are cut short or damaged ({length:,} of {needed:,} bytes); "
            f"copy {data.name!r} again from its source"
        )


def _text(path: Path, file: IO[bytes], count: int) -> np.ndarray:
    words = file.read(64 * count + 1).split()
    try:
        values = np.array(words, dtype=np.float64)
    except ValueError as error:
        raise ReadError(f"{path}: its voxels are said to be text and are no numbers (BinaryData = False)") from error
    if len(values) != count:
        raise ReadError(f"{path}: its voxels are {len(values):,} numbers of text, the header promises {count:,}")
    return values


def _keys(path: Path) -> tuple[dict[str, str], int, list[str]]:
    """Return the keys of the header, where it ends, and the lines after it where they name files."""
    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
    keys: dict[str, str] = {}
    offset = 0
    for line in start.split(b"\n"):
        offset += len(line) + 1
        text = line.decode("latin-1")
        mark = re.search("[=:]", text)
        if not mark:
            continue
        key, value = text[: mark.start()].strip(), text[mark.end() :].strip()
        if key in keys and keys[key] != value:
            raise ReadError(f"{path}: its header has {one_line(key)[:40]} twice, with different values")
        keys[key] = value
        if key == "ElementDataFile":
            break
    listed = []
    if re.match(r"LIST\b", keys.get("ElementDataFile", "")):
        listed = [line.strip() for line in start[offset:].decode("latin-1").splitlines() if line.strip()]
    return keys, offset, listed


def _whole(path: Path, keys: dict[str, str], key: str, absent: str = "") -> tuple[int, ...]:
    try:
        numbers = tuple(int(n) for n in keys.get(key, absent).split())
        if not numbers:
            raise ValueError
        return numbers
    except ValueError as error:
        raise ReadError(f"{path}: {key} is not a whole number: {one_line(keys.get(key, ''))[:40]!r}") from error


def _numbers(path: Path, key: str, value: str, count: int) -> list[float]:
    try:
        numbers = [float(n) for n in value.split()]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise ReadError(f"{path}: {key} is {one_line(value)[:60]!r}: expected {count} numbers")
    return numbers


def _yes(keys: dict[str, str], key: str, absent: str = "False") -> bool:
    return keys.get(key, absent)[:1] in ("T", "t", "1")


def _affine(path: Path, keys: dict[str, str], count: int) -> np.ndarray:
    """Turn MetaImage's geometry into a 4 × 4 RAS affine. The rows of its matrix are the directions of the axes, LPS."""

    def found(names: tuple[str, ...], absent: list[float]) -> np.ndarray:
        key = next((name for name in names if name in keys), None)
        return np.array(_numbers(path, key, keys[key], len(absent)) if key else absent)

    axes = min(count, 3)
    matrix = np.eye(4)
    spacing, origin = found(_SPACING, [1.0] * count), found(_ORIGIN, [0.0] * count)
    directions = found(_AXES, list(np.eye(count).ravel())).reshape(count, count).T
    matrix[:axes, :axes] = (directions * spacing)[:axes, :axes]
    matrix[:axes, 3] = origin[:axes]
    with np.errstate(all="ignore"):
        if not np.isfinite(matrix).all() or not abs(np.linalg.det(matrix[:3, :3])) > 1e-12:
            raise GeometryError(f"{path}: its axes do not span space: the direction or spacing is not usable")
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix


def _files(path: Path, source: str, listed: list[str], size: tuple[int, ...]) -> tuple[Path, ...]:
    if len(source) > 1000:
        raise ReadError(f"{path}: ElementDataFile is {len(source):,} letters long: expected the name of a file")
    if re.match(r"LIST\b", source):
        if not re.fullmatch(rf"LIST(\s+{len(size) - 1})?", source):
            raise ReadError(f"{path}: ElementDataFile is {one_line(source)[:40]!r}: expected one file per slice")
    elif re.search(r"%\d*d", source):
        listed = _pattern(path, source)
    else:
        return (inside(path, source),)
    if len(listed) != size[-1]:
        raise ReadError(f"{path}: its voxels are in {len(listed)} files: expected one for each of {size[-1]} slices")
    return tuple(inside(path, name) for name in listed)


def _pattern(path: Path, source: str) -> list[str]:
    """Return the names that a pattern such as ``slice%03d.raw 1 20 1`` (first, last, step) stands for."""
    found = re.fullmatch(r"([^%]*)%(0?)(\d?)d([^%]*?)\s+(\d{1,6})\s+(\d{1,6})(?:\s+(\d{1,6}))?", source)
    if not found or found[7] == "0":
        raise ReadError(f"{path}: ElementDataFile is {one_line(source)[:60]!r}: expected a pattern, first and last")
    before, zero, width, after, first, last, step = found.groups()
    numbers = range(int(first), int(last) + 1, int(step or 1))
    return [f"{before}{n:{zero}{width}d}{after}" for n in numbers[:100_000]]


def inside(path: Path, source: str) -> Path:
    """Return the file of the voxels, which must lie beside the header or below: a header may not reach elsewhere.

    Raises:
        ReadError: it lies elsewhere.
    """
    if Path(source).is_absolute() or ".." in Path(source).parts or "\0" in source:
        raise ReadError(
            f"{path}: its voxels are said to be in {one_line(Path(source).name)!r} in another folder: expected beside "
            "it; put that file there and name it without folder"
        )
    return path.parent / source


def _check_size(path: Path, header: MetaHeader, role: str) -> int:
    """Check the files of the voxels; return how many bytes follow the voxels, where that is less than a row."""
    needed = header.count * header.dtype.itemsize // len(header.files)
    least = needed // DEFLATE_LIMIT if header.compressed else header.count if header.text else needed
    least += max(header.offset, 0)
    surplus = 0
    for data in header.files:
        size = check_file(path, data, least, role)
        if not (header.compressed or header.text or header.offset == -1):
            surplus = max(surplus, size - least)
    row = header.size[0] * header.channels * header.dtype.itemsize
    if surplus >= row:
        raise ReadError(
            f"{path}: {role}{header.files[0].name!r} holds {surplus:,} bytes more than DimSize and ElementType promise "
            f"({least:,}): which of the two is right is unknown; if other bytes precede the voxels, say HeaderSize = -1"
        )
    return surplus


def check_file(path: Path, data: Path, needed: int, role: str) -> int:
    """Return the size of a file of voxels.

    Raises:
        ReadError: it is absent, a git-LFS pointer, or smaller than ``needed``.
    """
    name = one_line(data.name)
    try:
        with data.open("rb") as file:
            start = file.read(23)
        size = data.stat().st_size
    except (OSError, ValueError) as error:
        raise ReadError(
            f"{path}: {role}{name!r} is absent: the voxels are not there; put it beside the header"
        ) from error
    if start == b"version https://git-lfs":
        raise ReadError(f"{path}: {role}{name!r} is a git-LFS pointer; fetch the file itself with `git lfs pull`")
    if size < needed:
        raise ReadError(
            f"{path}: {role}{name!r} is too small: {size:,} bytes, the header promises at least {needed:,}; "
            "copy it again from its source"
        )
    return size
