"""Reading a run folder: everything that a report needs, as files only."""

import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from ..errors import DatasetError, ReadError

TEXT = ["split", "level", "case", "patient", "slice", "label"]
MEASURES = ["dice", "f_beta", "sensitivity", "specificity", "ppv", "hd95_mm", "surface_dice"]
FLAGS = ["truth_empty", "pred_empty"]
REQUIRED = [*TEXT, "dice", *FLAGS]
# The edge at which an axis begins as a radiologist looks at it, by its direction. Of two axes, the one that comes first
# here runs from left to right.
_EDGES = {"L": "R", "R": "R", "P": "A", "A": "A", "I": "S", "S": "S"}


@dataclass(frozen=True)
class Pictures:
    """Slices of one case as the model saw them, with both masks.

    Attributes:
        case: the case.
        patient: the patient of the case.
        image: channels as the model saw them, float32 [channel, n, X, Y].
        label: the true mask, uint8 [n, X, Y], values 0 (background) to the number of labels.
        pred: the predicted mask, likewise.
        slices: number of each slice in the volume, [n].
        spacing: mm between pixels along X and Y.
        channel_names: one name per channel.
        edges: what of the patient the left and the upper edge show, such as R (right) and A (front); None where the
            file does not tell.
    """

    case: str
    patient: str
    image: NDArray[np.float32]
    label: NDArray[np.uint8]
    pred: NDArray[np.uint8]
    slices: NDArray[np.int64]
    spacing: tuple[float, float]
    channel_names: tuple[str, ...]
    edges: tuple[str, str] | None = None


@dataclass(frozen=True)
class Run:
    """What a run folder holds; a part that is absent is None or empty and said in ``missing``.

    Attributes:
        name: the name in tables and figures.
        scores: ``scores.csv`` (a row per slice or case and label), or None.
        metrics: ``metrics.csv`` (iteration, epoch, phase, name, value), or None.
        facts: ``run.json``, nested keys joined by dots, values as text.
        labels: label names by mask value, as far as ``run.json`` tells them.
        config: the text of ``config.yaml``, or None.
        pictures: picture file by case.
        missing: a line for each part that is absent or broken.
    """

    name: str
    scores: pd.DataFrame | None
    metrics: pd.DataFrame | None
    facts: dict[str, str]
    labels: dict[int, str]
    config: str | None
    pictures: dict[str, Path]
    missing: tuple[str, ...]


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read a run folder.

    Args:
        folder: the folder of the run.
        name: what to call it; ``NAME/00`` by default.

    Returns:
        The run; parts that are absent are named in its ``missing``.

    Raises:
        DatasetError: the folder holds none of ``run.json``, ``metrics.csv`` and ``scores.csv``, or one lacks a column.
        ReadError: one of these files cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder}: not a folder; expected the folder of a run")
    if not any((folder / file).is_file() for file in ("run.json", "metrics.csv", "scores.csv")):
        raise DatasetError(
            f"{folder}: not the folder of a run; found none of run.json, metrics.csv and scores.csv "
            "(a run is NAME/00, NAME/01, ...)"
        )
    missing = []
    record = _read_json(folder / "run.json")
    if record is None:
        missing.append("run.json is absent: command, seed, versions and dataset are unknown.")
    scores = _read_scores(folder / "scores.csv")
    if scores is None or scores.empty:
        what = "is absent" if scores is None else "holds no row"
        missing.append(f"scores.csv {what}: this run has not been scored.")
    metrics = _read_metrics(folder / "metrics.csv", missing)
    config = folder / "config.yaml"
    if not config.is_file():
        missing.append("config.yaml is absent: the configuration is unknown.")
    pictures: dict[str, Path] = {}
    for path in sorted((folder / "pictures").glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                pictures[str(file["case"])] = path
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            missing.append(f"pictures/{path.name} cannot be read and is left out.")
    if not pictures:
        missing.append("The folder pictures holds none: slices with outlines cannot be shown.")
    return Run(
        name=name or _default_name(folder),
        scores=scores,
        metrics=metrics,
        facts=_flatten(record or {}),
        labels=_label_names(record or {}),
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        pictures=pictures,
        missing=tuple(missing),
    )


def read_runs(runs: Sequence[Path] | Mapping[str, Path]) -> list[Run]:
    """Read several runs, each under a name of its own.

    Raises:
        DatasetError: no run is given, or a folder is no run.
    """
    if not runs:
        raise DatasetError("no run to report on; expected at least one run folder")
    if isinstance(runs, Mapping):
        return [read_run(Path(path), name) for name, path in runs.items()]
    names = [_default_name(Path(path)) for path in runs]
    if len(set(names)) < len(names):  # tell them apart by their order
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return [read_run(Path(path), name) for path, name in zip(runs, names, strict=True)]


def read_pictures(path: Path) -> Pictures:
    """Read one file of ``pictures/``.

    Raises:
        ReadError: the file is no such file, or its arrays do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            image = np.nan_to_num(np.asarray(file["image"], np.float32))
            label, pred = np.asarray(file["label"], np.uint8), np.asarray(file["pred"], np.uint8)
            slices = np.asarray(file["slices"], np.int64).reshape(-1)
            spacing = [float(value) for value in file["spacing"]]
            names = tuple(str(name) for name in file["channel_names"])
            case, patient = str(file["case"]), str(file["patient"])
            axcodes = [str(code) for code in file["axcodes"]] if "axcodes" in file else []
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ReadError(
            f"{path}: not a file of pictures ({type(error).__name__}); write it again with the run"
        ) from error
    shape = image.shape[1:]
    if (
        image.ndim != 4
        or label.shape != shape
        or pred.shape != shape
        or slices.shape != shape[:1]
        or len(names) != len(image)
    ):
        raise ReadError(
            f"{path}: image {image.shape}, label {label.shape}, pred {pred.shape}, slices {slices.shape} and "
            f"{len(names)} channel names do not fit together; expected [C,n,X,Y], [n,X,Y], [n,X,Y], [n] and C"
        )
    # As a radiologist looks at it: the patient's right on the left, front and head up; a sagittal one looks left.
    edges = None
    codes = axcodes[:2]
    if len(codes) == 2 and all(code in _EDGES for code in codes):
        if codes != sorted(codes, key=list(_EDGES).index):
            image, label, pred = image.swapaxes(-1, -2), label.swapaxes(-1, -2), pred.swapaxes(-1, -2)
            codes, spacing = codes[::-1], spacing[1::-1]
        flips = tuple(axis for axis, code in zip((-2, -1), codes, strict=True) if code in "RAS")
        image, label, pred = np.flip(image, flips), np.flip(label, flips), np.flip(pred, flips)
        edges = (_EDGES[codes[0]], _EDGES[codes[1]])
    return Pictures(case, patient, image, label, pred, slices, (spacing[0], spacing[1]), names, edges)


def model_facts(config: str | None) -> dict[str, str]:
    """Network, loss and optimizer in one line each, from the text of a resolved configuration."""
    try:
        tree = yaml.safe_load(config) if config else None
    except yaml.YAMLError:
        return {}
    if not isinstance(tree, dict):
        return {}
    places = {"network": "network_def", "loss": "loss", "optimizer": "optimizer"}
    return {title: _one_line(tree[key]) for title, key in places.items() if tree.get(key)}


def _one_line(value: Any) -> str:
    if isinstance(value, dict) and "_target_" in value:
        arguments = {key: argument for key, argument in value.items() if key != "_target_"}
        text = f"{value['_target_']} {_one_line(arguments) if arguments else ''}".strip()
    elif isinstance(value, dict | list):
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).strip()
    else:
        text = str(value)
    return text if len(text) <= 300 else text[:299] + "…"


def _default_name(folder: Path) -> str:
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}" if re.fullmatch(r"\d+", folder.name) else folder.name


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReadError(f"{path}: not valid JSON ({error}); the file is damaged") from error
    if not isinstance(record, dict):
        raise ReadError(f"{path}: found a {type(record).__name__}, expected an object of names and values")
    return record


def _read_text(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReadError(f"{path}: not a readable text file ({error})") from error


def _table(text: str, path: Path, required: Sequence[str]) -> pd.DataFrame:
    try:
        # As text first: a patient may be called "NA" or "007".
        table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    except ValueError as error:
        raise ReadError(f"{path}: not a readable CSV table ({' '.join(str(error).split())})") from error
    absent = [column for column in required if column not in table]
    if absent:
        raise DatasetError(f"{path}: no column {', '.join(absent)}; found {', '.join(map(str, table.columns))}")
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes what is too much for names of the rows
        raise DatasetError(f"{path}: the rows have more fields than the first line names; expected as many")
    return table


def _numbers(table: pd.DataFrame, column: str, path: Path) -> "pd.Series[float]":
    text = table[column].str.strip()
    numbers = pd.to_numeric(text, errors="coerce").astype(float)
    wrong = numbers.isna() & ~text.str.lower().isin(["", "nan", "na", "none"])
    if wrong.any():
        raise DatasetError(f"{path}: column {column} holds {text[wrong].iloc[0][:40]!r}, expected a number")
    return numbers.where(np.isfinite(numbers))


def _read_scores(path: Path) -> pd.DataFrame | None:
    text = _read_text(path)
    if text is None:
        return None
    table = _table(text, path, REQUIRED)
    scores = table[TEXT].copy()
    for column in ("fp", *MEASURES):
        scores[column] = _numbers(table, column, path) if column in table else np.nan
    for column in FLAGS:
        words = table[column].str.lower()
        if not words.isin(["true", "false"]).all():
            wrong = table.loc[~words.isin(["true", "false"]), column].iloc[0]
            raise DatasetError(f"{path}: column {column} holds {wrong[:40]!r}, expected True or False")
        scores[column] = words == "true"
    twice = scores[scores.duplicated(["split", "level", "case", "slice", "label"])]
    if len(twice):
        row = twice.iloc[0]
        raise DatasetError(
            f"{path}: case {row['case']}, slice {row['slice'] or '–'}, label {row['label']} comes twice in the split "
            f"{row['split']}, expected once; score the split again"
        )
    return scores


def _read_metrics(path: Path, missing: list[str]) -> pd.DataFrame | None:
    text = _read_text(path)
    if text is None:
        missing.append("metrics.csv is absent: there are no training curves.")
        return None
    # A killed training may leave half a line, whose number looks whole.
    text, newline, half = text.rpartition("\n")
    if half:
        missing.append("metrics.csv ends within a line, which is left out: what wrote it was stopped.")
    table = _table(text + newline, path, ["iteration", "phase", "name", "value"]) if text else pd.DataFrame()
    if table.empty:
        missing.append("metrics.csv holds no row: there are no training curves.")
        return None
    for column in ("iteration", "value"):
        table[column] = _numbers(table, column, path)
    undrawn = int(table["value"].isna().sum())
    if undrawn:
        missing.append(f"metrics.csv: values that are no finite number, {undrawn} of {len(table)}, are not drawn.")
    return table.dropna(subset=["iteration"])


def _flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    facts: dict[str, str] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            facts |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            facts |= _flatten({f"{key}.{number}": item for number, item in enumerate(value, 1)}, prefix)
        elif isinstance(value, list):
            facts[f"{prefix}{key}"] = " ".join(map(str, value)) or "none"
        else:
            facts[f"{prefix}{key}"] = str(value)
    return facts


def _label_names(record: Mapping[str, Any]) -> dict[int, str]:
    labels = record.get("labels")
    if not isinstance(labels, dict):
        return {}
    return {value: name for name, value in labels.items() if isinstance(value, int) and value > 0}
