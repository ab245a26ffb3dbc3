"""The global convolutional network: kernels as large as the features, made separable."""

from collections.abc import Callable, Sequence

import torch
from monai.networks.blocks import ADN, Convolution
from monai.networks.layers import Pool
from torch import Tensor, nn

from medseg.errors import ConfigError

from .arguments import one_per, require_network
from .blocks import PreActResidual, TransposedConv, he_normal
from .dense_blocks import AddProjected
from .encoder_decoder import EncoderDecoder, NoSkip


class GlobalConv(nn.Module):
    """A convolution with a kernel of k voxels along every axis, at the price of one along each.

    The sum of separable convolutions without an activation between, one for each axis to begin with: k×1 then 1×k, plus
    1×k then k×1. In 3D: along axes 1, 2, 3, plus 2, 3, 1, plus 3, 1, 2.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: k, odd.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``

    Source:
        Peng et al. 2017, Large kernel matters, section 3.1; the form in 3D is ours, in 2D it is
        :class:`monai.networks.blocks.GCN`.

    Example:
        >>> GlobalConv(2, 64, 3, kernel_size=15)(torch.zeros(1, 64, 9, 12)).shape
        torch.Size([1, 3, 9, 12])
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, kernel_size: int = 15) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size of GlobalConv is {kernel_size}; expected an odd number")
        self.out_channels = out_channels

        def along(axis: int, width: int) -> nn.Module:
            kernel = [kernel_size if a == axis else 1 for a in range(spatial_dims)]
            return Convolution(spatial_dims, width, out_channels, kernel_size=kernel, conv_only=True)

        self.branches = nn.ModuleList(
            nn.Sequential(
                *(along((first + i) % spatial_dims, out_channels if i else in_channels) for i in range(spatial_dims))
            )
            for first in range(spatial_dims)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the branches."""
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


class BoundaryRefinement(nn.Module):
    """A residual correction of score maps: x + conv(ReLU(conv(x))).

    Shape:
        ``(B, in_channels, *spatial)`` -> the same; ``out_channels`` is ignored.

    Source:
        Peng et al. 2017, section 3.2.

    Example:
        >>> BoundaryRefinement(2, 3)(torch.zeros(1, 3, 9, 12)).shape
        torch.Size([1, 3, 9, 12])
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        self.out_channels = in_channels
        self.residual = nn.Sequential(
            Convolution(spatial_dims, in_channels, in_channels, norm=None, act="RELU"),
            Convolution(spatial_dims, in_channels, in_channels, conv_only=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the corrected scores."""
        return x + self.residual(x)


class GCN(EncoderDecoder):
    """A residual encoder, a global convolution on each of its levels, and a decoder that adds up score maps.

    ::

        image                                                           up -> refine         full size
          7×7/2                                                   up -> refine               / 2
            pool -> residual × 3 -- GCN, refine --> sum -> refine, up                        / 4
              residual × 4 -------- GCN, refine --> sum -> refine, up                        / 8
                residual × 6 ------ GCN, refine --> sum -> refine, up                        / 16
                  residual × 3 ---- GCN, refine ---> up                                      / 32

    All that is not encoder has one channel per class.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the output.
        kernel_size: k of the global convolutions, odd.
        channels: width of each level of the encoder, from the one at / 4 down.
        layers: residual layers of each level, one number or one per level.
        block: a layer of the encoder, called as ``block(spatial_dims, in_channels, out_channels, strides)``.
        initializer: applied to every module when the network is built; None leaves torch's own initialization.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``, logits. Any size, odd ones too.

    Raises:
        ConfigError: for arguments that make no network, and in ``forward`` for an image that does not fit it.

    Source:
        Peng et al. 2017, Large kernel matters: improve semantic segmentation by global convolutional network, with
        k = 15. Its encoder is a ResNet-152 trained on photographs; here it is a ResNet-34 in depth and width, of
        pre-activation layers, so that features are normalized and activated before each global convolution.

    Example:
        >>> small = GCN(2, 1, 3, kernel_size=7, channels=(8, 16), layers=(1, 1))
        >>> small(torch.zeros(2, 1, 31, 40)).shape
        torch.Size([2, 3, 31, 40])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 15,
        channels: Sequence[int] = (64, 128, 256, 512),
        layers: int | Sequence[int] = (3, 4, 6, 3),
        block: Callable[..., nn.Module] = PreActResidual,
        initializer: Callable[[nn.Module], None] | None = he_normal,
    ) -> None:
        require_network(
            spatial_dims, in_channels=in_channels, out_channels=out_channels, channels=channels, layers=layers
        )
        depths = one_per("layers", layers, len(channels), "entry of channels")

        def scores(spatial_dims: int, width: int, classes: int) -> nn.Module:
            return nn.Sequential(
                ADN(ordering="NA", in_channels=width, act="RELU", norm="BATCH", norm_dim=spatial_dims),
                GlobalConv(spatial_dims, width, classes, kernel_size),
                BoundaryRefinement(spatial_dims, classes),
            )

        encoder: list[nn.Module] = [
            nn.Identity(),
            Convolution(spatial_dims, in_channels, channels[0], strides=2, kernel_size=7, norm="BATCH", act="RELU"),
        ]
        for level, (before, width, depth) in enumerate(zip((channels[0], *channels), channels, depths, strict=False)):
            first: list[nn.Module] = [Pool["MAX", spatial_dims](3, 2, padding=1)] if level == 0 else []
            first.append(block(spatial_dims, before, width, strides=2 if level else 1))
            encoder.append(
                nn.Sequential(*first, *(block(spatial_dims, width, width, strides=1) for _ in range(depth - 1)))
            )
        encoder[-1] = nn.Sequential(encoder[-1], scores(spatial_dims, channels[-1], out_channels))

        skips = [AddProjected(spatial_dims, width, out_channels, scores) for width in reversed(channels[:-1])]
        decoder = [
            (
                TransposedConv(spatial_dims, out_channels, out_channels, act=None, norm=None),
                skip,
                BoundaryRefinement(spatial_dims, out_channels),
            )
            for skip in [*skips, NoSkip(), NoSkip()]
        ]
        reduction = [2 ** (len(channels) + 1)] * spatial_dims
        super().__init__(
            spatial_dims, in_channels, out_channels, encoder, decoder, nn.Identity(), reduction, initializer
        )
