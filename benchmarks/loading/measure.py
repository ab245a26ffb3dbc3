"""How long a trainer waits for its next batch, with the bundles' own networks, loaders and trainers.

    python benchmarks/loading/measure.py --run head_neck_petct_segmentation PETCT --run hippocampus_mr_segmentation MR

PETCT and MR are datasets that `data_prep` built, split and (PETCT) sliced. Each bundle's trainer runs for some steps as
`python -m monai.bundle run` would run it, without validation. The wait is the time inside `next` of the loader (and, at
the start of an epoch, inside `iter`); its share is of the whole time between the first measured batch and the end of
the last step. The loader's own CPU time is measured apart, in one process without workers, since on a machine with few
cores workers that keep the trainer from waiting take their time from its step. Where the dataset has a slice store, the
time to read a slice at random is set beside that of reading it from the compressed NIfTI files with nibabel.
"""

import json
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import monai
import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser

from medseg.data import DatasetFolder, SeededLoader, SliceDataset
from medseg.io import atomic_write_text

BUNDLES = Path(__file__).parents[2] / "bundles"
RESULTS = Path(__file__).parents[1] / "results"
NEVER = 10**9


class Stopwatch:
    """Times a trainer's steps and its waits for data, after some steps to warm up; then ends it."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.warm_up, self.steps = warm_up, steps
        self.waits: list[float] = []
        self.began = self.ended = 0.0
        self._asked: float | None = None

    def attach(self, trainer: Engine) -> None:
        """Listen to a trainer."""
        trainer.add_event_handler(Events.EPOCH_STARTED, self._ask)
        trainer.add_event_handler(Events.GET_BATCH_STARTED, self._ask)
        trainer.add_event_handler(Events.GET_BATCH_COMPLETED, self._got)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._stepped)

    def _ask(self, trainer: Engine) -> None:
        if self._asked is None:  # at the start of an epoch both events come, and making the iterator lies between
            self._asked = time.perf_counter()
            if trainer.state.iteration == self.warm_up:
                self.began = self._asked

    def _got(self, trainer: Engine) -> None:
        if self._asked is not None and self.began:
            self.waits.append(time.perf_counter() - self._asked)
        self._asked = None

    def _stepped(self, trainer: Engine) -> None:
        self.ended = time.perf_counter()
        if len(self.waits) == self.steps:
            trainer.terminate()


def measure(bundle: str, dataset: Path, steps: int, warm_up: int) -> dict[str, Any]:
    """Run a bundle's trainer for some steps and its loader alone for as many batches."""
    with tempfile.TemporaryDirectory() as run_dir:
        parser = ConfigParser()
        parser.read_config(str(BUNDLES / bundle / "configs" / "train.yaml"))
        parser.update(
            {
                "bundle_root": str(BUNDLES / bundle),
                "dataset_dir": str(dataset),
                "run_dir": run_dir,
                "val_interval": NEVER,
                "train#trainer#max_epochs": NEVER,
            }
        )
        monai.utils.set_determinism(seed=0)
        trainer = parser.get_parsed_content("train#trainer")
        watch = Stopwatch(warm_up, steps)
        watch.attach(trainer)
        trainer.run()
        loader = trainer.data_loader
        batch_size, workers = loader.batch_size, loader.num_workers
        total = watch.ended - watch.began
        result = {
            "bundle": bundle,
            "steps": steps,
            "batch_size": batch_size,
            "workers": workers,
            "parameters": sum(p.numel() for p in parser.get_parsed_content("network").parameters()),
            "step_ms": 1000 * total / steps,
            "wait_ms_mean": 1000 * statistics.fmean(watch.waits),
            "wait_ms_median": 1000 * statistics.median(watch.waits),
            "wait_share_of_step": sum(watch.waits) / total,
            "loader_cpu_ms_per_batch": loader_cpu(loader.dataset, batch_size, steps),
        }
    slices = dataset / "slices.h5"
    return result | (read_slices(dataset, slices) if slices.is_file() else {})


def loader_cpu(dataset: Any, batch_size: int, batches: int) -> float:
    """CPU milliseconds that a batch costs, all threads of this process together."""
    loader = SeededLoader(dataset, batch_size, num_workers=0)
    done, spent = 0, 0.0
    while done < batches:
        start = time.process_time()
        for _ in loader:
            done += 1
            if done == batches:
                break
        spent += time.process_time() - start
    return 1000 * spent / batches


def read_slices(dataset: Path, path: Path, n: int = 100) -> dict[str, float]:
    """Milliseconds to read a slice with its label at random: from the slice store, and from the NIfTI files."""
    slices = SliceDataset(path, "train")
    chosen = random.Random(0).sample(range(len(slices)), min(n, len(slices)))
    start = time.perf_counter()
    items = [slices[index] for index in chosen]
    store = time.perf_counter() - start
    folder = DatasetFolder(dataset)
    start = time.perf_counter()
    for item in items:
        for file in (*folder.image_paths(item["case"]), folder.label_path(item["case"])):
            np.asarray(nib.load(file).dataobj[..., item["slice"]])
    nifti = time.perf_counter() - start
    return {"slice_store_ms_per_slice": 1000 * store / len(chosen), "nifti_ms_per_slice": 1000 * nifti / len(chosen)}


@click.command()
@click.option("--run", "runs", nargs=2, multiple=True, required=True, metavar="BUNDLE DATASET", help="May be repeated.")
@click.option("--steps", default=50, show_default=True, help="Steps that are measured.")
@click.option("--warm-up", default=5, show_default=True, help="Steps before them.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "loading.json", help="Where the result goes.")
def main(runs: tuple[tuple[str, str], ...], steps: int, warm_up: int, out: Path) -> None:
    """Measure how long the trainers of bundles wait for data."""
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
    }
    results = []
    for bundle, dataset in runs:
        result = measure(bundle, Path(dataset), steps, warm_up)
        results.append(result)
        click.echo(
            f"{bundle}: waits {100 * result['wait_share_of_step']:.1f} % of a step of {result['step_ms']:.0f} ms; "
            f"the loader takes {result['loader_cpu_ms_per_batch']:.1f} ms of CPU per batch"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out, json.dumps({"machine": machine, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
