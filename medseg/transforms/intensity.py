"""Transforms of voxel values."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor

from medseg.errors import ConfigError

from .channels import require_channels

Window = Mapping[str, float] | Sequence[float]


class HounsfieldWindow(Transform):
    """Look at a CT channel through one or more Hounsfield windows, as a radiologist does.

    A window clips to ``[center - width / 2, center + width / 2]`` (equation 6.1 of the PET/CT thesis). Each window
    gives one channel; they stand in the place of the CT channel, in the order given. Other channels are left alone.

    Args:
        windows: one window or several, each ``{"center": 70, "width": 200}`` or ``(70, 200)``, in HU.
        channel: the channel which holds the CT.
        scale: whether a window's range becomes 0 to 1; else the clipped values stay in HU.
        keep_raw: whether the CT itself, unscaled in HU, is added as the last of all channels.

    Shape:
        ``(C, *spatial)`` -> ``(C - 1 + number of windows (+ 1), *spatial)``, float32; array for array, tensor for
        tensor, and a MetaTensor keeps its affine and meta.

    Raises:
        ConfigError: for a width which is not positive, for no window, and for a channel that the image does not have.

    Source:
        Moe 2019, Deep learning for automatic delineation of tumours from PET/CT images, equation 6.1.

    Example:
        >>> ct_pet = torch.tensor([[-1000.0, 20.0, 70.0, 300.0], [0.5, 1.0, 8.0, 2.0]])
        >>> HounsfieldWindow({"center": 70, "width": 200})(ct_pet)
        tensor([[0.0000, 0.2500, 0.5000, 1.0000],
                [0.5000, 1.0000, 8.0000, 2.0000]])
        >>> HounsfieldWindow([(70, 200), (60, 100)], scale=False)(ct_pet)[:2]
        tensor([[-30.,  20.,  70., 170.],
                [ 10.,  20.,  70., 110.]])
    """

    backend = (TransformBackends.TORCH, TransformBackends.NUMPY)

    def __init__(
        self,
        windows: Window | Sequence[Window],
        channel: int = 0,
        scale: bool = True,
        keep_raw: bool = False,
    ) -> None:
        self.windows = _parse(windows)
        self.channel = channel
        self.scale = scale
        self.keep_raw = keep_raw

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Return the image with windows in place of the CT."""
        require_channels(img, [self.channel])
        values = convert_to_tensor(img, dtype=torch.float32, track_meta=False)
        ct = values[self.channel : self.channel + 1]
        seen = []
        for center, width in self.windows:
            low, high = center - width / 2, center + width / 2
            clipped = ct.clamp(low, high)
            seen.append((clipped - low) / width if self.scale else clipped)
        parts = [values[: self.channel], *seen, values[self.channel + 1 :], *([ct] if self.keep_raw else [])]
        return convert_to_dst_type(torch.cat(parts), dst=img, dtype=torch.float32)[0]


class HounsfieldWindowd(MapTransform):
    """Dictionary twin of :class:`HounsfieldWindow`.

    Args:
        keys: the images.
        windows: as there.
        channel: as there.
        scale: as there.
        keep_raw: as there.
        allow_missing_keys: whether a key may be absent.

    Example:
        >>> HounsfieldWindowd("image", windows=(0, 100))({"image": torch.tensor([[-80.0, 0.0, 10.0]])})
        {'image': tensor([[0.0000, 0.5000, 0.6000]])}
    """

    backend = HounsfieldWindow.backend

    def __init__(
        self,
        keys: KeysCollection,
        windows: Window | Sequence[Window],
        channel: int = 0,
        scale: bool = True,
        keep_raw: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.window = HounsfieldWindow(windows, channel, scale, keep_raw)

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        """Return the dictionary with its images windowed."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.window(result[key])
        return result


def _parse(windows: Any) -> list[tuple[float, float]]:
    if isinstance(windows, Mapping) or (windows and isinstance(windows[0], int | float)):
        windows = [windows]
    if not windows:
        raise ConfigError("windows is empty; expected at least one, such as {center: 70, width: 200}")
    return [_center_and_width(window) for window in windows]


def _center_and_width(window: Any) -> tuple[float, float]:
    try:
        center, width = map(float, (window["center"], window["width"]) if isinstance(window, Mapping) else window)
        valid = math.isfinite(center) and 0 < width < math.inf and len(window) == 2
    except (TypeError, ValueError, KeyError):
        valid = False
    if not valid:
        raise ConfigError(
            f"window {window}: expected center and width in HU, the width positive, such as {{center: 70, width: 200}}"
        )
    return center, width
