"""How the build of a cohort of small cases scales over cores, and what memory it takes.

    python benchmarks/cohort/measure.py

A source of 2,000 cases (noise and its label, NIfTI, gzipped) is made in a temporary folder: once with 64 × 64 × 16
voxels, once with 96 × 96 × 32, once with 128 × 128 × 48. `data_prep build folder` makes a dataset of it with 1, 2, …
jobs on as many cores, each run from the start of Python on. The run with one job is held to one core: it would
otherwise use the threads of torch and of hashing on all of them, and would be no measure of what a core does. Each is
run several times and the least counts. At last one run makes report.html of the finished dataset. Every process that
makes cases imports MONAI first (`import_monai_s`), all at the same time: of tiny cases that is a notable part.

Memory is what is resident (VmRSS) in the parent and in the largest worker, seen once a second; the numbers to
compare are those when a tenth of the cases is done and those when all are.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from medseg.io import atomic_write_text, write_nifti

RESULTS = Path(__file__).parents[1] / "results"


def make_source(root: Path, cases: int, shape: tuple[int, int, int]) -> None:
    """Write the images and labels of a cohort."""
    rng = np.random.default_rng(1)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(n // 4, n // 2) for n in shape)] = 1
    label[tuple(slice(n // 2, n // 2 + 2) for n in shape)] = 2
    for number in range(cases):
        image = rng.normal(0, 100, shape).round().astype(np.int16)
        write_nifti((image, np.eye(4)), root / "images" / f"case{number:05d}.nii.gz")
        write_nifti((label, np.eye(4)), root / "labels" / f"case{number:05d}.nii.gz")


def status(pid: int, key: str) -> float:
    """A number of MiB from /proc, 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":")), 0.0)


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def build(source: Path, out: Path, jobs: int, cases: int, *words: str) -> dict[str, Any]:
    """One build, its time, and the memory of its processes on the way."""
    command = [sys.executable, "-m", "data_prep", "build", "folder", str(source), str(out), "--jobs", str(jobs)]
    begun = time.perf_counter()
    cores = sorted(os.sched_getaffinity(0))[:jobs]
    process = subprocess.Popen(
        [*command, "--keep-identifiers", *words],
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    early: dict[str, float] = {}
    late: dict[str, float] = {}
    while process.poll() is None:
        done = len(list((out / ".build").iterdir())) if (out / ".build").exists() else 0
        parent = status(process.pid, "VmRSS")
        workers = [status(pid, "VmRSS") for pid in children(process.pid)]
        if done and parent:
            late = {"parent_mib": parent, "worker_mib": max(workers, default=0.0)}
            early = early if early or done < cases / 10 else late
        time.sleep(1)  # looking costs time of a core that the build could use
    wall = time.perf_counter() - begun
    if process.returncode:
        raise click.ClickException(f"the build with {jobs} jobs ended with status {process.returncode}")
    return {"jobs": jobs, "wall_s": wall, "after_a_tenth": early, "at_the_end": late}


def measure(
    folder: Path, cases: int, shape: tuple[int, int, int], jobs: tuple[int, ...], repeats: int, words: tuple[str, ...]
) -> dict[str, Any]:
    """All builds of one cohort."""
    source, dataset = folder / "source", folder / "dataset"
    make_source(source, cases, shape)
    results: list[dict[str, Any]] = []
    for n_jobs in jobs:
        runs = []
        for _ in range(repeats):
            shutil.rmtree(dataset, ignore_errors=True)
            runs.append(build(source, dataset, n_jobs, cases, "--no-report", *words))
        best = min(runs, key=lambda result: result["wall_s"])
        best["all_wall_s"] = [result["wall_s"] for result in runs]
        best["speedup"] = (results or [best])[0]["wall_s"] / best["wall_s"]
        results.append(best)
        early, late = best["after_a_tenth"], best["at_the_end"]
        memory = ", ".join(f"{name} {early[name]:.0f} -> {late[name]:.0f}" for name in late)
        click.echo(f"{shape}, {n_jobs} jobs: {best['wall_s']:.1f} s, {best['speedup']:.2f} x, {memory}")
    again = build(source, dataset, jobs[-1], cases, "--no-report", *words)["wall_s"]
    report = build(source, dataset, jobs[-1], cases, *words)["wall_s"] - again
    click.echo(f"{shape}: nothing to do {again:.1f} s, report.html {report:.1f} s more")
    return {"shape": shape, "cases": cases, "runs": results, "nothing_to_do_s": again, "report_s": report}


def import_s() -> float:
    """Seconds to import MONAI, which every process that makes cases does once."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import monai.data"], check=True)
    return time.perf_counter() - begun


@click.command()
@click.option("--cases", default=2000, show_default=True, help="How many cases a cohort shall have.")
@click.option(
    "--shape",
    "shapes",
    nargs=3,
    type=int,
    multiple=True,
    default=((64, 64, 16), (96, 96, 32), (128, 128, 48)),
    show_default=True,
    help="Voxels of a case; a cohort for each.",
)
@click.option("--jobs", multiple=True, type=int, default=(1, 2), show_default=True, help="Jobs to measure with.")
@click.option("--runs", default=2, show_default=True, help="How often each is run.")
@click.option("--spacing", type=float, help="Resample the cases, whose voxels are 1 mm long, to this spacing in mm.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "cohort.json", help="Where the result goes.")
def main(
    cases: int,
    shapes: tuple[tuple[int, int, int], ...],
    jobs: tuple[int, ...],
    runs: int,
    spacing: float | None,
    out: Path,
) -> None:
    """Measure how the build of a cohort scales."""
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "import_monai_s": min(import_s() for _ in range(2)),
    }
    words = ("--spacing", *[str(spacing)] * 3) if spacing else ()
    cohorts = []
    for shape in shapes:
        folder = Path(tempfile.mkdtemp(prefix="medseg-cohort-"))
        try:
            cohorts.append(measure(folder, cases, shape, jobs, runs, words))
        finally:
            shutil.rmtree(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out, json.dumps({"machine": machine, "spacing": spacing, "cohorts": cohorts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
