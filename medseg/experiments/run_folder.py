"""Run folders: one per run, never overwritten, with all that a later reader needs."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from medseg.data import DatasetFolder
from medseg.engines.overrides import running_workflow
from medseg.errors import ConfigError
from medseg.io.atomic import atomic_path
from medseg.io.lock import in_turn

#: Packages whose versions a run records.
_PACKAGES = ("medseg", "torch", "monai", "pytorch-ignite", "numpy", "scipy", "nibabel", "h5py")

TEST_SPLIT = "test"


def new_run(root: Path | str, name: str) -> Path:
    """Make and return the next run folder of an experiment: `root/name/00`, then `01`, and so on.

    In a distributed run rank 0 makes it and tells the others.

    Args:
        root: where the experiments are.
        name: the experiment's name.

    Example:
        >>> import tempfile
        >>> root = tempfile.mkdtemp()
        >>> [new_run(root, "unet").name for _ in range(3)]
        ['00', '01', '02']
    """
    made: list[str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        folder = Path(root) / str(name)  # a config takes 17 for a number
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(p.name) for p in folder.iterdir() if p.name.isdecimal()), default=-1)
        while made[0] is None:
            try:
                (folder / f"{number:02d}").mkdir()
                made[0] = str(folder / f"{number:02d}")
            except FileExistsError:  # another run was quicker
                number += 1
    if dist.is_initialized():
        dist.broadcast_object_list(made, src=0)
    return Path(str(made[0]))


def latest_run(root: Path | str, name: str) -> Path:
    """Return the newest run folder of an experiment.

    Raises:
        ConfigError: if there is none.

    Example:
        >>> import tempfile
        >>> root = tempfile.mkdtemp()
        >>> made = [new_run(root, "unet") for _ in range(2)]
        >>> latest_run(root, "unet").name
        '01'
    """
    runs = [p for p in (Path(root) / str(name)).glob("*") if p.is_dir() and p.name.isdecimal()]
    if not runs:
        raise ConfigError(
            f"{Path(root) / str(name)}: found no run in it, expected 00, 01, …; train first, or name --run_dir"
        )
    return max(runs, key=lambda run: int(run.name))


def record_run(run_dir: Path | str, dataset_dir: Path | str, seed: int, **facts: Any) -> None:
    """Write what a run is into its folder: `run.json`, and the bundle's config as `config.yaml`.

    The config is the one that ran: files merged, overrides in, and plain values in the place of references to them.

    `run.json` holds the command, the seed, versions, the machine, and the hash of the dataset
    (:meth:`medseg.data.DatasetFolder.dataset_hash`).

    Args:
        run_dir: the run folder.
        dataset_dir: the dataset trained on.
        seed: the run's seed.
        facts: anything else worth keeping, by name; it must be JSON.

    Raises:
        ConfigError: if the folder is absent, or has the record of another run, which may say how often the test set was
            scored.
        DatasetError: if `dataset_dir` is no dataset.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    if not Path(run_dir).is_dir():
        raise ConfigError(f"run_dir: {run_dir} is no folder, expected an empty one; make it, or leave run_dir out")
    record_file = Path(run_dir) / "run.json"
    if record_file.exists():
        raise ConfigError(
            f"run_dir: {run_dir} holds a run already, expected a new folder, because a training that was stopped "
            "cannot be taken up again; leave run_dir out"
        )
    record = {
        "command": shlex.join(sys.orig_argv),
        "started": _now(),
        "seed": seed,
        "dataset_sha256": DatasetFolder(dataset_dir).dataset_hash(),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
        "machine": {"system": platform.platform(), "processor": platform.processor() or platform.machine()},
        "test_set_scored": [],
        **facts,
    }
    _write_json(record_file, record)
    workflow = running_workflow()
    if workflow is not None:
        config = {k: _with_values(v, workflow.parser) for k, v in workflow.parser.get().items() if k != "_meta_"}
        with atomic_path(Path(run_dir) / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False))


def _with_values(config: Any, parser: Any) -> Any:
    """Return a config with plain values in the place of references to them; what is code stays as it is written."""
    if isinstance(config, dict):
        return {key: _with_values(value, parser) for key, value in config.items()}
    if isinstance(config, list):
        return [_with_values(value, parser) for value in config]
    if isinstance(config, str) and config.startswith("@"):
        value = _with_values(parser.get(config[1:]), parser)
        return value if _is_plain(value) else config
    return config


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" not in value and all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is not None and not (isinstance(value, str) and value.startswith(("$", "@", "%")))


def unlock_split(run_dir: Path | str, split: str, unlock_test_set: bool = False) -> str:
    """Return the name of the split to score, after the test set's lock.

    Choices are made on the validation set. The test set answers one question, once; so it is scored only where
    that is said, and the run's record keeps when and by which command.

    Args:
        run_dir: the run that is scored; its `run.json` gets the entry.
        split: `train`, `val` or `test`.
        unlock_test_set: must be True for `test`.

    Raises:
        ConfigError: if the test set is asked for without unlocking it, the split has another name, or the folder is
            no run.
    """
    if split not in ("train", "val", TEST_SPLIT):
        raise ConfigError(f"split: found {split!r}, expected train, val or test")
    record_file = Path(run_dir) / "run.json"
    if not record_file.is_file():
        raise ConfigError(f"run_dir: {run_dir} has no run.json, expected the folder of a training run; name one")
    if split == TEST_SPLIT:
        if unlock_test_set is not True:
            raise ConfigError(
                "split: the test set is locked, because every look at it makes its score less honest; "
                "score val, or add --unlock_test_set True, which the run's record will show"
            )
        if not dist.is_initialized() or dist.get_rank() == 0:
            with in_turn(Path(run_dir)):
                record = json.loads(record_file.read_text())
                record["test_set_scored"].append({"when": _now(), "command": shlex.join(sys.orig_argv)})
                _write_json(record_file, record)
    return split


def _write_json(path: Path, content: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
