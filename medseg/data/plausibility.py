"""Whether the voxels of a case can be what its channels' names say: Hounsfield units, SUV, labels inside the body."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

#: HU of the air around a patient, as scanners give it.
AIR = (-1100.0, -900.0)
#: Share of a label in the air around the body from which it is worth a look.
OUTSIDE = 0.2

_SAMPLE = 2_000_000  # voxels that suffice for a histogram


def implausible_hu(voxels: NDArray[np.float32]) -> Iterator[str]:
    """Say why voxels cannot be Hounsfield units: air lies at -1000 HU and water at 0.

    Only what a CT of a patient never shows is told, so a crop without air or without bone is as good as a whole
    scan; and so is one with padding (-1500, -2000, -3024) around what the scanner saw.

    Args:
        voxels: finite, not all equal.

    Yields:
        what was found, with its numbers.

    Example:
        >>> ct = np.random.default_rng(0).normal([[-1000.0], [40.0]], 20, (2, 500)).astype(np.float32)
        >>> list(implausible_hu(ct)), list(implausible_hu(ct + 1024))
        ([], ['no air, and the most frequent dense value is 1065, where tissue has 0 to 80 HU: is 1024 added?'])
    """
    values = _sample(voxels)
    low, high = float(voxels.min()), float(voxels.max())
    above = values[values > low]
    if low < -500 and len(above) and len(above) < 0.99 * len(values) and above.min() >= low + 400:
        values = above  # the rest is padding around what the scanner saw: it has no noise
    wrapped = float(np.mean(values > 30000))
    if wrapped > 1e-3:
        yield f"{wrapped:.1%} of the values are above 30000: were signed numbers read as unsigned?"
        return
    if high - low < 50:
        yield f"values from {low:.3g} to {high:.3g}, too narrow for Hounsfield units: were they normalized?"
        return
    if low == 0 and high == 255:
        yield "values from 0 to 255, as in an 8-bit picture: was a window applied?"
        return
    peak = _mode(values[values > 500])
    if 850 <= peak <= 1250 and np.mean(values < -500) < 0.001 and np.mean(values > 850) > 0.02:
        yield f"no air, and the most frequent dense value is {peak:.0f}, where tissue has 0 to 80 HU: is 1024 added?"
        return
    if low >= 0 and max(low, high - low) > 500:
        yield f"no value is below 0, the most frequent one is {_mode(values):.0f}: which offset was added?"
        return
    if np.mean(values > -1500) < 0.03:
        yield f"{np.mean(values <= -1500):.0%} of the values are below -1500, air has -1000: which offset was taken?"
        return
    dense = values[values > -400]  # of lung alone there is as little of it, but lung is denser than air
    usual = _mode(values[values > -1500])
    if len(dense) < 0.03 * len(values) and not _mode(dense) > -300 and usual < AIR[1]:
        yield f"hardly a value where fat, water and soft tissue lie, the most frequent one is {usual:.0f}"
        return
    # At the rim of a slice lies the air around the patient; in crops lies tissue, which has no such narrow peak.
    rim = np.concatenate([voxels[[0, -1]].ravel(), voxels[:, [0, -1]].ravel()])
    rim = _sample(rim[(rim > -1500) & (rim < -400)])
    if len(rim) > 1000 and low < -400:
        peak = _mode(rim)
        if np.mean(np.abs(rim - peak) <= 25) > 0.8 and not AIR[0] <= peak <= AIR[1]:
            yield f"the air around the patient lies at {peak:.0f}, -1000 HU expected"
    for end, name, most in ((high, "highest", 0.005), (low, "lowest", 0.05)):
        at_end, near_end = np.mean(values == end), np.mean((values != end) & (np.abs(values - end) < 20))
        if at_end > max(most, 2 * near_end) and AIR[1] < end < 1500:
            yield f"{at_end:.1%} of the values are exactly {end:g}, the {name}: were they clipped?"
            return


def implausible_suv(voxels: NDArray[np.float32]) -> Iterator[str]:
    """Say why voxels cannot be standardized uptake values, which are 1 on average over a patient.

    Args:
        voxels: finite, not all equal.

    Yields:
        what was found, with its numbers.

    Example:
        >>> pet = np.random.default_rng(0).gamma(1, 1, 10000).astype(np.float32)
        >>> list(implausible_suv(pet)), list(implausible_suv(pet * 5000))
        ([], ['0.5% of the values are above 2...: are they Bq/ml?'])
    """
    values = _sample(voxels)
    high = float(np.percentile(values, 99.5))
    below = float(np.mean(values < -0.5))
    if below > 0.01:
        yield f"{below:.1%} of the values are below -0.5 (the lowest is {voxels.min():.3g}): uptake is not negative"
    if high > 100:
        yield f"0.5% of the values are above {high:.3g}: are they Bq/ml?"
    elif voxels.max() < 0.1:
        yield f"no value is above {voxels.max():.3g}: what are they divided by?"
    elif voxels.min() == 0 and voxels.max() == 1:
        yield "values from 0 to 1: were they normalized?"


def labels_in_air(
    ct: NDArray[np.float32], label: NDArray[Any], names: Mapping[int, str], affine: NDArray[np.float64]
) -> Iterator[tuple[str, float]]:
    """Give labels that lie in the air around the body, and with which share of their voxels.

    Air (below -900 HU) is around the body where it reaches the rim of its axial slice, so that lungs and airways are
    not.

    Args:
        ct: [x, y, z] in HU.
        label: [x, y, z].
        names: name of each value but background.
        affine: RAS mm, tells which slices are axial.
    """
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    up = int(np.abs(affine[2, :3] / zooms).argmax())
    air = ct < AIR[1]
    if not air.any():
        return
    in_plane = ndimage.generate_binary_structure(2, 1)
    structure = np.expand_dims(in_plane, up)
    structure = np.concatenate([np.zeros_like(structure), structure, np.zeros_like(structure)], axis=up)
    regions, _ = ndimage.label(air, structure)
    rim = np.concatenate([regions.take((0, -1), axis=axis).ravel() for axis in range(3) if axis != up])
    outside = np.zeros(regions.max() + 1, bool)
    outside[rim] = True
    outside[0] = False
    for value, name in names.items():
        where = label == value
        total = np.count_nonzero(where)
        share = np.count_nonzero(outside[regions[where]]) / total if total else 0.0
        if share > OUTSIDE:
            yield name, share


def _sample(voxels: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = voxels.ravel(order="K")
    return flat[:: max(1, len(flat) // _SAMPLE)]


def _mode(values: NDArray[np.float32]) -> float:
    """The middle of the 10 units that hold most values."""
    if not len(values):
        return float("nan")
    bins, counts = np.unique(np.floor(values / 10), return_counts=True)
    return float(bins[counts.argmax()] * 10 + 5)
