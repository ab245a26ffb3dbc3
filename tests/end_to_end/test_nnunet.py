"""nnU-Net v2 plans and preprocesses what data_prep built, and never sees a test case."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.build import build_dataset
from data_prep.phantom import write_cohort
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


def split(root: Path) -> DatasetFolder:
    folder = DatasetFolder(root)
    folder.write_split(make_splits(folder.cases, seed=0, fractions=(0.5, 0.25, 0.25), stratify=None))
    return folder


def check(nnunet: Path, number: int, dataset: DatasetFolder, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / f"Dataset{number}_ours").symlink_to(dataset.root)
    folders = {"nnUNet_raw": "raw", "nnUNet_preprocessed": "preprocessed", "nnUNet_results": "results"}
    before = {path: path.stat().st_mtime_ns for path in dataset.root.rglob("*")}
    done = subprocess.run(
        [
            nnunet / "nnUNetv2_plan_and_preprocess",
            *("-d", str(number), "--verify_dataset_integrity", "-c", "3d_fullres", "-npfp", "1", "-np", "1"),
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
    build_dataset(recipe, tmp_path / "dicom", tmp_path / "dataset", keep_identifiers=True, report=False)
    check(nnunet, 502, split(tmp_path / "dataset"), tmp_path)


@pytest.mark.realdata
def test_a_real_mr_dataset(nnunet: Path, data: Path, tmp_path: Path):
    recipe = FolderRecipe(FolderOptions(label=("anterior=1", "posterior=2"), channel=("MRI",)))
    build_dataset(recipe, data / "hippocampus", tmp_path / "dataset", keep_identifiers=True, report=False)
    check(nnunet, 501, split(tmp_path / "dataset"), tmp_path)
