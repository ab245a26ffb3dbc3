"""The V-Net as published."""

from collections.abc import Callable, Sequence

from monai.networks.blocks import ADN, Convolution, ResidualUnit
from torch import Tensor, nn
from torch.nn import functional

from .arguments import one_per, require_network
from .blocks import Concatenate, Head, TransposedConv, he_normal
from .encoder_decoder import EncoderDecoder


class StridedConv(nn.Module):
    """A convolution whose windows do not overlap, then an activation; zeros complete a window at the border.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *ceil(spatial / 2))``

    Example:
        >>> import torch
        >>> StridedConv(2, 8, 16)(torch.zeros(1, 8, 5, 6)).shape
        torch.Size([1, 16, 3, 3])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        act: str | tuple | None = "PRELU",
        norm: str | tuple | None = None,
    ) -> None:
        super().__init__()
        self.conv = Convolution(
            spatial_dims, in_channels, out_channels, strides=2, kernel_size=2, padding=0, act=act, norm=norm
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the features at half the size."""
        pad: list[int] = []
        for axis in range(1, x.ndim - 1):
            pad += [0, x.shape[-axis] % 2]
        return self.conv(functional.pad(x, pad))


class VNet(EncoderDecoder):
    """A U-shaped network of residual stages with kernels of 5 voxels, without pooling.

    The convolutions of a stage learn a residual to its input::

        image -> stage, 16, 1 conv -------------- skip --------------> cat -> stage, 32, 1 conv -> 1×1
                   2×2/2 -> stage, 32, 2 conv --- skip ---> cat -> stage, 64, 2 conv -> up
                               ...  2×2/2 -> stage, 256, 3 conv -> up

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the output: 1 for one class against background by sigmoid, else one per class.
        channels: width of each level of the encoder; the decoder's are twice as wide.
        layers: convolutions of each stage, one number or one per level, from the full size down; the same on the way
            back.
        act: a MONAI activation.
        norm: a MONAI normalization; the paper has none.
        initializer: applied to every module when the network is built; None leaves torch's own initialization.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``, logits. Any size, odd ones too.

    Raises:
        ConfigError: for arguments that make no network, and in ``forward`` for an image that does not fit it.

    Source:
        Milletari et al. 2016, V-Net, figure 2 and table 1. Where a stage's input has other channels than its output,
        a 1×1 convolution adapts it (the paper is silent). MONAI's :class:`monai.networks.nets.VNet` differs: fewer
        convolutions, batch normalization and dropout, and it needs sizes that are multiples of 16 and 1, 2, 4, 8 or
        16 image channels.

    Example:
        >>> import torch
        >>> small = VNet(3, 1, 2, channels=(4, 8), layers=(1, 2))
        >>> small(torch.zeros(2, 1, 9, 8, 7)).shape
        torch.Size([2, 2, 9, 8, 7])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        layers: int | Sequence[int] = (1, 2, 3, 3, 3),
        act: str | tuple | None = "PRELU",
        norm: str | tuple | None = None,
        initializer: Callable[[nn.Module], None] | None = he_normal,
    ) -> None:
        require_network(
            spatial_dims, in_channels=in_channels, out_channels=out_channels, channels=channels, layers=layers
        )
        depths = one_per("layers", layers, len(channels), "entry of channels")

        def stage(before: int, width: int, depth: int) -> nn.Module:
            residual = ResidualUnit(
                spatial_dims, before, width, kernel_size=5, subunits=depth, act=act, norm=norm, last_conv_only=True
            )
            adn = ADN(ordering="NA", in_channels=width, act=act, norm=norm, norm_dim=spatial_dims)
            return nn.Sequential(residual, adn)

        encoder = [stage(in_channels, channels[0], depths[0])]
        for before, width, depth in zip(channels, channels[1:], depths[1:], strict=False):
            down = StridedConv(spatial_dims, before, width, act, norm)
            encoder.append(nn.Sequential(down, stage(width, width, depth)))

        decoder = []
        before = channels[-1]
        for skip, depth in reversed(list(zip(channels[:-1], depths[:-1], strict=True))):
            up = TransposedConv(spatial_dims, before, skip, kernel_size=None, act=act, norm=norm)
            before = 2 * skip
            join = Concatenate(spatial_dims, skip, skip)
            decoder.append((up, join, stage(before, before, depth)))
        head = Head(spatial_dims, before, out_channels, kernel_size=1)
        reduction = [2 ** (len(channels) - 1)] * spatial_dims
        super().__init__(spatial_dims, in_channels, out_channels, encoder, decoder, head, reduction, initializer)
