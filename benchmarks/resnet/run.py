"""Does normalizing the skip mend a U-Net of improved ResNet layers? What docs/explanation/improved_resnet.md tells.

    data_prep phantom dicom --patients 24 --slices 24 --image-size 64
    data_prep build petct dicom PETCT --roi "GTV*" --roi "LN*" --spacing 2 2 3 --keep-identifiers
    data_prep split PETCT --fractions 0.6 0.1 0.3 --seed 0
    data_prep slices PETCT --keep all
    python benchmarks/resnet/run.py --petct PETCT --hippocampus MR

MR is the dataset of docs/tutorials/hippocampus.md. Every run trains a small network from one seed and records, every
ten steps, the norms of the gradients of the 1×1 convolutions on the skips and of the convolutions on the residual
paths, and the spread of the output. Apart from that, networks in the thesis' full width are measured once, untrained.
Runs that the file of results holds already are not repeated. One core, about 20 minutes.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import matplotlib.pyplot as plt
import monai
import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.transforms import Compose, EnsureTyped, LoadImaged, NormalizeIntensityd, ResizeWithPadOrCropd
from torch import Tensor, nn

from medseg.data import SliceDataset, datalist
from medseg.io import Reader, atomic_write_text
from medseg.losses import FBetaLoss
from medseg.networks import ConvActNorm, InterpolateConv, PreActResidual, UNet
from medseg.transforms import HounsfieldWindow

RESULTS = Path(__file__).parents[1] / "results"
CHANNELS = (8, 16, 32, 64, 128)
THESIS_CHANNELS = (64, 128, 256, 512, 1024)
RATE, THESIS_RATE = 3e-3, 1e-4
EVERY = 10


class Variant(NamedTuple):
    """A kind of network: its parts as UNet takes them, and whether its output is a logit or taken as it is."""

    parts: dict[str, Any]
    sigmoid: bool = True


def residual_everywhere(norm: str | None) -> dict[str, Any]:
    """Parts of a U-Net without a normalization on its main path but for `norm`: SciNets' ResNet models.

    Up-convolutions and the head are residual too, and the head's activation, a sigmoid, stands before its convolutions.
    """
    block = partial(PreActResidual, shortcut_norm=norm)
    return {
        "block": block,
        "up": partial(InterpolateConv, conv=block),
        "head": partial(PreActResidual, act="SIGMOID", norm=None, shortcut_norm=norm),
    }


VARIANTS = {
    "convolutional": Variant({"block": ConvActNorm}),
    "residual": Variant({"block": PreActResidual}),
    "residual, normalized skip": Variant({"block": partial(PreActResidual, shortcut_norm="BATCH")}),
    "as SciNets": Variant(residual_everywhere(None), sigmoid=False),
    "as SciNets, normalized skip": Variant(residual_everywhere("BATCH"), sigmoid=False),
    "as SciNets, with a sigmoid": Variant(residual_everywhere(None)),
    "as SciNets, normalized skip, with a sigmoid": Variant(residual_everywhere("BATCH")),
}
BASIC = list(VARIANTS)[:3]
RAW = ["as SciNets", "as SciNets, with a sigmoid"]
SOURCES = ("PET/CT, window 0 to 1", "PET/CT, window in HU", "hippocampus")


class Data(NamedTuple):
    """Images and labels in memory, and what to do with them."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    loss: Callable[[bool], nn.Module]  # called with: is the output a logit?
    dice: Callable[[Tensor, Tensor, bool], Tensor]  # output, label, is the output a logit? -> one number per image
    spatial_dims: int
    classes: int
    channels: tuple[int, ...]
    batch_size: int
    steps: int


def petct(folder: Path, scaled: bool) -> Data:
    """The slices with tumor of a PET/CT dataset, cut to 64×64.

    The CT window becomes 0 to 1, as in medseg's bundle, or stays in HU about its center, as in SciNets.
    """
    window = HounsfieldWindow((70, 200), scale=scaled)

    def read(group: str) -> tuple[Tensor, Tensor]:
        slices = SliceDataset(folder / "slices.h5", group)
        items = [slices[int(index)] for index in np.flatnonzero(slices.has_label("tumor"))]
        images = torch.stack([torch.as_tensor(window(item["image"])) for item in items]).float()
        if not scaled:
            images[:, 0] -= 70
        labels = torch.stack([torch.as_tensor(item["label"]) for item in items]).float()
        return images[..., 16:80, 16:80], labels[..., 16:80, 16:80]

    def dice(output: Tensor, label: Tensor, logit: bool) -> Tensor:
        pred = (output > (0 if logit else 0.5)).float().flatten(1)
        label = label.flatten(1)
        return 2 * (pred * label).sum(1) / (pred.sum(1) + label.sum(1))

    return Data(read("train"), read("val"), lambda logit: FBetaLoss(2, sigmoid=logit), dice, 2, 1, CHANNELS, 8, 100)


def hippocampus(folder: Path, cases: int = 60) -> Data:
    """Volumes of 32×48×32 voxels about the center, with two labels."""
    keys = ["image", "label"]
    load = Compose(
        [
            LoadImaged(keys, reader=Reader, ensure_channel_first=True),
            NormalizeIntensityd("image"),
            ResizeWithPadOrCropd(keys, (32, 48, 32)),
            EnsureTyped(keys, track_meta=False),
        ]
    )

    def read(group: str) -> tuple[Tensor, Tensor]:
        items = [load(entry) for entry in datalist(folder, group)[:cases]]
        return torch.stack([item["image"] for item in items]).float(), torch.stack([item["label"] for item in items])

    def dice(output: Tensor, label: Tensor, logit: bool) -> Tensor:
        pred, label = output.argmax(1).flatten(1), label.flatten(1)
        return torch.stack(
            [
                2 * ((pred == c) & (label == c)).sum(1) / ((pred == c).sum(1) + (label == c).sum(1)).clamp(min=1)
                for c in (1, 2)
            ]
        ).mean(0)

    loss = partial(DiceCELoss, to_onehot_y=True, softmax=True, include_background=False, batch=True)
    return Data(read("train"), read("val"), lambda logit: loss(), dice, 3, 3, CHANNELS[:4], 2, 80)


def spread(values: Tensor) -> float:
    """The root of the mean square, to four digits."""
    return float(f"{values.detach().double().square().mean().sqrt().item():.4g}")


class Probe:
    """Sees what every residual layer (or layer of convolutions) puts out, and reads the gradients of its kernels."""

    def __init__(self, network: nn.Module) -> None:
        self.layers = [m for m in network.modules() if isinstance(m, PreActResidual) or type(m) is ConvActNorm]
        self.outputs: list[float] = []
        for layer in self.layers:
            layer.register_forward_hook(lambda _layer, _input, output: self.outputs.append(spread(output)))

    def gradients(self, path: str) -> list[float]:
        """The norm of the gradient of all kernels on a path, "shortcut" or "residual", for each layer that has them."""
        norms = []
        for layer in self.layers:
            if isinstance(layer, PreActResidual):
                part = getattr(layer, path)
            else:
                part = layer if path == "residual" else nn.Identity()
            kernels = [p.grad.flatten() for p in part.parameters() if p.ndim > 2 and p.grad is not None]
            if kernels:
                norms.append(float(f"{torch.cat(kernels).norm().item():.4g}"))
        return norms


def batches(images: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches without end, left and right swapped in half of the images."""
    chance = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(images), generator=chance).split(size):
            image, label = images[chosen], labels[chosen]
            flip = torch.rand(len(chosen), generator=chance) < 0.5
            image[flip], label[flip] = image[flip].flip(2), label[flip].flip(2)
            yield image, label


def network_of(variant: Variant, data: Data, channels: tuple[int, ...], seed: int) -> nn.Module:
    """An untrained network."""
    torch.manual_seed(seed)
    return UNet(data.spatial_dims, data.train[0].shape[1], data.classes, channels, **variant.parts)


def train(variant: Variant, data: Data, rate: float, seed: int) -> dict[str, Any]:
    """Train a network with Adam and return what was seen on the way."""
    network = network_of(variant, data, data.channels, seed)
    probe = Probe(network)
    loss_function = data.loss(variant.sigmoid)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    history: dict[str, list[Any]] = {name: [] for name in ("step", "loss", "output", "skip", "residual")}
    scores: dict[str, list[float]] = {"step": [], "dice": []}
    layers: dict[str, Any] = {}
    start = time.process_time()
    for step, (image, label) in enumerate(batches(*data.train, data.batch_size, seed)):
        look = step % EVERY == 0
        if step and step % (2 * EVERY) == 0:
            scores["step"].append(step)
            scores["dice"].append(validate(network, data, variant.sigmoid))
        if step == data.steps:
            break
        network.train()
        probe.outputs.clear()
        output = network(image)
        loss = loss_function(output, label)
        optimizer.zero_grad()
        loss.backward()
        if look:
            skip, residual = probe.gradients("shortcut"), probe.gradients("residual")
            seen = {"step": step, "loss": float(f"{loss.item():.4g}"), "output": spread(output)}
            seen |= {"skip": median_and_largest(skip), "residual": median_and_largest(residual)}
            for name, value in seen.items():
                history[name].append(value)
            if step in (0, data.steps - EVERY):
                key = "first" if step == 0 else "last"
                layers[key] = {"output": list(probe.outputs), "skip": skip, "residual": residual}
        optimizer.step()
    return {"history": history, "validation": scores, "layers": layers, "cpu_s": round(time.process_time() - start, 1)}


def median_and_largest(norms: list[float]) -> list[float]:
    """Of all layers; an empty list for none."""
    return [float(f"{np.median(norms):.4g}"), max(norms)] if norms else []


@torch.no_grad()
def validate(network: nn.Module, data: Data, logit: bool) -> float:
    """The mean Dice of the validation images, with the running statistics."""
    network.eval()
    images, labels = data.val
    parts = [data.dice(network(i), y, logit) for i, y in zip(images.split(16), labels.split(16), strict=True)]
    return round(torch.cat(parts).mean().item(), 4)


def untrained(variant: Variant, data: Data) -> dict[str, Any]:
    """One forward and backward pass at the thesis' width, on four slices."""
    network = network_of(variant, data, THESIS_CHANNELS, seed=0)
    probe = Probe(network)
    image, label = (values[:4] for values in data.train)
    output = network(image)
    loss = data.loss(variant.sigmoid)(output, label)
    loss.backward()
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "input": spread(image),
        "output": spread(output),
        "loss": round(loss.item(), 4),
        "saturated": round((output.detach().abs() > 10).double().mean().item(), 4),
        "layers": {
            "output": list(probe.outputs),
            "skip": probe.gradients("shortcut"),
            "residual": probe.gradients("residual"),
        },
    }


COLORS = {"convolutional": "black", "residual": "tab:red", "residual, normalized skip": "tab:blue"}
COLORS |= {"as SciNets": "tab:orange", "as SciNets, normalized skip": "tab:green"}


def draw(results: dict[str, Any], out: Path) -> None:
    """Layers of the untrained networks, gradients while training, and the scores."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    hu = SOURCES[1]
    titles = ("untrained, full width: features", "untrained, full width: gradients")
    for axis, key, title in zip(axes[0], ("output", "residual"), titles, strict=False):
        for name, color in COLORS.items():
            layers = results["untrained"][f"{hu} | {name}"]["layers"][key]
            axis.semilogy(range(1, len(layers) + 1), layers, ".-", color=color, label=name)
        axis.set(title=title, xlabel="layer")
    axes[0, 0].set_ylabel("root mean square of the output")
    axes[0, 1].set_ylabel("norm for the kernels of the residual path")
    for name in [name for name in COLORS if name != "convolutional"]:
        history = results["runs"][f"{hu} | {name} | {RATE:g} | seed 0"]["history"]
        for key, style in (("skip", "-"), ("residual", "--")):
            norms = [median for median, _ in history[key]]
            axes[0, 2].semilogy(history["step"], norms, style, color=COLORS[name])
    axes[0, 2].plot([], [], "k-", label="1×1 convolution on the skip")
    axes[0, 2].plot([], [], "k--", label="residual path")
    axes[0, 2].set(title="training: gradients", xlabel="step", ylabel="norm, median over the layers")
    for axis, source in zip(axes[1], SOURCES, strict=True):
        for key, run in results["runs"].items():
            where, name, rate, seed = key.split(" | ")
            if where == source and rate == f"{RATE:g}" and name in COLORS:
                label = name if seed == "seed 0" else None
                scores = run["validation"]
                axis.plot(scores["step"], scores["dice"], ".-", color=COLORS[name], label=label)
        axis.set(title=source, xlabel="step", ylabel="Dice, validation", ylim=(-0.02, 1))
    for axis in axes.flat:
        axis.legend(fontsize=7, framealpha=0.6)
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=80)


def processor() -> str:
    """The name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@click.command()
@click.option("--petct", "petct_dir", type=click.Path(path_type=Path), help="A sliced dataset of the phantom.")
@click.option("--hippocampus", "mr_dir", type=click.Path(path_type=Path), help="The hippocampus dataset.")
@click.option("--seeds", default=2, show_default=True, help="Runs of each kind.")
@click.option("--only", default="", help="Only runs whose name holds this.")
@click.option("--steps", type=int, help="Steps of each run; by default what the page says.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "resnet.json", help="Where the result goes.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw what the result holds to this file.")
def main(
    petct_dir: Path | None,
    mr_dir: Path | None,
    seeds: int,
    only: str,
    steps: int | None,
    out: Path,
    figure: Path | None,
) -> None:
    """Train U-Nets of plain and of residual layers and record their gradients."""
    torch.set_num_threads(1)
    sources: dict[str, tuple[Data, list[str]]] = {}
    if petct_dir:
        sources[SOURCES[0]] = (petct(petct_dir, scaled=True), [*BASIC, *RAW])
        sources[SOURCES[1]] = (petct(petct_dir, scaled=False), list(VARIANTS))
    if mr_dir:
        sources[SOURCES[2]] = (hippocampus(mr_dir), BASIC)
    results: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"untrained": {}, "runs": {}}
    results["machine"] = {
        "processor": processor(),
        "threads": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
    }

    def save() -> None:
        atomic_write_text(out, json.dumps(results, separators=(",", ":")).replace('},"', '},\n"') + "\n")

    for source, (data, names) in sources.items():
        for name in names if data.spatial_dims == 2 else []:
            key = f"{source} | {name}"
            if key not in results["untrained"] and only in key:
                results["untrained"][key] = untrained(VARIANTS[name], data)
                save()
    jobs = [(seed, RATE, source, name) for seed in range(seeds) for source in sources for name in sources[source][1]]
    jobs += [(0, THESIS_RATE, source, name) for source in sources if "HU" in source for name in VARIANTS]
    for seed, rate, source, name in jobs:
        key = f"{source} | {name} | {rate:g} | seed {seed}"
        if key in results["runs"] or only not in key:
            continue
        data = sources[source][0]
        run = train(VARIANTS[name], data._replace(steps=steps or data.steps), rate, seed)
        results["runs"][key] = run
        save()
        click.echo(f"{key}: Dice {run['validation']['dice'][-1:]}, {run['cpu_s']} s of CPU")
    if figure:
        draw(results, figure)


if __name__ == "__main__":
    main()
