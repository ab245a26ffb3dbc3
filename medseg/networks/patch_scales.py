"""What a patch classifier makes of one scale, in its two forms: of patches, and of all patches of an image at once."""

from collections.abc import Sequence

import torch
from monai.networks.layers import Conv, Pool, get_act_layer, split_args
from torch import Tensor, nn
from torch.nn import functional

from medseg.errors import ConfigError

from .voxel_patches import pad_by


class PatchLayer(nn.Module):
    """A convolution without padding, activation and pooling, of a patch or of all patches of an image at once."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        pool_size: int,
        dilation: int,
        pool: str,
        act: str | tuple,
    ) -> None:
        super().__init__()
        self.conv = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, kernel_size)
        self.act = activation(act, out_channels)
        self.pool = Pool[pool, spatial_dims](pool_size) if pool_size > 1 else nn.Identity()
        self.pool_size = pool_size
        self.dilation = dilation
        self.average = pool == "AVG"

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of patches."""
        return self.pool(self.act(self.conv(x)))

    def whole(self, x: Tensor) -> Tensor:
        """Return the features of all patches of an image."""
        x = self.act(_convolve(x, self.conv.weight, self.conv.bias, self.dilation))
        return _pool_everywhere(x, self.pool_size, self.dilation, self.average)


class PatchScale(nn.Module):
    """The sub-network of one scale: average, convolutions, and the size of what is left of the patch.

    Attributes:
        width: how many numbers it makes of a patch.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        size: int,
        step: int,
        margin: int,
        convolutions: Sequence[tuple[int, int, int]],
        pool: str,
        act: str | tuple,
    ) -> None:
        super().__init__()
        self.margin = margin
        self.step = step
        self.extent = size * step
        self.average = Pool["AVG", spatial_dims](step) if step > 1 else nn.Identity()
        self.layers = nn.ModuleList()
        side, dilation, channels = size, step, in_channels
        for target, kernel, pooling in convolutions:
            left = (side - kernel + 1) // pooling if pooling > 0 else 0
            if min(target, kernel) < 1 or left < 1:
                raise ConfigError(
                    f"convolutions {tuple(convolutions)}: ({target}, {kernel}, {pooling}) leaves nothing of {side} "
                    "voxels; expected (channels, kernel, pooling), all positive, and larger scales or fewer layers"
                )
            layer = PatchLayer(spatial_dims, channels, target, kernel, pooling, dilation, pool, act)
            self.layers.append(layer)
            side, dilation, channels = left, dilation * pooling, target
        self.shape = [channels] + [side] * spatial_dims
        self.dilation = dilation
        self.width = channels * side**spatial_dims

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, width) of patches of the largest scale."""
        x = self.average(pad_by(x, -self.margin, "constant"))
        for layer in self.layers:
            x = layer(x)
        return x.flatten(1)

    def whole(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return (B, H, *spatial) of padded images: the features of each voxel times `weight` (H, width)."""
        x = pad_by(x, -self.margin, "constant")
        sizes = [n - self.extent + 1 for n in x.shape[2:]]
        x = _pool_everywhere(x, self.step, 1, True)
        for layer in self.layers:
            x = layer.whole(x)
        x = _convolve(x, weight.unflatten(1, self.shape), None, self.dilation)
        # A pooling leaves out the last voxels of a patch where its size is odd, so there may be more than is needed.
        for axis, n in enumerate(sizes):
            x = x.narrow(axis + 2, 0, n)
        return x


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    # With channels last a CPU takes up to a third less time, and the dense layers behind need no copy.
    if x.ndim == 4:
        return functional.conv2d(x, weight.contiguous(memory_format=torch.channels_last), bias, dilation=dilation)
    return functional.conv3d(x, weight.contiguous(memory_format=torch.channels_last_3d), bias, dilation=dilation)


def _pool_everywhere(x: Tensor, size: int, dilation: int, average: bool) -> Tensor:
    """Pool windows of `size` voxels, `dilation` apart, at every voxel; axis by axis."""
    if size == 1:
        return x
    for axis in range(2, x.ndim):
        n = x.shape[axis] - (size - 1) * dilation
        pooled = x.narrow(axis, 0, n)
        for number in range(1, size):
            other = x.narrow(axis, number * dilation, n)
            pooled = pooled + other if average else torch.maximum(pooled, other)
        x = pooled / size if average else pooled
    return x


def activation(act: str | tuple, channels: int) -> nn.Module:
    """Return a MONAI activation; a PReLU with a slope for each channel."""
    name, arguments = split_args(act)
    if str(name).upper() == "PRELU":
        arguments = {"num_parameters": channels, **arguments}
    return get_act_layer((name, arguments))
