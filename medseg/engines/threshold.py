"""A threshold of probabilities, chosen on the validation cases, and read again where masks are made."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.transforms import Transform
from monai.utils import CommonKeys
from numpy.typing import NDArray

from medseg import metrics
from medseg.data import datalist
from medseg.errors import CheckpointError, ConfigError, DatasetError
from medseg.io import atomic_write_text

FILE = "threshold.json"

#: The thresholds that are compared, 0.005 apart; in float32, as probabilities are.
_GRID = np.arange(1, 200, dtype=np.float32) / 200
_EMPTY = "a case without truth scores 1 where nothing is predicted, and 0 elsewhere"


class ChooseThreshold:
    """Find the threshold at which the validation cases score best, and write it to `threshold.json` in the run folder.

    It attaches to an evaluator whose postprocessing ends in probabilities of independent labels (a sigmoid); of
    exclusive ones (a softmax) the largest wins, and there is no threshold. Of each case only counts are kept: its
    voxels of truth and of background between neighboring thresholds, over all its slices. Every case has the same
    weight, and so has every label. Of thresholds that score the same, the one nearest to ½ is taken.

    The score at the chosen threshold is too good: it was chosen by it. Report another set's.

    Args:
        run_dir: the run folder.
        dataset_dir: the dataset, which tells the validation cases from the others.
        checkpoint: the checkpoint, or the list of them, that predicts; :func:`read_threshold` refuses others.
        split: the split that is evaluated; it must be `val`.
        fold: the fold of the dataset.
        beta: the score is F-beta; 1 is Dice.
        prediction: whatever else the probabilities depend on, by name: numbers, words, transforms (with all their
            arguments), and lists and dictionaries of these. It is compared by :func:`read_threshold`.

    Raises:
        ConfigError: for a split that is not `val`, and for what cannot be compared, such as a function; while it runs,
            for what is no probability of a label.
        CheckpointError: for a checkpoint that is absent.
        DatasetError: while it runs, for a case that is not of the validation set, and for cases without any truth.
    """

    def __init__(
        self,
        run_dir: Path | str,
        dataset_dir: str | os.PathLike[str],
        checkpoint: Path | str | Sequence[Path | str],
        split: str = "val",
        fold: int = 0,
        beta: float = 1.0,
        **prediction: Any,
    ) -> None:
        if split != "val":
            raise ConfigError(
                f"split: found {split!r}, expected val, because a threshold chosen on {split} cases would make their "
                "scores too good"
            )
        self.run_dir, self.beta = Path(run_dir), beta
        self.allowed = {entry["case"] for entry in datalist(dataset_dir, "val", fold)}
        self.prediction = _prediction(checkpoint, prediction)
        self.counts: dict[str, NDArray[np.int64]] = {}

    def attach(self, evaluator: Engine) -> None:
        """Count during the evaluation, and write at its end."""
        evaluator.add_event_handler(Events.STARTED, lambda: self.counts.clear())
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.count)
        evaluator.add_event_handler(Events.COMPLETED, self.write)

    def count(self, evaluator: Engine) -> None:
        """Count the voxels of one batch."""
        for item, output in zip(evaluator.state.batch, evaluator.state.output, strict=True):
            case = str(item["case"])
            if case not in self.allowed:
                raise DatasetError(f"case {case}: is not of the validation set, expected its cases alone")
            pred, truth = (np.asarray(output[key].detach().cpu()) for key in (CommonKeys.PRED, CommonKeys.LABEL))
            if pred.shape != truth.shape:
                raise ConfigError(
                    f"pred: found shape {pred.shape} for a label of {truth.shape}, expected a sigmoid's probability of "
                    "each label; classes of a softmax have no threshold"
                )
            if not (pred.min() >= 0 and pred.max() <= 1):
                raise ConfigError(
                    f"pred: found {pred.min():.3g} to {pred.max():.3g}, expected probabilities; let postprocessing "
                    "end in Activationsd(keys='pred', sigmoid=True)"
                )
            pairs = zip(pred, truth > 0.5, strict=True)
            counts = np.stack([[_histogram(p[~t]), _histogram(p[t])] for p, t in pairs])
            self.counts[case] = self.counts.get(case, 0) + counts

    def curve(self) -> NDArray[np.float64]:
        """Return the mean score of the cases counted so far, at each threshold of the grid."""
        scores = []
        for _, counts in sorted(self.counts.items()):  # label, background or truth, voxels above so many thresholds
            above = counts[..., ::-1].cumsum(-1)[..., ::-1]
            fp, tp = above[:, 0, 1:], above[:, 1, 1:]
            outcomes = metrics.Counts(tp, fp, above[:, 0, :1] - fp, above[:, 1, :1] - tp)
            scores.append(metrics.f_beta(outcomes, self.beta).mean(0))
        return np.mean(scores, axis=0)

    def write(self) -> None:
        """Write the file, and say what is in it."""
        if not any(counts[:, 1].any() for counts in self.counts.values()):
            raise DatasetError("validation set: found no voxel of truth in it, expected some to choose a threshold by")
        curve = self.curve()
        best = np.flatnonzero(curve == curve.max())
        chosen = int(best[np.abs(_GRID[best] - 0.5).argmin()])
        middle = len(_GRID) // 2
        content = {
            "threshold": _decimal(_GRID[chosen]),
            "score": f"mean over cases of F-beta, beta {self.beta:g}; 1 is Dice",
            "value": curve[chosen],
            "value_at_0.5": curve[middle],
            "empty": _EMPTY,
            "split": "val",
            "cases": sorted(self.counts),
            "prediction": self.prediction,
            "curve": [[_decimal(threshold), value] for threshold, value in zip(_GRID, curve, strict=True)],
        }
        atomic_write_text(self.run_dir / FILE, json.dumps(content, indent=1) + "\n")
        print(
            f"threshold {content['threshold']}: {curve[chosen]:.3f} on the {len(self.counts)} validation case(s), "
            f"{curve[middle]:.3f} at 0.5; {self.run_dir / FILE}"
        )


def read_threshold(threshold: float | str, checkpoint: Path | str | Sequence[Path | str], **prediction: Any) -> float:
    """Return a threshold that is given as a number, or that :class:`ChooseThreshold` wrote.

    Args:
        threshold: a number from 0 to 1; ``"chosen"``: that of the folder where the (first) checkpoint is; or the path
            of a `threshold.json`.
        checkpoint: the checkpoint, or the list of them, that predicts.
        prediction: as for :class:`ChooseThreshold`.

    Raises:
        ConfigError: for a number that is no probability, a file that is absent or no such file, and for a threshold
            that was chosen for other checkpoints, flips or what else was named.
        CheckpointError: for a checkpoint that is absent, where the threshold is not a number.

    Example:
        >>> read_threshold(0.4, "model.pt")
        0.4
    """
    if not isinstance(threshold, str):
        if not 0 <= threshold <= 1:
            raise ConfigError(f"threshold: found {threshold}, expected a number from 0 to 1, 'chosen', or a file")
        return float(threshold)
    first = checkpoint if isinstance(checkpoint, str | Path) else checkpoint[0]
    path = Path(first).parent / FILE if threshold == "chosen" else Path(threshold)
    try:
        content = json.loads(path.read_text())
        value, found = float(content["threshold"]), dict(content["prediction"])
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such file; choose a threshold on the validation set, or give a number"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a threshold that was chosen on validation; choose it again") from error
    expected = _prediction(checkpoint, prediction)
    odd = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    if odd:
        raise ConfigError(
            f"{path}: the threshold was chosen for another {odd[0]}; expected the same: choose again, or give a number"
        )
    return value


def _prediction(checkpoint: Path | str | Sequence[Path | str], more: dict[str, Any]) -> dict[str, Any]:
    """Return what probabilities depend on: the content of the checkpoints, and what else was named."""
    files = [checkpoint] if isinstance(checkpoint, str | Path) else list(checkpoint)
    hashes = []
    for file in files:
        if not Path(file).is_file():
            raise CheckpointError(f"{file}: no such file, expected a checkpoint; name one with --checkpoint FILE")
        with Path(file).open("rb") as opened:
            hashes.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return {"checkpoint": hashes, **{name: _plain(name, value) for name, value in more.items()}}


def _plain(name: str, value: Any) -> Any:
    """Return a value as JSON has it; of a transform, its class and all that it holds."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, type | torch.dtype | np.dtype | torch.device | Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(name, part) for key, part in value.items()}
    if isinstance(value, Sequence):
        return [_plain(name, part) for part in value]
    if isinstance(value, Transform):
        return {"class": f"{type(value).__module__}.{type(value).__name__}", **_plain(name, vars(value))}
    raise ConfigError(
        f"{name}: found a {type(value).__name__}, which a later prediction cannot be compared with; expected numbers, "
        "words, and transforms of these"
    )


def _histogram(probabilities: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return how many probabilities reach none of the thresholds, the first alone, the first two, and so on."""
    reached = np.searchsorted(_GRID, probabilities.astype(np.float32, copy=False), side="right")
    return np.bincount(reached, minlength=len(_GRID) + 1)


def _decimal(threshold: np.float32) -> float:
    return round(float(threshold), 3)
