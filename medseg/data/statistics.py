"""Statistics of the training part of one fold: what a normalization and class weights are made of.

They belong to a fold, so they are no part of a dataset: they live in the run folder, the checkpoint and the bundle that
is made of it. See :doc:`/explanation/preprocessing`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from monai.transforms import Compose, Randomizable
from numpy.typing import NDArray

from medseg.data.folder import DatasetFolder
from medseg.errors import ConfigError, DatasetError, LeakageError
from medseg.io import read_image
from medseg.io.threads import in_order

#: Percentiles that are kept.
PERCENTILES = (0.5, 1, 5, 25, 50, 75, 95, 99, 99.5)
# Percentiles are counted in bins of float32 numbers that share sign, exponent and this many bits of the mantissa.
_MANTISSA = 11
_SHIFT = 23 - _MANTISSA
_HALF = 1 << (31 - _SHIFT)


def training_statistics(
    dataset_dir: str | os.PathLike[str],
    fold: int = 0,
    *,
    transform: Callable[[dict[str, Any]], Any] | Sequence[Callable[[Any], Any]] | None = None,
    above: float | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Measure the images and labels of the training part of one fold, and of nothing else.

    Cases are read one by one, a few at a time, and moments are merged in the order of the split (Chan, Golub and
    LeVeque 1983), so memory does not grow with the cohort and the result does not depend on ``workers``.

    Args:
        dataset_dir: a dataset with ``splits.json``.
        fold: which fold of it.
        transform: what comes before the normalization, loading included: one dictionary transform or a list of them,
            from an entry of :func:`medseg.data.datalist` to ``image`` [C, spatial...] and ``label`` ([1, spatial...],
            or the number of a class). Default: the images and labels as they lie in the dataset.
        above: measure only the voxels of each channel above this value, such as 0 where the background is 0; default:
            the whole image. Classes are counted in the whole image in any case.
        workers: threads that read cases; default: one per core.

    Returns:
        a dictionary of plain values, the same after JSON:

        - ``dataset_sha256`` (:meth:`medseg.data.DatasetFolder.dataset_hash`), ``fold``, ``cases`` (their number) and
          ``above``;
        - ``mean``, ``std`` (of the population: divided by n), ``min``, ``max``, ``voxels``: a list, per channel;
        - ``percentiles``: by name (``"0.5"``, ``"1"``, ``"5"``, ``"25"``, ``"50"``, ``"75"``, ``"95"``, ``"99"``,
          ``"99.5"``), a list, per channel: the smallest value which that share of the voxels does not exceed, rounded
          towards zero to 12 significant bits (so exact for whole numbers to 4095, and low by 0.05 % at most);
        - ``class_counts``: by name, voxels of a segmentation, cases of a classification;
        - ``class_weights``: :func:`balanced_class_weights` of these, in the order of the label values.

    Raises:
        DatasetError: no such dataset or fold; a case with another number of channels, a value that is no finite
            number, or a label that ``dataset.json`` does not name; no voxel above ``above``.
        ConfigError: a transform that is random, or that gives no image or label.
        LeakageError: a patient stands in two parts of ``splits.json``.

    Example:
        >>> statistics = training_statistics("DATASET", fold=0)                           # doctest: +SKIP
        >>> statistics["mean"], statistics["class_weights"]                               # doctest: +SKIP
        ([148.2, 0.71], [0.5, 35.1])
    """
    folder = DatasetFolder(dataset_dir)
    classes = folder.classes or folder.labels
    read = partial(_tally, load=_loader(transform), above=above, values=sorted(classes.values()))
    total: _Tally | None = None
    entries = folder.datalist("train", fold)
    threads = workers or len(os.sched_getaffinity(0))
    for entry, tally in zip(entries, in_order(read, entries, threads), strict=True):
        if total is not None and len(tally.voxels) != len(total.voxels):
            raise DatasetError(
                f"case {entry['case']}: {len(tally.voxels)} channel(s), the training cases before it have "
                f"{len(total.voxels)}; run `data_prep check`"
            )
        total = tally if total is None else total + tally
    if total is None or not total.voxels.all():
        raise DatasetError(f"{folder.root}: no voxel above {above} in the training part of fold {fold}; lower `above`")
    counts = {name: total.classes[value] for name, value in classes.items()}
    return {
        "dataset_sha256": folder.dataset_hash(),
        "fold": fold,
        "cases": len(entries),
        "above": above,
        "voxels": total.voxels.tolist(),
        "mean": total.mean.tolist(),
        "std": np.sqrt(total.squares / total.voxels).tolist(),
        "min": total.low.tolist(),
        "max": total.high.tolist(),
        "percentiles": {f"{q:g}": [_percentile(bins, q) for bins in total.bins] for q in PERCENTILES},
        "class_counts": counts,
        "class_weights": balanced_class_weights(list(counts.values())),
    }


def balanced_class_weights(counts: Sequence[int]) -> list[float]:
    """Weights that make every class count as much as any other: w = N / (K n).

    N is the sum of the counts, K the number of classes that occur, n the count of the class, as in scikit-learn's
    ``compute_class_weight("balanced")``. A class that does not occur gets 0: there is nothing to learn it from.

    Args:
        counts: of each class, voxels or cases.

    Raises:
        ConfigError: counts that are negative or all 0.

    Example:
        >>> balanced_class_weights([90, 10, 0])
        [0.5555555555555556, 5.0, 0.0]
    """
    present = sum(count > 0 for count in counts)
    if not present or min(counts) < 0:
        raise ConfigError(f"counts: {list(counts)} given, counts from 0 expected, one of them positive")
    return [sum(counts) / (present * count) if count else 0.0 for count in counts]


def check_statistics(statistics: Mapping[str, Any], dataset_dir: str | os.PathLike[str], fold: int) -> None:
    """Refuse statistics that were not measured on the training part of this fold of this dataset.

    Args:
        statistics: as :func:`training_statistics` returned them.
        dataset_dir: the dataset, wherever it lies now.
        fold: the fold they are to be used with.

    Raises:
        LeakageError: they are of another fold, or of another dataset or split.
    """
    if statistics.get("fold") != fold:
        raise LeakageError(
            f"statistics: of fold {statistics.get('fold')}, fold {fold} expected; cases that it validates on may be in "
            "them: use those of the fold"
        )
    if statistics.get("dataset_sha256") != DatasetFolder(dataset_dir).dataset_hash():
        raise LeakageError(
            f"statistics: of another dataset or split than {dataset_dir} has, so its validation and test cases may be "
            "in them; measure them again with medseg.data.training_statistics"
        )


@dataclass(frozen=True)
class _Tally:
    """What is known of some cases; arrays have an element (``bins``: a row) per channel."""

    voxels: NDArray[np.int64]
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]  # sum of squared differences to the mean
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    bins: NDArray[np.int64]
    classes: Counter[int]

    def __add__(self, other: _Tally) -> _Tally:
        voxels = self.voxels + other.voxels
        share = other.voxels / np.maximum(voxels, 1)
        difference = other.mean - self.mean
        return _Tally(
            voxels=voxels,
            mean=self.mean + difference * share,
            squares=self.squares + other.squares + difference**2 * self.voxels * share,
            low=np.minimum(self.low, other.low),
            high=np.maximum(self.high, other.high),
            bins=self.bins + other.bins,
            classes=self.classes + other.classes,
        )


def _loader(transform: Any) -> Callable[[dict[str, Any]], Any]:
    if transform is None:
        return _read
    steps = Compose(transform).flatten()
    for step in steps.transforms:
        if isinstance(step, Randomizable):
            raise ConfigError(
                f"transform: {type(step).__name__} is random, expected what every image goes through; leave it out"
            )
    return steps


def _read(entry: Mapping[str, Any]) -> dict[str, Any]:
    label = entry["label"]
    return {"image": read_image(entry["image"]), "label": label if isinstance(label, int) else read_image(label)}


def _tally(entry: Mapping[str, Any], *, load: Callable[[Any], Any], above: float | None, values: list[int]) -> _Tally:
    item = load(dict(entry))
    if any(key not in item or isinstance(item[key], str | list) for key in ("image", "label")):
        raise ConfigError("transform: image or label is not loaded by it, expected both; begin it with LoadImaged")
    label = np.asarray(item["label"])
    if label.ndim and len(label) != 1:
        raise ConfigError(f"transform: a label of {len(label)} channels, one with the label values expected")
    classes = Counter(_class_counts(label))
    unknown = sorted(set(classes) - set(values))
    if unknown:
        raise DatasetError(
            f"case {entry['case']}: the label has the value(s) {', '.join(f'{value:g}' for value in unknown)}, which "
            "dataset.json does not name; run `data_prep check`"
        )
    image = np.asarray(item["image"], dtype=np.float32)
    if not np.isfinite(image).all():
        raise DatasetError(f"case {entry['case']}: values that are no finite number; run `data_prep check`")
    channels = [channel.ravel() if above is None else channel[channel > above] for channel in image]
    return _Tally(
        voxels=np.array([channel.size for channel in channels]),
        mean=np.array([channel.mean(dtype=np.float64) if channel.size else 0.0 for channel in channels]),
        squares=np.array(
            [channel.var(dtype=np.float64) * channel.size if channel.size else 0.0 for channel in channels]
        ),
        low=np.array([channel.min(initial=np.inf) for channel in channels], dtype=np.float64),
        high=np.array([channel.max(initial=-np.inf) for channel in channels], dtype=np.float64),
        bins=np.stack([_bins(channel) for channel in channels]),
        classes=classes,
    )


def _class_counts(label: NDArray[Any]) -> dict[int, int]:
    values, counts = np.unique(label, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _bins(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Count float32 numbers in the order of their values, those in one bin that share their leading bits.

    The magnitude of a float32 number grows with its bits read as an integer, so no range need be known beforehand.
    """
    bits = (values + np.float32(0)).view(np.uint32)  # the sum makes one zero of -0 and 0
    counts = np.bincount(bits >> _SHIFT, minlength=2 * _HALF)
    # Those with the sign bit come last, the largest magnitude at the end: turned round they are the first.
    return np.concatenate([counts[: _HALF - 1 : -1], counts[:_HALF]])


def _percentile(bins: NDArray[np.int64], q: float) -> float:
    """Return the first value which q percent of the voxels do not exceed, its mantissa cut to that of its bin."""
    below = np.cumsum(bins)
    number = int(np.searchsorted(below, max(1, np.ceil(below[-1] * q / 100))))
    magnitude = number - _HALF if number >= _HALF else _HALF - 1 - number
    value = np.array(magnitude << _SHIFT, dtype=np.uint32).view(np.float32).item()
    return value if number >= _HALF else -value
