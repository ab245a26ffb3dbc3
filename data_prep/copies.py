"""Copies of one picture: the same file twice, resized, recompressed, cropped or mirrored."""

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, ndimage, sparse

#: Correlation of two pictures, laid on each other, from which they are copies. Of the 253 pictures of `brain_mri`, what
#: a person calls copies lies above 0.80, and other pairs below 0.64.
COPY = 0.75
_SIDE = 64  # pixels of the small pictures that are compared
_CANDIDATE = 0.3  # correlation without laying them on each other
_SCALES = (0.92, 0.96, 1.0, 1.04, 1.08)


def groups_of_copies(pictures: Sequence[NDArray[np.float32]]) -> list[int]:
    """Tell which pictures are copies of one another.

    Dark margins are cut off and what is left is made 64 × 64. Pairs that have something in common, one of them mirrored
    or not, are laid on each other by all shifts (by Fourier transform) and by scales of up to 8 % along each axis; what
    is compared is fine structure, relative to the local contrast. Copies of copies are in one group.

    Other slices and other sequences of one patient are no copies: only the source could tell whose they are.

    Args:
        pictures: [x, y] each, gray.

    Returns:
        for each picture the position of the first of its group.

    Example:
        >>> one, other = np.random.default_rng(0).gamma(1, 50, (2, 60, 50)).astype(np.float32)
        >>> groups_of_copies([one, other, np.pad(one[::-1] * 0.5, 9)])
        [0, 1, 0]
    """
    small = np.stack([_small(_without_margins(picture)) for picture in pictures])
    coarse = _unit(small - ndimage.gaussian_filter(small, (0, 6, 6)))
    fine = fft.rfft2(_fine(small))
    scaled = np.stack([fft.rfft2(_fine(_scaled(small, *scale))) for scale in product(_SCALES, _SCALES)], axis=1)
    links = np.eye(len(small), dtype=bool)
    for flip in (1, -1):
        near = np.einsum("iab,jab->ij", coarse, coarse[:, ::flip]) > _CANDIDATE
        others = fine if flip == 1 else fft.rfft2(_fine(small[:, ::-1]))
        for i, j in zip(*np.nonzero(np.triu(near, 1)), strict=True):
            links[i, j] |= fft.irfft2(scaled[i] * others[j].conj(), s=small.shape[1:]).max() > COPY
    group = sparse.csgraph.connected_components(sparse.csr_array(links), directed=False)[1]
    first = {number: place for place, number in reversed(list(enumerate(group.tolist())))}
    return [first[number] for number in group.tolist()]


def _without_margins(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is left without rows and columns that are dark but for one pixel in fifty."""
    bright = picture > 0.1 * np.percentile(picture, 99)
    x, y = (np.nonzero(bright.mean(axis=axis) > 0.02)[0] for axis in (1, 0))
    return picture[x[0] : x[-1] + 1, y[0] : y[-1] + 1] if len(x) and len(y) else picture


def _small(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.BOX))


def _scaled(small: NDArray[np.float32], x: float, y: float) -> NDArray[np.float32]:
    scale, middle = np.array([1, x, y]), (np.array(small.shape) - 1) / 2
    return np.asarray(ndimage.affine_transform(small, scale, middle - scale * middle, order=1))


def _fine(small: NDArray[np.float32]) -> NDArray[np.float32]:
    """Structure finer than 3 pixels, relative to its contrast around."""
    detail = small - ndimage.gaussian_filter(small, (0, 3, 3))
    contrast = np.sqrt(ndimage.gaussian_filter(detail**2, (0, 3, 3)))
    return _unit(detail / (contrast + 0.2 * detail.std(axis=(1, 2), keepdims=True) + 1e-6))


def _unit(small: NDArray[np.float32]) -> NDArray[np.float32]:
    small = small - small.mean(axis=(1, 2), keepdims=True)
    return small / np.maximum(np.linalg.norm(small, axis=(1, 2), keepdims=True), 1e-6)
