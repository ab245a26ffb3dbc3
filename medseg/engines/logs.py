"""What a training run writes down while it runs: metrics.csv, TensorBoard events, and a line on the terminal."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from monai.utils import CommonKeys
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter


def current_loss(trainer: Engine) -> float:
    """Return the loss of the iteration that a trainer has just done, whether its output was decollated or not."""
    output = trainer.state.output
    # decollation has made a number of it
    return torch.as_tensor((output[0] if isinstance(output, list) else output)[CommonKeys.LOSS]).item()


class MetricsLog:
    """Append to `metrics.csv` and to the TensorBoard events of a run folder.

    The file has a row per number: iteration, epoch, phase (train or val), name, value. Per training iteration it holds
    the loss and the learning rate; per validation, every metric of the validator.

    Args:
        run_dir: the run folder.
        trainer: the trainer.
        optimizer: the optimizer whose learning rate is logged.
    """

    def __init__(self, run_dir: Path | str, trainer: Engine, optimizer: torch.optim.Optimizer) -> None:
        self.path, self.trainer, self.optimizer = Path(run_dir) / "metrics.csv", trainer, optimizer
        self.writer = SummaryWriter(str(Path(run_dir) / "events"))
        self.rows: list[tuple[int, int, str, str, float]] = []
        if not self.path.exists():
            self.path.write_text("iteration,epoch,phase,name,value\n")

    def attach(self, validator: Engine | None) -> None:
        """Log every training iteration and every validation."""
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self.iteration)
        if validator is not None:
            validator.add_event_handler(Events.COMPLETED, self.validated)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.flush)
        self.trainer.add_event_handler(Events.COMPLETED, self.close)

    def add(self, phase: str, name: str, value: float) -> None:
        """Note one number of the trainer's current iteration."""
        state = self.trainer.state
        self.rows.append((state.iteration, state.epoch, phase, name, value))
        self.writer.add_scalar(f"{name}/{phase}", value, state.iteration)

    def iteration(self, trainer: Engine) -> None:
        """Note loss and learning rate."""
        self.add("train", "loss", current_loss(trainer))
        self.add("train", "learning_rate", float(self.optimizer.param_groups[0]["lr"]))

    def validated(self, validator: Engine) -> None:
        """Note the validator's metrics."""
        for name, value in validator.state.metrics.items():
            self.add("val", name, float(value))
        self.flush()

    def flush(self) -> None:
        """Write down what was noted."""
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows(self.rows)
        self.rows.clear()
        self.writer.flush()

    def close(self) -> None:
        """Write down the rest."""
        self.flush()
        self.writer.close()


class ImageLog:
    """Show TensorBoard one image per input channel, the prediction and the truth, at every validation.

    The slice is the one with the most truth in the first sample of the first batch; of a volume, along its last axis.

    Args:
        log: the run's metrics log, whose writer and iteration are used.
        channel_names: names of the input channels.
    """

    def __init__(self, log: MetricsLog, channel_names: Sequence[str] = ()) -> None:
        self.log, self.channel_names = log, list(channel_names)

    def attach(self, validator: Engine) -> None:
        """Show the first batch of each validation."""
        validator.add_event_handler(Events.ITERATION_COMPLETED, self.show)

    def show(self, validator: Engine) -> None:
        """Write the images of the validation's first sample."""
        if validator.state.iteration != 1:
            return
        output = validator.state.output
        sample = output[0] if isinstance(output, list) else {k: v[0] for k, v in output.items()}
        image, label, pred = (
            torch.as_tensor(sample[k]).detach().float().cpu()
            for k in (CommonKeys.IMAGE, CommonKeys.LABEL, CommonKeys.PRED)
        )
        if image.ndim == 4:
            best = int(label[-1].sum((0, 1)).argmax())
            image, label, pred = (x[..., best] for x in (image, label, pred))
        names = self.channel_names if len(self.channel_names) == len(image) else [str(i) for i in range(len(image))]
        planes: dict[str, torch.Tensor] = {f"input/{n}": image[i] for i, n in enumerate(names)}
        planes |= {"prediction": pred.amax(0) if len(pred) == 1 else pred.argmax(0).float()}
        planes |= {"truth": label.amax(0) if len(label) == 1 else label.argmax(0).float()}
        for name, plane in planes.items():
            low, high = plane.min(), plane.max()
            shown = (plane - low) / (high - low) if high > low else torch.zeros_like(plane)
            # arrays are x, y; pictures are rows from the top
            self.log.writer.add_image(name, shown.T.flip(0)[None], self.log.trainer.state.iteration)


class TerminalProgress:
    """A progress bar with the time left, and a line per validation.

    Where the terminal is none (a log file), only the lines are written.

    Args:
        trainer: the trainer.
        max_iterations: iterations of the whole training.
    """

    def __init__(self, trainer: Engine, max_iterations: int) -> None:
        self.trainer, self.max_iterations = trainer, max_iterations
        console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("training", total=max_iterations, loss=float("nan"))

    def attach(self, validator: Engine | None) -> None:
        """Follow the trainer and the validator."""
        trainer = self.trainer
        trainer.add_event_handler(Events.STARTED, lambda engine: self.progress.start())
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.iteration)
        trainer.add_event_handler(Events.COMPLETED, self.close)
        if validator is not None:
            validator.add_event_handler(Events.COMPLETED, self.validated)

    def iteration(self, trainer: Engine) -> None:
        """Move the bar on."""
        self.progress.update(self.task, completed=trainer.state.iteration, loss=current_loss(trainer))

    def validated(self, validator: Engine) -> None:
        """Print the metrics."""
        metrics = ", ".join(f"{name} {float(value):.4f}" for name, value in validator.state.metrics.items())
        state = self.trainer.state
        self.progress.console.print(
            f"iteration {state.iteration}/{self.max_iterations}, epoch {state.epoch}: {metrics}"
        )

    def close(self) -> None:
        """Give the terminal back."""
        self.progress.stop()
