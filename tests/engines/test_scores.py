"""Scores of masks that are cleaned as a whole, where the network saw slices."""

import pandas as pd
import pytest
import torch
from ignite.engine import Engine
from monai.transforms import Compose, KeepLargestConnectedComponentd, RemoveSmallObjectsd

from medseg.engines import Scores


def score(folder, clean):
    """A case of four slices, 2 x 1 x 3 mm: a piece of 3 x 3 x 2 voxels that is right, and a longer one that is not.

    In the first slice the wrong piece is the larger one; in the whole case the right one is.
    """
    truth, pred = torch.zeros(4, 1, 9, 9), torch.zeros(4, 1, 9, 9)
    truth[:2, :, :3, :3] = 1
    pred[:2, :, :3, :3] = 1
    pred[0, :, 5:7, 2:7] = 1  # 10 voxels, 60 mm³

    def step(engine, index):
        item = {"case": "a", "patient": "a", "slice": index, "spacing": torch.tensor([2.0, 1.0, 3.0]), "axcodes": "LPS"}
        engine.state.batch = [item]
        return [{"image": truth[index], "label": truth[index], "pred": pred[index]}]

    folder.mkdir()
    engine = Engine(step)
    Scores(folder, "val", {"background": 0, "tumor": 1}, clean=clean).attach(engine)
    engine.run(range(4))
    table = pd.read_csv(folder / "scores.csv")
    return table[table["level"] == "case"].iloc[0], table[table["level"] == "slice"]


@pytest.mark.parametrize(
    ("clean", "false_alarms"),
    [
        (None, 10),
        (KeepLargestConnectedComponentd("pred"), 0),
        (RemoveSmallObjectsd("pred", min_size=50, by_measure=True), 10),
        (Compose([RemoveSmallObjectsd("pred", min_size=70, by_measure=True)]), 0),
    ],
    ids=["none", "largest", "50 mm3", "70 mm3"],
)
def test_the_case_and_its_slices_are_scored_as_they_are_cleaned(tmp_path, clean, false_alarms):
    case, slices = score(tmp_path / "run", clean)
    assert (case["tp"], case["fp"], case["fn"]) == (18, false_alarms, 0)
    assert slices["fp"].tolist() == [false_alarms, 0, 0, 0]
    assert slices["tp"].tolist() == [9, 9, 0, 0]
