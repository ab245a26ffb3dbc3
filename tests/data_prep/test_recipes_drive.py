"""DRIVE in its original layout: TIFF pictures, GIF outlines of two observers, GIF fields of view."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from data_prep.build import BuildResult, build_dataset
from data_prep.cli import main
from data_prep.recipes.drive import DriveOptions, DriveRecipe
from medseg.data.folder import DatasetFolder
from medseg.errors import ConfigError, DatasetError

SHAPE = (9, 7)  # rows, columns


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (*SHAPE, 3), dtype=np.uint8)


def vessel(observer: int = 1) -> np.ndarray:
    inside = np.zeros(SHAPE, bool)
    inside[2:8, 3 if observer == 1 else 4] = True
    inside[0, 0] = True  # outside the field of view
    return inside


def field() -> np.ndarray:
    inside = np.zeros(SHAPE, bool)
    inside[1:8, 1:6] = True
    return inside


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "DRIVE"
    for part, numbers in (("training", (21, 22)), ("test", (1, 2))):
        for kind in ("images", "mask", "1st_manual", *(["2nd_manual"] if part == "test" else [])):
            (root / part / kind).mkdir(parents=True)
        for number in numbers:
            stem = f"{number:02d}"
            Image.fromarray(picture(number)).save(root / part / "images" / f"{stem}_{part}.tif")
            Image.fromarray(field().astype(np.uint8) * 255).save(root / part / "mask" / f"{stem}_{part}_mask.gif")
            Image.fromarray(vessel().astype(np.uint8) * 255).save(root / part / "1st_manual" / f"{stem}_manual1.gif")
            if part == "test":
                second = Image.fromarray(vessel(2).astype(np.uint8), mode="P")
                second.putpalette([0, 0, 0, 255, 255, 255])
                second.save(root / part / "2nd_manual" / f"{stem}_manual2.gif")
    return root


def build(source: Path, out: Path, **options: Any) -> BuildResult:
    return build_dataset(DriveRecipe(DriveOptions(**options)), source, out, jobs=1, report=False)


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)[..., 0]


def test_a_channel_per_color_and_the_vessels(source: Path, tmp_path: Path) -> None:
    result = build(source, tmp_path / "out")
    assert (result.failed, result.unpaired) == ([], [])
    assert result.notes == [
        "2 other file(s) of SOURCE are part of no case",  # of the second observer
        "4 pixels of 4 pictures are outlined as vessel outside the field of view, most of them in 01_test (1): "
        "they are kept",
    ]
    dataset = DatasetFolder(tmp_path / "out")
    assert (dataset.channel_names, dataset.labels) == (["R", "G", "B"], {"background": 0, "vessel": 1})
    assert list(dataset.cases["case"]) == ["01_test", "02_test", "21_training", "22_training"]
    assert list(dataset.cases["official_part"]) == ["test", "test", "training", "training"]
    for color, path in enumerate(dataset.image_paths("21_training")):
        np.testing.assert_array_equal(voxels(path), picture(21)[..., color].T)
    np.testing.assert_array_equal(voxels(dataset.label_path("21_training")), vessel().T)
    row = dataset.cases.set_index("case").loc["21_training"]
    assert float(row["fov_share"]) == pytest.approx(35 / 63, rel=1e-5)
    assert (row["vessel_outside_fov"], str(row["observer"])) == (1, "1")


def test_the_second_observer_is_that_of_the_test_part(source: Path, tmp_path: Path) -> None:
    result = build(source, tmp_path / "out", observer="2")
    assert "the test part has the second observer's outlines" in result.notes[-1]
    dataset = DatasetFolder(tmp_path / "out")
    np.testing.assert_array_equal(voxels(dataset.label_path("01_test")), vessel(2).T)
    np.testing.assert_array_equal(voxels(dataset.label_path("21_training")), vessel().T)
    assert [str(observer) for observer in dataset.cases["observer"]] == ["2", "2", "1", "1"]


def test_the_field_of_view_as_a_channel_or_as_what_is_ignored(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "channel", fov="channel")
    dataset = DatasetFolder(tmp_path / "channel")
    assert dataset.channel_names == ["R", "G", "B", "FOV"]
    np.testing.assert_array_equal(voxels(dataset.image_paths("01_test")[3]), field().T)
    np.testing.assert_array_equal(voxels(dataset.image_paths("01_test")[2]), picture(1)[..., 2].T)
    build(source, tmp_path / "ignore", fov="ignore")
    dataset = DatasetFolder(tmp_path / "ignore")
    assert dataset.labels == {"background": 0, "vessel": 1, "ignore": 2}
    np.testing.assert_array_equal(voxels(dataset.label_path("01_test")), np.where(field(), vessel(), 2).T)


def test_the_published_parts_are_kept(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "out")
    done = CliRunner().invoke(main, ["split", str(tmp_path / "out"), "--column", "official_part"])
    assert done.exit_code == 0, done.output
    splits = json.loads((tmp_path / "out" / "splits.json").read_text())
    assert splits["test"] == ["01_test", "02_test"]
    assert sorted(splits["folds"][0]["train"] + splits["folds"][0]["val"]) == ["21_training", "22_training"]


def test_what_is_incomplete_is_named_and_the_rest_is_built(source: Path, tmp_path: Path) -> None:
    (source / "test" / "mask" / "01_test_mask.gif").unlink()
    (source / "training" / "images" / "22_training.tif").unlink()
    Image.fromarray(np.arange(63, dtype=np.uint8).reshape(SHAPE) % 3).save(
        source / "test" / "1st_manual" / "02_manual1.gif"
    )
    result = build(source, tmp_path / "out")
    assert result.built == ["21_training"]
    assert [(problem.what, problem.case) for problem in result.unpaired] == [
        (
            "nothing with its number in training/images/",
            "training/mask/22_training_mask.gif, training/1st_manual/22_manual1.gif",
        ),
        ("nothing with its number in test/mask/", "test/images/01_test.tif, test/1st_manual/01_manual1.gif"),
    ]
    assert [problem.what for problem in result.failed] == [
        "the manual segmentation holds the values [0, 1, 2]: expected 0 and one other"
    ]


def test_the_test_part_as_registered_users_get_it_now_has_no_outlines(source: Path, tmp_path: Path) -> None:
    for path in (source / "test" / "1st_manual").iterdir():
        path.unlink()
    (source / "test" / "1st_manual").rmdir()
    result = build(source, tmp_path / "out")
    assert result.built == ["21_training", "22_training"]
    assert {problem.what for problem in result.unpaired} == {"nothing with its number in test/1st_manual/"}


def test_another_layout_and_other_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no training/images/ or test/images/ in it"):
        build(tmp_path, tmp_path.parent / "out")
    with pytest.raises(ConfigError, match="--observer: '3' given, 1 or 2 expected"):
        DriveOptions(observer="3")
    with pytest.raises(ConfigError, match="--fov: 'zero' given"):
        DriveOptions(fov="zero")


@pytest.mark.realdata
def test_the_real_pictures(data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for part, number in (("training", "21"), ("test", "01"), ("test", "08")):
        for path in (data / "drive" / part).glob(f"*/{number}_*"):
            (source / part / path.parent.name).mkdir(parents=True, exist_ok=True)
            (source / part / path.parent.name / path.name).symlink_to(path)
    first, second = build(source, tmp_path / "1"), build(source, tmp_path / "2", observer="2")
    assert (first.failed, first.unpaired, second.failed) == ([], [], [])
    datasets = [DatasetFolder(tmp_path / name) for name in ("1", "2")]
    cases = datasets[0].cases.set_index("case")
    assert list(cases["shape"]) == ["565x584x1"] * 3
    assert cases.loc["08_test", "vessel_outside_fov"] == 78
    labels = [voxels(dataset.label_path("01_test")) for dataset in datasets]
    for label, name in zip(labels, ("1st_manual/01_manual1", "2nd_manual/01_manual2"), strict=True):
        original = np.asarray(Image.open(data / "drive" / "test" / f"{name}.gif"))
        np.testing.assert_array_equal(label, (original > 0).T)
    dice = 2 * (labels[0] * labels[1]).sum() / (labels[0].sum() + labels[1].sum())
    assert 0.7 < dice < 0.85  # two people's outlines of one eye
