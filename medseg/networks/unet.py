"""The U-Net, assembled from the parts that it is given."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.errors import ConfigError

from .arguments import normalizes, require_image, require_network, require_voxels_to_normalize
from .blocks import Concatenate, ConvActNorm, Head, Heads, MaxPool, TransposedConv, he_normal, linear_mode

Part = Callable[..., nn.Module]


class UNet(nn.Module):
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
        super().__init__()
        require_network(spatial_dims, in_channels=in_channels, out_channels=out_channels, channels=channels)
        steps = len(channels) - 1
        step_strides = [
            s if isinstance(s, int) else tuple(s) for s in _one_per("strides", strides, steps, "step between levels")
        ]
        encoder_depths = _one_per("layers", layers, steps + 1, "level")
        decoder_depths = encoder_depths[:-1]
        if decoder_layers is not None:
            decoder_depths = _one_per("decoder_layers", decoder_layers, steps, "level but the deepest")
        if min(*encoder_depths, *decoder_depths, 1) < 1:
            raise ConfigError(f"layers {layers}, decoder_layers {decoder_layers}: every level needs at least one")

        self.in_channels = in_channels
        self.out_channels = out_channels
        self.spatial_dims = spatial_dims
        # What a voxel of the deepest level spans along each axis.
        self.reduction = [
            math.prod(s if isinstance(s, int) else s[axis] for s in step_strides) for axis in range(spatial_dims)
        ]

        def stack(part: Part, count: int, width: int, target: int) -> list[nn.Module]:
            parts: list[nn.Module] = []
            for _ in range(count):
                parts.append(part(spatial_dims, width, target))
                width = _width(parts[-1], target)
            return parts

        self.encoder = nn.ModuleList()
        widths = [in_channels]
        for level, (target, depth) in enumerate(zip(channels, encoder_depths, strict=True)):
            entry = [] if level == 0 else [down(spatial_dims, widths[-1], target, step_strides[level - 1])]
            width = _width(entry[0], target) if entry else in_channels
            part = bottleneck if bottleneck is not None and level == steps else block
            entry += stack(part, depth, width, target)
            self.encoder.append(nn.Sequential(*entry))
            widths.append(_width(entry[-1], target))

        self.decoder = nn.ModuleList()
        width = widths[-1]
        up_widths: list[int] = []
        for level in reversed(range(steps)):
            upward = up(spatial_dims, width, channels[level], step_strides[level])
            join = skip(spatial_dims, widths[level + 1], _width(upward, channels[level]))
            joined = _width(join, channels[level])
            blocks = stack(decoder_block or block, decoder_depths[level], joined, channels[level])
            self.decoder.append(UpLevel(spatial_dims, upward, join, nn.Sequential(*blocks)))
            width = _width(blocks[-1], channels[level])
            up_widths.append(width)
        self.head = head(spatial_dims, width, out_channels)
        if not 0 <= deep_supervision < max(steps, 1) or (deep_supervision and isinstance(self.head, Heads)):
            raise ConfigError(
                f"deep_supervision {deep_supervision}, head {type(self.head).__name__}: expected at most "
                f"{max(steps - 1, 0)} of {len(channels)} levels, and a head of one output"
            )
        self.side_heads = nn.ModuleList(
            head(spatial_dims, up_widths[-2 - number], out_channels) for number in range(deep_supervision)
        )
        self.mode = linear_mode(spatial_dims)
        self.normalized = normalizes(self.encoder[-1])
        if initializer is not None:
            self.apply(initializer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        if not torch.jit.is_scripting() and not torch.jit.is_tracing():
            self._check(x)
        skips: list[Tensor] = []
        for level in self.encoder:
            x = level(x)
            skips.append(x)
        size = skips[0].shape[2:]
        skips.pop()
        features: list[Tensor] = []
        for level in self.decoder:
            x = level(x, skips.pop())
            if self.training and len(self.side_heads) > 0:
                features.append(x)
        logits = self.head(x)
        if not self.training or len(self.side_heads) == 0:
            return logits
        stack: list[Tensor] = [logits]
        for number, head in enumerate(self.side_heads):
            side = head(features[-2 - number])
            stack.append(functional.interpolate(side, size=size, mode=self.mode, align_corners=False))
        return torch.stack(stack, dim=1)

    @torch.jit.unused
    def _check(self, x: Tensor) -> None:
        require_image(self, x)
        require_voxels_to_normalize(self, x)


class UpLevel(nn.Module):
    """One level of a decoder: up-sample, resize to the skip where sizes differ, join, and refine.

    Shape:
        ``(B, C, *coarse)``, ``(B, S, *fine)`` -> ``(B, D, *fine)``

    Example:
        >>> up, skip = TransposedConv(2, 8, 4), Concatenate(2, 4, 4)
        >>> UpLevel(2, up, skip, ConvActNorm(2, 8, 4))(torch.zeros(1, 8, 4, 4), torch.zeros(1, 4, 7, 8)).shape
        torch.Size([1, 4, 7, 8])
    """

    def __init__(self, spatial_dims: int, up: nn.Module, skip: nn.Module, blocks: nn.Module) -> None:
        super().__init__()
        self.up = up
        self.skip = skip
        self.blocks = blocks
        self.mode = linear_mode(spatial_dims)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return the features at the size of the skip."""
        x = self.up(x)
        if x.shape[2:] != skip.shape[2:]:
            x = functional.interpolate(x, size=skip.shape[2:], mode=self.mode, align_corners=False)
        return self.blocks(self.skip(skip, x))


def _width(part: nn.Module, asked: int) -> int:
    return int(getattr(part, "out_channels", asked))


def _one_per(name: str, value: int | Sequence, count: int, what: str) -> list:
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count:
        raise ConfigError(f"{name} has {len(values)} entries; expected {count}, one per {what}, or one number")
    return values
