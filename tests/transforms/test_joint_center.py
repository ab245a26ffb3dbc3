"""Where femur and tibia meet: found on phantoms as hard as knees are, refused on whatever is no knee."""

import inspect
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation

from medseg.errors import ConfigError, GeometryError
from medseg.io import read_image
from medseg.transforms import CropToJointCenter, CropToJointCenterd, find_joint_center, joint_center_of_bones

#: What makes it hard, one thing or several at a time.
KNEES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tilted and off the center": {"tilt": 8, "shift_mm": (10, -12)},
    "tilted the other way, thick growth plates": {"tilt": -10, "physis_mm": 3, "space_mm": 6, "scale": 0.9},
    "a child's, closed growth plates": {"scale": 0.85, "physis_mm": 0},
    "noise, and a coil that loses most of the signal": {"noise": 0.15, "coil": 0.8, "shift_mm": (-12, 15)},
    "a narrow joint": {"space_mm": 4.5, "physis_mm": 2.5},
    "a small field of view, far off": {"field_mm": 140, "tilt": 3, "shift_mm": (5, 20)},
    "41 thin slices": {"slices": 41, "thickness_mm": 2.4, "size": 200},
}


def as_image(knee: Any, voxels: Any) -> MetaTensor:
    affine = np.zeros((4, 4))
    # The axes run left, down and back.
    affine[0, 0], affine[2, 1], affine[1, 2] = -np.array(knee.spacing)
    affine[:, 3] = 50, 60, 70, 1
    return MetaTensor(torch.from_numpy(np.asarray(voxels)[None].astype(np.float32)), affine=torch.from_numpy(affine))


def off_mm(knee: Any, index: tuple[float, ...]) -> float:
    return float(np.linalg.norm((np.array(index[:2]) - knee.center) * knee.spacing[:2]))


@pytest.mark.parametrize("kind", KNEES)
def test_the_joint_is_found(make_knee: Callable[..., Any], kind: str) -> None:
    knee = make_knee(seed=len(kind), **KNEES[kind])
    found = find_joint_center(as_image(knee, knee.image))
    assert off_mm(knee, found.index) < 3
    assert found.index[2] == (knee.image.shape[2] - 1) / 2
    assert found.clarity >= 4
    assert off_mm(knee, joint_center_of_bones(as_image(knee, knee.femur), as_image(knee, knee.tibia))) < 1.5


@pytest.mark.parametrize("axes", ["RSA", "PLI"])
def test_it_is_the_same_place_in_any_stored_order(make_knee: Callable[..., Any], axes: str) -> None:
    knee = make_knee(tilt=5, shift_mm=(10, -8))
    turn = Orientation(axes, labels=(("L", "R"), ("P", "A"), ("I", "S")))
    places = []
    for found in (
        lambda image, femur, tibia: find_joint_center(image).index,
        lambda image, femur, tibia: joint_center_of_bones(femur, tibia),
    ):
        images = [as_image(knee, voxels) for voxels in (knee.image, knee.femur, knee.tibia)]
        turned = [turn(image) for image in images]
        places = [np.asarray(some[0].affine) @ [*found(*some), 1] for some in (images, turned)]
        np.testing.assert_allclose(places[0], places[1], atol=1.1)


def test_fat_saturation_is_refused(make_knee: Callable[..., Any]) -> None:
    knee = make_knee(fat_saturated=True)
    with pytest.raises(GeometryError, match=r"no joint found: .* without fat saturation"):
        find_joint_center(as_image(knee, knee.image))


@pytest.mark.parametrize("bone", ["femur", "tibia"])
def test_half_a_knee_is_refused(make_knee: Callable[..., Any], bone: str) -> None:
    """A field of view that ends before the joint has growth plates, and no joint."""
    knee = make_knee(physis_mm=2.5)
    middle = round(knee.center[1])
    half = slice(0, middle - 8) if bone == "femur" else slice(middle + 8, None)
    with pytest.raises(GeometryError, match="no joint found"):
        find_joint_center(as_image(knee, knee.image[:, half]))


@pytest.mark.parametrize("image", ["nothing", "noise"])
def test_no_image_is_no_joint(make_knee: Callable[..., Any], image: str) -> None:
    knee = make_knee(slices=8)
    noise = np.random.default_rng(0).rayleigh(100, knee.image.shape)
    with pytest.raises(GeometryError, match="no joint found"):
        find_joint_center(as_image(knee, noise if image == "noise" else np.zeros_like(knee.image)))


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name",
    [
        *(f"mr_registration/study1_{sequence}.nii.gz" for sequence in ("FLAIR", "T1W", "T2W")),
        *(f"prostate/expected/ProstateX-0000/ProstateX-0000_07-07-2011_{s}.mha" for s in ("t2w", "cor", "sag")),
        "hippocampus/images/hippocampus_001.nii.gz",
    ],
)
def test_real_images_of_other_regions_are_refused(data: Path, name: str) -> None:
    with pytest.raises(GeometryError, match=r"no joint found|coronal ones expected|at least 60 expected"):
        find_joint_center(read_image(data / name))


@pytest.mark.realdata
@pytest.mark.parametrize("axes", permutations(range(3)), ids=str)
@pytest.mark.parametrize("name", ["mr_registration/study1_T1W.nii.gz", "mhd/Case00.mhd"])
def test_nor_would_a_false_header_bring_them_through(data: Path, name: str, axes: tuple[int, ...]) -> None:
    image = read_image(data / name)
    spacing = np.linalg.norm(np.asarray(image.affine)[:3, :3], axis=0)[list(axes)]
    stack = image.as_tensor()[0].permute(axes)
    stack = stack[..., :: max(1, stack.shape[2] // 12)]
    affine = np.zeros((4, 4))
    affine[0, 0], affine[2, 1], affine[1, 2], affine[3, 3] = -spacing[0], -spacing[1], -10, 1
    with pytest.raises(GeometryError, match=r"no joint found|at least 60 expected"):
        find_joint_center(MetaTensor(stack[None], affine=torch.from_numpy(affine)))


def test_slices_that_are_not_coronal_are_named(make_knee: Callable[..., Any]) -> None:
    knee = make_knee(slices=8)
    image = as_image(knee, knee.image)
    for axes, plane in (((0, 2, 1), "axial"), ((1, 0, 2), "sagittal")):
        affine = np.asarray(image.affine)[[*axes, 3]]
        with pytest.raises(GeometryError, match=f"the slices are {plane} \\(the axis of 4 mm\\)"):
            find_joint_center(MetaTensor(image.as_tensor(), affine=torch.from_numpy(affine)))
    with pytest.raises(GeometryError, match="without affine"):
        find_joint_center(image.as_tensor())
    with pytest.raises(GeometryError, match="show 160 x 40 mm: at least 60"):
        find_joint_center(image[:, :, :40])


def test_bones_that_do_not_face_each_other_are_refused() -> None:
    affine = torch.diag(torch.tensor([1.0, 3.0, 1.0, 1.0], dtype=torch.float64))
    femur, tibia = (MetaTensor(torch.zeros(1, 8, 3, 8), affine=affine) for _ in range(2))
    femur[0, :3, :, 5:], tibia[0, 5:, :, :3] = 1, 1
    with pytest.raises(GeometryError, match="nowhere"):
        joint_center_of_bones(femur, tibia)


def test_the_joint_between_masks_by_hand() -> None:
    affine = torch.diag(torch.tensor([1.0, 3.0, 1.0, 1.0], dtype=torch.float64))  # axes right, forward, up
    femur, tibia = (MetaTensor(torch.zeros(1, 21, 3, 20), affine=affine) for _ in range(2))
    femur[0, 4:15, :, 12:] = 1
    tibia[0, 2:13, :, :7] = 1
    # Both at 4 to 12 across; the femur's lowest voxel is 12, the tibia's highest 6.
    assert joint_center_of_bones(femur, tibia) == (8, 1, 9)


def test_the_crop_is_a_square_in_mm_around_the_joint(make_knee: Callable[..., Any]) -> None:
    knee = make_knee(size=200, shift_mm=(10, -12))
    image = as_image(knee, knee.image)
    image = MetaTensor(image.as_tensor()[:, ::2], affine=image.affine @ np.diag([2.0, 1, 1, 1]))
    cropper = CropToJointCenter(100)
    crop = cropper(image)
    assert crop.shape == (1, 62, 125, 24)  # pixels of 1.6 x 0.8 mm
    middle = np.asarray(crop.affine) @ [30.5, 62, 0, 1]
    truth = np.asarray(as_image(knee, knee.image).affine) @ [*knee.center, 0, 1]
    assert np.linalg.norm(middle - truth) < 3
    # The voxels are those of the image, in their places.
    start = np.rint(np.linalg.inv(image.affine.numpy()) @ crop.affine.numpy()[:, 3]).astype(int)
    np.testing.assert_array_equal(crop, image[:, start[0] :][:, :62, start[1] : start[1] + 125])
    back = cropper.inverse(crop)
    assert back.shape == image.shape
    np.testing.assert_allclose(back.affine, image.affine)
    np.testing.assert_array_equal(back[:, start[0] : start[0] + 62, start[1] : start[1] + 125], crop)


def test_beyond_the_image_there_is_nothing(make_knee: Callable[..., Any]) -> None:
    knee = make_knee(shift_mm=(0, -25))
    crop = CropToJointCenter(150)(as_image(knee, knee.image))
    assert crop.shape == (1, 150, 150, 24)
    empty = [row for row in range(150) if not crop[0, :, row].any()]
    assert empty == list(range(len(empty)))
    assert 17 <= len(empty) <= 23  # 75 mm above the joint are wanted, 55 are there
    affine = as_image(knee, knee.image).affine.numpy()
    assert crop.affine[2, 3] == pytest.approx(affine[2, 3] + len(empty))


def test_image_and_label_are_cropped_alike(make_knee: Callable[..., Any]) -> None:
    knee = make_knee(tilt=4, shift_mm=(6, 9))
    data = {"image": as_image(knee, knee.image), "label": as_image(knee, knee.femur).to(torch.uint8), "case": "a"}
    crop = CropToJointCenterd(["image", "label"], "image", 110)
    result = Compose([crop])(data)
    assert result["case"] == "a"
    assert result["label"].dtype == torch.uint8
    np.testing.assert_array_equal(result["image"], CropToJointCenter(110)(data["image"]))
    np.testing.assert_array_equal(result["image"].affine, result["label"].affine)
    back = Compose([crop]).inverse(result)
    inside = CropToJointCenter(110).box(data["image"], find_joint_center(data["image"]).index)
    kept = np.zeros_like(knee.femur)
    kept[tuple(slice(max(0, a), b) for a, b in zip(*inside, strict=True))] = 1
    np.testing.assert_array_equal(back["label"][0], knee.femur * kept)
    assert nib.aff2axcodes(back["label"].affine.numpy()) == ("L", "I", "P")
    with pytest.raises(GeometryError, match=r"^image: no joint found"):
        crop({**data, "image": data["image"] * 0})
    with pytest.raises(KeyError):
        crop({"image": data["image"]})
    assert set(CropToJointCenterd(["image", "label"], "image", allow_missing_keys=True)({"image": data["image"]})) == {
        "image"
    }


def test_twins_have_the_same_arguments() -> None:
    own = inspect.signature(CropToJointCenter).parameters
    twin = dict(inspect.signature(CropToJointCenterd).parameters)
    assert [twin.pop(name).name for name in ("keys", "source_key", "allow_missing_keys")]
    assert list(own.values()) == list(twin.values())
    with pytest.raises(ConfigError, match="size_mm 0: positive mm expected"):
        CropToJointCenter(0)
