"""The U-Nets of published works, assembled from shared parts."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from monai.networks.blocks import UpSample
from monai.networks.layers import Norm
from torch import Tensor, nn

from .blocks import ConvActNorm, Head, InterpolateConv, TransposedConv, glorot_uniform
from .unet import UNet

_ELU_CONV = partial(ConvActNorm, act=("ELU", {"inplace": True}), norm=None)


def petct_unet(spatial_dims: int = 2, in_channels: int = 2, out_channels: int = 1, **parts: Any) -> UNet:
    """Return the U-Net of the PET/CT thesis: :class:`UNet` as it is.

    Its other layer is the improved residual one: ``block=PreActResidual``, which as published did not learn well;
    ``block=functools.partial(PreActResidual, shortcut_norm="BATCH")`` normalizes what is suspected.

    Args:
        spatial_dims: 2, as there, or 3.
        in_channels: channels of the image, there CT and PET.
        out_channels: channels of the logits, there one.
        parts: other arguments of :class:`UNet`.

    Source:
        Moe 2019, Deep learning for automatic delineation of tumours from PET/CT images, table 4.3.

    Example:
        >>> from medseg.networks import count_parameters
        >>> count_parameters(petct_unet())
        34526977
    """
    return UNet(spatial_dims, in_channels, out_channels, **parts)


def kits_unet2d(
    in_channels: int = 3, out_channels: int = 3, channels: Sequence[int] = (64, 128, 256), **parts: Any
) -> UNet:
    """Return the "Unet2D" of the kidney tumor work: three levels, nearest up-sampling with a 2×2 convolution.

    The levels::

        3 -> 64 -> 64 ---------------- skip ------------ (64 + 64) -> 64 -> 64 -> 10 -> 3       full size
              pool 128 -> 128 -------- skip -- (128 + 128) -> 128 -> 128 -> ×2, 64              / 2
                     pool 256 -> 256 -> 256 -> ×2, 128                                          / 4

    Every convolution but the last is followed by ReLU, then batch normalization.

    Args:
        in_channels: channels of the image, there a gray slice three times.
        out_channels: channels of the logits, there background, kidney and tumor by softmax.
        channels: width of each level.
        parts: other arguments of :class:`UNet`.

    Source:
        Detko 2020, bachelor thesis on kidney tumors in CT (KiTS19). The layers that its text leaves open are those
        which give its number of parameters.

    Example:
        >>> from medseg.networks import count_parameters
        >>> count_parameters(kits_unet2d(), running_statistics=True)
        2465619
    """
    ours: dict[str, Any] = {
        "layers": [*[2] * (len(channels) - 1), 3],
        "up": partial(InterpolateConv, mode="nearest", conv=partial(ConvActNorm, kernel_size=2)),
        "head": _ten_channel_head,
    }
    return UNet(2, in_channels, out_channels, channels, **{**ours, **parts})


def _ten_channel_head(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        ConvActNorm(spatial_dims, in_channels, 10), Head(spatial_dims, 10, out_channels, kernel_size=1)
    )


def kits_unet3d(
    in_channels: int = 3, out_channels: int = 3, channels: Sequence[int] = (48, 96, 192, 384), **parts: Any
) -> UNet:
    """Return the "Unet3D" of the kidney tumor work, whose blocks carry their input along.

    The blocks and the levels::

        x -> norm -> conv, ReLU, norm -> conv, ReLU (, norm) = f;      block(x) = x and f, concatenated

        3 -> (3 + 48) ------ f alone: 48 ------ (48 + 48) -> (96 + 48) -> 3        full size
          pool (51 + 96) ----- 96 ------ (96 + 96) -> (192 + 96) -> up 48          / 2
            pool (147 + 192) - 192 - (192 + 192) -> (384 + 192) -> up 96           / 4
               pool (339 + 384) -> up 192                                          / 8

    The last norm stands in the encoder's blocks alone. The way up is a transposed convolution, 2×2×2 with stride 2.

    Args:
        in_channels: channels of the image, there a gray volume three times.
        out_channels: channels of the logits, there background, kidney and tumor by softmax.
        channels: width of each level.
        parts: other arguments of :class:`UNet`.

    Source:
        Detko 2020, bachelor thesis on kidney tumors in CT (KiTS19). Concatenated is a block's input before its
        normalization, and the transposed convolution has no activation: choices that the number of parameters leaves
        open.

    Example:
        >>> from medseg.networks import count_parameters
        >>> count_parameters(kits_unet3d(), running_statistics=True)
        15296451
    """
    ours: dict[str, Any] = {
        "layers": 1,
        "block": partial(_CarryingBlock, last_norm="BATCH"),
        "bottleneck": _CarryingBlock,
        "decoder_block": _CarryingBlock,
        "up": partial(TransposedConv, kernel_size=None, act=None, norm=None),
        "skip": _ConcatenateNewest,
        "head": partial(Head, kernel_size=1),
    }
    return UNet(3, in_channels, out_channels, channels, **{**ours, **parts})


class _CarryingBlock(nn.Module):
    """Two layers after a normalization, and their input beside their output: (B, C, …) -> (B, C + F, …)."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, last_norm: str | None = None) -> None:
        super().__init__()
        self.out_channels = in_channels + out_channels
        self.layers = nn.Sequential(
            Norm["BATCH", spatial_dims](in_channels),
            ConvActNorm(spatial_dims, in_channels, out_channels),
            ConvActNorm(spatial_dims, out_channels, out_channels, norm=last_norm),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.layers(x)), dim=1)


class _ConcatenateNewest(nn.Module):
    """A skip without what the encoder's block carried along: it takes as many channels as come from below."""

    def __init__(self, spatial_dims: int, skip_channels: int, up_channels: int) -> None:
        super().__init__()
        self.newest = up_channels
        self.out_channels = 2 * up_channels

    def forward(self, skip: Tensor, up: Tensor) -> Tensor:
        return torch.cat((up, skip[:, -self.newest :]), dim=1)


def knee_unet(
    spatial_dims: int = 2, in_channels: int = 1, out_channels: int = 1, width: int = 32, depth: int = 4, **parts: Any
) -> UNet:
    """Return the knee work's U-Net: as many channels on every level, ELU, no normalization.

    The levels::

        1 -> w -> w ------------- skip -------------- (w + w) -> w -> w -> 1      full size
             pool w -> w -------- skip ------- (w + w) -> w -> w -> ×2            / 2
                    ...                                                           depth times
                     pool w -> w -> dropout 0.5 -> ×2

    In 3D it never pools along the third axis, which in MR of the knee is some twenty times coarser: 2×2×1 with 3×3×3
    kernels. Up-sampling repeats the nearest voxel.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the logits, there one for all bones.
        width: channels of every layer; the work used 32 for most of its tests and 48 at last.
        depth: how many times it pools.
        parts: other arguments of :class:`UNet`.

    Source:
        Pröve 2017, bachelor thesis on knee bones in MRI. It names about 200,000 parameters as best, and leaves open the
        depth, the layers per level and the up-sampling. These fit what it names: 194,433 parameters. Initialization is
        what Keras does unasked, :func:`glorot_uniform`. The dropout, "at the end of the contracting path", follows the
        last layer of the deepest level.

    Example:
        >>> from medseg.networks import count_parameters
        >>> count_parameters(knee_unet()), count_parameters(knee_unet(width=48, depth=2))
        (194433, 229057)
    """
    ours: dict[str, Any] = {
        "strides": [(2, 2, 1)[:spatial_dims]] * depth,
        "layers": [*[2] * depth, 1],
        "block": _ELU_CONV,
        "bottleneck": _two_layers_and_dropout,
        "up": partial(UpSample, mode="nontrainable", interp_mode="nearest", align_corners=None),
        "head": partial(Head, kernel_size=1),
        "initializer": glorot_uniform,
    }
    return UNet(spatial_dims, in_channels, out_channels, [width] * (depth + 1), **{**ours, **parts})


def _two_layers_and_dropout(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        _ELU_CONV(spatial_dims, in_channels, out_channels),
        _ELU_CONV(spatial_dims, out_channels, out_channels),
        nn.Dropout(0.5),
    )
