"""The range test finds the rates that are known for problems whose answer is known."""

import math
from itertools import chain

import numpy as np
import pytest
import torch
from monai.inferers import SimpleInferer
from torch import nn

from medseg.data import SeededDataset, SeededLoader
from medseg.engines import learning_rate_range
from medseg.engines.learning_rate_range import find_rates
from medseg.errors import ConfigError, TrainingError
from medseg.experiments.learning_rate import learning_rate_figure

CURVATURE = 20.0


class Point(nn.Module):
    """A network that is two numbers, whatever it is shown."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self, image):
        return self.position.expand(len(image), 2)


def bowl(prediction, label):
    """A parabola with its lowest point at 0: gradient descent trains on it with rates up to 2 / CURVATURE."""
    return 0.5 * CURVATURE * prediction.square().sum(1).mean()


def loader(n=6, batch_size=2):
    samples = [{"image": torch.full((1, 2, 2), float(i)), "label": torch.zeros(1, 2, 2)} for i in range(n)]
    return SeededLoader(SeededDataset(samples), batch_size)


def run(network=None, loss=bowl, optimizer=None, data=None, **kwargs):
    network = network or Point()
    optimizer = optimizer or torch.optim.SGD(network.parameters(), lr=0.01)
    return learning_rate_range("cpu", loader() if data is None else data, network, optimizer, loss, **kwargs)


def test_the_highest_rate_that_trains_on_a_parabola_is_found():
    found = run(start=1e-5, end=10.0, iterations=200)
    assert found.diverged
    assert len(found.rates) < 200
    limit = 2 / CURVATURE
    assert limit / 4 < found.highest < limit * 2
    assert limit / 300 < found.steepest < found.highest


def test_where_the_loss_falls_to_the_end_the_end_is_the_highest():
    found = run(start=1e-5, end=0.02, iterations=100)
    assert not found.diverged
    np.testing.assert_allclose(found.rates, np.geomspace(1e-5, 0.02, 100))
    assert found.highest == found.rates[-1]


def test_the_losses_are_those_of_training_at_these_rates():
    found = run(start=1e-4, end=1e-2, iterations=60)
    position, expected = np.array([1.0, -2.0]), []
    for rate in np.geomspace(1e-4, 1e-2, 60):
        expected.append(0.5 * CURVATURE * (position**2).sum())
        position = position - rate * CURVATURE * position
    np.testing.assert_allclose(found.losses, expected, rtol=1e-4)


def test_groups_keep_their_ratios():
    network = nn.ModuleDict({"a": Point(), "b": Point()})
    seen = []

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = network

        def forward(self, image):
            seen.append([group["lr"] for group in optimizer.param_groups])
            return self.parts["a"](image) + self.parts["b"](image)

    both = Both()
    optimizer = torch.optim.SGD(
        [{"params": network["a"].parameters(), "lr": 0.1}, {"params": network["b"].parameters(), "lr": 0.02}]
    )
    run(both, optimizer=optimizer, start=1e-4, end=1e-2, iterations=50)
    np.testing.assert_allclose(seen, np.geomspace(1e-4, 1e-2, 50)[:, None] * [1, 0.2])


def test_iterations_are_those_of_a_training():
    """Through the inferer, in train mode, with new epochs of the loader, each sample once in each."""
    images = []

    class Inferer(SimpleInferer):
        def __call__(self, inputs, network, *args, **kwargs):
            assert network.training
            images.append(inputs[:, 0, 0, 0].int().tolist())
            return super().__call__(inputs, network, *args, **kwargs)

    run(inferer=Inferer(), start=1e-6, end=1e-5, iterations=51)
    assert len(images) == 51
    epochs = [[*chain(*images[i : i + 3])] for i in range(0, 51, 3)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("breaks", [False, True])
def test_network_optimizer_and_random_numbers_are_as_they_were(breaks):
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Conv2d(2, 1, 1))
    network[1].eval()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    try:
        run(
            network,
            optimizer=optimizer,
            loss=lambda p, t: (p - 1).square().mean() * (float("nan") if breaks else 1),
            iterations=50,
        )
        assert not breaks
    except TrainingError:
        assert breaks
    assert torch.rand(1) == expected
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name])
    assert [layer.training for layer in network] == [True, False, True, True]
    assert optimizer.state_dict()["state"] == {}
    assert optimizer.param_groups[0]["lr"] == 0.003


@pytest.mark.parametrize("diverged", [False, True])
def test_the_figure_says_where_the_loss_broke_out(diverged):
    rates = np.geomspace(1e-5, 0.3, 60)
    found = find_rates(rates, curve(rates), diverged=diverged)
    legend = [text.get_text() for text in learning_rate_figure(found).axes[0].get_legend().get_texts()]
    assert ("the loss broke out: 3.0e-01" in legend) == diverged


def curve(rates):
    """Falls by 0.7 around a rate of 0.001, and rises above 0.1."""
    return 1 - 0.7 / (1 + (1e-3 / rates) ** 2) + np.where(rates > 0.1, 0.5 * np.log10(rates / 0.1), 0)


def test_a_known_curve_in_noise_is_read_at_the_right_places():
    rates = np.geomspace(1e-6, 1, 181)
    noise = np.random.default_rng(3).normal(0, 0.03, rates.shape)
    found = find_rates(rates, curve(rates) + noise)
    assert 5e-4 < found.steepest < 2e-3
    assert 2e-3 < found.highest < 0.15
    np.testing.assert_allclose(found.smoothed, curve(rates), atol=0.08)


def test_a_second_fall_after_the_loss_has_stopped_falling_does_not_count():
    """A Dice loss that is bounded comes back down where the rate is far too high."""
    rates = np.geomspace(1e-6, 1, 181)
    losses = curve(rates) - np.where(rates > 0.3, np.log10(rates / 0.3), 0)
    assert losses.argmin() == 180
    found = find_rates(rates, losses)
    assert 5e-3 < found.highest < 0.15
    assert 5e-4 < found.steepest < 2e-3


def test_what_breaks_out_casts_no_shadow_on_lower_rates():
    rates = np.geomspace(1e-6, 1, 181)
    losses = curve(rates)
    wild = losses.copy()
    wild[rates > 0.3] = 1e30
    calm, found = find_rates(rates, losses), find_rates(rates, wild)
    assert found.steepest == calm.steepest
    assert abs(math.log10(found.highest / calm.highest)) < 0.3


@pytest.mark.parametrize("n", [60, 200])
def test_no_rate_is_suggested_where_nothing_is_learned(n):
    noises = [np.random.default_rng(seed).normal(1, 0.1, n) for seed in range(20)]
    for losses in [np.ones(n), np.linspace(1, 2, n), *noises]:
        found = find_rates(np.geomspace(1e-6, 1, n), losses)
        assert found.steepest is None
        assert found.highest is None


def test_a_loss_that_is_no_number_ends_the_test():
    seen = []

    def loss(prediction, label):
        seen.append(1)
        return bowl(prediction, label) * (1 if len(seen) < 71 else float("nan"))

    found = run(loss=loss, start=1e-5, end=1e-2, iterations=100)
    assert found.diverged
    assert len(found.losses) == 70
    assert np.isfinite(found.smoothed).all()
    with pytest.raises(
        TrainingError,
        match=r"iteration 1: the loss broke out at the learning rate 1.0e-06, before there was anything to see",
    ):
        run(loss=lambda p, t: bowl(p, t) * float("inf"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"start": 0.1, "end": 0.01}, "learning rates: found 0.1 to 0.01, expected two above 0, the second larger"),
        ({"start": 0.0}, "learning rates: found 0.0"),
        ({"end": math.inf}, "to inf"),
        ({"iterations": 3}, "iterations: found 3, expected at least 50"),
    ],
)
def test_ranges_that_cannot_be_are_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        run(**kwargs)


def test_a_loader_without_data_is_refused():
    with pytest.raises(ConfigError, match="train_data_loader: found an epoch without a batch"):
        run(data=loader(n=0))


def test_an_optimizer_that_stands_still_is_refused():
    network = Point()
    with pytest.raises(ConfigError, match=r"found a learning rate of 0\.0, expected one above 0"):
        run(network, optimizer=torch.optim.SGD(network.parameters(), lr=0.0))
