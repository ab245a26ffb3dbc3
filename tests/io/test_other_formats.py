import gzip
import zlib

import imagecodecs
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from medseg.errors import GeometryError, ReadError
from medseg.io import find_series, read_image, read_label

HEADER = "ObjectType = Image\nNDims = 3\nDimSize = {size}\nElementType = MET_SHORT\nElementDataFile = {file}\n"


@pytest.fixture
def volume():
    """An oblique image of 4 × 5 × 6 voxels with two components, as SimpleITK holds it."""
    array = np.arange(6 * 5 * 4 * 2, dtype=np.int16).reshape(6, 5, 4, 2)
    image = sitk.GetImageFromArray(array, isVector=True)
    image.SetSpacing((2, 1.5, 3))
    image.SetOrigin((1, 2, 3))
    image.SetDirection((0.8, 0, -0.6, 0, 1, 0, 0.6, 0, 0.8))
    return image, array


@pytest.mark.parametrize("name", ["a.mhd", "a.mha", "a.nrrd"])
@pytest.mark.parametrize("compressed", [False, True])
def test_oblique_images_with_components(tmp_path, volume, name, compressed):
    image, array = volume
    sitk.WriteImage(image, str(tmp_path / name), useCompression=compressed)
    read = read_image(tmp_path / name)
    np.testing.assert_array_equal(read.numpy(), array.transpose(3, 2, 1, 0))
    affine = [[-1.6, 0, 1.8, -1], [0, -1.5, 0, -2], [1.2, 0, 2.4, 3], [0, 0, 0, 1]]
    np.testing.assert_allclose(read.affine.numpy(), affine, atol=1e-6)
    (series,) = find_series(tmp_path)
    assert (series.shape, series.channels) == ((4, 5, 6), 2)
    np.testing.assert_allclose(series.affine, affine, atol=1e-6)


@pytest.mark.parametrize("name", ["a.mhd", "a.mha", "a.nrrd"])
@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_damaged_compressed_voxels_are_noticed(tmp_path, name, damage):
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 9, (20, 20, 20)).astype(np.int16))
    sitk.WriteImage(image, str(tmp_path / name), useCompression=True)
    data = tmp_path / ("a.zraw" if name == "a.mhd" else name)
    content = bytearray(data.read_bytes())
    if damage == "cut":
        del content[-400:]
    else:
        content[-900] ^= 0xFF
    data.write_bytes(content)
    with pytest.raises(ReadError, match=r"damaged|cannot be read"):
        read_image(tmp_path / name)


def test_a_flat_image_keeps_its_spacing(tmp_path):
    image = sitk.GetImageFromArray(np.ones((5, 4), np.uint8))
    image.SetSpacing((2, 3))
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    read = read_image(tmp_path / "a.mha")
    assert read.shape == (1, 4, 5)
    assert read.affine.diag().tolist() == [-2, -3, 1, 1]


def test_float_masks_are_left_as_they_are(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.full((3, 3, 3), 0.99999997, np.float64)), str(tmp_path / "a.mha"))
    assert read_image(tmp_path / "a.mha").numpy()[0, 0, 0, 0] == np.float32(0.99999997)


@pytest.mark.parametrize(
    ("size", "data", "match"),
    [
        ("4 4 4", None, r"'a\.raw' is absent"),
        ("4 4 4", b"\0" * 100, r"'a\.raw' is too small: 100 bytes, the header promises at least 128"),
        ("4 4 4", b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        ("60000 60000 60000", b"\0" * 100, "too small"),
        ("4 4", b"\0" * 128, "NDims 3"),
        ("4 4 x", b"\0" * 128, "not a whole number"),
        ("4 4 4", b"\0" * 136, "holds 8 bytes more than DimSize"),
        ("0 4 4", b"\0" * 128, "do not fit"),
    ],
)
def test_an_mhd_whose_voxels_are_not_there(tmp_path, size, data, match):
    (tmp_path / "a.mhd").write_text(HEADER.format(size=size, file="a.raw"))
    if data is not None:
        (tmp_path / "a.raw").write_bytes(data)
    with pytest.raises(ReadError, match=match) as error:
        read_image(tmp_path / "a.mhd")
    assert str(tmp_path / "a.mhd") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "file",
    [
        "../secret.raw",
        "/etc/passwd",
        "LIST",
        "LIST\n../secret.raw\n" + "a\n" * 3,
        "%d/../../secret.raw 1 4 1",
        "x" * 2000,
    ],
)
def test_a_header_reaches_no_file_elsewhere(tmp_path, file):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.raw").write_bytes(b"\0" * 128)
    (tmp_path / "in" / "a.mhd").write_text(HEADER.format(size="4 4 4", file=file))
    with pytest.raises(ReadError, match="expected"):
        read_image(tmp_path / "in" / "a.mhd")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(
        [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.int64, np.float32, np.float64]
    ),
    size=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    components=st.integers(1, 3),
    spacing=st.tuples(*[st.floats(0.1, 9)] * 4),
    origin=st.tuples(*[st.floats(-500, 500)] * 4),
    angle=st.floats(-3, 3),
    name=st.sampled_from(["a.mhd", "a.mha", "a.nrrd"]),
    compressed=st.booleans(),
)
def test_images_are_as_simpleitk_holds_them(tmp_path, kind, size, components, spacing, origin, angle, name, compressed):
    count = len(size)
    array = np.random.default_rng(0).integers(0, 99, [*size[::-1], components]).astype(kind)
    image = sitk.GetImageFromArray(array, isVector=True)
    direction = np.eye(count)
    direction[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    image.SetSpacing(spacing[:count])
    image.SetOrigin(origin[:count])
    image.SetDirection(direction.ravel())
    sitk.WriteImage(image, str(tmp_path / name), useCompression=compressed)
    read = read_image(tmp_path / name)
    # Times before components, as [X, Y, Z, T, C] in C order.
    expected = array.transpose(*range(count - 1, -1, -1), count).reshape(*size[:3], -1)
    np.testing.assert_array_equal(read.numpy(), np.moveaxis(expected, -1, 0))
    axes = min(count, 3)
    for index in np.ndindex(*[2] * axes):
        there = np.array(image.TransformIndexToPhysicalPoint([*index, *[0] * (count - axes)])[:axes])
        there[:2] *= -1
        np.testing.assert_allclose((read.affine.numpy() @ [*index, *[0] * (3 - axes), 1])[:axes], there, atol=1e-6)


VOXELS = np.arange(60, dtype="<i2").reshape(5, 4, 3)  # z, y, x
PLAIN = np.diag([-2.0, -1.5, 3, 1])
TURNED = np.array([[-1.6, 0.9, 0, 0], [-1.2, -1.2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])  # axes (.8, .6), (-.6, .8), LPS
MOVED = PLAIN + np.array([[0, 0, 0, -1], [0, 0, 0, -2], [0, 0, 0, 3], [0, 0, 0, 0]])


def write_meta(folder, lines="", raw=None, file="a.raw", type="MET_SHORT", spacing="ElementSpacing = 2 1.5 3\n"):
    head = f"ObjectType = Image\nNDims = 3\nDimSize = 3 4 5\nElementType = {type}\n{spacing}{lines}"
    (folder / "a.mhd").write_bytes(f"{head}ElementDataFile = {file}\n".encode())
    if raw is not None:
        (folder / "a.raw").write_bytes(raw)
    return folder / "a.mhd"


@pytest.mark.parametrize(
    ("lines", "raw", "affine"),
    [
        ("", VOXELS.tobytes(), PLAIN),
        ("BinaryDataByteOrderMSB = True\n", VOXELS.byteswap().tobytes(), PLAIN),
        ("ElementByteOrderMSB = True\n", VOXELS.byteswap().tobytes(), PLAIN),
        ("Offset = 1 2 3\n", VOXELS.tobytes(), MOVED),
        ("Position = 1 2 3\n", VOXELS.tobytes(), MOVED),
        ("Origin = 1 2 3\n", VOXELS.tobytes(), MOVED),
        ("TransformMatrix = .8 .6 0 -.6 .8 0 0 0 1\n", VOXELS.tobytes(), TURNED),
        ("Rotation = .8 .6 0 -.6 .8 0 0 0 1\n", VOXELS.tobytes(), TURNED),
        ("Orientation = .8 .6 0 -.6 .8 0 0 0 1\n", VOXELS.tobytes(), TURNED),
        ("ElementSize = 9 9 9\n", VOXELS.tobytes(), PLAIN),
        ("HeaderSize = 7\n", b"1234567" + VOXELS.tobytes(), PLAIN),
        ("HeaderSize = -1\n", b"12345678901" + VOXELS.tobytes(), PLAIN),
        ("BinaryData = False\n", " ".join(map(str, VOXELS.ravel())).encode(), PLAIN),
        ("CompressedData = True\n", zlib.compress(VOXELS.tobytes()), PLAIN),
        ("CompressedData = True\n", gzip.compress(VOXELS.tobytes(), mtime=0), PLAIN),
        ("CompressedData = True\nCompressedDataSize = 9\n", zlib.compress(VOXELS.tobytes()), PLAIN),
        (
            "CompressedData = True\nBinaryDataByteOrderMSB = True\n",
            zlib.compress(VOXELS.byteswap().tobytes()),
            PLAIN,
        ),
    ],
)
def test_what_a_metaimage_may_say(tmp_path, lines, raw, affine):
    read = read_image(write_meta(tmp_path, lines, raw))
    np.testing.assert_array_equal(read.numpy()[0], VOXELS.T)
    np.testing.assert_allclose(read.affine.numpy(), affine, atol=1e-6)
    assert read.meta["problems"] == ""


@pytest.mark.parametrize(
    "change", [("\n", "\r\n"), (" = ", "="), (" = ", ":"), ("ObjectType = Image\nNDims = 3\n", "")]
)
def test_how_a_metaimage_may_be_written(tmp_path, change):
    path = write_meta(tmp_path, raw=VOXELS.tobytes())
    path.write_bytes(path.read_text().replace(*change).encode())
    np.testing.assert_array_equal(read_image(path).numpy()[0], VOXELS.T)
    np.testing.assert_allclose(read_image(path).affine.numpy(), PLAIN)


def test_the_keys_of_a_metaimage_in_another_order(tmp_path):
    path = write_meta(tmp_path, raw=VOXELS.tobytes())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[-2:-6:-1], lines[-1]]))
    np.testing.assert_array_equal(read_image(path).numpy()[0], VOXELS.T)


@pytest.mark.parametrize("file", ["LIST", "LIST 2", "s%03d.raw 0 4 1"])
def test_a_metaimage_of_one_file_per_slice(tmp_path, file):
    for i, plane in enumerate(VOXELS):
        (tmp_path / f"s{i:03}.raw").write_bytes(plane.tobytes())
    named = "".join(f"\ns{i:03}.raw" for i in range(5)) if file.startswith("LIST") else ""
    np.testing.assert_array_equal(read_image(write_meta(tmp_path, file=file + named)).numpy()[0], VOXELS.T)
    (tmp_path / "s003.raw").unlink()
    with pytest.raises(ReadError, match=r"'s003\.raw' is absent"):
        read_image(tmp_path / "a.mhd")


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("ElementToIntensityFunctionSlope = 2\n", "ElementToIntensityFunction is not applied"),
        ("", "no ElementSpacing"),
        ("ElementSpacing = 1 1 1\n", "2 bytes follow"),
    ],
)
def test_what_a_metaimage_leaves_in_doubt_is_told(tmp_path, lines, told):
    raw = VOXELS.tobytes() + (b"12" if "2 bytes" in told else b"")
    path = write_meta(tmp_path, lines, raw, spacing="" if "Spacing" in told + lines else "ElementSpacing = 2 1.5 3\n")
    read = read_image(path)
    np.testing.assert_array_equal(read.numpy()[0], VOXELS.T)
    assert told in read.meta["problems"]


@pytest.mark.parametrize(
    ("lines", "error", "match"),
    [
        ("Offset = 1 2 3\nPosition = 1 2 4\n", ReadError, "Offset and Position with different values"),
        ("BinaryDataByteOrderMSB = True\nElementByteOrderMSB = False\n", ReadError, "different values"),
        ("offset = 1 2 3\n", ReadError, "write Offset"),
        ("Offset = 1 2\n", ReadError, "expected 3 numbers"),
        ("ElementSpacing = 1 1 1\n", ReadError, "twice"),
        ("TransformMatrix = 1 0 0 1 0 0 0 0 1\n", GeometryError, "span space"),
        ("TransformMatrix = nan 0 0 0 1 0 0 0 1\n", GeometryError, "span space"),
        ("HeaderSize = -7\n", ReadError, "HeaderSize"),
        ("BinaryData = False\n", ReadError, "text"),
        ("CompressedData = True\n", ReadError, "damaged"),
    ],
)
def test_a_metaimage_that_contradicts_itself_is_refused(tmp_path, lines, error, match):
    path = write_meta(tmp_path, lines, VOXELS.tobytes())
    with pytest.raises(error, match=match) as caught:
        read_image(path)
    assert str(caught.value).isprintable()
    assert find_series(path)[0].problems or "text" in match or "damaged" in match


def write_nrrd(path, lines="", voxels=None, sizes="3 4 5", encoding="raw", type="short"):
    count = len(sizes.split())
    head = f"NRRD0004\ntype: {type}\ndimension: {count}\nsizes: {sizes}\nencoding: {encoding}\nendian: little\n{lines}"
    path.write_bytes(head.encode() + b"\n" + (VOXELS.tobytes() if voxels is None else voxels))
    return path


GRID = "space directions: (1.6,0,1.2) (0,1.5,0) (-1.8,0,2.4)\nspace origin: (1,2,3)\n"
IN_SPACE = np.array([[1.6, 0, -1.8, 1], [0, 1.5, 0, 2], [1.2, 0, 2.4, 3], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("right-anterior-superior", (1, 1, 1)),
        ("RAS", (1, 1, 1)),
        ("left-anterior-superior", (-1, 1, 1)),
        ("left-posterior-superior", (-1, -1, 1)),
        ("LPS", (-1, -1, 1)),
    ],
)
def test_the_space_of_an_oblique_nrrd(tmp_path, space, signs):
    read = read_image(write_nrrd(tmp_path / "a.nrrd", f"space: {space}\n{GRID}"))
    np.testing.assert_array_equal(read.numpy()[0], VOXELS.T)
    np.testing.assert_allclose(read.affine.numpy(), np.diag([*signs, 1]) @ IN_SPACE, atol=1e-9)
    assert read.meta["problems"] == ""


@pytest.mark.parametrize(
    ("lines", "told"),
    [("spacings: 2 1.5 3\n", "no space"), (f"space: scanner-xyz\n{GRID}", "'scanner-xyz', not the patient's")],
)
def test_an_nrrd_outside_the_patient_is_told(tmp_path, lines, told):
    read = read_image(write_nrrd(tmp_path / "a.nrrd", lines))
    assert told in read.meta["problems"]
    if "spacings" in lines:
        np.testing.assert_allclose(read.affine.numpy(), PLAIN)


@pytest.mark.parametrize(("units", "factor"), [('"mm" "mm" "mm"', 1), ('"um" "um" "um"', 1e-3), ('"m" "m" "m"', 1e3)])
def test_the_unit_of_an_nrrd(tmp_path, units, factor):
    read = read_image(write_nrrd(tmp_path / "a.nrrd", f"space: RAS\n{GRID}space units: {units}\n"))
    np.testing.assert_allclose(read.affine.numpy()[:3], IN_SPACE[:3] * factor)
    assert ("millimetre" in read.meta["problems"]) == (factor != 1)


@pytest.mark.parametrize(
    ("encoding", "voxels"),
    [
        ("gzip", gzip.compress(VOXELS.tobytes(), mtime=0)),
        ("ascii", " ".join(map(str, VOXELS.ravel())).encode()),
        ("hex", VOXELS.tobytes().hex().encode()),
    ],
)
def test_the_encodings_of_an_nrrd(tmp_path, encoding, voxels):
    path = write_nrrd(tmp_path / "a.nrrd", f"space: RAS\n{GRID}", voxels, encoding=encoding)
    np.testing.assert_array_equal(read_image(path).numpy()[0], VOXELS.T)


@pytest.mark.parametrize("lines", ["byte skip: -1\n", "line skip: 1\n"])
def test_the_detached_header_of_an_nrrd(tmp_path, lines):
    (tmp_path / "a.raw").write_bytes(b"a line\n" + VOXELS.tobytes())
    path = write_nrrd(tmp_path / "a.nhdr", f"space: RAS\n{GRID}{lines}data file: a.raw\n", b"")
    np.testing.assert_array_equal(read_image(path).numpy()[0], VOXELS.T)


@pytest.mark.parametrize(
    ("sizes", "kinds", "directions"),
    [
        ("2 3 4 5", "vector domain domain domain", "none (2,0,0) (0,1.5,0) (0,0,3)"),
        ("3 4 5 2", "domain domain domain list", "(2,0,0) (0,1.5,0) (0,0,3) none"),
    ],
)
def test_the_axis_of_an_nrrd_that_is_none_of_space_becomes_channels(tmp_path, sizes, kinds, directions):
    array = np.arange(120, dtype="<i2")
    lines = f"space: RAS\nspace directions: {directions}\nkinds: {kinds}\nspace origin: (0,0,0)\n"
    read = read_image(write_nrrd(tmp_path / "a.nrrd", lines, array.tobytes(), sizes))
    expected = array.reshape([int(n) for n in sizes.split()], order="F")
    np.testing.assert_array_equal(read.numpy(), expected if sizes[0] == "2" else np.moveaxis(expected, -1, 0))
    np.testing.assert_allclose(read.affine.numpy(), np.diag([2, 1.5, 3, 1]))


@pytest.mark.parametrize(
    ("lines", "voxels", "error", "match"),
    [
        (f"space: right-anterior-superior-time\n{GRID}", None, ReadError, "with time"),
        ("spacings: 2 1.5 nan\n", None, GeometryError, "axis 3 has none"),
        (f'space: RAS\n{GRID}space units: "mm" "mm" "furlong"\n', None, GeometryError, "units of length"),
        (f"space: RAS\n{GRID}", VOXELS.tobytes() + b"123456", ReadError, "6 bytes more than sizes"),
        (f"space: RAS\n{GRID}data file: ../a.raw\n", None, ReadError, "another folder"),
        (f"space: RAS\n{GRID}encoding: bzip2\n", None, ReadError, "bzip2"),
    ],
)
def test_an_nrrd_that_is_refused(tmp_path, lines, voxels, error, match):
    path = write_nrrd(tmp_path / "a.nrrd", lines, voxels)
    with pytest.raises(error, match=match):
        read_image(path)
    assert match in find_series(path)[0].problems[0]


def test_an_nrrd_cut_short(tmp_path, volume):
    sitk.WriteImage(volume[0], str(tmp_path / "a.nrrd"))
    content = (tmp_path / "a.nrrd").read_bytes()
    (tmp_path / "a.nrrd").write_bytes(content[:-50])
    with pytest.raises(ReadError, match="too small"):
        read_image(tmp_path / "a.nrrd")


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("I;16", 1), ("F", 1)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_pictures(tmp_path, mode, channels, suffix):
    if mode == "F" and suffix == ".png":
        pytest.skip("PNG holds no floating point")
    kind = {"I;16": np.uint16, "F": np.float32}.get(mode, np.uint8)
    array = np.arange(4 * 6 * channels).reshape(4, 6, channels).astype(kind) * (300 if kind == np.uint16 else 1)
    Image.fromarray(array.squeeze()).save(tmp_path / f"a{suffix}")
    image = read_image(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(image.numpy(), array.transpose(2, 1, 0))
    assert image.meta["has_geometry"] is False
    assert image.affine.tolist() == np.eye(4).tolist()


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_deep_color_keeps_its_bits(tmp_path, channels):
    array = (np.arange(24 * channels).reshape(4, 6, channels) * 500).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(array))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").numpy(), array.transpose(2, 1, 0))


def test_a_deep_tiff_in_color_is_refused(tmp_path):
    picture = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    picture.save(tmp_path / "a.tif")
    content = (tmp_path / "a.tif").read_bytes()
    eight, sixteen = (np.full(3, bits, "<u2").tobytes() for bits in (8, 16))
    assert eight in content
    (tmp_path / "a.tif").write_bytes(content.replace(eight, sixteen) + bytes(4 * 6 * 3))
    with pytest.raises(ReadError, match="16 bits per color"):
        read_image(tmp_path / "a.tif")


def test_the_orientation_that_a_camera_notes_is_told_and_not_followed(tmp_path):
    picture = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    exif = picture.getexif()
    exif[274] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png")
    assert image.shape == (1, 6, 4)
    assert "EXIF orientation 6 is not applied" in image.meta["problems"]


def test_a_picture_for_print_becomes_rgb(tmp_path):
    Image.new("CMYK", (6, 4), (255, 0, 0, 0)).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif")[:, 0, 0].tolist() == [0, 255, 255]


def test_a_decompression_bomb_is_refused(tmp_path):
    content = bytearray(imagecodecs.png_encode(np.zeros((4, 6), np.uint8)))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ReadError, match="pixels: not read"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("height", [21, 8_000_000])
def test_a_tiff_that_promises_rows_which_are_not_there(tmp_path, height):
    picture = Image.fromarray(np.full((20, 16), 9, np.uint8))
    picture.save(tmp_path / "a.tif")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    at = content.index(np.array([257], "<u2").tobytes() + np.array([4], "<u2").tobytes())  # ImageLength, LONG
    content[at + 8 : at + 12] = height.to_bytes(4, "little")
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ReadError, match=r"2 parts, of which 1|promises 16 × 8,000,000"):
        read_image(tmp_path / "a.tif")


def test_a_picture_is_told_by_its_content(tmp_path):
    Image.fromarray(np.full((4, 6), 7, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").unique().tolist() == [7]


@pytest.mark.parametrize(("alpha", "channels"), [(255, 3), (100, 4)])
def test_transparency_is_kept_where_it_hides_something(tmp_path, alpha, channels):
    array = np.full((4, 6, 4), 9, np.uint8)
    array[..., 3] = alpha
    Image.fromarray(array).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape == (channels, 6, 4)


def test_a_palette_of_black_and_white_is_a_mask_and_others_are_colors(tmp_path):
    index = np.array([[0, 1, 1], [2, 0, 1]], np.uint8)
    picture = Image.fromarray(index)
    picture.putpalette([250, 252, 250, 4, 2, 4, 200, 0, 0])
    picture.save(tmp_path / "colors.png")
    np.testing.assert_array_equal(read_image(tmp_path / "colors.png").numpy()[0], [[250, 200], [4, 250], [4, 4]])
    mask = Image.fromarray(np.minimum(index, 1))
    mask.putpalette([250, 252, 250, 4, 2, 4])
    mask.save(tmp_path / "mask.gif")
    np.testing.assert_array_equal(read_image(tmp_path / "mask.gif").numpy()[0], [[1, 0], [0, 1], [0, 0]])


@pytest.mark.parametrize("suffix", [".png", ".gif", ".tif"])
def test_two_classes_of_a_map_in_colors_are_no_mask(tmp_path, suffix):
    index = np.array([[2, 3], [3, 2]], np.uint8)
    picture = Image.fromarray(index)
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.save(tmp_path / f"a{suffix}")
    image = read_image(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(image.numpy()[:, 0], [[0, 0], [255, 0], [0, 255]])


@pytest.mark.parametrize("classes", [(0, 2), (0, 255), (0, 1, 2)])
@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_a_palette_of_grays_gives_these_however_few_there_are(tmp_path, classes, suffix):
    labels = np.array([classes * 2], np.uint8)
    Image.fromarray(labels).convert("P").save(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(read_label(tmp_path / f"a{suffix}").numpy()[0, :, 0], labels[0])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.float32])
def test_a_tiff_of_any_type_equals_another_reader(tmp_path, dtype):
    values = np.array([[0, 1, 100], [77, 5, 127]]).astype(dtype)
    values[0, 2] = np.finfo(dtype).min if dtype == np.float32 else np.iinfo(dtype).min
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").numpy()[0].T, values.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_zero_is_white_is_turned_round(tmp_path, dtype):
    values = np.array([[0, 1, 100], [77, 5, 127]], dtype)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").numpy()[0].T, np.iinfo(dtype).max - values)


@pytest.mark.parametrize("used", [[0], [1], [0, 1]])
def test_a_mask_in_black_and_white_keeps_its_sides_whatever_is_in_it(tmp_path, used):
    index = np.array([used * 2], np.uint8)
    for name, colors in (("two.png", [250, 252, 250, 4, 2, 4]), ("more.tif", [250, 252, 250, 4, 2, 4, 200, 0, 0])):
        picture = Image.fromarray(index)
        picture.putpalette(colors)
        picture.save(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name).numpy()[0, :, 0], 1 - index[0])


def test_pictures_of_several_pages_are_refused(tmp_path):
    pages = [Image.fromarray(np.full((4, 6), i * 9, np.uint8)) for i in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ReadError, match="3 frames or pages"):
        read_image(tmp_path / "a.tif")


def test_a_picture_cut_short(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ReadError, match="damaged picture"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.nii.gz", "a.png", "a.mha", "a.nrrd", "a.dcm", "a"])
def test_empty_files_text_and_pointers(tmp_path, name):
    path = tmp_path / name
    for content, match in (
        (b"", "0 bytes"),
        (b"just text " * 99, "not |no known kind"),
        (b"version https://git-lfs.x", "pointer"),
    ):
        path.write_bytes(content)
        with pytest.raises(ReadError, match=match) as error:
            read_image(path)
        assert str(path) in str(error.value)
