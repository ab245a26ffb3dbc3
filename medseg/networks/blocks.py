"""The parts that networks are assembled from.

A network is given classes (or :func:`functools.partial` of them), never flags. It calls them so, in MONAI's words::

    block(spatial_dims, in_channels, out_channels)               one layer of a level
    down(spatial_dims, in_channels, out_channels, strides)       from one level to the next
    up(spatial_dims, in_channels, out_channels, strides)         and back
    skip(spatial_dims, skip_channels, up_channels)               joins the two streams; forward(skip, up)
    head(spatial_dims, in_channels, out_channels)                logits

so :class:`monai.networks.blocks.Convolution`, :class:`monai.networks.blocks.ResidualUnit` and a user's own class fit
as well. A part whose number of output channels is not the one asked for says so in an attribute ``out_channels``.
"""

import math
from collections.abc import Callable, Sequence

import torch
from monai.networks.blocks import ADN, Convolution
from monai.networks.layers import Pad, Pool
from torch import Tensor, nn

from medseg.errors import ConfigError

from .arguments import per_axis

_RELU = ("RELU", {"inplace": True})


class ConvActNorm(Convolution):
    """Convolution -> activation -> normalization -> dropout, padded to keep the size.

    A kernel of an even size is padded as Keras' "same" does it, with the odd zero behind the last voxel.

    MONAI's :class:`~monai.networks.blocks.Convolution` in the order of the PET/CT thesis (table 4.3) rather than
    MONAI's own. Use MONAI's class itself for convolution -> normalization -> activation.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        strides: one number or one per axis; with a stride the layer serves as ``down``.
        kernel_size: one number or one per axis; even ones only without strides.
        act: a MONAI activation, None for none.
        norm: a MONAI normalization, None for none.
        dropout: probability of zeroing, None for none.
        bias: whether the convolution has a bias.
        padding: zeros on each side; by default half the kernel.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *ceil(spatial / strides))``

    Raises:
        ConfigError: for an even kernel with strides and without padding.

    Example:
        >>> ConvActNorm(2, 3, 8, strides=2)(torch.zeros(4, 3, 15, 16)).shape
        torch.Size([4, 8, 8, 8])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        strides: Sequence[int] | int = 1,
        kernel_size: Sequence[int] | int = 3,
        act: str | tuple | None = _RELU,
        norm: str | tuple | None = "BATCH",
        dropout: float | None = None,
        bias: bool = True,
        padding: Sequence[int] | int | None = None,
    ) -> None:
        kernel = per_axis("kernel_size", kernel_size, spatial_dims)
        even = padding is None and any(k % 2 == 0 for k in kernel)
        if even and math.prod(per_axis("strides", strides, spatial_dims)) != 1:
            raise ConfigError(
                f"kernel_size {kernel_size} with strides {strides}: a kernel of an even size keeps the size only "
                "without strides; use an odd one, or give the padding"
            )
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            strides=strides,
            kernel_size=kernel_size,
            adn_ordering="AND",
            act=act,
            norm=norm,
            dropout=dropout,
            bias=bias,
            padding=0 if even else padding,
        )
        if even:
            self.conv = nn.Sequential(pad_same(kernel), self.get_submodule("conv"))


class PreActResidual(nn.Module):
    """The improved (pre-activation) residual layer: shortcut + conv(act(norm(conv(act(norm(x)))))).

    The shortcut is the identity where the shape stays, every s-th voxel where only the size changes, and a 1×1
    convolution where the number of channels changes. As published that convolution is not normalized: it hands
    the scale of the image on to every level, and starves the deep ones of gradients where that scale is large (see the
    page "Improved ResNet and its skip"). ``shortcut_norm="BATCH"`` normalizes it.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        strides: of the first convolution and of the shortcut, one number or one per axis.
        kernel_size: one odd number or one per axis.
        act: a MONAI activation.
        norm: a MONAI normalization.
        shortcut_norm: a MONAI normalization after the 1×1 convolution of the shortcut, None for none.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *ceil(spatial / strides))``

    Source:
        He et al. 2016, Identity mappings in deep residual networks; algorithm 2.2 of the PET/CT thesis.

    Example:
        >>> PreActResidual(3, 1, 8, strides=(2, 2, 1), shortcut_norm="BATCH")(torch.zeros(2, 1, 8, 8, 5)).shape
        torch.Size([2, 8, 4, 4, 5])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        strides: Sequence[int] | int = 1,
        kernel_size: Sequence[int] | int = 3,
        act: str | tuple | None = "RELU",
        norm: str | tuple | None = "BATCH",
        shortcut_norm: str | tuple | None = None,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels

        def norm_act_conv(channels: int, strides: Sequence[int] | int) -> nn.Sequential:
            adn = ADN(ordering="NA", in_channels=channels, act=act, norm=norm, norm_dim=spatial_dims)
            conv = Convolution(spatial_dims, channels, out_channels, strides, kernel_size, conv_only=True)
            return nn.Sequential(adn, conv)

        self.residual = nn.Sequential(norm_act_conv(in_channels, strides), norm_act_conv(out_channels, 1))
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = Convolution(
                spatial_dims, in_channels, out_channels, strides, kernel_size=1, act=None, norm=shortcut_norm
            )
        elif math.prod(per_axis("strides", strides, spatial_dims)) != 1:
            self.shortcut = Pool["MAX", spatial_dims](kernel_size=1, stride=strides)

    def forward(self, x: Tensor) -> Tensor:
        """Return shortcut plus residual, without a final activation."""
        return self.shortcut(x) + self.residual(x)


class MaxPool(nn.Module):
    """Maximum over windows of ``strides`` voxels; an incomplete window at the border counts, so no voxel is dropped.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, in_channels, *ceil(spatial / strides))``; ``out_channels`` is ignored.

    Example:
        >>> MaxPool(2, 8, 16, strides=(2, 1))(torch.zeros(1, 8, 5, 5)).shape
        torch.Size([1, 8, 3, 5])
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, strides: Sequence[int] | int = 2
    ) -> None:
        super().__init__()
        self.out_channels = in_channels
        size = per_axis("strides", strides, spatial_dims)
        self.pool = Pool["MAX", spatial_dims](kernel_size=size, stride=size, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the maxima."""
        return self.pool(x)


class TransposedConv(Convolution):
    """Transposed ("up-") convolution -> activation -> normalization, which multiplies the size by ``strides``.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        strides: one number or one per axis.
        kernel_size: one number or one per axis; None takes ``strides``, so that no two outputs overlap.
        act: a MONAI activation, None for none.
        norm: a MONAI normalization, None for none.
        bias: whether the convolution has a bias.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *(spatial * strides))``

    Raises:
        ConfigError: for a kernel which cannot give exactly that size.

    Example:
        >>> TransposedConv(2, 16, 8, strides=(2, 1))(torch.zeros(1, 16, 3, 5)).shape
        torch.Size([1, 8, 6, 5])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        strides: Sequence[int] | int = 2,
        kernel_size: Sequence[int] | int | None = 3,
        act: str | tuple | None = _RELU,
        norm: str | tuple | None = "BATCH",
        bias: bool = True,
    ) -> None:
        stride = per_axis("strides", strides, spatial_dims)
        kernel = stride if kernel_size is None else per_axis("kernel_size", kernel_size, spatial_dims)
        padding = tuple(max(0, (k - s + 1) // 2) for k, s in zip(kernel, stride, strict=True))
        extra = tuple(s - k + 2 * p for k, s, p in zip(kernel, stride, padding, strict=True))
        if any(not 0 <= e < s for e, s in zip(extra, stride, strict=True)):
            raise ConfigError(
                f"kernel_size {kernel} of a transposed convolution with strides {stride} cannot give spatial × "
                "strides; use an odd kernel of at least the stride, or kernel_size=None"
            )
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            strides=stride,
            kernel_size=kernel,
            adn_ordering="AN",
            act=act,
            norm=norm,
            bias=bias,
            is_transposed=True,
            padding=padding,
            output_padding=extra,
        )


class InterpolateConv(nn.Sequential):
    """Linear (or nearest) interpolation by ``strides``, then a layer: up-sampling without checkerboard artifacts.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        strides: the factor, one number or one per axis.
        mode: "linear" or "nearest".
        conv: the layer after the interpolation, called as ``conv(spatial_dims, in_channels, out_channels)``.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *(spatial * strides))``

    Source:
        Odena et al. 2016, Deconvolution and checkerboard artifacts.

    Example:
        >>> InterpolateConv(3, 16, 8, strides=(2, 2, 1))(torch.zeros(2, 16, 3, 3, 5)).shape
        torch.Size([2, 8, 6, 6, 5])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        strides: Sequence[int] | int = 2,
        mode: str = "linear",
        conv: Callable[..., nn.Module] = ConvActNorm,
    ) -> None:
        if mode not in ("linear", "nearest"):
            raise ConfigError(f"mode of InterpolateConv is {mode!r}; expected 'linear' or 'nearest'")
        factor = tuple(float(s) for s in per_axis("strides", strides, spatial_dims))
        method = linear_mode(spatial_dims) if mode == "linear" else mode
        super().__init__(nn.Upsample(scale_factor=factor, mode=method), conv(spatial_dims, in_channels, out_channels))
        self.out_channels = out_channels


class Concatenate(nn.Module):
    """The U-Net's skip: the up-sampled stream and the encoder's features, stacked along the channels.

    Shape:
        ``(B, S, *spatial)``, ``(B, U, *spatial)`` -> ``(B, U + S, *spatial)``

    Example:
        >>> Concatenate(2, 4, 6)(torch.zeros(1, 4, 3, 3), torch.zeros(1, 6, 3, 3)).shape
        torch.Size([1, 10, 3, 3])
    """

    def __init__(self, spatial_dims: int, skip_channels: int, up_channels: int) -> None:
        super().__init__()
        self.out_channels = skip_channels + up_channels

    def forward(self, skip: Tensor, up: Tensor) -> Tensor:
        """Return both, the up-sampled stream first."""
        return torch.cat((up, skip), dim=1)


class Head(Convolution):
    """A convolution alone, without activation or normalization: it emits logits.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``

    Example:
        >>> Head(2, 64, 1)(torch.zeros(1, 64, 7, 7)).shape
        torch.Size([1, 1, 7, 7])
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, kernel_size: Sequence[int] | int = 3
    ) -> None:
        super().__init__(spatial_dims, in_channels, out_channels, kernel_size=kernel_size, conv_only=True)


class Heads(nn.Module):
    """Several heads on the same features, for a loss each; where the network is applied, the first alone speaks.

    In training one tensor of all, which :class:`medseg.losses.HeadsLoss` takes apart; in eval mode the logits of the
    first head, so that whatever follows a network of one head follows this one too. As ``head`` of a network::

        features -+- head -- logits 0 -+- stack (training)
                  +- head -- logits 1 -+

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the features.
        out_channels: channels of each head's logits.
        count: how many heads.
        head: one of them.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, count, out_channels, *spatial)`` in training,
        ``(B, out_channels, *spatial)`` in eval mode

    Source:
        Pröve 2017, bachelor thesis on knee bones in MRI: two output convolutions after the last features, the one
        trained with the F1 loss, the other with cross-entropy.

    Example:
        >>> heads = Heads(2, 64, 3)
        >>> heads(torch.zeros(1, 64, 7, 7)).shape, heads.eval()(torch.zeros(1, 64, 7, 7)).shape
        (torch.Size([1, 2, 3, 7, 7]), torch.Size([1, 3, 7, 7]))
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        count: int = 2,
        head: Callable[..., nn.Module] = Head,
    ) -> None:
        super().__init__()
        if count < 1:
            raise ConfigError(f"count of Heads is {count}; expected at least 1")
        self.first = head(spatial_dims, in_channels, out_channels)
        self.others = nn.ModuleList(head(spatial_dims, in_channels, out_channels) for _ in range(count - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of all heads, or of the first in eval mode."""
        logits = self.first(x)
        if not self.training:
            return logits
        stack: list[Tensor] = [logits]
        for head in self.others:
            stack.append(head(x))
        return torch.stack(stack, dim=1)


def he_normal(module: nn.Module) -> None:
    """Fill a convolution's or linear layer's kernel from the truncated He normal distribution, and its bias with zeros.

    The variance is 2 / fan-in after cutting at two standard deviations, as in Keras' ``he_normal``; fan-in counts, as
    there, the second axis of a torch kernel, which for a transposed convolution holds its outputs. Other modules are
    left alone, so ``network.apply(he_normal)`` initializes a whole network.

    Source:
        He et al. 2015, Delving deep into rectifiers.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> layer = nn.Conv2d(64, 64, 3)
        >>> he_normal(layer)
        >>> round(layer.weight.var().item() * 64 * 9, 1)
        2.0
    """
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        fan_in = module.weight[0].numel()
        # Cutting a unit normal at two standard deviations leaves a standard deviation of 0.8796.
        std = math.sqrt(2 / fan_in) / 0.87962566103423978
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def glorot_uniform(module: nn.Module) -> None:
    """Fill a convolution's or linear layer's kernel from Glorot's uniform distribution, and its bias with zeros.

    What Keras does where a work says nothing: within ±sqrt(6 / (fan-in + fan-out)). Used as :func:`he_normal` is.

    Source:
        Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks.

    Example:
        >>> layer = nn.Conv2d(32, 64, 3)
        >>> glorot_uniform(layer)
        >>> bool(layer.weight.abs().max() <= math.sqrt(6 / (9 * 32 + 9 * 64)))
        True
    """
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def pad_same(kernel: Sequence[int]) -> nn.Module:
    """Return the padding that Keras calls "same": of an even kernel the odd zero is behind the last voxel.

    torch's ``padding="same"`` does it too, with a warning for even kernels.

    Example:
        >>> pad_same((2, 3))(torch.ones(1, 1, 4, 4)).shape
        torch.Size([1, 1, 5, 6])
    """
    sides = [side for k in reversed(kernel) for side in ((k - 1) // 2, k // 2)]
    return Pad["CONSTANTPAD", len(kernel)](sides, 0.0)


def linear_mode(spatial_dims: int) -> str:
    """Return the name which ``torch.nn.functional.interpolate`` has for linear interpolation.

    Example:
        >>> linear_mode(3)
        'trilinear'
    """
    return {1: "linear", 2: "bilinear", 3: "trilinear"}[spatial_dims]
