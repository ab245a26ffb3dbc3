"""A disk that fills up ends a build in one line, and the build goes on once there is room."""

import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


def may_mount(folder: Path) -> bool:
    """Whether a disk of its own may be had here."""
    if shutil.which("unshare") is None:
        return False
    words = [*UNSHARE, "mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def test_a_full_disk_stops_the_build_which_ends_in_the_same_bytes_later(tmp_path: Path) -> None:
    disk, source, key = tmp_path / "disk", tmp_path / "source", tmp_path / "shared.key"
    disk.mkdir()
    if not may_mount(disk):
        pytest.skip("no small disk can be mounted here (unshare --user --mount)")
    rng = np.random.default_rng(3)
    for folder in ("images", "labels"):
        (source / folder).mkdir(parents=True)
    for number in range(6):
        label = np.zeros((14, 14, 10), np.uint8)
        label[2:5, 2:5, 2:5] = 1
        noise = rng.normal(size=label.shape).astype(np.float32)
        nib.save(nib.Nifti1Image(noise, np.eye(4)), source / f"images/s{number}.nii")
        nib.save(nib.Nifti1Image(label, np.eye(4)), source / f"labels/s{number}.nii")
    key.write_text("ab" * 32)
    words = [*UNSHARE, sys.executable, str(Path(__file__).with_name("full_disk.py")), str(source), str(key), str(disk)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("done\n")
