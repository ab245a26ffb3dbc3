"""`medseg lr-range`: a bundle's own training, at rising learning rates, and nothing kept but a table and a figure."""

import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from medseg.cli import main


def words(bundle, tmp_path: Path, **more) -> list[str]:
    overrides = bundle.training(tmp_path / "runs", **more)
    return [part for key, value in overrides.items() for part in (f"--{key}", str(value))]


def lr_range(*words: str):
    return CliRunner().invoke(main, ["lr-range", *words])


def test_a_table_a_figure_a_suggestion_and_no_run(hippocampus, tmp_path: Path):
    done = lr_range(
        hippocampus.name,
        "--iterations=50",
        *words(hippocampus, tmp_path, patch_size="[16, 24, 16]", batch_size=2),
        *["--from", "1e-5", "--to", "0.3", "--out", str(tmp_path / "found"), "--learning_rate", "0.002"],
    )
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "found" / "learning_rates.csv")
    assert table.columns.tolist() == ["learning_rate", "loss", "smoothed_loss"]
    np.testing.assert_allclose(table["learning_rate"], np.geomspace(1e-5, 0.3, 50)[: len(table)])
    assert table["smoothed_loss"].min() < table["smoothed_loss"].iloc[0] - 0.2
    assert matplotlib.image.imread(tmp_path / "found" / "learning_rates.png").shape[2] >= 3
    suggested = float(re.search(r"suggested learning rate: (\S+) \(", done.stdout)[1])
    highest = float(re.search(r"highest that still trains: (\S+) \(", done.stdout)[1])
    assert 1e-5 < suggested <= highest <= 0.31
    assert "the bundle's: 2.0e-03" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"found"}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--learning_rat", "1"], "error: override --learning_rat: no such key"),
        (["--iterations", "5"], "error: iterations: found 5, expected at least 50"),
        (["--from", "2"], "error: learning rates: found 2.0 to 1.0"),
        (["--learning_rate", "0.0"], "error: optimizer: found a learning rate of 0.0"),
        (["--dataset_dir", "absent"], "error: absent: no such folder"),
        (["--train#trainer#accumulation_steps", "2"], "error: accumulation_steps: found gradients that are added up"),
        (["--train#trainer", "{}"], "error: bundle: hippocampus_mr_segmentation has no train#trainer with device"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(given, line, hippocampus, tmp_path: Path):
    done = lr_range(hippocampus.name, *words(hippocampus, tmp_path), "--out", str(tmp_path / "found"), *given)
    assert done.exit_code == 1
    assert done.stderr.strip().splitlines()[-1].startswith(line), done.output
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.glob("found/*"))
