"""DeepLabV3+: atrous spatial pyramid pooling behind an encoder, and a small decoder."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.errors import ConfigError

from .arguments import require_network
from .blocks import Head, he_normal, linear_mode
from .encoders import MobileNetV2, Normalization, OverEncoder, Part, conv_norm_act


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: the same features seen at several scales, by dilation and as a whole.

    ::

        x --+-- 1×1 --------------------------+
            +-- 3×3, dilated by each rate ----+-- concatenate -- 1×1 -- dropout
            +-- mean of the image -- 1×1 -----+

    Every convolution is followed by normalization and ReLU. MONAI's :class:`~monai.networks.blocks.SimpleASPP` has
    neither the image's mean nor normalized branches.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of each branch and of the output.
        rates: dilation of each 3×3 branch; () for none.
        norm: a MONAI normalization. Batch normalization of the image's mean needs two images or more in training;
            ``("GROUP", {"num_groups": 8})`` does with one.
        dropout: probability of zeroing an activation.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``

    Source:
        Chen et al. 2017, Rethinking atrous convolution for semantic image segmentation, figure 5.

    Example:
        >>> ASPP(3, 32, 8)(torch.zeros(2, 32, 5, 4, 3)).shape
        torch.Size([2, 8, 5, 4, 3])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        rates: Sequence[int] = (6, 12, 18),
        norm: Normalization = "BATCH",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.axes = list(range(2, 2 + spatial_dims))
        layer = partial(conv_norm_act, spatial_dims, norm=norm)
        self.image = layer(in_channels, out_channels)
        self.local = layer(in_channels, out_channels)
        self.atrous = nn.ModuleList(layer(in_channels, out_channels, 3, dilation=rate) for rate in rates)
        self.project = nn.Sequential(layer((2 + len(rates)) * out_channels, out_channels), nn.Dropout(float(dropout)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the joined branches."""
        local = self.local(x)
        branches = [self.image(x.mean(self.axes, keepdim=True)).expand_as(local), local]
        for branch in self.atrous:
            branches.append(branch(x))
        return self.project(torch.cat(branches, dim=1))


class DeepLabV3Plus(OverEncoder):
    """DeepLabV3+ in 2D or 3D, over any encoder of :mod:`medseg.networks.encoders`.

    ::

        image -- encoder, to stride 4 -- further, to the output stride -- ASPP
                        |                                                  |
                       1×1                                             upsample
                        +------------------- concatenate -----------------+
                                                  |
                            3×3 -- 3×3 -- head 1×1 -- upsample -- logits

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the output: 1 for one class against background by sigmoid, else one per class.
        encoder: called as ``encoder(spatial_dims, in_channels, output_stride=...)``.
        output_stride: voxels of the image along a side of the encoder's last features: 8, 16 or 32.
        rates: dilations of the ASPP as published for output stride 16; for another one they are scaled to cover as
            many voxels of the image, so they double at 8. () for none.
        channels: width of the ASPP and of the decoder.
        low_level_channels: to which the features of stride 4 are projected; 0 leaves the decoder out, which makes
            the network a DeepLabV3.
        norm: a MONAI normalization for the ASPP and the decoder. With batch normalization the ASPP needs two images
            or more in training; ``("GROUP", {"num_groups": 8})`` does with one.
        dropout: probability of zeroing an activation behind the ASPP.
        initializer: applied to every module when the network is built; None leaves the encoder's own.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``, logits. Any size, odd ones too.

    Raises:
        ConfigError: for arguments that make no network, and in ``forward`` for an image that does not fit it.

    Source:
        Chen et al. 2018, Encoder-decoder with atrous separable convolution for semantic image segmentation; here with
        plain convolutions in the ASPP and the decoder (the paper's separable ones go with its Xception).

    Example:
        >>> network = DeepLabV3Plus(3, 1, 2, encoder=partial(MobileNetV2, width=0.25), channels=16)
        >>> network(torch.zeros(2, 1, 33, 32, 17)).shape
        torch.Size([2, 2, 33, 32, 17])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        encoder: Part = MobileNetV2,
        output_stride: int = 16,
        rates: Sequence[int] = (6, 12, 18),
        channels: int = 256,
        low_level_channels: int = 48,
        norm: Normalization = "BATCH",
        dropout: float = 0.1,
        initializer: Callable[[nn.Module], None] | None = he_normal,
    ) -> None:
        require_network(spatial_dims, channels=channels)
        if min(rates, default=1) < 1 or low_level_channels < 0:
            raise ConfigError(
                f"rates {tuple(rates)}, low_level_channels {low_level_channels}: expected positive rates and 0 or more"
            )
        super().__init__(spatial_dims, in_channels, out_channels, encoder, output_stride)
        scaled = [max(1, rate * 16 // output_stride) for rate in rates]
        self.aspp = ASPP(spatial_dims, self.encoder.widths[-1], channels, scaled, norm, dropout)
        self.decoder: nn.Module | None = None
        self.low_level = 0
        if low_level_channels:
            if 4 not in self.encoder.strides:
                raise ConfigError(
                    f"encoder has features of strides {self.encoder.strides}, but the decoder takes those of "
                    "stride 4; low_level_channels=0 leaves it out"
                )
            self.low_level = self.encoder.strides.index(4)
            self.decoder = DeepLabDecoder(
                spatial_dims, channels, self.encoder.widths[self.low_level], low_level_channels, norm
            )
        self.head = Head(spatial_dims, channels, out_channels, kernel_size=1)
        if initializer is not None:
            self.apply(initializer)

    def _features(self, x: Tensor) -> Tensor:
        """Return the decoder's features, or those of the ASPP where there is no decoder."""
        levels = self.encoder(x)
        y = self.aspp(levels[-1])
        if self.decoder is not None:
            y = self.decoder(y, levels[self.low_level])
        return y

    @torch.jit.unused
    def _pooled(self, size: Sequence[int]) -> tuple[nn.Module, int]:
        """Return the branch of the image's mean, which has a single voxel."""
        return self.aspp.image, 1


class DeepLabDecoder(nn.Module):
    """DeepLabV3+'s decoder: two 3×3 convolutions over the upsampled features beside projected fine ones.

    Shape:
        ``(B, channels, *coarse)``, ``(B, low_level_channels, *fine)`` -> ``(B, channels, *fine)``

    Example:
        >>> DeepLabDecoder(2, 16, 24, 4, "BATCH")(torch.zeros(2, 16, 4, 4), torch.zeros(2, 24, 15, 16)).shape
        torch.Size([2, 16, 15, 16])
    """

    def __init__(
        self, spatial_dims: int, channels: int, low_level_channels: int, projected: int, norm: Normalization
    ) -> None:
        super().__init__()
        self.mode = linear_mode(spatial_dims)
        self.project = conv_norm_act(spatial_dims, low_level_channels, projected, norm=norm)
        self.refine = nn.Sequential(
            conv_norm_act(spatial_dims, channels + projected, channels, 3, norm=norm),
            conv_norm_act(spatial_dims, channels, channels, 3, norm=norm),
        )

    def forward(self, x: Tensor, low_level: Tensor) -> Tensor:
        """Return the features at the size of the fine ones."""
        x = functional.interpolate(x, size=low_level.shape[2:], mode=self.mode, align_corners=False)
        return self.refine(torch.cat((x, self.project(low_level)), dim=1))


def kits_deeplab(spatial_dims: int = 2, in_channels: int = 3, out_channels: int = 3, **parts: Any) -> DeepLabV3Plus:
    """Return the "Deeplabv3+" of the kidney tumor work: MobileNetV2 at stride 8, the image's mean and a 1×1 branch.

    ::

        image -- MobileNetV2, 320 channels, / 8 --+-- 1×1, 256 -----------+
                                                  +-- mean -- 1×1, 256 ---+-- 1×1, 256 -- 1×1, 3 -- upsample

    The work describes the whole DeepLabV3+ with atrous rates 6, 12 and 18, but its number of parameters leaves no
    room for the atrous branches and the decoder: in the Keras code of this encoder they were missing, and existed
    beside Xception only. For what is described, use ``DeepLabV3Plus(2, 3, 3)``.

    The encoder has that code's widths, strides, dilations and ε (0.001). The resizing takes a voxel
    for an area here, for a point there. The initialization is not stated; it is He's, as in the work's other networks.

    Args:
        spatial_dims: 2, as there, or 3.
        in_channels: channels of the image, there a gray slice three times.
        out_channels: channels of the logits, there background, kidney and tumor by softmax.
        parts: other arguments of :class:`DeepLabV3Plus`.

    Source:
        Detko 2020, bachelor thesis on kidney tumors in CT (KiTS19).

    Example:
        >>> from medseg.networks import count_parameters
        >>> count_parameters(kits_deeplab(), running_statistics=True)
        2142019
    """
    ours: dict[str, Any] = {
        "encoder": partial(MobileNetV2, norm=("BATCH", {"eps": 1e-3})),
        "output_stride": 8,
        "rates": (),
        "low_level_channels": 0,
    }
    return DeepLabV3Plus(spatial_dims, in_channels, out_channels, **{**ours, **parts})
