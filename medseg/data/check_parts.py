"""What the check of a dataset finds in its parts: the split, the lists of dataset.json, the balance, the slices."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import fisher_exact, mannwhitneyu

from medseg.data.folder import DatasetFolder, list_entries
from medseg.data.problem import WARNING, Problem
from medseg.data.slices import source_hash, stored_source_hash
from medseg.data.splits import find_split_errors
from medseg.errors import DatasetError, LeakageError

#: How unlikely (after Bonferroni) a difference between a part and the others must be by chance to be told.
SIGNIFICANCE = 0.01
#: Standardized mean difference of the logarithm of a volume from which it is told.
DIFFERENCE = 0.5

_AGAIN = "run `data_prep split --force` with the arguments of the split"


def read_splits(folder: DatasetFolder) -> tuple[Mapping[str, Any] | None, list[Problem]]:
    """The splits, if there are any that can be read, and what is wrong with them."""
    path = folder.root / "splits.json"
    if not path.exists():
        return None, []
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error  # its own text has the whole path
        return None, [Problem(path.name, f"cannot be read ({why})", "run `data_prep split --force`", "split")]
    problems = []
    for found in find_split_errors(splits, folder.cases):
        what, _, advice = str(found).removeprefix(f"{path.name}: ").rpartition("; ")
        advice = advice if what else "run `data_prep split --force`"
        problems.append(Problem(path.name, what or str(found).removeprefix(f"{path.name}: "), advice, "split"))
    readable = isinstance(splits, dict) and isinstance(splits.get("folds"), list)
    return splits if readable else None, problems


def members(splits: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Cases of the parts that a case is in for good; in fold k stands what validates in fold k."""
    folds = splits["folds"] if splits else []
    parts: dict[str, list[str]] = {}
    for number, fold in enumerate(folds):
        if isinstance(fold, Mapping):
            if len(folds) == 1:
                parts["train"] = list(fold.get("train") or [])
            parts["val" if len(folds) == 1 else f"fold {number}"] = list(fold.get("val") or [])
    if splits:
        parts["test"] = list(splits.get("test") or [])
    return parts


def check_lists(folder: DatasetFolder, splits: Mapping[str, Any] | None) -> Iterator[Problem]:
    """Compare what nnU-Net and MONAI read in dataset.json with cases.csv and with splits.json."""
    info = folder.info
    again = _AGAIN if splits else "build the dataset again"
    listed = {name: info.get(name, []) for name in ("training", "validation", "test")}
    for name, entries in listed.items():
        if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
            yield Problem("dataset.json", f"its key {name} is no list of cases", again, "files")
            return
    expected = list_entries(info, folder.cases)
    for name, entries in listed.items():
        for entry in entries:
            case = str(entry.get("case", ""))
            if {key: value for key, value in entry.items() if key != "fold"} != expected.get(case):
                what = f"its list {name} says of {case or 'a case'} other than cases.csv"
                yield Problem("dataset.json", what, again, "files")
                break
    if splits is None:
        return
    used = {case for fold in splits["folds"] for part in ("train", "val") for case in fold[part]}
    nnunet = info.get("dataset")
    for_nnunet = set(nnunet) if isinstance(nnunet, dict) and not folder.classes else set()
    if (not folder.classes and for_nnunet != used) or info.get("numTraining") != len(used):
        locked = sorted(for_nnunet & set(splits["test"]))
        what = (
            f"nnU-Net would train on test case {locked[0]}" if locked else "its cases for nnU-Net are not the split's"
        )
        yield Problem("dataset.json", f"{what} (keys dataset and numTraining)", _AGAIN, "split")
    cases = {name: {str(entry.get("case", "")) for entry in entries} for name, entries in listed.items()}
    if cases["training"] | cases["validation"] != used or cases["test"] != set(splits["test"]):
        what = "its lists training, validation and test are not those of splits.json"
        yield Problem("dataset.json", what, _AGAIN, "split")
    path = folder.root / "splits_final.json"
    try:
        final = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield Problem(path.name, f"cannot be read ({error.__class__.__name__})", _AGAIN, "split")
        return
    if final != splits["folds"]:
        yield Problem(path.name, "its folds are not those of splits.json", _AGAIN, "split")


def check_slice_stores(folder: DatasetFolder, splits: Mapping[str, Any]) -> Iterator[Problem]:
    """Find slice stores that are damaged, or older than the images or the split."""
    again = "run `data_prep slices` again"
    for path in sorted(folder.root.glob("*.h5")):
        if path.name.startswith(".tmp-"):
            yield Problem(path.name, "the rest of an interrupted run", "delete it", "files")
            continue
        try:
            fold, stored = stored_source_hash(path)
        except DatasetError as error:
            kind = "a patient in two groups" if isinstance(error, LeakageError) else "not a complete slice store"
            yield Problem(
                path.name,
                f"{kind} ({str(error).removeprefix(f'{path}: ').replace(str(path), path.name)})",
                again,
                "slices",
            )
            continue
        if fold >= len(splits["folds"]) or source_hash(folder.cases, splits, fold) != stored:
            what = f"older than the images or the split (fold {fold}) that it was made from"
            yield Problem(path.name, what, again, "slices")


def check_balance(
    cases: pd.DataFrame, parts: Mapping[str, Sequence[str]], labels: Sequence[str], categories: Sequence[str]
) -> Iterator[Problem]:
    """Find parts that differ from the others by more than chance.

    A label or a class that a part lacks is always told. A share of a class or stratum is told when Fisher's exact test
    of patients in and out of the part is below :data:`SIGNIFICANCE`; the volumes of a label when the Mann-Whitney
    test is, and the standardized mean difference of their logarithm is above :data:`DIFFERENCE`. A patient counts once,
    with the mean of its cases. Both are corrected for the number of comparisons, so of a hundred splits drawn at random
    at most one is told.

    Args:
        cases: cases.csv.
        parts: cases of each part.
        labels: names of the labels; their volumes are the columns ``volume_ml_<label>``.
        categories: columns to compare (``class``, ``stratum``).
    """
    advice = "look at the table in report.html; split again with --stratify, or say it with the results"
    rows = {part: cases[cases["case"].isin(set(chosen))] for part, chosen in parts.items() if len(chosen)}
    outcomes: list[tuple[float, str]] = []
    for category in categories:
        for value in sorted(cases[category].unique()):
            if not value:
                continue
            holders = set(cases["patient"][cases[category] == value])
            for part, inside in rows.items():
                mine, others = set(inside["patient"]), set(cases["patient"]) - set(inside["patient"])
                if category == "class" and not mine & holders:
                    yield Problem("splits.json", f"{part} has no case of class {value}", advice, "balance", WARNING)
                    continue
                table = [[len(mine & holders), len(mine - holders)], [len(others & holders), len(others - holders)]]
                shares = [row[0] / max(sum(row), 1) for row in table]
                what = f"{part}: {shares[0]:.0%} of the patients have {category} {value}, {shares[1]:.0%} of the others"
                outcomes.append((float(fisher_exact(table).pvalue), what))
    for label in labels:
        column = f"volume_ml_{label}"
        if column not in cases:
            continue
        volumes = pd.to_numeric(cases[column], errors="coerce")
        positive = cases[volumes > 0].assign(size=np.log(volumes[volumes > 0])).groupby("patient")["size"].mean()
        for part, inside in rows.items():
            inner = positive[positive.index.isin(inside["patient"])]
            outer = positive[~positive.index.isin(inside["patient"])]
            if not len(inner) and len(outer):
                yield Problem("splits.json", f"{part} has no case with label {label}", advice, "balance", WARNING)
            if len(inner) < 2 or len(outer) < 2:
                continue
            spread = np.sqrt((inner.var() + outer.var()) / 2)
            if abs(inner.mean() - outer.mean()) > DIFFERENCE * spread:
                medians = f"{np.exp(inner.median()):.3g} ml, {np.exp(outer.median()):.3g} ml elsewhere"
                outcomes.append((float(mannwhitneyu(inner, outer).pvalue), f"{part}: the median {label} has {medians}"))
            else:
                outcomes.append((1.0, ""))
    for p_value, what in outcomes:
        if p_value * len(outcomes) < SIGNIFICANCE:
            yield Problem("splits.json", f"{what} (p = {p_value:.1g})", advice, "balance", WARNING)
