"""How the build of a cohort of small cases scales over cores, and what memory it takes.

    python benchmarks/cohort/measure.py

A source of 2,000 cases (a noise image of 64 × 64 × 16 voxels and its label, NIfTI, gzipped) is made in a temporary
folder. `data_prep build folder` then makes a dataset of it with 1, 2, … jobs, each run a process of its own from the
start of Python on; with `--jobs 1` no other process is at work, and the others are compared with that time. Each is
run several times and the least counts. At last one run makes report.html of the finished dataset.

Memory is what is resident (VmRSS) in the parent and in the largest worker, seen a few times a second; the numbers to
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
    process = subprocess.Popen([*command, "--keep-identifiers", *words], stdout=subprocess.DEVNULL)
    early: dict[str, float] = {}
    late: dict[str, float] = {}
    while process.poll() is None:
        done = len(list((out / ".build").glob("[!.]*.json"))) if (out / ".build").exists() else 0
        parent = status(process.pid, "VmRSS")
        workers = [status(pid, "VmRSS") for pid in children(process.pid)]
        if done and parent:
            late = {"parent_mib": parent, "worker_mib": max(workers, default=0.0)}
            early = early if early or done < cases / 10 else late
        time.sleep(0.3)
    wall = time.perf_counter() - begun
    if process.returncode:
        raise click.ClickException(f"the build with {jobs} jobs ended with status {process.returncode}")
    return {"jobs": jobs, "wall_s": wall, "after_a_tenth": early, "at_the_end": late}


@click.command()
@click.option("--cases", default=2000, show_default=True, help="How many cases the cohort shall have.")
@click.option("--shape", nargs=3, default=(64, 64, 16), show_default=True, help="Voxels of a case.")
@click.option("--jobs", multiple=True, type=int, default=(1, 2), show_default=True, help="Jobs to measure with.")
@click.option("--runs", default=2, show_default=True, help="How often each is run.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "cohort.json", help="Where the result goes.")
def main(cases: int, shape: tuple[int, int, int], jobs: tuple[int, ...], runs: int, out: Path) -> None:
    """Measure how the build of a cohort scales."""
    load, results = os.getloadavg()[0], []
    folder = Path(tempfile.mkdtemp(prefix="medseg-cohort-"))
    dataset = folder / "dataset"
    try:
        make_source(folder / "source", cases, shape)
        for n_jobs in jobs:
            repeats = []
            for _ in range(runs):
                shutil.rmtree(dataset, ignore_errors=True)
                repeats.append(build(folder / "source", dataset, n_jobs, cases, "--no-report"))
            best = min(repeats, key=lambda result: result["wall_s"])
            best["all_wall_s"] = [result["wall_s"] for result in repeats]
            best["speedup"] = (results or [best])[0]["wall_s"] / best["wall_s"]
            results.append(best)
            memory = " ".join(
                f"{name} {best['after_a_tenth'][name]:.0f} -> {best['at_the_end'][name]:.0f}"
                for name in best["at_the_end"]
            )
            click.echo(f"{n_jobs} jobs: {best['wall_s']:.1f} s, {best['speedup']:.2f} x, {memory}")
        again = build(folder / "source", dataset, jobs[-1], cases, "--no-report")["wall_s"]
        report = build(folder / "source", dataset, jobs[-1], cases)["wall_s"] - again
        click.echo(f"nothing to do: {again:.1f} s; report.html: {report:.1f} s more")
    finally:
        shutil.rmtree(folder)
    content = {
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "load_average_before": load,
            "python": platform.python_version(),
        },
        "cases": cases,
        "shape": shape,
        "runs": results,
        "nothing_to_do_s": again,
        "report_s": report,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
