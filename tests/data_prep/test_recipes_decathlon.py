"""A task of the Decathlon in its original layout, and a copy without its description."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from data_prep.build import BuildResult, build_dataset
from data_prep.cli import main
from data_prep.recipes.decathlon import DecathlonOptions, DecathlonRecipe
from medseg.data.folder import DatasetFolder
from medseg.errors import DatasetError

AFFINE = np.array([[1.5, 0, 0, -40], [0, 2, 0, -30], [0, 0, 3, 5], [0, 0, 0, 1]], float)
SHAPE = (6, 5, 4)
DESCRIPTION: dict[str, Any] = {
    "name": "PROSTATE",
    "tensorImageSize": "4D",
    "modality": {"1": "ADC", "0": "T2"},
    "labels": {"0": "background", "1": "PZ", "2": "TZ"},
    "numTraining": 3,
    "training": [
        {"image": f"./imagesTr/prostate_{n}.nii.gz", "label": f"./labelsTr/prostate_{n}.nii.gz"}
        for n in ("00", "01", "02")
    ],
    "test": ["./imagesTs/prostate_03.nii.gz"],
}


def save(path: Path, voxels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(voxels), AFFINE), path)


def image(number: int) -> np.ndarray:
    """As the Decathlon has it: the channels are the last axis of one 4D file."""
    return np.random.default_rng(number).normal(100, 10, (*SHAPE, 2)).astype(np.float32)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Task05_Prostate as its archive unpacks on a Mac: with a shadow ``._`` beside every file."""
    root = tmp_path / "unpacked" / "Task05_Prostate"
    for number in (0, 1, 2):
        label = np.zeros(SHAPE, np.float32)
        label[1:3], label[3] = 1, 2
        save(root / "imagesTr" / f"prostate_{number:02d}.nii.gz", image(number))
        save(root / "labelsTr" / f"prostate_{number:02d}.nii.gz", label)
    save(root / "imagesTs" / "prostate_03.nii.gz", image(3))
    for path in list(root.rglob("*.nii.gz")):
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    (root / "dataset.json").write_text(json.dumps(DESCRIPTION))
    (root / "._dataset.json").write_bytes(b"\x00\x05\x16\x07")
    return root


def build(source: Path, out: Path, **options: Any) -> BuildResult:
    return build_dataset(DecathlonRecipe(DecathlonOptions(**options)), source, out, jobs=1, report=False)


def test_channels_and_labels_are_those_of_dataset_json(task: Path, tmp_path: Path) -> None:
    result = build(task.parent, tmp_path / "out")  # the folder that the archive was unpacked to
    assert (result.failed, result.unpaired) == ([], [])
    assert result.notes == [
        "1 image(s) of imagesTs/ are left: their labels were not published",
        "2 other file(s) of SOURCE are part of no case",  # that image, and dataset.json
    ]
    dataset = DatasetFolder(tmp_path / "out")
    assert dataset.channel_names == ["T2", "ADC"]
    assert dataset.labels == {"background": 0, "PZ": 1, "TZ": 2}
    assert list(dataset.cases["case"]) == ["prostate_00", "prostate_01", "prostate_02"]  # public names are kept
    assert list(dataset.cases["patient"]) == list(dataset.cases["case"])
    for number, path in enumerate(dataset.image_paths("prostate_01")):
        written = nib.load(path)
        np.testing.assert_array_equal(np.asarray(written.dataobj), image(1)[..., number])
        np.testing.assert_allclose(written.affine, AFFINE)
    label = np.asarray(nib.load(dataset.label_path("prostate_01")).dataobj)
    assert [np.unique(label[x]).tolist() for x in range(6)] == [[0], [1], [1], [2], [0], [0]]
    row = dataset.cases.set_index("case").loc["prostate_01"]
    assert float(row["p99_T2"]) == pytest.approx(np.percentile(image(1)[..., 0], 99), rel=1e-5)


def test_a_label_that_no_case_has_keeps_its_number(task: Path, tmp_path: Path) -> None:
    for path in (task / "labelsTr").glob("[!.]*"):
        save(path, np.full(SHAPE, 2, np.uint8))
    build(task, tmp_path / "out")
    assert DatasetFolder(tmp_path / "out").labels == {"background": 0, "PZ": 1, "TZ": 2}


def test_the_lists_are_compared_with_the_files(task: Path, tmp_path: Path) -> None:
    (task / "labelsTr" / "prostate_00.nii.gz").unlink()
    (task / "imagesTr" / "prostate_02.nii.gz").rename(task / "imagesTr" / "prostate_07.nii.gz")
    (task / "labelsTr" / "prostate_02.nii.gz").rename(task / "labelsTr" / "prostate_07.nii.gz")
    result = build(task, tmp_path / "out")
    assert [(problem.case, problem.what) for problem in result.unpaired] == [
        ("imagesTr/prostate_00.nii.gz", "image without a label")
    ]
    assert result.notes[:2] == [
        "2 training case(s) of dataset.json have no image or no label here",
        "1 image(s) with a label are built, although dataset.json does not list them",
    ]
    assert result.built == ["prostate_01", "prostate_07"]


def test_intensities_on_other_scales_are_kept_and_told(task: Path, tmp_path: Path) -> None:
    save(task / "imagesTr" / "prostate_02.nii.gz", image(2) * [1, 1000])
    (note,) = [note for note in build(task, tmp_path / "out").notes if "scales" in note]
    assert note.startswith("ADC: the intensities are on different scales")
    assert "of prostate_02) and are kept" in note
    written = nib.load(DatasetFolder(tmp_path / "out").image_paths("prostate_02")[1])
    np.testing.assert_allclose(np.asarray(written.dataobj), (image(2) * [1, 1000])[..., 1].astype(np.float32))


def test_a_changed_description_makes_the_cases_anew(task: Path, tmp_path: Path) -> None:
    build(task, tmp_path / "out")
    assert build(task, tmp_path / "out").kept == ["prostate_00", "prostate_01", "prostate_02"]
    (task / "dataset.json").write_text(
        json.dumps(DESCRIPTION | {"labels": {"0": "background", "1": "outer", "2": "TZ"}})
    )
    assert len(build(task, tmp_path / "out").built) == 3
    assert DatasetFolder(tmp_path / "out").labels == {"background": 0, "outer": 1, "TZ": 2}


def test_values_that_dataset_json_does_not_name_are_refused(task: Path, tmp_path: Path) -> None:
    save(task / "labelsTr" / "prostate_02.nii.gz", np.full(SHAPE, 3, np.uint8))
    result = build(task, tmp_path / "out")
    assert [(problem.case, problem.what) for problem in result.failed] == [
        ("prostate_02", "the label holds the values [3]: expected [0, 1, 2]")
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not as the Decathlon writes it"),
        ("[]", "not as the Decathlon writes it"),
        (json.dumps({"labels": {}}), "KeyError: 'modality'"),
        (json.dumps(DESCRIPTION | {"labels": {"background": 0, "PZ": 1}}), "not as the Decathlon writes it"),
        (json.dumps(DESCRIPTION | {"labels": {"0": "background", "1": "PZ", "2": "PZ"}}), "each name once"),
        (json.dumps(DESCRIPTION | {"labels": {"1": "PZ"}}), "expected 0 for the background"),
    ],
)
def test_another_description_is_refused_in_one_line(task: Path, tmp_path: Path, content: str, message: str) -> None:
    (task / "dataset.json").write_text(content)
    done = CliRunner().invoke(main, ["build", "decathlon", str(task), str(tmp_path / "out"), "--jobs", "1"])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_two_tasks_are_not_mixed(task: Path, tmp_path: Path) -> None:
    (task.parent / "Task04_Hippocampus").mkdir()
    (task.parent / "Task04_Hippocampus" / "dataset.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"2 tasks in it \(Task04_Hippocampus, Task05_Prostate\): name one"):
        build(task.parent, tmp_path / "out")


@pytest.mark.realdata
def test_hippocampi_without_a_description(data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder, numbers in (("images", ("001", "118", "217")), ("labels", ("001", "010", "217", "281"))):
        (source / folder).mkdir(parents=True)
        for number in numbers:
            name = f"hippocampus_{number}.nii.gz"
            (source / folder / name).symlink_to(data / "hippocampus" / folder / name)
    words = ["--jobs", "1", "--channel", "MRI", "--label", "anterior=1", "--label", "posterior=2", "--no-report"]
    done = CliRunner().invoke(main, ["build", "decathlon", str(source), str(tmp_path / "out"), *words])
    assert done.exit_code == 0, done.output
    assert [line for line in done.stderr.splitlines() if line.startswith("unpaired")] == [
        "unpaired: images/hippocampus_118.nii.gz: image without a label",
        "unpaired: labels/hippocampus_010.nii.gz: label without an image",
        "unpaired: labels/hippocampus_281.nii.gz: label without an image",
    ]
    assert "a split may part two of one person" in done.stderr
    assert "different scales (99th percentile 106 of hippocampus_001, 5.011e+05 of hippocampus_217)" in done.stderr
    dataset = DatasetFolder(tmp_path / "out")
    assert (dataset.channel_names, dataset.labels) == (["MRI"], {"background": 0, "anterior": 1, "posterior": 2})
    original = nib.load(source / "images" / "hippocampus_217.nii.gz")
    (path,) = dataset.image_paths("hippocampus_217")
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), np.asarray(original.dataobj, np.float32))
