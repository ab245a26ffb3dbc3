"""Schedules, growing batches and weight decay are those of the published works, and go on after a checkpoint."""

import math
import re
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from monai.data import DataLoader
from monai.transforms import Activationsd, AsDiscreted, Compose
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import Dataset

from medseg.data import SeededDataset, SeededLoader
from medseg.engines import (
    MeanScore,
    kernel_weight_decay,
    save_checkpoint,
    segmentation_evaluator,
    segmentation_trainer,
    time_decay,
)
from medseg.errors import ConfigError
from medseg.losses import FBetaLoss
from medseg.networks import LearnableWindow, UNet

HOW_TO = Path(__file__).parents[2] / "docs/how_to/schedule_the_learning_rate.md"


def optimizer(rate=0.1, kind=torch.optim.SGD, **kwargs):
    return kind([torch.zeros(1, requires_grad=True)], lr=rate, **kwargs)


def rates(scheduler, iterations):
    """The rate of each iteration."""
    found = []
    for _ in range(iterations):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return np.array(found)


def sgdr(iterations, smallest, largest, first, factor):
    """Algorithm 2.7 of the PET/CT thesis and equation 2.51, with the count of iterations added and not multiplied."""
    found, current, period = [], 0, first
    for _ in range(iterations):
        found.append(smallest + 0.5 * (largest - smallest) * (1 + math.cos(math.pi * current / period)))
        current += 1
        if current == period:
            current, period = 0, period * factor
    return np.array(found)


@pytest.mark.parametrize(
    ("smallest", "largest", "first", "factor"),
    [(0, 0.05, 650, 2), (0, 0.05, 10, 2), (0, 0.05, 100, 1), (0.0005, 0.05, 65, 10)],
)
def test_warm_restarts_are_those_of_the_corrected_equation(smallest, largest, first, factor):
    scheduler = schedules.CosineAnnealingWarmRestarts(
        optimizer(largest, momentum=0.9), T_0=first, T_mult=factor, eta_min=smallest
    )
    iterations = 4700 if first == 650 else 700
    np.testing.assert_allclose(rates(scheduler, iterations), sgdr(iterations, smallest, largest, first, factor))


def test_warm_restarts_begin_anew_after_650_and_1950_and_4550_iterations():
    scheduler = schedules.CosineAnnealingWarmRestarts(optimizer(0.05), T_0=650, T_mult=2)
    found = rates(scheduler, 5000)
    assert np.flatnonzero(np.diff(found) > 0).tolist() == [649, 1949, 4549]
    assert found[[0, 650, 1950, 4550]] == pytest.approx(0.05)
    assert found[325] == pytest.approx(0.025)


def test_momentum_is_tensorflows_whose_step_is_the_newest_rate_times_all_that_has_gathered():
    """At a constant rate that is equation 2.5 of the PET/CT thesis too, which keeps the old rates in the memory."""
    gradients, rate_of = [1.0, -2.0, 3.0], [0.1, 0.05, 0.2]
    weight = torch.zeros(1, requires_grad=True)
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    gathered, expected = 0.0, 0.0
    for gradient, rate in zip(gradients, rate_of, strict=True):
        weight.grad = torch.tensor([gradient])
        sgd.param_groups[0]["lr"] = rate
        sgd.step()
        gathered = 0.9 * gathered + gradient
        expected -= rate * gathered
    assert weight.item() == pytest.approx(expected)


def test_time_decay_is_that_of_the_knee_work():
    found = rates(time_decay(optimizer(0.001), 0.001), 9001)
    np.testing.assert_allclose(found, 0.001 / (1 + 0.001 * np.arange(9001)))
    assert found[-1] == pytest.approx(1e-4)
    for decay in (-1, math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"decay: found {decay}"):
            time_decay(optimizer(), decay)


def test_groups_keep_their_own_rates():
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in (0.1, 0.02)]
    scheduler = time_decay(torch.optim.SGD(groups), 0.5)
    scheduler.optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.1 / 1.5, 0.02 / 1.5])


def test_polynomial_decay_falls_to_zero():
    found = rates(schedules.PolynomialLR(optimizer(0.1), total_iters=50, power=2.0), 60)
    np.testing.assert_allclose(found, 0.1 * np.clip(1 - np.arange(60) / 50, 0, None) ** 2, atol=1e-15)


@pytest.mark.parametrize("staircase", [False, True])
def test_exponential_decay_is_that_of_equations_2_48_to_2_50(staircase):
    """Rate 0.1 * rho ^ xi, where xi is the number of epochs done, rounded down on a staircase."""
    rho, length = 0.7, 13
    if staircase:
        scheduler = schedules.StepLR(optimizer(0.1), step_size=length, gamma=rho)
    else:
        scheduler = schedules.ExponentialLR(optimizer(0.1), gamma=rho ** (1 / length))
    epochs = np.arange(60) / length
    np.testing.assert_allclose(rates(scheduler, 60), 0.1 * rho ** (np.floor(epochs) if staircase else epochs))


def test_warm_up_is_horovods_one_iteration_later():
    """Horovod: rate / size * (epochs * (size - 1) / warm-up epochs + 1), epochs counted at the end of an iteration."""
    size, length, warm = 8, 5, 3
    found = rates(schedules.LinearLR(optimizer(0.4), start_factor=1 / size, total_iters=warm * length), 20)
    epochs = np.minimum((np.arange(20)) / length, warm)
    np.testing.assert_allclose(found, 0.4 / size * (epochs * (size - 1) / warm + 1))
    assert found[0] == pytest.approx(0.05)
    assert found[warm * length :] == pytest.approx(0.4)


def test_plateau_has_keras_patience_with_one_less():
    """Keras lowers the rate with the third validation without a better one for patience 3, torch with the fourth."""
    metric = [0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.7, 0.7, 0.7, 0.7]
    found, wait, best, rate = [], 0, -1.0, 1.0
    for value in metric:  # Keras' ReduceLROnPlateau, mode max
        wait = 0 if value > best + 1e-4 else wait + 1
        best = max(best, value)
        if wait >= 3:
            rate, wait = rate * 0.95, 0
        found.append(rate)
    scheduler = schedules.ReduceLROnPlateau(
        optimizer(1.0), mode="max", factor=0.95, patience=2, threshold=1e-4, threshold_mode="abs"
    )
    ours = []
    for value in metric:
        scheduler.step(value)
        ours.append(scheduler.get_last_lr()[0])
    assert ours == pytest.approx(found)
    assert ours[4] == 0.95


MAKERS = {
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, T_0=7, T_mult=2),
    "time decay": lambda o: time_decay(o, 0.1),
    "polynomial": lambda o: schedules.PolynomialLR(o, total_iters=40, power=0.9),
    "exponential": lambda o: schedules.ExponentialLR(o, gamma=0.9),
    "staircase": lambda o: schedules.StepLR(o, step_size=4, gamma=0.5),
    "one cycle": lambda o: schedules.OneCycleLR(o, max_lr=0.1, total_steps=40),
    "warm-up": lambda o: schedules.LinearLR(o, start_factor=0.1, total_iters=13),
    "warm-up, then restarts": lambda o: schedules.SequentialLR(
        o,
        [schedules.LinearLR(o, start_factor=0.1, total_iters=5), schedules.CosineAnnealingWarmRestarts(o, T_0=6)],
        milestones=[5],
    ),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_schedule_read_from_a_checkpoint_goes_on(make, tmp_path):
    straight = rates(make(optimizer(momentum=0.9)), 30)
    stopped = make(optimizer(momentum=0.9))
    rates(stopped, 11)
    save_checkpoint(tmp_path / "a.pt", {"model": nn.Linear(1, 1), "o": stopped.optimizer, "s": stopped})
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    resumed = make(optimizer(momentum=0.9))
    resumed.optimizer.load_state_dict(content["o"])
    resumed.load_state_dict(content["s"])
    np.testing.assert_allclose(rates(resumed, 19), straight[11:])


def test_a_plateau_read_from_a_checkpoint_goes_on(tmp_path):
    def make():
        return schedules.ReduceLROnPlateau(optimizer(1.0), mode="max", factor=0.5, patience=1)

    first = make()
    for value in (0.5, 0.6, 0.6):
        first.step(value)
    save_checkpoint(tmp_path / "a.pt", {"model": nn.Linear(1, 1), "s": first})
    resumed = make()
    resumed.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True)["s"])
    resumed.step(0.6)
    assert resumed.get_last_lr() == [0.5]


class Squares(Dataset):
    """Slices in which a bright square is to be found."""

    def __init__(self, n=8):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        label = torch.zeros(1, 10, 8)
        label[:, 1 + index % 4 : 5 + index % 4, 2:6] = 1
        return {"image": label - 0.3, "label": label, "index": index}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))


def validator(net):
    return segmentation_evaluator(
        "cpu",
        DataLoader(Squares(4), batch_size=4),
        net,
        postprocessing=Compose([Activationsd("pred", sigmoid=True), AsDiscreted("pred", threshold=0.5)]),
        key_val_metric={"val_dice": MeanScore("dice")},
    )


def trainer(run_dir, net, optim, max_epochs=3, batch_size=4, n=8, with_validator=True, **kwargs):
    run_dir.mkdir(exist_ok=True)
    loader = SeededLoader(SeededDataset(Squares(n), seed=1), batch_size, seed=1)
    return segmentation_trainer(
        "cpu",
        max_epochs,
        loader,
        net,
        optim,
        FBetaLoss(beta=1, sigmoid=True),
        run_dir,
        validator=validator(net) if with_validator else None,
        **kwargs,
    )


def log_of(run_dir, name="learning_rate"):
    log = pd.read_csv(run_dir / "metrics.csv")
    return log[log["name"] == name]


def test_the_log_has_the_rate_that_each_iteration_was_done_with(tmp_path):
    net = network()
    adam = torch.optim.Adam(net.parameters(), 0.01)
    trainer(tmp_path, net, adam, lr_scheduler=time_decay(adam, 0.5)).run()
    assert log_of(tmp_path).value.to_numpy() == pytest.approx(0.01 / (1 + 0.5 * np.arange(6)))


def test_a_plateau_is_stepped_with_the_key_metric_of_every_validation(tmp_path):
    net = network()
    sgd = torch.optim.SGD(net.parameters(), 0.0)  # nothing changes, so no validation is better than the first
    sgd.param_groups[0]["lr"] = 1e-9
    plateau = schedules.ReduceLROnPlateau(sgd, mode="max", factor=0.5, patience=1, eps=0)
    trainer(tmp_path, net, sgd, max_epochs=4, lr_scheduler=plateau, val_interval=1).run()
    dice = log_of(tmp_path, "val_dice").value
    assert len(dice) == 8
    assert dice.nunique() == 1
    assert plateau.best == pytest.approx(dice.iloc[0])
    # lowered by the validations 3, 5 and 7; the log has the rate of the iteration before a validation
    expected = 1e-9 * 0.5 ** np.array([0, 0, 0, 1, 1, 2, 2, 3])
    assert log_of(tmp_path).value.to_numpy() == pytest.approx(expected, rel=1e-6)
    kept = torch.load(tmp_path / "model_last.pt", weights_only=True)["lr_scheduler"]
    assert kept["last_epoch"] == 8
    assert kept["best"] == plateau.best


def test_a_plateau_keeps_the_rate_while_the_metric_rises(tmp_path):
    net = network()
    adam = torch.optim.Adam(net.parameters(), 0.05)
    plateau = schedules.ReduceLROnPlateau(adam, mode="max", factor=0.1, patience=0)
    trainer(tmp_path, net, adam, max_epochs=6, lr_scheduler=plateau).run()
    dice = log_of(tmp_path, "val_dice").value.to_numpy()
    rate, best, expected = 0.05, -math.inf, []
    for value in dice:
        expected += [rate] * 2
        rate, best = (rate, value) if value > best * (1 + 1e-4) else (rate * 0.1, best)
    assert len(set(dice)) > 2
    assert log_of(tmp_path).value.to_numpy() == pytest.approx(expected)


def test_a_warm_up_and_a_plateau_act_together(tmp_path):
    net = network()
    sgd = torch.optim.SGD(net.parameters(), 1e-9)
    warm_up = schedules.LinearLR(sgd, start_factor=0.25, total_iters=3)
    plateau = schedules.ReduceLROnPlateau(sgd, mode="max", factor=0.5, patience=1, eps=0)
    trainer(tmp_path, net, sgd, max_epochs=4, lr_scheduler=[warm_up, plateau]).run()
    # two iterations an epoch; the validation after the third epoch is the second without a better metric
    expected = 1e-9 * np.array([0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0.5])
    assert log_of(tmp_path).value.to_numpy() == pytest.approx(expected, rel=1e-6)
    content = torch.load(tmp_path / "model_last.pt", weights_only=True)
    assert content["lr_scheduler_0"]["last_epoch"] == 8
    assert content["lr_scheduler_1"]["last_epoch"] == 4


def test_a_plateau_that_would_watch_nothing_or_the_wrong_way_is_refused(tmp_path):
    net = network()
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(ConfigError, match="ReduceLROnPlateau without a validator"):
        trainer(tmp_path, net, sgd, lr_scheduler=schedules.ReduceLROnPlateau(sgd, "max"), with_validator=False)
    with pytest.raises(ConfigError, match=r"mode 'min', expected 'max'.*val_dice"):
        trainer(tmp_path, net, sgd, lr_scheduler=schedules.ReduceLROnPlateau(sgd))


@pytest.mark.parametrize(
    "make",
    [
        lambda o: time_decay(o, 0.1),
        lambda o: schedules.CosineAnnealingWarmRestarts(o, T_0=7),
        lambda o: schedules.OneCycleLR(o, max_lr=0.1, total_steps=40),
        lambda o: schedules.CyclicLR(o, 0.01, 0.1),
        lambda o: schedules.SequentialLR(o, [schedules.ConstantLR(o), schedules.LinearLR(o)], milestones=[3]),
    ],
    ids=["time decay", "restarts", "one cycle", "cyclic", "sequential"],
)
def test_schedules_of_which_one_would_undo_the_other_are_refused(make, tmp_path):
    net = network()
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    warm_up = schedules.LinearLR(sgd, start_factor=0.25, total_iters=3)
    with pytest.raises(ConfigError, match="beside another, which it would undo"):
        trainer(tmp_path, net, sgd, lr_scheduler=[warm_up, make(sgd)])


def test_warm_up_and_polynomial_decay_multiply_their_factors():
    sgd = optimizer(0.1)
    both = schedules.LinearLR(sgd, start_factor=0.25, total_iters=4), schedules.PolynomialLR(sgd, total_iters=8)
    found = []
    for _ in range(9):
        found.append(sgd.param_groups[0]["lr"])
        sgd.step()
        for scheduler in both:
            scheduler.step()
    i = np.arange(9)
    np.testing.assert_allclose(found, 0.1 * np.minimum(0.25 + 0.75 * i / 4, 1) * (1 - i / 8), atol=1e-15)


class Seen:
    """Notes which samples each iteration has."""

    def __init__(self):
        self.batches = []

    def attach(self, engine):
        from ignite.engine import Events

        engine.add_event_handler(
            Events.ITERATION_STARTED,
            lambda e: self.batches.append((e.state.epoch, e.state.iteration, e.state.batch["index"].tolist())),
        )


@pytest.mark.parametrize(
    ("sizes", "lengths"),
    [
        ([1, 2, 4], [11, 6, 3, 3, 3]),  # 11 iterations an epoch at first, and 26 in all: fewer than 5 epochs of them
        ([8, 3, 2, 11, 1], [2, 4, 6, 1, 11]),
        ([11, 1], [1, 11, 11, 11, 11]),
        ([4], [3, 3, 3, 3, 3]),
    ],
)
def test_every_epoch_of_a_training_has_each_sample_once_while_batches_grow(tmp_path, sizes, lengths):
    net, seen = network(), Seen()
    adam = torch.optim.Adam(net.parameters(), 0.01)
    run = trainer(tmp_path, net, adam, max_epochs=5, batch_size=sizes, n=11, train_handlers=[seen])
    run.run()
    assert [i for _, i, _ in seen.batches] == list(range(1, sum(lengths) + 1))
    for epoch, length in enumerate(lengths, start=1):
        batches = [b for e, _, b in seen.batches if e == epoch]
        assert len(batches) == length
        assert sorted(chain(*batches)) == list(range(11))
    assert run.state.epoch == 5
    validations = log_of(tmp_path, "val_dice")
    assert validations.iteration.tolist() == np.cumsum(lengths).tolist()
    assert validations.epoch.tolist() == [1, 2, 3, 4, 5]


def test_growing_batches_learn_the_same_with_workers(tmp_path):
    states = []
    for workers in (0, 2):
        net = network()
        adam = torch.optim.Adam(net.parameters(), 0.01)
        loader = SeededLoader(SeededDataset(Squares(7), seed=1), [2, 3], seed=1, num_workers=workers)
        (tmp_path / str(workers)).mkdir()
        segmentation_trainer(
            "cpu", 3, loader, net, adam, FBetaLoss(beta=1, sigmoid=True), tmp_path / str(workers)
        ).run()
        states.append(net.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize(("name", "value"), [("accumulation_steps", 2), ("epoch_length", 3)])
def test_growing_batches_are_refused_with_what_takes_epochs_for_equally_long(tmp_path, name, value):
    net = network()
    adam = torch.optim.Adam(net.parameters(), 0.01)
    with pytest.raises(ConfigError, match=f"{name}: found {value} with batches that grow"):
        trainer(tmp_path, net, adam, batch_size=[2, 4], **{name: value})


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_weight_decay_of_two_gamma_is_the_penalty_of_gamma(kind):
    """Equation 2.37: the loss plus gamma times the squared norm of the kernels, differentiated by autograd."""
    gamma, states = 0.03, []
    image, truth = torch.rand(2, 1, 6, 6), torch.rand(2, 1, 6, 6)
    for explicit in (True, False):
        net = network()
        groups = net.parameters() if explicit else kernel_weight_decay(net, 2 * gamma)
        optim = kind(groups, lr=0.05)
        for _ in range(4):
            loss = (net(image) - truth).square().mean()
            if explicit:
                loss = loss + gamma * (net[0].weight.square().sum() + net[2].weight.square().sum())
            optim.zero_grad()
            loss.backward()
            optim.step()
        states.append(net.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)


def test_adamw_decays_another_way():
    """It shrinks the kernels by lr * weight_decay whatever the gradient is, and leaves the others alone."""
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optim = torch.optim.AdamW(kernel_weight_decay(net, 0.1), lr=0.01)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optim.step()
    for name, value in net.named_parameters():
        kernel = name in ("0.weight", "2.weight")
        torch.testing.assert_close(value.detach(), before[name] * (1 - 0.01 * 0.1 if kernel else 1))


def test_only_kernels_decay():
    net = nn.Sequential(
        LearnableWindow([{"center": 70, "width": 200}]),
        UNet(3, 1, 2, channels=(2, 4)),
        nn.PReLU(4),
        nn.LayerNorm([2, 3, 4]),
        nn.Linear(3, 4),
    )
    decayed, others = kernel_weight_decay(net, 0.1)
    names = {id(p): name for name, p in net.named_parameters()}
    assert {id(p) for p in decayed["params"]} | {id(p) for p in others["params"]} == set(names)
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    layers = dict(net.named_modules())
    for parameter in decayed["params"]:
        layer, _, kind = names[id(parameter)].rpartition(".")
        assert kind == "weight"
        assert type(layers[layer]) in (nn.Conv3d, nn.ConvTranspose3d, nn.Linear)
    kinds = {type(layers[names[id(p)].rpartition(".")[0]]) for p in others["params"] if p.ndim > 1}
    assert kinds <= {nn.LayerNorm}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_a_kernel_that_two_layers_share_decays_once():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    decayed, others = kernel_weight_decay(nn.Sequential(first, second), 0.1)
    assert [len(g["params"]) for g in (decayed, others)] == [1, 1]


def test_networks_without_kernels_of_their_own_are_refused():
    with pytest.raises(ConfigError, match="found no convolution"):
        kernel_weight_decay(nn.Sequential(nn.BatchNorm2d(2)), 0.1)
    for decay in (-0.1, math.nan):
        with pytest.raises(ConfigError, match=f"weight_decay: found {decay}"):
            kernel_weight_decay(nn.Linear(1, 1), decay)
    with pytest.raises(ConfigError, match="the kernel of 0 is computed"):
        kernel_weight_decay(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 3))), 0.1)


def snippets():
    blocks = re.findall(r"```yaml\n(.*?)```", HOW_TO.read_text(), re.DOTALL)
    assert len(blocks) == 9
    return blocks


@pytest.mark.parametrize("number", range(len(snippets())))
def test_what_the_how_to_shows_is_a_config_that_trains(number, tmp_path):
    net = network()
    base = {
        "imports": ["$import medseg"],
        "max_epochs": 3,
        "network": net,
        "optimizer": {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 0.01},
        "train": {
            "dataset": SeededDataset(Squares(), seed=1),
            "dataloader": {"_target_": "medseg.data.SeededLoader", "dataset": "@train#dataset", "batch_size": 4},
        },
        "validate": {"evaluator": validator(net)},
    }
    parser = ConfigParser(base)
    snippet = yaml.safe_load(snippets()[number])
    for name, value in snippet.items():
        parser[name] = value
    run = segmentation_trainer(
        "cpu",
        3,
        parser.get_parsed_content("train#dataloader"),
        net,
        parser.get_parsed_content("optimizer"),
        FBetaLoss(beta=1, sigmoid=True),
        tmp_path,
        validator=base["validate"]["evaluator"],
        lr_scheduler=parser.get_parsed_content("lr_scheduler") if "lr_scheduler" in snippet else None,
    )
    run.run()
    assert run.state.epoch == 3
    assert np.isfinite(log_of(tmp_path).value).all()


def test_the_batch_sizes_of_the_how_to_double_every_tenth_epoch():
    (expression,) = re.findall(r"--train#dataloader#batch_size '(.*?)'", HOW_TO.read_text())
    parser = ConfigParser({"max_epochs": 25, "batch_size": expression})
    assert parser.get_parsed_content("batch_size") == [4] * 10 + [8] * 10 + [16] * 5
