"""What an evaluation writes down: a row per slice and per case, and the pictures that the report shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.handlers import IgniteMetricHandler, from_engine
from monai.metrics import CumulativeIterationMetric
from monai.utils import CommonKeys
from nibabel.affines import voxel_sizes
from nibabel.orientations import aff2axcodes

from medseg import metrics
from medseg.errors import ConfigError, DatasetError
from medseg.io.atomic import atomic_path

#: Slices per case that the report shows.
PICTURES = 12


class _SampleScore(CumulativeIterationMetric):
    """A score of every sample and class, kept until the end of the epoch."""

    def __init__(self, score: Callable[[metrics.Counts], Any], include_background: bool) -> None:
        super().__init__()
        self.score, self.include_background = score, include_background

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if not self.include_background:
            y_pred, y = y_pred[:, 1:], None if y is None else y[:, 1:]
        return torch.as_tensor(self.score(metrics.confusion_counts(y_pred, y)))

    def aggregate(self) -> torch.Tensor:
        return torch.as_tensor(self.get_buffer()).nanmean()


class MeanScore(IgniteMetricHandler):
    """The mean of a score over samples and classes, as an Ignite metric for the validator's `key_val_metric`.

    Empty masks count by the convention of :mod:`medseg.metrics`; where a score has no value it is left out of the mean.
    In a distributed run the samples of all processes count.

    Args:
        score: a function of counts in :mod:`medseg.metrics`: `dice`, `f_beta`, `sensitivity`, `specificity` or `ppv`.
        include_background: False where channel 0 of prediction and truth is the background (one-hot of a softmax).
        options: further arguments of the score, such as `beta` for `f_beta`.

    Raises:
        ConfigError: if there is no such score.
    """

    def __init__(self, score: str = "dice", include_background: bool = True, **options: float) -> None:
        names = ("dice", "f_beta", "sensitivity", "specificity", "ppv")
        if score not in names:
            raise ConfigError(f"score: found {score!r}, expected one of {', '.join(names)}")
        super().__init__(
            metric_fn=_SampleScore(partial(getattr(metrics, score), **options), include_background),
            output_transform=from_engine([CommonKeys.PRED, CommonKeys.LABEL]),
            save_details=False,
        )


def _label_map(mask: torch.Tensor, values: Sequence[int]) -> np.ndarray:
    """Return the label map (spatial...) of a label map with a channel, of a one-hot, or of a channel per foreground."""
    array = np.asarray(torch.as_tensor(mask).detach().cpu())
    if len(array) == 1 + len(values) and len(values) > 0 and len(array) > 1:
        return np.asarray([0, *values], np.uint8)[array.argmax(0)]
    if len(array) == len(values) and (len(values) > 1 or values[0] == 1):
        result = np.zeros(array.shape[1:], np.uint8)
        for channel, value in zip(array, values, strict=True):
            result[channel > 0.5] = value
        return result
    if len(array) == 1:
        return array[0].astype(np.uint8)
    raise ConfigError(f"a mask has {len(array)} channels, expected 1, {len(values)} or {1 + len(values)}")


class Scores:
    """Score every slice and every case of an evaluation, and keep pictures of them, in a run folder.

    `scores.csv` gets a row per label, and per slice and case; rows of the same split written earlier are replaced.
    `pictures/CASE.npz` holds up to twelve linearly spaced slices that have truth or prediction, as the network saw
    them. Slices of one case must come one after another, as :class:`medseg.data.SliceDataset` gives them. Volumes are
    cut along their last axis.

    Args:
        run_dir: the run folder.
        split: the name of the split that is scored.
        labels: value by name, as in dataset.json; the background is 0.
        channel_names: names of the network's input channels.
        clean: a transform of a dictionary with `pred`, applied to the mask of a whole case before it is scored, such
            as `KeepLargestConnectedComponentd`. The mask is a label map (1, spatial...), a MetaTensor whose affine
            tells the spacing alone, also where the network sees slices.

    Raises:
        DatasetError: when a case lacks a slice, because the scores of a volume need every one.
    """

    def __init__(
        self,
        run_dir: Path | str,
        split: str,
        labels: Mapping[str, int],
        channel_names: Sequence[str] = (),
        clean: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self.run_dir, self.split, self.channel_names = Path(run_dir), split, list(channel_names)
        self.clean = clean
        self.labels = {name: int(value) for name, value in labels.items() if int(value) > 0}
        self.rows: list[dict[str, Any]] = []
        self.open: dict[str, Any] | None = None

    def attach(self, evaluator: Engine) -> None:
        """Collect during the evaluation, and write at its end."""
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        evaluator.add_event_handler(Events.COMPLETED, self.write)

    def collect(self, evaluator: Engine) -> None:
        """Take the samples of one batch."""
        values = list(self.labels.values())
        for item, output in zip(evaluator.state.batch, evaluator.state.output, strict=True):
            image = np.asarray(torch.as_tensor(output[CommonKeys.IMAGE]).detach().float().cpu())
            truth = _label_map(output[CommonKeys.LABEL], values)
            pred = _label_map(output[CommonKeys.PRED], values)
            if "slice" in item:
                spacing, axcodes = [float(s) for s in item["spacing"]], str(item["axcodes"])
                index, image, truth, pred = int(item["slice"]), image[..., None], truth[..., None], pred[..., None]
            else:
                affine = np.asarray(item[CommonKeys.IMAGE].affine, dtype=np.float64)
                spacing, axcodes = [float(s) for s in voxel_sizes(affine)], "".join(aff2axcodes(affine))
                index = 0
            if self.open is None or self.open["case"] != item["case"]:
                self.close()
                self.open = {"case": item["case"], "patient": item["patient"], "parts": []}
                self.open |= {"spacing": spacing, "axcodes": axcodes}
            self.open["parts"].append((index, image, truth, pred))

    def close(self) -> None:
        """Score the case whose slices are complete."""
        if self.open is None:
            return
        case, parts = self.open, sorted(self.open["parts"], key=lambda part: part[0])
        first, indices = parts[0][0], [part[0] for part in parts]
        if indices != list(range(first, first + len(parts))):
            raise DatasetError(
                f"case {case['case']}: {len(parts)} slices between {first} and {indices[-1]}, expected all, because "
                "volumes are scored; write the slices again with --keep all for this split"
            )
        image, truth, pred = (np.concatenate([part[i] for part in parts], axis=-1) for i in (1, 2, 3))
        if self.clean is not None:
            mask = MetaTensor(torch.from_numpy(pred[None]), affine=np.diag([*case["spacing"], 1.0]))
            pred = np.asarray(self.clean({CommonKeys.PRED: mask})[CommonKeys.PRED].cpu())[0].astype(np.uint8)
        common = {"split": self.split, "case": case["case"], "patient": case["patient"]}
        for row in metrics.slice_scores(pred, truth, self.labels):
            self.rows.append(common | {"level": "slice"} | row | {"slice": row["slice"] + first})
        for row in metrics.case_scores(pred, truth, case["spacing"], self.labels):
            self.rows.append(common | {"level": "case"} | row)
        self.picture(image, truth, pred, first)
        self.open = None

    def picture(self, image: np.ndarray, truth: np.ndarray, pred: np.ndarray, first: int) -> None:
        """Keep twelve slices of the open case."""
        assert self.open is not None
        marked = np.flatnonzero(((truth > 0) | (pred > 0)).any(axis=(0, 1)))
        low, high = (marked[0], marked[-1]) if len(marked) else (0, truth.shape[-1] - 1)
        shown = np.unique(np.linspace(low, high, PICTURES).round().astype(int))
        names = self.channel_names if len(self.channel_names) == len(image) else [f"{i}" for i in range(len(image))]
        folder = self.run_dir / "pictures"
        folder.mkdir(exist_ok=True)
        with atomic_path(folder / f"{self.open['case']}.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                image=np.moveaxis(image[..., shown], -1, 1).astype(np.float16),
                label=np.moveaxis(truth[..., shown], -1, 0),
                pred=np.moveaxis(pred[..., shown], -1, 0),
                slices=shown + first,
                spacing=np.asarray(self.open["spacing"][:2]),
                axcodes=np.asarray(list(self.open["axcodes"]), dtype=str),
                channel_names=np.asarray(names, dtype=str),
                case=np.asarray(self.open["case"], dtype=str),
                patient=np.asarray(self.open["patient"], dtype=str),
            )

    def write(self) -> None:
        """Write scores.csv, and say where it is and what the cases scored."""
        self.close()
        path = self.run_dir / "scores.csv"
        table = pd.DataFrame(self.rows)
        cases = table[table["level"] == "case"]
        for label, scored in cases.groupby("label", sort=False):
            dice = metrics.bootstrap_interval(scored["dice"].to_numpy(), groups=scored["patient"].to_numpy())
            print(f"{self.split}, {label}: Dice per case {dice}, {len(scored)} cases; every score: {path}")
        first = ["split", "level", "case", "patient", "slice", "label"]
        table = table[first + [c for c in table.columns if c not in first]]
        table["slice"] = table["slice"].astype("Int64")
        if path.is_file():
            old = pd.read_csv(path, dtype={"case": str, "patient": str}).astype({"slice": "Int64"})
            table = pd.concat([old[old["split"] != self.split], table])
        with atomic_path(path) as temporary:
            table.to_csv(temporary, index=False)
        self.rows = []
