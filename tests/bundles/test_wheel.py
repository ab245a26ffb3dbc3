"""What `pip install medseg` brings, without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the checkout: a build leaves files beside the sources."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    source.mkdir()
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.cfg"):
        if (CHECKOUT / name).is_file():
            shutil.copy(CHECKOUT / name, source)
    for name in ("bundles", "data_prep", "medseg"):
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "runs", "masks"))
    pip(root, "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(root), cwd=source)
    (file,) = root.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder that the wheel was installed into."""
    target = wheel.parent / "installed"
    pip(wheel.parent, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=wheel.parent)
    return target


def pip(root: Path, *words: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *words], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        words,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_wheel_has_all_that_is_needed_and_no_more(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("medseg", "data_prep"):
        # every module, stub, marker and template of the checkout
        expected = {
            path.relative_to(CHECKOUT).as_posix()
            for path in (CHECKOUT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert expected <= names, sorted(expected - names)
    assert {"medseg/py.typed", "medseg/io/__init__.pyi", "medseg/report/templates/run.html"} <= names
    for bundle, own in (
        ("head_neck_petct_segmentation", ["choose_threshold.yaml"]),
        ("hippocampus_mr_segmentation", []),
    ):
        root = f"medseg/bundles/{bundle}"
        assert {name for name in names if name.startswith(f"{root}/")} == {
            f"{root}/LICENSE",
            f"{root}/docs/README.md",
            *(
                f"{root}/configs/{name}"
                for name in (
                    "evaluate.yaml",
                    "inference.yaml",
                    "logging.conf",
                    "metadata.json",
                    "multi_gpu_train.yaml",
                    "train.yaml",
                    *own,
                )
            ),
        }
    assert {name.split("/")[0] for name in names} == {
        "medseg",
        "data_prep",
        next(name for name in names if name.endswith(".dist-info/METADATA")).split("/")[0],
    }
    endings = {Path(name).suffix for name in names if ".dist-info/" not in name}
    assert endings <= {".py", ".pyi", ".typed", ".html", ".css", ".js", ".yaml", ".json", ".conf", ".md", ""}


def test_the_installed_command_lists_its_own_bundles(installed: Path, tmp_path: Path):
    done = run(installed, tmp_path, sys.executable, str(installed / "bin/medseg"), "bundles")
    assert done.returncode == 0, done.stderr
    for name in ("head_neck_petct_segmentation", "hippocampus_mr_segmentation"):
        assert str(installed / "medseg/bundles" / name) in done.stdout


def test_a_bundle_zipped_and_unpacked_elsewhere_runs(installed: Path, hippocampus, tmp_path: Path):
    name = "hippocampus_mr_segmentation"
    archive = shutil.make_archive(str(tmp_path / name), "zip", installed / "medseg/bundles", name)
    shutil.unpack_archive(archive, tmp_path / "elsewhere")
    root = tmp_path / "elsewhere" / name
    settings = hippocampus.training(Path("runs"), run_name="tiny")
    del settings["bundle_root"]  # the config's own: where the command is run
    words = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    done = run(
        installed, root, sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/train.yaml", *words
    )
    assert done.returncode == 0, done.stderr
    assert (root / "runs/tiny/00/model_best.pt").is_file()
