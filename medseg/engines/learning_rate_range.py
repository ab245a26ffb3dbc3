"""The learning-rate range test: raise the rate at every iteration, and see where the loss falls and where it breaks."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.inferers import Inferer
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from torch.utils.data import DataLoader

from medseg.engines.logs import TerminalProgress, current_loss
from medseg.engines.trainer import bare_trainer
from medseg.errors import ConfigError, TrainingError

#: The test ends where the mean of a few losses is this many times the mean of the first few.
_DIVERGED = 1.5
#: With fewer, noise passes for a fall.
_FEWEST_ITERATIONS = 50


@dataclass(frozen=True)
class LearningRateRange:
    """What a range test saw, and what follows from it.

    Attributes:
        rates: the learning rate of each iteration.
        losses: its loss, as computed.
        smoothed: the losses, none taken for worse than the worst at the beginning, averaged with their neighbors on
            both sides (a Gaussian over 1/30 of the iterations): so a fall stays at the rate where it was, and what
            breaks out casts no shadow on lower rates.
        diverged: whether the test ended because the loss broke out.
        steepest: the rate where the smoothed loss falls fastest per decade, up to `highest`: a rate to train with.
            None where the loss did not fall by three times its scatter (standard deviation) around the smoothed one.
        highest: the rate where the smoothed loss first stops falling, in the last quarter of its fall: the highest that
            still trains. A loss that is bounded (Dice), or Adam under normalization, may stay level above it.
            None where `steepest` is.
    """

    rates: NDArray[np.float64]
    losses: NDArray[np.float64]
    smoothed: NDArray[np.float64]
    diverged: bool
    steepest: float | None
    highest: float | None


def _beginning(iterations: int) -> int:
    """Return how many iterations at such low rates that nothing happens tell the loss at the beginning."""
    return iterations // 10


def find_rates(rates: NDArray[np.float64], losses: NDArray[np.float64], diverged: bool = False) -> LearningRateRange:
    """Return what follows from the losses at rising rates.

    Args:
        rates: rising, evenly spaced in their logarithm.
        losses: of each, finite.
        diverged: whether the loss broke out after the last.

    Example:
        >>> rates = np.logspace(-6, 0, 121)
        >>> losses = 1 - 0.7 / (1 + (0.001 / rates) ** 2) + np.where(rates > 0.1, 5 * np.log10(rates / 0.1), 0)
        >>> found = find_rates(rates, losses)
        >>> f"{found.steepest:.0e}, {found.highest:.0e}"
        '1e-03, 3e-02'
    """
    first = losses[: _beginning(len(losses))]
    capped = np.minimum(losses, first.max())
    smoothed = gaussian_filter1d(capped, max(len(losses) / 30, 1.0), mode="nearest")
    lowest = int(smoothed.argmin())
    steepest = highest = None
    fall = first.mean() - smoothed[lowest]
    if lowest >= len(first) and fall > max(3 * (capped - smoothed).std(), 1e-6 * abs(first.mean())):
        slope = np.gradient(smoothed, np.log10(rates))
        stops = np.append(np.diff(smoothed) >= 0, True) & (smoothed <= smoothed[lowest] + fall / 4)
        last = int(stops.argmax())
        steepest, highest = float(rates[slope[: last + 1].argmin()]), float(rates[last])
    return LearningRateRange(rates, losses, smoothed, diverged, steepest, highest)


def check_range(start: float, end: float, iterations: int) -> None:
    """Refuse rates that do not rise, and iterations that are too few."""
    if not 0 < start < end < math.inf:
        raise ConfigError(f"learning rates: found {start} to {end}, expected two above 0, the second larger")
    if iterations < _FEWEST_ITERATIONS:
        raise ConfigError(f"iterations: found {iterations}, expected at least {_FEWEST_ITERATIONS}")


def learning_rate_range(
    device: torch.device | str,
    train_data_loader: DataLoader,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_function: Callable,
    inferer: Inferer | None = None,
    amp: bool = False,
    start: float = 1e-6,
    end: float = 1.0,
    iterations: int = 150,
) -> LearningRateRange:
    """Train while the learning rate rises from `start` to `end` by the same factor at each iteration.

    The iterations are those of :func:`medseg.engines.segmentation_trainer`: same inferer, same precision, a new epoch
    of a seeded loader where one is over. The test ends early where the loss is no finite number, or 1.5 times
    what it was at first. Afterwards network, optimizer and torch's random numbers are as they were; a copy of the
    weights is kept meanwhile.

    MONAI's `LearningRateFinder` calls the network without its inferer and in float32 (its `amp` needs NVIDIA's apex),
    repeats the first epoch of a seeded loader, goes on where the loss is NaN, and smooths with past losses only, which
    moves every rate that it finds upwards.

    Args:
        device: where the network is.
        train_data_loader: batches with the keys `image` (batch, channels, spatial...) and `label`.
        network: maps an image batch to logits.
        optimizer: over the network's parameters. Where its groups have several rates, they keep their ratios, and the
            first group's is told.
        loss_function: of logits and labels.
        inferer: how the network is called; default: `monai.inferers.SimpleInferer`.
        amp: as in the training.
        start: the first learning rate.
        end: the last.
        iterations: how many, at least 50.

    Raises:
        ConfigError: for rates that do not rise, too few iterations, an optimizer whose rate is 0, or no data.
        TrainingError: if the loss breaks out before there is anything to see.

    Source:
        Smith 2017, Cyclical learning rates for training neural networks; exponential, as Gugger 2018 proposed.
    """
    check_range(start, end, iterations)
    first = optimizer.param_groups[0]["lr"]
    if not first > 0:
        raise ConfigError(f"optimizer: found a learning rate of {first}, expected one above 0")
    ratios = [group["lr"] / first for group in optimizer.param_groups]
    rates = np.geomspace(start, end, iterations)
    losses: list[float] = []
    diverged = False
    trainer = bare_trainer(
        device=device,
        max_epochs=iterations,  # more than enough, whatever the length of an epoch
        train_data_loader=train_data_loader,
        network=network,
        optimizer=optimizer,
        loss_function=loss_function,
        inferer=inferer,
        amp=amp,
    )

    @trainer.on(Events.ITERATION_STARTED)
    def raise_the_rate(engine: Engine) -> None:
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
            group["lr"] = float(rates[engine.state.iteration - 1]) * ratio

    @trainer.on(Events.ITERATION_COMPLETED)
    def note_the_loss(engine: Engine) -> None:
        nonlocal diverged
        loss = current_loss(engine)
        diverged = not math.isfinite(loss)
        if not diverged:
            losses.append(loss)
            few = _beginning(iterations)
            diverged = bool(np.mean(losses[-few:]) > _DIVERGED * abs(np.mean(losses[:few])))
        if diverged or engine.state.iteration == iterations:
            engine.terminate()

    progress = TerminalProgress(trainer, iterations)
    progress.attach(None)
    weights, state = deepcopy(network.state_dict()), deepcopy(optimizer.state_dict())
    modes = [(layer, layer.training) for layer in network.modules()]
    try:
        with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
            trainer.run()
    finally:
        progress.close()
        network.load_state_dict(weights)
        optimizer.load_state_dict(state)
        optimizer.zero_grad()
        for layer, mode in modes:
            layer.training = mode
    if len(losses) < _FEWEST_ITERATIONS:
        raise TrainingError(
            f"iteration {trainer.state.iteration}: the loss broke out at the learning rate "
            f"{rates[trainer.state.iteration - 1]:.1e}, before there was anything to see; "
            f"begin at a rate below {start}, take more iterations, or look for NaN in the images with data_prep check"
        )
    return find_rates(rates[: len(losses)], np.array(losses), diverged)
