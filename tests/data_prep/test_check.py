"""`data_prep check`: a line per problem and the status."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from data_prep.check import write_report
from data_prep.cli import main
from medseg.data import DatasetFolder, pixel_hash
from medseg.report import dataset_report


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


def test_warnings_are_marked_and_the_status_is_zero(root):
    label = nib.load(root / "labelsTr/c02.nii.gz")
    empty = np.zeros(label.shape, np.uint8)
    nib.save(nib.Nifti1Image(empty, label.affine), root / "labelsTr/c02.nii.gz")
    table = pd.read_csv(root / "cases.csv", dtype=str)
    table.loc[table["case"] == "c02", "label_sha256"] = pixel_hash(empty)
    table.to_csv(root / "cases.csv", index=False)
    result = run(root)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("warning: c02: label: no foreground; look at")
    assert lines[-1] == "6 cases: 1 warning(s) (label 1)"


def test_what_is_found_often_is_cut_short_but_not_in_json(tmp_path, write_dataset):
    write_dataset(tmp_path, patients=[f"P{n}" for n in range(25)], channels=("CT",))
    for path in tmp_path.glob("labelsTr/*"):
        path.unlink()
    result = run(tmp_path)
    assert result.exit_code == 1
    assert sum("is missing" in line for line in result.stdout.splitlines()) == 20
    assert "… 5 more error(s) about files; --json lists all, --report shows them" in result.stdout
    result = run(tmp_path, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert len(found) == 25
    assert found[0] == {
        "case": "c00",
        "what": "labelsTr/c00.nii.gz is missing",
        "advice": "build the dataset again",
        "topic": "files",
        "severity": "error",
    }


def test_the_report_shows_what_was_found(root):
    (root / "labelsTr/c04.nii.gz").unlink()
    assert run(root, "--report").exit_code == 1
    html = (root / "report.html").read_text()
    assert html.index("<tr><th>c04</th>") < html.index("<tr><th>c00</th>")
    assert '<span class="flag error">files</span>labelsTr/c04.nii.gz is missing' in html


def test_pictures_drawn_while_checking_are_those_of_the_files(root):
    """A case that the check cannot show is read again for the report, which says why."""
    (root / "labelsTr/c04.nii.gz").unlink()
    findings = write_report(root, show=False)
    page = (root / "report.html").read_bytes()
    assert page.count(b"data:image/jpeg") == 6
    assert b"no label file" in page
    assert dataset_report(root, findings).read_bytes() == page


def test_the_report_names_damaged_files_without_their_folder(tmp_path, write_dataset):
    root = tmp_path / "Kari  Nordmann"
    root.mkdir()
    write_dataset(root)
    path = root / "imagesTr/c03_0001.nii.gz"
    path.write_bytes(path.read_bytes()[:400])
    write_report(root, show=False)
    page = (root / "report.html").read_text()
    assert "c03_0001.nii.gz: cut short" in page
    assert "Nordmann" not in page


def test_made_up_patients_have_nothing_wrong_until_something_is_moved_or_changed(tmp_path):
    source, root = tmp_path / "source", tmp_path / "dataset"
    invoke = CliRunner().invoke
    assert invoke(main, ["phantom", str(source), "--patients", "3"]).exit_code == 0
    words = ["build", "petct", str(source), str(root), "--roi", "GTV", "--jobs", "1"]
    assert invoke(main, words).exit_code == 0
    assert run(root).stdout == "3 cases: nothing wrong found\n"
    assert "Nothing wrong was found." in (root / "report.html").read_text()

    one, other, third = sorted(DatasetFolder(root).cases["case"])

    def change(case, channel, edit):
        path = root / f"imagesTr/{case}_{channel:04d}.nii.gz"
        image = nib.load(path)
        voxels = edit(np.asarray(image.dataobj)).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, image.affine), path)

    change(one, 1, lambda pet: np.roll(pet, 10, axis=0))  # 2 mm voxels
    change(other, 0, lambda ct: ct + 1024)
    change(third, 1, lambda pet: pet * 5000)
    found = {(p["case"], p["topic"]): p["what"] for p in json.loads(run(root, "--json").stdout)}
    assert set(found) == {
        *((case, "files") for case in (one, other, third)),
        *((one, "alignment"), (other, "HU"), (third, "SUV")),
    }
    # Of the array the first axis goes to the patient's left.
    assert "moved 20 mm (20 mm right)" in found[one, "alignment"]
    assert "is 1024 added?" in found[other, "HU"]
    assert "are they Bq/ml?" in found[third, "SUV"]


def test_an_empty_folder_is_no_dataset(tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
