"""The recipe kits19: real label maps of the challenge, in its layout, with images made from them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from data_prep.build import BuildResult, build_dataset
from data_prep.cli import main
from data_prep.recipes.kits19 import Kits19Options, Kits19Recipe
from medseg.data import BlockDataset, DatasetFolder, check_dataset, write_slices
from medseg.errors import ConfigError, DatasetError

#: Axes to inferior, posterior and left, as in the challenge: slices first.
IPL = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1]], float)


def write_case(folder: Path, label: np.ndarray | None, affine: np.ndarray, seed: int = 0, image: bool = True) -> None:
    """A case: its label, and an image in HU made from it (fat, kidney, tumor), with noise and air around."""
    folder.mkdir(parents=True)
    if label is None:
        label, made = np.zeros((4, 16, 16), np.uint8), True
    else:
        nib.save(nib.Nifti1Image(label, affine), folder / "segmentation.nii.gz")
        made = image
    if made:
        rng = np.random.default_rng(seed)
        hu = np.array([-80, 160, 60], np.int16)[label] + rng.integers(-20, 21, label.shape, dtype=np.int16)
        hu[:, : label.shape[1] // 16] = -1000
        nib.save(nib.Nifti1Image(hu, affine), folder / "imaging.nii.gz")


def small_label(shape: tuple[int, int, int] = (6, 40, 48)) -> np.ndarray:
    y, x = np.indices(shape)[1:]
    label = ((x - 14) ** 2 + (y - 20) ** 2 < 90).astype(np.uint8)
    label[(x - 14) ** 2 + (y - 14) ** 2 < 20] = 2
    label[[0, -1]] = 0
    return label


def affine(spacing: tuple[float, float, float]) -> np.ndarray:
    """Slice distance, then pixels."""
    return IPL @ np.diag([*spacing, 1])


def build(source: Path, out: Path, **options: Any) -> BuildResult:
    return build_dataset(Kits19Recipe(Kits19Options(**options)), source, out, jobs=1, report=False)


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number in (0, 120, 139, 205):
        write_case(tmp_path / "source" / f"case_{number:05d}", small_label(), affine((3, 0.8, 0.8)), number)
    return tmp_path / "source"


def test_cases_without_segmentation_are_left_over_by_name(tmp_path: Path, source: Path) -> None:
    write_case(source / "case_00210", None, affine((3, 1, 1)))
    write_case(source / "case_00099", small_label(), affine((3, 1, 1)), image=False)
    (source / "case_00001").mkdir()
    shutil.copytree(source / "case_00000", source / "case_00000 copy")
    shutil.copy(source / "case_00000" / "imaging.nii.gz", source / "case_00120" / "imaging (1).nii.gz")
    write_case(source / "case_00100", small_label(), affine((3, 1, 1)))
    (source / "case_00100" / "imaging.nii.gz").rename(source / "case_00100" / "imaging.nii")
    told = {"malignant": False, "tumor_histologic_subtype": "x"}
    clinical = [{**told, "case_id": f"case_{n:05d}", "malignant": n > 0} for n in (0, 120, 139)]
    (source / "kits.json").write_text(json.dumps(clinical))
    words = ["build", "kits19", str(source), str(tmp_path / "out"), "--jobs", "1", "--size", "24"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert [line for line in result.stderr.splitlines() if line.startswith("unpaired")] == [
        "unpaired: case_00000 copy/imaging.nii.gz, case_00000 copy/segmentation.nii.gz: its folder is not called case_ "
        "and five digits: is it a copy?",
        "unpaired: case_00099/segmentation.nii.gz: a segmentation without image",
        "unpaired: case_00100/imaging.nii: neither of the two files that a case has",
        "unpaired: case_00100/segmentation.nii.gz: a segmentation without image",
        "unpaired: case_00120/imaging (1).nii.gz: neither of the two files that a case has",
        "unpaired: case_00210/imaging.nii.gz: an image without segmentation",
    ]
    assert "note: 1 case folder(s) are empty" in result.stderr
    assert "note: kits.json says nothing of 1 case(s), such as case_00205" in result.stderr
    assert "there are 1 train, 2 val, 1 test" in result.stderr
    dataset = DatasetFolder(tmp_path / "out")
    # A public dataset keeps its public names.
    assert list(dataset.cases["patient"]) == ["case_00000", "case_00120", "case_00139", "case_00205"]
    assert list(dataset.cases["published_part"]) == ["train", "val", "val", "test"]
    assert [str(value).lower() for value in dataset.cases["malignant"]] == ["false", "true", "true", ""]
    assert dataset.labels == {"background": 0, "kidney": 1, "tumor": 2}
    assert dataset.channel_names == ["CT"]
    assert [problem for problem in check_dataset(tmp_path / "out") if problem.severity != "warning"] == []


def test_slices_are_made_square_turned_and_resized(tmp_path: Path, source: Path) -> None:
    build(source, tmp_path / "out", size=24)
    dataset = DatasetFolder(tmp_path / "out")
    row = dataset.cases.iloc[0]
    # 48 pixels of 0.8 mm become 24, and 40 are padded to 48 first: nothing is distorted.
    assert (row["source_shape"], row["shape"], row["spacing"]) == ("6x40x48", "24x24x6", "1.6x1.6x3")
    image, label = nib.load(dataset.image_paths("case_00000")[0]), nib.load(dataset.label_path("case_00000"))
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    stored = nib.load(source / "case_00000" / "imaging.nii.gz")
    hu = np.pad(np.asarray(stored.dataobj, float), ((0, 0), (4, 4), (0, 0)), constant_values=-1024)
    blocks = hu.reshape(6, 24, 2, 24, 2).mean((2, 4))  # nearly what the filter gives, where it is not shifted
    assert np.corrcoef(voxels(dataset.image_paths("case_00000")[0])[..., ::-1].T.ravel(), blocks.ravel())[0, 1] > 0.99
    # Each voxel of the label is the source's at its place.
    everywhere = np.stack([*map(np.ravel, np.indices(label.shape)), np.ones(label.get_fdata().size)])
    index = np.rint((np.linalg.inv(stored.affine) @ label.affine @ everywhere)[:3] + 1e-6).astype(int)
    inside = ((index >= 0) & (index < np.array(stored.shape)[:, None])).all(0)
    truth = np.zeros(inside.size, np.uint8)
    truth[inside] = small_label()[tuple(index[:, inside])]
    np.testing.assert_array_equal(voxels(dataset.label_path("case_00000")).ravel(), truth)
    assert inside.mean() == pytest.approx(40 / 48)


def test_slices_may_stay_as_they_are(tmp_path: Path, source: Path) -> None:
    build(source, tmp_path / "out", size=0)
    dataset = DatasetFolder(tmp_path / "out")
    assert set(dataset.cases["shape"]) == {"48x40x6"}
    np.testing.assert_array_equal(voxels(dataset.label_path("case_00120"))[..., ::-1].T, small_label())
    stored = np.asarray(nib.load(source / "case_00120" / "imaging.nii.gz").dataobj)
    np.testing.assert_array_equal(voxels(dataset.image_paths("case_00120")[0])[..., ::-1].T, stored)


def test_a_spacing_instead_of_a_size(tmp_path: Path, source: Path) -> None:
    build(source, tmp_path / "out", spacing=(1.6, 0.8, 6.0))
    dataset = DatasetFolder(tmp_path / "out")
    assert set(dataset.cases["shape"]) == {"24x40x3"}
    assert dataset.cases["volume_ml_kidney"][0] == pytest.approx(dataset.cases["source_ml_kidney"][0], rel=0.3)


def test_a_tumor_between_the_voxels_is_noted(tmp_path: Path, source: Path) -> None:
    label = small_label()
    label[label == 2] = 1
    label[3, 18, 20] = 2
    write_case(source / "case_00007", label, affine((3, 0.8, 0.8)))
    result = build(source, tmp_path / "out", size=12)
    (note,) = [note for note in result.notes if "fell between the voxels" in note]
    assert note.startswith("the tumor of 1 case(s)")
    assert note.endswith("such as of case_00007")


def test_what_does_not_fit_fails_by_name(tmp_path: Path, source: Path) -> None:
    label = small_label()
    label[2, 20, 20] = 3
    write_case(source / "case_00011", label.clip(0, 2), affine((3, 0.8, 0.8)))
    nib.save(nib.Nifti1Image(label, affine((3, 0.8, 0.8))), source / "case_00011" / "segmentation.nii.gz")
    write_case(source / "case_00012", small_label(), affine((3, 0.8, 0.8)))
    nib.save(nib.Nifti1Image(small_label(), affine((3, 0.9, 0.8))), source / "case_00012" / "segmentation.nii.gz")
    result = build(source, tmp_path / "out", size=24)
    what = {problem.case: problem.what for problem in result.failed}
    assert "holds the value 3: expected 0 to 2" in what.pop("case_00011")
    assert "expected the same grid" in what.pop("case_00012")
    assert what == {}
    (source / "kits.json").write_text('{"case_id": 1}')
    with pytest.raises(DatasetError, match=r"kits.json: not as KiTS19 has it"):
        build(source, tmp_path / "other")


def test_the_clone_of_the_repository_will_do(tmp_path: Path, source: Path) -> None:
    (tmp_path / "clone").mkdir()
    source.rename(tmp_path / "clone" / "data")
    assert len(build(tmp_path / "clone", tmp_path / "out", size=8).built) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="expected folders case_00000"):
        build(tmp_path / "empty", tmp_path / "other")


@pytest.mark.parametrize(
    ("given", "pixels"), [({}, 128), ({"size": 64}, 64), ({"size": 0}, 0), ({"spacing": (1.0, 1.0, 1.0)}, 0)]
)
def test_the_works_size_is_the_default(given: dict[str, Any], pixels: int) -> None:
    assert Kits19Options(**given).pixels() == pixels


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": -1}, "--size: -1 given"),
        ({"spacing": (1.0, 0.0, 1.0)}, "positive mm expected"),
        ({"size": 64, "spacing": (1.0, 1.0, 1.0)}, "exclude each other"),
    ],
)
def test_options_that_mean_nothing_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Kits19Options(**given)


@pytest.fixture
def real(data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write the challenge's layout with real labels; of each case at most so many slices, its labeled ones first."""

    def write(numbers: tuple[int, ...], most: int) -> Path:
        for number in numbers:
            stored = nib.load(data / "kits19_labels" / f"case_{number:05d}" / "segmentation.nii.gz")
            label = np.asarray(stored.dataobj)
            first = max(0, int(np.flatnonzero(label.any((1, 2)))[0]) - 3)
            part = stored.slicer[first : first + most]
            write_case(tmp_path / "real" / f"case_{number:05d}", np.asarray(part.dataobj), part.affine, number)
        (tmp_path / "real" / "kits.json").symlink_to(data / "kits19_labels" / "kits.json")
        return tmp_path / "real"

    return write


def check_real(source: Path, out: Path) -> DatasetFolder:
    result = build(source, out)
    assert result.failed == []
    dataset = DatasetFolder(out)
    # Its small pixels make one of them an outlier of spacing: a warning, and right.
    assert [problem for problem in check_dataset(out) if problem.severity != "warning"] == []
    for row in dataset.cases.to_dict("records"):
        stored = nib.load(source / row["case"] / "segmentation.nii.gz")
        slices, *plane = stored.shape
        assert row["shape"] == f"128x128x{slices}"
        step = stored.header.get_zooms()[1] * max(plane) / 128
        assert row["spacing"] == f"{step:.6g}x{step:.6g}x{stored.header.get_zooms()[0]:.6g}"
        for label in ("kidney", "tumor"):
            # One voxel in 16 is taken: a volume of n of them is right to about 1 / sqrt(n).
            before, after = row[f"source_ml_{label}"], row[f"volume_ml_{label}"]
            assert after == pytest.approx(before, rel=0.03, abs=0.3)
        made = nib.load(dataset.label_path(row["case"]))
        kidneys = [image.affine @ [*np.argwhere(np.asarray(image.dataobj) == 1).mean(0), 1] for image in (stored, made)]
        np.testing.assert_allclose(*kidneys, atol=0.7)
        # The image lies as its label does: kidneys are bright in it.
        image, label = voxels(dataset.image_paths(row["case"])[0]), voxels(dataset.label_path(row["case"]))
        assert np.median(image[label == 1]) == pytest.approx(160, abs=8)
        assert np.median(image[label == 0]) == pytest.approx(-80, abs=8)
        # Of slices that are not square the rest is air.
        if plane[0] != plane[1]:
            edge = 128 * (plane[1] - plane[0]) // (2 * plane[1]) - 1
            np.testing.assert_allclose(image[:, :edge], -1024, rtol=1e-5)
    return dataset


@pytest.mark.realdata
def test_real_labels_keep_their_place_and_volume(real: Callable[..., Path], tmp_path: Path) -> None:
    """One of them has slices of 512x796."""
    dataset = check_real(real((110, 160), most=24), tmp_path / "out")
    assert list(dataset.cases["tumor_histologic_subtype"]) != ["", ""]


@pytest.mark.realdata
@pytest.mark.long
def test_all_of_several_real_cases(real: Callable[..., Path], tmp_path: Path) -> None:
    """Whole patients, from the labels to the blocks that a 3D network is trained on."""
    dataset = check_real(real((10, 20, 30, 70, 110, 130, 160, 200), most=10_000), tmp_path / "out")
    cases = list(dataset.cases["case"])
    dataset.write_split({"folds": [{"train": cases[:6], "val": cases[6:7]}], "test": cases[7:]})
    blocks = BlockDataset(write_slices(tmp_path / "out"), "train", size=32, overlap=12)
    # 41, 27, 32, 26, 25 and 43 labeled slices.
    assert len(blocks) == 2 + 1 + 1 + 1 + 1 + 2
    assert blocks.has_label("kidney").all()
    assert {tuple(block["image"].shape) for block in blocks} == {(1, 128, 128, 32)}
    assert [bool(block["label"][1].any()) for block in blocks] == blocks.has_label("tumor").tolist()
