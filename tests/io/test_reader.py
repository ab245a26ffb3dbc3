import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import DataLoader, Dataset
from monai.transforms import EnsureChannelFirstd, LoadImage, LoadImaged
from PIL import Image

from medseg.errors import GeometryError, ReadError
from medseg.io import Reader, read_image, write_nifti

AFFINE = np.array([[-2.0, 0, 0, 10], [0, 1.5, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])


@pytest.fixture
def sources(tmp_path, make_series):
    """One of everything that can be read, by kind."""
    rng = np.random.default_rng(0)
    files = make_series(tmp_path / "ct", rng.integers(0, 99, (4, 3, 5)).astype(np.int16), intercepts=[-1024] * 4)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti((rng.normal(size=(4, 5, 6)).astype(np.float32), AFFINE), tmp_path / name)
    nib.save(nib.Nifti1Image(rng.normal(size=(4, 5, 6, 2)), AFFINE), tmp_path / "times.nii")
    volume = sitk.GetImageFromArray(rng.integers(0, 99, (6, 5, 4)).astype(np.int16))
    volume.SetSpacing((2, 1.5, 3))
    volume.SetOrigin((1, 2, 3))
    for name in ("v.mhd", "v.mha", "v.nrrd"):
        sitk.WriteImage(volume, str(tmp_path / name))
    Image.fromarray(rng.integers(0, 255, (4, 6, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    return {
        "folder": tmp_path / "ct",
        "files": files,
        "nifti": tmp_path / "a.nii.gz",
        "channels": [tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"],
        "times": tmp_path / "times.nii",
        "mhd": tmp_path / "v.mhd",
        "mha": tmp_path / "v.mha",
        "nrrd": tmp_path / "v.nrrd",
        "png": tmp_path / "p.png",
    }


KINDS = ("folder", "files", "nifti", "channels", "times", "mhd", "mha", "nrrd", "png")


@pytest.mark.parametrize("kind", KINDS)
def test_load_imaged_gives_what_read_image_gives(sources, kind):
    source = sources[kind]
    image = read_image(source)
    loaded = LoadImaged("image", reader=Reader, ensure_channel_first=True)({"image": source})["image"]
    assert loaded.shape == image.shape
    assert loaded.dtype == image.dtype == torch.float32
    assert torch.equal(loaded.as_tensor(), image.as_tensor())
    assert torch.equal(loaded.affine, image.affine)
    assert set(loaded.meta) == set(image.meta)
    for key in ("modality", "units", "has_geometry", "space", "filename_or_obj", "dicom", "problems"):
        assert loaded.meta.get(key) == image.meta.get(key)
    apart = EnsureChannelFirstd("image")(LoadImaged("image", reader=Reader())({"image": source}))["image"]
    assert torch.equal(apart.as_tensor(), image.as_tensor())


@pytest.mark.parametrize("kind", KINDS)
def test_images_can_be_collated(sources, kind):
    data = Dataset([{"image": sources[kind]}] * 2, LoadImaged("image", reader=Reader, ensure_channel_first=True))
    batch = next(iter(DataLoader(data, batch_size=2)))["image"]
    assert batch.shape == (2, *read_image(sources[kind]).shape)


def test_channels_keep_their_order(sources):
    image = read_image(sources["channels"])
    assert image.shape == (2, 4, 5, 6)
    for channel, path in zip(image, sources["channels"], strict=True):
        assert torch.equal(channel.as_tensor(), read_image(path)[0].as_tensor())


def test_channels_on_two_grids_are_refused(tmp_path):
    write_nifti((np.zeros((4, 5, 6), np.uint8), AFFINE), tmp_path / "a.nii")
    write_nifti((np.zeros((4, 5, 7), np.uint8), AFFINE), tmp_path / "b.nii")
    write_nifti((np.zeros((4, 5, 6), np.uint8), np.eye(4)), tmp_path / "c.nii")
    with pytest.raises(GeometryError, match=r"b\.nii: a grid of 4×5×7, but a\.nii has 4×5×6"):
        read_image([tmp_path / "a.nii", tmp_path / "b.nii"])
    with pytest.raises(GeometryError, match=r"c\.nii: its affine differs"):
        read_image([tmp_path / "a.nii", tmp_path / "c.nii"])


def test_what_is_refused_is_not_read_by_another_reader(tmp_path, make_series):
    make_series(tmp_path / "ct", np.zeros((6, 3, 5), np.int16))[2].unlink()
    with pytest.raises(GeometryError, match="1 slice missing"):
        LoadImage(reader=Reader)(tmp_path / "ct")


def test_pet_units_pass_through(tmp_path, make_series):
    make_series(tmp_path / "pt", np.ones((2, 3, 5), np.int16), modality="PT")
    image = LoadImage(reader=Reader, pet_units="stored")(tmp_path / "pt")
    assert (image.meta["modality"], image.meta["units"]) == ("PT", "stored")
    with pytest.raises(ReadError, match="Units"):
        LoadImage(reader=Reader)(tmp_path / "pt")


def test_the_reader_can_be_named_in_a_configuration(sources):
    image = LoadImage(reader="medseg.io.Reader")(sources["mhd"])
    assert image.shape == (1, 4, 5, 6)


def test_names_that_are_images(tmp_path):
    reader = Reader()
    assert reader.verify_suffix(tmp_path)
    assert reader.verify_suffix(["a.nii.gz", "b.DCM", "IM0001"])
    assert not reader.verify_suffix("table.csv")
