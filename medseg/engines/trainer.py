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
from torch.utils.data import DataLoader

from medseg.engines.checkpoint import Checkpoints
from medseg.engines.inferers import AutocastInferer, has_fast_bfloat16
from medseg.engines.logs import ImageLog, MetricsLog, TerminalProgress, current_loss
from medseg.errors import ConfigError, TrainingError
from medseg.io import atomic_write_text


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
    lr_scheduler: Any | None = None,
    early_stopping: int | None = None,
    ema_momentum: float | None = None,
    amp: bool = False,
    channel_names: Sequence[str] = (),
    statistics: Mapping[str, Any] | None = None,
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
        train_data_loader: batches with the keys `image` (batch, channels, spatial...) and `label`.
        network: maps an image batch to logits.
        optimizer: over the network's parameters.
        loss_function: of logits and labels.
        run_dir: the run folder; it must exist.
        inferer: how the network is called; default: `monai.inferers.SimpleInferer`.
        validator: the evaluator run every `val_interval` iterations and after the last one.
        val_interval: iterations between validations; default: once an epoch.
        lr_scheduler: a torch scheduler, stepped after every iteration.
        early_stopping: stop after this many validations without a better key metric; default: never.
        ema_momentum: keep, validate and save an exponential moving average of the weights, which takes this share of
            the newest ones at each iteration (Polyak and Juditsky 1992), and more during the first 1 / ema_momentum
            iterations, so that the first weights are soon forgotten; default: none.
        amp: bfloat16 autocast on devices that compute it natively; elsewhere on CUDA, float16 with loss scaling;
            elsewhere float32.
        channel_names: names of the input channels, for TensorBoard.
        statistics: what the images are normalized with, as :func:`medseg.data.training_statistics` returned it; it is
            written to `statistics.json` and into every checkpoint, where :func:`medseg.engines.load_statistics` finds
            it.
        postprocessing: for the key metric on training data.
        key_train_metric: one metric on training data, by name.
        train_handlers: further handlers with an `attach` method.
        kwargs: further arguments of `monai.engines.SupervisedTrainer`.

    Raises:
        ConfigError: if early stopping is asked for without a validator, or the run folder is absent.
        TrainingError: while it runs, when the loss is no longer a finite number.
    """
    if early_stopping is not None and validator is None:
        raise ConfigError("early_stopping: found no validator, expected one, because it watches the validator's metric")
    if not Path(run_dir).is_dir():
        raise ConfigError(f"run_dir: {run_dir} is no folder; make one with medseg.experiments.new_run")
    bfloat16 = amp and has_fast_bfloat16(device)
    inferer = inferer or SimpleInferer()
    trainer = SupervisedTrainer(
        device=device,
        max_epochs=max_epochs,
        train_data_loader=train_data_loader,
        network=network,
        optimizer=optimizer,
        loss_function=loss_function,
        inferer=AutocastInferer(inferer) if bfloat16 else inferer,
        postprocessing=postprocessing,
        key_train_metric=key_train_metric,
        amp=amp and not bfloat16 and torch.device(device).type == "cuda",
        decollate=postprocessing is not None or key_train_metric is not None,
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
    if lr_scheduler is not None:
        LrScheduleHandler(lr_scheduler, print_lr=False, epoch_level=False).attach(trainer)

    if dist.is_initialized() and validator is not None:
        # Each process has seen other batches, so each has other running statistics; rank 0's are saved.
        validator.add_event_handler(Events.STARTED, _take_buffers_of_rank_0, model)
    if not dist.is_initialized() or dist.get_rank() == 0:
        parts = {"model": model, "optimizer": optimizer}
        if lr_scheduler is not None:
            parts["lr_scheduler"] = lr_scheduler
        if ema_momentum is not None:
            parts["trained_model"] = network
        values: dict[str, Any] = {}
        if statistics is not None:
            values["statistics"] = dict(statistics)
            atomic_write_text(Path(run_dir) / "statistics.json", json.dumps(values["statistics"], indent=1) + "\n")
        log = MetricsLog(run_dir, trainer, optimizer)
        progress = TerminalProgress(trainer, max_epochs * trainer.state.epoch_length)
        for handler in (log, progress, Checkpoints(run_dir, trainer, parts, **values)):
            handler.attach(validator)
        if validator is not None:
            ImageLog(log, channel_names).attach(validator)

        def close(engine: Engine, error: BaseException) -> None:
            log.close()
            progress.close()
            raise error

        trainer.add_event_handler(Events.EXCEPTION_RAISED, close)

    if validator is not None:
        interval = val_interval or trainer.state.epoch_length
        ValidationHandler(interval, validator, epoch_level=False).attach(trainer)
        if early_stopping is not None:
            stop = EarlyStopping(
                early_stopping, lambda engine: engine.state.metrics[engine.state.key_metric_name], trainer
            )
            validator.add_event_handler(Events.COMPLETED, stop)

        @trainer.on(Events.EPOCH_COMPLETED)
        def validate_the_end(engine: Engine) -> None:
            if engine.state.epoch == engine.state.max_epochs and engine.state.iteration % interval:
                validator.run(engine.state.epoch)

    return trainer


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
