"""Patches around single voxels, for the training of patch classifiers.

Where a patch is a square or a cube that lies within the image, MONAI's ``RandCropByLabelClasses`` does; it never
centers one on a voxel near the border, cuts no orthogonal planes, and crops the label instead of taking the voxel's.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Randomizable, Transform, map_classes_to_indices
from monai.utils import TransformBackends, convert_to_tensor
from numpy.typing import NDArray
from torch import Tensor

from medseg.errors import ConfigError
from medseg.networks.voxel_patches import patches_around


class RandVoxelPatches(Randomizable, Transform):
    """Draw voxels of an image, so many of each class, and cut the patches around them.

    A patch reaches beyond the border of the image where its voxel lies near it, as it does in
    :class:`medseg.networks.PatchClassifier`, so every voxel can be drawn; voxels are drawn with replacement.

    Args:
        size: voxels along each side, an odd number: ``patch_size`` of the network. For several scales it is what the
            largest sees; the network cuts the others out of it.
        num_samples: voxels per image.
        ratios: the share of each class 0, 1, ... among them, as in MONAI's ``RandCropByLabelClasses``; equal numbers
            balance the classes. The share of a class that an image does not have goes to the others. A voxel of a
            class that has no ratio, such as one to be ignored, is never drawn.
        triplanar: three orthogonal planes as channels, instead of a square or a cube.
        padding: what lies outside the image: "constant" (zeros), "reflect" or "replicate"; that of the network.

    Shape:
        ``(C, *spatial)`` -> ``(num_samples, C, *[size] * dims)``, or triplanar ``(num_samples, 3 * C, size, size)``,
        float32

    Raises:
        ConfigError: for arguments that make no sense, and for an image without a voxel of any class that has a ratio.

    Example:
        >>> label = torch.zeros(1, 30, 30)
        >>> label[0, 7, 9] = 1
        >>> cut = RandVoxelPatches(size=5, num_samples=6, ratios=[1, 1]).set_random_state(0)
        >>> patches, voxels = cut(label, label)
        >>> tuple(patches.shape), patches[:, 0, 2, 2].tolist(), voxels[0].tolist()
        ((6, 1, 5, 5), [1.0, 1.0, 1.0, 1.0, 0.0, 1.0], [7, 9])
    """

    backend = (TransformBackends.TORCH, TransformBackends.NUMPY)

    def __init__(
        self,
        size: int,
        num_samples: int,
        ratios: Sequence[float],
        triplanar: bool = False,
        padding: str = "constant",
    ) -> None:
        if num_samples < 1 or not ratios or min(ratios) < 0 or not sum(ratios) > 0:
            raise ConfigError(
                f"num_samples {num_samples}, ratios {tuple(ratios)}: expected at least 1, and a share per class, none "
                "of them negative and one at least positive"
            )
        self.size, self.num_samples, self.triplanar, self.padding = size, num_samples, triplanar, padding
        self.ratios = np.asarray(ratios, dtype=np.float64)
        self.voxels: NDArray[np.int64] = np.empty((0, 0), np.int64)

    def randomize(self, label: NdarrayOrTensor) -> None:
        """Draw the voxels, (num_samples, dims), from a label map, ``(1, *spatial)``."""
        indices = [np.asarray(i) for i in map_classes_to_indices(label, num_classes=len(self.ratios))]
        shares = self.ratios * [len(i) > 0 for i in indices]
        if not shares.sum() > 0:
            raise ConfigError(
                f"label: no voxel of the classes {np.flatnonzero(self.ratios).tolist()}, which are to be drawn"
            )
        classes = self.R.choice(len(shares), self.num_samples, p=shares / shares.sum())
        flat = [indices[c][self.R.randint(len(indices[c]))] for c in classes]
        self.voxels = np.stack(np.unravel_index(flat, label.shape[1:]), axis=1)

    def __call__(
        self, img: NdarrayOrTensor, label: NdarrayOrTensor | None = None, randomize: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the patches and the indices of their voxels, (num_samples, dims)."""
        if randomize:
            if label is None:
                raise ConfigError("label: none given, a label map expected from which to draw voxels")
            self.randomize(label)
        image = convert_to_tensor(img, dtype=torch.float32, track_meta=False)
        voxels = torch.from_numpy(self.voxels)
        return patches_around(image, voxels.to(image.device), self.size, self.triplanar, self.padding), voxels


class RandVoxelPatchesd(Randomizable, MapTransform):
    """Dictionary twin of :class:`RandVoxelPatches`: one dictionary for each voxel, as MONAI's crops give them.

    Each has the patches, the class of the voxel (a number, for a cross-entropy), its values in other maps, such as
    distances to centroids, and its index under ``voxel``.

    Args:
        keys: the images, all of one grid.
        label_key: the label map, ``(1, *spatial)``.
        size: as there.
        num_samples: as there.
        ratios: as there.
        triplanar: as there.
        padding: as there.
        voxel_keys: maps ``(R, *spatial)`` of which only the value at the voxel is kept, (R,).
        allow_missing_keys: whether a key may be absent.

    Example:
        >>> cut = RandVoxelPatchesd("image", "label", size=5, num_samples=4, ratios=[1, 1], triplanar=True)
        >>> items = cut({"image": torch.zeros(1, 9, 9, 9), "label": torch.ones(1, 9, 9, 9)})
        >>> len(items), tuple(items[0]["image"].shape), items[0]["label"]
        (4, (3, 5, 5), tensor(1))
    """

    backend = RandVoxelPatches.backend

    def __init__(
        self,
        keys: KeysCollection,
        label_key: str,
        size: int,
        num_samples: int,
        ratios: Sequence[float],
        triplanar: bool = False,
        padding: str = "constant",
        voxel_keys: KeysCollection = (),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.cut = RandVoxelPatches(size, num_samples, ratios, triplanar, padding)
        self.label_key = label_key
        self.voxel_keys = (voxel_keys,) if isinstance(voxel_keys, str) else tuple(voxel_keys)

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> "RandVoxelPatchesd":
        """Seed the drawing."""
        super().set_random_state(seed, state)
        self.cut.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        """Return a dictionary for each voxel."""
        label = data[self.label_key]
        self.cut.randomize(label)
        grid = tuple(label.shape[1:])
        patches = {}
        for key in self.key_iterator(dict(data)):
            _check_grid(key, data[key], grid)
            patches[key] = self.cut(data[key], randomize=False)[0]
        voxels = torch.from_numpy(self.cut.voxels)
        maps = {}
        for key in (*self.voxel_keys, self.label_key):
            _check_grid(key, data[key], grid)
            values = convert_to_tensor(data[key], track_meta=False)
            maps[key] = values[(slice(None), *voxels.unbind(1))].t()
        maps[self.label_key] = maps[self.label_key][:, 0].long()
        rest = {key: value for key, value in data.items() if key not in patches and key not in maps}
        columns = {**patches, **maps, "voxel": voxels}
        return [
            rest | {key: values[number] for key, values in columns.items()} for number in range(self.cut.num_samples)
        ]


def _check_grid(key: Hashable, image: NdarrayOrTensor, grid: tuple[int, ...]) -> None:
    if tuple(image.shape[1:]) != grid:
        raise ConfigError(
            f"{key}: of {tuple(image.shape[1:])} voxels, the label map has {grid}; bring them on one grid"
        )
