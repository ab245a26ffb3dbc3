"""A trainer trains, validates, and leaves in the run folder what a later reader needs."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.transforms import Activationsd, AsDiscreted, Compose, RandGaussianNoised
from torch.utils.data import Dataset

from medseg.data import SeededDataset, SeededLoader
from medseg.engines import MeanScore, Scores, load_checkpoint, segmentation_evaluator, segmentation_trainer
from medseg.errors import ConfigError, TrainingError
from medseg.losses import FBetaLoss


class Squares(Dataset):
    """Eight slices of two cases: a bright square is to be found."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def __len__(self):
        return 8

    def __getitem__(self, index):
        label = torch.zeros(1, 10, 8)
        label[:, 1 + index % 4 : 5 + index % 4, 2:6] = 1
        return {
            "image": label * self.scale - 0.3,
            "label": label,
            "case": f"case{index // 4}",
            "patient": f"patient{index // 4}",
        }


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.BatchNorm2d(4),
        torch.nn.Conv2d(4, 1, 3, padding=1),
    )


POST = Compose([Activationsd("pred", sigmoid=True), AsDiscreted("pred", threshold=0.5)])


def validator(net, data, metric):
    return segmentation_evaluator(
        "cpu",
        DataLoader(data, batch_size=3),
        net,
        postprocessing=POST,
        key_val_metric=None if metric is None else {"val_dice": metric},
    )


DICE = MeanScore("dice")


def trainer(
    run_dir,
    net,
    data=None,
    num_workers=0,
    max_epochs=3,
    rate=0.05,
    with_validator=True,
    val_data=None,
    metric=DICE,
    **kwargs,
):
    dataset = SeededDataset(Squares() if data is None else data, RandGaussianNoised("image", prob=1.0, std=0.1), seed=1)
    optimizer = torch.optim.Adam(net.parameters(), rate)
    return segmentation_trainer(
        "cpu",
        max_epochs,
        SeededLoader(dataset, 4, seed=1, num_workers=num_workers),
        net,
        optimizer,
        FBetaLoss(beta=2, sigmoid=True),
        run_dir,
        validator=validator(net, Squares() if val_data is None else val_data, metric) if with_validator else None,
        **kwargs,
    )


def test_training_learns_and_leaves_its_record(tmp_path):
    net = network()
    trainer(tmp_path, net, max_epochs=20, val_interval=5).run()
    log = pd.read_csv(tmp_path / "metrics.csv")
    loss = log[(log.phase == "train") & (log.name == "loss")].value.to_numpy()
    assert len(loss) == 40
    assert loss[-5:].mean() < loss[:5].mean()
    dice = log[(log.phase == "val") & (log.name == "val_dice")]
    assert dice.iteration.tolist() == [5, 10, 15, 20, 25, 30, 35, 40]
    assert dice.value.max() > 0.95
    assert list((tmp_path / "events").glob("events.*"))

    best, last = network(), network()
    content = load_checkpoint(tmp_path / "model_best.pt", best)
    assert content["score"] == pytest.approx(dice.value.max())
    assert load_checkpoint(tmp_path / "model_last.pt", last)["iteration"] == 40
    assert all(torch.equal(a, b) for a, b in zip(last.state_dict().values(), net.state_dict().values(), strict=True))


def test_the_end_is_validated_whatever_the_interval(tmp_path):
    trainer(tmp_path, network(), val_interval=4).run()
    log = pd.read_csv(tmp_path / "metrics.csv")
    assert log[log.name == "val_dice"].iteration.tolist() == [4, 6]


def test_results_do_not_depend_on_the_number_of_workers(tmp_path):
    states = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        net = network()
        trainer(folder, net, num_workers=workers, with_validator=False).run()
        states.append(net.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_validation_does_not_change_the_training(tmp_path):
    states = []
    for with_validator in (False, True):
        folder = tmp_path / str(with_validator)
        folder.mkdir()
        net = network()
        trainer(folder, net, with_validator=with_validator, val_interval=1 if with_validator else None).run()
        states.append(net.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_early_stopping_ends_a_training_that_does_not_improve(tmp_path):
    run = trainer(tmp_path, network(), rate=0.0, max_epochs=50, early_stopping=3)
    run.run()
    assert run.state.epoch < 10


def test_the_averaged_weights_are_validated_and_saved(tmp_path):
    net = network()
    run = trainer(tmp_path, net, ema_momentum=0.1)
    run.run()
    average = network()
    load_checkpoint(tmp_path / "model_last.pt", average)
    assert not torch.equal(average[0].weight, net[0].weight)
    content = torch.load(tmp_path / "model_last.pt", weights_only=True)
    assert torch.equal(content["trained_model"]["0.weight"], net[0].weight)


def test_a_loss_that_is_no_number_ends_the_training_before_it_is_kept(tmp_path):
    run = trainer(tmp_path, network(), data=Squares(scale=float("nan")))
    with pytest.raises(TrainingError, match="iteration 1: the loss is nan"):
        run.run()
    assert not list(tmp_path.glob("*.pt"))


def test_bfloat16_autocast_gives_float32_and_nearly_the_same(tmp_path):
    from monai.inferers import SimpleInferer

    from medseg.engines import AutocastInferer

    image, net = torch.rand(2, 1, 8, 8), network().eval()
    output = AutocastInferer(SimpleInferer())(image, net)
    assert output.dtype == torch.float32
    assert torch.allclose(output, net(image), atol=0.05)
    trainer(tmp_path, network(), amp=True).run()
    assert (tmp_path / "model_best.pt").is_file()


def test_arguments_that_make_no_training_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="early_stopping"):
        trainer(tmp_path, network(), with_validator=False, early_stopping=2)
    with pytest.raises(ConfigError, match="is no folder"):
        trainer(tmp_path / "absent", network())
    with pytest.raises(ConfigError, match="expected one of dice"):
        MeanScore("accuracy")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"val_interval": 0}, "val_interval: found 0, expected at least 1"),
        ({"early_stopping": 0}, "early_stopping: found 0, expected at least 1"),
        ({"max_epochs": 0}, "max_epochs: found 0, expected at least 1"),
        ({"ema_momentum": 0.0}, r"ema_momentum: found 0\.0, expected a number between 0 and 1"),
        ({"ema_momentum": 1.5}, r"ema_momentum: found 1\.5"),
        ({"snapshots": 3}, "snapshots: found 3 with NoneType, expected a list"),
        ({"snapshots": [2, 7]}, "snapshots: found 7, expected iterations from 1 to 6"),
        ({"data": []}, "train_data_loader: found an epoch without a batch"),
        ({"val_data": []}, "validator: found nothing to validate with"),
        ({"metric": None}, "validator: found no key metric"),
    ],
)
def test_numbers_and_data_that_make_no_training_are_refused_before_it_begins(given, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, network(), **given)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_a_training_is_refused_and_left_as_it_is(tmp_path):
    trainer(tmp_path, network(), max_epochs=1).run()
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(ConfigError, match="holds a training already, expected a new folder"):
        trainer(tmp_path, network())
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


class Told:
    """A key metric whose values are given, one for each validation."""

    def __init__(self, *values):
        self.values = list(values)

    def attach(self, engine, name):
        engine.add_event_handler(
            Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update({name: self.values.pop(0) if self.values else 0.0})
        )


@pytest.mark.parametrize("values", [(math.nan, 0.3, math.nan, 0.2), (0.3, math.nan, math.nan)])
def test_a_metric_without_a_value_is_worse_than_any_other(values, tmp_path):
    best = values.index(0.3) + 1
    run = trainer(tmp_path, network(), metric=Told(*values), max_epochs=9, early_stopping=2)
    run.run()
    content = load_checkpoint(tmp_path / "model_best.pt", network())
    assert (content["epoch"], content["score"]) == (best, 0.3)
    assert run.state.epoch == best + 2


def test_gradients_of_two_batches_are_those_of_both_together(tmp_path):
    states = []
    for size, steps in ((4, 1), (2, 2)):
        net = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
        torch.nn.init.zeros_(net.weight)
        (tmp_path / str(size)).mkdir()
        segmentation_trainer(
            "cpu",
            2,
            SeededLoader(SeededDataset(Squares()), size),
            net,
            torch.optim.SGD(net.parameters(), 0.1),
            torch.nn.BCEWithLogitsLoss(),
            tmp_path / str(size),
            accumulation_steps=steps,
        ).run()
        states.append(net.weight)
    torch.testing.assert_close(*states)


class Shift(torch.nn.Module):
    """Predicts the truth of a sample whose image is the label, moved by one voxel along x."""

    def forward(self, x):
        return torch.roll(x, 1, dims=2) * 20


class Cases(Dataset):
    """The two cases of the squares, whole."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        slices = [Squares()[4 * index + position] for position in range(4)]
        image, label = (torch.stack([item[key] for item in slices], dim=-1) for key in ("image", "label"))
        # Voxels run to the left, the back and the head.
        image = MetaTensor(image, affine=np.diag([-1.0, -1.0, 3.0, 1.0]))
        return {"image": image, "label": label, "case": f"case{index}", "patient": f"patient{index}"}


def evaluate(run_dir, split="test"):
    evaluator = segmentation_evaluator(
        "cpu",
        DataLoader(Cases(), batch_size=2),
        Shift(),
        postprocessing=POST,
        key_val_metric={"val_dice": MeanScore("dice")},
        val_handlers=[Scores(run_dir, split, {"background": 0, "tumour": 1}, ["CT"])],
    )
    evaluator.run()
    return evaluator


def test_scores_have_a_row_per_slice_and_per_case(tmp_path):
    assert isinstance(evaluate(tmp_path), SupervisedEvaluator)
    table = pd.read_csv(tmp_path / "scores.csv")
    slices, cases = table[table.level == "slice"], table[table.level == "case"]
    assert slices[["case", "slice"]].to_numpy().tolist() == [[f"case{i // 4}", i % 4] for i in range(8)]
    assert cases.case.tolist() == ["case0", "case1"]
    # a square of 4 by 4, moved by one: 12 right, 4 false alarms, 4 missed
    first = slices.iloc[0]
    assert (first.tp, first.fp, first.fn) == (12, 4, 4)
    assert first.dice == pytest.approx(0.75)
    assert cases.iloc[0].tp == slices.iloc[:4].tp.sum()
    assert cases.iloc[0].hd95_mm == pytest.approx(1.0)


def test_scores_of_another_split_stay(tmp_path):
    for split in ("val", "test", "test"):
        evaluate(tmp_path, split)
    table = pd.read_csv(tmp_path / "scores.csv")
    assert table.groupby("split").size().to_dict() == {"val": 10, "test": 10}


def test_pictures_show_what_the_network_saw(tmp_path):
    evaluate(tmp_path)
    with np.load(tmp_path / "pictures" / "case1.npz") as content:
        assert content["image"].shape == (1, 4, 10, 8)
        assert content["label"].sum() == 4 * 16
        assert str(content["channel_names"][0]) == "CT"
        assert content["axcodes"].tolist() == ["L", "P", "S"]
        expected = np.stack([Squares()[i]["image"].numpy()[0] for i in range(4, 8)])
        assert np.allclose(content["image"][0], expected, atol=1e-3)


def test_the_mean_score_counts_false_alarms_on_empty_truth():
    metric = MeanScore("dice")
    truth, pred = torch.zeros(1, 4, 4), torch.ones(1, 4, 4)
    metric.update(([pred], [truth]))
    metric.update(([truth], [truth]))
    assert float(metric.compute()) == pytest.approx(0.5)
