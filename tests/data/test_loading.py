"""Loading draws every random number from (seed, epoch, index)."""

import random
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.transforms import Compose, MapTransform, RandGaussianNoised, RandomizableTransform, ScaleIntensityd
from torch.utils.data import Dataset

from medseg.data import SeededDataset, SeededLoader, SeededSampler, seeded
from medseg.errors import ConfigError


class GlobalNoised(MapTransform, RandomizableTransform):
    """A badly behaved transform, which draws from the three global generators."""

    def __call__(self, data):
        return {k: data[k] + torch.rand(1) + np.random.rand() + random.random() for k in self.keys}


class Ramp(Dataset):
    def __len__(self):
        return 11

    def __getitem__(self, index):
        return {"image": torch.arange(4.0).reshape(1, 2, 2) + index}


def noisy(cache_rate=0.0, seed=3):
    transform = Compose(
        [
            ScaleIntensityd("image", factor=1.0, minv=None, maxv=None),
            RandGaussianNoised("image", 1.0),
            GlobalNoised("image"),
        ]
    )
    return SeededDataset(Ramp(), transform, seed=seed, cache_rate=cache_rate)


def epochs(loader, which):
    out = []
    for epoch in which:
        loader.sampler.set_epoch(epoch)
        out += [batch["image"] for batch in loader]
    return torch.cat(out)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(num_workers):
    alone = epochs(SeededLoader(noisy(), 3, seed=5), [1, 2])
    helped = epochs(SeededLoader(noisy(), 3, seed=5, num_workers=num_workers), [1, 2])
    assert torch.equal(alone, helped)


def test_a_later_epoch_does_not_depend_on_the_earlier_ones():
    straight = epochs(SeededLoader(noisy(), 4, seed=5), [1, 2, 3])
    assert torch.equal(straight[-11:], epochs(SeededLoader(noisy(), 4, seed=5), [3]))


def test_an_epoch_entered_in_its_middle_goes_on_as_it_would_have():
    loader = SeededLoader(noisy(), 2, seed=5)
    straight = epochs(loader, [2])
    loader.sampler.start = 6
    assert torch.equal(epochs(loader, [2]), straight[6:])
    assert len(epochs(loader, [2])) == 11, "only one epoch is entered in its middle"


def test_epochs_differ_in_order_and_in_noise():
    loader = SeededLoader(noisy(), 11, seed=5)
    assert not torch.equal(epochs(loader, [1]), epochs(loader, [2]))
    dataset = noisy()
    assert not torch.equal(dataset[(1, 4)]["image"], dataset[(2, 4)]["image"])
    assert not torch.equal(dataset[(1, 4)]["image"], noisy(seed=4)[(1, 4)]["image"])


def test_caching_changes_nothing():
    assert torch.equal(noisy(cache_rate=1.0)[(1, 3)]["image"], noisy()[(1, 3)]["image"])


def test_the_callers_generators_are_left_as_they_were():
    dataset = noisy()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), float(torch.rand(1))
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    dataset[(1, 2)]
    iter(SeededLoader(dataset, 2))
    assert (random.random(), np.random.rand(), float(torch.rand(1))) == expected


@given(n=st.integers(1, 30), ranks=st.integers(1, 4), even=st.booleans(), epoch=st.integers(0, 5))
def test_the_processes_share_out_every_sample(n, ranks, even, epoch):
    n = max(n, ranks)
    shares = []
    for rank in range(ranks):
        sampler = SeededSampler(range(n), seed=1, even_divisible=even, num_replicas=ranks, rank=rank)
        sampler.set_epoch(epoch)
        shares.append([index for _, index in sampler])
        assert len(shares[-1]) == len(sampler)
    together = [index for share in shares for index in share]
    assert set(together) == set(range(n))
    if even:
        assert len({len(share) for share in shares}) == 1
    else:
        assert sorted(together) == list(range(n))


def test_without_shuffling_the_order_stands():
    sampler = SeededSampler(range(5), shuffle=False)
    assert [index for _, index in sampler] == [0, 1, 2, 3, 4]


def test_a_loader_with_another_sampler_is_refused():
    with pytest.raises(ConfigError, match="makes its own"):
        SeededLoader(noisy(), 2, sampler=SeededSampler(noisy()))


def test_seeds_that_differ_in_one_word_differ():
    drawn = set()
    for words in [(0, 1, 0), (1, 0, 0), (0, 0, 1), (0, 0, 0)]:
        with seeded(*words) as seed:
            drawn.add(seed)
    assert len(drawn) == 4


GROWING = [2, 3, 3, 8]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_growing_batches_hold_every_sample_of_each_epoch_once(num_workers):
    loader = SeededLoader(SeededDataset(Ramp()), GROWING, seed=5, num_workers=num_workers)
    lengths = []
    for epoch in range(1, 7):
        loader.sampler.set_epoch(epoch)
        batches = [batch["image"][:, 0, 0, 0].int().tolist() for batch in loader]
        size = GROWING[min(epoch, 4) - 1]
        assert [len(b) for b in batches] == [size] * (11 // size) + [11 % size] * (11 % size > 0)
        assert sorted(chain(*batches)) == list(range(11))
        assert len(loader) == len(batches)
        lengths.append(len(batches))
    assert lengths == [6, 4, 4, 2, 2, 2]
    assert [loader.iterations(n) for n in range(7)] == [0, 6, 10, 14, 16, 18, 20]


def test_growing_batches_come_as_often_in_every_process_of_a_run(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    loaders = []
    for rank in range(3):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        loaders.append(SeededLoader(SeededDataset(Ramp()), [1, 3], seed=5))
    for epoch, length in ((1, 4), (2, 2), (3, 2)):
        seen = []
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
            batches = [batch["image"][:, 0, 0, 0].int().tolist() for batch in loader]
            assert len(batches) == len(loader) == length
            seen += chain(*batches)
        assert len(seen) == 12  # one of the 11 twice, so that all have as many
        assert set(seen) == set(range(11))


def test_samples_and_their_order_do_not_depend_on_the_batch_size():
    alone = epochs(SeededLoader(noisy(), 1, seed=5), [1, 2, 3])
    assert torch.equal(epochs(SeededLoader(noisy(), [2, 5, 4], seed=5), [1, 2, 3]), alone)
    assert torch.equal(epochs(SeededLoader(noisy(), [2, 5, 4], seed=5, num_workers=2), [1, 2, 3]), alone)


def test_a_last_batch_that_is_dropped_is_not_counted():
    loader = SeededLoader(noisy(), [2, 4], drop_last=True)
    assert loader.iterations(2) == 5 + 2
    assert sum(1 for _ in loader) == len(loader) == 5


@pytest.mark.parametrize("size", [0, [], [4, 0], 2.0, [2, "4"], "16"])
def test_batch_sizes_that_cannot_be_are_refused(size):
    with pytest.raises(ConfigError, match=r"batch_size: found .*, expected a positive whole number"):
        SeededLoader(noisy(), size)
