"""Normalization by statistics that an image does not hold itself; the other normalizations are MONAI's."""

from collections.abc import Hashable, Mapping, Sequence

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor

from medseg.errors import ConfigError


class PopulationZScore(Transform):
    """Subtract the mean of a training population and divide by its standard deviation, channel by channel.

    The statistics are those of the training part of one fold; validation, test and new images get the same. That is
    the normalization of the knee thesis. The prostate thesis (equation 5.1) takes the whole data set's, test cases
    included, which leaks; this is its correction.

    Args:
        statistics: ``mean`` and ``std``, a number per channel: what :func:`medseg.data.training_statistics` returns,
            or, for an inference, :func:`medseg.engines.load_statistics`.

    Shape:
        ``(C, *spatial)`` -> the same, float32; array for array, tensor for tensor, and a MetaTensor keeps its affine
        and meta.

    Raises:
        ConfigError: for statistics that are absent or not finite, for a standard deviation that is not positive, and
            for an image with another number of channels.

    Source:
        Pröve 2017 (knee bones in MRI), z-score with mean and standard deviation of the training population.

    Example:
        >>> PopulationZScore({"mean": [100.0], "std": [20.0]})(torch.tensor([[80.0, 100.0, 150.0]]))
        tensor([[-1.0000,  0.0000,  2.5000]])
    """

    backend = (TransformBackends.TORCH, TransformBackends.NUMPY)

    def __init__(self, statistics: Mapping[str, Sequence[float]]) -> None:
        mean, std = statistics.get("mean", ()), statistics.get("std", ())
        self.mean, self.std = torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
        alike = self.mean.ndim == 1 and self.mean.shape == self.std.shape != (0,)
        if not alike or not torch.stack([self.mean, self.std]).isfinite().all() or not (self.std > 0).all():
            raise ConfigError(
                f"statistics: mean {mean} and std {std}, expected a number per channel each, the std positive; a "
                "channel that is constant in the training set cannot be normalized by it"
            )

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Return the normalized image."""
        if len(img) != len(self.mean):
            raise ConfigError(
                f"statistics: of {len(self.mean)} channels, the image has {len(img)}; measure them after the "
                "transforms that choose channels (`transform` of training_statistics)"
            )
        values = convert_to_tensor(img, dtype=torch.float32, track_meta=False)
        shape = (-1, *[1] * (values.ndim - 1))
        mean, std = (each.to(values.device).reshape(shape) for each in (self.mean, self.std))
        return convert_to_dst_type((values - mean) / std, dst=img, dtype=torch.float32)[0]


class PopulationZScored(MapTransform):
    """Dictionary twin of :class:`PopulationZScore`.

    Args:
        keys: the images.
        statistics: as there.
        allow_missing_keys: whether a key may be absent.

    Example:
        >>> PopulationZScored("image", {"mean": [1.0], "std": [2.0]})({"image": torch.tensor([[5.0]])})
        {'image': tensor([[2.]])}
    """

    backend = PopulationZScore.backend

    def __init__(
        self, keys: KeysCollection, statistics: Mapping[str, Sequence[float]], allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.normalize = PopulationZScore(statistics)

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        """Return the dictionary with its images normalized."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.normalize(result[key])
        return result
