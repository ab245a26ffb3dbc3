"""The demo: the whole way from DICOM to a report and a mask for a new study, each step the command of a user."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from medseg.errors import ConfigError, MedsegError

BUNDLE = "head_neck_petct_segmentation"
#: A narrow U-Net of the thesis' form, which a laptop trains in minutes; the bundle's own is the thesis' in full width.
NETWORK = ["--network_channels", "[16, 32, 64, 128, 256]"]
SPACING = ["2", "2", "3"]

_console = Console(stderr=True, highlight=False)


def _step(folder: Path, title: str, *command: str) -> None:
    """Say what is done and the command that does it, and run it in `folder`.

    Raises:
        MedsegError: when the command fails; it has said why.
    """
    _console.print(f"\n[bold]{title}[/bold]", f"$ {escape(shlex.join(command))}", sep="\n", soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, check=False)
    if done.returncode:
        raise MedsegError(f"{shlex.join(command)}: ended with status {done.returncode}; what it said stands above")


def run_demo(
    out: Path | str, patients: int = 40, max_epochs: int = 8, slices: int = 40, image_size: int = 96, seed: int = 0
) -> Path:
    """Generate a PET/CT cohort, build a dataset, train on PET/CT and on CT alone, report, and delineate a new study.

    Args:
        out: the folder that everything goes to; it must be new or empty.
        patients: patients of the cohort.
        max_epochs: epochs of each of the two trainings.
        slices: CT slices per patient, about.
        image_size: rows and columns of a CT slice.
        seed: of the cohort, the split and the trainings.

    Returns:
        the report, an HTML file.

    Raises:
        ConfigError: if `out` holds something already.
        MedsegError: when a step fails.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is not empty, expected a new folder; name another with --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    _console.print(
        f"Everything goes to {out}. Each step is a command that you can type there yourself"
        f" (data_prep and medseg stand in {Path(sys.executable).parent}).",
        soft_wrap=True,
    )
    size = ["--slices", str(slices), "--image-size", str(image_size)]

    _step(
        out,
        "A generated cohort: CT, PET and structure sets as DICOM, files in no order",
        *("data_prep", "phantom", "dicom", "--patients", str(patients), "--seed", str(seed), *size),
    )
    _step(out, "What is in the folder", "data_prep", "inspect", "dicom", "--csv", "--out", "series.csv")
    _step(
        out,
        "One dataset: PET in SUV on the CT's grid, the tumor and the nodes as one class",
        *("data_prep", "build", "petct", "dicom", "dataset", "--roi", "GTV*", "--roi", "LN*", "--spacing", *SPACING),
        *("--clinical", "dicom/clinical.csv", "--stratum-column", "stage", "--keep-identifiers"),
    )
    _step(
        out,
        "Train, validation and test patients, stratified by tumor stage",
        *("data_prep", "split", "dataset", "--fractions", "0.6", "0.1", "0.3", "--stratify", "stratum"),
        *("--seed", str(seed)),
    )
    _step(out, "The slices as one HDF5 file", "data_prep", "slices", "dataset", "--keep", "all")
    _step(out, "Is the dataset in order?", "data_prep", "check", "dataset")

    settings = ["--dataset_dir", "dataset", *NETWORK]
    training = ["--learning_rate", "0.002", "--max_epochs", str(max_epochs), "--seed", str(seed)]
    for name, words, extra in (("petct", "PET and CT", []), ("ct", "CT alone", ["--use_pet", "false"])):
        _step(
            out,
            f"Train on {words}",
            *("medseg", "run", BUNDLE, "train", "--run_name", name, *settings, *training, *extra),
        )
        _step(
            out,
            f"Score the model of {words} on the test patients, once: the test set is locked until you say so",
            *("medseg", "run", BUNDLE, "evaluate", "--run_name", name, *settings, *extra),
            *("--split", "test", "--unlock_test_set", "true"),
        )
    _step(
        out,
        "The report of both",
        *("medseg", "report", "runs/petct/00", "runs/ct/00", "--out", "report.html", "--title", "PET/CT and CT alone"),
    )
    _step(
        out,
        "A patient whom the model has not seen",
        *("data_prep", "phantom", "new_study", "--patients", "1", "--seed", str(seed + 1000), *size),
    )
    _step(
        out,
        "A mask for the new study, on the grid of its CT",
        *("medseg", "run", BUNDLE, "inference", "--dataset_dir", "new_study", *NETWORK),
        *("--checkpoint", "runs/petct/00/model_best.pt", "--output_dir", "masks"),
    )
    minutes = (time.monotonic() - start) / 60
    report, masks, dataset = (os.path.relpath(out / name) for name in ("report.html", "masks", "dataset/report.html"))
    _console.print(
        f"\n[bold]Done in {minutes:.1f} minutes.[/bold] Open {report}; the new study's mask lies in {masks}, the "
        f"dataset's own report is {dataset}.",
        soft_wrap=True,
    )
    return out / "report.html"
