"""Does a learnable Hounsfield window find its way from a wrong window to one that scores as well as the right one?

    python benchmarks/learnable_windows/run.py FOLDER                  # all of it, into FOLDER and benchmarks/results
    python benchmarks/learnable_windows/run.py FOLDER --train right    # one training only, to spread them over cores
    python benchmarks/learnable_windows/run.py FOLDER --figure-only    # the figure again, from the results

A generated cohort, CT alone, and the training of the bundle head_neck_petct_segmentation with a narrower network. The
trainings differ in the window alone; seed, first weights, slices and their order are the same. FOLDER keeps the cohort
and the runs; what stands there already is not made again.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events

from medseg.experiments.bundles import checked_workflow
from medseg.io import atomic_write_text
from medseg.networks import LearnableWindow
from medseg.version import __version__

BUNDLE = "head_neck_petct_segmentation"
ROOT = Path(__file__).parents[2]
SETTINGS = {
    "network_channels": "[8, 16, 32, 64]",
    "learning_rate": "0.002",
    "max_epochs": "10",
    "val_interval": "39",
    "seed": "0",
    "use_pet": "false",
    "num_workers": "0",
    "device": "cpu",
}
#: The image keeps its HU, and the network begins with the window.
LEARNABLE = {
    "select_inputs": "[{_target_: medseg.transforms.SelectChannelsd, keys: image, channels: '@channels'}]",
    "network_def": "$torch.nn.Sequential(medseg.networks.LearnableWindow(@windows, scale=True, unit=2000), "
    "medseg.networks.UNet(2, len(@channels), len(@labels) - 1, @network_channels))",
}


@dataclass(frozen=True)
class Arm:
    """A training: its window at the start, in HU, and whether it learns."""

    center: float
    width: float
    learnable: bool = False


ARMS = {
    "right": Arm(70, 200),
    "wrong": Arm(150, 100),
    "wrong, learned": Arm(150, 100, learnable=True),
    "blind": Arm(300, 100),
    "blind, learned": Arm(300, 100, learnable=True),
}

COLORS = dict(zip(ARMS, ("C0", "C3", "C2", "C7", "C1"), strict=True))


def words(folder: Path, name: str) -> list[str]:
    """The overrides of an arm, as typed."""
    arm = ARMS[name]
    overrides = {
        **SETTINGS,
        **(LEARNABLE if arm.learnable else {}),
        "dataset_dir": str(folder / "dataset"),
        "output_dir": str(folder / "runs"),
        "run_name": name.replace(", ", "_"),
        "windows": f"[{{center: {arm.center}, width: {arm.width}}}]",
    }
    return [word for key, value in overrides.items() for word in (f"--{key}", value)]


def make_dataset(folder: Path) -> None:
    """Generate the cohort and build its dataset, as `medseg demo` does."""
    steps = [
        ["phantom", "dicom", "--patients", "64", "--seed", "0", "--slices", "24", "--image-size", "64"],
        [
            *("build", "petct", "dicom", "dataset", "--roi", "GTV*", "--roi", "LN*", "--spacing", "3", "3", "3"),
            *("--clinical", "dicom/clinical.csv", "--stratum-column", "stage", "--keep-identifiers"),
        ],
        ["split", "dataset", "--fractions", "0.6", "0.2", "0.2", "--stratify", "stratum", "--seed", "0"],
        ["slices", "dataset", "--keep", "foreground"],
    ]
    for step in steps:
        subprocess.run([sys.executable, "-m", "data_prep", *step], cwd=folder, check=True)


def train(folder: Path, name: str) -> dict[str, Any]:
    """Train an arm and return its curves: the window at every iteration, the Dice at every validation."""
    shutil.rmtree(folder / "runs" / name.replace(", ", "_"), ignore_errors=True)
    workflow = checked_workflow(BUNDLE, "train", words(folder, name))
    workflow.initialize()
    network = workflow.parser.get_parsed_content("network")
    windows: list[list[float]] = []

    def note(*_: Any) -> None:
        if isinstance(network[0], LearnableWindow):
            windows.append([round(value, 2) for value in network[0].windows[0].values()])

    if ARMS[name].learnable:
        trainer = workflow.parser.get_parsed_content("train#trainer")
        trainer.add_event_handler(Events.STARTED, note)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    workflow.run()
    workflow.finalize()
    with (folder / "runs" / name.replace(", ", "_") / "00" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == "val_dice"]
    curve = [[int(row["iteration"]), round(float(row["value"]), 4)] for row in rows]
    best = max(curve, key=lambda point: point[1])
    result: dict[str, Any] = {"val_dice": best[1], "best_iteration": best[0], "val_curve": curve}
    if windows:
        result |= {"window": windows[best[0]], "windows": windows}
    return result


def score(folder: Path, name: str) -> float:
    """Return the mean Dice per slice of the best checkpoint on the test patients."""
    workflow = checked_workflow(
        BUNDLE, "evaluate", [*words(folder, name), "--split", "test", "--unlock_test_set", "true"]
    )
    workflow.initialize()
    workflow.run()
    evaluator = workflow.parser.get_parsed_content("evaluator")
    workflow.finalize()
    return round(float(evaluator.state.metrics["val_dice"]), 4)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the windows over the iterations, and the Dice of the validation patients."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, arm in results["arms"].items():
        color = COLORS[name]
        if "windows" in arm:
            low, high = zip(
                *[(center - width / 2, center + width / 2) for center, width in arm["windows"]], strict=True
            )
            left.fill_between(range(len(low)), low, high, color=color, alpha=0.4, label=name)
        elif name == "right":
            center, width = arm["start"]
            left.axhspan(center - width / 2, center + width / 2, color=color, alpha=0.15, label=name)
        right.plot(*zip(*arm["val_curve"], strict=True), color=color, marker="o", markersize=3, label=name)
    left.set(xlabel="iteration", ylabel="HU", title="From edge to edge of the window")
    right.set(xlabel="iteration", ylabel="Dice per slice", title="Validation patients", ylim=(0, None))
    left.legend(loc="upper right")
    right.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Make what is not there yet, train, score, write the results and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the cohort and the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/learnable_windows.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/images/learnable_windows.png")
    parser.add_argument("--train", choices=ARMS, help="make this training, and no results yet")
    parser.add_argument("--figure-only", action="store_true", help="draw the results that stand in --out")
    arguments = parser.parse_args()
    if not arguments.figure_only:
        torch.set_num_threads(1)
        folder = arguments.folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "dataset" / "slices.h5").exists():
            make_dataset(folder)
        arms: dict[str, Any] = {}
        for name, arm in ARMS.items():
            if arguments.train not in (None, name):
                continue
            done = folder / f"{name}.json"
            if not done.exists():
                atomic_write_text(done, json.dumps({"start": [arm.center, arm.width], **train(folder, name)}))
            arms[name] = json.loads(done.read_text())
        if arguments.train:
            return
        for name, result in arms.items():  # once, when everything is decided
            result["test_dice"] = score(folder, name)
        results = {"medseg": __version__, "torch": torch.__version__, "settings": SETTINGS, "arms": arms}
        atomic_write_text(arguments.out, json.dumps(results) + "\n")
    draw(json.loads(arguments.out.read_text()), arguments.figure)


if __name__ == "__main__":
    main()
