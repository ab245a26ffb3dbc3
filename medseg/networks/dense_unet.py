"""The two dense U-Nets of the KiTS work: a small one of dense blocks throughout, a big one with a DenseNet encoder."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from monai.networks.blocks import Convolution
from monai.networks.layers import Pool
from torch import nn

from medseg.errors import ConfigError

from .arguments import require_network
from .blocks import Head, MaxPool, he_normal
from .dense_blocks import (
    AddProjected,
    BottleneckLayer,
    DenseBlock,
    NormActConv,
    ReducedConcatenate,
    TransitionDown,
    TransitionUp,
)
from .encoder_decoder import EncoderDecoder, NoSkip
from .unet import UNet


class DenseUNet(UNet):
    """A U-Net of dense blocks; by default the small DenseUNet of the KiTS work.

    Each block doubles its input: ``layers`` layers of growth ``growth · 2^level`` (4 layers of 4, 8, 16, 32, 64)::

        image -> stem -> dense 16-32 ------------------------------> cat -> 1×1 -> dense 16-32 -> 1×1
                           pool -> dense 32-64 ------> cat -> 1×1 -> dense 32-64 -> 1×1, up
                                     ...  pool -> dense 256-512 -> 1×1, up

    A step down is max-pooling alone, a step up halves the channels by a 1×1 layer and repeats voxels, and after the
    concatenation another 1×1 layer leaves a quarter.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the output: 1 for one class against background by sigmoid, else one per class.
        growth: channels that each layer of the first level adds.
        layers: layers of each block.
        levels: how many.
        strides: from each level to the next, as in :class:`UNet`.
        dropout: probability with which a layer's channel is zeroed.
        initializer: applied to every module when the network is built; None leaves torch's own initialization.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``, logits. Any size, odd ones too.

    Raises:
        ConfigError: for arguments that make no network, and in ``forward`` for an image that does not fit it.

    Source:
        Detko 2020, bachelor thesis on kidney tumors in CT (KiTS19). Its text gives the layers, the growth and the
        transitions, and by mistake PSPNet's number of parameters. What it leaves open is chosen such that the number
        of its code, 1,636,627 with the running statistics, comes out exactly: every convolution has a bias, each but
        the stem and the head is preceded by normalization and ReLU, the stem is followed by a normalization, the head
        is 1×1. Where dropout stands, and initialization, are choices that the number leaves open.

    Example:
        >>> from medseg.networks import count_parameters
        >>> count_parameters(DenseUNet(2, in_channels=3, out_channels=3), running_statistics=True)
        1636627
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        growth: int = 4,
        layers: int = 4,
        levels: int = 5,
        strides: int | Sequence[int | Sequence[int]] = 2,
        dropout: float = 0.05,
        initializer: Callable[[nn.Module], None] | None = he_normal,
    ) -> None:
        require_network(spatial_dims, in_channels=in_channels, growth=growth, layers=layers, levels=levels)
        width = growth * layers
        layer = partial(NormActConv, dropout=dropout, dropout_dim=spatial_dims)
        super().__init__(
            spatial_dims,
            width,
            out_channels,
            channels=[width * 2 ** (level + 1) for level in range(levels)],
            strides=strides,
            layers=1,
            block=partial(DenseBlock, layers=layers, layer=layer),
            down=MaxPool,
            up=TransitionUp,
            skip=ReducedConcatenate,
            head=partial(Head, kernel_size=1),
            initializer=None,
        )
        self.in_channels = in_channels
        stem = Convolution(spatial_dims, in_channels, width, act=None, norm="BATCH")
        self.encoder[0] = nn.Sequential(stem, self.encoder[0])
        if initializer is not None:
            self.apply(initializer)


class DenseNetUNet(EncoderDecoder):
    """A DenseNet encoder and a decoder that sums; by default the big DenseUNet of the KiTS work.

    ::

        image                                                                 up -> 64 -> 1×1     full size
          7×7/2, 64 --------------- 1×1 --------------> sum -> 96, up                                / 2
            pool -> dense × 6 ----- 1×1 -------> sum -> 192, up                                      / 4
              transition -> dense × 12 - 1×1 -> sum -> 384, up                                       / 8
                transition -> dense × 24 - 1×1 -> sum -> 768, up                                     / 16
                  transition -> dense × 16 -> 1×1 -> 1024, up                                        / 32

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the output.
        growth: channels that each layer adds, by way of a 1×1 layer of four times as many.
        layers: layers of each dense block.
        stem_channels: channels of the first convolution.
        channels: widths of the decoder, the deepest first: one per dense block and two more.
        dropout: probability with which a feature before the head is zeroed.
        initializer: applied to every module when the network is built; None leaves torch's own initialization.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``, logits. Any size, odd ones too.

    Raises:
        ConfigError: for arguments that make no network, and in ``forward`` for an image that does not fit it.

    Source:
        Detko 2020 (see :class:`DenseUNet`), after Huang et al. 2017, DenseNet, and Li et al. 2018, H-DenseUNet. The
        work gives blocks, growth, stem, the widths and the summed skips. The rest is chosen such that the number of
        its code, 43,024,099 with the running statistics, comes out exactly: the transitions keep their channels,
        every convolution but the stem has a bias, and normalization and ReLU precede each but the
        stem, the projections and the head. Other assemblies give the same number. Where dropout stands is
        H-DenseUNet's choice, and pooling is DenseNet's.

    Example:
        >>> import torch
        >>> small = DenseNetUNet(2, 1, 3, growth=4, layers=(2, 2), stem_channels=8, channels=(32, 24, 16, 8))
        >>> small(torch.zeros(2, 1, 31, 40)).shape
        torch.Size([2, 3, 31, 40])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        growth: int = 48,
        layers: Sequence[int] = (6, 12, 24, 16),
        stem_channels: int = 64,
        channels: Sequence[int] = (1024, 768, 384, 192, 96, 64),
        dropout: float = 0.3,
        initializer: Callable[[nn.Module], None] | None = he_normal,
    ) -> None:
        require_network(
            spatial_dims,
            in_channels=in_channels,
            out_channels=out_channels,
            growth=growth,
            layers=layers,
            stem_channels=stem_channels,
            channels=channels,
        )
        if len(channels) != len(layers) + 2:
            raise ConfigError(f"channels has {len(channels)} entries; expected {len(layers) + 2}, two more than layers")

        stem = Convolution(
            spatial_dims, in_channels, stem_channels, strides=2, kernel_size=7, bias=False, conv_only=True
        )
        encoder: list[nn.Module] = [nn.Identity(), stem]
        widths = [stem_channels]
        for level, depth in enumerate(layers):
            width = widths[-1]
            down = TransitionDown(spatial_dims, width, width) if level else Pool["MAX", spatial_dims](3, 2, padding=1)
            target = width + depth * growth
            encoder.append(nn.Sequential(down, DenseBlock(spatial_dims, width, target, depth, layer=BottleneckLayer)))
            widths.append(target)
        project = Convolution(spatial_dims, widths.pop(), channels[0], kernel_size=1, conv_only=True)
        encoder[-1] = nn.Sequential(encoder[-1], project)

        joins = [AddProjected(spatial_dims, skip, up) for skip, up in zip(reversed(widths), channels, strict=False)]
        blocks = [NormActConv(spatial_dims, width, target) for width, target in pairwise(channels)]
        decoder = [
            (nn.Upsample(scale_factor=2.0), join, block) for join, block in zip([*joins, NoSkip()], blocks, strict=True)
        ]
        head = nn.Sequential(nn.Dropout(dropout), Head(spatial_dims, channels[-1], out_channels, kernel_size=1))
        reduction = [2 ** (len(layers) + 1)] * spatial_dims
        super().__init__(spatial_dims, in_channels, out_channels, encoder, decoder, head, reduction, initializer)
