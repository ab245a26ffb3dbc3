"""What an evaluation writes down: a row per slice and per case, and the pictures that the report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.utils import CommonKeys
from nibabel.affines import voxel_sizes
from nibabel.orientations import aff2axcodes

from medseg import metrics
from medseg.engines.answers import refuse_nan
from medseg.errors import ConfigError, DatasetError
from medseg.io.atomic import atomic_path
from medseg.io.lock import in_turn

#: Slices per case that the report shows.
PICTURES = 12


def _label_map(mask: torch.Tensor, values: Sequence[int]) -> np.ndarray:
    """Return the label map (spatial...) of a label map with a channel, of a one-hot, or of a channel per foreground."""
    array = np.asarray(torch.as_tensor(mask).detach().cpu())
    with np.errstate(invalid="ignore"):
        whole = array.astype(np.uint8)
    if not np.array_equal(whole, array):
        raise ConfigError(
            f"a mask holds values from {array.min():.6g} to {array.max():.6g} that are no labels; "
            "expected whole numbers to 255, so end the postprocessing with AsDiscreted"
        )
    if len(whole) == 1:
        return whole[0]
    if len(whole) == 1 + len(values):
        return np.asarray([0, *values], np.uint8)[whole.argmax(0)]
    if len(whole) == len(values):
        result = np.zeros(whole.shape[1:], np.uint8)
        for channel, value in zip(whole, values, strict=True):
            result[channel > 0] = value
        return result
    raise ConfigError(f"a mask has {len(whole)} channels, expected 1, {len(values)} or {1 + len(values)}")


class Scores:
    """Score every case of an evaluation and every slice of it, and keep pictures of them, in a run folder.

    `scores.csv` gets a row per label, and per slice and case; rows of the same split written earlier are replaced.
    `pictures/CASE.npz` holds up to twelve linearly spaced slices that have truth or prediction, in the values that
    the network saw. The evaluation gives whole cases (channels, X, Y, Z), whose image has an affine; they are cut
    along Z.

    Args:
        run_dir: the run folder.
        split: the name of the split that is scored.
        labels: value by name, as in dataset.json; the background is 0.
        channel_names: names of the network's input channels.

    Raises:
        DatasetError: where a case comes twice, or the network's answer is NaN, which a threshold would make background
            of.
        ConfigError: where a mask holds anything but labels, or there is no label to score.
    """

    def __init__(
        self, run_dir: Path | str, split: str, labels: Mapping[str, int], channel_names: Sequence[str] = ()
    ) -> None:
        self.run_dir, self.split, self.channel_names = Path(run_dir), split, list(channel_names)
        self.labels = {name: int(value) for name, value in labels.items() if int(value) > 0}
        if not self.labels or max(self.labels.values()) > 255:
            raise ConfigError(f"labels: {dict(labels)} given, values to 255 expected, one of them other than 0")
        self.scored: set[str] = set()
        self.rows: list[dict[str, Any]] = []

    def attach(self, evaluator: Engine) -> None:
        """Score during the evaluation, and write at its end."""
        evaluator.add_event_handler(IterationEvents.FORWARD_COMPLETED, refuse_nan)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.score)
        evaluator.add_event_handler(Events.COMPLETED, self.write)

    def score(self, evaluator: Engine) -> None:
        """Score the cases of one batch."""
        values = sorted(self.labels.values())  # as the channels are
        for item, output in zip(evaluator.state.batch, evaluator.state.output, strict=True):
            if item["case"] in self.scored:
                raise DatasetError(f"case {item['case']} comes again; expected each once")
            self.scored.add(item["case"])
            image = np.asarray(torch.as_tensor(output[CommonKeys.IMAGE]).detach().float().cpu())
            truth, pred = (_label_map(output[key], values) for key in (CommonKeys.LABEL, CommonKeys.PRED))
            affine = np.asarray(item[CommonKeys.IMAGE].affine, dtype=np.float64)
            common = {"split": self.split, "case": item["case"], "patient": item["patient"]}
            for row in metrics.slice_scores(pred, truth, self.labels):
                self.rows.append(common | {"level": "slice"} | row)
            for row in metrics.case_scores(pred, truth, [float(s) for s in voxel_sizes(affine)], self.labels):
                self.rows.append(common | {"level": "case"} | row)
            self.picture(item, affine, image, truth, pred)

    def picture(
        self, item: Mapping[str, Any], affine: np.ndarray, image: np.ndarray, truth: np.ndarray, pred: np.ndarray
    ) -> None:
        """Keep twelve slices of a case."""
        marked = np.flatnonzero(((truth > 0) | (pred > 0)).any(axis=(0, 1)))
        half = np.abs(image).max() <= np.finfo(np.float16).max
        low, high = (marked[0], marked[-1]) if len(marked) else (0, truth.shape[-1] - 1)
        shown = np.unique(np.linspace(low, high, PICTURES).round().astype(int))
        names = self.channel_names if len(self.channel_names) == len(image) else [f"{i}" for i in range(len(image))]
        folder = self.run_dir / "pictures"
        folder.mkdir(exist_ok=True)
        with atomic_path(folder / f"{item['case']}.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                image=np.moveaxis(image[..., shown], -1, 1).astype(np.float16 if half else np.float32),
                label=np.moveaxis(truth[..., shown], -1, 0),
                pred=np.moveaxis(pred[..., shown], -1, 0),
                slices=shown,
                spacing=voxel_sizes(affine)[:2],
                axcodes=np.asarray(aff2axcodes(affine), dtype=str),
                channel_names=np.asarray(names, dtype=str),
                case=np.asarray(item["case"], dtype=str),
                patient=np.asarray(item["patient"], dtype=str),
            )

    def write(self) -> None:
        """Write scores.csv, and say where it is and what the cases scored."""
        path = self.run_dir / "scores.csv"
        if not self.rows:
            raise DatasetError(f"{self.split}: no case to score; expected at least one in this part of the split")
        table = pd.DataFrame(self.rows)
        cases = table[table["level"] == "case"]
        for label, scored in cases.groupby("label", sort=False):
            dice = metrics.bootstrap_interval(scored["dice"].to_numpy(), groups=scored["patient"].to_numpy())
            print(f"{self.split}, {label}: Dice per case {dice}, {len(scored)} case(s); every score: {path}")
        first = ["split", "level", "case", "patient", "slice", "label"]
        table = table[first + [c for c in table.columns if c not in first]]
        table["slice"] = table["slice"].astype("Int64")
        with in_turn(self.run_dir):
            if path.is_file():
                words = {"split": str, "case": str, "patient": str, "label": str}  # a patient may be called NA
                old = pd.read_csv(path, dtype=words, keep_default_na=False, na_values=[""]).astype({"slice": "Int64"})
                table = pd.concat([old[old["split"] != self.split], table])
            with atomic_path(path) as temporary:
                table.to_csv(temporary, index=False)
        self.rows, self.scored = [], set()
