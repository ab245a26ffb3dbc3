"""The numbers of a report: summaries with intervals, paired differences, patients from worst to best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from ..metrics import bootstrap_interval, paired_bootstrap_difference
from .runs import MEASURES

TITLES = {  # with what an evaluation takes: the defaults of `medseg.metrics.case_scores`
    "dice": "Dice",
    "f_beta": "F-beta (β = 2)",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "ppv": "PPV",
    "hd95_mm": "Hausdorff 95 (mm)",
    "surface_dice": "Surface Dice (2 mm)",
}
MEAN_OF_LABELS = "mean of labels"
KEY = ["case", "slice", "label"]


@dataclass(frozen=True)
class Summary:
    """Mean, median, standard deviation (n - 1) and bootstrap interval of the mean.

    Attributes:
        n: number of defined values.
        undefined: number of values left out because they are undefined (NaN).
        mean: their mean; NaN where n is 0.
        median: their median.
        sd: their standard deviation with n - 1; NaN below two values.
        low: lower end of the 95 % interval, patients resampled; NaN below two patients.
        high: upper end.
    """

    n: int
    undefined: int
    mean: float
    median: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A paired difference of two runs on the rows that both have: first minus second."""

    level: str
    label: str
    measure: str
    first: str
    second: str
    n: int
    patients: int
    mean: float
    low: float
    high: float
    wins: tuple[int, int, int]


def summarize(values: ArrayLike, patients: Sequence[str]) -> Summary:
    """Summarize the values of one measure.

    Args:
        values: numbers, NaN where undefined.
        patients: the patient of each value; the interval resamples patients, because slices of one are alike.

    Returns:
        The summary.

    Example:
        >>> summary = summarize([0.2, 0.4, 0.9, float("nan")], ["a", "a", "b", "b"])
        >>> summary.n, summary.undefined, round(summary.mean, 2), summary.median, round(summary.sd, 3)
        (3, 1, 0.5, 0.4, 0.361)
    """
    array = np.asarray(values, float).reshape(-1)
    defined = np.isfinite(array)
    groups = np.asarray(list(patients), dtype=str)[defined]
    array, undefined = array[defined], int(np.count_nonzero(~defined))
    if not len(array):
        return Summary(0, undefined, *[float("nan")] * 5)
    sd = float(array.std(ddof=1)) if len(array) > 1 else float("nan")
    low = high = float("nan")
    if len(set(groups)) > 1:
        interval = bootstrap_interval(array, groups=groups)
        low, high = float(interval.low), float(interval.high)
    return Summary(len(array), undefined, float(array.mean()), float(np.median(array)), sd, low, high)


def part(scores: pd.DataFrame, split: str, level: str, empty: bool | None = None) -> pd.DataFrame:
    """The rows of a split and level, of which the truth is empty (True), not empty (False) or either (None)."""
    rows = scores[(scores["split"] == split) & (scores["level"] == level)]
    return rows if empty is None else rows[rows["truth_empty"] == empty]


def with_mean_of_labels(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, and where there are several labels also their mean for each slice or case (labels that are present).

    The mean is undefined where it is for one of them: the Hausdorff distance of the others does not stand for a label
    that was missed.
    """
    if rows["label"].nunique() < 2:
        return rows
    keys = ["split", "level", "case", "patient", "slice"]
    groups = rows.groupby(keys, sort=False)
    undefined = rows[MEASURES].isna().groupby([rows[key] for key in keys], sort=False).any()
    mean = groups[MEASURES].mean().mask(undefined).join(groups["pred_empty"].all()).reset_index()
    return pd.concat([rows, mean.assign(label=MEAN_OF_LABELS, truth_empty=False)], ignore_index=True)


def labels_of(tables: Sequence[pd.DataFrame]) -> list[str]:
    """The labels of the tables, each once, in the order in which they come; the mean of labels is last."""
    labels = list(dict.fromkeys(label for table in tables for label in table["label"]))
    return sorted(labels, key=lambda label: label == MEAN_OF_LABELS)


def patient_scores(scores: pd.DataFrame, split: str, level: str | None = None) -> pd.DataFrame:
    """One row per patient, worst first.

    The values are Dice of the slices whose truth is not empty; with several labels, a slice's value is the mean of the
    labels that it has.

    Args:
        scores: the rows of ``scores.csv``.
        split: the split to take.
        level: ``slice``, or ``case`` for values of whole cases; by default slices, where any has a label.

    Returns:
        columns patient, cases, n (slices, or cases), mean, median, sd, false_alarms (slices or cases with empty truth
        and a prediction), empty (with empty truth), and one column ``mean_LABEL`` for each of several labels; patients
        without a value come last.
    """
    level = level or patient_level([scores], split)
    rows = part(scores, split, level)
    present = with_mean_of_labels(rows[~rows["truth_empty"]])
    labels = labels_of([present])
    whole = present[present["label"] == labels[-1]] if labels else present
    dice = whole.groupby("patient")["dice"].agg(["count", "mean", "median", "std"])
    empty = rows.groupby(["patient", "case", "slice"])[["truth_empty", "pred_empty"]].all()
    empty = empty[empty["truth_empty"]]
    table = pd.DataFrame({"patient": sorted(set(rows["patient"]))})
    table["cases"] = table["patient"].map(rows.groupby("patient")["case"].nunique())
    for column, source in (("n", "count"), ("mean", "mean"), ("median", "median"), ("sd", "std")):
        table[column] = table["patient"].map(dice[source])
    table["n"] = table["n"].fillna(0).astype(int)
    by_patient = empty.groupby(level="patient")
    table["empty"] = table["patient"].map(by_patient.size()).fillna(0).astype(int)
    alarms = (~empty["pred_empty"]).groupby(level="patient").sum()
    table["false_alarms"] = table["patient"].map(alarms).fillna(0).astype(int)
    for label in labels[:-1]:
        table[f"mean_{label}"] = table["patient"].map(
            present[present["label"] == label].groupby("patient")["dice"].mean()
        )
    return table.sort_values(["mean", "patient"], na_position="last", ignore_index=True)


def patient_level(tables: Sequence[pd.DataFrame], split: str) -> str:
    """The level of which patients are told: slices where every run has some with a label, otherwise cases."""
    return "slice" if all(len(part(scores, split, "slice", empty=False)) for scores in tables) else "case"


def differences(first: tuple[str, pd.DataFrame], second: tuple[str, pd.DataFrame], split: str) -> list[Difference]:
    """Paired differences, first minus second, on the slices and cases with a label that both runs scored.

    Args:
        first: name and scores of a run.
        second: name and scores of the other.
        split: the split to take.
    """
    found = []
    for level in ("slice", "case"):
        tables = [part(scores, split, level, empty=False) for _, scores in (first, second)]
        keys = [pd.MultiIndex.from_frame(table[KEY]) for table in tables]
        # The mean of labels is that of the labels which both have.
        tables = [
            with_mean_of_labels(table[own.isin(other)])
            for table, own, other in zip(tables, keys, keys[::-1], strict=True)
        ]
        for label in labels_of(tables):
            pair = [table[table["label"] == label] for table in tables]
            both = pair[0].merge(pair[1], on=KEY, suffixes=("", "_second"))
            for measure in MEASURES:
                rows = both.dropna(subset=[measure, f"{measure}_second"])
                patients = rows["patient"].to_numpy(str)
                if len(rows):
                    a, b = rows[measure].to_numpy(float), rows[f"{measure}_second"].to_numpy(float)
                    low = high = float("nan")
                    if len(set(patients)) > 1:
                        interval = paired_bootstrap_difference(a, b, groups=patients)
                        low, high = float(interval.low), float(interval.high)
                    found.append(
                        Difference(
                            level, label, measure, first[0], second[0], len(rows), len(set(patients)),
                            float((a - b).mean()), low, high, _wins(a, b, patients, lower_wins=measure == "hd95_mm"),
                        )
                    )  # fmt: skip
    return found


def _wins(
    a: NDArray[np.float64], b: NDArray[np.float64], patients: NDArray[np.str_], lower_wins: bool
) -> tuple[int, int, int]:
    """Patients whose mean is better in a, better in b, equal."""
    means = pd.DataFrame({"a": a, "b": b}).groupby(patients).mean()
    ahead = (means["a"] - means["b"]) * (-1 if lower_wins else 1)
    ties = np.isclose(ahead, 0, atol=1e-9)
    return int((ahead[~ties] > 0).sum()), int((ahead[~ties] < 0).sum()), int(ties.sum())


def choose_patients(table: pd.DataFrame, pictured: Mapping[str, str]) -> list[tuple[str, str]]:
    """Best, median and worst of the patients that have pictures, as (what, patient); fewer when there are fewer.

    Args:
        table: see `patient_scores`.
        pictured: patient by case.
    """
    known = set(pictured.values())
    ranked = [patient for patient in table.dropna(subset=["mean"])["patient"] if patient in known]
    if len(ranked) < 2:
        return [("Only", patient) for patient in ranked]
    median = [("Median", ranked[(len(ranked) - 1) // 2])] if len(ranked) > 2 else []
    return [("Best", ranked[-1]), *median, ("Worst", ranked[0])]
