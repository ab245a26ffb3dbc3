"""Encoders of image classifiers, as the front of a segmentation network.

An encoder is called ``encoder(spatial_dims, in_channels, output_stride=...)`` and returns its features from fine to
coarse, one tensor for each time the image was halved. Two attributes say what they are: ``widths``, the channels of
each, and ``strides``, how many voxels of the image one of its voxels stands for. Every stride appears once but the
last, at which the output stride is kept: an encoder of output stride 8 has the strides 2, 4, 8, 8, 8.

Beyond the output stride the halvings of the classifier are traded for dilation (the atrous convolutions of Chen et
al. 2017): with the same weights the features are those of the strided network, and the ones between them as well.
"""

import math
from collections.abc import Callable, Sequence

import torch
from monai.networks.blocks import Convolution
from monai.networks.layers import Norm
from monai.networks.nets.resnet import ResNet, ResNetBottleneck
from torch import Tensor, nn
from torch.nn import functional

from medseg.errors import ConfigError

from .arguments import require_image, require_network, require_voxels_to_normalize
from .blocks import linear_mode, pad_same

Part = Callable[..., nn.Module]
Normalization = str | tuple


class OverEncoder(nn.Module):
    """What networks over an encoder share: they map its features to a head, and the logits to the size of the image.

    A subclass has `head`, what its `_features` needs, and, for the check of images in training, `_pooled`.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the logits.
        encoder: called as ``encoder(spatial_dims, in_channels, output_stride=...)``.
        output_stride: voxels of the image along a side of the encoder's last features.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``, logits. Any size, odd ones too.

    Raises:
        ConfigError: in ``forward`` for an image that does not fit the network.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, encoder: Part, output_stride: int
    ) -> None:
        super().__init__()
        require_network(spatial_dims, in_channels=in_channels, out_channels=out_channels)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.spatial_dims = spatial_dims
        self.encoder = encoder(spatial_dims, in_channels, output_stride=output_stride)
        self.mode = linear_mode(spatial_dims)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        if not torch.jit.is_scripting() and not torch.jit.is_tracing():
            self._check(x)
        logits = self.head(self._features(x))
        return functional.interpolate(logits, size=x.shape[2:], mode=self.mode, align_corners=False)

    def _features(self, x: Tensor) -> Tensor:
        """Return what the head turns into logits."""
        raise NotImplementedError

    @torch.jit.unused
    def _pooled(self, size: Sequence[int]) -> tuple[nn.Module, int]:
        """Return the layers behind the coarsest pooling, and how many voxels they have of an image of that size."""
        raise NotImplementedError

    @torch.jit.unused
    def _check(self, x: Tensor) -> None:
        require_image(self, x)
        deepest = math.prod([math.ceil(size / self.encoder.strides[-1]) for size in x.shape[2:]])
        for layers, voxels in ((self, deepest), self._pooled(x.shape[2:])):
            require_voxels_to_normalize(x, voxels, layers)


class InvertedResidual(nn.Module):
    """MobileNetV2's layer: widen by a 1×1, filter each channel by a 3×3, project by a 1×1 without activation.

    The input is added where its shape is that of the output.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        strides: of the filters.
        expansion: how many times wider the filters are than the input; with 1 there is no widening.
        norm: a MONAI normalization, after each convolution.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *ceil(spatial / strides))``

    Source:
        Sandler et al. 2018, MobileNetV2, table 1.

    Example:
        >>> InvertedResidual(2, 8, 16, strides=2)(torch.zeros(2, 8, 15, 16)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        strides: int = 1,
        expansion: int = 6,
        norm: Normalization = "BATCH",
    ) -> None:
        super().__init__()
        wide = expansion * in_channels
        layers = [conv_norm_act(spatial_dims, in_channels, wide, norm=norm, act="RELU6")] if expansion > 1 else []
        layers += [
            conv_norm_act(spatial_dims, wide, wide, 3, strides=strides, groups=wide, norm=norm, act="RELU6"),
            conv_norm_act(spatial_dims, wide, out_channels, norm=norm, act=None),
        ]
        self.layers = nn.Sequential(*layers)
        self.adds = strides == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection, plus the input where it fits."""
        return x + self.layers(x) if self.adds else self.layers(x)


class MobileNetV2(nn.Module):
    """The convolutions of MobileNetV2 up to its last bottleneck, 17 inverted residuals in five levels.

    The levels::

        image -> conv 32 -> 1 × 16      stride 2
                            2 × 24      stride 4
                            3 × 32      stride 8
                   4 × 64,  3 × 96      stride 16
                  3 × 160, 1 × 320      stride 32

    The 1×1 convolution to 1,280 channels in front of the classifier is left out, as in DeepLab.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        output_stride: 8, 16 or 32.
        width: the width multiplier; every width becomes the nearest multiple of 8.
        norm: a MONAI normalization, after each convolution.

    Shape:
        ``(B, in_channels, *spatial)`` -> a list of ``(B, widths[i], *ceil(spatial / strides[i]))``

    Raises:
        ConfigError: for arguments that make no network.

    Source:
        Sandler et al. 2018, MobileNetV2, table 2.

    Example:
        >>> encoder = MobileNetV2(2, in_channels=3, output_stride=8, width=0.25)
        >>> encoder.widths, encoder.strides
        ((8, 8, 8, 24, 80), (2, 4, 8, 8, 8))
        >>> [tuple(features.shape[1:]) for features in encoder(torch.zeros(2, 3, 33, 48))]
        [(8, 17, 24), (8, 9, 12), (8, 5, 6), (24, 5, 6), (80, 5, 6)]
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        output_stride: int = 32,
        width: float = 1.0,
        norm: Normalization = "BATCH",
    ) -> None:
        super().__init__()
        _check_encoder(spatial_dims, in_channels, output_stride, width)
        channels = _multiple_of_8(32 * width)
        layers: list[nn.Module] = [
            conv_norm_act(spatial_dims, in_channels, channels, 3, strides=2, norm=norm, act="RELU6")
        ]
        stages = []
        widths = []
        # For each level: expansion, stride, then pairs of depth and width.
        for expansion, strides, *groups in (
            (1, 1, (1, 16)),
            (6, 2, (2, 24)),
            (6, 2, (3, 32)),
            (6, 2, (4, 64), (3, 96)),
            (6, 2, (3, 160), (1, 320)),
        ):
            for depth, base in groups:
                for _ in range(depth):
                    target = _multiple_of_8(base * width)
                    layers.append(InvertedResidual(spatial_dims, channels, target, strides, expansion, norm))
                    channels, strides = target, 1
            stages.append(nn.Sequential(*layers))
            widths.append(channels)
            layers = []
        self.stages = nn.ModuleList(stages)
        self.widths = tuple(widths)
        self.strides = _dilate(stages, output_stride)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of the five levels."""
        features: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class BottleneckResNet(ResNet):
    """A ResNet of bottlenecks, by default ResNet-50, as MONAI's class builds it, with dilation and all its features.

    The levels::

        image -> conv 64, 7×7              stride 2
                 pool ->  3 bottlenecks    stride 4       256 channels
                          4 bottlenecks    stride 8       512 channels
                          6 bottlenecks    stride 16    1,024 channels
                          3 bottlenecks    stride 32    2,048 channels

    Its state dict is that of :class:`monai.networks.nets.resnet.ResNetFeatures`, so MONAI's pretrained weights of
    ResNet-50 (and 101, ...) load. A bottleneck halves the image in its 3×3 convolution.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        output_stride: 8, 16 or 32.
        layers: bottlenecks per level; (3, 4, 23, 3) makes ResNet-101.
        width: a factor for all widths.
        deep_stem: three 3×3 convolutions (64, 64, 128) in place of the 7×7, as in PSPNet.

    Shape:
        ``(B, in_channels, *spatial)`` -> a list of ``(B, widths[i], *ceil(spatial / strides[i]))``

    Raises:
        ConfigError: for arguments that make no network.

    Source:
        He et al. 2016, Deep residual learning for image recognition; the stem, Zhao et al. 2017, PSPNet.

    Example:
        >>> encoder = BottleneckResNet(3, in_channels=1, output_stride=16, layers=(1, 1, 1, 1), width=0.125)
        >>> encoder.widths, encoder.strides
        ((8, 32, 64, 128, 256), (2, 4, 8, 16, 16))
        >>> encoder(torch.zeros(2, 1, 32, 32, 17))[-1].shape
        torch.Size([2, 256, 2, 2, 2])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        output_stride: int = 32,
        layers: Sequence[int] = (3, 4, 6, 3),
        width: float = 1.0,
        deep_stem: bool = False,
    ) -> None:
        _check_encoder(spatial_dims, in_channels, output_stride, width)
        if len(layers) != 4 or min(layers) < 1:
            raise ConfigError(f"layers is {tuple(layers)}; expected four positive numbers, one per level")
        planes = [64, 128, 256, 512]
        super().__init__(
            ResNetBottleneck,
            list(layers),
            planes,
            spatial_dims,
            in_channels,
            conv1_t_stride=2,
            widen_factor=width,
            feed_forward=False,
            bias_downsample=False,
        )
        planes = [int(p * width) for p in planes]
        stem = planes[0]
        if deep_stem:
            narrow, stem = stem, 2 * stem
            self.conv1 = nn.Sequential(
                conv_norm_act(spatial_dims, in_channels, narrow, 3, strides=2),
                conv_norm_act(spatial_dims, narrow, narrow, 3),
                Convolution(spatial_dims, narrow, stem, bias=False, conv_only=True),
            )
            self.bn1 = Norm["BATCH", spatial_dims](stem)
            self.in_planes = stem
            self.layer1 = self._make_layer(ResNetBottleneck, planes[0], layers[0], spatial_dims, "B")
        self.widths = (stem, *(4 * p for p in planes))
        halved_before = 4
        later = _dilate([self.layer2, self.layer3, self.layer4], output_stride, halved_before)
        self.strides = (2, halved_before, *later)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of the stem and of the four levels."""
        x = self.act(self.bn1(self.conv1(x)))
        features = [x]
        x = self.layer1(self.maxpool(x))
        features.append(x)
        x = self.layer2(x)
        features.append(x)
        x = self.layer3(x)
        features.append(x)
        features.append(self.layer4(x))
        return features


def conv_norm_act(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    kernel_size: int = 1,
    strides: int = 1,
    dilation: int = 1,
    groups: int = 1,
    norm: Normalization = "BATCH",
    act: str | None = "RELU",
) -> nn.Module:
    """Return MONAI's convolution without bias -> normalization -> activation, padded to keep the size.

    An even kernel is padded with the extra zero at the end, as in Keras; it takes no strides or dilation.

    Example:
        >>> conv_norm_act(2, 3, 8, kernel_size=3, dilation=2)(torch.zeros(2, 3, 7, 7)).shape
        torch.Size([2, 8, 7, 7])
    """
    even = kernel_size % 2 == 0
    layer = Convolution(
        spatial_dims,
        in_channels,
        out_channels,
        strides=strides,
        kernel_size=kernel_size,
        dilation=dilation,
        groups=groups,
        padding=0 if even else None,
        adn_ordering="NA",
        norm=norm,
        act=act,
        bias=False,
    )
    if not even:
        return layer
    return nn.Sequential(pad_same((kernel_size,) * spatial_dims), layer)


def _dilate(stages: Sequence[nn.Module], output_stride: int, stride: int = 1) -> tuple[int, ...]:
    """Trade strides for dilation in the stages behind the output stride; return the stride after each stage.

    A convolution that loses its stride still sees what it saw; the later ones of its stage, and the next stages,
    look twice as far, over the features that now lie between those they knew.
    """
    reached = []
    rate = 1
    for stage in stages:
        if stride < output_stride:
            stride *= 2
        else:
            for conv in stage.modules():
                if not isinstance(conv, torch.nn.modules.conv._ConvNd):
                    continue
                step = rate if max(conv.stride) > 1 else 2 * rate
                conv.stride = (1,) * len(conv.stride)
                if max(conv.kernel_size) > 1:
                    conv.dilation = (step,) * len(conv.stride)
                    conv.padding = tuple(step * (k // 2) for k in conv.kernel_size)
            rate *= 2
        reached.append(stride)
    return tuple(reached)


def _multiple_of_8(width: float) -> int:
    # As in the published network: the nearest multiple, but at least 8 and never below nine tenths.
    rounded = max(8, math.floor(width / 8 + 0.5) * 8)
    return rounded if rounded >= 0.9 * width else rounded + 8


def _check_encoder(spatial_dims: int, in_channels: int, output_stride: int, width: float) -> None:
    require_network(spatial_dims, in_channels=in_channels)
    if output_stride not in (8, 16, 32):
        raise ConfigError(f"output_stride is {output_stride}; expected 8, 16 or 32")
    if not width * 64 >= 1:
        raise ConfigError(f"width is {width}; expected a factor of at least 1/64")
