"""T1 and T2 of a patient brought onto the FLAIR, against the transforms that were published with the images."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medseg.io import read_image
from medseg.transforms import Register, Registration
from medseg.transforms import registration as module


def published(folder: Path, name: str) -> Registration:
    """ITK's affine transforms, in LPS, from points of the FLAIR to points of the other image."""
    return Registration.from_bytes((folder / f"study1_{name}_intrastudy_to_FLAIR.txt").read_bytes())


def brain(flair: sitk.Image) -> np.ndarray:
    """Mask the brain: above Otsu's threshold, cut from the scalp by an opening, the largest part, closed and filled."""
    bright = sitk.OtsuThreshold(flair, 0, 1)
    radius = [round(6 / spacing) for spacing in flair.GetSpacing()]
    parts = sitk.RelabelComponent(sitk.ConnectedComponent(sitk.BinaryErode(bright, radius)))
    core = sitk.And(sitk.BinaryDilate(parts == 1, radius), bright)
    closed = sitk.BinaryMorphologicalClosing(core, [round(10 / spacing) for spacing in flair.GetSpacing()])
    return sitk.GetArrayFromImage(sitk.BinaryFillhole(closed)) > 0


def displacements(registration: Registration, grid: sitk.Image, mask: np.ndarray) -> np.ndarray:
    """Displacements in mm at the centers of all voxels in a mask, [n, 3]."""
    field = sitk.TransformToDisplacementField(
        module._parsed(registration.transform),
        sitk.sitkVectorFloat64,
        grid.GetSize(),
        grid.GetOrigin(),
        grid.GetSpacing(),
        grid.GetDirection(),
    )
    return sitk.GetArrayFromImage(field)[mask]


CASES = [
    ("T1W", "rigid"),
    ("T2W", "rigid"),
    pytest.param("T1W", "affine", marks=pytest.mark.long),
    pytest.param("T2W", "affine", marks=pytest.mark.long),
]


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_published_transforms_are_found(data, name, kind):
    folder = data / "mr_registration"
    flair = sitk.ReadImage(str(folder / "study1_FLAIR.nii.gz"))
    mask = brain(flair)
    assert 1.0e6 < mask.sum() * np.prod(flair.GetSpacing()) < 1.4e6  # mm³
    fixed = read_image(folder / "study1_FLAIR.nii.gz")

    image, registration = Register(kind)(read_image(folder / f"study1_{name}.nii.gz"), fixed)

    apart = displacements(registration, flair, mask) - displacements(published(folder, name), flair, mask)
    distances = np.linalg.norm(apart, axis=1)
    assert distances.mean() <= 1.0
    assert distances.max() <= 2.5
    # The images hardly moved between the scans: what was found is nearer to the published than that allows.
    assert distances.mean() <= 0.6
    assert image.shape == fixed.shape
    figures = registration.figures
    assert figures["mutual_information_after"] > figures["mutual_information_before"]
    assert figures["overlap"] > 0.95


@pytest.mark.realdata
@pytest.mark.long
def test_a_head_that_lay_elsewhere_is_found_again(data):
    folder = data / "mr_registration"
    fixed = read_image(folder / "study1_FLAIR.nii.gz")
    moving = read_image(folder / "study1_T1W.nii.gz")
    _, still = Register()(moving, fixed)
    turn = np.radians(9)
    motion = np.eye(4)
    motion[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    motion[:3, 3] = 14, -11, 17
    moving.affine = motion @ moving.affine.numpy()

    _, moved = Register()(moving, fixed)

    grid = sitk.ReadImage(str(folder / "study1_FLAIR.nii.gz"))
    mask = brain(grid)
    index = np.argwhere(mask)[:, ::-1]
    place = index * grid.GetSpacing() @ np.array(grid.GetDirection()).reshape(3, 3).T + grid.GetOrigin()
    lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    matrix = lps @ motion @ lps
    expected = (place + displacements(still, grid, mask)) @ matrix[:3, :3].T + matrix[:3, 3]
    apart = np.linalg.norm(place + displacements(moved, grid, mask) - expected, axis=1)
    assert apart.mean() < 0.3, apart.mean()
    assert apart.max() < 0.7, apart.max()
    assert abs(moved.figures["rotation_deg"] - 9) < 0.5
