"""`data_prep check`: a line per problem and the status."""

import json

import pytest
from click.testing import CliRunner

from data_prep.cli import main


@pytest.fixture
def root(tmp_path, write_dataset):
    write_dataset(tmp_path)
    return tmp_path


def run(*words):
    return CliRunner().invoke(main, ["check", *map(str, words)])


def test_a_sound_dataset_is_said_to_be_so(root):
    result = run(root)
    assert (result.exit_code, result.stdout) == (0, "6 cases: nothing wrong found\n")


def test_problems_are_listed_and_the_status_is_one(root):
    (root / "labelsTr/c02.nii.gz").unlink()
    (root / "imagesTr/c03_0001.nii.gz").write_bytes(b"")
    splits = {"seed": 0, "folds": [{"train": ["c00", "c01", "c02"], "val": ["c03", "c04"]}], "test": ["c05", "c00"]}
    (root / "splits.json").write_text(json.dumps(splits))
    result = run(root, "--jobs", 1)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    assert lines[0] == "c02: labelsTr/c02.nii.gz is missing; build the dataset again"
    assert lines[1].startswith("c03: imagesTr/c03_0001.nii.gz")
    assert lines[2].startswith("splits.json: patient P0 is in train (case c00) and in test (case c00) of fold 0; ")
    assert lines[3] == "6 cases: 3 error(s) (files 2, split 1)"


def test_an_empty_folder_is_no_dataset(tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
