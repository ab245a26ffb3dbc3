"""The trainer of a segmentation network, built from parts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping, EMAHandler
from monai.engines import Evaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler
from monai.inferers import Inferer, SimpleInferer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.utils.data import DataLoader

from medseg.data import SeededLoader
from medseg.engines.checkpoint import Checkpoints, key_score
from medseg.engines.inferers import AutocastInferer, has_fast_bfloat16
from medseg.engines.logs import ImageLog, MetricsLog, TerminalProgress, current_loss
from medseg.errors import ConfigError, TrainingError
from medseg.io import atomic_write_text

#: They compute each rate from the first one and the count of iterations, whatever another schedule did to it.
_ALONE = (CosineAnnealingWarmRestarts, CyclicLR, LambdaLR, OneCycleLR, SequentialLR)


def segmentation_trainer(
    device: torch.device | str,
    max_epochs: int,
    train_data_loader: DataLoader,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_function: Callable,
    run_dir: Path | str,
    inferer: Inferer | None = None,
    validator: Evaluator | None = None,
    val_interval: int | None = None,
    lr_scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
    early_stopping: int | None = None,
    ema_momentum: float | None = None,
    amp: bool = False,
    accumulation_steps: int = 1,
    channel_names: Sequence[str] = (),
    statistics: Mapping[str, Any] | None = None,
    snapshots: Sequence[int] | str = (),
    postprocessing: Callable | None = None,
    key_train_metric: dict[str, Any] | None = None,
    train_handlers: Sequence[Any] = (),
    **kwargs: Any,
) -> SupervisedTrainer:
    """Return a MONAI `SupervisedTrainer` that validates, logs and keeps checkpoints as every experiment does.

    The run folder gets `metrics.csv`, TensorBoard `events/`, `model_last.pt` and, by the validator's key metric,
    `model_best.pt`; the terminal gets a progress bar with the time left. In a distributed run only rank 0 writes.

    Args:
        device: where the network is.
        max_epochs: passes over the training data.
        train_data_loader: batches with the keys `image` (batch, channels, spatial...) and `label`. Where the batches of
            a :class:`medseg.data.SeededLoader` grow, each epoch has as many iterations as it has batches.
        network: maps an image batch to logits.
        optimizer: over the network's parameters.
        loss_function: of logits and labels.
        run_dir: the run folder; it must exist, and hold no training: one that was stopped cannot be taken up again.
        inferer: how the network is called; default: `monai.inferers.SimpleInferer`.
        validator: the evaluator run every `val_interval` iterations and after the last one.
        val_interval: iterations between validations; default: once an epoch.
        lr_scheduler: a torch scheduler, or several that multiply their factors. Each is stepped after every iteration;
            but a `ReduceLROnPlateau` is stepped after every validation, with the validator's key metric. Schedules that
            compute a rate from the first one (restarts, one cycle, cyclic, lambda, sequential) stand alone.
        early_stopping: stop after this many validations without a better key metric; default: never.
        ema_momentum: keep, validate and save an exponential moving average of the weights, which takes this share of
            the newest ones at each iteration (Polyak and Juditsky 1992), and more during the first 1 / ema_momentum
            iterations, so that the first weights are soon forgotten; default: none.
        amp: bfloat16 autocast on devices that compute it natively; elsewhere on CUDA, float16 with loss scaling;
            elsewhere float32.
        accumulation_steps: batches whose gradients are added up before a step; default: a step for each.
        channel_names: names of the input channels, for TensorBoard.
        statistics: what the images are normalized with, as :func:`medseg.data.training_statistics` returned it; it is
            written to `statistics.json` and into every checkpoint, where :func:`medseg.engines.load_statistics` finds
            it.
        snapshots: iterations after which `model_snapshot_ITERATION.pt` is kept for an ensemble, or `"restarts"`: at
            every warm restart of the schedule, see :class:`Checkpoints`.
        postprocessing: for the key metric on training data.
        key_train_metric: one metric on training data, by name.
        train_handlers: further handlers with an `attach` method.
        kwargs: further arguments of `monai.engines.SupervisedTrainer`.

    Raises:
        ConfigError: if early stopping or a `ReduceLROnPlateau` has no validator to watch, or the latter waits for a
            smaller metric; if of several schedules one would undo the others; if the run folder is absent or holds a
            training; if there is nothing to train or to validate with; if batches grow where gradients are accumulated
            or `epoch_length` is given; for numbers that cannot be.
        TrainingError: while it runs, when the loss is no longer a finite number.
    """
    if early_stopping is not None and validator is None:
        raise ConfigError("early_stopping: found no validator, expected one, because it watches the validator's metric")
    for name, count in (("val_interval", val_interval), ("early_stopping", early_stopping), ("max_epochs", max_epochs)):
        if count is not None and count < 1:
            raise ConfigError(f"{name}: found {count}, expected at least 1")
    if ema_momentum is not None and not 0 < ema_momentum < 1:
        raise ConfigError(f"ema_momentum: found {ema_momentum}, expected a number between 0 and 1")
    writes = not dist.is_initialized() or dist.get_rank() == 0
    if not Path(run_dir).is_dir():
        raise ConfigError(f"run_dir: {run_dir} is no folder; make one with medseg.experiments.new_run")
    if writes and (Path(run_dir) / "metrics.csv").exists():
        raise ConfigError(
            f"run_dir: {run_dir} holds a training already, expected a new folder, because a training that was stopped "
            "cannot be taken up again; make one with medseg.experiments.new_run"
        )
    if validator is not None:
        _check_validator(validator)
    schedulers = list(lr_scheduler) if isinstance(lr_scheduler, Sequence) else [lr_scheduler] if lr_scheduler else []
    if len(schedulers) > 1:
        for scheduler in schedulers:
            if isinstance(scheduler, _ALONE):
                raise ConfigError(
                    f"lr_scheduler: found {type(scheduler).__name__} beside another, which it would undo, because it "
                    "computes each rate from the first one; put one after the other with SequentialLR"
                )
    trainer = bare_trainer(
        device=device,
        max_epochs=max_epochs,
        train_data_loader=train_data_loader,
        network=network,
        optimizer=optimizer,
        loss_function=loss_function,
        inferer=inferer,
        amp=amp,
        accumulation_steps=accumulation_steps,
        postprocessing=postprocessing,
        key_train_metric=key_train_metric,
        train_handlers=list(train_handlers),
        **kwargs,
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, _refuse_nan)
    model: torch.nn.Module = network
    if ema_momentum is not None:
        bare = network.module if isinstance(network, DistributedDataParallel) else network
        warmup = round(1 / ema_momentum)
        average = EMAHandler(bare, ema_momentum, momentum_warmup=1.0, warmup_iters=warmup, handle_buffers="copy")
        average.attach(trainer)
        model = average.ema_model
        if validator is not None:
            validator.network = model
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            _step_after_validations(scheduler, validator)  # before the checkpoint of a validation is kept

    if dist.is_initialized() and validator is not None:
        # Each process has seen other batches, so each has other running statistics; rank 0's are saved.
        validator.add_event_handler(Events.STARTED, _take_buffers_of_rank_0, model)
    if writes:
        parts = {"model": model, "optimizer": optimizer}
        for number, scheduler in enumerate(schedulers):
            parts["lr_scheduler" if len(schedulers) == 1 else f"lr_scheduler_{number}"] = scheduler
        if ema_momentum is not None:
            parts["trained_model"] = network
        values = {} if statistics is None else {"statistics": dict(statistics)}
        checkpoints = Checkpoints(run_dir, trainer, parts, snapshots, **values)
        iterations = max_epochs * trainer.state.epoch_length
        if _grows(train_data_loader):
            iterations = train_data_loader.iterations(max_epochs)
        if not isinstance(snapshots, str) and (never := set(snapshots) - set(range(1, iterations + 1))):
            raise ConfigError(
                f"snapshots: found {min(never)}, expected iterations from 1 to {iterations}, with which it ends"
            )
        # what can fail has been done: from here on there are files
        log = MetricsLog(run_dir, trainer, optimizer)
        log.attach(validator)
    for scheduler in schedulers:
        if not isinstance(scheduler, ReduceLROnPlateau):
            # after the log has noted the rate of an iteration, and before a checkpoint of it is kept
            LrScheduleHandler(scheduler, print_lr=False, epoch_level=False).attach(trainer)
    if writes:
        if statistics is not None:
            atomic_write_text(Path(run_dir) / "statistics.json", json.dumps(dict(statistics), indent=1) + "\n")
        progress = TerminalProgress(trainer, iterations)
        for handler in (progress, checkpoints):
            handler.attach(validator)
        if validator is not None:
            ImageLog(log, channel_names).attach(validator)

        def close(engine: Engine, error: BaseException) -> None:
            log.close()
            progress.close()
            raise error

        trainer.add_event_handler(Events.EXCEPTION_RAISED, close)

    if validator is not None:
        ValidationHandler(val_interval or 1, validator, epoch_level=not val_interval).attach(trainer)
        if early_stopping is not None:
            validator.add_event_handler(Events.COMPLETED, EarlyStopping(early_stopping, key_score, trainer))

        @trainer.on(Events.EPOCH_COMPLETED)
        def validate_the_end(engine: Engine) -> None:
            if val_interval and engine.state.epoch == engine.state.max_epochs and engine.state.iteration % val_interval:
                validator.run(engine.state.epoch)

    return trainer


def bare_trainer(
    device: torch.device | str,
    train_data_loader: DataLoader,
    inferer: Inferer | None = None,
    amp: bool = False,
    postprocessing: Callable | None = None,
    key_train_metric: dict[str, Any] | None = None,
    **kwargs: Any,
) -> SupervisedTrainer:
    """Return a MONAI `SupervisedTrainer` in the precision that `amp` chooses, for batches that may grow; no more."""
    bfloat16 = amp and has_fast_bfloat16(device)
    inferer = inferer or SimpleInferer()
    trainer = SupervisedTrainer(
        device=device,
        train_data_loader=train_data_loader,
        inferer=AutocastInferer(inferer) if bfloat16 else inferer,
        postprocessing=postprocessing,
        key_train_metric=key_train_metric,
        amp=amp and not bfloat16 and torch.device(device).type == "cuda",
        decollate=postprocessing is not None or key_train_metric is not None,
        **kwargs,
    )
    shortest = trainer.state.epoch_length
    if _grows(train_data_loader):
        for name, plain in (("accumulation_steps", 1), ("epoch_length", None)):
            if kwargs.get(name, plain) != plain:
                raise ConfigError(
                    f"{name}: found {kwargs[name]} with batches that grow; use one or the other, because MONAI takes "
                    "all epochs for equally long there"
                )
        lengths = [
            train_data_loader.iterations(n + 1) - train_data_loader.iterations(n)
            for n in range(len(train_data_loader.batch_sizes))
        ]
        longest, shortest = max(lengths), min(lengths)

        # Ignite ends an epoch after `epoch_length` iterations, and the training after `max_epochs` times as many.
        @trainer.on(Events.EPOCH_STARTED)
        def take_length_of_this_epoch(engine: Engine) -> None:
            engine.state.epoch_length = len(train_data_loader)

        @trainer.on(Events.EPOCH_COMPLETED)
        def do_not_end_early(engine: Engine) -> None:
            engine.state.epoch_length = longest

    if shortest == 0:
        raise ConfigError("train_data_loader: found an epoch without a batch, expected one; look at the training set")
    return trainer


def _grows(loader: DataLoader) -> bool:
    return isinstance(loader, SeededLoader) and len(set(loader.batch_sizes)) > 1


def _check_validator(validator: Evaluator) -> None:
    if validator.state.key_metric_name is None:
        raise ConfigError("validator: found no key metric, expected one by which checkpoints are compared")
    if validator.state.epoch_length == 0:
        raise ConfigError("validator: found nothing to validate with, expected one batch at least")


def _step_after_validations(scheduler: ReduceLROnPlateau, validator: Evaluator | None) -> None:
    if validator is None:
        raise ConfigError(
            "lr_scheduler: found a ReduceLROnPlateau without a validator, expected one, because it watches the "
            "validator's key metric"
        )
    if scheduler.mode != "max":
        raise ConfigError(
            f"lr_scheduler: found a ReduceLROnPlateau with mode {scheduler.mode!r}, expected 'max', because it watches "
            f"{validator.state.key_metric_name}, which is better where it is greater; add mode: max"
        )
    LrScheduleHandler(scheduler, print_lr=False, step_transform=key_score).attach(validator)


def _take_buffers_of_rank_0(model: torch.nn.Module) -> None:
    """Validate in every process the network that rank 0 saves."""
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)


def _refuse_nan(trainer: Engine) -> None:
    """End the training where its loss is no longer a number, before a checkpoint of it is kept."""
    loss = current_loss(trainer)
    if not math.isfinite(loss):
        raise TrainingError(
            f"iteration {trainer.state.iteration}: the loss is {loss}, expected a finite number; "
            "lower the learning rate, or look for NaN in the images with data_prep check"
        )
