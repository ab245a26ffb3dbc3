"""Scores of cases: of each once, by the labels' values, or refused."""

from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import AsDiscreted

from medseg.engines import MeanScore, PooledScore, Scores, segmentation_evaluator
from medseg.errors import ConfigError, DatasetError

AFFINE = np.diag([2.0, 1.0, 3.0, 1.0])


def run(folder, cases, labels=None, pred=None, split="val", scale=1):
    """Evaluate cases given as (case, truth), predicted as they are, or as `pred`."""
    items = [
        {"case": case, "patient": case, "image": MetaTensor(truth[:1] * scale, affine=AFFINE), "label": truth}
        for case, truth in cases
    ]

    def answers(output):
        return output | {"pred": output["label"] if pred is None else pred}

    folder.mkdir(exist_ok=True)
    segmentation_evaluator(
        "cpu",
        DataLoader(Dataset(items), batch_size=1),
        torch.nn.Identity(),
        postprocessing=answers,
        val_handlers=[Scores(folder, split, labels or {"background": 0, "tumor": 1})],
    ).run()
    return pd.read_csv(folder / "scores.csv", keep_default_na=False, na_values=[""])


def square(value=1.0, channels=1):
    mask = torch.zeros(channels, 6, 6, 1)
    mask[-1, 2:4, 2:4] = value
    return mask


def test_a_case_is_scored_as_a_whole_and_by_its_slices(tmp_path):
    truth, pred = torch.zeros(1, 9, 9, 4), torch.zeros(1, 9, 9, 4)
    truth[:, :3, :3, :2] = 1
    pred[:, :3, :3, :2] = 1
    pred[:, 5:7, 2:7, 0] = 1
    table = run(tmp_path, [("a", truth)], pred=pred)
    case, slices = table[table["level"] == "case"].iloc[0], table[table["level"] == "slice"]
    assert (case["tp"], case["fp"], case["fn"]) == (18, 10, 0)
    assert slices["fp"].tolist() == [10, 0, 0, 0]
    assert slices["tp"].tolist() == [9, 9, 0, 0]
    away = [np.hypot(2 * rows, columns) for rows in (3, 4) for columns in range(5)]  # mm from a right voxel
    assert case["hd95_mm"] == pytest.approx(np.percentile([0] * 18 + away, 95))


def test_a_case_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="case a comes again"):
        run(tmp_path, [(name, square()) for name in "aba"])
    assert not (tmp_path / "scores.csv").exists()


def test_nothing_is_scored_of_nan(tmp_path):
    image = torch.zeros(1, 6, 6, 1)
    image[0, 2, 2] = torch.nan
    item = {"case": "a", "patient": "a", "image": MetaTensor(image, affine=AFFINE), "label": square()}
    evaluator = segmentation_evaluator(
        "cpu",
        DataLoader(Dataset([item]), batch_size=1),
        torch.nn.Identity(),
        postprocessing=AsDiscreted("pred", threshold=0.5),
        val_handlers=[Scores(tmp_path, "val", {"background": 0, "tumor": 1})],
    )
    with pytest.raises(DatasetError, match="case a: 1 of the network's 36 logits are NaN"):
        evaluator.run()
    assert not (tmp_path / "scores.csv").exists()


def test_an_evaluation_of_no_case_says_so(tmp_path):
    with pytest.raises(DatasetError, match="val: no case to score"):
        Scores(tmp_path, "val", {"background": 0, "tumor": 1}).write()
    with pytest.raises(ConfigError, match=r"labels: \{'background': 0\} given"):
        Scores(tmp_path, "val", {"background": 0})


@pytest.mark.parametrize("value", [0.7, 256.0, float("nan"), -1.0])
def test_a_mask_that_holds_no_labels_is_refused(tmp_path, value):
    with pytest.raises(ConfigError, match="no labels; expected whole numbers to 255"):
        run(tmp_path, [("a", square())], pred=square(value))


def test_a_label_map_of_more_labels_than_are_scored(tmp_path):
    truth = square()
    truth[0, 0] = 2
    table = run(tmp_path, [("a", truth)])
    assert table["tp"].tolist() == [4, 4]


def test_channels_are_in_the_order_of_the_values_however_the_labels_are_named(tmp_path):
    one_hot = torch.zeros(3, 6, 6, 1)
    one_hot[0], one_hot[0, 0], one_hot[1, 0] = 1, 0, 1
    table = run(tmp_path, [("a", one_hot)], {"tumor": 2, "background": 0, "kidney": 1})
    truth = table[table["level"] == "case"].set_index("label")["tp"]
    assert truth.to_dict() == {"tumor": 0, "kidney": 6}


def test_patients_named_like_nothing_keep_their_names(tmp_path):
    run(tmp_path, [("NA", square())], split="test")
    table = run(tmp_path, [("null", square())], split="val")
    assert table[["split", "case", "patient"]].drop_duplicates().to_numpy().tolist() == [
        ["test", "NA", "NA"],
        ["val", "null", "null"],
    ]


def test_what_another_evaluation_wrote_meanwhile_is_kept(tmp_path, monkeypatch):
    test = run(tmp_path / "other", [("b", square())], split="test")

    @contextmanager
    def in_turn(folder):
        test.to_csv(folder / "scores.csv", index=False)
        yield

    monkeypatch.setattr("medseg.engines.scores.in_turn", in_turn)
    assert set(run(tmp_path, [("a", square())])["case"]) == {"a", "b"}


def test_a_picture_of_large_values_is_not_cut_off(tmp_path):
    run(tmp_path, [("a", square())], scale=1e5)
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
