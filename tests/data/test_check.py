"""Every problem that check_dataset looks for is planted and found; a sound dataset has none."""

import copy
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg.data import Problem, check_dataset, make_splits, write_slices
from medseg.data.folder import DatasetFolder
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


def test_shape_other_than_in_the_table(root):
    table = (root / "cases.csv").read_text()
    (root / "cases.csv").write_text(table.replace("12x10x5", "12x10x6", 1))
    assert [str(p) for p in problems(root)] == [
        "c00: shape: 12x10x5 in the image, 12x10x6 in cases.csv; build the dataset again"
    ]


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
    assert problem.case == "c04"
    assert problem.what == (
        "image: the same voxels as case c01 of another patient (P4 here, P1 there), "
        "and the two stand in different parts (test, train)"
    )


def test_duplicates_of_one_patient(tmp_path, write_dataset):
    (problem,) = duplicate(tmp_path, write_dataset, ["P0", "P1", "P1", "P3", "P4", "P5"], ("c01", "c02"))
    assert (problem.case, problem.what) == ("c02", "image: the same voxels as case c01 of the same patient P1")


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
