import gzip

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.data import MetaTensor

from medseg.errors import GeometryError, ReadError
from medseg.io import read_image, write_nifti

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
