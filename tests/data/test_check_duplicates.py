"""Images of one person under two names are found; people who look alike are left alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

from medseg.data.duplicates import NEAR, near_duplicates, signature
from medseg.data.shrink import shrink
from medseg.io import read_image

Change = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def people(n: int, shape: tuple[int, ...] = (40, 36, 30), seed: int = 0) -> list[NDArray[np.float32]]:
    """What all have in common, and half as much of each one's own."""
    rng = np.random.default_rng(seed)
    smooth = [2.0 if size > 1 else 0.0 for size in shape]
    images = [gaussian_filter(rng.standard_normal(shape), smooth) for _ in range(n + 1)]
    return [(1000 * (images[0] + images[i + 1])).astype(np.float32) for i in range(n)]


def pairs(images: list[NDArray[np.float32]], affines: list[NDArray[np.float64]] | None = None) -> list[tuple[int, int]]:
    affines = affines or [np.eye(4)] * len(images)
    signatures = [signature(image, affine) for image, affine in zip(images, affines, strict=True)]
    found = list(near_duplicates(signatures, [str(n) for n in range(len(images))]))
    assert all(value >= NEAR for _, _, value, _ in found)
    assert not any(mirrored for *_, mirrored in found)
    return [(one, other) for one, other, *_ in found]


CHANGES: dict[str, Change] = {
    "other intensities": lambda image: np.exp(image / 2000),
    "noise": lambda image: image + np.random.default_rng(1).normal(0, 0.2 * image.std(), image.shape),
    "finer": lambda image: zoom(image, 1.4, order=1),
    "coarser": lambda image: zoom(image, 0.7, order=1),
    "cropped": lambda image: image[2:-1, 1:],
    "cropped and coarser": lambda image: zoom(image[1:, 2:], 0.8, order=1),
    "clipped": lambda image: np.clip(image, *np.percentile(image, (5, 95))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_is_found_among_people_who_look_alike(change: str):
    images = people(12)
    assert pairs(images) == []
    copy = CHANGES[change](images[3]).astype(np.float32)
    assert pairs([*images, copy]) == [(3, 12)]


def test_a_copy_is_found_however_its_voxels_are_stored():
    images = people(5)
    turned = np.moveaxis(images[1][::-1], 2, 0)
    affine = np.array([[0.0, -2, 0, 0], [0, 0, 2, 0], [2, 0, 0, 0], [0, 0, 0, 1]])
    straight = np.diag([2.0, 2, 2, 1])
    assert pairs([*images, turned], [*[straight] * 5, affine]) == [(1, 5)]


@pytest.mark.parametrize("shape", [(40, 36, 30), (90, 80, 1)], ids=["volume", "picture"])
def test_a_mirrored_copy_is_found_and_said_to_be_mirrored(shape):
    images = people(6, shape)
    copy = images[2][::-1] + np.random.default_rng(1).normal(0, 0.1 * images[2].std(), shape).astype(np.float32)
    signatures = [signature(image, np.diag([-1.0, -1, 2, 1])) for image in (*images, copy)]
    ((one, other, correlation, mirrored),) = near_duplicates(signatures, list("abcdefg"))
    assert (one, other, mirrored) == (2, 6, True)
    assert correlation >= NEAR
    assert list(near_duplicates(signatures, list("abcdefc"))) == []  # both of one patient
    assert [pair[:2] for pair in near_duplicates([*signatures, signatures[2]], list("abcdefgh"))] == [(2, 6), (2, 7)]


def test_copies_of_pictures():
    images = people(6, (90, 80, 1))
    smaller = zoom(images[2][3:], (0.6, 0.6, 1), order=1)
    assert pairs(images) == []
    assert pairs([*images, smaller]) == [(2, 6)]
    assert pairs([*images, *people(2)]) == []  # pictures and volumes are not compared


def test_images_of_one_patient_and_empty_ones_are_no_pairs():
    image = people(1)[0]
    flat = np.zeros_like(image)
    same = signature(image, np.eye(4))
    assert list(near_duplicates([same, same], ["a", "a"])) == []
    assert list(near_duplicates([signature(flat, np.eye(4))] * 2, ["a", "b"])) == []
    assert list(near_duplicates([], [])) == []
    found = near_duplicates([same, same, same], ["a", "b", "c"])
    assert [pair[:2] for pair in found] == [(0, 1), (0, 2)]  # each case once, not each pair


def test_shrinking_keeps_the_mean_and_counts_voxels_by_their_share():
    rng = np.random.default_rng(0)
    volume = rng.random((13, 10, 7))
    small = shrink(volume, (5, 10, 2))
    assert small.shape == (5, 10, 2)
    np.testing.assert_allclose(small.mean(), volume.mean())
    np.testing.assert_allclose(shrink(small, (1, 1, 1)), volume.mean())
    np.testing.assert_allclose(shrink(np.arange(3.0).reshape(3, 1, 1), (2, 1, 1)).ravel(), [1 / 3, 5 / 3])


@pytest.mark.realdata
def test_real_hippocampi_look_alike_and_are_told_apart(data: Path):
    files = sorted((data / "hippocampus" / "images").glob("*.nii.gz"))[:80]
    images = [read_image(file) for file in files]
    affines = [np.asarray(image.affine) for image in images]
    arrays = [image.numpy()[0].astype(np.float32) for image in images]
    assert pairs(arrays, affines) == []
    copies = [zoom(array[1:, 1:], 0.8, order=1) * 3 for array in arrays[:10]]
    assert pairs([*arrays, *copies], [*affines, *affines[:10]]) == [(n, len(files) + n) for n in range(10)]


@pytest.mark.realdata
def test_real_pictures_of_brains(data: Path):
    """What a person finds: copies resized, recompressed, brightened and cropped, and none between other pictures."""
    names = [
        *("yes/Y36.JPG", "yes/Y65.JPG"),
        *("yes/Y61.jpg", "yes/Y71.JPG"),
        *("yes/Y50.JPG", "yes/Y160.JPG"),
        *("no/N16.jpg", "no/N17.jpg"),
    ]
    others = ["yes/Y32.jpg", "yes/Y69.jpg", "yes/Y165.JPG", "yes/Y255.JPG", "no/no 923.jpg"]
    arrays = [read_image(data / "brain_mri" / name).numpy().mean(axis=0).astype(np.float32) for name in names + others]
    assert pairs([array.reshape(*array.shape[:2], 1) for array in arrays]) == [(0, 1), (2, 3), (4, 5), (6, 7)]
