"""nnU-Net v2 plans and preprocesses what data_prep built, and never sees a test case."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from data_prep.build import build_dataset
from data_prep.phantom import write_cohort
from data_prep.recipes import recipe_class
from data_prep.recipes.base import Recipe
from data_prep.recipes.folder import FolderOptions, FolderRecipe
from data_prep.recipes.petct import PetCtOptions, PetCtRecipe
from medseg.data import DatasetFolder, make_splits

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def nnunet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an nnU-Net in an environment of its own: its requirements are not medseg's."""
    root = tmp_path_factory.mktemp("nnunet") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(root)], check=True)
    subprocess.run([root / "bin/pip", "install", "-q", "nnunetv2", "torch==2.13.0"], check=True)
    return root / "bin"


def split(root: Path, column: str | None = None) -> DatasetFolder:
    folder = DatasetFolder(root)
    folder.write_split(make_splits(folder.cases, seed=0, fractions=(0.5, 0.25, 0.25), column=column))
    return folder


def built(recipe: Recipe, source: Path, out: Path) -> Path:
    result = build_dataset(recipe, source, out, keep_identifiers=True, report=False)
    assert result.failed == []
    return out


def check(nnunet: Path, number: int, dataset: DatasetFolder, tmp_path: Path, configuration: str = "3d_fullres") -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / f"Dataset{number}_ours").symlink_to(dataset.root)
    folders = {"nnUNet_raw": "raw", "nnUNet_preprocessed": "preprocessed", "nnUNet_results": "results"}
    before = {path: path.stat().st_mtime_ns for path in dataset.root.rglob("*")}
    done = subprocess.run(
        [
            nnunet / "nnUNetv2_plan_and_preprocess",
            *("-d", str(number), "--verify_dataset_integrity", "-c", configuration, "-npfp", "1", "-np", "1"),
        ],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | {name: str(tmp_path / folder) for name, folder in folders.items()}
        | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0
    assert "verify_dataset_integrity Done." in done.stdout
    assert "Error" not in done.stdout
    assert "Warning" not in done.stdout
    assert {path: path.stat().st_mtime_ns for path in dataset.root.rglob("*")} == before

    (fold,) = dataset.splits["folds"]
    allowed = {*fold["train"], *fold["val"]}
    made = tmp_path / "preprocessed" / f"Dataset{number}_ours"
    fingerprint = json.loads((made / "dataset_fingerprint.json").read_text())
    assert len(fingerprint["shapes_after_crop"]) == len(allowed)
    seen = {path.name.split(".")[0] for path in (made / "gt_segmentations").iterdir()}
    assert seen == allowed
    assert {path.name.split(".")[0].removesuffix("_seg") for path in made.glob("nnUNetPlans*/*")} == allowed
    assert json.loads((made / "splits_final.json").read_text()) == [fold]


def test_a_petct_dataset(nnunet: Path, tmp_path: Path):
    write_cohort(tmp_path / "dicom", patients=8, seed=1, image_size=48, slices=24)
    recipe = PetCtRecipe(PetCtOptions(roi=("GTV", "LN_*")))
    check(nnunet, 502, split(built(recipe, tmp_path / "dicom", tmp_path / "dataset")), tmp_path)


@pytest.mark.realdata
def test_a_real_mr_dataset(nnunet: Path, data: Path, tmp_path: Path):
    recipe = FolderRecipe(FolderOptions(label=("anterior=1", "posterior=2"), channel=("MRI",)))
    check(nnunet, 501, split(built(recipe, data / "hippocampus", tmp_path / "dataset")), tmp_path)


@pytest.mark.realdata
def test_a_task_of_the_decathlon(nnunet: Path, data: Path, tmp_path: Path):
    """Real images in the original layout, with a second channel in 4D as other tasks have it."""
    task, listed = tmp_path / "Task04_Hippocampus", []
    for label in sorted((data / "hippocampus" / "labels").glob("*_0[0-4]*.nii.gz"))[:12]:
        image = data / "hippocampus" / "images" / label.name
        if not image.exists():
            continue
        for folder in ("imagesTr", "labelsTr"):
            (task / folder).mkdir(parents=True, exist_ok=True)
        stored = nib.load(image)
        voxels = np.asarray(stored.dataobj, np.float32)
        nib.save(nib.Nifti1Image(np.stack([voxels, voxels[::-1]], -1), stored.affine), task / "imagesTr" / label.name)
        (task / "labelsTr" / label.name).symlink_to(label)
        listed.append({"image": f"./imagesTr/{label.name}", "label": f"./labelsTr/{label.name}"})
    description = {
        "modality": {"0": "MRI", "1": "mirrored"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": listed,
        "test": [],
    }
    (task / "dataset.json").write_text(json.dumps(description))
    check(nnunet, 503, split(built(recipe_class("decathlon")(), task, tmp_path / "dataset")), tmp_path)


@pytest.mark.realdata
@pytest.mark.parametrize("fov", ["leave", "ignore"])
def test_drive(nnunet: Path, data: Path, tmp_path: Path, fov: str):
    drive = recipe_class("drive")
    out = built(drive(drive.Options(fov=fov)), data / "drive", tmp_path / "dataset")
    check(nnunet, 504, split(out, "official_part"), tmp_path, "2d")


@pytest.mark.realdata
def test_kits19(nnunet: Path, data: Path, tmp_path: Path):
    """Real labels under made-up images: the images are not in the data of the tests."""
    for number in (0, 10, 20, 30, 40, 50):
        name = f"case_{number:05d}"
        stored = nib.load(data / "kits19_labels" / name / "segmentation.nii.gz")
        label = np.asarray(stored.dataobj)
        first = int(np.flatnonzero(label.any((1, 2)))[0])
        label = label[first : first + 24]
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        image = np.choose(label, (-80, 160, 80)) + np.random.default_rng(number).normal(0, 20, label.shape)
        nib.save(nib.Nifti1Image(image.astype(np.float32), stored.affine), folder / "imaging.nii.gz")
        nib.save(nib.Nifti1Image(label.astype(np.uint8), stored.affine), folder / "segmentation.nii.gz")
    check(nnunet, 505, split(built(recipe_class("kits19")(), tmp_path / "data", tmp_path / "dataset")), tmp_path)


def test_knee(nnunet: Path, make_knee: Callable[..., Any], tmp_path: Path):
    for number in range(4):
        knee = make_knee(size=96 + 32 * (number % 2), seed=number)
        for part, suffix in (("image", ""), ("femur", "_femur"), ("tibia", "_tibia"), ("fibula", "_fibula")):
            image = sitk.GetImageFromArray(getattr(knee, part).swapaxes(0, 2))
            image.SetSpacing(knee.spacing)
            image.SetDirection((1, 0, 0, 0, 0, 1, 0, -1, 0))
            (tmp_path / "mhd").mkdir(exist_ok=True)
            sitk.WriteImage(image, tmp_path / "mhd" / f"knee{number}{suffix}.mhd")
    check(nnunet, 506, split(built(recipe_class("knee")(), tmp_path / "mhd", tmp_path / "dataset")), tmp_path)


@pytest.mark.realdata
def test_a_recipe_in_yaml(nnunet: Path, data: Path, tmp_path: Path):
    """Two real channels on two grids, brought together, and a made-up lesion."""
    for number in range(4):
        folder = tmp_path / "source" / f"P{number}"
        folder.mkdir(parents=True)
        for channel in ("FLAIR", "T2W"):
            (folder / f"{channel}.nii.gz").symlink_to(data / "mr_registration" / f"study1_{channel}.nii.gz")
        flair = nib.load(folder / "FLAIR.nii.gz")
        lesion = np.zeros(flair.shape, np.uint8)
        lesion[100 + 20 * number : 120 + 20 * number, 150:170, 15:20] = 1
        nib.save(nib.Nifti1Image(lesion, flair.affine), folder / "lesion.nii.gz")
    (tmp_path / "own.yaml").write_text(
        "name: lesions\ncases: '{patient}'\nchannels: {FLAIR: FLAIR.nii.gz, T2: T2W.nii.gz}\n"
        "label: {masks: {lesion: lesion.nii.gz}}\nregister: {to: FLAIR, T2: header}\nspacing: [2, 2, 4]\n"
    )
    recipe = recipe_class(str(tmp_path / "own.yaml"))
    check(nnunet, 507, split(built(recipe(), tmp_path / "source", tmp_path / "dataset")), tmp_path)
