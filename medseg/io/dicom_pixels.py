"""The pixels of a DICOM file: decoded, rescaled to the quantity that they stand for, and the window to show them in."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels import apply_color_lut, convert_color_space, get_decoder
from pydicom.pixels.common import PhotometricInterpretation
from pydicom.uid import UID

from ..errors import MedsegError, MissingTagError, ReadError
from .dicom_header import Instance, first_item, integer, numbers, place_of
from .dicom_scan import pixel_data, pixels_in_file
from .text import one_line

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_ITEM = b"\xfe\xff\x00\xe0"  # what compressed pixels start with

_NATIVE = (
    pydicom.uid.ImplicitVRLittleEndian,
    pydicom.uid.ExplicitVRLittleEndian,
    pydicom.uid.ExplicitVRBigEndian,
    pydicom.uid.DeflatedExplicitVRLittleEndian,
)

# What counts as color with three samples per pixel, and what JPEG 2000 makes RGB of by itself.
_COLORS = ("RGB", "YBR_FULL", "YBR_FULL_422")
_J2K_COLORS = ("YBR_RCT", "YBR_ICT")

# Modalities whose values measure something: MONOCHROME1 is for the display, their values stay as they are.
_QUANTITIES = ("CT", "PT", "NM", "MR")


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the header says that the pixels are stored (DICOM PS3.3 C.7.6.3, PS3.5 8.1)."""

    syntax: UID
    keyword: str
    rows: int
    columns: int
    samples: int
    allocated: int
    stored: int
    high: int
    signed: bool
    color: str
    frames: int

    @property
    def cell(self) -> np.dtype:
        """The type that one stored value is written as."""
        order = "<" if self.syntax.is_little_endian else ">"
        return np.dtype(f"{order}{'i' if self.signed else 'u'}{self.allocated // 8}")


def decode(item: Instance, frames: Sequence[int]) -> Iterator[np.ndarray]:
    """Give the stored values of the wanted frames, in ascending order, as [rows, columns] or [rows, columns, 3] (RGB).

    Bits beyond BitsStored are no part of a value. Every transfer syntax has one decoder, whatever else is installed.
    """
    ds = dataset_of(item)
    syntax = transfer_syntax(ds)
    try:
        layout = _layout(item, ds, syntax)
        if syntax in _CODECS:
            images = _decompressed(item, ds, layout, frames)
        elif layout.keyword == "PixelData" and layout.samples == 1 and layout.allocated in (1, 8, 16, 32):
            images = _plain(item, ds, layout, frames)
        else:
            images = (pixels for pixels, _ in get_decoder(syntax).iter_array(ds, indices=frames))
        for pixels in images:
            if layout.color == "PALETTE COLOR":
                pixels = apply_color_lut(pixels, ds)[..., :3]
                if pixels.dtype == np.uint16:  # palettes of 16 bits are meant to be shown with 8
                    pixels = pixels >> 8
            yield pixels
    except (MedsegError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # pydicom and the codecs raise many kinds, with values of the file in their text
        raise ReadError(
            f"{item.path}: its pixels cannot be decoded ({one_line(syntax.name)}, {type(error).__name__}): damaged, "
            "or not what the header says; copy it again from its source"
        ) from error


def transfer_syntax(ds: Dataset) -> UID:
    """Return the transfer syntax, guessed from how the header is written where the file does not name it."""
    named = getattr(ds, "file_meta", Dataset()).get("TransferSyntaxUID")
    if named:
        return UID(named)
    implicit, little = ds.original_encoding
    if implicit:
        return pydicom.uid.ImplicitVRLittleEndian
    return pydicom.uid.ExplicitVRBigEndian if little is False else pydicom.uid.ExplicitVRLittleEndian


def _layout(item: Instance, ds: Dataset, syntax: UID) -> _Layout:
    keyword = next((keyword for keyword in _PIXELS if keyword in ds), None)
    if keyword is None:
        raise ReadError(f"{item.path}: no pixels: the file has a header and no PixelData (7FE0,0010)")
    if syntax not in _NATIVE and syntax not in _CODECS:
        raise ReadError(f"{item.path}: its pixels cannot be decoded: no decoder for {one_line(syntax.name)}")
    compressed = not pixels_in_file(ds) and (
        ds[keyword].is_undefined_length or (syntax in _CODECS and ds[keyword].value[:4] == _ITEM)
    )
    if compressed != (syntax in _CODECS):
        found = "compressed" if compressed else "not compressed"
        raise ReadError(
            f"{item.path}: its pixels are {found}, but its transfer syntax is {one_line(syntax.name)}: "
            "the file contradicts itself; export it again from its source"
        )

    def value(keyword: str, tag: str) -> int:
        number = integer(ds, keyword)
        if number is None or number < 0:
            raise MissingTagError(f"{item.path}: {keyword} {tag} is missing or unusable: its pixels cannot be decoded")
        return number

    color = one_line(ds.get("PhotometricInterpretation") or "")
    if not color:
        raise MissingTagError(f"{item.path}: PhotometricInterpretation (0028,0004) is missing: gray or color?")
    samples, allocated = value("SamplesPerPixel", "(0028,0002)"), value("BitsAllocated", "(0028,0100)")
    expected: tuple[str, ...] = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
    if samples == 3:
        expected = _COLORS + (_J2K_COLORS if syntax in pydicom.uid.JPEG2000TransferSyntaxes else ())
    if samples not in (1, 3) or color not in expected:
        shown = color if color in PhotometricInterpretation._value2member_map_ else "of an unknown kind"
        raise ReadError(
            f"{item.path}: PhotometricInterpretation (0028,0004) {shown} with SamplesPerPixel (0028,0002) {samples}: "
            f"expected one of {', '.join(expected)}, with 1 (gray, palette) or 3 samples (color)"
        )
    stored, high, signed = allocated, allocated - 1, 0
    if keyword == "PixelData":
        stored, signed = value("BitsStored", "(0028,0101)"), value("PixelRepresentation", "(0028,0103)")
        high = value("HighBit", "(0028,0102)") if "HighBit" in ds else stored - 1
        if allocated not in (1, 8, 16, 32, 64) or not 1 <= stored <= high + 1 <= allocated or signed not in (0, 1):
            raise ReadError(
                f"{item.path}: BitsAllocated {allocated}, BitsStored {stored}, HighBit {high} and PixelRepresentation "
                f"{signed} (0028,0100) to (0028,0103) do not fit together: its pixels cannot be decoded"
            )
    return _Layout(
        syntax=syntax,
        keyword=keyword,
        rows=value("Rows", "(0028,0010)"),  # of the picture: an instance's own are those of a tile in a mosaic
        columns=value("Columns", "(0028,0011)"),
        samples=samples,
        allocated=allocated,
        stored=stored,
        high=high,
        signed=bool(signed),
        color=color,
        frames=integer(ds, "NumberOfFrames") or 1,
    )


def _plain(item: Instance, ds: Dataset, layout: _Layout, frames: Sequence[int]) -> Iterator[np.ndarray]:
    """Read gray pixels that lie in the file as they are: pydicom's decoder, without its half millisecond a slice.

    And without its failure at frames of single bits that start amid a byte.
    """
    held = pixel_data(ds)
    count, bits = layout.rows * layout.columns, layout.allocated
    if bits == 8 and not layout.syntax.is_little_endian and ds["PixelData"].VR == "OW":
        # Bytes that were written as words of two, the second first.
        held = np.frombuffer(held[: len(held) // 2 * 2], ">u2").astype("<u2").tobytes()
    needed = (layout.frames * count * bits + 7) // 8
    if len(held) < needed:
        raise ReadError(
            f"{item.path}: cut short: its header promises {needed:,} bytes of pixels, it has {len(held):,}; "
            "copy it again from its source"
        )
    for frame in frames:
        if frame >= layout.frames:
            raise ReadError(f"{item.path}: frame {frame + 1} is wanted, the header promises {layout.frames}")
        start = frame * count * bits
        if bits == 1:
            octets = np.frombuffer(held, np.uint8, (start + count + 7) // 8 - start // 8, start // 8)
            cells = np.unpackbits(octets, bitorder="little")[start % 8 : start % 8 + count]
            yield cells.reshape(layout.rows, layout.columns)
        else:
            cells = np.frombuffer(held, layout.cell, count, start // 8)
            yield _values_of_cells(item, layout, cells.reshape(layout.rows, layout.columns))


def _values_of_cells(item: Instance, layout: _Layout, cells: np.ndarray) -> np.ndarray:
    """Take the values out of their cells: BitsStored bits that end at HighBit, whatever lies in the others."""
    below, above = layout.high + 1 - layout.stored, layout.allocated - 1 - layout.high
    if not below and not above:
        return cells
    if below and (cells & cells.dtype.type((1 << below) - 1)).any():
        # The standard has HighBit = BitsStored - 1 today. Values that fill the bits below were not written by the rule.
        raise ReadError(
            f"{item.path}: HighBit (0028,0102) {layout.high} with BitsStored (0028,0101) {layout.stored} leaves the "
            f"lowest {below} bits unused, yet they are set: which bits hold the values is unknown"
        )
    return (cells << above) >> (above + below)


def _decompressed(item: Instance, ds: Dataset, layout: _Layout, frames: Sequence[int]) -> Iterator[np.ndarray]:
    """Decode compressed frames, one after the other."""
    # An extended offset table is for those who jump: beside it, each frame is one fragment (PS3.5 A.4).
    streams = enumerate(generate_frames(ds.PixelData, number_of_frames=layout.frames))
    for wanted in frames:
        stream = next((stream for index, stream in streams if index == wanted), None)
        if stream is None:
            raise ReadError(
                f"{item.path}: frame {wanted + 1} is not among its compressed frames, the header promises "
                f"{layout.frames}; copy it again from its source"
            )
        pixels, color = _CODECS[layout.syntax](item, layout, stream)
        if color.startswith("YBR_FULL"):
            pixels = convert_color_space(pixels, "YBR_FULL", "RGB")
        yield pixels


def _rle(item: Instance, layout: _Layout, stream: bytes) -> tuple[np.ndarray, str]:
    import rle

    planes = rle.decode_pixel_data(
        stream, version=2, rows=layout.rows, columns=layout.columns, bits_allocated=layout.allocated, byteorder="<"
    )
    cells = np.frombuffer(planes, layout.cell).reshape(layout.samples, layout.rows, layout.columns)
    return _values_of_cells(item, layout, cells[0] if layout.samples == 1 else cells.transpose(1, 2, 0)), layout.color


def _jpeg(item: Instance, layout: _Layout, stream: bytes) -> tuple[np.ndarray, str]:
    import imagecodecs

    head = _jpeg_head(stream)
    _check_head(item, layout, head)
    if not stream.rstrip(b"\x00\xff").endswith(b"\xff\xd9"):  # libjpeg would fill what is missing with gray
        raise ReadError(f"{item.path}: a compressed frame is cut short: it has no end; copy it again from its source")
    if layout.syntax in pydicom.uid.JPEGLSTransferSyntaxes:
        pixels = imagecodecs.jpegls_decode(stream)
    elif layout.samples == 3:  # without a conversion: what the colors are is decided here, by one rule for all
        pixels = imagecodecs.jpeg8_decode(stream, colorspace="YCBCR", outcolorspace="YCBCR")
    else:
        pixels = imagecodecs.jpeg8_decode(stream)
    return _values_of_stream(item, layout, head, pixels), (head.color or layout.color)


def _j2k(item: Instance, layout: _Layout, stream: bytes) -> tuple[np.ndarray, str]:
    import imagecodecs

    start = stream.find(b"\xff\x4f\xff\x51")  # a JP2 file around the codestream is skipped: DICOM says what it holds
    if start < 0:
        raise ValueError("no JPEG 2000 codestream")
    head = _j2k_head(stream[start:])
    _check_head(item, layout, head)
    if head.precision > 24:
        raise ReadError(f"{item.path}: JPEG 2000 of {head.precision} bits: OpenJPEG is exact up to 24")
    pixels = imagecodecs.jpeg2k_decode(stream[start:], planar=False)
    color = "RGB" if layout.color in _J2K_COLORS else layout.color  # the decoder has undone these two
    return _values_of_stream(item, layout, head, pixels), color


@dataclass(frozen=True, slots=True)
class _Head:
    """What a compressed frame says of itself."""

    rows: int
    columns: int
    samples: int
    precision: int
    signed: bool = False
    color: str = ""


def _jpeg_head(stream: bytes) -> _Head:
    """Read the frame header of JPEG or JPEG-LS, and the color space where the stream tells it.

    A JFIF marker means YCbCr, an Adobe marker tells, components named R, G and B are such: in this order, as libjpeg
    has it. The stream was written by who compressed it; PhotometricInterpretation often by somebody else.
    """
    color, place = "", 2
    while place + 4 <= len(stream):
        marker = stream[place + 1]
        if stream[place] != 0xFF:
            break
        if marker == 0xFF:  # fill
            place += 1
            continue
        body = stream[place + 4 : place + 2 + int.from_bytes(stream[place + 2 : place + 4], "big")]
        if marker == 0xE0 and body.startswith(b"JFIF"):
            color = "YBR_FULL"
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12 and not color:
            color = {0: "RGB", 1: "YBR_FULL"}.get(body[11], "")
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            samples = body[5]
            if bytes(body[6 : 6 + 3 * samples : 3]) in (b"RGB", b"rgb") and not color:
                color = "RGB"
            return _Head(
                rows=int.from_bytes(body[1:3], "big"),
                columns=int.from_bytes(body[3:5], "big"),
                samples=samples,
                precision=body[0],
                color=color if samples == 3 else "",
            )
        place += 4 + len(body)
    raise ValueError("no JPEG frame header")


def _j2k_head(stream: bytes) -> _Head:
    """Read the SIZ marker, the first after the start of a JPEG 2000 codestream."""
    right, bottom, left, top = (int.from_bytes(stream[at : at + 4], "big") for at in (8, 12, 16, 20))
    depths = set(stream[42 : 42 + 3 * int.from_bytes(stream[40:42], "big") : 3])
    if len(depths) != 1:
        raise ValueError("no JPEG 2000 image, or components of different depth")
    depth = depths.pop()
    return _Head(
        rows=bottom - top,
        columns=right - left,
        samples=int.from_bytes(stream[40:42], "big"),
        precision=(depth & 0x7F) + 1,
        signed=bool(depth & 0x80),
    )


def _check_head(item: Instance, layout: _Layout, head: _Head) -> None:
    """Refuse a stream of another size before its decoder takes memory for it."""
    if (head.rows, head.columns, head.samples) != (layout.rows, layout.columns, layout.samples):
        raise ReadError(
            f"{item.path}: a compressed frame of {head.rows} rows, {head.columns} columns and {head.samples} samples; "
            f"the header says {layout.rows}, {layout.columns} and {layout.samples}: damaged"
        )
    if head.precision > layout.allocated:
        raise ReadError(
            f"{item.path}: a compressed frame of {head.precision} bits, BitsAllocated (0028,0100) is {layout.allocated}"
        )


def _values_of_stream(item: Instance, layout: _Layout, head: _Head, pixels: np.ndarray) -> np.ndarray:
    """Give what a codec returned the sign that the header tells (PS3.5 8.2), and drop bits that are no part of it.

    JPEG knows unsigned values only, and encoders of JPEG 2000 forget the sign: negative values come as large ones.
    """
    if pixels.shape[:2] != (layout.rows, layout.columns):
        raise ValueError("not the size of the header")
    unsigned = pixels.view(f"u{pixels.itemsize}")
    if not layout.signed:
        bits = min(head.precision, layout.stored) if layout.syntax in _LOSSLESS else head.precision
        return unsigned & unsigned.dtype.type((1 << bits) - 1) if head.signed or bits < head.precision else unsigned
    if head.signed:
        return pixels
    bits = min(head.precision, layout.stored)
    if bits < layout.stored and (unsigned >> (bits - 1)).any():
        raise ReadError(
            f"{item.path}: compressed as {head.precision} unsigned bits, BitsStored (0028,0101) is {layout.stored} and "
            "signed: whether its large values are negative is unknown"
        )
    above = 8 * pixels.itemsize - bits
    return (unsigned << above).view(f"i{pixels.itemsize}") >> above


# One decoder per transfer syntax, whatever else is installed. Those of imagecodecs (BSD) are libjpeg-turbo, which alone
# has 12 bits and all of lossless, CharLS and OpenJPEG; pylibjpeg-rle (MIT) is written in Rust. Each was given thousands
# of damaged streams and raised an error at worst. GDCM ends the whole process on some of them (C++ exceptions that
# nothing catches), and so do imagecodecs' own decoders of RLE and of lossless JPEG (jpegsof3, ljpeg).
_CODECS: dict[UID, Callable[[Instance, _Layout, bytes], tuple[np.ndarray, str]]] = {
    pydicom.uid.JPEGBaseline8Bit: _jpeg,
    pydicom.uid.JPEGExtended12Bit: _jpeg,
    pydicom.uid.JPEGLossless: _jpeg,
    pydicom.uid.JPEGLosslessSV1: _jpeg,
    pydicom.uid.JPEGLSLossless: _jpeg,
    pydicom.uid.JPEGLSNearLossless: _jpeg,
    pydicom.uid.JPEG2000Lossless: _j2k,
    pydicom.uid.JPEG2000: _j2k,
    pydicom.uid.HTJ2KLossless: _j2k,
    pydicom.uid.HTJ2KLosslessRPCL: _j2k,
    pydicom.uid.HTJ2K: _j2k,
    pydicom.uid.RLELossless: _rle,
}
_LOSSLESS = (
    pydicom.uid.JPEGLossless,
    pydicom.uid.JPEGLosslessSV1,
    pydicom.uid.JPEGLSLossless,
    pydicom.uid.JPEG2000Lossless,
    pydicom.uid.HTJ2KLossless,
    pydicom.uid.HTJ2KLosslessRPCL,
)


def rescale(item: Instance, frame: int, pixels: np.ndarray, out: np.ndarray) -> str:
    """Write the values of one frame into ``out`` [rows, columns, channels]; return their unit."""
    if pixels.ndim == 3:
        out[...] = pixels
        return "stored"
    ds = dataset_of(item)
    source = _value_transformation(ds, frame)
    gray = out[..., 0]
    if source.get("ModalityLUTSequence"):
        table = source.ModalityLUTSequence[0]
        gray[...] = _looked_up(item, ds, table, pixels)
        kind = one_line(table.get("ModalityLUTType") or "stored")
    else:
        slope, intercept = numbers(source, "RescaleSlope", 1), numbers(source, "RescaleIntercept", 1)
        kind = "stored"
        if slope is None and intercept is None:
            gray[...] = pixels
        elif slope is None or intercept is None:
            absent = "RescaleSlope (0028,1053)" if slope is None else "RescaleIntercept (0028,1052)"
            raise MissingTagError(f"{item.path}: {absent} is missing or unusable although its partner is present")
        else:
            _apply(item, pixels, slope[0], intercept[0], gray)
            kind = one_line(source.get("RescaleType") or ("HU" if item.modality == "CT" else "stored"))
    if (mirror := _mirror(ds, source)) is not None:
        np.subtract(mirror, gray, out=gray)
        kind = "stored"  # an optical density, say, is none when its scale is turned round
    return "stored" if kind == "US" else kind


def _apply(item: Instance, pixels: np.ndarray, slope: float, intercept: float, out: np.ndarray) -> None:
    if slope == 0 and pixels.any():
        raise ReadError(f"{item.path}: RescaleSlope (0028,1053) is 0: its values are lost")
    whole = slope == int(slope) and intercept == int(intercept) and pixels.dtype.kind in "iu" and pixels.itemsize <= 2
    if whole and 65536 * abs(slope) + abs(intercept) < 1 << 24:  # float32 holds all of these
        out[...] = pixels
        if slope != 1:
            out *= np.float32(slope)
        if intercept != 0:
            out += np.float32(intercept)
        return
    # A large intercept would leave little of a small value: rounded once, at the end.
    exact = np.multiply(pixels, slope, dtype=np.float64)
    exact += intercept
    out[...] = exact


def _looked_up(item: Instance, ds: Dataset, table: Dataset, pixels: np.ndarray) -> np.ndarray:
    """Look values up in a modality LUT (PS3.3 C.11.1); those before and after it take its ends."""
    if pixels.dtype.kind == "f":
        raise ReadError(f"{item.path}: a modality LUT for floating-point pixels: not allowed")
    count, first, bits = (int(number) for number in table.LUTDescriptor)
    count = count or 1 << 16
    entries = table.LUTData
    if isinstance(entries, bytes):
        order = "<" if transfer_syntax(ds).is_little_endian else ">"
        packed = bits == 8 and len(entries) in (count, count + 1)
        entries = np.frombuffer(entries, np.uint8 if packed else f"{order}u2")
    entries = np.asarray(entries)
    if len(entries) < count:
        raise ReadError(f"{item.path}: a modality LUT of {len(entries)} entries, its descriptor says {count}")
    return entries[np.clip(pixels.astype(np.int64) - first, 0, count - 1)]


def _value_transformation(ds: Dataset, frame: int) -> Dataset:
    """Return what holds the rescale attributes: the functional group of a frame, or the dataset itself."""
    return functional_group(ds, frame, "PixelValueTransformationSequence") or ds


def functional_group(ds: Dataset, frame: int, keyword: str) -> Dataset:
    """Return the first item of a functional group of a frame, empty where the object has none."""
    groups = ds.get("PerFrameFunctionalGroupsSequence")
    if not groups:
        return Dataset()
    shared = (ds.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    return first_item(groups[frame] if frame < len(groups) else Dataset(), shared, keyword)


def _mirror(ds: Dataset, source: Dataset) -> float | None:
    """Return what values are subtracted from so that high is white, None where they stay as they are.

    In MONOCHROME1 the lowest value is shown white. Quantities keep their values, pictures get white high.
    """
    if ds.get("PhotometricInterpretation") != "MONOCHROME1" or ds.get("Modality") in _QUANTITIES:
        return None
    stored, signed = integer(ds, "BitsStored"), integer(ds, "PixelRepresentation")
    if stored is None:  # floating-point pixels
        return None
    if source.get("ModalityLUTSequence"):
        return float((1 << int(source.ModalityLUTSequence[0].LUTDescriptor[2])) - 1)
    slope, intercept = numbers(source, "RescaleSlope", 1) or (1.0,), numbers(source, "RescaleIntercept", 1) or (0.0,)
    return (-1 if signed else (1 << stored) - 1) * slope[0] + 2 * intercept[0]


def window_of(ds: Dataset, frame: int = 0, factor: float = 1.0) -> tuple[float, float, str]:
    """Return the window that a header gives for a frame, in the units that `rescale` gives.

    The first pair counts where there are several (DICOM PS3.3 C.11.2; C.7.6.16.2.10 for enhanced objects). A window
    that the standard does not allow is no window: a width below 1 of the function LINEAR, none above 0 of the others.

    Args:
        ds: the header.
        frame: the number of the frame, from 0, in an object whose functional groups hold the windows.
        factor: what the rescaled values are multiplied with afterwards, such as the factor to SUV. The window follows;
            it is LINEAR_EXACT then, as the half units of LINEAR have no meaning in other units.

    Returns:
        Center, width and VOILUTFunction (LINEAR, LINEAR_EXACT or SIGMOID); NaN, NaN and LINEAR where there is none.

    Example:
        >>> ds = Dataset()
        >>> ds.WindowCenter, ds.WindowWidth = [40, -600], [400, 1500]
        >>> window_of(ds)
        (40.0, 400.0, 'LINEAR')
    """
    absent = (math.nan, math.nan, "LINEAR")
    source = functional_group(ds, frame, "FrameVOILUTSequence") or ds
    center, width = _first_number(source, "WindowCenter"), _first_number(source, "WindowWidth")
    function = one_line(source.get("VOILUTFunction") or "LINEAR").upper()
    if center is None or width is None or function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        return absent
    if width <= 0 or (function == "LINEAR" and width < 1):
        return absent
    if (mirror := _mirror(ds, _value_transformation(ds, frame))) is not None:
        center = mirror - center + (1 if function == "LINEAR" else 0)  # LINEAR is symmetrical about center - 1/2
    if factor != 1:
        if function == "LINEAR":
            if width == 1:
                return absent
            center, width, function = center - 0.5, width - 1, "LINEAR_EXACT"
        center, width = center * factor, width * factor
    return center, width, function


def _first_number(ds: Dataset, keyword: str) -> float | None:
    value = ds.get(keyword)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        value = value[0] if len(value) else None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def check_promise(instances: Sequence[Instance], voxels: int) -> None:
    """Refuse before any memory is taken when the headers promise far more than the files can hold."""
    held = sum(item.path.stat().st_size for item in instances)
    if voxels > 3000 * held + (1 << 24):
        raise ReadError(
            f"{place_of(instances)}: the header promises {voxels:,} voxels, the files have {held:,} bytes: "
            "damaged or forged"
        )
    for item in instances:
        ds = dataset_of(item)
        if transfer_syntax(ds) not in _NATIVE[:3]:  # compressed, or deflated
            continue
        needed = item.rows * item.columns * len(item.planes) * (integer(ds, "BitsAllocated") or 8) // 8
        if needed > item.path.stat().st_size:
            raise ReadError(
                f"{item.path}: cut short: its header promises {needed:,} bytes of pixels, the file has "
                f"{item.path.stat().st_size:,}; copy it again from its source"
            )


def forget_pixels(ds: Dataset) -> None:
    """Free the pixels of a slice once they are in the volume."""
    for keyword in _PIXELS:
        if keyword in ds:
            del ds[keyword]
    ds._pixel_array = None


def dataset_of(item: Instance) -> Dataset:
    """Return the dataset of an instance that was read with its pixels."""
    if item.dataset is None:
        raise ValueError("the instance was read without its dataset")
    return item.dataset
