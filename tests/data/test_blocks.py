"""Blocks of slices: no tail is lost, whatever the numbers, and a network's answer can be stitched from them."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.data.utils import dense_patch_slices
from monai.inferers import SlidingWindowInferer

from medseg.data import BlockDataset, DatasetFolder, SeededDataset, block_starts, write_slices
from medseg.data.folder import write_case, write_index
from medseg.errors import ConfigError, DatasetError

LABELS = {"background": 0, "kidney": 1, "tumor": 2}


@st.composite
def sizes(draw: Any) -> tuple[int, int, int]:
    size = draw(st.integers(1, 40))
    return draw(st.integers(1, 300)), size, draw(st.integers(0, size - 1))


@given(sizes())
def test_every_slice_is_in_a_block_and_the_last_ends_with_the_last(numbers: tuple[int, int, int]) -> None:
    n, size, overlap = numbers
    starts = block_starts(n, size, overlap)
    covered = {z for start in starts for z in range(start, min(n, start + size))}
    assert covered == set(range(n))
    assert starts[0] == 0
    assert starts[-1] + size == max(n, size)
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert (steps <= size - overlap).all()  # neighbors share the overlap at least
    assert (steps[:-1] == size - overlap).all()
    assert len(starts) == 1 + max(0, -(-(n - size) // (size - overlap)))


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, [0]), (31, [0]), (32, [0]), (33, [0, 1]), (52, [0, 20]), (53, [0, 20, 21]), (80, [0, 20, 40, 48])],
)
def test_blocks_of_32_with_an_overlap_of_12(n: int, expected: list[int]) -> None:
    assert block_starts(n, 32, 12) == expected


@given(st.integers(1, 200))
def test_they_are_those_of_monais_sliding_window(n: int) -> None:
    slices = dense_patch_slices((1, 1, max(n, 32)), (1, 1, 32), (1, 1, int(32 * (1 - 12 / 32))))
    assert [window[2].start for window in slices] == block_starts(n, 32, 12)


@pytest.mark.parametrize("n", [5, 32, 45, 61])
def test_what_is_predicted_for_blocks_is_stitched_without_a_lost_tail(n: int) -> None:
    image = torch.from_numpy(np.random.default_rng(n).normal(size=(1, 1, 6, 6, n)).astype(np.float32))
    stitched = SlidingWindowInferer(roi_size=(6, 6, 32), overlap=(0, 0, 12 / 32))(image, lambda block: 2 * block)
    torch.testing.assert_close(stitched, 2 * image)


@pytest.mark.parametrize("numbers", [(0, 32, 12), (5, 0, 0), (5, 4, 4), (5, 4, -1)])
def test_numbers_that_do_not_fit_are_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="expected at least one slice, and an overlap"):
        block_starts(*numbers)


Write = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path) -> Write:
    """Write a slice store of labels given as values per slice; the image of slice z of a case is 1000 · case + z."""

    def write(cases: dict[str, list[int]], channels: tuple[str, ...] = ("CT", "PET"), **keep: str) -> Path:
        rows = []
        for number, (name, values) in enumerate(cases.items()):
            image = torch.arange(len(values)).float().expand(len(channels), 4, 3, -1).clone() + 1000 * number
            label = torch.tensor(values, dtype=torch.uint8).expand(1, 4, 3, -1).clone()
            label[:, 0] = 0
            affine = torch.diag(torch.tensor([1, 1, 3, 1], dtype=torch.float64))
            row = write_case(tmp_path, name, MetaTensor(image, affine=affine), MetaTensor(label, affine=affine), LABELS)
            rows.append({"patient": name, "stratum": "", **row})
        write_index(tmp_path, name="x", channel_names=channels, labels=LABELS, rows=rows, manifest={"recipe": "test"})
        names = list(cases)
        split = {"folds": [{"train": names[:-2], "val": names[-2:-1]}], "test": names[-1:]}
        DatasetFolder(tmp_path).write_split(split)
        return write_slices(tmp_path, keep=keep)

    return write


def first_values(block: dict[str, Any]) -> list[float]:
    return block["image"][0, 0, 0].tolist()


def test_blocks_are_cut_from_the_labeled_slices_of_each_training_case(store: Write) -> None:
    path = store({"a": [0, 0, *[1] * 9, 0], "b": [1] * 3 + [0], "c": [0, 1, 0], "d": [0, 1]})
    blocks = BlockDataset(path, "train", size=4, overlap=1)
    assert [(block["case"], block["slice"]) for block in blocks] == [("a", 2), ("a", 5), ("a", 7), ("b", 0)]
    assert [first_values(blocks[n]) for n in range(4)] == [
        [2, 3, 4, 5],
        [5, 6, 7, 8],
        [7, 8, 9, 10],  # anchored to the end
        [1000, 1001, 1002, -1024],  # shorter than a block: kept, and padded with air
    ]
    last = blocks[-1]
    assert last["image"].shape == (2, 4, 3, 4)
    assert last["image"][1, 0, 0].tolist() == [1000, 1001, 1002, 1000]  # PET with its minimum
    assert last["label"].shape == (2, 4, 3, 4)
    assert last["label"][0, 1, 0].tolist() == [1, 1, 1, 0]
    assert (last["patient"], last["axcodes"], last["spacing"].tolist()) == ("b", "RAS", [1, 1, 3])
    # Nothing is dropped where it counts: the validation part has all slices.
    assert [first_values(block) for block in BlockDataset(path, "val", 2, 0)] == [[2000, 2001], [2001, 2002]]


def test_slices_of_a_block_are_neighbors(store: Write) -> None:
    path = store({"a": [1, 1, 0, 2, 2, 2], "c": [1], "d": [1]})
    assert [first_values(block) for block in BlockDataset(path, "train", 3, 1)] == [[0, 1, -1024], [3, 4, 5]]


def test_blocks_know_their_labels(store: Write) -> None:
    path = store({"a": [1, 1, 1, 2, 1, 1, 1], "b": [2, 1, 1], "c": [1], "d": [1]})
    blocks = BlockDataset(path, "train", size=3, overlap=1)
    assert [first_values(block)[0] for block in blocks] == [0, 2, 4, 1000]
    assert blocks.has_label("tumor").tolist() == [False, True, False, True]
    assert blocks.has_label("kidney").tolist() == [True] * 4
    for label, channel in (("kidney", 0), ("tumor", 1)):
        assert blocks.has_label(label).tolist() == [bool(block["label"][channel].any()) for block in blocks]
    with pytest.raises(ConfigError, match="'cyst' given, one of kidney, tumor expected"):
        blocks.has_label("cyst")


def test_they_can_be_seeded_pickled_and_transformed(store: Write) -> None:
    path = store({"a": [1] * 5, "c": [1], "d": [1]})
    seeded = SeededDataset(
        BlockDataset(path, "train", 3, 1), lambda block: block["image"][0, 0, 0] + torch.rand(1), seed=3
    )
    assert torch.equal(seeded[(2, 1)], seeded[(2, 1)])
    assert not torch.equal(seeded[(2, 1)], seeded[(3, 1)])
    blocks = BlockDataset(path, "train", 3, 1, transform=first_values)
    assert pickle.loads(pickle.dumps(blocks))[1] == blocks[1] == [2, 3, 4]
    with pytest.raises(IndexError):
        blocks[2]


def test_what_does_not_fit_is_refused(store: Write) -> None:
    path = store({"a": [1] * 5, "c": [1], "d": [1]})
    with pytest.raises(ConfigError, match="overlap of 3"):
        BlockDataset(path, "train", 3, 3)
    with pytest.raises(DatasetError, match="no group 'train2'"):
        BlockDataset(path, "train2")


@pytest.mark.realdata
def test_the_labeled_slices_of_real_patients(data: Path) -> None:
    """What the training part of KiTS is cut into: no slice is lost, and no patient."""
    counts, blocks = [], []
    for path in sorted((data / "kits19_labels").glob("case_*/segmentation.nii.gz")):
        labeled = np.flatnonzero(np.asarray(nib.load(path).dataobj).any(axis=(1, 2)))
        assert labeled[-1] - labeled[0] + 1 == len(labeled)  # a block of them is a piece of the patient
        counts.append(len(labeled))
        blocks.append(block_starts(len(labeled), 32, 12))
    assert len(counts) == 21
    assert sum(n < 32 for n in counts) == 4
    assert all(starts[-1] + 32 == max(n, 32) for n, starts in zip(counts, blocks, strict=True))
    # Of these 68 blocks, 19 are there only because the tail is not dropped, nor a patient with less than a block.
    assert sum(map(len, blocks)) == 68
    assert sum((n - 32) // 20 + 1 for n in counts if n >= 32) == 49
