"""The U-Net, assembled from the parts that it is given."""

import math
from collections.abc import Callable, Sequence

from torch import nn

from medseg.errors import ConfigError

from .arguments import one_per, per_axis, require_network
from .blocks import Concatenate, ConvActNorm, Head, Heads, MaxPool, TransposedConv, he_normal
from .encoder_decoder import EncoderDecoder

Part = Callable[..., nn.Module]


class UNet(EncoderDecoder):
    """A U-Net in 2D or 3D; by default exactly the one of the PET/CT thesis (table 4.3).

    Variants come by passing other parts (see :mod:`medseg.networks.blocks` for how each is called); in a bundle's
    YAML ``block: $medseg.networks.PreActResidual`` or ``block: "$functools.partial(medseg.networks.ConvActNorm,
    norm='INSTANCE')"``. The levels::

        image -> blocks ---------------- skip ----------------> blocks -> head    channels[0], full size
                   down -> blocks ------ skip -----> blocks -> up                 channels[1], / strides[0]
                             down -> bottleneck -> up                             channels[2], / strides[1]

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the output: 1 for one class against background by sigmoid, else one per class.
        channels: width of each level, from the full size down.
        strides: from each level to the next: one number for all, or one entry per step, each a number or one number
            per axis (``[[2, 2, 1], 2]`` leaves the third axis alone in the first step).
        layers: blocks per level, one number or one per level.
        decoder_layers: the same for the way up, one number or one per level but the deepest; by default as in
            ``layers``.
        block: a layer.
        bottleneck: a layer of the deepest level; by default ``block``.
        decoder_block: a layer of the way up; by default ``block``.
        down: the step from a level to the next.
        up: the step back; what it returns is resized (bi- or trilinearly) to the skip where sizes differ.
        skip: joins the encoder's features with the up-sampled ones.
        head: from the last features to logits.
        deep_supervision: how many of the decoder's coarser levels get a head too, the finest of them first. In training
            their logits, linearly resized to the image, come with those of the last head; in eval mode they are not
            computed.
        initializer: applied to every module when the network is built; None leaves torch's own initialization.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``, logits. Any size, odd ones too. With
        :class:`Heads` or deep supervision, in training: ``(B, heads, out_channels, *spatial)``.

    Raises:
        ConfigError: for arguments that make no network, and in ``forward`` for an image that does not fit it.

    Source:
        Ronneberger et al. 2015, U-Net; Moe 2019, Deep learning for automatic delineation of tumours from PET/CT
        images: with padding, activation before normalization, 3×3 up-convolutions and a 3×3 head.

    Example:
        >>> import torch
        >>> network = UNet(2, in_channels=2, out_channels=1)
        >>> sum(p.numel() for p in network.parameters())
        34526977
        >>> small = UNet(3, in_channels=1, out_channels=3, channels=(8, 16, 32), strides=[[2, 2, 1], 2])
        >>> small(torch.zeros(2, 1, 17, 16, 9)).shape
        torch.Size([2, 3, 17, 16, 9])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (64, 128, 256, 512, 1024),
        strides: int | Sequence[int | Sequence[int]] = 2,
        layers: int | Sequence[int] = 2,
        decoder_layers: int | Sequence[int] | None = None,
        block: Part = ConvActNorm,
        bottleneck: Part | None = None,
        decoder_block: Part | None = None,
        down: Part = MaxPool,
        up: Part = TransposedConv,
        skip: Part = Concatenate,
        head: Part = Head,
        deep_supervision: int = 0,
        initializer: Callable[[nn.Module], None] | None = he_normal,
    ) -> None:
        require_network(
            spatial_dims, in_channels=in_channels, out_channels=out_channels, channels=channels, layers=layers
        )
        steps = len(channels) - 1
        step_strides = one_per("strides", strides, steps, "step between levels")
        axes = [per_axis("strides", s, spatial_dims) for s in step_strides]
        encoder_depths = one_per("layers", layers, steps + 1, "level")
        decoder_depths = encoder_depths[:-1]
        if decoder_layers is not None:
            require_network(spatial_dims, decoder_layers=decoder_layers)
            decoder_depths = one_per("decoder_layers", decoder_layers, steps, "level but the deepest")

        def stack(part: Part, count: int, width: int, target: int) -> list[nn.Module]:
            parts: list[nn.Module] = []
            for _ in range(count):
                parts.append(part(spatial_dims, width, target))
                width = _width(parts[-1], target)
            return parts

        encoder = []
        widths = [in_channels]
        for level, (target, depth) in enumerate(zip(channels, encoder_depths, strict=True)):
            entry = [] if level == 0 else [down(spatial_dims, widths[-1], target, step_strides[level - 1])]
            width = _width(entry[0], target) if entry else in_channels
            part = bottleneck if bottleneck is not None and level == steps else block
            entry += stack(part, depth, width, target)
            encoder.append(nn.Sequential(*entry))
            widths.append(_width(entry[-1], target))

        decoder: list[tuple[nn.Module, nn.Module, nn.Module]] = []
        width = widths[-1]
        up_widths: list[int] = []
        for level in reversed(range(steps)):
            upward = up(spatial_dims, width, channels[level], step_strides[level])
            join = skip(spatial_dims, widths[level + 1], _width(upward, channels[level]))
            joined = _width(join, channels[level])
            blocks = stack(decoder_block or block, decoder_depths[level], joined, channels[level])
            decoder.append((upward, join, nn.Sequential(*blocks)))
            width = _width(blocks[-1], channels[level])
            up_widths.append(width)
        last = head(spatial_dims, width, out_channels)
        if not 0 <= deep_supervision < max(steps, 1) or (deep_supervision and isinstance(last, Heads)):
            raise ConfigError(
                f"deep_supervision {deep_supervision}, head {type(last).__name__}: expected at most "
                f"{max(steps - 1, 0)} of {len(channels)} levels, and a head of one output"
            )
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            encoder,
            decoder,
            last,
            [math.prod(factors) for factors in zip(*axes, strict=True)] or [1] * spatial_dims,
            initializer,
            [head(spatial_dims, up_widths[-2 - number], out_channels) for number in range(deep_supervision)],
        )


def _width(part: nn.Module, asked: int) -> int:
    return int(getattr(part, "out_channels", asked))
