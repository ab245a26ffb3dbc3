"""PSPNet: a pyramid of pooled features behind an encoder."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from monai.networks.layers import Pool
from torch import Tensor, nn
from torch.nn import functional

from medseg.errors import ConfigError

from .arguments import require_network
from .blocks import ConvActNorm, Head, MaxPool, he_normal, linear_mode
from .encoders import BottleneckResNet, Normalization, OverEncoder, Part, conv_norm_act

# The encoder of the original.
_RESNET50 = partial(BottleneckResNet, deep_stem=True)


class PyramidPooling(nn.Module):
    """PSPNet's pyramid pooling module: averages over large regions, laid beside the features.

    Each of the pools is followed by a 1×1 convolution, normalization, ReLU and linear resizing::

        features ----------------------------------------+
        pooled --+-- pools[0] -- 1×1 -- resize ----------+-- concatenate
                 +-- pools[1] -- 1×1 -- resize ----------+
                 +-- ...

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of what is pooled.
        out_channels: channels of each branch.
        pools: the averages.
        norm: a MONAI normalization.

    Shape:
        ``(B, F, *spatial)``, ``(B, in_channels, *any)`` -> ``(B, F + len(pools) * out_channels, *spatial)``

    Source:
        Zhao et al. 2017, Pyramid scene parsing network, figure 3.

    Example:
        >>> pools = [nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(4)]
        >>> features = torch.zeros(2, 32, 9, 12)
        >>> PyramidPooling(2, 32, 8, pools)(features, features).shape
        torch.Size([2, 48, 9, 12])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        pools: Sequence[nn.Module],
        norm: Normalization = "BATCH",
    ) -> None:
        super().__init__()
        self.mode = linear_mode(spatial_dims)
        self.branches = nn.ModuleList(
            nn.Sequential(pool, conv_norm_act(spatial_dims, in_channels, out_channels, norm=norm)) for pool in pools
        )

    def forward(self, features: Tensor, pooled: Tensor) -> Tensor:
        """Return the features and the branches at their size."""
        found = [features]
        for branch in self.branches:
            y = branch(pooled)
            found.append(functional.interpolate(y, size=features.shape[2:], mode=self.mode, align_corners=False))
        return torch.cat(found, dim=1)


class WindowMean(nn.Module):
    """Mean over windows side by side; where a window is incomplete, or longer than the image, over what there is.

    Shape:
        ``(B, C, *spatial)`` -> ``(B, C, *ceil(spatial / window))``

    Example:
        >>> WindowMean(4)(torch.arange(6.0).reshape(1, 1, 1, 6))
        tensor([[[[1.5000, 4.5000]]]])
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """Return the means."""
        # In 3D torch takes no window that is longer than the image, nor half precision on the CPU.
        window = [min(self.window, size) for size in x.shape[2:]]
        if x.ndim == 5:
            return functional.avg_pool3d(x.float(), window, ceil_mode=True).to(x.dtype)
        return functional.avg_pool2d(x, window, ceil_mode=True)


class PSPNet(OverEncoder):
    """The pyramid scene parsing network in 2D or 3D, over any encoder of :mod:`medseg.networks.encoders`.

    ::

        image -- encoder -- last features -- pyramid pooling -- conv -- dropout -- head 1×1 -- upsample -- logits

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the output: 1 for one class against background by sigmoid, else one per class.
        encoder: called as ``encoder(spatial_dims, in_channels, output_stride=...)``; by default ResNet-50 with the
            stem of three convolutions.
        output_stride: voxels of the image along a side of the encoder's last features: 8, 16 or 32.
        bins: of the pyramid: for each branch into how many regions an axis is divided.
        windows: in place of bins, for each branch the side of its regions in voxels. An incomplete region at the
            border, or a whole axis shorter than the window, is averaged over what there is.
        pool_image: whether the pyramid pools the image rather than the encoder's features.
        pyramid_channels: channels of each branch; by default those of the encoder are shared out among the branches.
        channels: of the convolution behind the pyramid.
        kernel_size: of that convolution; an even kernel is padded with the extra zero at the end, as in Keras.
        norm: a MONAI normalization for all but the encoder. With batch normalization a branch of one region needs
            two images or more in training; ``("GROUP", {"num_groups": 8})`` does with one.
        dropout: probability of zeroing an activation in front of the head.
        initializer: applied to every module when the network is built; None leaves the encoder's own.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``, logits. Any size, odd ones too.

    Raises:
        ConfigError: for arguments that make no network, and in ``forward`` for an image that does not fit it.

    Source:
        Zhao et al. 2017, Pyramid scene parsing network; without its auxiliary loss.

    Example:
        >>> encoder = partial(BottleneckResNet, layers=(1, 1, 1, 1), width=0.125)
        >>> network = PSPNet(3, 1, 2, encoder=encoder, channels=16)
        >>> network(torch.zeros(2, 1, 33, 32, 17)).shape
        torch.Size([2, 2, 33, 32, 17])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        encoder: Part = _RESNET50,
        output_stride: int = 8,
        bins: Sequence[int] = (1, 2, 3, 6),
        windows: Sequence[int] | None = None,
        pool_image: bool = False,
        pyramid_channels: int | None = None,
        channels: int = 512,
        kernel_size: int = 3,
        norm: Normalization = "BATCH",
        dropout: float = 0.1,
        initializer: Callable[[nn.Module], None] | None = he_normal,
    ) -> None:
        require_network(spatial_dims, channels=channels, kernel_size=kernel_size)
        sides = tuple(bins if windows is None else windows)
        if not sides or min(sides) < 1:
            raise ConfigError(f"bins {bins}, windows {windows}: expected positive numbers, one per branch")
        super().__init__(spatial_dims, in_channels, out_channels, encoder, output_stride)
        width = self.encoder.widths[-1]
        if pyramid_channels is None:
            pyramid_channels = max(1, width // len(sides))
        divide = Pool["ADAPTIVEAVG", spatial_dims]
        pools = [divide(b) for b in bins] if windows is None else [WindowMean(w) for w in windows]
        self.bins, self.windows = bins, windows
        self.pool_image = pool_image
        self.pyramid = PyramidPooling(spatial_dims, in_channels if pool_image else width, pyramid_channels, pools, norm)
        joined = width + len(sides) * pyramid_channels
        self.fuse = nn.Sequential(
            conv_norm_act(spatial_dims, joined, channels, kernel_size, norm=norm), nn.Dropout(float(dropout))
        )
        self.head = Head(spatial_dims, channels, out_channels, kernel_size=1)
        if initializer is not None:
            self.apply(initializer)

    def _features(self, x: Tensor) -> Tensor:
        """Return the joined pyramid."""
        features = self.encoder(x)[-1]
        return self.fuse(self.pyramid(features, x if self.pool_image else features))

    @torch.jit.unused
    def _pooled(self, size: Sequence[int]) -> tuple[nn.Module, int]:
        """Return the pyramid, and the number of regions in the branch that has the fewest."""
        if self.windows is None:
            return self.pyramid, min(self.bins) ** self.spatial_dims
        stride = 1 if self.pool_image else self.encoder.strides[-1]
        return self.pyramid, math.prod([math.ceil(math.ceil(s / stride) / max(self.windows)) for s in size])


class KitsEncoder(nn.Module):
    """The encoder of the kidney tumor work's small PSPNet, each convolution followed by ReLU and normalization.

    ::

        image -> conv 3×3 -> pool -> conv 2×2 -> conv 3×3 -> pool
                              |                               |
                        widths[0], / 2                  widths[1], / 4

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        output_stride: 4.
        channels: of the three convolutions.

    Shape:
        ``(B, in_channels, *spatial)`` -> a list of ``(B, widths[i], *ceil(spatial / strides[i]))``

    Raises:
        ConfigError: for arguments that make no encoder.

    Example:
        >>> [tuple(features.shape) for features in KitsEncoder(2, 3)(torch.zeros(2, 3, 30, 33))]
        [(2, 64, 15, 17), (2, 256, 8, 9)]
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, output_stride: int = 4, channels: Sequence[int] = (64, 128, 256)
    ) -> None:
        super().__init__()
        if output_stride != 4:
            raise ConfigError(f"output_stride is {output_stride}; expected 4, the only one of KitsEncoder")
        if len(channels) != 3:
            raise ConfigError(f"channels is {tuple(channels)}; expected three numbers, one per convolution")
        first, second, third = channels
        require_network(spatial_dims, in_channels=in_channels, channels=channels)
        self.fine = nn.Sequential(ConvActNorm(spatial_dims, in_channels, first), MaxPool(spatial_dims, first, first))
        self.coarse = nn.Sequential(
            ConvActNorm(spatial_dims, first, second, kernel_size=2),
            ConvActNorm(spatial_dims, second, third),
            MaxPool(spatial_dims, third, third),
        )
        self.widths = (first, third)
        self.strides = (2, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of the two levels."""
        fine = self.fine(x)
        return [fine, self.coarse(fine)]


def kits_pspnet_small(spatial_dims: int = 2, in_channels: int = 3, out_channels: int = 3, **parts: Any) -> PSPNet:
    """Return the small PSPNet of the kidney tumor work, whose pyramid pools the image itself.

    ::

        image --+-- KitsEncoder, 256 channels, / 4 ------------------------+
                +-- mean of 16×16 -- 1×1, 256 -- resize -------------------+
                +-- mean of  8×8  -- 1×1, 256 -- resize -------------------+-- 2×2, 256 -- 1×1, 3 -- upsample
                +-- mean of  4×4  -- 1×1, 256 -- resize -------------------+
                +-- mean of  2×2  -- 1×1, 256 -- resize -------------------+

    Every convolution but the last is followed by normalization. Its number of parameters fixes which have a bias too:
    of the assemblies that normalize them all, the one in which the encoder's have and the others have not is the
    natural one. The number does not fix the rest: in the encoder ReLU stands in front of normalization, as in the
    work's U-Net, and the initialization is He's.

    Args:
        spatial_dims: 2, as there, or 3.
        in_channels: channels of the image, there a gray slice three times.
        out_channels: channels of the logits, there background, kidney and tumor by softmax.
        parts: other arguments of :class:`PSPNet`.

    Source:
        Detko 2020, bachelor thesis on kidney tumors in CT (KiTS19).

    Example:
        >>> from medseg.networks import count_parameters
        >>> count_parameters(kits_pspnet_small(), running_statistics=True)
        1651331
    """
    ours: dict[str, Any] = {
        "encoder": KitsEncoder,
        "output_stride": 4,
        "windows": (16, 8, 4, 2),
        "pool_image": True,
        "pyramid_channels": 256,
        "channels": 256,
        "kernel_size": 2,
    }
    return PSPNet(spatial_dims, in_channels, out_channels, **{**ours, **parts})


def kits_pspnet_big(spatial_dims: int = 2, in_channels: int = 3, out_channels: int = 3, **parts: Any) -> PSPNet:
    """Return the big PSPNet of the kidney tumor work: ResNet-50 with PSPNet's stem, windows of 16, 8, 4 and 2 voxels.

    ::

        image -- ResNet-50, 2,048 channels, / 8 --+----------------------------------------+
                                                  +-- mean of 16×16 -- 1×1, 512 -- resize -+
                                                  +-- mean of  8×8  -- 1×1, 512 -- resize -+-- 3×3, 512 -- 1×1, 3
                                                  +-- mean of  4×4  -- 1×1, 512 -- resize -+
                                                  +-- mean of  2×2  -- 1×1, 512 -- resize -+

    Its number of parameters is that of the original PSPNet-50 (a stem of three 3×3 convolutions, no bias but the last
    layer's, normalization everywhere) with three classes. The windows are those of the work, made for 128×128 pixels,
    where the largest covers the image; on larger images they see no more than 128 pixels, and ``windows=None`` gives
    PSPNet's own 1, 2, 3 and 6 regions.

    A bottleneck halves the image in its 3×3 convolution here, in its first 1×1 there, and the first bottleneck of a
    dilated level looks half as far here. Neither changes a parameter. The initialization is not stated and is He's.

    Args:
        spatial_dims: 2, as there, or 3.
        in_channels: channels of the image, there a gray slice three times.
        out_channels: channels of the logits, there background, kidney and tumor by softmax.
        parts: other arguments of :class:`PSPNet`.

    Source:
        Detko 2020, bachelor thesis on kidney tumors in CT (KiTS19).

    Example:
        >>> from medseg.networks import count_parameters
        >>> count_parameters(kits_pspnet_big(initializer=None), running_statistics=True)
        46765763
    """
    ours: dict[str, Any] = {"windows": (16, 8, 4, 2)}
    return PSPNet(spatial_dims, in_channels, out_channels, **{**ours, **parts})
