"""Checkpoints: written whole or not at all, read without running anything in them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml
from ignite.engine import Engine, Events
from monai.bundle import ReferenceResolver
from monai.networks.utils import get_state_dict

from medseg.data import check_statistics
from medseg.engines.overrides import running_workflow
from medseg.errors import CheckpointError, ConfigError
from medseg.inference import Ensemble
from medseg.io.atomic import atomic_path


def save_checkpoint(path: Path | str, parts: Mapping[str, Any], **values: Any) -> None:
    """Write the states of `parts` and plain `values` into one file, atomically.

    Args:
        path: the file.
        parts: name and object; of each the `state_dict()` is kept. The network is called `model`.
        values: plain values kept beside them: numbers, words, and lists and dictionaries of these.
    """
    with atomic_path(Path(path)) as temporary:
        torch.save({name: get_state_dict(part) for name, part in parts.items()} | values, temporary)


def load_checkpoint(path: Path | str, network: torch.nn.Module) -> dict[str, Any]:
    """Load the network's weights from a checkpoint, and return all that the file holds.

    Args:
        path: a file written by :func:`save_checkpoint`, or a bare `state_dict`.
        network: the network that takes the weights.

    Raises:
        CheckpointError: if the file is absent, is no checkpoint, or is one of another network.
    """
    path = Path(path)
    content = _read(path)
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()) or not weights:
        raise CheckpointError(f"{path}: found no network weights, expected a state_dict or one under the key 'model'")
    own = network.state_dict()
    odd = sorted(set(own) ^ set(weights)) or [k for k in own if own[k].shape != weights[k].shape]
    if odd:
        raise CheckpointError(
            f"{path}: the weights are of another network ({len(odd)} entries differ, the first is {odd[0]}); "
            "use the configuration that the checkpoint was trained with"
        )
    network.load_state_dict(weights)
    return content


def load_ensemble(
    checkpoint: Path | str | Sequence[Path | str],
    network: torch.nn.Module,
    activation: str,
    mode: str = "mean",
    weights: Sequence[float] | None = None,
) -> torch.nn.Module:
    """Return the network with a checkpoint's weights, or, for a list of checkpoints, an ensemble of them.

    In a bundle, images must come as they came in the training: each number and list that the bundle's `preprocessing`
    depends on (windows, channels) is compared with the `config.yaml` beside the checkpoint, where there is one.

    Args:
        checkpoint: a file, or a list of files of the same architecture: other runs, folds, snapshots in time.
        network: it takes the weights; of a list, a copy of it for each file, on the same device.
        activation: ``"sigmoid"`` or ``"softmax"``.
        mode: ``"mean"`` or ``"vote"``, see :func:`medseg.inference.pool_logits`.
        weights: one for each file of a list; default: all the same.

    Raises:
        CheckpointError: see :func:`load_checkpoint`.
        ConfigError: for an empty list, a file that is in it twice, and as :class:`medseg.inference.Ensemble` does; or
            for images that come otherwise than in the training.
    """
    if isinstance(checkpoint, str | Path):
        load_checkpoint(checkpoint, network)
        _check_inputs(Path(checkpoint))
        return network
    files = [Path(file).resolve() for file in checkpoint]
    if len(set(files)) != len(files):
        raise ConfigError(f"checkpoint: found {', '.join(map(str, checkpoint))}, expected each file once")
    networks = []
    for file in checkpoint:
        networks.append(deepcopy(network))
        load_checkpoint(file, networks[-1])
        _check_inputs(Path(file))
    return Ensemble(networks, activation, mode, weights)


def _check_inputs(checkpoint: Path) -> None:
    """Refuse to show a network images that are prepared with other numbers than those it was trained on."""
    workflow, record = running_workflow(), checkpoint.parent / "config.yaml"
    if workflow is None or not record.is_file():
        return
    trained = yaml.safe_load(record.read_text())
    if not isinstance(trained, dict):
        return
    rest, done = ["preprocessing"], set()
    while rest:
        name = rest.pop()
        done.add(name)
        value = _listed(workflow.parser.get(name))
        words = [word for word in _leaves(value) if isinstance(word, str)]
        plain = name in trained and not any(isinstance(leaf, str) for leaf in _leaves([value, trained[name]]))
        if plain and value != trained[name]:
            raise ConfigError(
                f"{name}: found {value}, but {checkpoint} was trained with {trained[name]}, as {record} says; "
                f"give it the same --{name}"
            )
        rest += [other for word in words for other in ReferenceResolver.match_refs_pattern(word) if other not in done]


def _listed(config: Any) -> Any:
    """Return a config with lists for tuples, as its record has it."""
    if isinstance(config, dict):
        return {key: _listed(value) for key, value in config.items()}
    return [_listed(value) for value in config] if isinstance(config, list | tuple) else config


def _leaves(config: Any) -> list[Any]:
    parts = config.values() if isinstance(config, dict) else config if isinstance(config, list) else None
    return [config] if parts is None else [leaf for part in parts for leaf in _leaves(part)]


def load_statistics(
    path: Path | str, dataset_dir: str | os.PathLike[str] | None = None, fold: int = 0
) -> dict[str, Any]:
    """Return the statistics of the training set that a network was trained with, from its checkpoint.

    An inference normalizes with these, wherever it runs; the dataset that was trained on is not needed.

    Args:
        path: a checkpoint of a training whose trainer was given `statistics`.
        dataset_dir: the dataset trained on, where another part of it is scored; they must then be statistics of it.
        fold: the fold of that dataset.

    Returns:
        as :func:`medseg.data.training_statistics` gave them to the training.

    Raises:
        CheckpointError: if the file is absent, is no checkpoint, or holds no statistics.
        LeakageError: if they are of another dataset, split or fold.
    """
    content = _read(Path(path))
    statistics = content.get("statistics") if isinstance(content, dict) else None
    if not isinstance(statistics, dict):
        raise CheckpointError(
            f"{path}: found no statistics of a training set, expected those its images were normalized with; give "
            "segmentation_trainer its `statistics` and train again"
        )
    if dataset_dir is not None:
        check_statistics(statistics, dataset_dir, fold)
    return statistics


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, expected a checkpoint; name one with --checkpoint FILE")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler and zip reader meet
        raise CheckpointError(
            f"{path}: found {path.stat().st_size} bytes that are no checkpoint, expected a file written by medseg "
            "or torch.save(state_dict); name the right file"
        ) from error


def key_score(validator: Engine) -> float:
    """Return the validator's key metric; one without a value (NaN) is worse than any that has one."""
    score = float(validator.state.metrics[validator.state.key_metric_name])
    return -math.inf if math.isnan(score) else score


class Checkpoints:
    """Keep `model_last.pt` and, by the validator's key metric, `model_best.pt` in the run folder.

    Snapshots in time, for an ensemble (Huang et al. 2017), are `model_snapshot_ITERATION.pt`; of the parts they hold
    the model alone. Each cycle of a cosine schedule with warm restarts ends in a network of its own, so there
    `"restarts"` is the choice.

    Args:
        run_dir: the run folder.
        trainer: the trainer whose iteration and epoch are recorded.
        parts: what is kept, see :func:`save_checkpoint`. `model` is the network that was validated.
        snapshots: the iterations after which a snapshot is kept; or `"restarts"`: at every warm restart of the part
            `lr_scheduler`, which is to be stepped before; default: none.
        values: plain values kept in every checkpoint.

    Raises:
        ConfigError: for snapshots at restarts of a schedule that has none.
    """

    def __init__(
        self,
        run_dir: Path | str,
        trainer: Engine,
        parts: Mapping[str, Any],
        snapshots: Sequence[int] | str = (),
        **values: Any,
    ) -> None:
        if isinstance(snapshots, str | int) and not (
            snapshots == "restarts" and hasattr(parts.get("lr_scheduler"), "T_cur")
        ):
            raise ConfigError(
                f"snapshots: found {snapshots!r} with {type(parts.get('lr_scheduler')).__name__}, expected a list of "
                "iterations, or 'restarts' with torch's CosineAnnealingWarmRestarts as lr_scheduler"
            )
        self.run_dir, self.trainer, self.parts, self.values = Path(run_dir), trainer, parts, values
        self.snapshots = snapshots
        self.best: float | None = None

    def attach(self, validator: Engine | None) -> None:
        """Save after each validation, and the last state when training ends."""
        if validator is not None:
            validator.add_event_handler(Events.COMPLETED, self.validated)
        self.trainer.add_event_handler(Events.COMPLETED, self.save, "model_last.pt")
        if self.snapshots:
            self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self.snapshot)

    def save(self, name: str, **values: float) -> None:
        """Write the current state under `name`."""
        save_checkpoint(self.run_dir / name, self.parts, **self.values, **self._time(), **values)

    def snapshot(self) -> None:
        """Keep a snapshot, if it is time for one."""
        if isinstance(self.snapshots, str):
            due = self.parts["lr_scheduler"].T_cur == 0  # the schedule has just been stepped over its restart
        else:
            due = self.trainer.state.iteration in self.snapshots
        if due:
            self.save_snapshot()

    def save_snapshot(self) -> None:
        """Keep a snapshot of the model."""
        name = f"model_snapshot_{self.trainer.state.iteration}.pt"
        save_checkpoint(self.run_dir / name, {"model": self.parts["model"]}, **self.values, **self._time())

    def validated(self, validator: Engine) -> None:
        """Keep the state as the last, and as the best where the key metric rose."""
        score = key_score(validator)
        if self.best is None or score > self.best:
            self.best = score
            self.save("model_best.pt", score=score)
        self.save("model_last.pt", score=score)

    def _time(self) -> dict[str, int]:
        return {"iteration": self.trainer.state.iteration, "epoch": self.trainer.state.epoch}
