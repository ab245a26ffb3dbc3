"""The recipe folder: pairs by name, grids compared, labels renumbered, on real and made-up files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from click.testing import CliRunner
from monai.data import load_decathlon_datalist
from PIL import Image

from data_prep.build import BuildResult, build_dataset
from data_prep.cli import main
from data_prep.recipes.folder import FolderOptions, FolderRecipe
from medseg.data import DatasetFolder
from medseg.errors import ConfigError, DatasetError

AFFINE = np.array([[-1.5, 0, 0, 40], [0, 2, 0, -30], [0, 0, 3, 5], [0, 0, 0, 1]], float)
SHAPE = (6, 5, 4)


def build(source: Path, out: Path, **options: Any) -> BuildResult:
    recipe = FolderRecipe(FolderOptions(**options))
    return build_dataset(recipe, source, out, jobs=1, keep_identifiers=True, report=False)


def save(path: Path, voxels: Any, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(voxels), affine), path)


def save_pair(source: Path, name: str, label: Any = None) -> np.ndarray:
    image = np.random.default_rng(len(name)).normal(size=SHAPE).astype(np.float32)
    save(source / "images" / f"{name}.nii.gz", image)
    if label is None:
        label = np.zeros(SHAPE, np.uint8)
        label[2:4, 2:4, 1:3] = 1
    save(source / "labels" / f"{name}.nii.gz", label)
    return image


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.realdata
def test_hippocampus_is_built_and_its_unpaired_files_are_named(tmp_path: Path, data: Path) -> None:
    source = tmp_path / "source"
    for folder, numbers in (("images", ("001", "003", "118", "204")), ("labels", ("001", "003", "010", "204", "281"))):
        (source / folder).mkdir(parents=True)
        for number in numbers:
            name = f"hippocampus_{number}.nii.gz"
            (source / folder / name).symlink_to(data / "hippocampus" / folder / name)
    words = ["build", "folder", str(source), str(tmp_path / "out"), "--jobs", "1", "--keep-identifiers", "--channel"]
    words += ["MR", "--label", "anterior=1", "--label", "posterior=2"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert [line for line in result.stderr.splitlines() if line.startswith("unpaired")] == [
        "unpaired: images/hippocampus_118.nii.gz: image without a label",
        "unpaired: labels/hippocampus_010.nii.gz: label without an image",
        "unpaired: labels/hippocampus_281.nii.gz: label without an image",
    ]
    dataset = DatasetFolder(tmp_path / "out")
    assert list(dataset.cases["case"]) == ["hippocampus_001", "hippocampus_003", "hippocampus_204"]
    assert [entry["sources"] for entry in dataset.manifest["unpaired"]] == [[3], [7], [9]]
    assert dataset.labels == {"background": 0, "anterior": 1, "posterior": 2}
    for case in dataset.cases.itertuples():
        original = nib.load(source / "images" / f"{case.case}.nii.gz")
        label = voxels(source / "labels" / f"{case.case}.nii.gz")
        (image,) = dataset.image_paths(case.case)
        np.testing.assert_array_equal(voxels(image), np.asarray(original.dataobj, np.float32))
        np.testing.assert_array_equal(voxels(dataset.label_path(case.case)), label)
        np.testing.assert_allclose(nib.load(image).affine, original.affine)
        assert case.volume_ml_anterior == pytest.approx((label == 1).sum() / 1000, rel=1e-5)
    listed = load_decathlon_datalist(str(tmp_path / "out" / "dataset.json"))
    assert [entry["case"] for entry in listed] == list(dataset.cases["case"])
    assert (tmp_path / "out" / "report.html").is_file()


def test_labels_are_renumbered_for_all_cases_alike(tmp_path: Path) -> None:
    one, two = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    one[1, 1, 1], two[2, 2, 2], two[3, 3, 3] = 255, 255, 128
    save_pair(tmp_path / "s", "one", one)
    save_pair(tmp_path / "s", "two", two)
    build(tmp_path / "s", tmp_path / "out")
    dataset = DatasetFolder(tmp_path / "out")
    assert dataset.labels == {"background": 0, "label_1": 1, "label_2": 2}
    assert dataset.manifest["labels_remapped"] == {"0": 0, "128": 1, "255": 2}
    np.testing.assert_array_equal(voxels(dataset.label_path("one")), (one == 255) * 2)
    np.testing.assert_array_equal(voxels(dataset.label_path("two")), (two == 255) * 2 + (two == 128))


def test_named_labels_come_in_the_order_given_and_may_be_merged(tmp_path: Path) -> None:
    label = np.zeros(SHAPE, np.int16)
    label[0], label[1], label[2] = 4, 9, 7
    save_pair(tmp_path / "s", "a", label)
    build(tmp_path / "s", tmp_path / "out", label=("lesion=9", "organ=4,7"))
    dataset = DatasetFolder(tmp_path / "out")
    assert dataset.labels == {"background": 0, "lesion": 1, "organ": 2}
    assert [np.unique(voxels(dataset.label_path("a"))[x]).tolist() for x in range(4)] == [[2], [1], [2], [0]]
    # A value that has no name is not swept under the background.
    with pytest.raises(DatasetError, match=r"holds the values \[7\]"):
        build(tmp_path / "s", tmp_path / "other", label=("lesion=9", "organ=4"))
    with pytest.raises(ConfigError, match=r"\[3\] occur nowhere; the labels hold \[0, 4, 7, 9\]"):
        build(tmp_path / "s", tmp_path / "other", label=("organ=3",))
    for given, expected in ((("background=0,7", "one=4,9"), [1, 1, 0, 0]), (("background=4,7",), [0, 1, 0, 0])):
        build(tmp_path / "s", tmp_path / given[0], label=given)
        path = DatasetFolder(tmp_path / given[0]).label_path("a")
        assert [voxels(path)[x].max() for x in range(4)] == expected


def test_almost_whole_numbers_are_labels_and_interpolated_ones_are_not(tmp_path: Path) -> None:
    label = np.zeros(SHAPE, np.float32)
    label[1], label[2] = 0.99999997, 1.0005
    save_pair(tmp_path / "s", "good", label)
    bad = label.copy()
    bad[3] = 0.5
    save_pair(tmp_path / "s", "bad", bad)
    result = build(tmp_path / "s", tmp_path / "out")
    assert [problem.case for problem in result.failed] == ["bad"]
    assert "20 voxels are no whole numbers, such as 0.5 at voxel (3, 0, 0)" in result.failed[0].what
    np.testing.assert_array_equal(voxels(DatasetFolder(tmp_path / "out").label_path("good")), np.rint(label))


def test_another_grid_is_refused_and_a_rounding_error_is_not(tmp_path: Path) -> None:
    label = np.ones(SHAPE, np.uint8)
    rounding, shifted, flipped = AFFINE.copy(), AFFINE.copy(), AFFINE.copy()
    rounding[0, 3] += 0.01
    shifted[0, 3] += 0.5
    flipped[0] = [1.5, 0, 0, 32.5]
    for name, voxels_of_label, affine in (
        ("fine", label, rounding),
        ("shifted", label, shifted),
        ("flipped", label, flipped),
        ("shorter", label[:, :, :3], AFFINE),
    ):
        save_pair(tmp_path / "s", name)
        save(tmp_path / "s" / "labels" / f"{name}.nii.gz", voxels_of_label, affine)
    result = build(tmp_path / "s", tmp_path / "out")
    what = {problem.case: problem.what for problem in result.failed}
    assert sorted(what) == ["flipped", "shifted", "shorter"]
    assert "lies up to 0.5 mm away from the image" in what["shifted"]
    assert "lies up to 7.5 mm away from the image" in what["flipped"]
    assert what["shorter"] == "the label has the shape 6x5x3, the image 6x5x4: expected the same"
    dataset = DatasetFolder(tmp_path / "out")
    np.testing.assert_allclose(nib.load(dataset.label_path("fine")).affine, AFFINE, atol=1e-5)


def test_numbered_files_are_channels_of_one_case(tmp_path: Path) -> None:
    source = tmp_path / "s"
    for name in ("a", "b", "c_0007"):
        save_pair(source, name)
    for name in ("a", "b"):
        image = source / "images" / f"{name}.nii.gz"
        for channel in range(2):
            save(source / "images" / f"{name}_{channel:04d}.nii.gz", voxels(image) + channel)
        image.unlink()
    (source / "images" / "b_0000.nii.gz").unlink()
    result = build(source, tmp_path / "out", channel=("T1", "T2"))
    what = {problem.case: problem.what for problem in result.failed}
    assert "_0001 are there: expected _0000 and on" in what["b"]
    assert what["c_0007"] == "1 channels: expected 2 as in the other cases"  # its name is its own, not a channel's
    dataset = DatasetFolder(tmp_path / "out")
    assert dataset.channel_names == ["T1", "T2"]
    first, second = (voxels(path) for path in dataset.image_paths("a"))
    np.testing.assert_allclose(second - first, 1, atol=1e-6)
    with pytest.raises(ConfigError, match="--channel: 3 named"):
        build(source, tmp_path / "three", channel=("a", "b", "c"))


def test_channels_on_two_grids_are_refused(tmp_path: Path) -> None:
    source, shifted = tmp_path / "s", AFFINE.copy()
    shifted[2, 3] += 3
    for name in ("good", "bad"):
        save_pair(source, name)
        image = source / "images" / f"{name}.nii.gz"
        for channel, affine in enumerate((AFFINE, shifted if name == "bad" else AFFINE)):
            save(source / "images" / f"{name}_{channel:04d}.nii.gz", voxels(image), affine)
        image.unlink()
    result = build(source, tmp_path / "out")
    assert [problem.case for problem in result.failed] == ["bad"]
    assert "channel 1 lies up to 3 mm away from channel 0" in result.failed[0].what


def test_two_files_of_one_name_are_not_chosen_from(tmp_path: Path) -> None:
    save_pair(tmp_path / "s", "a")
    save_pair(tmp_path / "s", "b")
    save(tmp_path / "s" / "images" / "b.nii", np.zeros(SHAPE, np.float32))
    result = build(tmp_path / "s", tmp_path / "out")
    assert [problem.what for problem in result.failed] == [
        "images/b.nii, images/b.nii.gz have the same stem: keep one of them"
    ]


def test_patients_are_told_from_names(tmp_path: Path) -> None:
    for name in ("p1_scan1", "p1_scan2", "p2_scan1"):
        save_pair(tmp_path / "s", name)
    build(tmp_path / "s", tmp_path / "out", patient_pattern="(p[0-9]+)_")
    assert list(DatasetFolder(tmp_path / "out").cases["patient"]) == ["p1", "p1", "p2"]
    recipe = FolderRecipe(FolderOptions(patient_pattern="(p[0-9]+)_"))
    build_dataset(recipe, tmp_path / "s", tmp_path / "hidden", jobs=1, report=False)
    cases = DatasetFolder(tmp_path / "hidden").cases
    assert sorted(cases["patient"].value_counts()) == [1, 2]
    assert cases["case"].is_unique
    with pytest.raises(DatasetError, match="does not fit its name"):
        build(tmp_path / "s", tmp_path / "x", patient_pattern="(q)")
    for pattern in ("p[0-9]+", "("):
        with pytest.raises(ConfigError, match="--patient-pattern"):
            FolderOptions(patient_pattern=pattern)


def test_resampling_keeps_the_place(tmp_path: Path) -> None:
    x, y, z = np.indices((20, 16, 12))
    ramp = (3 * x - 2 * y + 5 * z).astype(np.float32)
    label = ((x > 8) & (y > 4)).astype(np.uint8)
    save(tmp_path / "s" / "images" / "a.nii.gz", ramp)
    save(tmp_path / "s" / "labels" / "a.nii.gz", label)
    build(tmp_path / "s", tmp_path / "out", spacing=(3.0, 1.0, 2.0))
    dataset = DatasetFolder(tmp_path / "out")
    assert (dataset.cases["shape"][0], dataset.cases["spacing"][0]) == ("10x32x18", "3x1x2")
    image = nib.load(dataset.image_paths("a")[0])
    # A linear function of place stays what it was, wherever a voxel lies between old centers.
    world = np.stack([*np.indices(image.shape), np.ones(image.shape)], -1) @ image.affine.T
    old = world @ np.linalg.inv(AFFINE).T
    inside = ((old[..., :3] >= 0) & (old[..., :3] <= np.array(ramp.shape) - 1)).all(-1)
    expected = old[..., :3] @ [3, -2, 5]
    np.testing.assert_allclose(voxels(dataset.image_paths("a")[0])[inside], expected[inside], atol=1e-4)
    assert inside.mean() > 0.7
    assert set(np.unique(voxels(dataset.label_path("a")))) == {0, 1}
    assert dataset.cases["volume_ml_label_1"][0] == pytest.approx(label.sum() * 9 / 1000, rel=0.15)


def test_pictures_become_one_slice_with_a_channel_per_color(tmp_path: Path) -> None:
    source = tmp_path / "s"
    (source / "images").mkdir(parents=True)
    (source / "labels").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    mask = np.zeros((7, 9), np.uint8)
    mask[2:4, 5:8] = 255
    Image.fromarray(pixels).save(source / "images" / "a.png")
    Image.fromarray(mask).save(source / "labels" / "a.png")
    build(source, tmp_path / "out", channel=("R", "G", "B"))
    dataset = DatasetFolder(tmp_path / "out")
    assert dataset.cases["shape"][0] == "9x7x1"
    for channel, path in enumerate(dataset.image_paths("a")):
        np.testing.assert_array_equal(voxels(path)[..., 0], pixels[..., channel].T)
    np.testing.assert_array_equal(voxels(dataset.label_path("a"))[..., 0], (mask == 255).T)


def test_header_and_data_in_two_files_are_one_image(tmp_path: Path) -> None:
    save_pair(tmp_path / "s", "a")
    array = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE[::-1])
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.5, 2, 3))
    image.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, 1))
    image.SetOrigin((-40, 30, 5))
    (tmp_path / "s" / "images" / "a.nii.gz").unlink()
    sitk.WriteImage(image, tmp_path / "s" / "images" / "a.mhd")
    assert (tmp_path / "s" / "images" / "a.raw").is_file()
    result = build(tmp_path / "s", tmp_path / "out")
    assert result.failed == []
    np.testing.assert_array_equal(voxels(DatasetFolder(tmp_path / "out").image_paths("a")[0]), array.T)
    # A change of the data file alone is a change of the case.
    (tmp_path / "s" / "images" / "a.raw").write_bytes((array + 1).tobytes())
    assert build(tmp_path / "s", tmp_path / "out").built == ["a"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label": ("a=1", "a=2")}, "each name once"),
        ({"label": ("a=1", "b=1")}, "the value 1 is given twice"),
        ({"label": ("=1",)}, "NAME=VALUE expected"),
        ({"label": ("a=0", "b=1")}, "a given the value 0, which is the background"),
        ({"spacing": (1.0, 0.0, 1.0)}, "positive mm expected"),
    ],
)
def test_options_that_mean_nothing_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FolderOptions(**given)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: [path.unlink() for path in (s / "labels").iterdir()], "no image and label of the same name"),
        (lambda s: [path.rename(s / "labels" / f"x{path.name}") for path in (s / "labels").iterdir()], "same name"),
    ],
)
def test_nothing_to_pair_is_said_so(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    save_pair(tmp_path / "s", "a")
    spoil(tmp_path / "s")
    with pytest.raises(DatasetError, match=message):
        build(tmp_path / "s", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_layouts_in_one_folder_are_not_chosen_from(tmp_path: Path) -> None:
    save_pair(tmp_path / "s", "a")
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / "s" / name).mkdir()
    with pytest.raises(DatasetError, match="two datasets in it; leave either images/ and labels/ or imagesTr/"):
        build(tmp_path / "s", tmp_path / "out")
