"""What is rare is seen more often, exactly as often as is said, in the training part alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.transforms import RandGaussianNoised
from torch.utils.data import Dataset

from medseg.data import (
    BlockDataset,
    SeededDataset,
    SeededLoader,
    SliceDataset,
    balanced_class_weights,
    balancing_factors,
    lesion_variants,
    oversample,
    write_slices,
)
from medseg.errors import ConfigError

SPLITS = {
    "seed": 0,
    "stratify": None,
    "folds": [{"train": ["c00", "c01", "c02"], "val": ["c03"]}],
    "test": ["c04", "c05"],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory, write_dataset):
    folder = write_dataset(tmp_path_factory.mktemp("dataset"))
    folder.write_split(SPLITS)
    return write_slices(folder.root, keep={"train": "all"})


def test_a_slice_store_knows_which_slice_holds_what(store):
    for group in ("train", "val", "test"):
        slices = SliceDataset(store, group)
        for channel, name in enumerate(("tumor", "node")):
            assert slices.has_label(name).tolist() == [bool(item["label"][channel].any()) for item in slices]
    with pytest.raises(ConfigError, match="'cyst' given, one of tumor, node"):
        slices.has_label("cyst")
    with pytest.raises(ConfigError, match="background"):
        slices.has_label("background")


def test_a_slice_store_counts_its_classes_without_reading_masks(store):
    for group in ("train", "val", "test"):
        slices = SliceDataset(store, group)
        masks = torch.stack([item["label"] for item in slices])
        counted = [int((masks.sum(1) == 0).sum()), int(masks[:, 0].sum()), int(masks[:, 1].sum())]
        assert slices.class_counts == dict(zip(["background", "tumor", "node"], counted, strict=True))
    # the class weights of the slices that are trained on, as in the KiTS work
    kept = SliceDataset(store, "train").class_counts
    assert balanced_class_weights(list(kept.values()))[0] == pytest.approx(sum(kept.values()) / 3 / kept["background"])


def test_slices_with_a_label_come_as_often_as_is_said_and_the_others_once(store):
    slices = SliceDataset(store, "train")
    held = slices.has_label("node")
    assert 0 < held.sum() < len(slices)
    more = oversample(slices, "node", times=4)
    assert len(more) == len(slices) + 3 * held.sum()
    assert [more.indices.count(index) for index in range(len(slices))] == [4 if holds else 1 for holds in held]
    assert torch.equal(more[more.indices.index(2)]["image"], slices[2]["image"])
    assert list(oversample(slices, "node", times=1).indices) == list(range(len(slices)))


def test_copies_have_draws_of_their_own_whatever_the_workers(store):
    more = oversample(SliceDataset(store, "train"), "node", times=3)
    dataset = SeededDataset(more, RandGaussianNoised("image", prob=1.0), seed=2)
    copies = [i for i, index in enumerate(more.indices) if index == 2]
    assert len(copies) == 3
    assert not torch.equal(dataset[copies[0]]["image"], dataset[copies[1]]["image"])
    alone = [batch["image"] for batch in SeededLoader(dataset, 4, seed=2)]
    helped = [batch["image"] for batch in SeededLoader(dataset, 4, seed=2, num_workers=1)]
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_only_the_training_part_is_balanced(store):
    for group in ("val", "test"):
        with pytest.raises(ConfigError, match=f"'{group}' given, train expected"):
            oversample(SliceDataset(store, group), "node", times=2)


def test_what_cannot_be_oversampled_is_refused(store):
    with pytest.raises(ConfigError, match="times: 0"):
        oversample(SliceDataset(store, "train"), "node", times=0)
    with pytest.raises(ConfigError, match="no sample of 2 holds 7"):
        oversample(items(2, 0), 7, times=2)


def test_blocks_with_a_label_come_as_often_as_is_said(store):
    blocks = BlockDataset(store, "train", size=2, overlap=1)
    held = blocks.has_label("node")
    assert 0 < held.sum() < len(blocks)
    more = SeededDataset(oversample(blocks, "node", times=4))
    assert len(more) == len(blocks) + 3 * held.sum()
    assert sum(bool(more[i]["label"][1].any()) for i in range(len(more))) == 4 * held.sum()
    with pytest.raises(ConfigError, match="'val' given"):
        oversample(BlockDataset(store, "val", size=2, overlap=1), "node", times=4)


class Blocks(Dataset):
    """Any dataset that says what its samples hold."""

    def has_label(self, name):
        return [name == "tumor" and index % 2 for index in range(4)]

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"image": torch.full((1, 2, 2, 2), float(index))}


def test_any_dataset_that_knows_its_labels_can_be_oversampled():
    more = SeededDataset(oversample(Blocks(), "tumor", times=2))
    assert [int(more[i]["image"][0, 0, 0, 0]) for i in range(len(more))] == [0, 1, 1, 2, 3, 3]


def items(benign, malignant):
    labels = [0] * benign + [1] * malignant
    return [{"image": [f"{n}.nii.gz"], "label": label, "case": f"c{n}"} for n, label in enumerate(labels)]


def test_the_factors_of_the_prostate_work():
    assert balancing_factors(items(150, 50), 60) == {0: 60, 1: 180}
    # all findings of the public table: 254 and 76; 60 * 254 / 76 = 200.53
    assert balancing_factors(items(254, 76), 60) == {0: 60, 1: 201}
    assert balancing_factors(items(96, 133), 200) == {0: 277, 1: 200}
    assert balancing_factors(items(5, 10)) == {0: 2, 1: 1}
    assert balancing_factors(items(2, 5)) == {0: 3, 1: 1}, "2.5 goes up"


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 240))
def test_balanced_classes_differ_by_half_a_repetition_per_case_at_most(labels, factor):
    factors = balancing_factors([{"label": label} for label in labels], factor)
    largest = max(labels.count(label) for label in factors)
    assert set(factors) == set(labels)
    for label, times in factors.items():
        n = labels.count(label)
        assert abs(n * times - factor * largest) <= n / 2
        assert n < largest or times == factor


def test_variants_are_drawn_without_replacement_and_by_case():
    lesions = items(3, 1)
    expanded = lesion_variants(lesions, balancing_factors(lesions, 60), seed=4)
    assert len(expanded) == 3 * 60 + 180
    for case in ("c0", "c1", "c2", "c3"):
        drawn = [item["variant"] for item in expanded if item["case"] == case]
        assert len(drawn) == len(set(drawn)) == (180 if case == "c3" else 60)
        assert set(drawn) <= set(range(246))
    drawn = {tuple(item["variant"] for item in expanded if item["case"] == case) for case in ("c0", "c1", "c2")}
    assert len(drawn) == 3
    # a case has its variants whatever the others are
    alone = lesion_variants(lesions[1:2], 60, seed=4)
    assert alone == [item for item in expanded if item["case"] == "c1"]
    assert lesion_variants(lesions[1:2], 60, seed=5) != alone
    assert "variant" not in lesions[0]
    assert sorted(item["variant"] for item in lesion_variants(lesions[:1], 246)) == list(range(246))


def test_eleven_variants_of_a_test_lesion():
    expanded = lesion_variants(items(2, 1), 11)
    assert [item["case"] for item in expanded] == ["c0"] * 11 + ["c1"] * 11 + ["c2"] * 11


def test_what_cannot_be_balanced_is_refused():
    with pytest.raises(ConfigError, match="none given"):
        balancing_factors([])
    with pytest.raises(ConfigError, match="factor: 0"):
        balancing_factors(items(1, 1), 0)
    with pytest.raises(ConfigError, match="no number of a class"):
        balancing_factors([{"label": "labelsTr/a.nii.gz"}])
    with pytest.raises(ConfigError, match=r"247 for case c0 of class 0, 1 to 246"):
        lesion_variants(items(1, 0), 247)
    with pytest.raises(ConfigError, match=r"0 for case c0 of class 0"):
        lesion_variants(items(1, 0), {1: 3})
