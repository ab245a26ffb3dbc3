"""Balancing of the training part: rare labels seen more often, classes seen equally often.

Validation and test parts stay as they are: their scores are of the world, not of a balanced one.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Subset

from medseg.errors import ConfigError
from medseg.transforms.augmentation import LESION_VARIANTS


def oversample(data: Any, label: str | int, times: int) -> Subset:
    """Repeat the samples that hold a label: tumor slices or blocks of KiTS, cases of a rare class.

    Samples keep their order, a repeated one beside its copies; shuffle them. The result goes where the dataset would:
    into :class:`medseg.data.SeededDataset`, where each copy has a draw of its own.

    Args:
        data: the training part: a dataset whose ``has_label(name)`` says for each sample whether it holds the label,
            such as :class:`medseg.data.SliceDataset`; or a datalist of a classification.
        label: name of the label; of a datalist, number of the class.
        times: how often such a sample comes in all. The KiTS thesis repeats tumor blocks; its code 4 times.

    Raises:
        ConfigError: another part than train, no sample with the label, or less than once.

    Source:
        Detko 2020, tumor oversampling.

    Example:
        >>> list(oversample([{"label": 0}, {"label": 1}, {"label": 0}], label=1, times=3).indices)
        [0, 1, 1, 1, 2]
    """
    if times < 1:
        raise ConfigError(f"times: {times} given, 1 or more expected")
    part = getattr(data, "group", "train")
    if part != "train":
        raise ConfigError(f"data: the part {part!r} given, train expected; other parts are scored as they are")
    held = data.has_label(label) if hasattr(data, "has_label") else [item["label"] == label for item in data]
    if not any(held):
        raise ConfigError(f"label: no sample of {len(held)} holds {label!r}; name another, or leave oversampling out")
    return Subset(data, [index for index, holds in enumerate(held) for _ in range(times if holds else 1)])


def balancing_factors(items: Sequence[Mapping[str, Any]], factor: int = 1) -> dict[int, int]:
    """How often to repeat the cases of each class, so that all classes are seen as often as the largest.

    The largest class, of n cases, gets ``factor``, and another, of m cases, ``factor`` · n / m, rounded to the nearest
    whole number (a half up). With 150 and 50 cases that is f and 3f. What is left of the imbalance is half a repetition
    per case at most.

    Args:
        items: the training part of a classification (:func:`medseg.data.datalist`); ``label`` is the class.
        factor: for the largest class: 60 for PROSTATEx, 240 for lungs, 200 for brains in the prostate thesis.

    Returns:
        the factor of each class that occurs.

    Raises:
        ConfigError: no items, labels that are no classes, or a factor below 1.

    Source:
        Clément and Jobin 2020, class balancing.

    Example:
        >>> balancing_factors([{"label": 0}] * 150 + [{"label": 1}] * 50, factor=60)
        {0: 60, 1: 180}
    """
    if factor < 1:
        raise ConfigError(f"factor: {factor} given, 1 or more expected")
    counts = Counter(_class(item) for item in items)
    if not counts:
        raise ConfigError("items: none given, the training part of a classification expected")
    target = factor * max(counts.values())
    return {label: (2 * target + n) // (2 * n) for label, n in sorted(counts.items())}


def lesion_variants(
    items: Sequence[Mapping[str, Any]], times: int | Mapping[int, int], seed: int = 0
) -> list[dict[str, Any]]:
    """Expand a list of lesions to variants of each, drawn without replacement from the 246 there are.

    Which variants a case gets depends on the seed and its name alone, not on the other cases.

    Args:
        items: cases of a classification (:func:`medseg.data.datalist`).
        times: variants of each: a number (11 for the enhanced prediction, whose probabilities are averaged over the
            variants of a lesion), or one by class (:func:`balancing_factors`, for training).
        seed: another seed draws others.

    Returns:
        the items, each as often as its class says, with ``variant`` (see :class:`medseg.transforms.LesionVariantd`).

    Raises:
        ConfigError: more variants than there are, or a class without a number.

    Source:
        Clément and Jobin 2020, with the authors' public code.

    Example:
        >>> items = [{"case": "a", "label": 0}, {"case": "b", "label": 1}]
        >>> [(item["case"], item["variant"]) for item in lesion_variants(items, {0: 1, 1: 2})]
        [('a', 109), ('b', 174), ('b', 146)]
    """
    expanded = []
    for item in items:
        number = times if isinstance(times, int) else times.get(_class(item), 0)
        if not 1 <= number <= len(LESION_VARIANTS):
            raise ConfigError(
                f"times: {number} for case {item['case']} of class {item['label']}, 1 to {len(LESION_VARIANTS)} "
                "expected, for no variant is drawn twice; choose a smaller factor"
            )
        drawn = random.Random(f"{seed} {item['case']}").sample(range(len(LESION_VARIANTS)), number)
        expanded += [{**item, "variant": variant} for variant in drawn]
    return expanded


def _class(item: Mapping[str, Any]) -> int:
    label = item.get("label")
    if not isinstance(label, int):
        raise ConfigError(f"items: the label {label!r} is no number of a class; a classification is expected")
    return label
