"""A Hounsfield window as a layer, whose center and width are learned with the network behind it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from medseg.errors import ConfigError

Window = Mapping[str, float] | Sequence[float]


class LearnableWindow(nn.Module):
    """Look at a CT channel through one or more Hounsfield windows, whose centers and widths are parameters.

    What :class:`medseg.transforms.HounsfieldWindow` does to an image, differentiably, so that it may stand in front of
    any network and be trained with it: ``nn.Sequential(LearnableWindow((70, 200)), network)``. With center c and
    width w, a voxel x becomes::

        HW = c + w/2 - ReLU(w - ReLU(x + w/2 - c))        = min(c + w/2, max(c - w/2, x))

                      below    inside       above
        d HW / d c      1        0            1
        d HW / d w    -1/2       0           1/2

    Args:
        windows: one window or several, each ``{"center": 70, "width": 200}`` or ``(70, 200)``, in HU: where they start.
            Each gives one channel; they stand in the place of the CT channel. Other channels are left alone.
        channel: the channel which holds the CT.
        scale: whether the range of a window becomes 0 to 1, as a network wants its input: HW' = (HW - c) / w + 1/2.
            Scaling turns the table around: what lies outside is 0 or 1 wherever the window is, and inside
            d HW' / d c = -1/w and d HW' / d w = (c - x) / w². A window then learns from what it shows alone. The
            default leaves HU, and the equations as they are.
        unit: HU per unit of the parameters. Adam moves a parameter by about the learning rate in a step, whatever its
            gradient, which in HU is next to nothing; with ``unit=1000`` and a learning rate of 0.001 it is 1 HU.
        min_width: the width in use is never below it, in HU; the gradient is that of the width in use, so a width that
            fell below can rise again.

    Shape:
        ``(B, C, *spatial)`` -> ``(B, C - 1 + number of windows, *spatial)``

    Raises:
        ConfigError: for no window, a width below ``min_width``, a unit that is not positive, and for an image
            without the channel.

    Source:
        Moe 2019, Deep learning for automatic delineation of tumours from PET/CT images, section 6.1.4: equations 6.1
        to 6.5, derived there and not tried. Scale, unit and the least width are ours.

    Example:
        >>> ct_pet = torch.tensor([[[-1000.0, 20.0, 70.0, 300.0], [0.5, 1.0, 8.0, 2.0]]])
        >>> window = LearnableWindow([(70, 200), {"center": 60, "width": 100}])
        >>> window(ct_pet).detach()
        tensor([[[-30.0000,  20.0000,  70.0000, 170.0000],
                 [ 10.0000,  20.0000,  70.0000, 110.0000],
                 [  0.5000,   1.0000,   8.0000,   2.0000]]])
        >>> window.windows
        [{'center': 70.0, 'width': 200.0}, {'center': 60.0, 'width': 100.0}]
    """

    __jit_unused_properties__: ClassVar = ["windows"]

    def __init__(
        self,
        windows: Window | Sequence[Window],
        channel: int = 0,
        scale: bool = False,
        unit: float = 1.0,
        min_width: float = 1.0,
    ) -> None:
        super().__init__()
        if not (0 < unit < math.inf and 0 < min_width < math.inf):
            raise ConfigError(f"unit {unit}, min_width {min_width}: expected positive numbers of HU")
        pairs = _pairs(windows)
        if not pairs or not all(math.isfinite(center) and min_width <= width < math.inf for center, width in pairs):
            raise ConfigError(
                f"windows {windows}: expected at least one, each finite and with a width of at least {min_width} HU"
            )
        self.channel = channel
        self.scale = scale
        self.unit = unit
        self.min_width = min_width
        self.raw_center = nn.Parameter(torch.tensor([center / unit for center, _ in pairs]))
        self.raw_width = nn.Parameter(torch.tensor([width / unit for _, width in pairs]))

    @property
    def center(self) -> Tensor:
        """The centers in HU, one per window."""
        return self.raw_center * self.unit

    @property
    def width(self) -> Tensor:
        """The widths in use in HU, one per window."""
        width = self.raw_width * self.unit
        # The value is cut off, the gradient is not: clamp's own is zero below, and a width would never come back.
        # The difference is 0 exactly, however far below the width fell.
        return width.detach().clamp(min=self.min_width) + (width - width.detach())

    @property
    def windows(self) -> list[dict[str, float]]:
        """The windows as they are now, in the form that :class:`medseg.transforms.HounsfieldWindow` takes."""
        pairs = zip(self.center.tolist(), self.width.tolist(), strict=True)
        return [{"center": center, "width": width} for center, width in pairs]

    def forward(self, x: Tensor) -> Tensor:
        """Return the image with windows in place of the CT."""
        if not torch.jit.is_scripting() and not torch.jit.is_tracing():
            self._check(x)
        shape = [1, -1] + [1] * (x.dim() - 2)
        c, w = self.center.view(shape), self.width.view(shape)
        ct = x[:, self.channel : self.channel + 1]
        seen = ct.clamp(c - w / 2, c + w / 2)
        if self.scale:
            seen = (seen - c) / w + 0.5
        return torch.cat((x[:, : self.channel], seen, x[:, self.channel + 1 :]), dim=1)

    @torch.jit.unused
    def _check(self, x: Tensor) -> None:
        if x.ndim < 3 or not 0 <= self.channel < x.shape[1]:
            raise ConfigError(
                f"input of shape {tuple(x.shape)} has no channel {self.channel}, which the window is for: expected "
                "(batch, channels, spatial...); correct channel"
            )


def _pairs(windows: Window | Sequence[Window]) -> list[tuple[float, float]]:
    several: Any = windows
    try:
        if isinstance(windows, Mapping) or (windows and isinstance(windows[0], int | float)):
            several = [windows]
        ordered = [(w["center"], w["width"]) if isinstance(w, Mapping) else w for w in several]
        return [(float(center), float(width)) for center, width in ordered]
    except (TypeError, ValueError, LookupError):
        raise ConfigError(
            f"windows {windows}: expected center and width in HU of each, such as {{center: 70, width: 200}}"
        ) from None
