"""Run folders as training and evaluation leave them, small and made up; scores are counted from the masks."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

COUNTS = ["tp", "fp", "tn", "fn"]
HEADER = [
    "split",
    "level",
    "case",
    "patient",
    "slice",
    "label",
    *COUNTS,
    "dice",
    "f_beta",
    "sensitivity",
    "specificity",
]
HEADER += ["ppv", "hd95_mm", "surface_dice", "truth_empty", "pred_empty"]
CONFIG = """
network_def:
  _target_: medseg.networks.UNet
  spatial_dims: 2
  in_channels: {channels}
loss:
  _target_: medseg.losses.FBetaLoss
  beta: 4
"""
SHAPE = (64, 80)


def score_row(
    level: str,
    case: str,
    patient: str,
    slice_: int | str,
    label: str,
    truth: NDArray[Any],
    pred: NDArray[Any],
    split: str = "test",
) -> dict[str, Any]:
    """One row of scores.csv, counted from two masks; F-beta with beta 2; the surface's scores are made up."""
    tp, fp = int((truth & pred).sum()), int((~truth & pred).sum())
    fn, tn = int((truth & ~pred).sum()), int((~truth & ~pred).sum())
    nan = float("nan")
    row: dict[str, Any] = {
        "split": split,
        "level": level,
        "case": case,
        "patient": patient,
        "slice": slice_,
        "label": label,
    }
    row |= {"tp": tp, "fp": fp, "tn": tn, "fn": fn, "truth_empty": not truth.any(), "pred_empty": not pred.any()}
    row["dice"] = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0
    row["f_beta"] = 5 * tp / (5 * tp + fp + 4 * fn) if tp + fp + fn else 1.0
    row["sensitivity"] = tp / (tp + fn) if tp + fn else nan
    row["specificity"] = tn / (tn + fp)
    row["ppv"] = tp / (tp + fp) if tp + fp else nan
    row["hd95_mm"] = 2.0 + 10 * (1 - row["dice"]) if level == "case" and row["dice"] else nan
    row["surface_dice"] = row["dice"] ** 0.5 if level == "case" else nan
    return row


def write_scores(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, HEADER, restval="")
        writer.writeheader()
        writer.writerows(rows)


def write_metrics(folder: Path, iterations: int, rng: np.random.Generator, level: float) -> None:
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["iteration", "epoch", "phase", "name", "value"])
        for i in range(1, iterations + 1):
            decay = np.exp(-i / (iterations / 4))
            writer.writerow(
                [i, 1 + i // 100, "train", "loss", 0.12 + 0.7 * decay * np.exp(0.15 * rng.standard_normal())]
            )
            writer.writerow([i, 1 + i // 100, "train", "learning_rate", 1e-4])
            if i % max(1, iterations // 15) == 0:
                writer.writerow([i, 1 + i // 100, "val", "loss", 0.25 + 0.6 * decay])
                writer.writerow([i, 1 + i // 100, "val", "dice", level * (1 - decay) + 0.02 * rng.standard_normal()])


def ellipse(x: float, y: float, a: float, b: float) -> NDArray[np.bool_]:
    i, j = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return ((i - x) / a) ** 2 + ((j - y) / b) ** 2 < 1


def write_run(
    folder: Path,
    *,
    error: float = 2.0,
    channels: Sequence[str] = ("CT", "PET"),
    labels: Sequence[str] = ("gtv",),
    patients: Sequence[str] = ("P01", "P02", "P03", "P04", "P05"),
    slices: bool = True,
    iterations: int = 300,
    seed: int = 0,
) -> Path:
    """A run folder whose predictions are off by about ``error`` pixels, more for later patients."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    (folder / "pictures").mkdir(parents=True)
    for number, patient in enumerate(patients):
        count = 14 + number % 5
        truth, pred = np.zeros((2, count, *SHAPE), np.uint8)
        place = np.random.default_rng(number)
        x, y, size = place.uniform(24, 40), place.uniform(30, 50), place.uniform(5, 9)
        for k in range(count):
            for value in range(1, len(labels) + 1):
                radius = size * np.sqrt(max(0.0, 1 - ((k - count / 2) / (count / 2.6)) ** 2))
                shift = (error * (0.3 + 1.2 * number / len(patients))) * rng.standard_normal(2)
                centre = (x, y + 18 * (value - 1) * (-1 if y > 40 else 1))
                if radius > 1:
                    truth[k][ellipse(*centre, radius, radius * 1.2)] = value
                    pred[k][ellipse(centre[0] + shift[0], centre[1] + shift[1], radius * 0.95, radius * 1.15)] = value
                elif rng.uniform() < 0.15:
                    pred[k][ellipse(*centre, 2, 2)] = value
        for value, label in enumerate(labels, 1):
            if slices:
                rows += [
                    score_row("slice", f"{patient}a", patient, k, label, truth[k] == value, pred[k] == value)
                    for k in range(count)
                ]
            rows.append(score_row("case", f"{patient}a", patient, "", label, truth == value, pred == value))
        shown = np.unique(np.linspace(0, count - 1, 12).round().astype(int))
        body = ellipse(32, 40, 28, 36)
        image = []
        for channel in channels:
            noise = rng.standard_normal((count, *SHAPE))
            if channel == "PET":
                image.append(np.clip(body * (1.0 + 0.2 * noise) + 8 * (truth > 0) + 9 * ellipse(12, 40, 4, 4), 0, None))
            elif channel == "CT":
                image.append(
                    np.clip(body * 0.5 + 0.06 * noise + 0.05 * (truth > 0) + 0.4 * ellipse(32, 70, 5, 4), 0, 1)
                )
            else:
                image.append(300 * body + 90 * (truth > 0) + 30 * noise)
        np.savez_compressed(
            folder / "pictures" / f"{patient}a.npz",
            image=np.stack(image)[:, shown].astype(np.float16),
            label=truth[shown],
            pred=pred[shown],
            slices=shown,
            spacing=np.array([2.0, 2.0]),
            channel_names=np.array(channels),
            case=f"{patient}a",
            patient=patient,
        )
    write_scores(folder, rows)
    write_metrics(folder, iterations, rng, 0.9 - error / 20)
    record = {
        "command": f"python -m monai.bundle run --channels {'/'.join(channels)}",
        "seed": seed,
        "dataset_sha256": "6d1f" * 4,
        "labels": dict(zip(labels, range(1, len(labels) + 1), strict=True)),
        "versions": {"medseg": "0.1.0", "torch": "2.13.0", "monai": "1.6.1"},
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(CONFIG.format(channels=len(channels)))
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Make a run folder ``NAME/00`` under the test's folder."""

    def make(name: str = "petct", **kwargs: Any) -> Path:
        return write_run(tmp_path / name / "00", **kwargs)

    return make


@pytest.fixture
def write() -> Callable[[Path, Sequence[dict[str, Any]]], None]:
    """Write scores.csv into a folder."""
    return write_scores
