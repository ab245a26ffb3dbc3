"""Splits by patient: known examples, properties, and the refusals."""

import copy
import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.data import check_splits, find_split_errors, make_splits, split_table
from medseg.errors import DatasetError, LeakageError


def table(cases_per_patient: list[int], strata: list[str] | None = None) -> pd.DataFrame:
    rows = [
        {"case": f"p{p:03d}_{c}", "patient": f"p{p:03d}", "stage": strata[p] if strata else ""}
        for p, n in enumerate(cases_per_patient)
        for c in range(n)
    ]
    return pd.DataFrame(rows)


def patients(cases: list[str]) -> set[str]:
    return {case.split("_")[0] for case in cases}


def parts_of(splits: dict, fold: int = 0) -> dict[str, list[str]]:
    return {**splits["folds"][fold], "test": splits["test"]}


@st.composite
def cohorts(draw):
    n = draw(st.integers(5, 40))
    counts = draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))
    strata = draw(st.lists(st.sampled_from(["I", "II", "III", "IV"]), min_size=n, max_size=n))
    return table(counts, strata)


shares = st.sampled_from([(0.7, 0.1, 0.2), (0.6, 0.2, 0.2), (0.8, 0.2, 0.0), (1 / 3, 1 / 3, 1 / 3), (0.5, 0.05, 0.45)])


@settings(max_examples=60, deadline=None)
@given(cohorts(), shares, st.integers(0, 1000))
def test_fractions_divide_patients_once_and_to_within_one(cases, fractions, seed):
    splits = make_splits(cases, seed=seed, fractions=fractions, stratify="stage")
    parts = parts_of(splits)
    assert sorted(itertools.chain(*parts.values())) == sorted(cases["case"])
    for one, other in itertools.combinations(parts.values(), 2):
        assert not patients(one) & patients(other)
    n = cases["patient"].nunique()
    for members, share in zip(parts.values(), fractions, strict=True):
        if n * min(share for share in fractions if share) >= 1:
            assert abs(len(patients(members)) - n * share) < 1
        assert bool(members) == bool(share)
    check_splits(splits, cases)


@settings(max_examples=60, deadline=None)
@given(cohorts(), st.integers(2, 4), st.sampled_from([0.0, 0.2]), st.integers(0, 1000))
def test_folds_hold_every_patient_once_as_validation_or_test(cases, folds, test_fraction, seed):
    splits = make_splits(cases, seed=seed, folds=folds, test_fraction=test_fraction, stratify="stage")
    assert len(splits["folds"]) == folds
    vals = [fold["val"] for fold in splits["folds"]]
    assert sorted(itertools.chain(splits["test"], *vals)) == sorted(cases["case"])
    sizes = [len(patients(val)) for val in vals]
    assert max(sizes) - min(sizes) <= 1
    check_splits(splits, cases)


@settings(max_examples=40, deadline=None)
@given(cohorts(), st.randoms(use_true_random=False))
def test_the_order_of_rows_and_the_number_of_cases_do_not_matter(cases, random):
    order = list(range(len(cases)))
    random.shuffle(order)
    splits = make_splits(cases, seed=3, stratify="stage")
    assert make_splits(cases.iloc[order], seed=3, stratify="stage") == splits
    firsts = cases.drop_duplicates("patient")
    assert patients(make_splits(firsts, seed=3, stratify="stage")["test"]) == patients(splits["test"])


@settings(max_examples=40, deadline=None)
@given(cohorts(), shares, st.integers(0, 50))
def test_strata_are_divided_as_nearly_as_any_division_with_the_same_totals(cases, fractions, seed):
    # Of all tables with these row and column sums none may be nearer: no exchange between two strata may improve.
    splits = make_splits(cases, seed=seed, fractions=fractions, stratify="stage")
    counts = split_table(splits, cases).drop(columns=["part", "patients", "cases"]).to_numpy().T
    target = counts.sum(axis=1, keepdims=True) * np.array(fractions)
    error = ((counts - target) ** 2).sum()
    for (a, b), (p, q) in itertools.product(
        itertools.permutations(range(len(counts)), 2), itertools.combinations(range(3), 2)
    ):
        other = counts.copy()
        other[[a, b], [p, q]] += 1
        other[[a, b], [q, p]] -= 1
        if (other >= 0).all():
            assert ((other - target) ** 2).sum() > error - 1e-3


def test_stratified_example_worked_out_by_hand():
    # 20 patients: 10 of I, 5 of II, 4 of III and one of IV. Totals of 0.7/0.1/0.2: 14, 2, 4.
    # I: exactly 7, 1, 2. II: 3.5, 0.5, 1. III: 2.8, 0.4, 0.8. IV: 0.7, 0.1, 0.2. Left for II, III and IV: 7, 1, 2.
    # Test: one II, one III. The one val patient is from II (3 1 1: squares 0.25 + 0.25, III 3 0 1: 0.24) rather than
    # from III (4 0 1 and 2 1 1: 0.5 and 1.04) or IV (0 1 0: 1.34); so IV goes to train.
    strata = ["I"] * 10 + ["II"] * 5 + ["III"] * 4 + ["IV"]
    cases = table([1] * 20, strata)
    for seed in range(5):
        counts = split_table(make_splits(cases, seed=seed, stratify="stage"), cases)
        assert counts.to_dict("list") == {
            "part": ["train", "val", "test"],
            "patients": [14, 2, 4],
            "cases": [14, 2, 4],
            "I": [7, 1, 2],
            "II": [3, 1, 1],
            "III": [3, 0, 1],
            "IV": [1, 0, 0],
        }


def test_the_split_of_a_seed_never_changes():
    # Published splits are repeated by their seed, so this list may not move with a new version of anything.
    splits = make_splits(table([1] * 10), seed=0)
    assert splits == {
        "seed": 0,
        "stratify": None,
        "folds": [
            {
                "train": ["p000_0", "p001_0", "p002_0", "p005_0", "p006_0", "p007_0", "p009_0"],
                "val": ["p003_0"],
            }
        ],
        "test": ["p004_0", "p008_0"],
    }


def test_seeds_give_different_splits():
    cases = table([1] * 20)
    assert len({tuple(make_splits(cases, seed=seed)["test"]) for seed in range(10)}) > 8


def test_ties_between_strata_are_broken_by_the_seed():
    # Two strata of five and one val patient, who may come from either.
    cases = table([1] * 10, ["I"] * 5 + ["II"] * 5)
    vals = [make_splits(cases, seed=seed, stratify="stage")["folds"][0]["val"][0] for seed in range(20)]
    strata = ["I" if val < "p005" else "II" for val in vals]
    assert 3 <= strata.count("I") <= 17


def test_small_cohorts_fill_every_part():
    splits = make_splits(table([1, 1, 1]), seed=0)
    assert [len(members) for members in parts_of(splits).values()] == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fractions": (0.7, 0.2, 0.2)}, "add up to 1.1, 1 expected"),
        ({"fractions": (0.8, 0.2)}, "three shares"),
        ({"fractions": (1.2, -0.2, 0.0)}, "three shares"),
        ({"fractions": (0.8, 0.0, 0.2)}, "three shares"),
        ({"folds": 1}, "at least 2 expected"),
        ({"folds": 3, "test_fraction": 1.0}, "test_fraction: 1 given"),
        ({"folds": 7}, "6 patient.* cannot fill 7 parts"),
        ({"stratify": "stag"}, "no column 'stag' to stratify by; nearest: stage"),
        ({"stratify": "case"}, "another value for each"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(DatasetError, match=message):
        make_splits(table([1] * 6), seed=0, **arguments)


def test_bad_tables_are_named():
    cases = table([2, 1, 1], ["I", "II", "II"])
    with pytest.raises(DatasetError, match="'patient' is missing"):
        make_splits(cases[["case"]], seed=0)
    with pytest.raises(DatasetError, match="case p000_0 is listed twice"):
        make_splits(pd.concat([cases, cases.iloc[:1]]), seed=0)
    with pytest.raises(DatasetError, match="the column 'stage' is empty"):
        make_splits(table([1] * 5), seed=0, stratify="stage")
    cases.loc[1, "stage"] = "III"
    with pytest.raises(DatasetError, match="patient p000 has 'I' and 'III' in the column 'stage'"):
        make_splits(cases, seed=0, stratify="stage")


def test_empty_strata_count_as_one_stratum():
    cases = table([1] * 20, ["I"] * 10 + [None] * 10)
    counts = split_table(make_splits(cases, seed=0, stratify="stage"), cases)
    assert counts["(empty)"].tolist() == counts["I"].tolist() == [7, 1, 2]


@pytest.fixture
def good():
    cases = table([2, 1, 1, 1, 1])
    return cases, make_splits(cases, seed=0)


def test_a_patient_in_two_parts_is_leakage(good):
    cases, splits = good
    for part in ("train", "val"):
        moved = copy.deepcopy(splits)
        moved["test"].append(moved["folds"][0][part][0])
        with pytest.raises(
            LeakageError, match=rf"patient p00\d is in {part} \(case .*\) and in test \(case .*\) of fold 0"
        ):
            check_splits(moved, cases)
    # Two scans of one patient, each listed once, in two parts.
    divided = {"folds": [{"train": ["p000_0", "p001_0"], "val": ["p000_1", "p002_0"]}], "test": ["p003_0", "p004_0"]}
    with pytest.raises(LeakageError, match=r"patient p000 is in train \(case p000_0\) and in val \(case p000_1\)"):
        check_splits(divided, cases)


def test_a_space_makes_no_other_patient():
    cases = pd.DataFrame({"case": ["a", "b", "c"], "patient": ["A", "A ", "C"]})
    with pytest.raises(LeakageError, match=r"patient A is in train \(case a\) and in val \(case b\)"):
        check_splits({"folds": [{"train": ["a", "c"], "val": ["b"]}], "test": []}, cases)


def test_leakage_in_a_later_fold_is_found():
    cases = table([1] * 9)
    splits = make_splits(cases, seed=0, folds=3)
    splits["folds"][2]["train"].append(splits["folds"][2]["val"][0])
    with pytest.raises(LeakageError, match="of fold 2"):
        check_splits(splits, cases)


def test_every_leaking_patient_is_listed_once(good):
    cases, splits = good
    train = splits["folds"][0]["train"]
    splits["test"] += train
    leaks = [str(error) for error in find_split_errors(splits, cases) if isinstance(error, LeakageError)]
    assert len(leaks) == len(patients(train)) > 1
    assert all(sum(f"patient {patient} " in leak for leak in leaks) == 1 for patient in patients(train))


def test_unknown_missing_and_repeated_cases_are_named(good):
    cases, splits = good
    train = splits["folds"][0]["train"]
    with pytest.raises(DatasetError, match=r"case p000_7 in train of fold 0 is not in cases\.csv"):
        check_splits({**splits, "folds": [{**splits["folds"][0], "train": [*train, "p000_7"]}]}, cases)
    with pytest.raises(DatasetError, match=f"{train[0]} is listed twice in train"):
        check_splits({**splits, "folds": [{**splits["folds"][0], "train": [*train, train[0]]}]}, cases)
    with pytest.raises(DatasetError, match=f"case {train[0]} is in no part of fold 0"):
        check_splits({**splits, "folds": [{**splits["folds"][0], "train": train[1:]}]}, cases)
    with pytest.raises(DatasetError, match="the val part of fold 0 is empty"):
        check_splits({**splits, "folds": [{**splits["folds"][0], "val": []}]}, cases)


@pytest.mark.parametrize(
    "splits",
    [
        {},
        [],
        {"folds": []},
        {"folds": {"train": []}},
        {"folds": [["p000_0"]], "test": []},
        {"folds": [{"train": ["p000_0"]}], "test": []},
        {"folds": [{"train": ["p000_0"], "val": "p001_0"}], "test": []},
        {"folds": [{"train": ["p000_0"], "val": ["p001_0"]}]},
        {"folds": [{"train": [0], "val": ["p001_0"]}], "test": []},
    ],
)
def test_another_form_is_refused_in_one_line(splits):
    with pytest.raises(DatasetError, match=r"splits\.json: expected folds") as caught:
        check_splits(splits, table([1, 1]))
    assert "\n" not in str(caught.value)


def published(parts: list[str], patients: str = "ABCDEFGHIJ") -> pd.DataFrame:
    return pd.DataFrame({"case": list("abcdefghij"), "patient": list(patients), "part": parts})


def test_published_parts_are_taken_as_they_are():
    parts = ["Train", "training", "val", "validation", "test", "test", "train", "train", "train", "test"]
    splits = make_splits(published(parts), seed=0, column="part")
    assert splits["folds"] == [{"train": list("abghi"), "val": list("cd")}]
    assert splits["test"] == list("efj")
    assert make_splits(published(parts), seed=9, column="part")["folds"] == splits["folds"]
    with pytest.raises(DatasetError, match="has a val part: leave folds out"):
        make_splits(published(parts), seed=0, column="part", folds=2)


def test_without_a_published_val_part_the_training_part_is_divided():
    cases = published(["train"] * 8 + ["test"] * 2)
    splits = make_splits(cases, seed=0, column="part", fractions=(0.5, 0.25, 0.25))
    assert [len(splits["folds"][0][part]) for part in ("train", "val")] == [5, 3]  # two to one
    assert splits["test"] == ["i", "j"]
    check_splits(splits, cases)
    assert make_splits(cases, seed=1, column="part", fractions=(0.5, 0.25, 0.25)) != splits


def test_a_patient_in_two_published_parts_is_a_leak():
    cases = published(["train"] * 8 + ["test"] * 2, "ABCDEFGHAJ")
    with pytest.raises(LeakageError, match="'part' has patient A in train and in test"):
        make_splits(cases, seed=0, column="part")
    with pytest.raises(DatasetError, match="no case is in train"):
        make_splits(published(["test"] * 10), seed=0, column="part")
    with pytest.raises(DatasetError, match="case a has '' in the column 'part'"):
        make_splits(published([""] * 10), seed=0, column="part")


@pytest.mark.parametrize("patient", ["", "A ", " A", "A\t", float("nan"), None])
def test_a_patient_without_a_name_of_its_own_is_refused(patient):
    """By two names one patient could be in two parts, and all without a name would be one patient."""
    cases = pd.DataFrame({"case": ["a", "b", "c", "d"], "patient": ["A", patient, "C", "D"]})
    for options in ({}, {"folds": 2}):
        with pytest.raises(DatasetError, match=r"case b has the patient '.*'; a name, no space around it, expected"):
            make_splits(cases, seed=0, **options)
