"""Label maps from images, segmentations, pictures of slices and contour files."""

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from monai.transforms import Orientation
from PIL import Image
from shapely import contains, distance, points
from shapely.geometry import Polygon

from medseg.errors import ConfigError, GeometryError, ReadError
from medseg.io import find_series, read_image, read_label, write_nifti
from medseg.io.labels import _whole

from .test_seg import SHAPE, on_image, two_segments, write_seg

AFFINE = np.diag([-1.5, -2.0, 3.0, 1.0])


@pytest.fixture
def values():
    return np.random.default_rng(4).integers(0, 4, (5, 6, 7))


def write(path, array):
    if path.name.endswith(".nii.gz"):
        write_nifti((array, AFFINE), path)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(np.ascontiguousarray(array.T)), str(path))
    return path


@pytest.mark.parametrize("name", ["l.nii.gz", "l.mhd", "l.mha", "l.nrrd"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_labels_of_any_format_are_whole_numbers(tmp_path, values, name, dtype):
    label = read_label(write(tmp_path / name, values.astype(dtype)))
    assert label.numpy().dtype == np.uint8
    np.testing.assert_array_equal(label.numpy()[0], values)
    assert label.meta["units"] == "label"


def test_rounding_errors_are_forgiven_and_no_more(tmp_path, values):
    almost = values + np.where(values % 2, -3e-8, 9e-4)
    label = read_label(write(tmp_path / "l.nii.gz", almost.astype(np.float32)))
    np.testing.assert_array_equal(label.numpy()[0], values)
    almost[1, 2, 3] = 0.5
    almost[4, 5, 6] = 1.002
    with pytest.raises(
        ReadError, match=r"2 voxels are no whole numbers, such as 0\.5 at voxel \(1, 2, 3\): .*interpolated linearly"
    ):
        read_label(write(tmp_path / "l.nii.gz", almost.astype(np.float32)))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (np.nan, r"such as nan at voxel \(1, 2, 3\)"),
        (np.inf, r"such as inf at voxel \(1, 2, 3\)"),
        (-1, r"a voxel is -1 \(at voxel \(1, 2, 3\)\): expected a label"),
        (2**24, r"a voxel is 16777216 \(at voxel \(1, 2, 3\)\): expected labels below 16,777,216"),
    ],
)
def test_what_no_label_holds_is_refused_with_its_voxel(tmp_path, values, value, match):
    array = values.astype(np.float32)
    array[1, 2, 3] = value
    with pytest.raises(ReadError, match=match) as error:
        read_label(write(tmp_path / "l.nii.gz", array))
    assert "\n" not in str(error.value)


def test_large_numbers_are_kept(tmp_path, values):
    values[1, 2, 3] = 2**24 - 1
    label = read_label(write(tmp_path / "l.nii.gz", values.astype(np.int32)))
    assert label.numpy().dtype == np.int32
    np.testing.assert_array_equal(label.numpy()[0], values)


@given(st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=20), st.floats(-9e-4, 9e-4))
def test_whole_numbers_survive_any_small_error(numbers, error):
    array = np.array(numbers, dtype=np.float64)[None, :, None, None]
    found = _whole("l", array + error)
    np.testing.assert_array_equal(found, array)
    assert found.dtype == (np.uint8 if max(numbers) <= 255 else np.int32)


def test_the_grid_must_be_that_of_the_reference(tmp_path, values):
    image = read_image(write(tmp_path / "image.nii.gz", values.astype(np.float32) * 100))
    path = write(tmp_path / "l.nii.gz", values.astype(np.uint8))
    np.testing.assert_array_equal(read_label(path, image).numpy()[0], values)
    np.testing.assert_array_equal(read_label(path, tmp_path / "image.nii.gz").numpy()[0], values)
    with pytest.raises(GeometryError, match=r"5 x 6 x 7 voxels, .* has 5 x 6 x 6"):
        read_label(path, image[..., :6])
    for change in ((0, 3, 0.1), (1, 1, -2.02), (0, 0, 1.5)):
        moved = image.clone()
        moved.affine[change[:2]] = change[2]
        with pytest.raises(GeometryError, match=r"lies up to .* mm away from"):
            read_label(path, moved)
    with pytest.raises(GeometryError, match=r"voxels, .* has|mm away"):
        read_label(path, Orientation(axcodes="RAS")(image))


def test_several_channels_are_refused(tmp_path, values):
    write_nifti((np.stack([values, values + 1]).astype(np.uint8), AFFINE), tmp_path / "l.nii.gz")
    with pytest.raises(ReadError, match="2 channels: expected a label of one"):
        read_label(tmp_path / "l.nii.gz")


def test_pictures(tmp_path, values):
    plane = values[0].astype(np.uint8)
    Image.fromarray(plane.T).save(tmp_path / "l.png")
    np.testing.assert_array_equal(read_label(tmp_path / "l.png").numpy()[0], plane)
    Image.fromarray(np.stack([plane.T] * 3, axis=-1)).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(read_label(tmp_path / "gray.png").numpy()[0], plane)
    Image.fromarray(np.stack([plane.T, plane.T, plane.T + 1], axis=-1)).save(tmp_path / "color.png")
    with pytest.raises(ReadError, match="3 channels"):
        read_label(tmp_path / "color.png")
    Image.fromarray(plane.T).save(tmp_path / "l.jpg")
    with pytest.raises(ReadError, match="a JPEG, which does not keep the values"):
        read_label(tmp_path / "l.jpg")
    image = read_image(tmp_path / "l.png")
    assert read_label(tmp_path / "l.png", image).shape == image.shape
    with pytest.raises(GeometryError, match="6 x 7 pixels, the reference has 5 x 7"):
        read_label(tmp_path / "l.png", image[:, :5])


def test_a_segmentation_as_one_label_map(tmp_path, make_series):
    files = make_series(tmp_path / "ct", np.zeros(SHAPE, np.int16))
    array = two_segments()
    with pytest.raises(ReadError, match=r"segments 1 and 2 overlap in 8 voxels: .*read_seg"):
        read_label(write_seg(tmp_path / "seg.dcm", files, array))
    array[..., 1] &= 1 - array[..., 0]
    path = write_seg(tmp_path / "seg.dcm", files, array)
    label = read_label(path)
    np.testing.assert_array_equal(label.numpy()[0], on_image((array * [1, 2]).sum(axis=-1)[1:5]))
    with pytest.raises(GeometryError, match="24 x 20 x 4 voxels"):
        read_label(path, tmp_path / "ct")
    with pytest.raises(ReadError, match="modality CT: expected SEG"):
        read_label(files[0])


# A series whose InstanceNumber runs against the position: slice 0 (the lowest) is instance 16, slice 5 is 11.
NUMBERS = [16, 15, 14, 13, 12, 11]


@pytest.fixture
def ct(tmp_path, make_series):
    def change(i, ds):
        ds.InstanceNumber = NUMBERS[i]

    make_series(tmp_path / "ct", np.zeros(SHAPE, np.int16), change=change)
    return tmp_path / "ct"


@pytest.fixture
def stack():
    return np.random.default_rng(5).integers(0, 3, SHAPE).astype(np.uint8)


def write_pictures(folder, planes, names):
    folder.mkdir(exist_ok=True)
    for plane, name in zip(planes, names, strict=True):
        Image.fromarray(plane).save(folder / name)
    return folder


def test_pictures_follow_the_position_or_the_instance_number(ct, tmp_path, stack):
    # 8, 9, 10: sorted by value, not by letter.
    folder = write_pictures(tmp_path / "png", stack, [f"mask{number}.png" for number in range(8, 14)])
    label = read_label(folder, ct, order="position")
    np.testing.assert_array_equal(label.numpy()[0], on_image(stack))
    np.testing.assert_allclose(label.affine.numpy(), read_image(ct).affine.numpy())
    label = read_label(folder, find_series(ct)[0], order="instance")
    np.testing.assert_array_equal(label.numpy()[0], on_image(stack[::-1]))


def test_pictures_of_some_slices_by_their_number(ct, tmp_path, stack):
    folder = write_pictures(tmp_path / "png", stack[:2], ["case7_slice_0016.png", "case7_slice_0012.png"])
    label = read_label(folder, ct, order="number").numpy()[0]
    truth = np.zeros_like(stack)
    truth[0], truth[4] = stack[0], stack[1]
    np.testing.assert_array_equal(label, on_image(truth))


@pytest.mark.parametrize(
    ("names", "order", "error", "match"),
    [
        ([f"{n}.png" for n in range(6)], None, ConfigError, "order must say how they belong"),
        ([f"{n}.png" for n in range(6)], "name", ConfigError, "order: 'name' found"),
        ([f"{n}.png" for n in range(5)], "position", ReadError, "5 pictures, .* has 6 slices"),
        (["1.png", "01.png", "2.png", "3.png", "4.png", "5.png"], "instance", ReadError, "have the same number"),
        (["a11.png"], "number", ReadError, "no number stands by itself"),
        (["a_17.png"], "number", ReadError, "InstanceNumber 17: 0 slices"),
        (["a_11.png", "b_11.png"], "number", ReadError, "a_11.png is of the same slice"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(ct, tmp_path, stack, names, order, error, match):
    folder = write_pictures(tmp_path / "png", stack[: len(names)], names)
    with pytest.raises(error, match=match):
        read_label(folder, ct, order=order)


def test_pictures_of_another_size_or_without_series_are_refused(ct, tmp_path, stack, make_series):
    folder = write_pictures(tmp_path / "png", stack[:, :, :-1], [f"{n}.png" for n in range(6)])
    with pytest.raises(GeometryError, match=r"23 x 20 pixels, the slices of .* have 24 x 20"):
        read_label(folder, ct, order="position")
    for reference in (None, read_image(ct)):
        with pytest.raises(GeometryError, match="give the DICOM series"):
            read_label(folder, reference, order="position")
    write_nifti(read_image(ct), tmp_path / "ct.nii.gz")
    with pytest.raises(GeometryError, match="not a DICOM series with a file per slice"):
        read_label(folder, tmp_path / "ct.nii.gz", order="position")
    make_series(tmp_path / "same", np.zeros(SHAPE, np.int16), change=lambda i, ds: setattr(ds, "InstanceNumber", 1))
    with pytest.raises(ReadError, match=r"InstanceNumber .* is absent or not unique"):
        read_label(folder, tmp_path / "same", order="instance")
    (folder / "notes.nii").write_bytes(b"\0" * 344 + b"n+1\0" + b"\0" * 200)
    with pytest.raises(ReadError, match=r"files of several kinds \(nifti, picture\)"):
        read_label(folder, ct, order="position")
    with pytest.raises(ReadError, match=r"no file in this folder fits '\*\.gif'"):
        read_label(folder, ct, order="position", pattern="*.gif")


def test_a_tilted_series_has_no_pixels_of_its_slices(tmp_path, make_series, stack):
    angle = np.radians(10)
    starts = [(-10, -20, 30 + k * 3 / np.cos(angle)) for k in range(6)]
    lean = (1, 0, 0, 0, np.cos(angle), np.sin(angle))
    make_series(tmp_path / "ct", np.zeros((6, 40, 24), np.int16), orientation=lean, positions=starts)
    folder = write_pictures(tmp_path / "png", np.zeros((6, 40, 24), np.uint8), [f"{n}.png" for n in range(6)])
    with pytest.raises(GeometryError, match="its grid is not that of its slices"):
        read_label(folder, tmp_path / "ct", order="position")


SQUARE = "3.5 4.5\n9.5 4.5\n9.5 7.5\n3.5 7.5\n"  # around columns 4 to 9, rows 5 to 7


def square(*slots):
    truth = np.zeros(SHAPE, np.uint8)
    for slot in slots:
        truth[slot, 5:8, 4:10] = 1
    return on_image(truth)


def test_contour_files_of_some_slices(ct, tmp_path):
    folder = tmp_path / "contours"
    folder.mkdir()
    (folder / "IM-0001-0016-icontour-manual.txt").write_text(SQUARE)
    (folder / "IM-0001-0012-icontour-manual.txt").write_text(SQUARE.replace(" ", ", ") + "\n\n")
    (folder / "IM-0001-0012-ocontour-manual.txt").write_text("1 1\n20 1\n20 15\n")
    label = read_label(folder, ct, pattern="*icontour*")
    np.testing.assert_array_equal(label.numpy()[0], square(0, 4))
    np.testing.assert_allclose(label.affine.numpy(), read_image(ct).affine.numpy())
    with pytest.raises(ReadError, match=r"IM-0001-0012-icontour-manual\.txt is of the same slice"):
        read_label(folder, ct)
    one = read_label(folder / "IM-0001-0016-icontour-manual.txt", ct)
    np.testing.assert_array_equal(one.numpy()[0], square(0))


@pytest.mark.parametrize("first", [0.0, 0.5, 1.0])
def test_where_the_first_pixel_lies(ct, tmp_path, first):
    path = tmp_path / "c-11.txt"
    path.write_text("".join(f"{x + first} {y + first}\n" for x, y in [(3.5, 4.5), (9.5, 4.5), (9.5, 7.5), (3.5, 7.5)]))
    np.testing.assert_array_equal(read_label(path, ct, first_pixel=first).numpy()[0], square(5))


def test_a_round_contour_agrees_with_shapely(ct, tmp_path):
    angles = np.linspace(0, 2 * np.pi, 80, endpoint=False)
    outline = np.column_stack([11 + 7.3 * np.cos(angles), 9 + 6.1 * np.sin(angles)])
    path = tmp_path / "IM-0001-0013-icontour-manual.txt"
    np.savetxt(path, outline, fmt="%.2f")
    mask = read_label(path, ct).numpy()[0, :, :, 3]
    shape = Polygon(np.round(outline, 2))
    x, y = np.indices(mask.shape)
    centers = points(x.ravel(), y.ravel())
    clear = distance(shape.exterior, centers) > 1e-6
    np.testing.assert_array_equal(mask.ravel()[clear] == 1, contains(shape, centers)[clear])
    assert mask.sum() > 100


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("1 2\n3\n", "line 2 is not two numbers"),
        ("1 2\n3 x\n", "line 2 is not two numbers"),
        ("1 2 3\n", "line 1 is not two numbers"),
        ("1 2\n3 4\n", "2 points: expected at least three"),
        ("1 2\n3 4\nnan 5\n", "NaN or infinite"),
        ("1 2\n3 4\n5 700\n", r"points from \(1, 2\) to \(5, 700\): beyond the 24 x 20 pixels"),
        ("-9 2\n3 4\n5 7\n", "beyond the 24 x 20 pixels"),
        ("1.1 1.1\n1.2 1.1\n1.2 1.2\n", "holds no pixel"),
        ("1" * 300, "line 1 is too long"),
        ("", "0 points: expected at least three"),
    ],
)
def test_contour_files_that_cannot_be_right(ct, tmp_path, text, match):
    (tmp_path / "c-11.txt").write_text(text)
    with pytest.raises((ReadError, GeometryError), match=match) as error:
        read_label(tmp_path / "c-11.txt", ct)
    assert "\n" not in str(error.value)


def test_what_does_not_exist(tmp_path):
    with pytest.raises(ReadError, match="no such file or folder"):
        read_label(tmp_path / "absent")


@pytest.mark.realdata
def test_labels_of_archives(data):
    path = sorted((data / "hippocampus").rglob("label*/*.nii.gz"))[0]
    assert read_label(path).unique().tolist() == [0, 1, 2]
    for path in sorted((data / "kits19_labels").rglob("*.nii.gz"))[:2]:
        assert set(read_label(path).unique().tolist()) <= {0, 1, 2}
    with pytest.raises(ReadError, match=r"a voxel is -|no whole numbers"):
        read_label(data / "ct_organs" / "example_ct.nii.gz")
