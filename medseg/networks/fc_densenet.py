"""The fully convolutional DenseNet, the "one hundred layers tiramisu"."""

import math
from collections.abc import Callable, Sequence
from functools import partial

from monai.networks.blocks import Convolution
from torch import nn

from .arguments import require_network
from .blocks import Concatenate, Head, TransposedConv
from .dense_blocks import DenseBlock, NormActConv, TransitionDown
from .encoder_decoder import EncoderDecoder


def he_uniform(module: nn.Module) -> None:
    """Fill a convolution's or linear layer's kernel from the He uniform distribution, and its bias with zeros.

    The variance is 2 / fan-in. Other modules are left alone, so ``network.apply(he_uniform)`` initializes a network.

    Source:
        He et al. 2015, Delving deep into rectifiers.

    Example:
        >>> layer = nn.Conv2d(6, 4, 1)
        >>> he_uniform(layer)
        >>> layer.weight.abs().max().item() <= 1
        True
    """
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        bound = math.sqrt(6 / module.weight[0].numel())
        nn.init.uniform_(module.weight, -bound, bound)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class FCDenseNet(EncoderDecoder):
    """A U-shaped network of dense blocks alone; by default FC-DenseNet103.

    On the way down a block's output holds its input; on the way up, where width would explode, only what is new is
    up-sampled::

        image -> 3×3, 48 -> dense + input -------------- skip --------------> cat -> dense + input -> 1×1
                              1×1, pool -> dense + input -- skip --> cat -> dense -> transposed 3×3
                                             ...  1×1, pool -> dense -> transposed 3×3

    FC-DenseNet56 is ``growth=12, layers=[4] * 6``, FC-DenseNet67 ``growth=16, layers=[5] * 6``.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the output.
        growth: channels that each layer adds.
        layers: layers of each level's block, from the full size to the deepest; the same on the way back.
        stem_channels: channels of the first convolution.
        dropout: probability with which a feature is zeroed after each convolution of a block or transition down.
        initializer: applied to every module when the network is built; None leaves torch's own initialization.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``, logits. Any size, odd ones too.

    Raises:
        ConfigError: for arguments that make no network, and in ``forward`` for an image that does not fit it.

    Source:
        Jégou et al. 2017, The one hundred layers tiramisu, tables 1 and 2. For 3 channels and 11 classes FC-DenseNet103
        has 9.4 million numbers with the running statistics (the paper: 9.4), FC-DenseNet67 3.5 (3.5), FC-DenseNet56
        1.4 (1.5). Convolutions have biases, which the paper leaves open.

    Example:
        >>> import torch
        >>> small = FCDenseNet(2, 1, 3, growth=4, layers=(2, 3), stem_channels=8)
        >>> small(torch.zeros(2, 1, 15, 16)).shape
        torch.Size([2, 3, 15, 16])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        growth: int = 16,
        layers: Sequence[int] = (4, 5, 7, 10, 12, 15),
        stem_channels: int = 48,
        dropout: float = 0.2,
        initializer: Callable[[nn.Module], None] | None = he_uniform,
    ) -> None:
        require_network(
            spatial_dims,
            in_channels=in_channels,
            out_channels=out_channels,
            growth=growth,
            layers=layers,
            stem_channels=stem_channels,
        )

        def dense(width: int, depth: int, keep_input: bool) -> DenseBlock:
            target = depth * growth + (width if keep_input else 0)
            layer = partial(NormActConv, dropout=dropout)
            return DenseBlock(spatial_dims, width, target, depth, layer, keep_input)

        encoder: list[nn.Module] = []
        down: nn.Module = Convolution(spatial_dims, in_channels, stem_channels, conv_only=True)
        width = stem_channels
        skips = []
        for depth in layers[:-1]:
            block = dense(width, depth, keep_input=True)
            encoder.append(nn.Sequential(down, block))
            width = block.out_channels
            skips.append(width)
            down = TransitionDown(spatial_dims, width, width, pool="MAX", dropout=dropout)
        encoder.append(nn.Sequential(down, dense(width, layers[-1], keep_input=False)))

        decoder: list[tuple[nn.Module, nn.Module, nn.Module]] = []
        width = layers[-1] * growth
        for level in reversed(range(len(skips))):
            up = TransposedConv(spatial_dims, width, width, act=None, norm=None)
            block = dense(width + skips[level], layers[level], keep_input=level == 0)
            decoder.append((up, Concatenate(spatial_dims, skips[level], width), block))
            width = block.out_channels
        head = Head(spatial_dims, width, out_channels, kernel_size=1)
        reduction = [2 ** len(skips)] * spatial_dims
        super().__init__(spatial_dims, in_channels, out_channels, encoder, decoder, head, reduction, initializer)
