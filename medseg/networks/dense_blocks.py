"""The parts of densely connected networks: a layer, the dense block, and the transitions between levels."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from monai.networks.blocks import ADN, Convolution
from monai.networks.blocks.denseblock import DenseBlock as Concatenated
from monai.networks.layers import Pool
from torch import Tensor, nn

from medseg.errors import ConfigError

from .arguments import per_axis
from .blocks import Head

_PROJECT = partial(Head, kernel_size=1)


class NormActConv(nn.Sequential):
    """Normalization -> activation -> convolution -> dropout, padded to keep the size: the layer of a DenseNet.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: one odd number or one per axis.
        act: a MONAI activation; not in place where there is no normalization, since dense blocks use their input again.
        norm: a MONAI normalization, None for none.
        dropout: probability of zeroing, 0 for none.
        dropout_dim: 1 zeroes single voxels, ``spatial_dims`` zeroes whole channels ("spatial dropout").

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``

    Source:
        Huang et al. 2017, Densely connected convolutional networks.

    Example:
        >>> NormActConv(2, 16, 4)(torch.zeros(1, 16, 5, 7)).shape
        torch.Size([1, 4, 5, 7])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int] | int = 3,
        act: str | tuple | None = "RELU",
        norm: str | tuple | None = "BATCH",
        dropout: float = 0.0,
        dropout_dim: int = 1,
    ) -> None:
        super().__init__(
            ADN(ordering="NA", in_channels=in_channels, act=act, norm=norm, norm_dim=spatial_dims),
            Convolution(
                spatial_dims,
                in_channels,
                out_channels,
                kernel_size=kernel_size,
                adn_ordering="D",
                act=None,
                norm=None,
                dropout=dropout or None,
                dropout_dim=dropout_dim,
            ),
        )
        self.out_channels = out_channels


class BottleneckLayer(nn.Sequential):
    """Two layers, the first a 1×1 one to four times the output's channels: it keeps wide dense blocks affordable.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``

    Source:
        Huang et al. 2017, DenseNet-B.

    Example:
        >>> BottleneckLayer(2, 256, 32)(torch.zeros(1, 256, 5, 7)).shape
        torch.Size([1, 32, 5, 7])
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__(
            NormActConv(spatial_dims, in_channels, 4 * out_channels, kernel_size=1),
            NormActConv(spatial_dims, 4 * out_channels, out_channels),
        )


class DenseBlock(nn.Module):
    """Layers of which each sees the input and all features before it, and adds ``growth`` channels to them.

    MONAI's :class:`monai.networks.blocks.DenseBlock`, given in channels rather than in layers::

        x -+----------> cat -+----------> cat -> ...
           +-> layer ---+    +-> layer ---+

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output; the growth of each layer follows from it.
        layers: how many.
        layer: called as ``layer(spatial_dims, in_channels, growth)``.
        keep_input: whether the output begins with the input; otherwise it is the new features alone.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``

    Raises:
        ConfigError: where the new channels cannot be shared evenly among the layers.

    Example:
        >>> block = DenseBlock(2, in_channels=16, out_channels=32, layers=4)
        >>> block.growth
        4
        >>> block(torch.zeros(1, 16, 5, 7)).shape
        torch.Size([1, 32, 5, 7])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        layers: int = 4,
        layer: Callable[..., nn.Module] = NormActConv,
        keep_input: bool = True,
    ) -> None:
        super().__init__()
        new = out_channels - in_channels if keep_input else out_channels
        if layers < 1 or new < layers or new % layers:
            raise ConfigError(
                f"a dense block from {in_channels} to {out_channels} channels adds {new}, which {layers} layers "
                "cannot share evenly; expected a positive multiple of layers"
            )
        self.growth = new // layers
        self.skipped = 0 if keep_input else in_channels
        self.out_channels = out_channels
        widths = [in_channels + number * self.growth for number in range(layers)]
        self.layers = Concatenated([layer(spatial_dims, width, self.growth) for width in widths])

    def forward(self, x: Tensor) -> Tensor:
        """Return the input, if it is kept, and the features of all layers."""
        return self.layers(x)[:, self.skipped :]


class TransitionDown(nn.Sequential):
    """From a dense level to the next: a 1×1 layer, then pooling; incomplete windows at the border count.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        strides: one number or one per axis.
        pool: "AVG" as in DenseNet or "MAX" as in FC-DenseNet.
        dropout: probability of zeroing, 0 for none.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *ceil(spatial / strides))``

    Example:
        >>> TransitionDown(2, 32, 16)(torch.zeros(1, 32, 5, 8)).shape
        torch.Size([1, 16, 3, 4])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        strides: Sequence[int] | int = 2,
        pool: str = "AVG",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            NormActConv(spatial_dims, in_channels, out_channels, kernel_size=1, dropout=dropout),
            Pool[pool, spatial_dims](kernel_size=strides, stride=strides, ceil_mode=True),
        )
        self.out_channels = out_channels


class TransitionUp(nn.Sequential):
    """Back from a dense level: a 1×1 layer, then each voxel repeated ``strides`` times.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *(spatial * strides))``

    Example:
        >>> TransitionUp(2, 32, 16, strides=(2, 1))(torch.zeros(1, 32, 5, 8)).shape
        torch.Size([1, 16, 10, 8])
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, strides: Sequence[int] | int = 2
    ) -> None:
        factor = tuple(float(s) for s in per_axis("strides", strides, spatial_dims))
        super().__init__(
            NormActConv(spatial_dims, in_channels, out_channels, kernel_size=1), nn.Upsample(scale_factor=factor)
        )
        self.out_channels = out_channels


class ReducedConcatenate(nn.Module):
    """A skip that stacks both streams and reduces them to a quarter of their channels by a 1×1 layer.

    Shape:
        ``(B, S, *spatial)``, ``(B, U, *spatial)`` -> ``(B, (U + S) // 4, *spatial)``

    Example:
        >>> ReducedConcatenate(2, 32, 32)(torch.zeros(1, 32, 3, 3), torch.zeros(1, 32, 3, 3)).shape
        torch.Size([1, 16, 3, 3])
    """

    def __init__(self, spatial_dims: int, skip_channels: int, up_channels: int) -> None:
        super().__init__()
        self.out_channels = (skip_channels + up_channels) // 4
        self.reduce = NormActConv(spatial_dims, skip_channels + up_channels, self.out_channels, kernel_size=1)

    def forward(self, skip: Tensor, up: Tensor) -> Tensor:
        """Return both, reduced."""
        return self.reduce(torch.cat((up, skip), dim=1))


class AddProjected(nn.Module):
    """A skip that adds the encoder's features, brought to the up-sampled stream's channels.

    Args:
        spatial_dims: 2 or 3.
        skip_channels: channels of the encoder's features.
        up_channels: channels of the up-sampled stream and of the output.
        project: called as ``project(spatial_dims, skip_channels, up_channels)``; by default a 1×1 convolution.

    Shape:
        ``(B, S, *spatial)``, ``(B, U, *spatial)`` -> ``(B, U, *spatial)``

    Example:
        >>> AddProjected(2, 64, 32)(torch.zeros(1, 64, 3, 3), torch.zeros(1, 32, 3, 3)).shape
        torch.Size([1, 32, 3, 3])
    """

    def __init__(
        self,
        spatial_dims: int,
        skip_channels: int,
        up_channels: int,
        project: Callable[..., nn.Module] = _PROJECT,
    ) -> None:
        super().__init__()
        self.out_channels = up_channels
        self.project = project(spatial_dims, skip_channels, up_channels)

    def forward(self, skip: Tensor, up: Tensor) -> Tensor:
        """Return the sum."""
        return up + self.project(skip)
