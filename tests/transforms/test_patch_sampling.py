"""Patches around voxels that are drawn class by class."""

from collections import Counter

import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor
from monai.transforms import Compose, SpatialCrop

from medseg.data import SeededDataset
from medseg.errors import ConfigError
from medseg.transforms import RandVoxelPatches, RandVoxelPatchesd


def volume(rare: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """An image of which every voxel has another value, and a label map with few voxels of class 1."""
    image = torch.arange(1.0, 1 + 2 * 8 * 7 * 6).view(2, 8, 7, 6)
    label = torch.zeros(1, 8, 7, 6)
    label.view(-1)[:rare] = 1
    label[0, 7, 6, 5] = 2
    return image, label


def test_classes_are_drawn_in_their_shares() -> None:
    image, label = volume()
    cut = RandVoxelPatches(size=1, num_samples=4000, ratios=[1, 2, 1]).set_random_state(0)
    _, voxels = cut(image, label)
    counts = Counter(label[(0, *voxels.t())].tolist())
    assert counts[1] == pytest.approx(2000, abs=150)
    assert counts[0] == pytest.approx(1000, abs=130)
    assert len({tuple(v) for v in voxels.tolist()}) > 250, "voxels from everywhere in the image, its borders included"


def test_the_share_of_an_absent_class_goes_to_the_others_and_classes_without_one_are_never_drawn() -> None:
    image, label = volume()
    _, voxels = RandVoxelPatches(1, 500, ratios=[0, 1]).set_random_state(0)(image, label)
    assert set(label[(0, *voxels.t())].tolist()) == {1}
    _, voxels = RandVoxelPatches(1, 500, ratios=[1, 1, 0, 5]).set_random_state(0)(image, label)
    assert set(label[(0, *voxels.t())].tolist()) == {0, 1}
    with pytest.raises(ConfigError, match=r"no voxel of the classes \[3\]"):
        RandVoxelPatches(1, 5, ratios=[0, 0, 0, 1])(image, label)


@pytest.mark.parametrize("triplanar", [False, True])
def test_patches_have_their_voxel_in_the_middle(triplanar: bool) -> None:
    image, label = volume()
    cut = RandVoxelPatches(5, 50, ratios=[1, 1, 1], triplanar=triplanar).set_random_state(1)
    patches, voxels = cut(image, label)
    assert patches.shape == ((50, 6, 5, 5) if triplanar else (50, 2, 5, 5, 5))
    middle = image[(slice(None), *voxels.t())].t()
    torch.testing.assert_close(patches[(..., *[2] * (patches.ndim - 2))], middle.repeat(1, 3 if triplanar else 1))


def test_inside_the_image_a_patch_is_the_crop_of_monai() -> None:
    image, label = volume()
    label[:] = 0
    label[0, 3:5, 3, 2] = 1
    patches, voxels = RandVoxelPatches(5, 9, ratios=[0, 1]).set_random_state(1)(image, label)
    for patch, voxel in zip(patches, voxels.tolist(), strict=True):
        torch.testing.assert_close(patch, SpatialCrop(roi_center=voxel, roi_size=5)(image), check_dtype=False)


def test_drawing_is_seeded_and_arrays_will_do() -> None:
    image, label = volume()
    cut = RandVoxelPatches(3, 20, ratios=[1, 1])
    first, _ = cut.set_random_state(5)(image, label)
    again, _ = cut.set_random_state(5)(image.numpy(), label.numpy().astype(np.uint8))
    other, _ = cut.set_random_state(6)(image, label)
    torch.testing.assert_close(first, again)
    assert not torch.equal(first, other)


def test_a_loader_makes_batches_of_them() -> None:
    image, label = volume()
    items = [{"image": MetaTensor(image), "distances": image[:1] * 2, "label": label, "case": name} for name in "ab"]
    cut = RandVoxelPatchesd(
        "image", "label", size=3, num_samples=4, ratios=[1, 1], triplanar=True, voxel_keys="distances"
    )
    dataset = SeededDataset(items, Compose([cut]), seed=3)
    (batch,) = DataLoader(dataset, batch_size=2)
    assert batch["image"].shape == (8, 6, 3, 3)
    assert batch["case"] == ["a"] * 4 + ["b"] * 4
    at = (slice(None), *batch["voxel"].t())
    assert batch["label"].tolist() == label[at][0].tolist()
    torch.testing.assert_close(batch["distances"], 2 * image[:1][at].t())
    torch.testing.assert_close(batch["image"][:, 0, 1, 1], image[0][at[1:]])
    assert not torch.equal(batch["voxel"][:4], batch["voxel"][4:]), "each image has its own seed"
    (again,) = DataLoader(dataset, batch_size=2)
    assert torch.equal(again["voxel"], batch["voxel"])


def test_what_makes_no_sense_is_named() -> None:
    image, label = volume()
    for arguments in ({"num_samples": 0}, {"ratios": ()}, {"ratios": [1, -1]}, {"ratios": [0, 0]}):
        with pytest.raises(ConfigError, match="expected at least 1, and a share per class"):
            RandVoxelPatches(**{"size": 3, "num_samples": 1, "ratios": [1], **arguments})
    with pytest.raises(ConfigError, match="label: none given"):
        RandVoxelPatches(3, 1, [1])(image)
    with pytest.raises(ConfigError, match=r"image: of \(8, 7, 5\) voxels, the label map has \(8, 7, 6\)"):
        RandVoxelPatchesd("image", "label", 3, 1, [1])({"image": image[..., :5], "label": label})
    with pytest.raises(ConfigError, match="odd number"):
        RandVoxelPatches(4, 1, [1])(image, label)
