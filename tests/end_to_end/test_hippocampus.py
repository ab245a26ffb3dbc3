"""The hippocampus bundle on the real data: built, split, trained within twenty minutes, scored."""

import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from medseg.metrics import bootstrap_interval

BUNDLE = "hippocampus_mr_segmentation"


def call(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=folder, capture_output=True, text=True, check=False
    )


def build_train_score(folder: Path, source: Path, *overrides: str) -> pd.DataFrame:
    names = ["--label", "anterior=1", "--label", "posterior=2", "--channel", "MRI", "--keep-identifiers"]
    steps = (
        ["data_prep", "build", "folder", source, "ds", *names],
        ["data_prep", "split", "ds", "--fractions", "0.7", "0.1", "0.2", "--seed", "0"],
        ["data_prep", "check", "ds"],
        ["medseg", "run", BUNDLE, "train", "--dataset_dir", "ds", *overrides],
        ["medseg", "run", BUNDLE, "evaluate", "--dataset_dir", "ds", "--split", "test", "--unlock_test_set", "true"],
        ["medseg", "report", "runs/hippocampus/00", "--out", "report.html"],
    )
    for words in steps:
        start = time.monotonic()
        done = call(folder, *words)
        print(f"{' '.join(map(str, words[:4]))}: {time.monotonic() - start:.0f} s\n{done.stdout}{done.stderr}")
        assert done.returncode == 0, done.stderr
    scores = pd.read_csv(folder / "runs" / "hippocampus" / "00" / "scores.csv")
    return scores[scores.level == "case"]


@pytest.mark.realdata
def test_a_few_cases_go_the_whole_way(data, tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / "source" / kind).mkdir(parents=True)
        for file in sorted((data / "hippocampus" / kind).glob("*.nii.gz"))[:16]:
            (tmp_path / "source" / kind / file.name).symlink_to(file)
    cases = build_train_score(
        tmp_path, tmp_path / "source", "--max_epochs", "25", "--num_workers", "0", "--learning_rate", "0.01"
    )
    assert set(cases.label) == {"anterior", "posterior"}
    assert cases.dice.mean() > 0.5
    html = (tmp_path / "report.html").read_text()
    assert "anterior" in html
    assert "posterior" in html


@pytest.mark.long
@pytest.mark.realdata
def test_twenty_minutes_reach_the_published_score(data, tmp_path):
    cases = build_train_score(tmp_path, data / "hippocampus")
    for label, group in [
        *cases.groupby("label"),
        ("mean", cases.groupby(["case", "patient"]).dice.mean().reset_index()),
    ]:
        print(label, bootstrap_interval(group.dice.to_numpy(), groups=group.patient.to_numpy()))
    assert cases.groupby("case").size().tolist() == [2] * 40
    assert cases.dice.mean() >= 0.875
