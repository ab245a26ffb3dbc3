"""The demo goes the whole way, in small; and refuses a folder that holds something."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from medseg.cli import main
from medseg.demo import run_demo
from medseg.io import read_image


def test_the_demo_ends_with_a_report_and_a_mask(tmp_path, capfd):
    out = tmp_path / "demo"
    report = run_demo(out, patients=6, max_epochs=1, slices=10, image_size=48)

    html = report.read_text()
    assert "petct" in html
    assert "dataset.json" in {p.name for p in (out / "dataset").iterdir()}
    for run in ("petct", "ct"):
        record = json.loads((out / "runs" / run / "00" / "run.json").read_text())
        assert len(record["test_set_scored"]) == 1
        scores = pd.read_csv(out / "runs" / run / "00" / "scores.csv")
        assert set(scores.split) == {"test"}
        assert set(scores.level) == {"slice", "case"}

    [mask] = (out / "masks").iterdir()
    image = nib.load(mask)
    assert image.get_data_dtype() == np.uint8
    assert set(np.unique(image.dataobj)) <= {0, 1}
    series = pd.read_csv(out / "series.csv")
    assert set(series.modality) == {"CT", "PT", "RTSTRUCT"}
    source = read_image(out / "new_study" / "PHANTOM-001" / "CT")
    assert image.shape == tuple(source.shape[1:])
    assert np.allclose(image.affine, np.asarray(source.affine), atol=1e-3)

    said = capfd.readouterr().err
    for command in ("data_prep phantom", "data_prep build petct", "medseg run", "medseg report"):
        assert f"$ {command}" in said


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.long
def test_pet_ct_beats_ct_alone_on_the_demos_test_patients(tmp_path):
    from medseg.metrics import bootstrap_interval

    run_demo(tmp_path / "demo")
    intervals = {}
    for run in ("petct", "ct"):
        scores = pd.read_csv(tmp_path / "demo" / "runs" / run / "00" / "scores.csv")
        cases = scores[scores.level == "case"]
        intervals[run] = bootstrap_interval(cases.dice.to_numpy(), groups=cases.patient.to_numpy())
        print(run, intervals[run])
    assert intervals["petct"].low > intervals["ct"].high
