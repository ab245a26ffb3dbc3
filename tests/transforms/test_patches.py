"""Patches around a lesion: where they lie, what they hold, and that they can be rotated before the last crop."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import CenterSpatialCrop, Rotate
from scipy.spatial.transform import Rotation

from medseg.errors import ConfigError, GeometryError
from medseg.transforms import CropFraction, CropFractiond, LesionPatch, LesionPatchd


def oblique(spacing: tuple[float, float, float], through: np.ndarray, index: tuple[int, int, int]) -> np.ndarray:
    """An affine with tilted axes that puts the voxel ``index`` on the point ``through``."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xz", [18, 7], degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = through - affine[:3, :3] @ index
    return affine


def test_a_point_is_the_middle_pixel_of_every_sequence() -> None:
    point = np.array([12.5, -30.0, 41.0])
    images = {}
    for name, shape, spacing, index in (
        ("t2", (90, 80, 9), (0.5, 0.5, 3.0), (44, 31, 4)),
        ("dwi", (24, 30, 7), (2.0, 2.0, 3.6), (13, 11, 5)),
        ("adc", (40, 41, 6), (1.25, 1.5, 4.0), (20, 17, 1)),
    ):
        voxels = torch.zeros(1, *shape)
        voxels[(0, *index)] = 100
        images[name] = MetaTensor(voxels, affine=oblique(spacing, point, index))
    patches = LesionPatchd(list(images), size=31, spacing=0.5)({**images, "position": point})
    for name in images:
        patch = patches[name]
        assert np.unravel_index(int(patch.argmax()), patch.shape) == (0, 15, 15, 0), name
        assert float(patch.max()) == pytest.approx(100, abs=1e-3)
        np.testing.assert_array_equal(patch.affine, patches["t2"].affine)
        np.testing.assert_allclose((np.asarray(patch.affine) @ [15, 15, 0, 1])[:3], point, atol=1e-9)
    assert [patches[name].meta["slice_index"] for name in images] == [4, 5, 1]


def test_the_nearest_slice_is_taken_and_the_patch_lies_in_it() -> None:
    image = MetaTensor(torch.arange(5.0).expand(1, 8, 8, 5).clone(), affine=np.diag([1.0, 1, 3, 1]))
    for z, k in ((2.9, 1), (4.4, 1), (4.6, 2), (13.4, 4), (-1.4, 0)):
        patch = LesionPatch(3, 1)(image, (4, 4, z))
        assert patch.unique().tolist() == [k]
        assert float(patch.affine[2, 3]) == 3 * k


def test_a_patch_is_the_cubic_spline_of_simpleitk() -> None:
    rng = np.random.default_rng(3)
    plane = rng.normal(size=(24, 20)).astype(np.float32)
    image = MetaTensor(torch.from_numpy(plane[None, ..., None]), affine=np.diag([2.0, 1.5, 3, 1]))
    patch = LesionPatch(21, 0.7)(image, (23.3, 14.9, 0.2))
    other = sitk.GetImageFromArray(plane.T)
    other.SetSpacing((2.0, 1.5))
    grid = sitk.Image(21, 21, sitk.sitkFloat32)
    grid.SetSpacing((0.7, 0.7))
    grid.SetOrigin((23.3 - 7, 14.9 - 7))
    expected = sitk.GetArrayFromImage(sitk.Resample(other, grid, sitk.Transform(), sitk.sitkBSpline)).T
    np.testing.assert_allclose(patch[0, ..., 0], expected, atol=2e-2)
    linear = sitk.GetArrayFromImage(sitk.Resample(other, grid, sitk.Transform(), sitk.sitkLinear)).T
    assert np.abs(linear - expected).max() > 0.2  # so that the comparison tells the one from the other


@given(x=st.integers(0, 19), y=st.integers(0, 14), z=st.integers(0, 3), size=st.integers(1, 25), fill=st.floats(-5, 5))
def test_on_its_own_grid_a_patch_is_a_padded_crop(x: int, y: int, z: int, size: int, fill: float) -> None:
    voxels = np.random.default_rng(0).normal(size=(20, 15, 4)).astype(np.float32)
    affine = oblique((0.8, 0.8, 3.0), np.array([5.0, -7.0, 2.0]), (0, 0, 0))
    patch = LesionPatch(size, 0.8, fill)(MetaTensor(voxels[None], affine=affine), (affine @ [x, y, z, 1])[:3])
    half = size // 2
    padded = np.pad(voxels[..., z], 25, constant_values=np.float32(fill))
    expected = padded[x + 25 - half :, y + 25 - half :][:size, :size]
    np.testing.assert_allclose(patch[0, ..., 0], expected, atol=1e-4)
    inside = np.pad(np.ones((20, 15)), 25)[x + 25 - half :, y + 25 - half :][:size, :size]
    assert patch.meta["outside"] == pytest.approx(1 - inside.mean())


@pytest.mark.parametrize("position", [(-0.8, 4, 4), (4, 8.3, 4), (4, 4, 13.6)])
def test_a_point_outside_is_refused(position: tuple[float, float, float]) -> None:
    image = MetaTensor(torch.zeros(1, 8, 8, 5), affine=np.diag([1.0, 1, 3, 1]))
    with pytest.raises(GeometryError, match=r"lies .* mm outside of the image: its index is .* of 8x8x5 voxels"):
        LesionPatch(3, 1)(image, position)


def test_slices_of_another_orientation_are_refused() -> None:
    transverse = MetaTensor(torch.zeros(1, 8, 8, 8), affine=np.eye(4))
    sagittal = MetaTensor(torch.zeros(1, 8, 8, 8), affine=np.eye(4)[[2, 0, 1, 3]])
    with pytest.raises(GeometryError, match="tilted 90°"):
        LesionPatchd(["a", "b"], 3, 1)({"a": transverse, "b": sagittal, "position": (4, 4, 4)})
    for size, spacing in ((0, 1.0), (3, 0.0), (3, float("nan"))):
        with pytest.raises(ConfigError, match="positive mm expected"):
            LesionPatch(size, spacing)


@given(width=st.integers(2, 60), height=st.integers(2, 60), data=st.data())
def test_a_crop_has_the_pixel_in_its_middle_and_pads_what_is_not_there(
    width: int, height: int, data: st.DataObject
) -> None:
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    values = torch.arange(1.0, width * height + 1).reshape(1, width, height, 1)
    crop = CropFraction((1 / 4, 2 / 7), fill=-1024)(MetaTensor(values), (x, y))
    for n, full, part in zip(crop.shape[1:3], (width, height), (1 / 4, 2 / 7), strict=True):
        assert n % 2 == 1
        assert abs(n - full * part) <= 1
    a, b = crop.shape[1] // 2, crop.shape[2] // 2
    assert float(crop[0, a, b, 0]) == float(values[0, x, y, 0])
    assert (np.asarray(crop.affine) @ [a, b, 0, 1])[:2].tolist() == [x, y]
    there = crop.as_tensor() != -1024
    assert crop.meta["outside"] == pytest.approx(1 - float(there.float().mean()))
    assert (
        sorted(crop.as_tensor()[there].tolist())
        == values[0, max(0, x - a) : x + a + 1, max(0, y - b) : y + b + 1, 0].flatten().tolist()
    )


def test_the_sizes_of_the_thesis() -> None:
    assert CropFraction((1 / 6, 1 / 6))(MetaTensor(torch.zeros(1, 512, 512)), (0, 0)).shape == (1, 85, 85)
    with pytest.raises(GeometryError, match=r"the pixel 5 9 is not in the image of 8 × 9 pixels"):
        CropFractiond("image", (0.5, 0.5))({"image": MetaTensor(torch.zeros(1, 8, 9)), "center": (5, 9)})
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        CropFraction((0.5, 1.5))


@pytest.mark.parametrize("degrees", [-20, -7, 20])
def test_a_crop_after_the_rotation_holds_no_padding_and_keeps_the_lesion(degrees: float) -> None:
    """The reason for large patches: 65 × 65 cut after a rotation of up to 20° is all image; cut before, it is not."""
    image = MetaTensor(torch.ones(1, 300, 300, 1), affine=np.diag([0.5, 0.5, 3, 1]))
    image[0, 150, 150] = 50
    rotate = Rotate(np.radians(degrees), mode="bilinear", padding_mode="zeros", keep_size=True)
    last = CenterSpatialCrop((65, 65))

    def rotated(size: int) -> torch.Tensor:
        patch = LesionPatch(size, 0.5)(image, (75, 75, 0))
        return last(rotate(patch[..., 0])).as_tensor()

    large = rotated(201)
    assert np.unravel_index(int(large.argmax()), large.shape) == (0, 32, 32)
    assert float(large.min()) > 0.5
    assert float(rotated(65).min()) == 0


@pytest.mark.parametrize(
    ("image", "position"),
    [
        (torch.zeros(1, 8, 8, 5), (4, 4, 4)),
        (MetaTensor(torch.zeros(1, 8, 8)), (4, 4, 4)),
        (MetaTensor(torch.zeros(1, 8, 8, 5)), (4, 4)),
    ],
    ids=["no affine", "a picture", "a pixel"],
)
def test_a_patch_needs_a_volume_with_an_affine_and_a_point(image: torch.Tensor, position: tuple[float, ...]) -> None:
    with pytest.raises(GeometryError, match=r"expected a MetaTensor .* and a point in RAS mm"):
        LesionPatch(3, 1)(image, position)


def test_a_pixel_that_is_no_number_is_refused() -> None:
    with pytest.raises(GeometryError, match="the pixel nan 1 is not in the image"):
        CropFraction((0.5, 0.5))(MetaTensor(torch.zeros(1, 8, 9)), (float("nan"), 1))
