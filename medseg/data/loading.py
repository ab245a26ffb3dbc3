"""Loading with one source of randomness.

Every sample's seed comes from (run seed, epoch, index) and nothing else, so results depend neither on the number of
worker processes nor on what ran before, and an epoch can be entered in its middle.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from monai.data import CacheDataset, DataLoader, DistributedSampler
from monai.transforms import Randomizable
from torch.utils.data import Dataset

from medseg.errors import ConfigError


@contextmanager
def seeded(*words: int) -> Iterator[int]:
    """Seed Python's, NumPy's and torch's CPU generators from `words`, and put them back as they were afterwards.

    Args:
        words: non-negative integers, such as run seed, epoch and index; together they are one seed.

    Yields:
        A 32-bit seed derived from `words`, for generators that the caller owns.

    Example:
        >>> with seeded(0, 3, 14) as seed:
        ...     first = torch.rand(1)
        >>> with seeded(0, 3, 14):
        ...     bool(torch.rand(1) == first)
        True
    """
    seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield seed
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class SeededDataset(CacheDataset):
    """A dataset whose random transforms draw from (seed, epoch, index) alone.

    It is MONAI's `CacheDataset`: what comes before the first random transform is computed once and kept in memory
    (for the share `cache_rate` of the items), the rest is computed each time.

    Args:
        data: items to transform: a datalist, or any sequence-like dataset such as :class:`medseg.data.SliceDataset`.
        transform: one transform or a sequence of transforms; random ones are reseeded for every sample.
        seed: the run's seed.
        cache_rate: share of the items whose deterministic part is kept in memory, 0 to 1.
        num_workers: threads that fill the cache.

    Example:
        >>> from monai.transforms import RandScaleIntensity
        >>> dataset = SeededDataset([torch.ones(1)] * 3, RandScaleIntensity(factors=0.5, prob=1), seed=7)
        >>> bool(dataset[(0, 1)] == dataset[(0, 1)]), bool(dataset[(0, 1)] == dataset[(1, 1)])
        (True, False)
    """

    def __init__(
        self,
        data: Sequence[Any] | Dataset,
        transform: Sequence[Callable] | Callable | None = None,
        seed: int = 0,
        cache_rate: float = 0.0,
        num_workers: int = 1,
    ) -> None:
        self.seed = seed
        super().__init__(
            data=data,
            transform=() if transform is None else transform,
            cache_rate=cache_rate,
            num_workers=num_workers,
            progress=False,
            copy_cache=True,
        )

    def __getitem__(self, key: Any) -> Any:
        """Return the item of `key`: (epoch, index), as :class:`SeededSampler` gives it, or an index of epoch 0."""
        epoch, index = key if isinstance(key, tuple) else (0, int(key))
        with seeded(self.seed, epoch, index) as seed:
            if isinstance(self.transform, Randomizable):
                self.transform.set_random_state(seed=seed)
            return self._transform(index)


class SeededSampler(DistributedSampler):
    """Sampler that yields (epoch, index), the same whatever ran before, shared out over the processes of a run.

    Args:
        dataset: what is sampled; only its length is used.
        seed: the run's seed.
        shuffle: a new order each epoch, drawn from (seed, epoch), or the order of the dataset.
        even_divisible: repeat the first samples so that every process gets as many (training); or leave the last
            processes one sample short (evaluation).
        num_replicas: number of processes; default: torch.distributed's where it is initialized, else 1.
        rank: number of this process; default likewise, else 0.

    Example:
        >>> sampler = SeededSampler(range(4), seed=1)
        >>> sampler.set_epoch(2)
        >>> straight = list(sampler)
        >>> sampler.start = 3
        >>> list(sampler) == straight[3:]
        True
    """

    def __init__(
        self,
        dataset: Any,
        seed: int = 0,
        shuffle: bool = True,
        even_divisible: bool = True,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        super().__init__(
            dataset=dataset,
            even_divisible=even_divisible,
            num_replicas=(dist.get_world_size() if distributed else 1) if num_replicas is None else num_replicas,
            rank=(dist.get_rank() if distributed else 0) if rank is None else rank,
            shuffle=shuffle,
            seed=seed,
        )
        self.even_divisible = even_divisible
        #: Samples of the coming epoch to pass over, where an interrupted epoch goes on. Back to 0 after one epoch.
        self.start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(len(self.dataset))
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        if self.even_divisible:
            order = np.resize(order, self.total_size)
        start, self.start = self.start, 0
        mine = order[self.rank : self.total_size : self.num_replicas]
        return ((self.epoch, int(index)) for index in islice(mine, start, None))


class SeededLoader(DataLoader):
    """MONAI's `DataLoader` over a :class:`SeededDataset`, with a sampler and a generator of its own.

    Args:
        dataset: the dataset; it is asked for (epoch, index).
        batch_size: samples per batch (in each process of a distributed run), or a list of them, one per epoch, the last
            of which holds for all later epochs: batches that grow while the training goes on (Smith et al. 2018,
            Don't decay the learning rate, increase the batch size). Every epoch has each sample once, so epochs of
            larger batches have fewer iterations.
        seed: the run's seed.
        shuffle: whether every epoch has a new order.
        num_workers: worker processes; 0 loads in the trainer's own. They are kept from epoch to epoch.
        even_divisible: see :class:`SeededSampler`.
        kwargs: further arguments of `monai.data.DataLoader`.

    Raises:
        ConfigError: if a sampler is given: the order of the samples is this class's to keep; or for batch sizes that
            are no positive whole numbers.

    Example:
        >>> loader = SeededLoader(SeededDataset([torch.ones(1)] * 8), batch_size=[2, 2, 4])
        >>> loader.iterations(1), loader.iterations(2), loader.iterations(4)
        (4, 8, 12)
        >>> loader.sampler.set_epoch(3)
        >>> [len(batch) for batch in loader]
        [4, 4]
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int | Sequence[int],
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
        even_divisible: bool = True,
        **kwargs: Any,
    ) -> None:
        if "sampler" in kwargs or "batch_sampler" in kwargs:
            raise ConfigError(
                "SeededLoader: found a sampler, expected none, because the loader makes its own SeededSampler; "
                "use monai.data.DataLoader for another order"
            )
        sizes = list(batch_size) if isinstance(batch_size, Sequence) else [batch_size]
        if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ConfigError(
                f"batch_size: found {batch_size!r}, expected a positive whole number, or a list of them, one per epoch"
            )
        #: Samples per batch in the first epoch, the second, and so on; the last holds for all later ones.
        self.batch_sizes = sizes
        super().__init__(
            dataset,
            batch_size=sizes[0],
            sampler=SeededSampler(dataset, seed=seed, shuffle=shuffle, even_divisible=even_divisible),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            generator=torch.Generator().manual_seed(seed),
            **kwargs,
        )

    def iterations(self, epochs: int) -> int:
        """Return the number of batches in the first `epochs` epochs together."""
        return sum(self._length(epoch) for epoch in range(1, epochs + 1))

    def __iter__(self) -> Any:
        self.batch_sampler.batch_size = self._size(self.sampler.epoch)
        return super().__iter__()

    def __len__(self) -> int:
        """Return the number of batches in the epoch that the sampler is set to."""
        return self._length(self.sampler.epoch)

    def _size(self, epoch: int) -> int:
        """Return the batch size of an epoch; they count from 1, and a sampler that nobody has set says 0."""
        return self.batch_sizes[min(max(epoch, 1), len(self.batch_sizes)) - 1]

    def _length(self, epoch: int) -> int:
        samples, size = len(self.sampler), self._size(epoch)
        return samples // size if self.drop_last else -(-samples // size)
