"""Scores of masks: cleaned as a whole where the network saw slices, of all cases and slices or refused."""

import numpy as np
import pandas as pd
import pytest
import torch
from ignite.engine import Engine
from monai.transforms import Compose, KeepLargestConnectedComponentd, RemoveSmallObjectsd

from medseg.engines import MeanScore, PooledScore, Scores
from medseg.errors import ConfigError, DatasetError


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


def run(folder, items, labels=None, pred=None, split="val", scale=1):
    """Evaluate slices given as (case, slice, truth), predicted as they are, or as `pred`."""

    def step(engine, item):
        case, index, truth = item
        engine.state.batch = [
            {"case": case, "patient": case, "slice": index, "spacing": torch.ones(3), "axcodes": "LPS"}
        ]
        return [{"image": truth[:1] * scale, "label": truth, "pred": truth if pred is None else pred}]

    folder.mkdir(exist_ok=True)
    engine = Engine(step)
    Scores(folder, split, labels or {"background": 0, "tumor": 1}).attach(engine)
    engine.run(items)
    return pd.read_csv(folder / "scores.csv", keep_default_na=False, na_values=[""])


def square(value=1.0, channels=1):
    mask = torch.zeros(channels, 6, 6)
    mask[-1, 2:4, 2:4] = value
    return mask


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([("a", 0), ("b", 0), ("a", 1)], "case a comes again after another"),
        ([("a", 2), ("a", 3)], "case a: 2 slices between 2 and 3, expected all"),
        ([("a", 0), ("a", 0)], "case a: 2 slices between 0 and 0, expected all"),
    ],
    ids=["shuffled", "without the first", "twice"],
)
def test_slices_that_are_no_whole_case_are_refused(tmp_path, slices, message):
    with pytest.raises(DatasetError, match=message):
        run(tmp_path, [(*name, square()) for name in slices])
    assert not (tmp_path / "scores.csv").exists()


def test_an_evaluation_of_no_case_says_so(tmp_path):
    with pytest.raises(DatasetError, match="val: no case to score"):
        Scores(tmp_path, "val", {"background": 0, "tumor": 1}).write()
    with pytest.raises(ConfigError, match=r"labels: \{'background': 0\} given"):
        Scores(tmp_path, "val", {"background": 0})


@pytest.mark.parametrize("value", [0.7, 256.0, float("nan"), -1.0])
def test_a_mask_that_holds_no_labels_is_refused(tmp_path, value):
    with pytest.raises(ConfigError, match="no labels; expected whole numbers to 255"):
        run(tmp_path, [("a", 0, square())], pred=square(value))


def test_a_label_map_of_more_labels_than_are_scored(tmp_path):
    truth = square()
    truth[0, 0] = 2
    table = run(tmp_path, [("a", 0, truth)])
    assert table["tp"].tolist() == [4, 4]


def test_channels_are_in_the_order_of_the_values_however_the_labels_are_named(tmp_path):
    one_hot = torch.zeros(3, 6, 6)
    one_hot[0], one_hot[0, 0], one_hot[1, 0] = 1, 0, 1
    table = run(tmp_path, [("a", 0, one_hot)], {"tumor": 2, "background": 0, "kidney": 1})
    truth = table[table["level"] == "case"].set_index("label")["tp"]
    assert truth.to_dict() == {"tumor": 0, "kidney": 6}


def test_patients_named_like_nothing_keep_their_names(tmp_path):
    run(tmp_path, [("NA", 0, square())], split="test")
    table = run(tmp_path, [("null", 0, square())], split="val")
    assert table[["split", "case", "patient"]].drop_duplicates().to_numpy().tolist() == [
        ["test", "NA", "NA"],
        ["val", "null", "null"],
    ]


def test_a_picture_of_large_values_is_not_cut_off(tmp_path):
    run(tmp_path, [("a", 0, square())], scale=1e5)
    with np.load(tmp_path / "pictures" / "a.npz") as content:
        assert content["image"].astype(float).max() == 1e5


def test_key_metrics_refuse_at_once_what_they_cannot_compute():
    with pytest.raises(ConfigError, match=r"medseg\.metrics\.dice takes no such"):
        MeanScore("dice", beta=2)
    with pytest.raises(ConfigError, match="beta is -1"):
        MeanScore("f_beta", beta=-1)
    with pytest.raises(ConfigError, match="alpha -1"):
        PooledScore(alpha=-1)
    with pytest.raises(ConfigError, match="weight:"):
        PooledScore(weight=[1, -2])


def test_one_channel_is_no_background_to_leave_out():
    metric = MeanScore("dice", include_background=False)
    metric.update(([square()], [square()]))
    assert metric.compute() == 1
