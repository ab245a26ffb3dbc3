"""Resampling, compared with SimpleITK."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor

from data_prep.resample import Grid, check_same_grid, resample, spaced_grid
from medseg.errors import GeometryError

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def tilted(spacing: tuple[float, float, float], origin: tuple[float, float, float], angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine = np.eye(4)
    affine[:3, :3] = turn * np.array(spacing)
    affine[:3, 3] = origin
    return affine


def as_itk(voxels: np.ndarray, affine: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    place(image, affine)
    return image


def place(image: sitk.Image, affine: np.ndarray) -> None:
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())


@pytest.mark.parametrize("angle", [0.0, 0.3])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_it_agrees_with_simpleitk_inside_at_the_edge_and_outside(angle: float, mode: str) -> None:
    rng = np.random.default_rng(0)
    voxels = rng.normal(size=(17, 14, 9)).astype(np.float32)
    if mode == "nearest":
        voxels = rng.integers(0, 5, voxels.shape).astype(np.uint8)
    own = tilted((1.7, 2.1, 3.3), (-11, 4, 7), 0.2)
    # Juts out on all sides, and no center lies on the border of two voxels.
    grid = Grid((22, 19, 15), tilted((1.93, 1.87, 2.71), (-17.3, -2.9, 2.1), angle))
    ours = resample(MetaTensor(torch.from_numpy(voxels[None]), affine=torch.from_numpy(own)), grid, mode, outside=7)  # type: ignore[arg-type]
    reference = sitk.Image(list(grid.shape), sitk.sitkFloat32)
    place(reference, grid.affine)
    interpolator = sitk.sitkLinear if mode == "linear" else sitk.sitkNearestNeighbor
    theirs = sitk.GetArrayFromImage(
        sitk.Resample(as_itk(voxels, own), reference, sitk.Transform(), interpolator, 7.0)
    ).T
    outside = (theirs == 7).mean()
    assert 0.2 < outside < 0.9
    np.testing.assert_allclose(np.asarray(ours)[0], theirs, atol=2e-5)
    np.testing.assert_allclose(np.asarray(ours.affine), grid.affine)
    assert ours.dtype == (torch.float32 if mode == "linear" else torch.uint8)


def test_a_new_spacing_keeps_center_axes_and_field_of_view() -> None:
    image = MetaTensor(torch.zeros(1, 50, 40, 21), affine=torch.from_numpy(tilted((1, 1, 3), (5, 6, 7), 0.4)))
    old, new = Grid.of(image), spaced_grid(image, (2.0, 0.8, 5.0))
    assert new.shape == (25, 50, 13)
    np.testing.assert_allclose(new.spacing, (2.0, 0.8, 5.0))
    middle = [grid.affine @ [*(np.array(grid.shape) - 1) / 2, 1] for grid in (old, new)]
    np.testing.assert_allclose(*middle, atol=1e-9)
    np.testing.assert_allclose(new.affine[:3, :3] / new.spacing, old.affine[:3, :3] / old.spacing)


def test_the_own_grid_changes_nothing_and_a_part_is_cut_exactly() -> None:
    voxels = torch.randn(2, 8, 7, 6)
    image = MetaTensor(voxels, affine=torch.from_numpy(tilted((0.9, 1.1, 2.3), (1, 2, 3), 0.3)))
    grid = Grid.of(image)
    assert torch.equal(resample(image, grid, "linear").as_tensor(), voxels)
    part = grid.part(np.array([2, -1, 1]), (4, 5, 9))
    cut = resample(image, part, "linear", outside=-9).as_tensor()
    torch.testing.assert_close(cut[:, :, 1:, :5], voxels[:, 2:6, :4, 1:], atol=1e-5, rtol=0)
    assert (cut[:, :, 0] == -9).all()
    assert (cut[..., 5:] == -9).all()


def test_grids_that_differ_are_told_apart() -> None:
    one = MetaTensor(torch.zeros(1, 50, 40, 21), affine=torch.eye(4, dtype=torch.float64))
    turned = torch.from_numpy(tilted((1, 1, 1), (0, 0, 0), 0.003))  # 0.15 mm at the far corner
    with pytest.raises(GeometryError, match=r"the label lies up to 0\.\d+ mm away from the image"):
        check_same_grid(one, MetaTensor(torch.zeros(1, 50, 40, 21), affine=turned), "the label", "the image")
    with pytest.raises(GeometryError, match="shape 50x40x20, the image 50x40x21"):
        check_same_grid(one, one[..., :20], "the label", "the image")
