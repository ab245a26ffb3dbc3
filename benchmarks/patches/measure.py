"""A patch classifier applied to a whole image at once, beside patch by patch: the same logits, how much sooner.

    python benchmarks/patches/measure.py

Both forms run in one process on one thread and take turns; the patches are those around voxels drawn from all over the
image, in batches of the best of several sizes. What counts is CPU time per voxel, the least of the turns.

A network gains by as much as its convolutions outweigh its dense layers: what a convolution finds serves all patches
that overlap there, but each voxel has its own dense layers. `multiplications` counts those per voxel in either form;
the rest of the gain is that large maps are convolved more efficiently than small ones. Planes as channels of one
network have no whole form, so they are not here.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from medseg.io import atomic_write_text
from medseg.networks import DilatedCNN, PatchClassifier, TriplanarClassifier, patches_around
from medseg.networks.voxel_patches import gather, pad_by

RESULTS = Path(__file__).parents[1] / "results"
BATCHES = (128, 512, 2048)
VESSELS = {"convolutions": [(16, 3, 1), (16, 3, 2), (32, 3, 1), (32, 3, 2)], "hidden": [64], "act": "RELU"}
PICTURE, VOLUME = (584, 565), (64, 64, 32)
#: How each is made, the image, and around how many voxels patches are tried.
NETWORKS: dict[str, tuple[Callable[[], PatchClassifier], tuple[int, ...], int]] = {
    "CNN 29x29": (partial(PatchClassifier, 2, 3, 2, scales=[(29, 1)], **VESSELS), PICTURE, 2048),
    "CNN, scales 29 and 87": (partial(PatchClassifier, 2, 3, 2, scales=[(29, 1), (29, 3)], **VESSELS), PICTURE, 1024),
    "CNN 3d 13x13x13": (
        partial(PatchClassifier, 3, 1, 2, [(13, 1)], [(16, 3, 1), (16, 3, 1), (16, 3, 1)], [64], act="RELU"),
        VOLUME,
        512,
    ),
    "triplanar, scales 29 and 87, 10 distances": (
        partial(TriplanarClassifier, 11, 11, features=10, **VESSELS),
        VOLUME,
        512,
    ),
    "MLP 11x11": (partial(PatchClassifier, 2, 3, 2, [(11, 1)], (), [64], act="RELU"), PICTURE, 8192),
    "tutorial's CNN, dense layer of 2000": (partial(PatchClassifier, 2, 3, 135), (96, 96), 1024),
}


def seconds(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """CPU seconds, and what came of it."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def multiplications(network: PatchClassifier, patch: Tensor, features: Tensor | None) -> tuple[int, int]:
    """Per voxel: of its patch alone, and of the whole image at once."""
    dense = sum(p.numel() for part in (network.merge, network.rest) for p in part.parameters() if p.ndim == 2)
    counts = [dense, dense]

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts[0] += module.weight.numel() * output[0, 0].numel()
        counts[1] += module.weight.numel()

    hooks = [layer.conv.register_forward_hook(count) for scale in network.scales for layer in scale.layers]
    network.forward_patches(patch, features)
    for hook in hooks:
        hook.remove()
    return counts[0], counts[1]


@torch.no_grad()
def measure(build: Callable[[], PatchClassifier], size: tuple[int, ...], count: int, repeats: int) -> dict[str, Any]:
    """Compare the two forms of one network."""
    torch.manual_seed(0)
    network = build().eval()
    image = torch.randn(1, network.in_channels, *size)
    channels = network.in_channels - network.features
    voxels = torch.stack([torch.randint(n, (count,)) for n in size], dim=1)
    where = tuple(voxels.unbind(1))
    features = image[0, channels:][(slice(None), *where)].t() if network.features else None

    padded = pad_by(image[:, :channels], network.patch_size // 2, network.padding)[0]

    def patch_by_patch(batch: int) -> Tensor:
        logits = []
        for part in torch.arange(count).split(batch):
            patches = gather(padded, voxels[part], network.patch_size, network.triplanar)
            logits.append(network.forward_patches(patches, None if features is None else features[part]))
        return torch.cat(logits)

    whole_times: list[float] = []
    patch_times: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for _ in range(repeats):
        elapsed, whole = seconds(lambda: network(image))
        whole_times.append(elapsed)
        for batch in BATCHES:
            elapsed, alone = seconds(partial(patch_by_patch, batch))
            patch_times[batch].append(elapsed)
    batch = min(BATCHES, key=lambda number: min(patch_times[number]))
    per_voxel = min(patch_times[batch]) / count, min(whole_times) / image[0, 0].numel()
    patch = patches_around(image[0, :channels], voxels[:1], network.patch_size, network.triplanar)
    of_patch, of_whole = multiplications(network, patch, None if features is None else features[:1])
    return {
        "image": list(size),
        "patch_size": network.patch_size,
        "batch_size": batch,
        "patches_us_per_voxel": 1e6 * per_voxel[0],
        "whole_us_per_voxel": 1e6 * per_voxel[1],
        "times_faster": per_voxel[0] / per_voxel[1],
        "multiplications": {"patch": of_patch, "whole": of_whole, "quotient": of_patch / of_whole},
        "largest_difference": (whole[0][(slice(None), *where)].t() - alone).abs().max().item(),
        "standard_deviation_of_logits": alone.std().item(),
    }


@torch.no_grad()
def measure_dilated(repeats: int, count: int = 16, size: int = 256) -> dict[str, Any]:
    """The dilated CNN as it was trained, on patches of 131 pixels, beside its padded form."""
    torch.manual_seed(0)
    padded, valid = DilatedCNN(2, 1, 3).eval(), DilatedCNN(2, 1, 3, padding=False).eval()
    valid.load_state_dict(padded.state_dict())
    image = torch.randn(1, 1, size, size)
    voxels = torch.randint(65, size - 65, (count, 2))
    patches = patches_around(image[0], voxels, 131)
    whole_times, patch_times = [], []
    for _ in range(repeats):
        elapsed, whole = seconds(lambda: padded(image))
        whole_times.append(elapsed)
        elapsed, alone = seconds(lambda: valid(patches))
        patch_times.append(elapsed)
    per_voxel = min(patch_times) / count, min(whole_times) / size**2
    return {
        "image": [size, size],
        "patch_size": 131,
        "patches_us_per_voxel": 1e6 * per_voxel[0],
        "whole_us_per_voxel": 1e6 * per_voxel[1],
        "times_faster": per_voxel[0] / per_voxel[1],
        "largest_difference": (whole[0][:, voxels[:, 0], voxels[:, 1]].t() - alone[..., 0, 0]).abs().max().item(),
        "standard_deviation_of_logits": alone.std().item(),
    }


@click.command()
@click.option("--repeats", default=3, show_default=True, help="Turns; the least time counts.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "patches.json", help="Where the result goes.")
def main(repeats: int, out: Path) -> None:
    """Measure every network."""
    torch.set_num_threads(1)
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "threads": 1,
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    results = {name: measure(*network, repeats) for name, network in NETWORKS.items()}
    results["dilated CNN 131x131"] = measure_dilated(repeats)
    for name, result in results.items():
        click.echo(
            f"{name}: {result['patches_us_per_voxel']:.0f} us per voxel by patches, {result['whole_us_per_voxel']:.1f} "
            f"at once, {result['times_faster']:.0f} times faster; logits differ by {result['largest_difference']:.0e}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out, json.dumps({"machine": machine, "networks": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
