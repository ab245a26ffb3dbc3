"""Transforms that choose channels."""

from collections.abc import Hashable, Mapping, Sequence

from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor, ensure_tuple

from medseg.errors import ConfigError


class SelectChannels(Transform):
    """Keep the channels of these indices, in this order: CT alone, PET alone, or both.

    Args:
        channels: indices from 0; one may stand alone.

    Shape:
        ``(C, *spatial)`` -> ``(len(channels), *spatial)``; array for array, tensor for tensor, and a MetaTensor keeps
        its affine and meta.

    Raises:
        ConfigError: for no channel, and for one that the image does not have.

    Example:
        >>> import numpy as np
        >>> SelectChannels([2, 0])(np.array([[1], [2], [3]]))
        array([[3], [1]])
    """

    backend = (TransformBackends.TORCH, TransformBackends.NUMPY)

    def __init__(self, channels: int | Sequence[int]) -> None:
        self.channels = list(ensure_tuple(channels))
        if not self.channels:
            raise ConfigError("channels is empty; expected at least one index")

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Return the chosen channels."""
        require_channels(img, self.channels)
        values = convert_to_tensor(img, track_meta=False)
        return convert_to_dst_type(values[self.channels], dst=img)[0]


class SelectChannelsd(MapTransform):
    """Dictionary twin of :class:`SelectChannels`.

    Args:
        keys: the images.
        channels: as there.
        allow_missing_keys: whether a key may be absent.

    Example:
        >>> import numpy as np
        >>> SelectChannelsd("image", channels=[1])({"image": np.array([[1], [2], [3]])})
        {'image': array([[2]])}
    """

    backend = SelectChannels.backend

    def __init__(self, keys: KeysCollection, channels: int | Sequence[int], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.select = SelectChannels(channels)

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        """Return the dictionary with the chosen channels of its images."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.select(result[key])
        return result


def require_channels(img: NdarrayOrTensor, channels: Sequence[int]) -> None:
    """Raise a ConfigError that says how many channels the image has, where one of these is not among them.

    Example:
        >>> import numpy as np
        >>> require_channels(np.zeros((2, 4, 4)), [0, 2])
        Traceback (most recent call last):
        medseg.errors.ConfigError: channel 2 of an image with 2 channels: expected 0 to 1
    """
    found = img.shape[0]
    for channel in channels:
        if not 0 <= channel < found:
            raise ConfigError(
                f"channel {channel} of an image with {found} channel{'s' * (found != 1)}: expected 0 to {found - 1}"
            )
