"""A patch classifier learns the vessels of the retina, and draws those of a picture that it has not seen."""

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import compute_roc_auc
from PIL import Image
from torch.nn.functional import cross_entropy

from medseg.networks import PatchClassifier, patches_around
from medseg.transforms import RandVoxelPatches

OUTSIDE = 2  # of the field of view


def picture(folder: Path, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each color with mean 0 and deviation 1 in the field of view, [3, 584, 565]; 1 in vessels, OUTSIDE beyond."""

    def read(kind: str) -> torch.Tensor:
        (path,) = folder.glob(f"{kind}/{number:02d}_*")
        return torch.from_numpy(np.array(Image.open(path)))

    colors = read("images").float().movedim(-1, 0)
    inside = read("mask") > 0
    mean, std = colors[:, inside].mean(1), colors[:, inside].std(1)
    label = torch.where(inside, (read("1st_manual") > 0).long(), OUTSIDE)
    return (colors - mean[:, None, None]) / std[:, None, None], label


@pytest.mark.realdata
def test_it_learns_the_vessels_of_the_retina(data: Path) -> None:
    torch.manual_seed(0)
    network = PatchClassifier(
        2, 3, 2, scales=[(9, 1), (9, 3)], convolutions=[(8, 3, 1), (8, 3, 1)], hidden=[32], act="RELU"
    )
    cut = RandVoxelPatches(network.patch_size, num_samples=1000, ratios=[1, 1]).set_random_state(0)
    patches, classes = [], []
    for number in range(21, 37):
        image, label = picture(data / "drive" / "training", number)
        around, voxels = cut(image, label[None])
        patches.append(around)
        classes.append(label[voxels.unbind(1)])
    inputs, truth = torch.cat(patches), torch.cat(classes)
    assert set(truth.tolist()) == {0, 1}, "nothing outside of the field of view is drawn"

    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, total_iters=3 * len(truth) // 64)
    for _ in range(3):
        for chosen in torch.randperm(len(truth)).split(64):
            optimizer.zero_grad()
            cross_entropy(network.forward_patches(inputs[chosen]), truth[chosen]).backward()
            optimizer.step()
            schedule.step()

    image, label = picture(data / "drive" / "test", 1)
    with torch.no_grad():
        logits = network.eval()(image[None])[0]
        voxels = torch.tensor([[0, 0], [300, 280], [120, 333], [583, 564]])
        alone = network.forward_patches(patches_around(image, voxels, network.patch_size))
    torch.testing.assert_close(logits[(slice(None), *voxels.unbind(1))].t(), alone, rtol=1e-4, atol=1e-4)
    inside = label != OUTSIDE
    vessel = label[inside] == 1
    # Classes were drawn in equal numbers; vessels are an eighth of a retina.
    scores = (logits[1] - logits[0])[inside] - np.log(7)
    found = scores > 0
    dice = 2 * (found & vessel).sum() / (found.sum() + vessel.sum())
    area = compute_roc_auc(scores, vessel.int())
    print(f"DRIVE, picture 1: AUC {area:.3f}, Dice {dice:.3f}")
    assert area > 0.95
    assert dice > 0.7
