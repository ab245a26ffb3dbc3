"""Does a learnable Hounsfield window find its way from a wrong window to one that scores as well as the right one?

    python benchmarks/learnable_windows/run.py FOLDER                  # all of it, into FOLDER and benchmarks/results
    python benchmarks/learnable_windows/run.py FOLDER --train right    # one arm only, to spread them over cores
    python benchmarks/learnable_windows/run.py FOLDER --figure-only    # the figure again, from the results

A generated cohort, CT alone, and the training of the bundle head_neck_petct_segmentation with a narrower network. The
trainings differ in the window alone; for each seed, the first weights, the slices and their order are the same. FOLDER
keeps the cohort and the runs; what stands there already is not made again.
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
from medseg.version import __version__

BUNDLE = "head_neck_petct_segmentation"
ROOT = Path(__file__).parents[2]
SETTINGS = {
    "network_channels": "[8, 16, 32, 64]",
    "learning_rate": "0.002",
    "max_epochs": "10",
    "val_interval": "39",
    "use_pet": "false",
    "num_workers": "0",
    "device": "cpu",
}
SEEDS = (0, 1, 2)
#: The image keeps its HU, and the network begins with the window.
LEARNABLE = {
    "select_inputs": "[{_target_: medseg.transforms.SelectChannelsd, keys: image, channels: '@channels'}]",
    "network_def": "$torch.nn.Sequential(medseg.networks.LearnableWindow(@windows, scale=True, unit=2000), "
    "medseg.networks.UNet(2, len(@channels), len(@labels) - 1, @network_channels))",
}


@dataclass(frozen=True)
class Arm:
    """A training: its window at the start in HU, whether it learns, and its color."""

    color: str
    center: float = 0
    width: float = 0
    learnable: bool = False
    found_by: str = ""  # fixed from the first iteration at the window which this arm ended with, seed by seed


ARMS = {
    "right": Arm("C0", 70, 200),
    "wrong": Arm("C3", 150, 100),
    "wrong, learned": Arm("C2", 150, 100, learnable=True),
    "found": Arm("C4", found_by="wrong, learned"),
    "blind": Arm("C7", 300, 100),
    "blind, learned": Arm("C1", 300, 100, learnable=True),
}


def run_name(name: str, seed: int) -> str:
    """The run's name, a folder."""
    return f"{name.replace(', ', '_')}_{seed}"


def start(folder: Path, name: str, seed: int) -> list[float]:
    """The center and the width with which an arm begins."""
    arm = ARMS[name]
    if arm.found_by:
        return json.loads((folder / f"{run_name(arm.found_by, seed)}.json").read_text())["window"]
    return [arm.center, arm.width]


def words(folder: Path, name: str, seed: int) -> list[str]:
    """The overrides of an arm, as typed."""
    arm = ARMS[name]
    center, width = start(folder, name, seed)
    overrides = {
        **SETTINGS,
        **(LEARNABLE if arm.learnable else {}),
        "dataset_dir": str(folder / "dataset"),
        "output_dir": str(folder / "runs"),
        "run_name": run_name(name, seed),
        "seed": str(seed),
        "windows": f"[{{center: {center}, width: {width}}}]",
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


def train(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """Train an arm and return its curves: the window at every iteration, the Dice at every validation."""
    run = folder / "runs" / run_name(name, seed)
    shutil.rmtree(run, ignore_errors=True)  # one that was interrupted
    workflow = checked_workflow(BUNDLE, "train", words(folder, name, seed))
    workflow.initialize()
    network = workflow.parser.get_parsed_content("network")
    windows: list[list[float]] = []

    def note(*_: Any) -> None:
        windows.append([round(value, 2) for value in network[0].windows[0].values()])

    if ARMS[name].learnable:
        trainer = workflow.parser.get_parsed_content("train#trainer")
        trainer.add_event_handler(Events.STARTED, note)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    workflow.run()
    workflow.finalize()
    with (run / "00" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == "val_dice"]
    curve = [[int(row["iteration"]), round(float(row["value"]), 4)] for row in rows]
    best = max(curve, key=lambda point: point[1])
    result: dict[str, Any] = {"seed": seed, "val_dice": best[1], "best_iteration": best[0], "val_curve": curve}
    if windows:
        result |= {"window": windows[best[0]], "windows": windows}
    return result


def score(folder: Path, name: str, seed: int) -> float:
    """Return the mean Dice per slice of the best checkpoint on the test patients."""
    # Without the table of scores, which is of whole volumes: only slices with tumor are kept here.
    unlocked = ["--split", "test", "--unlock_test_set", "true", "--handlers", "[]"]
    workflow = checked_workflow(BUNDLE, "evaluate", [*words(folder, name, seed), *unlocked])
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

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for name, runs in results["arms"].items():
        for run in runs:
            color, label = ARMS[name].color, name if run["seed"] == SEEDS[0] else None
            right.plot(*zip(*run["val_curve"], strict=True), color=color, marker="o", markersize=2, label=label)
            if "windows" in run:
                low = [center - width / 2 for center, width in run["windows"]]
                high = [center + width / 2 for center, width in run["windows"]]
                left.fill_between(range(len(low)), low, high, color=color, alpha=0.25, label=label)
        if name == "right":
            center, width = runs[0]["start"]
            left.axhspan(center - width / 2, center + width / 2, color=color, alpha=0.15, label=name)
    left.set(xlabel="iteration", ylabel="HU", title="From edge to edge of the window")
    right.set(xlabel="iteration", ylabel="Dice per slice", title="Validation patients", ylim=(0, None))
    right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Make what is not there yet, train, score, write the results and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the cohort and the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/learnable_windows.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/images/learnable_windows.png")
    parser.add_argument("--train", choices=ARMS, help="make these trainings, and no results yet")
    parser.add_argument("--figure-only", action="store_true", help="draw the results that stand in --out")
    arguments = parser.parse_args()
    if not arguments.figure_only:
        torch.set_num_threads(1)
        folder = arguments.folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "dataset" / "slices.h5").exists():
            make_dataset(folder)
        arms: dict[str, Any] = {}
        for name in ARMS:
            if arguments.train not in (None, name):
                continue
            runs = []
            for seed in SEEDS:
                done = folder / f"{run_name(name, seed)}.json"
                if not done.exists():
                    atomic_write_text(done, json.dumps(train(folder, name, seed)))
                runs.append({"start": start(folder, name, seed), **json.loads(done.read_text())})
            arms[name] = runs
        if arguments.train:
            return
        for name, runs in arms.items():  # once, when everything is decided
            for run in runs:
                run["test_dice"] = score(folder, name, run["seed"])
        results = {"medseg": __version__, "torch": torch.__version__, "settings": SETTINGS, "arms": arms}
        atomic_write_text(arguments.out, json.dumps(results) + "\n")
    draw(json.loads(arguments.out.read_text()), arguments.figure)


if __name__ == "__main__":
    main()
