"""Blocks of neighboring slices, for 3D networks that do not take a whole patient at once."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from medseg.data.slices import SliceDataset
from medseg.errors import ConfigError

_AIR_HU = -1024.0


def block_starts(n: int, size: int, overlap: int) -> list[int]:
    """Where blocks of slices begin, so that they cover all n.

    A block begins every ``size - overlap`` slices; the last one is moved back to end with the last slice, so that it
    overlaps more with the one before it and no slice is left out. Fewer slices than one block are one block.

    MONAI's ``SlidingWindowInferer(roi_size=(x, y, size), overlap=(0, 0, overlap / size))`` takes the same blocks of a
    whole patient, and stitches what is predicted for them, with the mean where they overlap.

    Args:
        n: slices.
        size: slices of a block.
        overlap: slices that a block has in common with the one before it, at least.

    Raises:
        ConfigError: no slices, a block without slices, or an overlap of a whole block.

    Source:
        Detko 2020: blocks of 32 slices with an overlap of 12.

    Example:
        >>> block_starts(80, size=32, overlap=12)
        [0, 20, 40, 48]
        >>> block_starts(25, size=32, overlap=12)
        [0]
    """
    if n < 1 or not 0 <= overlap < size:
        raise ConfigError(
            f"{n} slices, blocks of {size} with an overlap of {overlap}: expected at least one slice, and an overlap "
            "from 0 to less than a block"
        )
    last = max(0, n - size)
    return [*range(0, last, size - overlap), last]


class BlockDataset(Dataset[dict[str, Any]]):
    """The slices of one part of a slice store as blocks of neighbors.

    The store decides which slices there are: ``data_prep slices`` leaves slices without any label out of the training
    part, and keeps all of the others (KiTS: slices without a kidney). Slices of a block lie next to each other in the
    patient: where the store leaves one out between two others, a block ends. A run of fewer slices than a block is
    padded at its end: CT with -1024 HU, any other channel with its minimum in the block, masks with 0. The KiTS work
    drops such patients (4 of 21 that were looked at); here they are kept.

    Args:
        path: the HDF5 file that :func:`medseg.data.write_slices` wrote.
        group: ``"train"``, ``"val"`` or ``"test"``.
        size: slices of a block.
        overlap: see :func:`block_starts`.
        transform: applied to the dictionary of each block.

    A block is a dictionary as of :class:`medseg.data.SliceDataset`, with a third axis: ``image`` [c, x, y, size] and
    ``label`` [m, x, y, size]; ``slice`` is the position of its first slice in the case's 3D image.

    Attributes:
        slices: the :class:`medseg.data.SliceDataset` below.
        group: the part.

    Raises:
        ConfigError: a size and an overlap that do not fit.
        DatasetError, LeakageError: as SliceDataset.

    Example:
        >>> blocks = BlockDataset("DATASET/slices.h5", "train", size=32, overlap=12)      # doctest: +SKIP
        >>> blocks[0]["image"].shape, blocks.has_label("tumor").sum()                     # doctest: +SKIP
        (torch.Size([1, 128, 128, 32]), 104)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        group: str,
        size: int = 32,
        overlap: int = 12,
        transform: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self.slices = SliceDataset(path, group)
        self.group, self.size, self.transform = group, size, transform
        case, position = self.slices.positions.T
        gap = (np.diff(case) != 0) | (np.diff(position) != 1)
        runs = np.split(np.arange(len(case)), np.flatnonzero(gap) + 1) if len(case) else []
        self._blocks = [run[start : start + size] for run in runs for start in block_starts(len(run), size, overlap)]

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        items = [self.slices[int(number)] for number in self._blocks[index]]
        missing = self.size - len(items)
        block = {**items[0], **{key: torch.stack([item[key] for item in items], -1) for key in ("image", "label")}}
        if missing:
            least = block["image"].amin((1, 2, 3))
            ct = torch.tensor([name.upper() == "CT" for name in self.slices.channel_names])
            empty = torch.where(ct, _AIR_HU, least).reshape(-1, 1, 1, 1).expand(*block["image"].shape[:3], missing)
            block["image"] = torch.cat([block["image"], empty], -1)
            block["label"] = torch.nn.functional.pad(block["label"], (0, missing))
        return block if self.transform is None else self.transform(block)

    def has_label(self, name: str) -> NDArray[np.bool_]:
        """Say for every block whether a voxel of it has this label; no mask is read.

        Args:
            name: one of the labels but the background.

        Raises:
            ConfigError: there is no such label.
        """
        held = self.slices.has_label(name)
        return np.array([held[block].any() for block in self._blocks], dtype=bool)
