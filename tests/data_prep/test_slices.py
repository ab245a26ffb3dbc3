"""`data_prep slices`: options, output, refusals."""

import json

import pytest
from click.testing import CliRunner

from data_prep.cli import main
from medseg.data import SliceDataset

SPLITS = {
    "seed": 0,
    "stratify": None,
    "folds": [{"train": ["c00", "c01", "c02"], "val": ["c03"]}],
    "test": ["c04", "c05"],
}


@pytest.fixture
def root(tmp_path, write_dataset):
    write_dataset(tmp_path).write_split(SPLITS)
    return tmp_path


def run(*words):
    return CliRunner().invoke(main, ["slices", *map(str, words)])


def lengths(path):
    return [len(SliceDataset(path, part)) for part in ("train", "val", "test")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [8, 5, 10]),
        (["--keep", "all"], [15, 5, 10]),
        (["--keep", "foreground"], [8, 2, 5]),
        (["--keep", "foreground", "--keep-test", "all"], [8, 2, 10]),
        (["--keep-train", "all", "--keep-val", "foreground"], [15, 2, 10]),
    ],
)
def test_keep(root, words, expected):
    result = run(root, *words)
    assert result.exit_code == 0, result.output
    assert lengths(root / "slices.h5") == expected
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in result.output.splitlines() if "│" in line]
    assert rows == [
        [part, cases, str(n), "12x10", "CT, PET", "tumor, node"]
        for part, cases, n in zip(("train", "val", "test"), "312", expected, strict=True)
    ]


def test_size_axis_compression_and_out(root):
    result = run(root, "--size", 16, 8, "--axis", 2, "--compression", "lzf", "--out", root / "other.h5")
    assert result.exit_code == 0, result.output
    assert SliceDataset(root / "other.h5", "train")[0]["image"].shape == (2, 16, 8)
    assert not (root / "slices.h5").exists()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [(["--fold", "1"], 1, "fold 1"), (["--axis", "3"], 2, "--axis"), (["--keep", "none"], 2, "--keep")],
)
def test_bad_input(root, words, status, message):
    result = run(root, *words)
    assert result.exit_code == status
    assert message in result.stderr
    assert not (root / "slices.h5").exists()


def test_a_split_with_a_patient_twice_is_one_line(root):
    (root / "splits.json").write_text(json.dumps({**SPLITS, "test": ["c00", "c04", "c05"]}))
    result = run(root)
    assert result.exit_code == 1
    assert "patient P0 is in train" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (root / "slices.h5").exists()


def test_a_dataset_without_split_says_what_to_do(root):
    (root / "splits.json").unlink()
    result = run(root)
    assert result.exit_code == 1
    assert "data_prep split" in result.stderr
