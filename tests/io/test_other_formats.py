import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from medseg.errors import ReadError
from medseg.io import find_series, read_image

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


@pytest.mark.parametrize("file", ["../secret.raw", "/etc/passwd", "LIST", "slice%03d.raw 1 4 1"])
def test_a_header_reaches_no_file_elsewhere(tmp_path, file):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.raw").write_bytes(b"\0" * 128)
    (tmp_path / "in" / "a.mhd").write_text(HEADER.format(size="4 4 4", file=file))
    with pytest.raises(ReadError, match="expected"):
        read_image(tmp_path / "in" / "a.mhd")


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


def test_a_palette_of_two_colors_is_a_mask_and_others_are_colors(tmp_path):
    index = np.array([[0, 1, 1], [2, 0, 1]], np.uint8)
    picture = Image.fromarray(index)
    picture.putpalette([250, 252, 250, 4, 2, 4, 200, 0, 0])
    picture.save(tmp_path / "colors.png")
    np.testing.assert_array_equal(read_image(tmp_path / "colors.png").numpy()[0], [[250, 200], [4, 250], [4, 4]])
    mask = Image.fromarray(np.minimum(index, 1))
    mask.putpalette([250, 252, 250, 4, 2, 4])
    mask.save(tmp_path / "mask.gif")
    np.testing.assert_array_equal(read_image(tmp_path / "mask.gif").numpy()[0], [[1, 0], [0, 1], [0, 0]])


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
