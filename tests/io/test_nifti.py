import gzip
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.data import MetaTensor
from monai.transforms import Flip

from medseg.errors import GeometryError, ReadError
from medseg.io import find_series, read_image, write_nifti

AFFINE = np.array([[-2.0, 0, 0, 10], [0, 1.5, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])


def rotations():
    angles = st.floats(-3, 3)
    return st.tuples(angles, angles, angles).map(
        lambda a: (
            np.array([[np.cos(a[0]), -np.sin(a[0]), 0], [np.sin(a[0]), np.cos(a[0]), 0], [0, 0, 1]])
            @ np.array([[1, 0, 0], [0, np.cos(a[1]), -np.sin(a[1])], [0, np.sin(a[1]), np.cos(a[1])]])
            @ np.array([[np.cos(a[2]), 0, np.sin(a[2])], [0, 1, 0], [-np.sin(a[2]), 0, np.cos(a[2])]])
        )
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    array=hnp.arrays(
        st.sampled_from([np.uint8, np.int16, np.float32]),
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
        elements=st.integers(0, 200),
    ),
    rotation=rotations(),
    spacing=st.tuples(*[st.floats(0.2, 8)] * 3),
    origin=st.tuples(*[st.floats(-500, 500)] * 3),
    suffix=st.sampled_from([".nii", ".nii.gz"]),
)
def test_what_is_written_is_read_back(tmp_path, array, rotation, spacing, origin, suffix):
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing
    affine[:3, 3] = origin
    path = tmp_path / f"image{suffix}"
    write_nifti((array, affine), path)
    image = read_image(path)
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image.numpy(), array)
    np.testing.assert_allclose(image.affine.numpy(), affine, atol=1e-3)
    header = nib.load(path).header
    assert header.get_data_dtype() == array.dtype
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(header.get_qform(), affine, atol=1e-3)


def test_the_same_image_gives_the_same_bytes_whatever_the_name(tmp_path):
    array = np.random.default_rng(0).integers(0, 9, (8, 9, 10)).astype(np.int16)
    write_nifti((array, AFFINE), tmp_path / "a.nii.gz")
    write_nifti((array, AFFINE), tmp_path / "another.nii.gz")
    content = (tmp_path / "a.nii.gz").read_bytes()
    assert content == (tmp_path / "another.nii.gz").read_bytes()
    assert content[3] == 0, "no name inside"
    assert content[4:8] == b"\0\0\0\0", "no time inside"


@pytest.mark.parametrize(
    ("shape", "stored"),
    [((1, 4, 5, 6), (4, 5, 6)), ((2, 4, 5, 6), (4, 5, 6, 2)), ((3, 4, 5), (4, 5, 1, 3)), ((1, 4, 5), (4, 5))],
)
def test_a_metatensor_is_channel_first(tmp_path, shape, stored):
    write_nifti(MetaTensor(torch.zeros(shape, dtype=torch.uint8), affine=torch.as_tensor(AFFINE)), tmp_path / "x.nii")
    image = nib.load(tmp_path / "x.nii")
    assert image.shape == stored or image.shape == (*stored, 1)
    np.testing.assert_allclose(image.affine, AFFINE)


def test_types_that_nifti_lacks_are_stored_in_the_nearest_that_holds_them(tmp_path):
    write_nifti((np.ones((2, 2, 2), bool), AFFINE), tmp_path / "a.nii")
    write_nifti((np.ones((2, 2, 2), np.int64), AFFINE), tmp_path / "b.nii")
    assert nib.load(tmp_path / "a.nii").get_data_dtype() == np.uint8
    assert nib.load(tmp_path / "b.nii").get_data_dtype() == np.int32
    with pytest.raises(ValueError, match="300"):
        write_nifti((np.full((2, 2, 2), 300), AFFINE), tmp_path / "c.nii", dtype=np.uint8)
    with pytest.raises(ValueError, match="NaN"):
        write_nifti((np.full((2, 2, 2), np.nan), AFFINE), tmp_path / "c.nii", dtype=np.int16)
    assert not (tmp_path / "c.nii").exists()


def test_what_is_no_image_yet_is_not_written(tmp_path):
    image = MetaTensor(torch.zeros(1, 2, 3, 4), affine=torch.as_tensor(AFFINE))
    with pytest.raises(GeometryError, match="pending"):
        write_nifti(Flip(0, lazy=True)(image), tmp_path / "a.nii")
    with pytest.raises(GeometryError, match=r"shape \(1, 0, 3, 4\)"):
        write_nifti(image[:, :0], tmp_path / "a.nii")
    assert list(tmp_path.iterdir()) == []


def test_an_affine_with_shear_is_kept_by_the_sform_alone(tmp_path):
    sheared = AFFINE.copy()
    sheared[0, 2] = 1.0
    write_nifti((np.ones((3, 3, 3), np.uint8), sheared), tmp_path / "a.nii.gz")
    np.testing.assert_allclose(read_image(tmp_path / "a.nii.gz").affine.numpy(), sheared, atol=1e-5)
    assert int(nib.load(tmp_path / "a.nii.gz").header["qform_code"]) == 0


@pytest.mark.parametrize(("shape", "channels"), [((3, 4, 5, 2), 2), ((3, 4, 5, 1, 6), 6), ((3, 4, 5, 1), 1)])
def test_times_and_vectors_become_channels(tmp_path, shape, channels):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / "a.nii.gz")
    image = read_image(tmp_path / "a.nii.gz")
    assert image.shape == (channels, 3, 4, 5)
    np.testing.assert_array_equal(image.numpy()[-1], array.reshape(3, 4, 5, channels)[..., -1])


def test_scale_factors_are_applied(tmp_path):
    image = nib.Nifti1Image(np.full((2, 2, 2), 7, np.int16), AFFINE)
    image.header.set_slope_inter(0.5, -1)
    nib.save(image, tmp_path / "a.nii")
    stored = nib.load(tmp_path / "a.nii").get_fdata()
    np.testing.assert_allclose(read_image(tmp_path / "a.nii").numpy()[0], stored)


def test_scale_factors_are_applied_in_double_precision(tmp_path):
    image = nib.Nifti1Image(np.full((2, 2, 2), 2_000_000_001, np.int32), AFFINE)
    image.header.set_slope_inter(1, -2_000_000_000)
    nib.save(image, tmp_path / "a.nii")
    assert read_image(tmp_path / "a.nii").unique().tolist() == [1]


def stored(tmp_path, change, array=None, name="a.nii"):
    """Write an image and change fields of its header behind nibabel's back."""
    path = tmp_path / name
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4) if array is None else array
    nib.save(nib.Nifti1Image(array, AFFINE), path)
    header = nib.Nifti1Header(path.read_bytes()[:348], check=False)
    for key, value in change.items():
        header[key] = value
    path.write_bytes(header.binaryblock + path.read_bytes()[348:])
    return path


@pytest.mark.parametrize("slope", [0, np.nan])
def test_a_slope_of_zero_or_nan_means_none(tmp_path, slope):
    image = read_image(stored(tmp_path, {"scl_slope": slope, "scl_inter": 7}))
    assert image.max() == 23


@pytest.mark.parametrize("change", [{"scl_slope": np.inf}, {"scl_slope": 2, "scl_inter": np.nan}])
def test_a_scale_that_says_nothing_is_refused(tmp_path, change):
    with pytest.raises(ReadError, match="scl_inter"):
        read_image(stored(tmp_path, change))


@pytest.mark.parametrize(
    ("units", "factor", "told"), [(0, 1, ""), (2, 1, ""), (1, 1000, "metres"), (3, 1e-3, "microns")]
)
def test_metres_and_microns_become_millimetres(tmp_path, units, factor, told):
    image = read_image(stored(tmp_path, {"xyzt_units": units | 8}))
    expected = AFFINE.copy()
    expected[:3] *= factor
    np.testing.assert_allclose(image.affine.numpy(), expected, rtol=1e-6)
    assert told in image.meta["problems"]
    assert bool(image.meta["problems"]) == bool(told)
    (series,) = find_series(tmp_path)
    np.testing.assert_allclose(series.affine, expected, rtol=1e-6)


def test_a_left_handed_qform(tmp_path):
    # A quaternion (0, 0, 1, 0) turns half around y: x and z change sign; qfac = -1 turns z back.
    change = {"qform_code": 1, "sform_code": 0, "pixdim": [-1, 2, 3, 4, 1, 1, 1, 1]}
    change |= {"quatern_b": 0, "quatern_c": 1, "quatern_d": 0, "qoffset_x": 5, "qoffset_y": 6, "qoffset_z": 7}
    image = read_image(stored(tmp_path, change))
    expected = [[-2, 0, 0, 5], [0, 3, 0, 6], [0, 0, 4, 7], [0, 0, 0, 1]]
    np.testing.assert_allclose(image.affine.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "order"),
    [(nib.Nifti1Header, ">"), (nib.Nifti1Header, "<"), (nib.Nifti2Header, ">"), (nib.Nifti2Header, "<")],
)
def test_both_versions_in_both_byte_orders(tmp_path, kind, order):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image_class = nib.Nifti1Image if kind is nib.Nifti1Header else nib.Nifti2Image
    nib.save(image_class(array, AFFINE, kind(endianness=order)), tmp_path / "a.nii")
    image = read_image(tmp_path / "a.nii")
    np.testing.assert_array_equal(image.numpy()[0], array)
    np.testing.assert_allclose(image.affine.numpy(), AFFINE)


@pytest.mark.parametrize("image_class", [nib.Nifti1Pair, nib.Nifti2Pair])
def test_a_pair_of_header_and_voxels(tmp_path, image_class):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    nib.save(image_class(array, AFFINE), tmp_path / "a.hdr")
    np.testing.assert_array_equal(read_image(tmp_path / "a.hdr").numpy()[0], array)
    with pytest.raises(ReadError, match=r"name 'a\.hdr' instead"):
        read_image(tmp_path / "a.img")
    (tmp_path / "a.img").unlink()
    with pytest.raises(ReadError, match=r"'a\.img' with its voxels is absent"):
        read_image(tmp_path / "a.hdr")


def test_an_extension_before_the_voxels_is_passed_over(tmp_path):
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 200))
    nib.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii.gz").numpy()[0], image.get_fdata())


def test_colors_become_channels_whatever_the_scale(tmp_path):
    colors = np.zeros((2, 3, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    colors["G"][1, 2, 3] = 200
    image = read_image(stored(tmp_path, {"scl_slope": 2}, colors))
    assert image.shape == (3, 2, 3, 4)
    assert image[1, 1, 2, 3] == 200
    assert image.sum() == 200


def test_whole_numbers_that_float32_cannot_hold_are_told(tmp_path):
    image = read_image(stored(tmp_path, {}, np.full((2, 2, 2), 2**24 + 1, np.int32)))
    assert "rounded" in image.meta["problems"]
    with pytest.raises(ReadError, match="float32 cannot hold"):
        read_image(stored(tmp_path, {}, np.full((2, 2, 2), 1e300)))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_header_that_promises_fewer_voxels_than_there_are(tmp_path, name):
    path = tmp_path / name
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.int16), AFFINE), path)
    content = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    header = nib.Nifti1Header(content[:348])
    header["dim"][3] = 2
    content = header.binaryblock + content[348:]
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(ReadError, match="more than the header promises"):
        read_image(path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"vox_offset": np.nan}, "vox_offset"),
        ({"vox_offset": np.inf}, "vox_offset"),
        ({"vox_offset": -9e9}, "vox_offset|offset"),
        ({"datatype": 3}, "NIfTI header"),
        ({"dim": [7, 2, 3, 4, 2, 2, 1, 1]}, "at most one more|cut short"),
    ],
)
def test_headers_that_make_no_sense(tmp_path, change, match):
    with pytest.raises(ReadError, match=match):
        read_image(stored(tmp_path, change))


def test_a_qform_that_is_no_rotation_is_refused(tmp_path):
    change = {"qform_code": 1, "sform_code": 0, "quatern_b": 1, "quatern_c": 1, "quatern_d": 1}
    path = stored(tmp_path, change)
    with pytest.raises(GeometryError, match="qform"):
        read_image(path)
    (series,) = find_series(tmp_path)
    assert "qform" in series.problems[0]


@pytest.mark.parametrize(("suffix", "magic"), [(".bz2", b"BZh91AY"), (".zst", b"\x28\xb5\x2f\xfd")])
def test_other_compressions_are_refused_by_name(tmp_path, suffix, magic):
    path = tmp_path / f"a.nii{suffix}"
    path.write_bytes(magic + b"0" * 600)
    with pytest.raises(ReadError, match="decompress it first"):
        read_image(path)


@pytest.mark.parametrize("dtype", [None, np.int16, np.uint8, np.float32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_is_written_does_not_depend_on_how_it_lies_in_memory(tmp_path, monkeypatch, dtype, order):
    array = np.asarray(np.random.default_rng(0).normal(100, 20, (2, 9, 8, 7)), order=order)
    write_nifti((array, AFFINE), tmp_path / "a.nii", dtype=dtype)
    expected = array if dtype in (None, np.float32) else np.rint(array)
    np.testing.assert_array_equal(
        np.moveaxis(np.asarray(nib.load(tmp_path / "a.nii").dataobj), -1, 0), expected.astype(dtype or array.dtype)
    )
    monkeypatch.setattr("medseg.io.nifti._CHUNK_BYTES", 1)  # slice by slice
    write_nifti((array, AFFINE), tmp_path / "b.nii", dtype=dtype)
    assert (tmp_path / "a.nii").read_bytes() == (tmp_path / "b.nii").read_bytes()


def test_a_voxel_that_does_not_fit_is_found_in_the_last_slice_too(tmp_path, monkeypatch):
    monkeypatch.setattr("medseg.io.nifti._CHUNK_BYTES", 1)
    array = np.zeros((3, 3, 3), np.float32)
    array[2, 2, 2] = 40000
    with pytest.raises(ValueError, match="40000"):
        write_nifti((array, AFFINE), tmp_path / "a.nii", dtype=np.int16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [np.int16, np.float64])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_reading_and_writing_take_little_more_than_the_volume(tmp_path, dtype, suffix):
    array = np.zeros((1, 256, 256, 64), dtype)
    path = tmp_path / f"a{suffix}"
    write_nifti((array, AFFINE), path)
    size = array.size * 4
    for step in (lambda: read_image(path), lambda: write_nifti((array.astype(np.float32), AFFINE), path, np.int16)):
        tracemalloc.start()
        step()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < (3.5 if dtype == np.float64 else 2.5) * size


def test_a_disagreement_of_sform_and_qform_is_told_and_the_sform_taken(tmp_path):
    image = nib.Nifti1Image(np.ones((2, 2, 2), np.uint8), AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(np.diag([1, 1, 1, 1]), 1)
    nib.save(image, tmp_path / "a.nii")
    read = read_image(tmp_path / "a.nii")
    np.testing.assert_allclose(read.affine.numpy(), AFFINE)
    assert "sform and qform disagree" in read.meta["problems"]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("keep", [0.03, 0.5, 0.97])
def test_a_file_cut_short_is_named(tmp_path, suffix, keep):
    path = tmp_path / f"cut{suffix}"
    write_nifti((np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32), AFFINE), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ReadError, match="cut") as error:
        read_image(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def gzipped(tmp_path, change, shape=(20, 20, 20)):
    """Write an image whose bytes (unpacked, and packed) become what ``change`` makes of them."""
    array = np.random.default_rng(0).integers(0, 255, shape).astype(np.float32)
    nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / "plain.nii")
    content = (tmp_path / "plain.nii").read_bytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(change(content, gzip.compress(content)))
    return path, array


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda content, packed: packed, id="one member"),
        pytest.param(
            lambda content, packed: b"".join(
                gzip.compress(content[at : at + 999]) for at in range(0, len(content), 999)
            ),
            id="many members",
        ),
        pytest.param(lambda content, packed: gzip.compress(content[:352]) + gzip.compress(content[352:]), id="two"),
        pytest.param(lambda content, packed: packed + gzip.compress(b""), id="an empty member at the end"),
        pytest.param(lambda content, packed: packed + b"\0" * 512, id="zeros behind"),
        pytest.param(lambda content, packed: gzip.compress(content + b"x" * 79), id="less than a row behind"),
    ],
)
def test_gzip_files_that_are_sound(tmp_path, change):
    path, array = gzipped(tmp_path, change)
    np.testing.assert_array_equal(read_image(path).numpy()[0], array)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param(lambda content, packed: packed + packed, "more than the header promises", id="twice the same"),
        pytest.param(lambda content, packed: packed + b"garbage" * 9, "cut short or damaged", id="garbage behind"),
        pytest.param(lambda content, packed: packed + packed[-8:], "cut short or damaged", id="its own end behind"),
        pytest.param(
            lambda content, packed: packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:], "damaged", id="another sum"
        ),
        pytest.param(lambda content, packed: packed[:-4] + b"\1\0\0\0", "damaged", id="another length"),
        pytest.param(lambda content, packed: packed[:-1], "cut short or damaged", id="a byte less"),
        pytest.param(lambda content, packed: gzip.compress(content + b"x" * 80), "more than the", id="a row behind"),
        pytest.param(lambda content, packed: gzip.compress(content[:-1]), "cut short or damaged", id="a voxel less"),
        pytest.param(
            lambda content, packed: gzip.compress(content) + gzip.compress(b"x" * 80), "more than the", id="a second"
        ),
    ],
)
def test_gzip_files_that_are_not(tmp_path, change, match):
    path, _ = gzipped(tmp_path, change)
    with pytest.raises(ReadError, match=match) as error:
        read_image(path)
    assert "\n" not in str(error.value)


def test_a_gzip_bomb_takes_the_memory_that_its_header_promises(tmp_path):
    path, _ = gzipped(tmp_path, lambda content, packed: gzip.compress(content + b"\0" * (1 << 26)))
    tracemalloc.start()
    with pytest.raises(ReadError, match="more than the header promises"):
        read_image(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 23


def test_voxels_that_begin_at_an_odd_place_are_aligned(tmp_path):
    def change(content, packed):
        header = nib.Nifti1Header(content[:348])
        header["vox_offset"] = 353
        return gzip.compress(header.binaryblock + b"\0" * 5 + content[352:])

    path, array = gzipped(tmp_path, change)
    image = read_image(path).numpy()
    assert image.flags.aligned
    np.testing.assert_array_equal(image[0], array)


def test_a_header_is_read_without_unpacking_the_voxels(tmp_path, monkeypatch):
    path, _ = gzipped(tmp_path, lambda content, packed: packed, (64, 64, 64))
    with path.open("r+b") as file:
        file.seek(200_000)
        file.write(b"\xff" * 50_000)
    (series,) = [found for found in find_series(tmp_path) if found.files == (path,)]
    assert (series.shape, series.problems) == ((64, 64, 64), ())


def test_a_damaged_gzip_stream_is_noticed_though_its_length_is_right(tmp_path):
    path = tmp_path / "a.nii.gz"
    write_nifti((np.random.default_rng(0).integers(0, 255, (20, 20, 20)).astype(np.uint8), AFFINE), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ReadError):
        read_image(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_forged_header_takes_no_memory(tmp_path, suffix):
    header = nib.Nifti1Header()
    header.set_data_shape((30000, 30000, 3000))
    header.set_data_dtype(np.float64)
    header["magic"] = b"n+1"
    header["vox_offset"] = 352
    content = header.binaryblock + b"\0" * 100
    path = tmp_path / f"forged{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
    with pytest.raises(ReadError, match="promises"):
        read_image(path)


def test_complex_values_are_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.ones((2, 2, 2), np.complex64), AFFINE), tmp_path / "a.nii")
    with pytest.raises(ReadError, match="complex"):
        read_image(tmp_path / "a.nii")


def test_an_affine_that_cannot_be_inverted_is_refused(tmp_path):
    image = nib.Nifti1Image(np.ones((2, 2, 2), np.uint8), AFFINE)
    image.header["srow_x"] = 0
    image.header["sform_code"] = 1
    path = tmp_path / "a.nii"
    path.write_bytes(image.header.binaryblock + b"\0" * 4 + b"\1" * 8)
    with pytest.raises(GeometryError, match="affine"):
        read_image(path)
