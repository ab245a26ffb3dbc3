"""Bad input ends in one line that names it, status 1, no traceback, and nothing half-written."""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from click.testing import CliRunner, Result

from data_prep.cli import main as data_prep
from medseg.cli import main as medseg
from medseg.errors import GeometryError, ReadError
from medseg.io import read_image, read_rtstruct


def call(command, *words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


def refused(result: Result, *expected: str) -> None:
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    for words in expected:
        assert words in result.output


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cohort") / "dicom"
    done = call(data_prep, "phantom", root, "--patients", 2, "--image-size", 32, "--slices", 8)
    assert done.exit_code == 0, done.output
    return root


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two image and label pairs."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        for kind in ("images", "labels"):
            (tmp_path / "source" / kind).mkdir(parents=True, exist_ok=True)
            values = rng.normal(size=(8, 8, 8)) if kind == "images" else rng.integers(0, 2, (8, 8, 8))
            image = nib.Nifti1Image(values.astype(np.float32 if kind == "images" else np.uint8), np.eye(4))
            nib.save(image, tmp_path / "source" / kind / f"{name}.nii.gz")
    return tmp_path / "source"


@pytest.mark.parametrize("command", [["inspect"], ["build", "folder"], ["build", "petct", "--roi", "GTV*"]])
def test_an_empty_folder(tmp_path, command):
    (tmp_path / "empty").mkdir()
    words = [tmp_path / "empty"] + ([tmp_path / "out"] if "build" in command else [])
    refused(call(data_prep, *command[:2], *words, *command[2:]), "empty")
    assert not (tmp_path / "out").exists()


def test_a_text_file_named_dcm(tmp_path):
    (tmp_path / "a.dcm").write_text("no image")
    with pytest.raises(ReadError, match=r"a\.dcm"):
        read_image(tmp_path / "a.dcm")


def test_a_nifti_cut_short_fails_alone(folders, tmp_path):
    file = folders / "images" / "a.nii.gz"
    file.write_bytes(file.read_bytes()[:500])
    result = call(data_prep, "build", "folder", folders, tmp_path / "out", "--keep-identifiers", "--jobs", 1)
    assert result.exit_code == 1
    assert "a.nii.gz" in result.output
    assert "Traceback" not in result.output
    assert [p.name for p in sorted((tmp_path / "out" / "imagesTr").iterdir())] == ["b_0000.nii.gz"]


def test_a_label_of_another_shape_fails_alone(folders, tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 7), np.uint8), np.eye(4)), folders / "labels" / "a.nii.gz")
    result = call(data_prep, "build", "folder", folders, tmp_path / "out", "--keep-identifiers", "--jobs", 1)
    assert result.exit_code == 1
    assert "8x8x7" in result.output.replace("×", "x").replace("(8, 8, 7)", "8x8x7")
    assert [p.name for p in sorted((tmp_path / "out" / "labelsTr").iterdir())] == ["b.nii.gz"]


def change(folder: Path, modality: str, edit) -> None:
    for file in folder.rglob("*.dcm"):
        dataset = pydicom.dcmread(file)
        if dataset.Modality == modality:
            edit(dataset)
            dataset.save_as(file)


@pytest.mark.parametrize("missing", ["PatientWeight", "RadionuclideTotalDose"])
def test_pet_without_what_suv_needs_fails_alone_by_name(cohort, tmp_path, missing):
    source = shutil.copytree(cohort, tmp_path / "dicom")

    def edit(dataset):
        delattr(
            dataset if missing == "PatientWeight" else dataset.RadiopharmaceuticalInformationSequence[0],
            missing,
        )

    change(source / "PHANTOM-001", "PT", edit)
    out = tmp_path / "out"
    result = call(data_prep, "build", "petct", source, out, "--roi", "GTV*", "--keep-identifiers", "--jobs", 1)
    assert result.exit_code == 1
    assert missing in result.output
    assert "Traceback" not in result.output
    assert [p.name for p in (out / "labelsTr").iterdir()] == ["PHANTOM-002.nii.gz"]


@pytest.mark.realdata
def test_the_structure_set_of_another_patient(data):
    folder = data / "dicom" / "ct_other_patients_rtstruct"
    files = [f for f in folder.rglob("*") if f.is_file()]
    structure_set = next(f for f in files if pydicom.dcmread(f, force=True).get("Modality") == "RTSTRUCT")
    images = [f for f in files if pydicom.dcmread(f, force=True).get("Modality") == "CT"]
    with pytest.raises((ReadError, GeometryError)) as caught:
        read_rtstruct(structure_set, read_image(images[0]))
    assert "\n" not in str(caught.value)


def test_a_split_with_a_patient_twice(write_dataset, tmp_path):
    folder = write_dataset(tmp_path / "ds", patients=("P0", "P0", "P1"))
    text = '{"seed": 0, "stratify": null, "folds": [{"train": ["c00"], "val": ["c02"]}], "test": ["c01"]}'
    (folder.root / "splits.json").write_text(text)
    for command in (["slices", folder.root], ["check", folder.root]):
        result = call(data_prep, *command)
        assert result.exit_code == 1
        assert "P0" in result.output
        assert "Traceback" not in result.output
    assert not (folder.root / "slices.h5").exists()


def test_unknown_names_are_answered_with_the_nearest():
    refused(call(medseg, "run", "hipocampus", "train"), "hippocampus_mr_segmentation")
    refused(call(medseg, "run", "hippocampus_mr_segmentation", "trian"), "train, multi_gpu_train")
    refused(
        call(medseg, "run", "hippocampus_mr_segmentation", "train", "--trian#trainer#max_epochs", "1"),
        "--train#trainer#max_epochs",
    )


def test_a_report_of_no_run(tmp_path):
    refused(call(medseg, "report", tmp_path, "--out", tmp_path / "r.html"), str(tmp_path))
    assert not (tmp_path / "r.html").exists()


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    folder = tmp_path / "a\x1b[31mb\nc"
    folder.mkdir()
    result = call(data_prep, "inspect", folder)
    refused(result, "a [31mb c")
    assert "\x1b" not in result.stderr
