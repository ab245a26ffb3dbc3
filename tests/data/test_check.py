"""Every problem that check_dataset looks for is planted and found; a sound dataset has none."""

import copy
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom

from medseg.data import Problem, check_dataset, make_splits, write_slices
from medseg.data.check_parts import check_balance, members, read_splits
from medseg.data.folder import DatasetFolder, write_case, write_index
from medseg.errors import DatasetError

SPLITS = {
    "seed": 0,
    "stratify": None,
    "folds": [{"train": ["c00", "c01", "c02"], "val": ["c03"]}],
    "test": ["c04", "c05"],
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory, write_dataset):
    root = tmp_path_factory.mktemp("sound") / "dataset"
    root.mkdir()
    write_dataset(root).write_split(SPLITS)
    write_slices(root)
    return root


@pytest.fixture
def root(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "dataset"))


def problems(root: Path) -> list[Problem]:
    return check_dataset(root, workers=1)


def change(path: Path, voxels=None, affine=None) -> None:
    """Write a NIfTI again with other voxels (an array or a function of them) or another affine."""
    image = nib.load(path)
    old = np.asarray(image.dataobj).copy()
    new = old if voxels is None else voxels(old)
    nib.save(nib.Nifti1Image(new, image.affine if affine is None else affine(image.affine.copy())), path)


def set_voxel(value):
    def put(voxels):
        voxels[0, 0, 0] = value
        return voxels

    return put


def shifted(affine):
    affine[0, 3] += 1.5
    return affine


def test_a_sound_dataset_has_no_problem(sound):
    seen = []
    assert check_dataset(sound, progress=lambda done, total: seen.append((done, total)), workers=2) == []
    assert seen == [(n, 6) for n in range(1, 7)]


def test_a_dataset_without_split_and_slices_has_no_problem(tmp_path, write_dataset):
    write_dataset(tmp_path)
    assert problems(tmp_path) == []


def test_a_dataset_in_folds_has_no_problem(tmp_path, write_dataset):
    folder = write_dataset(tmp_path)
    folder.write_split(make_splits(folder.cases, seed=0, folds=2, test_fraction=0.3))
    write_slices(tmp_path, fold=1)
    assert problems(tmp_path) == []


LABEL, CT, PET = "labelsTr/c01.nii.gz", "imagesTr/c01_0000.nii.gz", "imagesTr/c01_0001.nii.gz"

PLANTED = {
    "label of another shape": (
        lambda root: change(root / LABEL, voxels=lambda v: v[:-1]),
        ["label: shape 11x10x5, 12x10x5 expected as of channel CT", "label: its voxels changed since the build"],
    ),
    "label moved": (
        lambda root: change(root / LABEL, affine=shifted),
        ["label: its grid (affine) is up to 1.5 mm away from that of channel CT"],
    ),
    "channel of another shape": (
        lambda root: change(root / PET, voxels=lambda v: v[..., :-1]),
        ["channel PET: shape 12x10x4, 12x10x5 expected"],
    ),
    "channel moved": (
        lambda root: change(root / PET, affine=shifted),
        ["channel PET: its grid (affine) is up to 1.5 mm"],
    ),
    "NaN": (
        lambda root: change(root / CT, voxels=set_voxel(np.nan)),
        ["channel CT: 1 voxels are NaN or infinite", "image: its voxels changed"],
    ),
    "infinite": (
        lambda root: change(root / PET, voxels=set_voxel(-np.inf)),
        ["channel PET: 1 voxels are NaN or infinite", "image: its voxels changed"],
    ),
    "constant": (
        lambda root: change(root / PET, voxels=lambda v: np.full_like(v, 3)),
        ["channel PET: every voxel is 3", "image: its voxels changed"],
    ),
    "label value": (
        lambda root: change(root / LABEL, voxels=set_voxel(7)),
        ["label: its voxels changed", "label: value(s) 7 found, 0, 1, 2 expected"],
    ),
    "label between values": (
        lambda root: change(root / LABEL, voxels=lambda v: v.astype(np.float32) / 2),
        ["label: value(s) 0.5 found, 0, 1, 2 expected"],
    ),
    "empty label": (
        lambda root: change(root / LABEL, voxels=np.zeros_like),
        ["label: its voxels changed", "label: no foreground"],
    ),
    "one voxel changed": (
        lambda root: change(root / CT, voxels=set_voxel(2000)),
        ["image: its voxels changed since the build (hash in cases.csv)"],
    ),
    "spacing": (
        lambda root: [change(root / p, affine=lambda a: a * [[1], [1], [2], [1]]) for p in (CT, PET, LABEL)],
        ["spacing: 2x1.5x6 in the image, 2x1.5x3 in cases.csv"],
    ),
    "image missing": (lambda root: (root / PET).unlink(), ["imagesTr/c01_0001.nii.gz is missing"]),
    "label missing": (lambda root: (root / LABEL).unlink(), ["labelsTr/c01.nii.gz is missing"]),
    "cut short": (
        lambda root: (root / CT).write_bytes((root / CT).read_bytes()[:300]),
        ["imagesTr/c01_0000.nii.gz: cut short"],
    ),
    "no NIfTI": (lambda root: (root / CT).write_text("hello"), ["imagesTr/c01_0000.nii.gz: "]),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_problem_of_a_case_is_found_and_nothing_else(root, name):
    plant, expected = PLANTED[name]
    plant(root)
    found = problems(root)
    assert [problem.case for problem in found] == ["c01"] * len(expected)
    for problem, what in zip(found, sorted(expected), strict=True):
        assert problem.what.startswith(what)
        assert problem.advice
        assert "\n" not in str(problem)
        assert str(root) not in str(problem)


def test_a_channel_that_is_a_copy_of_another_is_told(root):
    shutil.copy(root / CT, root / PET)
    (found,) = [problem for problem in problems(root) if problem.topic == "duplicate"]
    assert (found.case, found.severity) == ("c01", "warning")
    assert found.what == "channel PET: the same voxels as channel CT"


def test_shape_other_than_in_the_table(root):
    table = (root / "cases.csv").read_text()
    (root / "cases.csv").write_text(table.replace("12x10x5", "12x10x6", 1))
    found, warning = problems(root)
    assert str(found) == "c00: shape: 12x10x5 in the image, 12x10x6 in cases.csv; build the dataset again"
    assert (found.severity, found.topic) == ("error", "grid")
    assert warning.severity == "warning"
    assert warning.what == "shape: 12x10x6, 12x10x5 in the median case"


def test_files_of_no_case(root):
    shutil.copy(root / CT, root / "imagesTr/c99_0000.nii.gz")
    (root / "labelsTr/notes.txt").write_text("hello")
    (root / "imagesTr/.tmp-1234.nii.gz").write_text("")
    assert [(p.case, p.what) for p in problems(root)] == [
        ("imagesTr/.tmp-1234.nii.gz", "the rest of an interrupted run"),
        ("imagesTr/c99_0000.nii.gz", "belongs to no case of cases.csv"),
        ("labelsTr/notes.txt", "belongs to no case of cases.csv"),
    ]


def duplicate(tmp_path, write_dataset, patients, twins, channels=(0, 1)) -> list[Problem]:
    """Problems of a dataset in which the second twin has the channels of the first."""
    folder = write_dataset(tmp_path, patients=patients)
    folder.write_split({**SPLITS, "test": [f"c{n:02d}" for n in range(4, len(patients))]})
    one, other = (folder.image_paths(twin) for twin in twins)
    for channel in channels:
        shutil.copy(one[channel], other[channel])
    return [p for p in problems(tmp_path) if "same voxels" in p.what]


def test_duplicates_across_patients_and_parts(tmp_path, write_dataset):
    (problem,) = duplicate(tmp_path, write_dataset, ["P0", "P1", "P2", "P3", "P4", "P5"], ("c01", "c04"))
    assert (problem.case, problem.severity) == ("c04", "error")
    assert problem.what == (
        "image: the same voxels as case c01 of another patient (P4 here, P1 there), "
        "and the two stand in different parts (test, train)"
    )


def test_duplicates_of_one_patient(tmp_path, write_dataset):
    (problem,) = duplicate(tmp_path, write_dataset, ["P0", "P1", "P1", "P3", "P4", "P5"], ("c01", "c02"))
    assert (problem.case, problem.what) == ("c02", "image: the same voxels as case c01 of the same patient P1")
    assert problem.severity == "warning"


def test_duplicates_of_one_channel(tmp_path, write_dataset):
    (problem,) = duplicate(tmp_path, write_dataset, ["P0", "P1", "P2", "P3", "P4", "P5"], ("c00", "c01"), channels=(1,))
    assert problem.what == "channel PET: the same voxels as case c00 of another patient (P1 here, P0 there)"


def rewrite(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_patients_in_two_parts(root):
    splits = copy.deepcopy(SPLITS)
    splits["test"] += ["c00", "c03"]
    (root / "splits.json").write_text(json.dumps(splits))
    whats = [p.what for p in problems(root) if p.case == "splits.json"]
    assert len(whats) == 2
    assert whats[0].startswith("patient P0 is in train (case c00) and in test (case c00) of fold 0")
    assert whats[1].startswith("patient P3 is in val (case c03) and in test (case c03) of fold 0")


def test_cases_in_no_part_and_no_split_at_all(root):
    rewrite(root / "splits.json", lambda splits: splits["test"].remove("c05"))
    assert [(p.case, p.what) for p in problems(root)] == [("splits.json", "case c05 is in no part of fold 0")]
    for text in ("{", "[]", '{"folds": 3}', '{"folds": [3], "test": []}'):
        (root / "splits.json").write_text(text)
        (problem,) = problems(root)
        assert problem.case == "splits.json"


def test_nnunet_would_see_a_test_case(root):
    def add(info):
        info["dataset"]["c04"] = info["dataset"]["c00"]

    rewrite(root / "dataset.json", add)
    assert [(p.case, p.what) for p in problems(root)] == [
        ("dataset.json", "nnU-Net would train on test case c04 (keys dataset and numTraining)")
    ]


def test_lists_that_do_not_follow_the_split(root):
    rewrite(root / "dataset.json", lambda info: info["training"].append(info["test"][0]))
    rewrite(root / "splits_final.json", lambda folds: folds[0]["train"].remove("c00"))
    assert [(p.case, p.what) for p in problems(root)] == [
        ("dataset.json", "its lists training, validation and test are not those of splits.json"),
        ("splits_final.json", "its folds are not those of splits.json"),
    ]
    (root / "splits_final.json").unlink()
    assert problems(root)[1].what == "cannot be read (FileNotFoundError)"


def test_slices_older_than_the_split(root):
    old = (root / "slices.h5").read_bytes()
    DatasetFolder(root).write_split({**SPLITS, "folds": [{"train": ["c00", "c01", "c03"], "val": ["c02"]}]})
    assert problems(root) == []
    (root / "slices.h5").write_bytes(old)
    (problem,) = problems(root)
    assert (problem.case, problem.what) == (
        "slices.h5",
        "older than the images or the split (fold 0) that it was made from",
    )


def test_slices_cut_short(root):
    (root / "slices.h5").write_bytes((root / "slices.h5").read_bytes()[:1000])
    (problem,) = problems(root)
    assert problem.case == "slices.h5"
    assert problem.what.startswith("not a complete slice store (not a complete HDF5 file")


def test_problems_do_not_depend_on_the_number_of_workers(root):
    for number in (1, 3, 5):
        change(root / f"imagesTr/c{number:02d}_0000.nii.gz", voxels=set_voxel(np.nan))
    alone = problems(root)
    assert len(alone) == 6
    assert check_dataset(root, workers=3) == alone


def test_what_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"no dataset\.json"):
        check_dataset(tmp_path)


def set_column(root: Path, column: str, values) -> None:
    """Change a column of cases.csv; values by case."""
    table = pd.read_csv(root / "cases.csv", dtype=str, keep_default_na=False)
    table[column] = [values.get(case, old) for case, old in zip(table["case"], table.get(column, ""), strict=False)]
    table.to_csv(root / "cases.csv", index=False)


def warnings(root: Path, topic: str) -> list[tuple[str, str]]:
    found = [p for p in problems(root) if p.topic == topic]
    assert all(p.severity == "warning" for p in found)
    return [(p.case, p.what) for p in found]


def test_errors_come_before_warnings_and_the_worst_case_first(root):
    change(root / "labelsTr/c00.nii.gz", voxels=np.zeros_like)
    change(root / "imagesTr/c05_0000.nii.gz", voxels=set_voxel(np.nan))
    (root / "imagesTr/c03_0000.nii.gz").unlink()
    found = problems(root)
    assert [(p.severity, p.case) for p in found] == [
        ("error", "c05"),
        ("error", "c05"),
        ("error", "c00"),
        ("error", "c03"),
        ("warning", "c00"),
    ]


def test_a_spacing_a_volume_and_an_orientation_unlike_the_others(tmp_path, write_dataset):
    write_dataset(tmp_path, patients=[f"P{n}" for n in range(12)])
    for path in [*tmp_path.glob("imagesTr/c03*"), *tmp_path.glob("labelsTr/c03*")]:
        change(path, affine=lambda a: a * [[2], [1], [1], [1]])
    for path in [*tmp_path.glob("imagesTr/c07*"), *tmp_path.glob("labelsTr/c07*")]:
        change(path, affine=lambda a: a * [[-1], [1], [1], [1]])
    set_column(tmp_path, "spacing", {"c03": "4x1.5x3"})
    set_column(tmp_path, "volume_ml_tumor", {"c05": "30"})
    assert warnings(tmp_path, "outlier") == [
        ("c03", "spacing: 4x1.5x3, 2x1.5x3 in the median case"),
        ("c05", "label tumor: 30 ml, 0.243 ml in the median case"),
        ("c07", "orientation: LAS, RAS in 11 of 12 cases"),
    ]


def test_a_label_that_few_cases_lack_or_that_few_show_cut(tmp_path, write_dataset):
    write_dataset(tmp_path, patients=[f"P{n}" for n in range(12)])

    def without_node(voxels):
        return np.where(voxels == 2, 0, voxels)

    def at_the_edge(voxels):
        voxels[0, 5, 2] = 1
        return voxels

    change(tmp_path / "labelsTr/c02.nii.gz", voxels=without_node)
    set_column(tmp_path, "volume_ml_node", {"c02": "0"})
    change(tmp_path / "labelsTr/c04.nii.gz", voxels=at_the_edge)
    found = dict(warnings(tmp_path, "outlier"))
    assert found == {
        "c02": "label node: absent, present in 11 of 12 cases",
        "c04": "label tumor: touches the edge of the image, as in 1 of 12 cases",
    }
    for number in range(6):  # now it is how this dataset was made
        change(tmp_path / f"labelsTr/c{number:02d}.nii.gz", voxels=at_the_edge)
    assert "c04" not in dict(warnings(tmp_path, "outlier"))


def blob(rng: np.random.Generator) -> np.ndarray:
    image = gaussian_filter(rng.standard_normal((40, 36, 30)), 2)
    return (1000 * image / image.std()).astype(np.float32)


def write_images(root: Path, images: dict[str, np.ndarray], parts: dict[str, list[str]], **kind) -> None:
    """A dataset of one channel; each case a patient, or as given by the name before the dash."""
    affine = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    rows = []
    for case, voxels in images.items():
        label = None if "classes" in kind else MetaTensor(torch.ones(1, *voxels.shape, dtype=torch.uint8))
        row = write_case(
            root, case, MetaTensor(torch.from_numpy(voxels)[None], affine=affine), label, kind.get("labels")
        )
        rows.append({"patient": case.partition("-")[0], "stratum": "", **row})
    write_index(root, name="blobs", channel_names=["MR"], rows=rows, manifest={"recipe": "test"}, **kind)
    DatasetFolder(root).write_split({"seed": 0, "stratify": None, "folds": [parts], "test": parts.pop("test")})


@pytest.mark.parametrize(("where", "severity"), [("train", "warning"), ("test", "error")])
def test_a_resampled_copy_of_another_patient_is_a_leak_when_it_is_in_another_part(tmp_path, where, severity):
    rng = np.random.default_rng(0)
    images = {case: blob(rng) for case in "abcdef"}
    images["g"] = 7 - 0.001 * 3 * zoom(-images["a"], 0.75, order=1)[1:]
    parts = {"train": ["a", "b", "c"], "val": ["d"], "test": ["e", "f"]}
    parts[where].append("g")
    write_images(tmp_path, images, parts, labels={"background": 0, "all": 1})
    (found,) = [p for p in problems(tmp_path) if p.topic == "duplicate"]
    assert (found.case, found.severity) == ("g", severity)
    assert found.what.startswith("image: nearly that of case a of another patient (correlation 0.9")
    assert ("different parts (test, train)" in found.what) == (where == "test")


def test_two_images_of_one_patient_may_be_alike(tmp_path):
    rng = np.random.default_rng(0)
    images = {case: blob(rng) for case in ("a-1", "b", "c")}
    images["a-2"] = images["a-1"] + 1
    write_images(
        tmp_path, images, {"train": ["a-1", "a-2"], "val": ["b"], "test": ["c"]}, labels={"background": 0, "all": 1}
    )
    assert problems(tmp_path) == []


@pytest.fixture
def classified(tmp_path):
    """Patches of lesions: a classification, with positions and attachments."""
    rng = np.random.default_rng(0)
    root, rows = tmp_path / "lesions", []
    affine = torch.tensor([[-0.5, 0, 0, 20], [0, -0.5, 0, 30], [0, 0, 3, -40], [0, 0, 0, 1]], dtype=torch.float64)
    for number in range(6):
        image = MetaTensor(torch.from_numpy(rng.gamma(2, 50, (3, 32, 32, 1)).astype(np.float32)), affine=affine)
        row = write_case(root, f"L{number}", image)
        row |= {"patient": f"P{number // 2}", "stratum": "", "class": ("benign", "malignant")[number % 2]}
        rows.append(row | {"lesion": str(number % 2 + 1), "position": "12.25 22 -40"})
        (root / "attachments").mkdir(exist_ok=True)
        Image.new("RGB", (30, 20), "red").save(root / f"attachments/L{number}_position.png")
    cases = {f"L{n}": {"files": {f"attachments/L{n}_position.png": "0"}} for n in range(6)}
    write_index(
        root,
        name="lesions",
        channel_names=["T2", "ADC", "DWI"],
        classes={"benign": 0, "malignant": 1},
        rows=rows,
        manifest={"recipe": "test", "cases": cases},
    )
    parts = {"train": ["L0", "L1"], "val": ["L2", "L3"]}
    DatasetFolder(root).write_split({"seed": 0, "stratify": None, "folds": [parts], "test": ["L4", "L5"]})
    return root


def test_a_sound_classification_has_no_problem(classified):
    assert problems(classified) == []


def test_classes_that_are_wrong(classified):
    set_column(classified, "class", {"L3": "benin"})
    found = problems(classified)[0]
    assert (found.case, found.topic, found.severity) == ("L3", "class", "error")
    assert found.what == "class: 'benin' found, one of benign, malignant expected"
    set_column(classified, "class", {"L3": "benign"})
    assert [(p.case, p.what) for p in problems(classified) if p.severity == "error"] == [
        ("dataset.json", "its list validation says of L3 other than cases.csv")
    ]
    assert warnings(classified, "balance") == [("splits.json", "val has no case of class malignant")]


@pytest.mark.parametrize("key", ["label", "lesion", "position", "patient"])
def test_a_list_that_says_other_than_the_table(classified, key):
    def edit(info):
        info["test"][0][key] = 1 if key == "label" else "other"

    rewrite(classified / "dataset.json", edit)
    assert [(p.case, p.what) for p in problems(classified)] == [
        ("dataset.json", "its list test says of L4 other than cases.csv")
    ]


def test_a_position_outside_of_its_patch(classified):
    # The patch reaches in x from 20.25 down to 4.25 mm; a pixel more is allowed for.
    for text, what in {
        "0.0 22 -40": "position: 4.0 mm outside of the image",
        "12.25 22 -46.5": "position: 3.5 mm outside of the image",
        "twelve": "position: 'twelve' found, three numbers expected (RAS mm; of a picture, its column and row)",
    }.items():
        set_column(classified, "position", {"L2": text})
        found = [p for p in problems(classified) if p.topic == "position"]
        assert [(p.case, p.what) for p in found] == [("L2", what)]


def test_attachments_that_are_missing_damaged_or_of_no_case(classified):
    folder = classified / "attachments"
    (folder / "L1_position.png").unlink()
    (folder / "L2_position.png").write_bytes(b"\x89PNG\r\n\x1a\nhello")
    (folder / "L3_other.tfm").write_text("")
    (folder / "L9_position.png").write_text("")
    assert [(p.case, p.what) for p in problems(classified)] == [
        ("L1", "attachments/L1_position.png is missing"),
        ("L2", "attachments/L2_position.png is no readable PNG picture"),
        ("attachments/L3_other.tfm", "belongs to no case of cases.csv"),
        ("attachments/L9_position.png", "belongs to no case of cases.csv"),
    ]


def cohort(n: int, classes: list[str], volumes: np.ndarray) -> pd.DataFrame:
    names = [f"c{number:03d}" for number in range(n)]
    return pd.DataFrame({"case": names, "patient": names, "class": classes, "volume_ml_tumor": volumes})


def test_parts_drawn_at_random_are_balanced():
    rng = np.random.default_rng(0)
    found = []
    for seed in range(100):
        cases = cohort(100, rng.choice(["a", "b"], 100).tolist(), np.exp(rng.normal(2, 1, 100)))
        splits = make_splits(cases, seed=seed)
        found += check_balance(cases, members(splits), ["tumor"], ["class"])
    assert len(found) <= 1


def test_parts_that_differ():
    rng = np.random.default_rng(0)
    volumes = np.exp(np.sort(rng.normal(2, 1, 100)))
    names = [f"c{number:03d}" for number in range(100)]
    parts = {"train": names[:70], "val": names[70:80], "test": names[80:]}
    found = [p.what for p in check_balance(cohort(100, ["a"] * 60 + ["b"] * 40, volumes), parts, ["tumor"], ["class"])]
    assert [what.partition(" (")[0] for what in found] == [
        "val has no case of class a",
        "test has no case of class a",
        "train: 86% of the patients have class a, 0% of the others",
        "train: 14% of the patients have class b, 100% of the others",
        "val: 100% of the patients have class b, 33% of the others",
        "test: 100% of the patients have class b, 25% of the others",
        *[what.partition(" (")[0] for what in found[6:]],
    ]
    assert sorted(what.partition(":")[0] for what in found[6:]) == ["test", "train"]


def test_a_flat_image_without_its_third_axis_is_named_and_the_others_are_checked(root):
    for path in (root / "imagesTr/c01_0000.nii.gz", root / "labelsTr/c01.nii.gz"):
        nib.save(nib.Nifti1Image(np.asarray(nib.load(path).dataobj)[..., 2], np.eye(4)), path)
    found = {problem.what for problem in problems(root) if problem.case == "c01"}
    assert "imagesTr/c01_0000.nii.gz: shape 12x10, 3 axes expected (of a flat image 12x10x1)" in found
    assert "labelsTr/c01.nii.gz: shape 12x10, 3 axes expected (of a flat image 12x10x1)" in found


@pytest.mark.parametrize("key", ["training", "validation", "test"])
@pytest.mark.parametrize("content", [None, 5, "c00", ["c00"], {"case": "c00"}, [{"case": ["c00"]}]], ids=str)
def test_lists_that_are_none_are_said_to_be_so(root, key, content):
    info = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(info | {key: content}))
    what = next(problem.what for problem in problems(root) if problem.case == "dataset.json")
    assert what.startswith((f"its key {key} is no list of cases", f"its list {key} says of"))


@pytest.mark.parametrize("cases", [5, ["c00"], {"c00": 5}, {"c00": {"files": 5}}, {"c00": {"files": [1]}}], ids=str)
def test_a_manifest_that_records_no_files_does_not_keep_the_cases_from_being_checked(root, cases):
    (root / "manifest.json").write_text(json.dumps({"recipe": "test", "cases": cases}))
    (root / "labelsTr/c02.nii.gz").unlink()
    assert "labelsTr/c02.nii.gz is missing" in [problem.what for problem in problems(root)]


def test_a_split_that_may_not_be_read_is_told_without_its_folder(root, monkeypatch):
    def refuse(path, *words, **more):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    (problem,) = read_splits(DatasetFolder(root))[1]
    assert problem.what == "cannot be read (Permission denied)"


def test_what_is_read_can_be_looked_at(root):
    (root / "labelsTr/c04.nii.gz").unlink()
    change(root / "labelsTr/c05.nii.gz", affine=shifted)
    change(root / "labelsTr/c03.nii.gz", lambda label: label.astype(np.float32) + 0.5)
    seen = {}

    def look(row, channels, label, affine):
        seen[row["case"]] = [np.array(array) for array in (*channels, label, affine)]

    check_dataset(root, workers=2, look=look)
    assert sorted(seen) == ["c00", "c01", "c02", "c03"]  # the others have no label on their grid
    for case, (*channels, label, affine) in seen.items():
        files = [f"imagesTr/{case}_0000.nii.gz", f"imagesTr/{case}_0001.nii.gz", f"labelsTr/{case}.nii.gz"]
        for file, array in zip(files, (*channels, label), strict=True):
            image = nib.load(root / file)
            np.testing.assert_array_equal(array, np.asarray(image.dataobj))
            np.testing.assert_allclose(affine, image.affine)
