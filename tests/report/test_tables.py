"""The numbers of the report, worked out by hand."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from medseg.report import patient_scores, read_run, summarize
from medseg.report.tables import MEAN_OF_LABELS, choose_patients, differences, part, with_mean_of_labels

Write = Callable[[Path, Sequence[dict[str, Any]]], None]


def row(patient: str, slice_: int | str, dice: float, **more: Any) -> dict[str, Any]:
    base = {
        "split": "test",
        "level": "slice",
        "case": f"{patient}c",
        "patient": patient,
        "slice": slice_,
        "label": "gtv",
    }
    return base | {"dice": dice, "truth_empty": False, "pred_empty": False} | more


@pytest.fixture
def scores(tmp_path: Path, write: Write) -> Callable[[Sequence[dict[str, Any]]], pd.DataFrame]:
    def make(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
        write(tmp_path / "run", rows)
        table = read_run(tmp_path / "run").scores
        assert table is not None
        return table

    return make


def test_summary_interval_resamples_patients() -> None:
    # A resample of two patients is one of them twice, or both: its mean is 0.2, 0.5 or 0.8, for any number of slices.
    summary = summarize([0.2] * 50 + [0.8] * 50, ["a"] * 50 + ["b"] * 50)
    assert (summary.low, summary.high) == pytest.approx((0.2, 0.8))
    assert (summary.mean, summary.median, summary.n) == pytest.approx((0.5, 0.5, 100))


def test_summary_of_one_patient_has_no_interval() -> None:
    summary = summarize([0.25, 0.75], ["a", "a"])
    assert summary.mean == 0.5
    assert np.isnan([summary.low, summary.high]).all()


def test_summary_of_nothing() -> None:
    summary = summarize([float("nan")], ["a"])
    assert (summary.n, summary.undefined) == (0, 1)
    assert np.isnan(summary.mean)


def test_patients_come_worst_first_and_by_slices_with_a_label(scores: Callable[..., pd.DataFrame]) -> None:
    table = patient_scores(
        scores(
            [
                row("good", 0, 0.9),
                row("good", 1, 0.7),
                row("good", 2, 0.0, truth_empty=True),
                row("bad", 0, 0.1),
                row("bad", 1, 1.0, truth_empty=True, pred_empty=True),
                row("none", 0, 1.0, truth_empty=True, pred_empty=True),
            ]
        ),
        "test",
    )
    assert list(table["patient"]) == ["bad", "good", "none"]
    assert list(table["mean"])[:2] == pytest.approx([0.1, 0.8])
    assert np.isnan(table["mean"].iloc[2])
    assert list(table["n"]) == [1, 2, 0]
    assert list(table["empty"]) == [1, 1, 1]
    assert list(table["false_alarms"]) == [0, 1, 0]
    assert table["sd"].iloc[1] == pytest.approx(0.2 / np.sqrt(2))


def test_patients_of_a_run_without_slices_are_told_by_cases(scores: Callable[..., pd.DataFrame]) -> None:
    table = patient_scores(scores([row("a", "", 0.6, level="case"), row("b", "", 0.5, level="case")]), "test")
    assert list(table["patient"]) == ["b", "a"]
    assert list(table["mean"]) == pytest.approx([0.5, 0.6])


def test_mean_of_labels_takes_the_labels_that_are_present(scores: Callable[..., pd.DataFrame]) -> None:
    table = scores(
        [
            row("a", 0, 0.8, label="x"),
            row("a", 0, 0.4, label="y"),
            row("a", 1, 0.5, label="x"),
            row("a", 1, 1.0, label="y", truth_empty=True, pred_empty=True),
        ]
    )
    whole = with_mean_of_labels(part(table, "test", "slice", empty=False))
    assert list(whole.loc[whole["label"] == MEAN_OF_LABELS, "dice"]) == pytest.approx([0.6, 0.5])
    patients = patient_scores(table, "test")
    assert patients["mean"].iloc[0] == pytest.approx(0.55)
    assert patients["mean_x"].iloc[0] == pytest.approx(0.65)
    assert patients["mean_y"].iloc[0] == pytest.approx(0.4)


def test_mean_of_labels_is_undefined_where_a_label_was_missed(scores: Callable[..., pd.DataFrame]) -> None:
    rows = [row("a", "", 0.8, level="case", label="x", hd95_mm=2.0, ppv=0.5)]
    rows += [row("a", "", 0.0, level="case", label="y", pred_empty=True)]
    rows += [row("b", "", 0.5, level="case", label=label, hd95_mm=h) for label, h in (("x", 1.0), ("y", 4.0))]
    whole = with_mean_of_labels(part(scores(rows), "test", "case", empty=False))
    mean = whole[whole["label"] == MEAN_OF_LABELS].set_index("patient")
    assert list(mean["dice"]) == pytest.approx([0.4, 0.5])
    assert np.isnan(mean.loc["a", "hd95_mm"])
    assert np.isnan(mean.loc["a", "ppv"])
    assert mean.loc["b", "hd95_mm"] == 2.5
    assert not mean["pred_empty"].any()


def test_difference_of_mean_of_labels_takes_the_labels_that_both_have(tmp_path: Path, write: Write) -> None:
    tables = []
    for name, labels in (("three", {"x": 0.8, "y": 0.6, "z": 0.1}), ("two", {"x": 0.6, "y": 0.7})):
        write(tmp_path / name, [row("a", 0, dice, label=label) for label, dice in labels.items()])
        scores = read_run(tmp_path / name).scores
        assert scores is not None
        tables.append((name, scores))
    found = {difference.label: difference.mean for difference in differences(tables[0], tables[1], "test")}
    assert found == pytest.approx({"x": 0.2, "y": -0.1, MEAN_OF_LABELS: 0.05})


def test_differences_are_paired_and_count_wins_by_patient(tmp_path: Path, write: Write) -> None:
    first = [row("a", 0, 0.8), row("a", 1, 0.6), row("b", 0, 0.5), row("c", 0, 0.3), row("only", 0, 0.0)]
    second = [row("c", 0, 0.3), row("b", 0, 0.7), row("a", 1, 0.6), row("a", 0, 0.2)]
    tables = []
    for name, rows in (("one", first), ("two", second)):
        write(tmp_path / name, rows)
        scores = read_run(tmp_path / name).scores
        assert scores is not None
        tables.append((name, scores))
    (found,) = differences(tables[0], tables[1], "test")
    assert (found.measure, found.n, found.patients) == ("dice", 4, 3)
    assert found.mean == pytest.approx((0.6 + 0 - 0.2 + 0) / 4)
    assert found.wins == (1, 1, 1)
    # The worst resample is patient b alone, the best patient a alone.
    assert found.low == pytest.approx(-0.2)
    assert found.high == pytest.approx(0.3)


def test_a_shorter_hausdorff_distance_wins(tmp_path: Path, write: Write) -> None:
    tables = []
    for name, distance in (("near", 1.0), ("far", 4.0)):
        write(tmp_path / name, [row(p, "", 0.5, level="case", hd95_mm=distance) for p in ("a", "b")])
        scores = read_run(tmp_path / name).scores
        assert scores is not None
        tables.append((name, scores))
    by_measure = {found.measure: found for found in differences(tables[0], tables[1], "test")}
    assert by_measure["hd95_mm"].mean == -3.0
    assert by_measure["hd95_mm"].wins == (2, 0, 0)
    assert by_measure["dice"].wins == (0, 0, 2)


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ({"a": 0.1, "b": 0.5, "c": 0.9}, [("Best", "c"), ("Median", "b"), ("Worst", "a")]),
        ({"a": 0.1, "b": 0.5, "c": 0.9, "d": 0.95}, [("Best", "d"), ("Median", "b"), ("Worst", "a")]),
        ({"a": 0.1, "b": 0.5}, [("Best", "b"), ("Worst", "a")]),
        ({"a": 0.1}, [("Only", "a")]),
        ({"a": 0.1, "b": float("nan")}, [("Only", "a")]),
        ({}, []),
    ],
)
def test_best_median_and_worst_patient(means: dict[str, float], expected: list[tuple[str, str]]) -> None:
    table = pd.DataFrame({"patient": list(means), "mean": list(means.values())})
    assert choose_patients(table, {f"case {name}": name for name in means}) == expected


def test_patients_without_pictures_are_passed_over() -> None:
    table = pd.DataFrame({"patient": ["a", "b", "c"], "mean": [0.1, 0.5, 0.9]})
    assert choose_patients(table, {"x": "b"}) == [("Only", "b")]
