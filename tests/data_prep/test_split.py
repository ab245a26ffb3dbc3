"""`data_prep split`: the files it writes, what it prints, what it refuses."""

import json

import pytest
from click.testing import CliRunner

from data_prep.cli import main
from medseg.data.folder import DatasetFolder


@pytest.fixture
def root(tmp_path, write_dataset):
    write_dataset(tmp_path, patients=[f"P{n // 2}" for n in range(20)])  # ten patients of two cases
    return tmp_path


def run(*words):
    return CliRunner().invoke(main, ["split", *map(str, words)])


def test_seventy_ten_twenty_is_the_default(root):
    result = run(root)
    assert result.exit_code == 0, result.output
    splits = DatasetFolder(root).splits
    assert [len(splits["folds"][0]["train"]), len(splits["folds"][0]["val"]), len(splits["test"])] == [14, 2, 4]
    assert (splits["seed"], splits["stratify"]) == (0, None)
    assert set(splits["test"]).isdisjoint(json.loads((root / "dataset.json").read_text())["dataset"])
    assert json.loads((root / "splits_final.json").read_text()) == splits["folds"]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in result.output.splitlines() if "│" in line]
    assert rows == [["train", "7", "14"], ["val", "1", "2"], ["test", "2", "4"]]


def test_the_table_counts_strata(tmp_path, write_dataset):
    write_dataset(tmp_path, patients=[f"P{n}" for n in range(20)])
    result = run(tmp_path, "--stratify", "stratum", "--fractions", "0.6", "0.2", "0.2", "--seed", 3)
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in result.output.splitlines() if "│" in line]
    assert rows == [["train", "12", "12", "6", "6"], ["val", "4", "4", "2", "2"], ["test", "4", "4", "2", "2"]]
    assert DatasetFolder(tmp_path).splits["stratify"] == "stratum"


def test_folds(root):
    assert run(root, "--folds", 4, "--test-fraction", "0.2").exit_code == 0
    splits = DatasetFolder(root).splits
    assert len(splits["folds"]) == 4
    assert [len(fold["val"]) for fold in splits["folds"]] == [4, 4, 4, 4]
    assert len(splits["test"]) == 4


def test_another_split_is_replaced_by_force_only(root):
    assert run(root).exit_code == 0
    before = (root / "splits.json").read_bytes()
    assert run(root).exit_code == 0  # the same split again harms nobody
    result = run(root, "--seed", 1)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "there is another split already; --force replaces it" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert (root / "splits.json").read_bytes() == before
    assert run(root, "--seed", 1, "--force").exit_code == 0
    assert (root / "splits.json").read_bytes() != before


def test_a_damaged_split_is_not_silently_replaced(root):
    (root / "splits.json").write_text("{")
    assert run(root).exit_code == 1
    assert run(root, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--stratify", "stage"], 1, "no column 'stage'"),
        (["--fractions", "0.5", "0.1", "0.1"], 1, "add up to 0.7"),
        (["--folds", "11"], 1, "10 patient(s) cannot fill 11 parts"),
        (["--folds", "1"], 2, "--folds"),
        (["--folds", "3", "--fractions", "0.5", "0.1", "0.4"], 2, "exclude each other"),
        (["--test-fraction", "0.2"], 2, "--test-fraction needs --folds"),
    ],
)
def test_bad_input_is_one_line_and_bad_usage_is_status_two(root, words, status, message):
    result = run(root, *words)
    assert result.exit_code == status
    assert message in result.stderr
    assert "Traceback" not in result.output
    if status == 1:
        assert len(result.stderr.splitlines()) == 1
    assert not (root / "splits.json").exists()


def test_an_empty_folder_is_no_dataset(tmp_path):
    result = run(tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def published(root):
    """Ten patients of two cases; the last three are the test part."""
    import pandas as pd

    cases = pd.read_csv(root / "cases.csv", dtype=str, keep_default_na=False)
    cases["official_part"] = ["test" if patient in ("P7", "P8", "P9") else "training" for patient in cases["patient"]]
    cases.to_csv(root / "cases.csv", index=False)
    return root


def test_a_published_split_is_kept(published):
    result = run(published, "--column", "official_part")
    assert result.exit_code == 0, result.output
    assert "split as published in the column official_part" in result.output
    splits = DatasetFolder(published).splits
    assert splits["column"] == "official_part"
    assert splits["test"] == [f"c{n}" for n in range(14, 20)]
    assert [len(splits["folds"][0][part]) for part in ("train", "val")] == [12, 2]
    assert run(published, "--column", "official_part", "--folds", 7, "--force").exit_code == 0
    splits = DatasetFolder(published).splits
    assert splits["test"] == [f"c{n}" for n in range(14, 20)]
    assert [len(fold["val"]) for fold in splits["folds"]] == [2] * 7


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--column", "part"], 1, "no column 'part' with published parts; nearest: patient, official_part"),
        (
            ["--column", "stratum"],
            1,
            "has 'II' in the column 'stratum'; train, training, val, validation, test expected",
        ),
        (["--column", "official_part", "--folds", "8"], 1, "7 patient(s) cannot fill 8 parts"),
        (["--column", "official_part", "--folds", "2", "--test-fraction", "0.2"], 2, "exclude each other"),
    ],
)
def test_columns_that_are_no_split(published, words, status, message):
    result = run(published, *words)
    assert result.exit_code == status
    assert message in result.stderr
    assert not (published / "splits.json").exists()
