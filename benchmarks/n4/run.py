"""N4 on 224×224×24 voxels: our default beside SimpleITK's default at full resolution, with the same mask.

    MEDSEG_TEST_DATA=DATA python benchmarks/n4/run.py

The knee thesis names 60 to 120 s for a volume of this size. Its data are not public, so real MR of other organs is
resampled (linearly) to its grid: FLAIR and T1 of a head, T2 of a prostate. SimpleITK runs as its documentation says,
with Otsu's mask and as many threads as it likes; ours uses four. The two take turns, and the least time counts.

How even tissue is: the coefficient of joint variation of two classes, (sd1 + sd2) / |mean1 - mean2|; less is better.
The classes are those of Otsu's two thresholds within the mask in SimpleITK's result, the same voxels for both results
(a choice in SimpleITK's favor), so there are two pairs of neighboring classes: `cjv` holds both.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import SimpleITK as sitk
import torch
from monai.transforms import Resize
from skimage.filters import threshold_multiotsu

from medseg.io import atomic_write_text, read_image
from medseg.transforms import N4BiasFieldCorrection

RESULTS = Path(__file__).parents[1] / "results"
SIZE = (224, 224, 24)
IMAGES = {
    "head_flair": "mr_registration/study1_FLAIR.nii.gz",
    "head_t1": "mr_registration/study1_T1W.nii.gz",
    "prostate_t2": "mhd/Case00.mhd",
}


def simpleitk_default(image: np.ndarray) -> np.ndarray:
    """N4 as the documentation of SimpleITK has it, at full resolution."""
    itk = sitk.GetImageFromArray(image.T)
    return sitk.GetArrayFromImage(sitk.N4BiasFieldCorrection(itk, sitk.OtsuThreshold(itk, 0, 1, 200))).T


def ours(image: np.ndarray) -> np.ndarray:
    """The transform with its defaults."""
    return N4BiasFieldCorrection()(image[None])[0]


def joint_variation(image: np.ndarray, classes: np.ndarray) -> list[float]:
    """Coefficient of joint variation of classes 0 and 1, and of 1 and 2."""
    values = [image[classes == number].astype(np.float64) for number in range(3)]
    return [float((one.std() + other.std()) / abs(one.mean() - other.mean())) for one, other in pairwise(values)]


def timed(correct: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> tuple[np.ndarray, float, float]:
    """The result, seconds on the clock and seconds of CPU."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = correct(image)
    return result, time.perf_counter() - clock, time.process_time() - cpu


def measure(path: Path, repeats: int) -> dict[str, Any]:
    """Compare the two on one image."""
    image = Resize(SIZE, mode="trilinear")(read_image(path)).numpy()[0].astype(np.float32)
    runs: dict[str, list[tuple[np.ndarray, float, float]]] = {"simpleitk": [], "medseg": []}
    for _ in range(repeats):
        for name, correct in (("medseg", ours), ("simpleitk", simpleitk_default), ("medseg", ours)):
            runs[name].append(timed(correct, image))
    reference = runs["simpleitk"][0][0]
    mask = sitk.GetArrayFromImage(sitk.OtsuThreshold(sitk.GetImageFromArray(image.T), 0, 1, 200)).T != 0
    classes = np.digitize(reference, threshold_multiotsu(reference[mask], 3))
    classes[~mask] = -1
    found: dict[str, Any] = {"file": path.name, "cjv": {"uncorrected": joint_variation(image, classes)}}
    for name, results in runs.items():
        found[f"{name}_min_s"] = min(seconds for _, seconds, _ in results)
        found[f"{name}_min_cpu_s"] = min(seconds for _, _, seconds in results)
        found["cjv"][name] = joint_variation(results[0][0], classes)
    found["times_faster"] = found["simpleitk_min_s"] / found["medseg_min_s"]
    found["times_less_cpu"] = found["simpleitk_min_cpu_s"] / found["medseg_min_cpu_s"]
    found["cjv_difference_percent"] = [
        100 * (own / full - 1) for own, full in zip(found["cjv"]["medseg"], found["cjv"]["simpleitk"], strict=True)
    ]
    return found


@click.command()
@click.option("--data", envvar="MEDSEG_TEST_DATA", required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--image", "chosen", multiple=True, type=click.Choice(list(IMAGES)), default=list(IMAGES), show_default=True
)
@click.option("--repeats", default=2, show_default=True, help="Runs of SimpleITK; ours has two for each.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "n4.json", help="Where the result goes.")
def main(data: Path, chosen: tuple[str, ...], repeats: int, out: Path) -> None:
    """Compare N4 with shrinking to N4 at full resolution."""
    torch.set_num_threads(1)
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "SimpleITK": sitk.Version_VersionString(),
    }
    results = {}
    for name in chosen:
        result = results[name] = measure(data / IMAGES[name], repeats)
        click.echo(
            f"{name}: {result['medseg_min_s']:.1f} s beside {result['simpleitk_min_s']:.1f} s, "
            f"{result['times_faster']:.1f} times faster; joint variation "
            + " and ".join(f"{difference:+.2f} %" for difference in result["cjv_difference_percent"])
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out, json.dumps({"machine": machine, "size": SIZE, "images": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
