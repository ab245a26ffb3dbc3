"""Every transfer syntax gives back what was written: by round trip, against other decoders, and against twins."""

import subprocess
import sys
import tempfile
from pathlib import Path

import imagecodecs
import jpeg_ls  # another build of CharLS than the one that reads
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.pixels import get_decoder

from medseg.errors import MedsegError, ReadError
from medseg.io import read_image
from medseg.io.dicom_header import quiet, read_instance
from medseg.io.dicom_pixels import decode

from .conftest import NAME, PATIENT, base

UIDS = {"study": "1.2.3.1", "series": "1.2.3.2", "frame": "1.2.3.3"}
NATIVE = [
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
]


def header(shape, dtype, syntax=uid.ExplicitVRLittleEndian, stored=None, color="MONOCHROME2") -> Dataset:
    dtype = np.dtype(dtype)
    ds = base("MR", UIDS)
    ds.file_meta.TransferSyntaxUID = syntax
    ds.Rows, ds.Columns = shape[:2]
    ds.SamplesPerPixel = 3 if len(shape) == 3 else 1
    if len(shape) == 3:
        ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation = color
    ds.BitsAllocated = 8 * dtype.itemsize
    ds.BitsStored = stored or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(dtype.kind == "i")
    return ds


def write(path: Path, ds: Dataset, pixels: bytes) -> Path:
    ds.PixelData = pixels
    if ds.file_meta.TransferSyntaxUID.is_encapsulated:
        ds["PixelData"].is_undefined_length = True
        ds["PixelData"].VR = "OB"
    else:
        ds["PixelData"].VR = "OW" if ds.BitsAllocated > 8 else "OB"
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
    return path


def compressed(path: Path, stream: bytes, shape, dtype, syntax, stored=None, color="MONOCHROME2") -> Path:
    return write(path, header(shape, dtype, syntax, stored, color), encapsulate([bytes(stream)]))


def read(path: Path) -> np.ndarray:
    """Return rows × columns, or rows × columns × 3."""
    voxels = read_image(path).numpy()[..., 0]
    return voxels[0].T if len(voxels) == 1 else voxels.transpose(2, 1, 0)


def picture(bits: int, signed: bool = False) -> np.ndarray:
    """Return a smooth picture with noise that uses all the bits there are, its ends included."""
    rng = np.random.default_rng(bits)
    ramp = np.add.outer(np.arange(40), np.arange(33)) / 71 * 2**bits + rng.normal(0, 2**bits / 50, (40, 33))
    values = np.clip(np.rint(ramp), 0, 2**bits - 1).astype(np.int64)
    values[0, :2] = 0, 2**bits - 1
    values -= 2 ** (bits - 1) if signed else 0
    return values.astype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")


COLORS = np.random.default_rng(5).integers(0, 256, (12, 10, 3), dtype=np.uint8).repeat(3, 0).repeat(3, 1)


# ------------------------------------------------------------------------------------------------ not compressed


@pytest.mark.parametrize("syntax", [*NATIVE, uid.RLELossless], ids=lambda s: s.keyword)
@given(data=st.data())
def test_what_is_written_is_read(syntax, data):
    kinds = ["u1", "i1", "u2", "i2"] + ([] if syntax == uid.RLELossless else ["u4", "i4"])  # pydicom writes no more
    dtype = np.dtype(data.draw(st.sampled_from(kinds)))
    limits = np.iinfo(dtype)
    low, high = max(limits.min, -(2**24)), min(limits.max, 2**24)  # what float32 holds
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    values = data.draw(hnp.arrays(dtype, shape, elements=st.integers(low, high)))
    ds = header(shape, dtype, syntax)
    order = "<" if syntax.is_little_endian else ">"
    raw = values.astype(dtype.newbyteorder(order)).tobytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.dcm"
        if syntax == uid.RLELossless:
            ds.compress(syntax, values, encoding_plugin="pydicom")
            pydicom.dcmwrite(path, ds, enforce_file_format=True)
        else:
            write(path, ds, raw + b"\0" * (len(raw) % 2))
        np.testing.assert_array_equal(read(path), values)


@given(
    bits=st.integers(1, 16),
    signed=st.booleans(),
    values=hnp.arrays(np.uint16, (4, 5)),
    syntax=st.sampled_from([*NATIVE, uid.RLELossless]),
)
def test_bits_beside_the_stored_ones_are_no_part_of_a_value(bits, signed, values, syntax):
    # The value in the lowest bits, an overlay or rubbish above. By hand: mask, then subtract 2^bits where the sign is.
    ds = header(values.shape, "i2" if signed else "u2", syntax, stored=bits)
    expected = (values & (2**bits - 1)).astype(np.int64)
    if signed:
        expected[expected >= 2 ** (bits - 1)] -= 2**bits
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.dcm"
        if syntax == uid.RLELossless:
            ds.BitsStored = 16  # pydicom refuses to write what the test is about
            ds.compress(syntax, values.astype("<i2" if signed else "<u2"), encoding_plugin="pydicom")
            ds.BitsStored = bits
            pydicom.dcmwrite(path, ds, enforce_file_format=True)
        else:
            write(path, ds, values.astype("<u2" if syntax.is_little_endian else ">u2").tobytes())
        np.testing.assert_array_equal(read(path), expected)


@given(values=hnp.arrays(np.uint16, (3, 4), elements=st.integers(0, 4095)))
def test_values_in_the_upper_bits(values):
    ds = header(values.shape, "u2", stored=12)
    ds.HighBit = 15
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "x.dcm", ds, (values << 4).astype("<u2").tobytes())
        np.testing.assert_array_equal(read(path), values)
        ds.PixelData = ((values << 4) | 1).astype("<u2").tobytes()
        pydicom.dcmwrite(path, ds, enforce_file_format=True)
        with pytest.raises(ReadError, match=r"HighBit \(0028,0102\) 15 with BitsStored \(0028,0101\) 12"):
            read(path)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("allocated", "stored"), [(8, 8), (8, 5), (16, 16), (16, 12), (32, 32), (32, 20)])
def test_the_fast_way_equals_the_decoder_of_pydicom(tmp_path, allocated, stored, signed):
    rng = np.random.default_rng(stored)
    frames = rng.integers(0, 2**allocated, (3, 7, 6), dtype=f"u{allocated // 8}")
    ds = header(frames.shape[1:], f"{'i' if signed else 'u'}{allocated // 8}", stored=stored)
    ds.NumberOfFrames = 3
    path = write(tmp_path / "x.dcm", ds, frames.tobytes())
    with quiet():
        item = read_instance(path, pixels=True)
        ours = list(decode(item, [0, 2]))
        theirs = [pixels for pixels, _ in get_decoder(uid.ExplicitVRLittleEndian).iter_array(ds, indices=[0, 2])]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        np.testing.assert_array_equal(mine, other)


def test_bytes_written_as_big_endian_words(tmp_path):
    values = np.arange(15, dtype=np.uint8).reshape(3, 5)
    ds = header(values.shape, "u1", uid.ExplicitVRBigEndian)
    swapped = np.frombuffer(values.tobytes() + b"\0", "<u2").astype(">u2").tobytes()
    write(tmp_path / "x.dcm", ds, swapped)
    ds["PixelData"].VR = "OW"
    pydicom.dcmwrite(tmp_path / "x.dcm", ds, enforce_file_format=True)
    np.testing.assert_array_equal(read(tmp_path / "x.dcm"), values)


@pytest.mark.parametrize("syntax", NATIVE[:3], ids=lambda s: s.keyword)
def test_without_file_meta_the_header_tells_how_it_is_written(tmp_path, syntax):
    values = np.arange(12, dtype=np.int16).reshape(3, 4)
    ds = header(values.shape, "i2")
    ds.PixelData = values.astype("<i2" if syntax.is_little_endian else ">i2").tobytes()
    ds["PixelData"].VR = "OW"
    del ds.file_meta
    pydicom.dcmwrite(tmp_path / "x.dcm", ds, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    np.testing.assert_array_equal(read(tmp_path / "x.dcm"), values)


def test_a_file_meta_without_transfer_syntax(tmp_path):
    values = np.arange(12, dtype=np.int16).reshape(3, 4)
    ds = header(values.shape, "i2")
    ds.PixelData = values.tobytes()
    ds["PixelData"].VR = "OW"
    del ds.file_meta.TransferSyntaxUID
    with (tmp_path / "x.dcm").open("wb") as file:
        file.write(b"\0" * 128 + b"DICM")
        pydicom.filewriter.write_file_meta_info(file, ds.file_meta, enforce_standard=False)
        del ds.file_meta
        pydicom.dcmwrite(file, ds, implicit_vr=False, little_endian=True)
    np.testing.assert_array_equal(read(tmp_path / "x.dcm"), values)


# ---------------------------------------------------------------------------------------------------- compressed


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize(
    ("syntax", "predictor"), [(uid.JPEGLosslessSV1, 1), *((uid.JPEGLossless, n) for n in range(1, 8))]
)
def test_lossless_jpeg(tmp_path, syntax, predictor, bits, signed):
    values = picture(bits, signed)
    raw = values.view(f"u{values.itemsize}") & ((1 << bits) - 1)  # JPEG has no sign: two's complement
    stream = imagecodecs.jpeg8_encode(raw, lossless=True, predictor=predictor, bitspersample=bits)
    path = compressed(tmp_path / "x.dcm", stream, values.shape, values.dtype, syntax, bits)
    np.testing.assert_array_equal(read(path), values)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_lossless_jpeg_ls(tmp_path, bits, signed):
    values = picture(bits, signed)
    raw = values.view(f"u{values.itemsize}") & ((1 << bits) - 1)
    stream = jpeg_ls.encode_array(raw)
    path = compressed(tmp_path / "x.dcm", stream, values.shape, values.dtype, uid.JPEGLSLossless, bits)
    np.testing.assert_array_equal(read(path), values)


@pytest.mark.parametrize("bits", [8, 12])
def test_near_lossless_jpeg_ls_is_as_near_as_it_says(tmp_path, bits):
    values = picture(bits)
    stream = imagecodecs.jpegls_encode(values, level=3)
    path = compressed(tmp_path / "x.dcm", stream, values.shape, values.dtype, uid.JPEGLSNearLossless, bits)
    error = np.abs(read(path) - values.astype(float))
    assert 0 < error.max() <= 3


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("syntax", [uid.JPEG2000Lossless, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL])
def test_lossless_jpeg_2000(tmp_path, syntax, bits, signed):
    values = picture(bits, signed)
    if syntax == uid.JPEG2000Lossless:
        stream = imagecodecs.jpeg2k_encode(values, codecformat="J2K", bitspersample=bits, reversible=True)
    else:
        stream = imagecodecs.htj2k_encode(values, reversible=True)  # OpenJPH; OpenJPEG reads
    path = compressed(tmp_path / "x.dcm", stream, values.shape, values.dtype, syntax, bits)
    np.testing.assert_array_equal(read(path), values)


def test_jpeg_2000_whose_encoder_forgot_the_sign(tmp_path):
    values = picture(13, signed=True)
    stream = imagecodecs.jpeg2k_encode(values.view("u2") & 0x1FFF, codecformat="J2K", bitspersample=13, reversible=True)
    path = compressed(tmp_path / "x.dcm", stream, values.shape, "i2", uid.JPEG2000Lossless, 13)
    np.testing.assert_array_equal(read(path), values)


@pytest.mark.parametrize("syntax", [uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless])
def test_fewer_bits_than_stored_leave_the_sign_open(tmp_path, syntax):
    values = picture(12)
    encode = {
        uid.JPEGLosslessSV1: lambda v: imagecodecs.jpeg8_encode(v, lossless=True, predictor=1, bitspersample=12),
        uid.JPEGLSLossless: lambda v: jpeg_ls.encode_pixel_data(
            v.tobytes(), rows=40, columns=33, samples_per_pixel=1, bits_allocated=16, bits_stored=12
        ),
        uid.JPEG2000Lossless: lambda v: imagecodecs.jpeg2k_encode(
            v, codecformat="J2K", bitspersample=12, reversible=True
        ),
    }[syntax]
    small = compressed(tmp_path / "s.dcm", encode(values // 2), values.shape, "i2", syntax, 16)
    np.testing.assert_array_equal(read(small), values // 2)
    large = compressed(tmp_path / "l.dcm", encode(values), values.shape, "i2", syntax, 16)
    with pytest.raises(ReadError, match="whether its large values are negative is unknown"):
        read(large)


def test_lossy_gray(tmp_path):
    from io import BytesIO

    from PIL import Image

    smooth = (np.add.outer(np.arange(40), np.arange(33)) * 3).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(smooth).save(file, "JPEG", quality=80)
    path = compressed(tmp_path / "8.dcm", file.getvalue(), smooth.shape, "u1", uid.JPEGBaseline8Bit)
    np.testing.assert_array_equal(read(path), np.asarray(Image.open(file)))
    deep = smooth.astype(np.uint16) * 16
    path = compressed(
        tmp_path / "12.dcm",
        imagecodecs.jpeg8_encode(deep, level=98, bitspersample=12),
        deep.shape,
        "u2",
        uid.JPEGExtended12Bit,
        12,
    )
    assert np.abs(read(path) - deep).max() < 16
    path = compressed(
        tmp_path / "j2k.dcm",
        imagecodecs.jpeg2k_encode(deep, level=50, codecformat="J2K", bitspersample=12),
        deep.shape,
        "u2",
        uid.JPEG2000,
        12,
    )
    assert np.abs(read(path) - deep).max() < 128


@pytest.mark.parametrize(
    ("syntax", "color", "encode"),
    [
        (uid.JPEGLosslessSV1, "RGB", lambda c: imagecodecs.jpeg8_encode(c, lossless=True, predictor=1)),
        (uid.JPEGLSLossless, "RGB", imagecodecs.jpegls_encode),
        (uid.JPEG2000Lossless, "YBR_RCT", lambda c: imagecodecs.jpeg2k_encode(c, codecformat="J2K", reversible=True)),
        (
            uid.JPEG2000Lossless,
            "RGB",
            lambda c: imagecodecs.jpeg2k_encode(c, codecformat="J2K", reversible=True, mct=False),
        ),
        (uid.HTJ2KLossless, "YBR_RCT", lambda c: imagecodecs.htj2k_encode(c, reversible=True)),
    ],
)
def test_lossless_color(tmp_path, syntax, color, encode):
    path = compressed(tmp_path / "x.dcm", encode(COLORS), COLORS.shape, "u1", syntax, color=color)
    np.testing.assert_array_equal(read(path), COLORS)


@pytest.mark.parametrize("interleave", [0, 1, 2])
def test_jpeg_ls_color_by_plane_line_and_sample(tmp_path, interleave):
    source = COLORS if interleave else np.ascontiguousarray(COLORS.transpose(2, 0, 1))
    stream = jpeg_ls.encode_array(source, interleave_mode=interleave)
    path = compressed(tmp_path / "x.dcm", stream, COLORS.shape, "u1", uid.JPEGLSLossless, color="RGB")
    np.testing.assert_array_equal(read(path), COLORS)


RED = np.broadcast_to(np.array([254, 0, 0], np.uint8), (16, 16, 3))


@pytest.mark.parametrize(
    ("color", "space", "marks"),
    [
        ("YBR_FULL_422", "YCBCR", b"\xff\xe0"),  # what everybody writes: JFIF
        ("RGB", "YCBCR", b"\xff\xe0"),  # the header is wrong, the JFIF marker right
        ("RGB", "RGB", b"\xff\xee"),  # an Adobe marker without transformation
        ("YBR_FULL", "RGB", b"\xff\xee"),  # the header is wrong, the Adobe marker right
    ],
)
def test_jpeg_color_is_what_the_stream_says(tmp_path, color, space, marks):
    stream = imagecodecs.jpeg8_encode(np.ascontiguousarray(RED), level=98, colorspace="RGB", outcolorspace=space)
    assert marks in stream[:64]
    path = compressed(tmp_path / "x.dcm", stream, RED.shape, "u1", uid.JPEGBaseline8Bit, color=color)
    assert np.abs(read(path) - RED).max() <= 2


ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"


@pytest.mark.parametrize(
    ("color", "marker", "converted"),
    [
        ("RGB", b"", False),
        ("YBR_FULL", b"", True),
        ("RGB", ADOBE + b"\x01", True),  # the stream has been transformed to YCbCr
        ("YBR_FULL", ADOBE + b"\x00", False),  # it has not
        ("YBR_FULL", b"\xff\xee\x00\x07Adobe", True),  # half a marker says nothing
    ],
)
def test_jpeg_color_is_what_the_header_says_where_the_stream_is_silent(tmp_path, color, marker, converted):
    stream = imagecodecs.jpeg8_encode(np.ascontiguousarray(RED), level=98, outcolorspace="YCBCR")
    assert stream[2:4] == b"\xff\xe0"
    silent = stream[:2] + marker + stream[4 + int.from_bytes(stream[4:6], "big") :]
    path = compressed(tmp_path / "x.dcm", silent, RED.shape, "u1", uid.JPEGBaseline8Bit, color=color)
    # (254, 0, 0) is Y = 0.299 · 254 = 76, Cb = 128 − 0.1687 · 254 = 85, Cr = 128 + 0.5 · 254 = 255.
    expected = RED if converted else np.broadcast_to([76, 85, 255], RED.shape)
    assert np.abs(read(path) - expected).max() <= 2


# --------------------------------------------------------------------------------------------- frames, fragments

FRAMES = np.random.default_rng(3).integers(0, 4096, (4, 20, 18), dtype=np.uint16)


@pytest.mark.parametrize("table", ["none", "basic", "extended"])
@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("syntax", [uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.JPEGLosslessSV1, uid.RLELossless])
def test_frames_in_fragments_with_and_without_offset_table(tmp_path, syntax, fragments, table):
    if fragments > 1 and (table == "extended" or syntax == uid.RLELossless):
        pytest.skip("the standard allows one fragment per frame here")
    ds = header(FRAMES.shape[1:], "u2", syntax, 12)
    ds.NumberOfFrames = len(FRAMES)
    encode = {
        uid.JPEGLSLossless: imagecodecs.jpegls_encode,
        uid.JPEG2000Lossless: lambda v: imagecodecs.jpeg2k_encode(v, codecformat="J2K", reversible=True),
        uid.JPEGLosslessSV1: lambda v: imagecodecs.jpeg8_encode(v, lossless=True, predictor=1, bitspersample=12),
        uid.RLELossless: lambda v: pydicom.pixels.get_encoder(uid.RLELossless).encode(
            v.tobytes(),
            rows=20,
            columns=18,
            samples_per_pixel=1,
            bits_allocated=16,
            bits_stored=12,
            pixel_representation=0,
            photometric_interpretation="MONOCHROME2",
            number_of_frames=1,
            encoding_plugin="pydicom",
        ),
    }[syntax]
    streams = [bytes(encode(frame)) for frame in FRAMES]
    if table == "extended":
        data, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = encapsulate_extended(streams)
    else:
        data = encapsulate(streams, fragments_per_frame=fragments, has_bot=table == "basic")
    path = write(tmp_path / "x.dcm", ds, data)
    with quiet():
        item = read_instance(path, pixels=True)
        for wanted in ([0, 1, 2, 3], [2], [1, 3]):
            np.testing.assert_array_equal(list(decode(item, wanted)), FRAMES[wanted])


# ------------------------------------------------------------------------------------------------------ bad input


def refused(path: Path, match: str) -> None:
    with pytest.raises(MedsegError, match=match) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert NAME not in message
    assert PATIENT not in message


JLS = bytes(jpeg_ls.encode_array(picture(12)))


def test_a_stream_of_another_size_than_the_header_is_refused_before_it_is_decoded(tmp_path):
    path = compressed(tmp_path / "x.dcm", JLS, (40, 34), "u2", uid.JPEGLSLossless, 12)
    refused(path, "a compressed frame of 40 rows, 33 columns and 1 samples; the header says 40, 34 and 1")
    path = compressed(tmp_path / "x.dcm", JLS, (40, 33), "u1", uid.JPEGLSLossless, 8)
    refused(path, r"a compressed frame of 12 bits, BitsAllocated \(0028,0100\) is 8")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("syntax", ["jpeg", "lossless", "jls", "j2k", "rle"])
def test_a_stream_cut_short_is_never_filled_with_gray(tmp_path, syntax, keep):
    values = picture(8)
    kind, stream = {
        "jpeg": (uid.JPEGBaseline8Bit, imagecodecs.jpeg8_encode(values, level=95)),
        "lossless": (uid.JPEGLosslessSV1, imagecodecs.jpeg8_encode(values, lossless=True, predictor=1)),
        "jls": (uid.JPEGLSLossless, imagecodecs.jpegls_encode(values)),
        "j2k": (uid.JPEG2000Lossless, imagecodecs.jpeg2k_encode(values, codecformat="J2K", reversible=True)),
        "rle": (
            uid.RLELossless,
            b"\1\0\0\0\x40"
            + b"\0" * 59
            + b"".join(b"\x7f" + values.ravel()[i : i + 128].tobytes() for i in range(0, 1280, 128))
            + b"\x27"
            + values.ravel()[1280:].tobytes(),
        ),
    }[syntax]
    path = compressed(tmp_path / "x.dcm", stream, values.shape, "u1", kind)
    if syntax != "jpeg":
        np.testing.assert_array_equal(read(path), values)
    path = compressed(tmp_path / "x.dcm", stream[: int(len(stream) * keep)], values.shape, "u1", kind)
    refused(path, "cut short|cannot be decoded|damaged")


def test_a_transfer_syntax_that_contradicts_the_pixels(tmp_path):
    path = write(tmp_path / "a.dcm", header((40, 33), "u2", uid.ExplicitVRLittleEndian, 12), b"")
    ds = header((40, 33), "u2", uid.JPEGLSLossless, 12)
    ds.PixelData = encapsulate([JLS] * 4)  # more bytes than the pixels would need
    ds["PixelData"].is_undefined_length = True
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
    content = path.read_bytes().replace(b"1.2.840.10008.1.2.4.80", b"1.2.840.10008.1.2.1\0\0\0")
    path.write_bytes(content)
    refused(path, "its pixels are compressed, but its transfer syntax is Explicit VR Little Endian")
    path = write(tmp_path / "b.dcm", header((40, 33), "u2"), picture(12).tobytes())
    content = path.read_bytes()
    longer = content.replace(b"UI\x14\x001.2.840.10008.1.2.1\0", b"UI\x16\x001.2.840.10008.1.2.4.80")
    at = content.index(b"\2\0\0\0UL\4\0") + 8
    length = int.from_bytes(content[at : at + 4], "little") + 2
    path.write_bytes(longer[:at] + length.to_bytes(4, "little") + longer[at + 4 :])
    refused(path, "its pixels are not compressed, but its transfer syntax is JPEG-LS Lossless")


def test_a_video_and_an_unknown_syntax_are_named(tmp_path):
    path = compressed(tmp_path / "x.dcm", b"\0" * 100, (4, 4), "u1", uid.MPEG2MPML)
    refused(path, "no decoder for MPEG2 Main Profile / Main Level")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"1.2.840.10008.1.2.4.100", b"1.2.840.10008.1.2.4.999"))
    refused(path, r"no decoder for 1\.2\.840\.10008\.1\.2\.4\.999")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"BitsStored": 17}, "BitsStored 17"),
        ({"BitsAllocated": 12}, "BitsAllocated 12"),
        ({"HighBit": 3}, "HighBit 3"),
        ({"PixelRepresentation": 2}, "PixelRepresentation 2"),
        ({"PixelRepresentation": None}, r"PixelRepresentation \(0028,0103\) is missing"),
        ({"PhotometricInterpretation": None}, r"PhotometricInterpretation \(0028,0004\) is missing"),
        ({"PhotometricInterpretation": "RGB"}, r"RGB with SamplesPerPixel \(0028,0002\) 1"),
        (
            {"PhotometricInterpretation": "DOE JANE"},
            r"\(0028,0004\) of an unknown kind with .* expected one of MONOCHROME1",
        ),
        ({"PixelData": b"\0" * 10}, "cut short: its header promises 24 bytes of pixels, it has 10"),
    ],
)
def test_a_header_that_does_not_fit_its_pixels(tmp_path, change, match):
    ds = header((3, 4), "u2")
    ds.PixelData = np.zeros((3, 4), "u2").tobytes()
    for keyword, value in change.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    ds["PixelData"].VR = "OW"
    pydicom.dcmwrite(tmp_path / "x.dcm", ds, enforce_file_format=True)
    with pytest.raises(MedsegError, match=match) as error:
        read(tmp_path / "x.dcm")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("color", ["YBR_RCT", "YBR_PARTIAL_422", "CMYK", "MONOCHROME2", "PALETTE COLOR"])
def test_three_samples_of_no_known_color_are_refused(tmp_path, color):
    path = write(tmp_path / "x.dcm", header(COLORS.shape, "u1", color=color), COLORS.tobytes())
    refused(path, f"{color} with SamplesPerPixel .* 3: expected one of RGB, YBR_FULL, YBR_FULL_422")


DAMAGE = """
import random, resource, sys
from pathlib import Path
import numpy as np
from medseg.errors import MedsegError
from medseg.io.dicom_header import quiet, read_instance
from medseg.io.dicom_pixels import decode
from pydicom.encaps import encapsulate, get_frame

resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
rng = random.Random(7)
for name in sys.argv[1:]:
    with quiet():
        item = read_instance(Path(name), pixels=True)
        stream = get_frame(item.dataset.PixelData, 0, number_of_frames=1)
        list(decode(item, [0]))
        for _ in range(150):
            damaged = bytearray(stream)
            for _ in range(rng.randrange(1, 9)):
                damaged[rng.randrange(min(len(damaged), rng.choice((60, 200, 10**6))))] = rng.randrange(256)
            damaged = damaged[: rng.randrange(1, len(damaged))] if rng.random() < 0.2 else damaged
            item.dataset.PixelData = encapsulate([bytes(damaged)])
            item.dataset["PixelData"].is_undefined_length = True
            try:
                list(decode(item, [0]))
            except MedsegError as error:
                assert str(error).isprintable(), error
print("all done")
"""


def test_no_damaged_stream_ends_the_process(tmp_path):
    values, gray = picture(12), picture(8)
    streams = {
        uid.JPEGBaseline8Bit: imagecodecs.jpeg8_encode(gray, level=90),
        uid.JPEGExtended12Bit: imagecodecs.jpeg8_encode(values, level=90, bitspersample=12),
        uid.JPEGLosslessSV1: imagecodecs.jpeg8_encode(values, lossless=True, predictor=1, bitspersample=12),
        uid.JPEGLSLossless: JLS,
        uid.JPEG2000: imagecodecs.jpeg2k_encode(values, level=60, codecformat="J2K"),
        uid.HTJ2KLossless: imagecodecs.htj2k_encode(values, reversible=True),
    }
    files = [
        compressed(
            tmp_path / syntax.keyword, stream, values.shape, "u1" if syntax == uid.JPEGBaseline8Bit else "u2", syntax
        )
        for syntax, stream in streams.items()
    ]
    rle = header(values.shape, "u2")
    rle.compress(uid.RLELossless, values, encoding_plugin="pydicom")
    pydicom.dcmwrite(tmp_path / "rle", rle, enforce_file_format=True)
    child = subprocess.run(
        [sys.executable, "-c", DAMAGE, *map(str, files), str(tmp_path / "rle")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (child.returncode, child.stdout) == (0, "all done\n"), child.stderr[-2000:]


# ------------------------------------------------------------------------------------------------------ real data


# Decoders that share no code with the one that reads, or are another build of it at least.
OTHERS = {
    uid.JPEGBaseline8Bit: "pillow",
    uid.JPEGLosslessSV1: "gdcm",
    uid.JPEGLSLossless: "gdcm",
    uid.JPEGLSNearLossless: "gdcm",
    uid.JPEG2000Lossless: "pylibjpeg",
    uid.JPEG2000: "pylibjpeg",
    uid.RLELossless: "pydicom",
}


@pytest.mark.realdata
def test_real_compressed_files_against_other_decoders(data):
    compared = dict.fromkeys(OTHERS, 0)
    files = [
        p
        for part in ("odd/pydicom/test_files", "odd/highdicom/test_files", "dicom/mr_vendors/generic")
        for p in sorted((data / part).rglob("*.dcm"))
    ]
    with quiet():
        for path in files:
            try:
                item = read_instance(path, pixels=True)
            except ReadError:
                continue
            ds = item.dataset
            syntax = ds.file_meta.get("TransferSyntaxUID")
            if syntax not in OTHERS or "PixelData" not in ds or path.name == "JPEG2000-embedded-sequence-delimiter.dcm":
                continue
            count = int(ds.get("NumberOfFrames") or 1)
            frames = sorted({0, count // 2, count - 1})
            decoder = get_decoder(syntax)
            for frame, ours in zip(frames, decode(item, frames), strict=True):
                theirs = decoder.as_array(ds, index=frame, decoding_plugin=OTHERS[syntax])[0]
                np.testing.assert_array_equal(ours, theirs, err_msg=f"{path.name} frame {frame}")
                compared[syntax] += 1
    assert all(compared.values()), compared


@pytest.mark.realdata
def test_values_that_the_tests_of_pydicom_expect(data):
    folder = data / "odd/pydicom/test_files"
    for name in ("JPGExtended.dcm", "JPEG-lossy.dcm"):  # 12 bits
        image = read(folder / name)
        assert (image[420, 140], image[230, 120]) == (244, 95)
    image = read(folder / "J2K_pixelrep_mismatch.dcm")
    assert image[47:57, 279].tolist() == [621, 412, 138, -193, -520, -767, -907, -966, -988, -995]
    assert read(folder / "GDCMJ2K_TextGBR.dcm")[45, 140].tolist() == [
        223,
        32,
        32,
    ]  # a JP2 file in the place of a stream
    image = read(folder / "SC_rgb_rle_32bit.dcm")
    assert image[75, 50].tolist() == [np.float32(1077952576)] * 3


@pytest.mark.realdata
def test_compressed_files_equal_their_uncompressed_twins(data):
    folder = data / "odd/pydicom/test_files"
    for plain, others in {
        "MR_small.dcm": (
            *("MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_expb.dcm", "MR_small_implicit.dcm"),
            *("MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_padded.dcm"),
        ),
        "SC_rgb_small_odd.dcm": ("SC_rgb_small_odd_big_endian.dcm",),
        "SC_rgb_rle.dcm": ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb_gdcm_KY.dcm"),
    }.items():
        for other in others:
            np.testing.assert_array_equal(read(folder / plain), read(folder / other), err_msg=other)
    generic = data / "dicom/mr_vendors/generic"
    series = [
        sorted((generic / f"compressed{kind}/001").glob("*.dcm")) for kind in ("", "_jpeg", "_jpegls", "_j2k", "_rle")
    ]
    assert all(series)
    for same in zip(*series, strict=True):
        for other in same[1:]:
            np.testing.assert_array_equal(read(same[0]), read(other), err_msg=str(other))
