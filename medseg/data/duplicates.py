"""Images of one person under the names of two: copies of each other but for the intensities, the grid or a crop."""

from collections.abc import Iterator, Sequence

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import affine_transform, gaussian_filter

from medseg.data.shrink import shrink
from medseg.io.threads import in_order

#: Correlation of two signatures from which they are said to be of one image.
NEAR = 0.85

_SIZE = {2: 64, 3: 24}  # voxels along each axis of a signature, by the number of axes that an image has
_SMOOTH = 2.0  # voxels of a signature; coarser structure is what all people have in common
_CANDIDATE = 0.3
_CANDIDATES = 3
_ROWS = 512
_STEPS = 10


def signature(voxels: NDArray[np.float32], affine: NDArray[np.float64]) -> NDArray[np.float32]:
    """What stays of an image when it is exported again: its fine structure, at low resolution.

    The image is turned to RAS, averaged over 24 parts of each axis (64 of a picture), its values are replaced by their
    ranks, and what is coarser than two of these voxels is taken away.

    Args:
        voxels: [x, y, z], finite.
        affine: RAS mm.

    Returns:
        [24, 24, 24], or [64, 64] of an image of one slice, of mean 0 and norm 1 (0 where nothing varies).
    """
    turn = nib.orientations.io_orientation(affine)
    voxels = nib.orientations.apply_orientation(voxels, turn)
    n_axes = sum(n > 1 for n in voxels.shape)
    size = _SIZE.get(n_axes, _SIZE[2])
    small = shrink(voxels, [1 if n == 1 else size for n in voxels.shape]).squeeze()
    # Mean ranks of equal values: scipy's rankdata takes five times as long, and is most of what a small case costs.
    _, place, count = np.unique(small, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2).astype(np.float32)[place].reshape(small.shape)
    fine = ranks - gaussian_filter(ranks, _SMOOTH, mode="nearest")
    fine -= fine.mean()
    return fine / max(float(np.linalg.norm(fine)), 1e-6)


def near_duplicates(
    signatures: Sequence[NDArray[np.float32]], patients: Sequence[str], workers: int = 1
) -> Iterator[tuple[int, int, float, bool]]:
    """Find cases of different patients that show the same image.

    All pairs are compared as they are, and with one of the two mirrored from left to right. The three nearest others of
    each case are also laid on it, by a shift and a scale along each axis (Lucas and Kanade 1981), so that crops are
    found.

    Args:
        signatures: of each case, as :func:`signature` returns them; those of another shape are not compared.
        patients: of each case.
        workers: threads.

    Yields:
        positions of two cases, the second after the first, their correlation, at least :data:`NEAR`, and whether one is
        mirrored. A case with several such partners before it is given once, with the most similar.
    """
    shapes = [item.shape for item in signatures]
    owner = np.unique(np.asarray(patients), return_inverse=True)[1]
    found: dict[int, tuple[float, int, bool]] = {}
    pairs: dict[tuple[int, int], float] = {}
    mirrored: dict[tuple[int, int], float] = {}
    for shape in sorted(set(shapes)):
        members = np.array([place for place, other in enumerate(shapes) if other == shape])
        table = np.stack([signatures[place].ravel() for place in members])
        reflected = np.stack([signatures[place][::-1].ravel() for place in members])
        for start in range(0, len(members), _ROWS):
            rows = members[start : start + _ROWS]
            others = owner[rows][:, None] != owner[members][None]
            correlation = np.where(others, table[start : start + _ROWS] @ table.T, -1)
            for row, values in zip(rows.tolist(), correlation, strict=True):
                order = np.argsort(-values, kind="stable")[:_CANDIDATES]
                for place in {*order[values[order] >= _CANDIDATE].tolist(), *np.flatnonzero(values >= NEAR).tolist()}:
                    other = int(members[place])
                    pairs[min(row, other), max(row, other)] = float(values[place])
            correlation = np.where(others, table[start : start + _ROWS] @ reflected.T, -1)
            for one, place in np.argwhere(correlation >= NEAR).tolist():
                row, other = int(rows[one]), int(members[place])
                mirrored[min(row, other), max(row, other)] = float(correlation[one, place])
    unsure = [pair for pair, value in pairs.items() if value < NEAR]
    laid = in_order(lambda pair: best_correlation(signatures[pair[0]], signatures[pair[1]]), unsure, workers)
    pairs.update(zip(unsure, laid, strict=True))
    for is_mirrored, chosen in ((False, pairs), (True, mirrored)):
        for (first, second), value in sorted(chosen.items()):
            if value >= NEAR and value > found.get(second, (0.0,))[0]:
                found[second] = value, first, is_mirrored
    for second, (value, first, is_mirrored) in sorted(found.items()):
        yield first, second, value, is_mirrored


def best_correlation(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Correlation of two signatures after the shift and the scale along each axis that lay one on the other.

    It is the correlation over the part that both show, at least half of each.
    """
    center = (np.array(one.shape) - 1) / 2
    places = [(grid - middle) / middle for grid, middle in zip(np.indices(one.shape), center, strict=True)]
    scale, offset = np.ones(one.ndim), np.zeros(one.ndim)
    best = last = _correlation(one.ravel(), other.ravel())
    for step in range(_STEPS):
        start = center - scale * center + offset
        moved = affine_transform(other, scale, start, order=1, mode="constant", cval=np.nan)
        seen = np.isfinite(moved)
        if np.mean(seen) < 0.5:
            break
        value = _correlation(one[seen], moved[seen])
        best = max(best, value)
        if step > 2 and value < min(last + 0.003, NEAR + 0.1):
            break
        last = value
        moved[~seen] = 0
        slopes = np.gradient(moved)
        terms = [
            *slopes,
            *(slope * place for slope, place in zip(slopes, places, strict=True)),
            moved,
            np.ones_like(moved),
        ]
        matrix = np.stack([term[seen] for term in terms], dtype=np.float64)
        solution = np.linalg.lstsq(matrix @ matrix.T, matrix @ one[seen], rcond=None)[0]
        gain = max(float(solution[-2]), 0.2)
        offset = offset + scale * np.clip(solution[: one.ndim] / gain, -3, 3)
        growth = np.clip(solution[one.ndim : 2 * one.ndim] / gain / center, -0.1, 0.1)
        scale = np.clip(scale * (1 + growth), 0.7, 1.4)
    return best


def _correlation(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    one, other = one - one.mean(), other - other.mean()
    return float(one @ other / max(float(np.linalg.norm(one) * np.linalg.norm(other)), 1e-9))
