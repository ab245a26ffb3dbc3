"""Recipes that a user writes: a YAML file, or a class in a file of its own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from click.testing import CliRunner
from PIL import Image

from data_prep.build import BuildResult, build_dataset
from data_prep.cli import main
from data_prep.recipes import RECIPES, recipe_class
from data_prep.recipes.description import KEYS, read_description
from data_prep.recipes.from_file import class_of
from medseg.data.folder import DatasetFolder
from medseg.errors import ConfigError, DatasetError

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
SHAPE = (8, 7, 6)

LESIONS = """
name: ms_lesions            # what the dataset is called
cases: "{patient}/{visit}"
channels: {FLAIR: flair.nii.gz, T1: t1.nii.gz}
label: {masks: {lesion: lesion.nii.gz}}
"""


def save(path: Path, voxels: Any, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(voxels), affine), path)


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def mask(x: int) -> np.ndarray:
    inside = np.zeros(SHAPE, np.uint8)
    inside[x : x + 2, 2:4, 1:4] = 255
    return inside


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two patients, one of whom was seen twice."""
    root = tmp_path / "source"
    for number, visit in enumerate(("Doe_Jane/first", "Doe_Jane/second", "Roe_Jim/first")):
        rng = np.random.default_rng(number)
        for name in ("flair", "t1"):
            save(root / visit / f"{name}.nii.gz", rng.normal(100, 20, SHAPE).astype(np.float32))
        save(root / visit / "lesion.nii.gz", mask(2))
    return root


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write a file with a recipe."""

    def write(text: str, name: str = "own.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def build(path: Path | str, source: Path, out: Path, **more: Any) -> BuildResult:
    arguments = {"jobs": 1, "keep_identifiers": True, "report": False} | more
    return build_dataset(recipe_class(str(path))(), source, out, **arguments)


# YAML


def test_a_few_lines_make_a_dataset(source: Path, tmp_path: Path, recipe: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    words = ["build", str(recipe(LESIONS)), str(source), str(out), "--jobs", "2", "--keep-identifiers"]
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, done.stderr) == (0, "")
    dataset = DatasetFolder(out)
    assert dataset.manifest["recipe"] == "ms_lesions"
    assert (dataset.channel_names, dataset.labels) == (["FLAIR", "T1"], {"background": 0, "lesion": 1})
    rows = dataset.cases[["case", "patient"]].to_numpy().tolist()
    assert rows == [
        ["Doe_Jane_first", "Doe_Jane"],
        ["Doe_Jane_second", "Doe_Jane"],
        ["Roe_Jim", "Roe_Jim"],
    ]
    for name, path in zip(("flair", "t1"), dataset.image_paths("Doe_Jane_second"), strict=True):
        np.testing.assert_array_equal(voxels(path), voxels(source / f"Doe_Jane/second/{name}.nii.gz"))
    np.testing.assert_array_equal(voxels(dataset.label_path("Roe_Jim")), mask(2) > 0)
    assert (out / "report.html").is_file()


def test_identifiers_of_paths_are_nowhere(source: Path, tmp_path: Path, recipe: Callable[..., Path]) -> None:
    (source / "Roe_Jim/first/lesion.nii.gz").write_bytes(b"no image")
    (source / "Doe_Jane/second/t1.nii.gz").unlink()
    words = ["build", str(recipe(LESIONS)), str(source), str(tmp_path / "out"), "--jobs", "1"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    names = [str(path).encode() for path in (tmp_path / "out").rglob("*")]
    for secret in (b"Doe", b"Roe", b"Jane", b"Jim", b"flair.nii", b"second"):
        assert not any(secret in content for content in [*written, *names, done.output.encode()])
    assert "failed: " in done.stderr
    assert "no file for channels.T1" in done.stderr


def test_a_public_recipe_keeps_its_names(source: Path, tmp_path: Path, recipe: Callable[..., Path]) -> None:
    path = recipe("\ufeff" + LESIONS + "public: true\n")  # as editors of Windows write it
    words = ["build", str(path), str(source), str(tmp_path / "out"), "--jobs", "1", "--no-report"]
    assert CliRunner().invoke(main, words).exit_code == 0
    assert "Roe_Jim" in set(DatasetFolder(tmp_path / "out").cases["case"])
    assert "--pseudonyms" in CliRunner().invoke(main, ["build", str(path), "--help"]).output


def test_what_the_file_says_is_part_of_every_case(source: Path, tmp_path: Path, recipe: Callable[..., Path]) -> None:
    path, out = recipe(LESIONS), tmp_path / "out"
    assert len(build(path, source, out).built) == 3
    recipe("# another comment\n" + LESIONS)
    assert len(build(path, source, out).kept) == 3
    recipe(LESIONS + "spacing: [2, 2, 2]\n")
    assert len(build(path, source, out).built) == 3
    dataset = DatasetFolder(out)
    assert list(dataset.cases["spacing"]) == ["2x2x2"] * 3
    assert len(dataset.manifest["options"]["file_sha256"]) == 64


def test_a_label_map_is_named_by_value_and_its_channel(
    source: Path, tmp_path: Path, recipe: Callable[..., Path]
) -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[1], label[2], label[3] = 4, 9, 7
    for visit in ("Doe_Jane/first", "Doe_Jane/second", "Roe_Jim/first"):
        save(source / visit / "seg.nii.gz", label)
    path = recipe(LESIONS.replace("{masks: {lesion: lesion.nii.gz}}", "{file: seg.nii.gz, names: {b: 9, a: [4, 7]}}"))
    build(path, source, tmp_path / "out")
    dataset = DatasetFolder(tmp_path / "out")
    assert dataset.labels == {"background": 0, "b": 1, "a": 2}
    assert dataset.manifest["labels_remapped"] == {"0": 0, "9": 1, "4": 2, "7": 2}
    written = voxels(dataset.label_path("Roe_Jim"))
    assert [np.unique(written[x]).tolist() for x in range(5)] == [[0], [2], [1], [2], [0]]
    recipe(path.read_text().replace("[4, 7]", "4"))
    with pytest.raises(DatasetError, match=r"the label holds the values \[7\]: expected \[0, 4, 9\]"):
        build(path, source, tmp_path / "other")


def test_masks_are_united_and_the_first_class_wins(source: Path, tmp_path: Path, recipe: Callable[..., Path]) -> None:
    for visit in ("Doe_Jane/first", "Doe_Jane/second", "Roe_Jim/first"):
        save(source / visit / "left.nii.gz", mask(1))
        save(source / visit / "right.nii.gz", mask(5))
    masks = "{lesion: lesion.nii.gz, organ: [left.nii.gz, right.nii.gz]}"
    path = recipe(LESIONS.replace("{lesion: lesion.nii.gz}", masks))
    build(path, source, tmp_path / "out")
    dataset = DatasetFolder(tmp_path / "out")
    expected = np.where(mask(2) > 0, 1, np.where((mask(1) > 0) | (mask(5) > 0), 2, 0))
    np.testing.assert_array_equal(voxels(dataset.label_path("Roe_Jim")), expected)
    overlap = np.count_nonzero((mask(2) > 0) & (mask(1) > 0)) * 2 / 1000
    assert list(dataset.cases["overlap_ml"]) == [pytest.approx(overlap)] * 3


def test_classes_of_folders_and_pictures_in_color(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    root, pixels = tmp_path / "source", np.random.default_rng(0).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    for name in ("no/Y1.png", "no/Y2.png", "yes/Y3.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name)
    text = "name: tumors\nchannels: {'R, G, B': '{class}/{patient}.png'}\nclasses: [no, yes]\n"
    path = recipe(text)  # YAML 1.1 would read false and true
    build(path, root, tmp_path / "out")
    dataset = DatasetFolder(tmp_path / "out")
    assert dataset.classes == {"no": 0, "yes": 1}
    assert dataset.cases.set_index("case")["class"].to_dict() == {"Y1": "no", "Y2": "no", "Y3": "yes"}
    for color, image in enumerate(dataset.image_paths("Y3")):
        np.testing.assert_array_equal(voxels(image)[..., 0], pixels[..., color].T)
    # A picture that moved to the other folder is another case, although its content is the same.
    (root / "no/Y2.png").rename(root / "yes/Y2.png")
    assert build(path, root, tmp_path / "out").built == ["Y2"]
    assert DatasetFolder(tmp_path / "out").cases.set_index("case")["class"]["Y2"] == "yes"
    gray = tmp_path / "gray"
    (gray / "no").mkdir(parents=True)
    Image.fromarray(pixels[..., 0]).save(gray / "no/Y1.png")
    with pytest.raises(DatasetError, match=r"1 channel\(s\) in the file of channels.R, G, B: 3 expected"):
        build(path, gray, tmp_path / "none")


def test_classes_of_a_table(source: Path, tmp_path: Path, recipe: Callable[..., Path]) -> None:
    classes = "{file: table.csv, column: grade, by: {patient: ID, visit: when}, names: {low: [1, 2], high: 3}}"
    label = "label: {masks: {lesion: lesion.nii.gz}}"
    path = recipe(LESIONS.replace(label, f"classes: {classes}"))
    table = source / "table.csv"
    table.write_text("ID,when,grade\nDoe_Jane,first,1\nDoe_Jane,second,3\nRoe_Jim,first,2\nNobody,first,1\n")
    build(path, source, tmp_path / "out")
    assert list(DatasetFolder(tmp_path / "out").cases["class"]) == ["low", "high", "low"]
    # Just the case whose class was corrected is made anew.
    table.write_text(table.read_text().replace("Roe_Jim,first,2", "Roe_Jim,first,3"))
    assert build(path, source, tmp_path / "out").built == ["Roe_Jim"]
    table.write_text("ID,when,grade\nDoe_Jane,first,1\nDoe_Jane,first,3\nDoe_Jane,second,7\n")
    with pytest.raises(DatasetError) as caught:
        build(path, source, tmp_path / "none")
    assert "2 classes in classes.file: one expected" in str(caught.value)
    table.write_text("ID,when,grade\nDoe_Jane,first,1\nDoe_Jane,second,7\n")
    result = build(path, source, tmp_path / "some")
    assert [problem.what for problem in result.failed] == ["a class that classes.names does not know: 1, 2, 3 expected"]
    assert [problem.what for problem in result.unpaired] == ["no row in classes.file"]
    table.write_text("id,when,grade\n")
    with pytest.raises(ConfigError, match=r"classes.file: no column 'ID' in it; there are id, when, grade"):
        build(path, source, tmp_path / "bad")


def test_a_dicom_series_may_be_a_channel(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    from data_prep.phantom import write_cohort
    from medseg.io import read_image

    write_cohort(tmp_path / "dicom", patients=1, seed=1, image_size=32, slices=8)
    folder = tmp_path / "dicom" / "PHANTOM-001" / "CT"
    image = read_image(folder)
    source = tmp_path / "source"
    (source / "P1").mkdir(parents=True)
    (source / "P1" / "CT").symlink_to(folder)
    save(source / "P1" / "mask.nii.gz", np.ones(image.shape[1:], np.uint8), np.asarray(image.affine))
    path = recipe("name: ct\nchannels: {CT: '{patient}/CT/'}\nlabel: {masks: {body: '{patient}/mask.nii.gz'}}\n")
    build(path, source, tmp_path / "out")
    dataset = DatasetFolder(tmp_path / "out")
    np.testing.assert_array_equal(voxels(dataset.image_paths("P1")[0]), np.asarray(image[0]))
    assert len(dataset.manifest["cases"]["P1"]["sources"]) == len(list(folder.iterdir())) + 1


def test_a_name_that_can_be_read_in_two_ways_is_not_guessed(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    for name in ("P1_a", "P_2_b"):
        for kind in ("ct", "mask"):
            save(tmp_path / "source" / f"{name}_{kind}.nii", mask(1))
    text = "name: x\nchannels: {CT: '{patient}_{visit}_ct.nii'}\nlabel: {masks: {a: '{patient}_{visit}_mask.nii'}}\n"
    result = build(recipe(text), tmp_path / "source", tmp_path / "out")
    assert result.built == ["P1"]
    assert [problem.case for problem in result.unpaired] == ["P_2_b_ct.nii", "P_2_b_mask.nii"]
    assert "fits channels.CT in several ways" in result.unpaired[0].what


def test_two_files_for_one_channel_are_not_chosen_from(
    source: Path, tmp_path: Path, recipe: Callable[..., Path]
) -> None:
    save(source / "Roe_Jim/first/flair_b.nii.gz", mask(1))
    result = build(recipe(LESIONS.replace("flair.nii.gz", '"flair*.nii.gz"')), source, tmp_path / "out")
    assert [problem.what for problem in result.failed] == ["2 files for channels.FLAIR: expected one"]


def test_the_data_of_a_header_are_sources_too(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5, 6), np.float32)), source / "P1.mhd")
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5, 6), np.uint8)), source / "P1_mask.mha")
    path = recipe("name: x\nchannels: {MR: '{patient}.mhd'}\nlabel: {masks: {a: '{patient}_mask.mha'}}\n")
    assert build(path, source, tmp_path / "out").built == ["P1"]
    (source / "P1.raw").write_bytes(np.full((4, 5, 6), 2, np.float32).tobytes())
    assert build(path, source, tmp_path / "out").built == ["P1"]


def test_other_grids_are_refused_unless_they_are_registered(
    source: Path, tmp_path: Path, recipe: Callable[..., Path]
) -> None:
    affine = AFFINE.copy()
    affine[:3, 3] = 0, 0, 2  # one slice up
    for visit in ("Doe_Jane/first", "Doe_Jane/second", "Roe_Jim/first"):
        save(source / visit / "t1.nii.gz", voxels(source / visit / "t1.nii.gz"), affine)
    with pytest.raises(DatasetError, match=r"T1 lies up to 2 mm away from FLAIR.*by the key register of own.yaml"):
        build(recipe(LESIONS), source, tmp_path / "none")
    build(recipe(LESIONS + "register: {to: FLAIR, T1: header}\n"), source, tmp_path / "out")
    moved = voxels(DatasetFolder(tmp_path / "out").image_paths("Roe_Jim")[1])
    original = voxels(source / "Roe_Jim/first/t1.nii.gz")
    np.testing.assert_allclose(moved[:, :, 1:], original[:, :, :-1], atol=1e-4)
    assert not moved[:, :, 0].any()


@pytest.fixture(scope="module")
def real_patient(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real patient's channels on three grids; the lesions, published in a common space, brought to FLAIR and T1."""
    folder = tmp_path_factory.mktemp("real") / "P1"
    folder.mkdir()
    real = data / "mr_registration"
    for name in ("FLAIR", "T1W", "T2W"):
        (folder / f"{name}.nii.gz").symlink_to(real / f"study1_{name}.nii.gz")
    lesions = sitk.ReadImage(str(real / "gt.nii.gz"))
    to_common = sitk.ReadTransform(str(real / "study1_FLAIR_to_common_space.txt")).GetInverse()
    to_flair = sitk.ReadTransform(str(real / "study1_T1W_intrastudy_to_FLAIR.txt")).GetInverse()
    both = sitk.CompositeTransform([to_common, to_flair])
    for name, transform in (("FLAIR", to_common), ("T1W", both)):
        grid = sitk.ReadImage(str(folder / f"{name}.nii.gz"))
        mask = sitk.Resample(lesions, grid, transform, sitk.sitkNearestNeighbor, 0, sitk.sitkUInt8)
        sitk.WriteImage(mask, str(folder / f"lesions_{name}.nii.gz"))
    return folder.parent


@pytest.mark.realdata
def test_channels_are_registered_and_the_label_goes_along(
    real_patient: Path, tmp_path: Path, recipe: Callable[..., Path]
) -> None:
    text = """
name: ms
cases: "{patient}"
channels: {FLAIR: FLAIR.nii.gz, T1: T1W.nii.gz}
label: {masks: {lesion: lesions_T1W.nii.gz}, on: T1}
register: {to: FLAIR, T1: rigid}
"""
    result = build(recipe(text), real_patient, tmp_path / "out")
    assert result.failed == []
    dataset = DatasetFolder(tmp_path / "out")
    flair, t1 = (nib.load(path) for path in dataset.image_paths("P1"))
    assert t1.shape == flair.shape == nib.load(real_patient / "P1/FLAIR.nii.gz").shape
    row = dataset.cases.iloc[0]
    assert row["T1_kind"] == "rigid"
    assert row["T1_mutual_information_after"] > row["T1_mutual_information_before"]
    attached = dataset.root / "attachments" / "P1_T1_to_FLAIR.tfm"
    transform = sitk.ReadTransform(str(attached))
    assert transform.GetDimension() == 3
    # The lesions that were drawn on T1 lie where those drawn on FLAIR do.
    moved = voxels(dataset.label_path("P1")) > 0
    expected = voxels(real_patient / "P1/lesions_FLAIR.nii.gz") > 0
    assert 2 * (moved & expected).sum() / (moved.sum() + expected.sum()) > 0.75


def test_transforms_run_on_the_case_before_it_is_written(
    source: Path, tmp_path: Path, recipe: Callable[..., Path]
) -> None:
    transforms = """
transforms:
- {_target_: monai.transforms.NormalizeIntensityd, keys: FLAIR}
- {_target_: monai.transforms.SpatialCropd, keys: [FLAIR, T1, label], roi_start: [1, 1, 0], roi_end: [7, 6, 5]}
"""
    build(recipe(LESIONS + transforms), source, tmp_path / "out")
    dataset = DatasetFolder(tmp_path / "out")
    flair, t1 = (nib.load(path) for path in dataset.image_paths("Roe_Jim"))
    original = voxels(source / "Roe_Jim/first/flair.nii.gz")
    expected = ((original - original.mean()) / original.std())[1:7, 1:6, :5]
    np.testing.assert_allclose(np.asarray(flair.dataobj), expected, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(t1.dataobj), voxels(source / "Roe_Jim/first/t1.nii.gz")[1:7, 1:6, :5])
    np.testing.assert_allclose(t1.affine @ [0, 0, 0, 1], AFFINE @ [1, 1, 0, 1])
    np.testing.assert_array_equal(voxels(dataset.label_path("Roe_Jim")), (mask(2) > 0)[1:7, 1:6, :5])


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ("{_target_: monai.transforms.NormaliseIntensityd, keys: T1}", "cannot be made"),
        ("{_target_: monai.transforms.SpatialCropd, keys: T1, roi_strat: 1}", "roi_strat"),
        ("{_target_: monai.transforms.RandFlipd, keys: T1}", "is random: a dataset must be the same each time"),
        ("{_target_: torch.nn.ReLU, keys: T1}", "own.yaml: transforms.0: torch.nn.ReLU"),
        ("{_target_: monai.transforms.SpatialCropd, keys: T1, roi_start: 0, roi_end: 3}", "T1 after the transforms"),
        ("{_target_: monai.transforms.ScaleIntensityd, keys: label, maxv: 0.5}", "values between whole numbers"),
    ],
)
def test_transforms_that_cannot_be_are_one_line(
    source: Path, tmp_path: Path, recipe: Callable[..., Path], transform: str, message: str
) -> None:
    path = recipe(LESIONS + f"transforms:\n- {transform}\n")
    done = CliRunner().invoke(main, ["build", str(path), str(source), str(tmp_path / "out"), "--jobs", "1"])
    assert done.exit_code == 1, done.output
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


LABEL = "label: {masks: {a: '{patient}_m.nii'}}"
MASKS = "masks: {a: '{patient}_m.nii'}"
GOOD = f"name: x\nchannels: {{A: '{{patient}}.nii'}}\n{LABEL}\n"
FILE = GOOD.replace(MASKS, "file: '{patient}_m.nii'")
CLASSES = GOOD.replace(LABEL, "classes: [a, b]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file: found nothing, expected keys and values"),
        ("name: [", "line 1: no YAML"),
        ("? [a]\n: 1", "line 1: no YAML: a word expected as key"),
        ("name: !!int x", "no YAML: invalid literal for int()"),
        ("[" * 3000, "no YAML: maximum recursion depth"),
        ("name: \0", "no YAML: unacceptable character #x0000"),
        (GOOD + "name: y", "line 4: no YAML: the key 'name' comes twice"),
        (GOOD + "chanels: {}", "chanels: unknown key, expected name, "),
        (GOOD + "chanels: {}", "(nearest: channels)"),
        (GOOD.replace("name: x\n", ""), "name: missing, expected a word"),
        (GOOD.replace("name: x", "name: 7"), "name: found 7, expected a text; put it in quotes"),
        (GOOD.replace("name: x", "name: 'a b'"), "name: 'a b' found; letters, digits, - and _ expected"),
        (GOOD.replace("name: x", "name: folder"), "'folder' is the name of a recipe of medseg"),
        (GOOD + "public: yes", "public: found 'yes', expected true or false"),
        (GOOD.replace("{A: '{patient}.nii'}", "[A]"), "channels: found ['A'], expected a file per channel"),
        (GOOD.replace("t}.nii", "T}.nii"), "channels.A: {patienT} is no field; a word in small letters"),
        (GOOD.replace("t}.nii", "t.nii"), "channels.A: { is no field"),
        (GOOD.replace("{patient}.nii", "/{patient}.nii"), "channels.A: found '/{patient}.nii', expected a path below"),
        (GOOD.replace("{patient}.nii", "../{patient}.nii"), "expected a path below SOURCE"),
        (GOOD.replace("{patient}", "{case}"), "channels.A: found {case}, expected {patient} in the path of every"),
        (GOOD.replace("_m", "_{n}"), "label.masks.a: found {patient} and {n}, expected the fields of channels.A"),
        (GOOD.replace("{A:", "{'A, A':"), "channels: found A twice, expected each channel once"),
        (GOOD.replace("{A:", "{label:"), "channels: found 'label', expected names of"),
        (GOOD + "classes: [a, b]", "label: found label and classes, expected either label or classes"),
        (GOOD.replace(LABEL, ""), "label: found nothing, expected either label or classes"),
        (GOOD.replace("masks", "mask"), "label.mask: unknown key, expected file, names, masks, on (nearest: masks)"),
        (FILE, "label: found the keys file, expected file and names, or masks"),
        (
            FILE.replace("_m.nii'}", "_m.nii', names: {a: 1, b: 1}}"),
            "label.names: found {'a': 1, 'b': 1}, expected each",
        ),
        (FILE.replace("_m.nii'}", "_m.nii', names: {a: one}}"), "label.names.a: found 'one', expected a value of the"),
        (GOOD.replace("masks: {a", "on: B, masks: {a"), "label.on: found 'B', expected one of A"),
        (GOOD + "register: {T1: rigid}", "register.T1: unknown key, expected to, A"),
        (GOOD + "register: {A: rigid}", "register.to: missing"),
        (GOOD + "register: {to: A, A: rigid}", "register: found {'to': 'A', 'A': 'rigid'}"),
        (
            GOOD.replace("{A:", "{B: '{patient}b.nii', A:") + "register: {to: A, B: rigit}",
            "register.B: found 'rigit', expected one of rigid, affine, bspline, header (nearest: rigid)",
        ),
        (GOOD + "spacing: [1, 1]", "spacing: found [1, 1], expected three positive numbers in mm"),
        (GOOD + "spacing: [1, 1, 0]", "expected three positive numbers in mm"),
        (GOOD + "transforms: {}", "transforms: found {}, expected a list of MONAI's dictionary transforms"),
        (GOOD + "transforms: [{keys: A}]", "transforms.0._target_: missing"),
        (GOOD + "transforms: [{_target_: x, keys: T1}]", "transforms.0.keys: found 'T1', expected one of A, label"),
        (CLASSES, "classes: found neither of both, expected either classes.file or {class} in paths"),
        (CLASSES.replace("[a, b]", "[a]"), "expected two classes or more"),
        (
            CLASSES.replace("[a, b]", "{file: x.csv, names: [a, b]}"),
            "classes: found the keys file, names, expected file",
        ),
        (GOOD.replace("{patient}", "{class}/{patient}"), "label: found {class} in the paths, expected classes"),
    ],
)
def test_every_mistake_is_one_line_that_names_the_key(
    tmp_path: Path, recipe: Callable[..., Path], text: str, message: str
) -> None:
    path = recipe(text)
    done = CliRunner().invoke(main, ["build", str(path), str(tmp_path), str(tmp_path / "out")])
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith("error: own.yaml: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_file_that_is_not_there_and_a_name_that_is_none(tmp_path: Path) -> None:
    run = CliRunner()
    done = run.invoke(main, ["build", str(tmp_path / "absent.yaml"), "a", "b"])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "absent.yaml: no such recipe file" in done.stderr
    done = run.invoke(main, ["build", "pet_ct", "a", "b"])
    assert done.exit_code == 2
    assert "(nearest: petct)" in done.stderr


def test_every_key_is_described() -> None:
    keys = "name summary public cases channels label classes register spacing transforms"
    assert list(KEYS) == keys.split()
    described = read_description("x.yaml", GOOD)
    assert (described.name, described.public, described.register_to) == ("x", False, "")


# A class

OWN = '''
"""My recipe."""
from dataclasses import dataclass

from data_prep.recipes.base import Case, Plan, Recipe, Sample, Selection, option
from medseg.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """Of my own: it goes to the workers in Case.detail."""
    name: str


@dataclass(frozen=True)
class Options:
    factor: float = option("--factor", 1.0, "What to multiply by.", type=float)

    def __post_init__(self):
        if self.factor <= 0:
            raise ConfigError(f"--factor: {self.factor:g} given, a positive number expected")


class Brightened(Recipe):
    """Images and masks of a folder, multiplied."""

    name = "brightened"
    needs = "pairs X.nii.gz and X_mask.nii.gz"
    Options = Options

    def select(self, source):
        cases = []
        for path in sorted(source.glob("*_mask.nii.gz")):
            name = path.name.removesuffix("_mask.nii.gz")
            image = source / f"{name}.nii.gz"
            cases.append(Case(name, name, {"image": (image,), "mask": (path,)}, detail=Part(name)))
        return Selection(cases)

    def plan(self, surveys):
        return Plan(("MRI",), {"background": 0, "lesion": 1})

    def make(self, case, plan):
        from medseg.io import read_image, read_label

        assert isinstance(case.detail, Part)
        image = read_image(case.sources["image"][0]) * self.options.factor
        return Sample(image, read_label(case.sources["mask"][0], image), {"who": case.detail.name})
'''


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for number in range(3):
        save(tmp_path / "pairs" / f"a{number}.nii.gz", np.full(SHAPE, number + 1, np.float32))
        save(tmp_path / "pairs" / f"a{number}_mask.nii.gz", np.ones(SHAPE, np.uint8))
    return tmp_path / "pairs"


def test_a_class_in_a_file_is_a_recipe_with_options_and_workers(
    pairs: Path, tmp_path: Path, recipe: Callable[..., Path]
) -> None:
    path = f"{recipe(OWN, 'own.py')}:Brightened"
    words = [path, str(pairs), str(tmp_path / "out"), "--factor", "3", "--jobs", "2", "--keep-identifiers"]
    done = CliRunner().invoke(main, ["build", *words, "--no-report"])
    assert (done.exit_code, done.stderr) == (0, "")
    dataset = DatasetFolder(tmp_path / "out")
    assert [voxels(dataset.image_paths(case)[0])[0, 0, 0] for case in dataset.cases["case"]] == [3, 6, 9]
    assert list(dataset.cases["who"]) == ["a0", "a1", "a2"]
    assert dataset.manifest["recipe"] == "brightened"
    assert dataset.manifest["options"]["factor"] == 3


def test_help_shows_its_options_and_a_change_makes_it_anew(
    pairs: Path, tmp_path: Path, recipe: Callable[..., Path]
) -> None:
    path = recipe(OWN, "own.py")
    shown = CliRunner().invoke(main, ["build", str(path), "--help"]).output
    assert "Images and masks of a folder, multiplied." in shown
    assert "--factor" in shown
    assert len(build(path, pairs, tmp_path / "out").built) == 3
    assert len(build(path, pairs, tmp_path / "out").kept) == 3
    recipe(OWN.replace("* self.options", "+ self.options"), "own.py")
    assert len(build(path, pairs, tmp_path / "out").built) == 3
    assert voxels(DatasetFolder(tmp_path / "out").image_paths("a0")[0])[0, 0, 0] == 2


def test_it_travels_to_a_process_that_never_saw_the_file(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    import pickle

    path = recipe(OWN, "own.py")
    made = recipe_class(str(path))
    sent = pickle.dumps(made(made.Options(factor=2)))
    path.unlink()
    code = (
        "import pickle, sys\nrecipe = pickle.loads(sys.stdin.buffer.read())\n"
        "print(recipe.name, recipe.options.factor, recipe.describe()['file_sha256'])"
    )
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    assert done.stdout.decode().split() == ["brightened", "2", made.file_sha256]


TWO = OWN + "\n\nclass Other(Brightened):\n    name = 'other'\n"
BARE = OWN.replace('option("--factor", 1.0, "What to multiply by.", type=float)', "1.0")


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ("x = (", "", "line 1: SyntaxError"),
        ("\nimport nowhere_to_be_found", "", "line 2: ModuleNotFoundError: No module named"),
        ("x = 1", "", "0 recipe classes in it (none): expected one"),
        (TWO, "", "2 recipe classes in it (Brightened, Other)"),
        (OWN, ":Bright", "no recipe class 'Bright' in it; its recipes: Brightened"),
        (OWN.replace('    name = "brightened"', ""), "", "name: None found"),
        (OWN.replace('name = "brightened"', 'name = "../x"'), "", "name: '../x' found"),
        (OWN.replace("def plan", "def plans"), "", "Brightened has no plan"),
        (OWN.replace("    Options = Options", "    Options = dict"), "", "Brightened.Options: a dataclass expected"),
        (BARE, "", "each field made by option"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(
    tmp_path: Path, recipe: Callable[..., Path], text: str, suffix: str, message: str
) -> None:
    path = recipe(text, "own.py")
    done = CliRunner().invoke(main, ["build", f"{path}{suffix}", "a", "b"])
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith("error: own.py: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.long
def test_recipes_of_files_travel_over_a_cluster(
    source: Path, pairs: Path, tmp_path: Path, recipe: Callable[..., Path]
) -> None:
    for path, of in ((recipe(LESIONS), source), (recipe(OWN, "own.py"), pairs)):
        out = tmp_path / f"out_of_{path.suffix.strip('.')}"
        words = ["build", str(path), str(of), str(out), "--ray", "local", "--no-report"]
        done = subprocess.run([sys.executable, "-m", "data_prep", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"{out.name}: 3 built" in done.stdout


def test_options_of_a_class_are_checked(pairs: Path, tmp_path: Path, recipe: Callable[..., Path]) -> None:
    path = recipe(OWN, "own.py")
    done = CliRunner().invoke(main, ["build", str(path), str(pairs), str(tmp_path / "out"), "--factor", "0"])
    assert (done.exit_code, done.stderr) == (1, "error: --factor: 0 given, a positive number expected\n")


def test_classes_of_equal_files_are_one(recipe: Callable[..., Path]) -> None:
    path = recipe(OWN, "own.py")
    assert recipe_class(str(path)) is recipe_class(str(path))
    assert class_of.cache_info().hits


def test_no_recipe_of_medseg_looks_like_a_file() -> None:
    from data_prep.recipes.from_file import names_a_file

    assert not any(map(names_a_file, RECIPES))


# The examples of the documentation

HOW_TO = Path(__file__).parents[2] / "docs" / "how_to"


def test_the_example_in_yaml(tmp_path: Path) -> None:
    x, y, z = np.mgrid[-1:1:24j, -1:1:24j, -1:1:24j]
    body = ((x**2 + 2 * y**2 + z**2 < 0.6) + (np.hypot(x - 0.3, z) < 0.2)).astype(np.float32)
    affine, table = np.diag([4.0, 4, 4, 1]), np.diag([4.0, 4, 4, 1])
    table[0, 3] = 6  # the same body, 6 mm further to the right
    for visit, scan in (("Doe/2019", "3d"), ("Doe/2021", "3d"), ("Roe/2020", "se")):
        folder = tmp_path / "archive" / visit
        save(folder / "flair.nii.gz", body, affine)
        save(folder / f"t1_{scan}.nii.gz", 2 - body, table)
        save(folder / "lesion.nii.gz", (body > 1).astype(np.uint8), affine)
    words = ["build", str(HOW_TO / "recipes/ms_lesions.yaml"), str(tmp_path / "archive"), str(tmp_path / "dataset")]
    done = CliRunner().invoke(main, [*words, "--jobs", "1", "--no-report"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.endswith("dataset: 3 built\n")
    dataset = DatasetFolder(tmp_path / "dataset")
    assert sorted(dataset.cases["patient"].value_counts()) == [1, 2]
    assert list(dataset.cases["T1_kind"]) == ["rigid"] * 3
    assert list(dataset.cases["T1_translation_mm"]) == [pytest.approx(6, abs=0.5)] * 3
    assert len(list((dataset.root / "attachments").glob("*_T1_to_FLAIR.tfm"))) == 3


def test_the_example_in_python(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name, brightest in (("A_1", 100), ("A_2", 160), ("B_1", 140)):
        Image.fromarray(np.full((4, 5), brightest, np.uint8)).save(tmp_path / "pictures" / f"{name}.png")
    words = ["build", str(HOW_TO / "recipes/brightest.py"), str(tmp_path / "pictures"), str(tmp_path / "dataset")]
    done = CliRunner().invoke(main, [*words, "--above", "150", "--jobs", "1", "--no-report"])
    assert (done.exit_code, done.stderr) == (0, "note: 1 of 3 pictures are bright\n")
    assert sorted(DatasetFolder(tmp_path / "dataset").cases["class"]) == ["bright", "dark", "dark"]


def test_what_the_page_shows_is_right() -> None:
    page = (HOW_TO / "write_a_recipe.md").read_text()
    shown = [block.split("```")[0] for block in page.split("```yaml\n")[1:]]
    whole = [block for block in shown if block.startswith("name:")]
    assert [read_description("page.yaml", block).name for block in whole] == ["tumors", "nodules"]
    lesions = (HOW_TO / "recipes/ms_lesions.yaml").read_text()
    described = read_description("page.yaml", lesions + "".join(set(shown) - set(whole)))
    assert [transform["_target_"].rpartition(".")[2] for transform in described.transforms] == [
        "N4BiasFieldCorrectiond",
        "CropForegroundd",
    ]
    with pytest.raises(ConfigError) as caught:
        read_description("ms_lesions.yaml", lesions.replace("T1: rigid", "T1: rigit"))
    assert f"error: {caught.value}\n" in page
    for key in KEYS:
        assert f"\n| `{key}` | " in page
