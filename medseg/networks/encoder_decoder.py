"""What networks with an encoder and a decoder share, however unlike their levels are."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .arguments import normalizes, require_image, require_voxels_to_normalize


class EncoderDecoder(nn.Module):
    """Levels of an encoder, whose features are kept, and of a decoder, which takes them back in reverse.

    The base of the networks whose levels are too unlike each other for :class:`UNet`'s parts::

        image -> encoder[0] -------------- skip --------------> decoder[-1] -> head
                   encoder[1] ------------ skip ----> decoder[-2]
                              ...  encoder[-1] -> decoder[0]

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the logits.
        encoder: what leads from each level to the next, the step down included.
        decoder: one for each level but the deepest, the deepest first; ``forward(x, skip)``, as :class:`UpLevel`.
        head: from the last features to logits.
        reduction: what a voxel of the deepest level spans along each axis.
        initializer: applied to every module; None leaves torch's own initialization.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``, logits. Any size, odd ones too.

    Raises:
        ConfigError: in ``forward`` for an image that does not fit the network.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        encoder: Sequence[nn.Module],
        decoder: Sequence[nn.Module],
        head: nn.Module,
        reduction: int,
        initializer: Callable[[nn.Module], None] | None,
    ) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.reduction = [reduction] * spatial_dims
        self.encoder = nn.ModuleList(encoder)
        self.decoder = nn.ModuleList(decoder)
        self.head = head
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
        skips.pop()
        for level in self.decoder:
            x = level(x, skips.pop())
        return self.head(x)

    @torch.jit.unused
    def _check(self, x: Tensor) -> None:
        require_image(self, x)
        require_voxels_to_normalize(self, x)


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
