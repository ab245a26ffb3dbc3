"""One training step of medseg's networks beside the same networks written plainly in torch, and F-beta beside Tversky.

    python benchmarks/step/measure.py

A step is forward, loss, backward and optimizer. Before anything is timed, both get the same weights and must give the
same output and gradients. Then they take turns, the first to go changing with each round; `ratio` is the median over
the rounds of medseg's time divided by the other's in the same round, `ratio_of_least` that of the least times.
`torch.compile`, channels-last and bfloat16 autocast of medseg's network stand beside, as ratios to medseg's plain step.
"""

import copy
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import monai
import torch
from monai.losses import TverskyLoss
from plain import PlainDenseUNet, PlainUNet, copy_weights
from torch import Tensor, nn

from medseg.io import atomic_write_text
from medseg.losses import FBetaLoss
from medseg.networks import DenseUNet, UNet

RESULTS = Path(__file__).parents[1] / "results"

#: The network, its plain twin and the shape of a batch.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "UNet 2D": (
        partial(UNet, 2, 2, 1, channels=(32, 64, 128, 256, 512)),
        partial(PlainUNet, 2, 2, 1, channels=(32, 64, 128, 256, 512)),
        (8, 2, 128, 128),
    ),
    "UNet 3D": (
        partial(UNet, 3, 1, 1, channels=(16, 32, 64, 128)),
        partial(PlainUNet, 3, 1, 1, channels=(16, 32, 64, 128)),
        (2, 1, 48, 48, 48),
    ),
    "DenseUNet": (partial(DenseUNet, 2, 3, 1), partial(PlainDenseUNet, 2, 3, 1), (8, 3, 128, 128)),
}

#: Shape of the logits, whether they are one class by sigmoid (else classes by softmax, the target a label map).
LOSSES = {"sigmoid, 2D": ((8, 1, 256, 256), True), "softmax of 3 classes, 3D": ((2, 3, 64, 64, 64), False)}


def seconds(job: Callable[[], Any], device: torch.device) -> float:
    """How long a job takes, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(jobs: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Times of every job in every round, after one to warm up; every other round goes backwards."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for n in range(rounds + 1):
        for name in list(jobs) if n % 2 else reversed(jobs):
            spent = seconds(jobs[name], device)
            if n:
                times[name].append(spent)
    return times


def compare(times: dict[str, list[float]], ours: str, theirs: str) -> dict[str, float]:
    """The two ratios of the module's text."""
    pairs = zip(times[ours], times[theirs], strict=True)
    return {
        "ratio": round(statistics.median(a / b for a, b in pairs), 4),
        "ratio_of_least": round(min(times[ours]) / min(times[theirs]), 4),
    }


def milliseconds(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """The least and the median of each."""
    return {
        name: {"least_ms": round(1000 * min(t), 3), "median_ms": round(1000 * statistics.median(t), 3)}
        for name, t in times.items()
    }


def step_of(network: nn.Module, image: Tensor, target: Tensor, bf16: bool = False) -> Callable[[], Tensor]:
    """One training step."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    loss_function = nn.BCEWithLogitsLoss()
    network.train()

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
            loss = loss_function(network(image), target)
        loss.backward()
        optimizer.step()
        return loss

    return step


def check_equal(ours: nn.Module, plain: nn.Module, image: Tensor, target: Tensor) -> float:
    """Raise unless both give the same output and gradients; dropout draws the same. Return the largest difference."""
    outputs = []
    for network in (ours, plain):
        torch.manual_seed(0)
        output = network.train()(image)
        nn.functional.binary_cross_entropy_with_logits(output, target).backward()
        outputs.append(output.detach())
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-3 * a.grad.abs().max().item() + 1e-6)
    return float((outputs[0] - outputs[1]).abs().max())


def measure_network(name: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """A network beside its plain twin, then its variants beside itself."""
    build, build_plain, shape = NETWORKS[name]
    torch.manual_seed(0)
    ours, plain = build().to(device), build_plain().to(device)
    copy_weights(ours, plain)
    image = torch.randn(shape, device=device)
    target = (torch.rand(shape[0], 1, *shape[2:], device=device) > 0.9).float()
    difference = check_equal(copy.deepcopy(ours), copy.deepcopy(plain), image, target)
    jobs = {"medseg": step_of(copy.deepcopy(ours), image, target), "plain": step_of(plain, image, target)}
    times = take_turns(jobs, rounds, device)
    result = {
        "batch": shape,
        "parameters": sum(p.numel() for p in ours.parameters()),
        "largest_difference": difference,
        **compare(times, "medseg", "plain"),
        **milliseconds(times),
    }

    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    variants: dict[str, Callable[[], Any]] = {
        "channels_last": step_of(copy.deepcopy(ours).to(memory_format=last), image.to(memory_format=last), target),
        "bf16": step_of(copy.deepcopy(ours), image, target, bf16=True),
        "channels_last_bf16": step_of(
            copy.deepcopy(ours).to(memory_format=last), image.to(memory_format=last), target, bf16=True
        ),
    }
    compiled = copy.deepcopy(ours)
    start = time.perf_counter()
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        result["compile_skipped"] = "no C++ compiler, which torch.compile needs on the CPU"
    else:
        torch.compiler.reset()  # else torch takes the sizes that differ from the last network's for variable ones
        compiled.compile(dynamic=False)
        variants["compile"] = step_of(compiled, image, target)
        variants["compile"]()
        result["compile_s"] = round(time.perf_counter() - start, 1)
    times = take_turns({"medseg": jobs["medseg"], **variants}, max(2, rounds // 3), device)
    result["variants"] = {
        key: {"ratio": compare(times, key, "medseg")["ratio"], **value}
        for key, value in milliseconds(times).items()
        if key != "medseg"
    }
    return result


def measure_loss(name: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """F-beta, linear and with squares, beside the Tversky loss that the linear one equals; forward and backward."""
    shape, sigmoid = LOSSES[name]
    torch.manual_seed(0)
    logits = torch.randn(shape, device=device, requires_grad=True)
    labels = torch.randint(0, max(2, shape[1]), (shape[0], 1, *shape[2:]), device=device).float()
    words = {"sigmoid": sigmoid, "softmax": not sigmoid, "to_onehot_y": not sigmoid}
    losses = {
        "F-beta, linear": FBetaLoss(2, squared=False, **words),
        "F-beta, squares": FBetaLoss(2, **words),
        "Tversky": TverskyLoss(alpha=0.2, beta=0.8, **words),
    }
    gradients = [torch.autograd.grad(loss(logits, labels), logits)[0] for loss in losses.values()]
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-3, atol=1e-9)

    def job(loss: nn.Module) -> None:
        logits.grad = None
        for _ in range(10):
            loss(logits, labels).backward()

    times = take_turns({key: partial(job, loss) for key, loss in losses.items()}, 2 * rounds, device)
    result: dict[str, Any] = {"logits": shape, "unit": "ten times forward and backward"}
    for key, value in milliseconds(times).items():
        result[key] = value | ({} if key == "Tversky" else compare(times, key, "Tversky"))
    return result


def native_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def processor() -> str:
    """The name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@click.command()
@click.option("--rounds", default=10, show_default=True, help="How often each is timed.")
@click.option("--only", default="", help="Only networks and losses whose name holds this.")
@click.option("--device", "name", type=click.Choice(["cpu", "cuda"]), help="By default a GPU where there is one.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "step.json", help="Where the result goes.")
def main(rounds: int, only: str, name: str | None, out: Path) -> None:
    """Time one training step of each network, and the losses."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
        "native_bf16": native_bf16(device),
        "rounds": rounds,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
    }
    measured: dict[str, Any] = {"machine": machine, "networks": {}, "losses": {}}
    results = json.loads(out.read_text()) if out.is_file() else {}
    results[device.type] = measured

    def save() -> None:
        atomic_write_text(out, json.dumps(results, indent=1) + "\n")

    for key in LOSSES:
        if only in key:
            measured["losses"][key] = result = measure_loss(key, rounds, device)
            save()
            for form in ("F-beta, linear", "F-beta, squares"):
                click.echo(f"{form} ({key}): {result[form]['ratio']:.3f} × Tversky")
    for key in NETWORKS:
        if only in key:
            measured["networks"][key] = result = measure_network(key, rounds, device)
            save()
            beside = ", ".join(f"{k} {v['ratio']:.2f}" for k, v in result["variants"].items())
            click.echo(f"{key}: {result['ratio']:.3f} × plain torch; beside its plain step: {beside}")


if __name__ == "__main__":
    main()
