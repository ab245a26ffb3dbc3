"""What ITK's world writes: MetaImage (see `metaimage`), and NRRD through SimpleITK."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ..errors import GeometryError, ReadError
from .metaimage import DEFLATE_LIMIT, check_file, inflated, inside, read_meta, read_meta_header
from .text import one_line
from .volume import Volume

_GZIP = ("gzip", "gz")
_TEXT = ("txt", "text", "ascii", "hex")
_HEADER_BYTES = 1 << 20
_WIDTHS = {"char": 1, "short": 2, "int": 4, "longlong": 8, "float": 4, "double": 8}
# Spaces whose axes are those of the patient: ITK takes every other for LPS, even the RAS ones with time.
_PATIENT = ("left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las")
_MILLIMETRES = {"mm": 1.0, "cm": 10.0, "m": 1000.0, "um": 0.001, "µm": 0.001, "micron": 0.001, "": 1.0, "???": 1.0}


@dataclass(frozen=True, eq=False)
class ItkHeader:
    """Size and geometry of an image, without its voxels, and what a careful reader should know."""

    shape: tuple[int, ...]
    channels: int
    affine: np.ndarray
    problems: tuple[str, ...] = ()


def read_itk_header(path: Path, kind: str) -> ItkHeader:
    """Read the header of an MHD, MHA or NRRD file and check that the voxels it promises are there.

    Raises:
        ReadError: a header that cannot be parsed; voxels in a file that is absent, of another size, or a git-LFS
            pointer.
        GeometryError: axes that do not span space.
    """
    if kind == "mhd":
        meta = read_meta_header(path)
        channels = meta.channels * int(np.prod(meta.size[3:]))
        return ItkHeader(meta.size[:3], channels, meta.affine, meta.problems)
    keys = _check_nrrd(path)
    scale, problems = _space(path, keys)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ReadError(f"{path}: its header cannot be read: {_reason(error)}") from error
    size: tuple[int, ...] = tuple(int(n) for n in reader.GetSize())
    affine = _affine(path, reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())
    affine[:3] *= scale
    channels = int(reader.GetNumberOfComponents())
    return ItkHeader(size[:3], channels * int(np.prod(size[3:])), affine, problems)


def read_itk(path: Path, kind: str) -> Volume:
    """Read an MHD, MHA or NRRD file as channels first, float32, with its affine in RAS millimetres.

    A fourth axis (time) and vector components become channels.

    Raises:
        ReadError: see `read_itk_header`; or voxels that cannot be read.
        GeometryError: axes that do not span space.
    """
    if kind == "mhd":
        return read_meta(path)
    header = read_itk_header(path, kind)
    _check_nrrd(path, voxels=True)
    try:
        image = sitk.ReadImage(str(path), imageIO="NrrdImageIO")
    except RuntimeError as error:
        raise ReadError(f"{path}: its voxels cannot be read: {_reason(error)}") from error
    if "complex" in image.GetPixelIDTypeAsString():
        raise ReadError(f"{path}: holds complex values: expected a real image")
    array = sitk.GetArrayViewFromImage(image)
    dimension = image.GetDimension()
    axes = tuple(range(dimension - 1, -1, -1))
    try:
        with np.errstate(over="raise"):
            voxels = array.transpose(*axes, *range(dimension, array.ndim)).astype(np.float32)
    except FloatingPointError as error:
        raise ReadError(f"{path}: values that float32 cannot hold: a damaged file, or not an image") from error
    if dimension == 4:
        voxels = voxels.reshape(*voxels.shape[:3], -1)
        dimension = 3
    voxels = np.moveaxis(voxels, -1, 0) if voxels.ndim > dimension else voxels[None]
    return Volume(voxels, header.affine, problems=header.problems)


def _affine(path: Path, spacing: tuple, origin: tuple, direction: tuple) -> np.ndarray:
    """Turn ITK's LPS geometry of 2, 3 or 4 axes into a 4 × 4 RAS affine."""
    count = len(spacing)
    if count not in (2, 3, 4):
        raise ReadError(f"{path}: an image of {count} axes: expected 2 to 4")
    axes = min(count, 3)
    matrix = np.eye(4)
    with np.errstate(all="ignore"):
        matrix[:axes, :axes] = (np.array(direction).reshape(count, count) * np.array(spacing))[:axes, :axes]
        matrix[:axes, 3] = origin[:axes]
        if not np.isfinite(matrix).all() or not abs(np.linalg.det(matrix[:3, :3])) > 1e-12:
            raise GeometryError(f"{path}: its axes do not span space: the direction or spacing is not usable")
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix


def _check_nrrd(path: Path, *, voxels: bool = False) -> dict[str, str]:
    """Check that the voxels which the header promises are there; return the fields of the header."""
    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
    ends = [place + len(mark) for mark in (b"\n\n", b"\r\n\r\n") if (place := start.find(mark)) >= 0]
    end = min(ends, default=len(start))
    keys: dict[str, str] = {}
    for line in start[:end].decode("latin-1").splitlines():
        key, mark, value = line.partition(":")
        if mark and not value.startswith("=") and not line.startswith("#"):  # key:=value is the user's own
            keys[key.strip().lower().replace(" ", "")] = value.strip()
    try:
        size = [int(n) for n in keys["sizes"].split()]
    except (KeyError, ValueError) as error:
        raise ReadError(f"{path}: its header has no usable `sizes`: not a complete NRRD") from error
    if not size or min(size) < 1:
        raise ReadError(f"{path}: sizes is {one_line(keys['sizes'])[:40]}: expected whole numbers above zero")
    width = _width(keys.get("type", ""))
    encoding = keys.get("encoding", "raw").lower()
    if encoding in ("bzip2", "bz2"):
        raise ReadError(f"{path}: its voxels are compressed with bzip2, which is not read here: write it with gzip")
    count = int(np.prod(size, dtype=object))
    needed = count if encoding in _TEXT else count * width
    if encoding in _GZIP:
        needed //= DEFLATE_LIMIT
    source = keys.get("datafile")
    skips = bool({"lineskip", "byteskip"} & keys.keys())
    if source is None:
        data, role = path, ""
    elif source.startswith("LIST") or "%" in source:
        raise ReadError(f"{path}: `data file` is a list of files: expected one file")
    else:
        data, role, end = inside(path, source), "data file ", 0
    held = check_file(path, data, needed + end, role)
    surplus = held - end - needed
    if encoding == "raw" and not skips and surplus >= size[0] * width:
        raise ReadError(
            f"{path}: {role}{one_line(data.name)!r} holds {surplus:,} bytes more than sizes and type promise "
            f"({needed:,}): which of the two is right is unknown; export it again from its source"
        )
    if voxels and encoding in _GZIP and not skips:
        _check_stream(path, data, end, count * width)
    return keys


def _width(kind: str) -> int:
    """Return the bytes of a value of one of NRRD's many names for types; 1 where ITK shall judge."""
    name = re.sub(r"\s", "", kind.lower()).removeprefix("signed").removeprefix("unsigned")
    if bits := re.fullmatch(r"u?int(8|16|32|64)(_t)?", name):
        return int(bits[1]) // 8
    name = name if name == "int" else name.removesuffix("int")
    return _WIDTHS.get(name, _WIDTHS.get(name.removeprefix("u"), 1 if name else 4))


def _space(path: Path, keys: dict[str, str]) -> tuple[float, tuple[str, ...]]:
    """Return the factor that makes millimetres of the header's lengths, and what is odd about its space."""
    space = keys.get("space", "").lower()
    if "time" in space or space in ("rast", "last", "lpst"):
        raise ReadError(f"{path}: its space is {one_line(space)[:40]}, with time: write time as an axis of kind `list`")
    problems = []
    if space not in _PATIENT:
        called = f"its space is {one_line(space)[:40]!r}" if space else "it names no space"
        problems.append(f"{called}, not the patient's: the orientation is a guess (LPS, as in ITK)")
    if "spacedirections" not in keys:
        kinds = keys.get("kinds", "").split()
        for axis, step in enumerate(keys.get("spacings", "").split()):
            kind = kinds[axis] if axis < len(kinds) else "domain"
            if step.lower() in ("nan", "-nan") and kind in ("domain", "space", "???", "none"):
                raise GeometryError(f"{path}: spacings is {one_line(keys['spacings'])[:60]}: axis {axis + 1} has none")
    units = set(re.findall(r'"([^"]*)"', keys.get("spaceunits" if "spacedirections" in keys else "units", "")))
    factors = {_MILLIMETRES.get(unit.strip().lower()) for unit in units if unit.strip() not in ("", "s", "ms")}
    if len(factors) > 1 or None in factors:
        listed = ", ".join(sorted(one_line(unit)[:20] for unit in units))
        raise GeometryError(f"{path}: its units of length are {listed}: expected one of mm, cm, m, um")
    scale = factors.pop() if factors else 1.0
    if scale != 1:
        problems.append("its unit of length is not the millimetre: turned into millimetres")
    return scale or 1.0, tuple(problems)


def _check_stream(path: Path, data: Path, offset: int, needed: int) -> None:
    """Inflate compressed voxels once and check their sum, for ITK takes a damaged stream without a word."""
    with data.open("rb") as file:
        file.seek(offset)
        for _ in inflated(path, data, file, needed):
            pass


def _reason(error: RuntimeError) -> str:
    """Return the last line of ITK's message, which says what happened; the rest says where in ITK."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"\(0x[0-9a-f]+\)", "", one_line(lines[-1]))[:160] if lines else "unknown reason"
