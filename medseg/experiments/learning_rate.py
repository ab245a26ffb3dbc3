"""The learning-rate range test of a bundle's training."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from monai.bundle import ConfigParser

from medseg.engines import LearningRateRange, learning_rate_range
from medseg.engines.learning_rate_range import check_range
from medseg.errors import ConfigError
from medseg.experiments.bundles import checked_workflow
from medseg.io.atomic import atomic_path
from medseg.report.figures import BLUE, FAINT, GREEN, INK, STYLE, VERMILLION

#: The trainer's arguments that the test needs, and those that it takes where they are there.
_NEEDED = ("device", "train_data_loader", "network", "optimizer", "loss_function")
_TAKEN = ("inferer", "amp")


def bundle_learning_rate_range(
    bundle: str | Path,
    out: Path | str,
    words: Sequence[str] = (),
    start: float = 1e-6,
    end: float = 1.0,
    iterations: int = 150,
) -> tuple[LearningRateRange, float]:
    """Run the range test with what a bundle's `train#trainer` trains with, and write what it saw.

    Data, network, loss, optimizer, inferer and precision are the bundle's; its schedule, validations, checkpoints and
    averaged weights stay out, and no run folder is made.

    Args:
        bundle: name or folder of the bundle.
        out: a folder that gets `learning_rates.csv` (rate, loss, smoothed loss) and `learning_rates.png`.
        words: overrides as typed: `--id`, `value`, ...
        start: the first learning rate.
        end: the last.
        iterations: how many.

    Returns:
        what the test saw, and the learning rate that the bundle has.

    Raises:
        ConfigError: for an unknown bundle, an override that no key answers to, a bundle whose trainer lacks what the
            test needs, or as :func:`medseg.engines.learning_rate_range` does.
        TrainingError: see there.
    """
    check_range(start, end, iterations)
    workflow = checked_workflow(bundle, "train", words)
    parser: ConfigParser = workflow.parser
    trainer = parser.get("train#trainer", {})
    if missing := [name for name in _NEEDED if name not in trainer]:
        raise ConfigError(
            f"bundle: {bundle} has no train#trainer with {', '.join(missing)}, expected one built like "
            "medseg.engines.segmentation_trainer or monai.engines.SupervisedTrainer"
        )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        # A training's own `initialize` makes and records the run folder.
        parser["initialize"] = ["$monai.utils.set_determinism(seed=@seed)"] if "seed" in parser else []
        parser["run_dir"] = scratch
        workflow.initialize()
        parts: dict[str, Any] = {
            name: parser.get_parsed_content(f"train#trainer#{name}") for name in (*_NEEDED, *_TAKEN) if name in trainer
        }
        if "accumulation_steps" in trainer and parser.get_parsed_content("train#trainer#accumulation_steps") != 1:
            raise ConfigError(
                "accumulation_steps: found gradients that are added up, expected a step for each batch; give the test "
                "batches as large as these together"
            )
        own = float(parts["optimizer"].param_groups[0]["lr"])
        found = learning_rate_range(**parts, start=start, end=end, iterations=iterations)

    with atomic_path(folder / "learning_rates.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["learning_rate", "loss", "smoothed_loss"])
        writer.writerows(zip(found.rates.tolist(), found.losses.tolist(), found.smoothed.tolist(), strict=True))
    with atomic_path(folder / "learning_rates.png") as temporary:
        learning_rate_figure(found, own).savefig(temporary, format="png", dpi=150)
    return found, own


def learning_rate_figure(found: LearningRateRange, own: float | None = None) -> Figure:
    """Loss against learning rate, with the rates that follow from it.

    Args:
        found: what the test saw.
        own: the rate in use.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.plot(found.rates, found.losses, ".", color=FAINT, ms=3, label="loss of an iteration")
        axes.plot(found.rates, found.smoothed, color=BLUE, lw=1.8, label="smoothed")
        marks = (
            (found.steepest, GREEN, "-", "steepest fall"),
            (found.highest, VERMILLION, "-", "highest that trains"),
            (own, INK, ":", "the bundle's"),
            (float(found.rates[-1]) if found.diverged else None, INK, "--", "the loss broke out"),
        )
        for rate, color, style, name in marks:
            if rate is not None:
                axes.axvline(rate, color=color, ls=style, lw=1.2, label=f"{name}: {rate:.1e}")
        low, high = float(found.smoothed.min()), float(found.smoothed.max())
        margin = 0.25 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)  # what breaks out may leave the picture
        axes.set_xscale("log")
        axes.set_xlabel("Learning rate")
        axes.set_ylabel("Loss")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
