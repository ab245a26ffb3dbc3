"""Tiny datasets, and the bundles run on them as a user runs them."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from data_prep.build import build_dataset
from data_prep.phantom import write_cohort
from data_prep.recipes.petct import PetCtOptions, PetCtRecipe
from medseg.data import DatasetFolder, make_splits, write_slices
from medseg.data.folder import write_case, write_index
from medseg.experiments import bundle_path
from medseg.io import write_nifti

# Finer than the CT's 4 x 4 x 10 mm, over the same field of view; no center of one is halfway between two of the other.
SPACING = [2.4, 2.4, 10 / 3]


@dataclass(frozen=True)
class TinyBundle:
    """A bundle, data for it, and the overrides that make it small enough for a test."""

    name: str
    dataset: Path
    images: Path
    channels: list[int]
    inference: dict[str, Any]

    @property
    def root(self) -> Path:
        return bundle_path(self.name)

    def files(self, *names: str) -> list[str]:
        return [str(self.root / "configs" / name) for name in names]

    def training(self, output_dir: Path, **more: Any) -> dict[str, Any]:
        """Overrides of a training that takes seconds."""
        return {
            "bundle_root": str(self.root),
            "dataset_dir": str(self.dataset),
            "output_dir": str(output_dir),
            "network_channels": self.channels,
            "max_epochs": 1,
            "num_workers": 0,
            "amp": False,
            **more,
        }

    def predicting(self, output_dir: Path, checkpoint: Path | str, **more: Any) -> dict[str, Any]:
        """Overrides of an inference on the images."""
        return {
            "bundle_root": str(self.root),
            "dataset_dir": str(self.images),
            "output_dir": str(output_dir),
            "checkpoint": str(checkpoint),
            "network_channels": self.channels,
            "amp": False,
            **self.inference,
            **more,
        }


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six made-up patients as DICOM."""
    out = tmp_path_factory.mktemp("phantom") / "dicom"
    write_cohort(out, patients=6, seed=3, image_size=48, slices=12)
    return out


@pytest.fixture(scope="session")
def petct(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    """The PET/CT bundle with slices of six patients; the DICOM of one of them is what it predicts."""
    root = tmp_path_factory.mktemp("petct") / "dataset"
    recipe = PetCtRecipe(PetCtOptions(roi=("GTV", "LN_*"), spacing=tuple(SPACING)))
    build_dataset(recipe, cohort, root, jobs=1, keep_identifiers=True, report=False)
    folder = DatasetFolder(root)
    folder.write_split(make_splits(folder.cases, seed=0, fractions=(0.5, 0.25, 0.25), stratify=None))
    write_slices(root)
    return TinyBundle(
        "head_neck_petct_segmentation",
        root,
        cohort / "PHANTOM-002",
        [4, 8],
        {"spacing": SPACING},
    )


@pytest.fixture(scope="session")
def hippocampus(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    """The MR bundle with eight made-up images of several sizes: two bright halves of a bar in noise."""
    root = tmp_path_factory.mktemp("hippocampus")
    rng = np.random.default_rng(5)
    labels = {"background": 0, "anterior": 1, "posterior": 2}
    rows = []
    (root / "images").mkdir()
    for number, shape in enumerate([(21, 30, 18), (24, 27, 22), (19, 33, 20), (22, 28, 17)] * 2):
        label = np.zeros((1, *shape), np.uint8)
        label[0, 7:14, 15:24, 5:12], label[0, 7:14, 6:15, 5:12] = 1, 2
        image = (100 + 60 * (label > 0) + 40 * (label > 1) + rng.normal(0, 10, label.shape)).astype(np.float32)
        # stored right to left, as radiologists look at it: a result that ignores the affine shows
        affine = np.diag([-1.0, 1.0, 1.25, 1.0])
        affine[:3, 3] = 10, -20, 30 + number
        case = f"case_{number:03d}"
        measured = write_case(
            root / "dataset",
            case,
            MetaTensor(torch.from_numpy(image), affine=torch.from_numpy(affine)),
            MetaTensor(torch.from_numpy(label), affine=torch.from_numpy(affine)),
            labels,
        )
        rows.append({"patient": case, "stratum": "", **measured})
        if number < 2:
            write_nifti((image, affine), root / "images" / f"{case}.nii.gz")
    write_index(root / "dataset", name="bars", channel_names=["MRI"], labels=labels, rows=rows, manifest={})
    folder = DatasetFolder(root / "dataset")
    folder.write_split(make_splits(folder.cases, seed=0, fractions=(0.5, 0.25, 0.25), stratify=None))
    return TinyBundle("hippocampus_mr_segmentation", root / "dataset", root / "images", [2, 4, 4, 4], {})


@pytest.fixture(scope="session", params=["petct", "hippocampus"])
def bundle(request: pytest.FixtureRequest) -> TinyBundle:
    """Each bundle in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def shell() -> Callable[..., subprocess.CompletedProcess]:
    """Run a Python module away from the checkout: `shell(cwd, "monai.bundle", "run", …, key="value")`."""

    def run(cwd: Path, *words: str, **overrides: Any) -> subprocess.CompletedProcess:
        pairs = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
        return subprocess.run(
            [sys.executable, "-m", *words, *pairs],
            cwd=cwd,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@dataclass(frozen=True)
class Trained:
    """A bundle that was trained by `monai.bundle run`, the run folder, and what the process said."""

    bundle: TinyBundle
    runs: Path
    process: subprocess.CompletedProcess

    @property
    def run_dir(self) -> Path:
        (folder,) = (self.runs / "tiny").iterdir()
        return folder


@pytest.fixture(scope="session")
def trained(
    bundle: TinyBundle, shell: Callable[..., subprocess.CompletedProcess], tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """Each bundle, trained for one epoch from a clean shell."""
    cwd = tmp_path_factory.mktemp(f"trained_{bundle.name}")
    done = shell(
        cwd,
        "monai.bundle",
        "run",
        "--config_file",
        *bundle.files("train.yaml"),
        **bundle.training(cwd / "runs", run_name="tiny", val_interval=2),
    )
    assert done.returncode == 0, done.stderr
    return Trained(bundle, cwd / "runs", done)
