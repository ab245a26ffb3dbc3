"""What networks with an encoder and a decoder share, however unlike their levels are."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .arguments import require_image, require_voxels_to_normalize
from .blocks import linear_mode


class EncoderDecoder(nn.Module):
    """Levels of an encoder, whose features are kept, and of a decoder, which takes them back in reverse.

    ::

        image -> encoder[0] -------------- skip --------------> decoder[-1] -> head
                   encoder[1] ------------ skip ----> decoder[-2]
                              ...  encoder[-1] -> decoder[0]

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the logits.
        encoder: what leads from each level to the next, the step down included.
        decoder: for each level but the deepest, the deepest first: the step up, ``skip(skip, up)`` that joins it with
            the encoder's features, and the layers behind, as :class:`UpLevel` takes them.
        head: from the last features to logits.
        reduction: what a voxel of the deepest level spans along each axis.
        initializer: applied to every module; None leaves torch's own initialization.
        side_heads: in training, heads of the decoder's coarser levels, the finest of them first; their logits are
            resized to the image.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``, logits. Any size, odd ones too. With side
        heads, in training: ``(B, 1 + side heads, out_channels, *spatial)``.

    Raises:
        ConfigError: in ``forward`` for an image that does not fit the network.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        encoder: Sequence[nn.Module],
        decoder: Sequence[tuple[nn.Module, nn.Module, nn.Module]],
        head: nn.Module,
        reduction: Sequence[int],
        initializer: Callable[[nn.Module], None] | None,
        side_heads: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.reduction = list(reduction)
        self.encoder = nn.ModuleList(encoder)
        self.decoder = nn.ModuleList(UpLevel(spatial_dims, *level) for level in decoder)
        self.head = head
        self.side_heads = nn.ModuleList(side_heads)
        self.mode = linear_mode(spatial_dims)
        if initializer is not None:
            self.apply(initializer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        if not torch.jit.is_scripting() and not torch.jit.is_tracing():
            self._check(x)
        size = x.shape[2:]
        skips: list[Tensor] = []
        for level in self.encoder:
            x = level(x)
            skips.append(x)
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
        deepest = math.prod(
            [math.ceil(size / factor) for size, factor in zip(x.shape[2:], self.reduction, strict=True)]
        )
        require_voxels_to_normalize(x, deepest, self.encoder[-1])


class UpLevel(nn.Module):
    """One level of a decoder: up-sample, resize to the skip where sizes differ, join, and refine.

    Shape:
        ``(B, C, *coarse)``, ``(B, S, *fine)`` -> ``(B, D, *fine)``

    Example:
        >>> from medseg.networks import Concatenate, ConvActNorm, TransposedConv
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


class NoSkip(nn.Module):
    """A skip that is not one: the up-sampled features alone, at the size of the encoder's.

    Shape:
        ``(B, S, *spatial)``, ``(B, U, *spatial)`` -> ``(B, U, *spatial)``

    Example:
        >>> NoSkip()(torch.ones(1, 3, 4, 4), torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    def forward(self, skip: Tensor, up: Tensor) -> Tensor:
        """Return the up-sampled features."""
        return up
