"""Classifiers of patches, applied to a whole image at once.

A patch classifier says what the middle voxel of a patch is. Neighboring patches overlap, and what a convolution finds
in one it finds in the next. :class:`PatchClassifier` therefore has two forms of the same weights, which give the same
numbers: ``forward_patches`` for patches, as it is trained, and ``forward`` for every voxel of an image. In the latter
nothing is strided: a pooling takes its windows at every voxel, what follows it is dilated by its size, and the first
dense layer is a (dilated) convolution as large as what is left of the patch.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.errors import ConfigError

from .arguments import require_image, require_network
from .blocks import glorot_uniform
from .patch_scales import PatchScale, activation
from .voxel_patches import gather, pad_by


class PatchClassifier(nn.Module):
    """A classifier of patches around a voxel, by a CNN, by an MLP, or by several scales; by default the tutorial's.

    Each scale has a sub-network of its own; they are merged by the first dense layer::

        patch -+- scale 0: (average) -> [conv -> act -> pool] * n -> flatten -+- dense -> act -> ... -> dense -> logits
               +- scale 1: (average) -> [conv -> act -> pool] * n -> flatten -+
               +- features of the voxel itself -------------------------------+

    The tutorial's example, ``PatchClassifier(2, 3, 135)``: 29×29×3 -> conv 20@5×5 -> PReLU -> maximum 2×2 ->
    conv 50@3×3 -> PReLU -> maximum 2×2 -> 1,250 -> dense 2,000 -> PReLU -> dense 135. It has 2,784,775 parameters, with
    one PReLU slope per channel (one per channel and place, as Keras has by default, is no convolution). It does not see
    the last row and column of its patch: a pooling leaves out the last voxel of an odd number. An MLP on 11×11 pixels
    is ``PatchClassifier(2, 1, 2, scales=[(11, 1)], convolutions=(), hidden=[64], act="RELU")``.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image, ``features`` included.
        out_channels: channels of the output: 1 for one class against background by sigmoid, else one per class.
        scales: of each scale how many voxels its sub-network sees along each side, and how many voxels of the image
            along each side are averaged into one of these. Odd numbers all, so that there is a middle voxel: (29, 3)
            sees 29 averages of 3 voxels, 87 voxels of the image.
        convolutions: channels, kernel and pooling (1 for none) of each convolution. They are not padded.
        hidden: width of each dense layer but the last.
        pool: "MAX" or "AVG".
        act: a MONAI activation; a PReLU gets a slope for each channel.
        features: how many of the last channels are features of the voxel itself, such as
            :class:`medseg.transforms.CentroidDistances`: only their value at the middle voxel is seen, by the first
            dense layer.
        padding: what lies outside the image: "constant" (zeros), "reflect" or "replicate".
        initializer: applied to every module when the network is built; None leaves torch's own initialization.

    Shape:
        ``forward``: ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``, logits, any size;
        ``forward_patches``: ``(N, in_channels - features, *patch)`` and ``(N, features)`` -> ``(N, out_channels)``,
        where the patch has ``patch_size`` voxels along each side, what the largest scale sees.

    Raises:
        ConfigError: for arguments that make no network, and for an image or patches that do not fit it.

    Source:
        Išgum et al. 2017, tutorial on deep learning in medical image analysis; Sermanet et al. 2014, OverFeat, and
        Giusti et al. 2013, Fast image scanning with deep max-pooling convolutional neural networks, for the whole
        image.

    Example:
        >>> network = PatchClassifier(2, 1, 2, scales=[(9, 1), (9, 3)], convolutions=[(4, 3, 2)], hidden=[8])
        >>> image = torch.rand(1, 1, 20, 31)
        >>> logits = network(image)
        >>> tuple(logits.shape), network.patch_size
        ((1, 2, 20, 31), 27)
        >>> patch = torch.nn.functional.pad(image, [13] * 4)[..., 4 : 4 + 27, 17 : 17 + 27]
        >>> bool(torch.isclose(network.forward_patches(patch), logits[..., 4, 17], atol=1e-5).all())
        True
    """

    #: Whether its patches are three orthogonal planes as channels.
    triplanar = False

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        scales: Sequence[tuple[int, int]] = ((29, 1),),
        convolutions: Sequence[tuple[int, int, int]] = ((20, 5, 2), (50, 3, 2)),
        hidden: Sequence[int] = (2000,),
        pool: str = "MAX",
        act: str | tuple = "PRELU",
        features: int = 0,
        padding: str = "constant",
        initializer: Callable[[nn.Module], None] | None = glorot_uniform,
    ) -> None:
        super().__init__()
        require_network(spatial_dims)
        if features < 0 or min(in_channels - features, out_channels, *hidden, 1) < 1:
            raise ConfigError(
                f"in_channels {in_channels}, out_channels {out_channels}, hidden {tuple(hidden)}, features {features}: "
                "expected positive numbers, and a channel that is no feature"
            )
        if not scales or any(number < 1 or number % 2 == 0 for scale in scales for number in scale):
            raise ConfigError(f"scales {tuple(scales)}: expected odd numbers, (voxels, of how many averaged) per scale")
        if pool not in ("MAX", "AVG") or padding not in ("constant", "reflect", "replicate"):
            raise ConfigError(
                f"pool {pool!r}, padding {padding!r}: expected 'MAX' or 'AVG', and 'constant', 'reflect' or 'replicate'"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.spatial_dims = spatial_dims
        self.features = features
        self.padding = padding
        self.patch_size = max(size * step for size, step in scales)
        # An image is done in slabs along its first axis, so that no map has many more numbers than this. Slabs overlap
        # by a patch, so they are no thinner than one.
        self.largest_map = 1 << 25

        self.planes = 3 if self.triplanar else 1
        dims = 2 if self.triplanar else spatial_dims
        channels = in_channels - features
        self.scales = nn.ModuleList(
            PatchScale(dims, channels, size, step, (self.patch_size - size * step) // 2, convolutions, pool, act)
            for _ in range(self.planes)
            for size, step in scales
        )
        self.widths = [scale.width for scale in self.scales]
        widths = [*hidden, out_channels]
        self.merge = nn.Linear(sum(self.widths) + features, widths[0])
        rest: list[nn.Module] = []
        for width, target in itertools.pairwise(widths):
            rest += [activation(act, width), nn.Linear(width, target)]
        self.rest = nn.Sequential(*rest)
        self.widest = max([*widths, *(c for c, _, _ in convolutions)])
        if initializer is not None:
            self.apply(initializer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of every voxel of a batch of images."""
        if not torch.jit.is_scripting() and not torch.jit.is_tracing():
            self._check(x)
        channels = x.shape[1] - self.features
        padded = pad_by(x[:, :channels], self.patch_size // 2, self.padding)
        n = x.shape[2]
        rows = max(self.patch_size, self.largest_map // max(1, self.widest * padded[:, 0, 0].numel()))
        slabs: list[Tensor] = []
        for start in range(0, n, rows):
            count = min(rows, n - start)
            logits = self._merged(padded.narrow(2, start, count + self.patch_size - 1)).movedim(1, -1)
            if self.features > 0:
                at = x[:, channels:].narrow(2, start, count).movedim(1, -1)
                logits = logits + functional.linear(at, self.merge.weight[:, -self.features :])
            shape = logits.shape[:-1]
            slabs.append(self.rest(logits.flatten(0, -2)).unflatten(0, shape).movedim(-1, 1))
        return torch.cat(slabs, 2)

    def forward_patches(self, patches: Tensor, features: Tensor | None = None) -> Tensor:
        """Return the logits of the middle voxels of patches, given their features where the network takes any."""
        if not torch.jit.is_scripting() and not torch.jit.is_tracing():
            self._check_patches(patches, features)
        planes = patches.chunk(self.planes, 1)
        found = [scale(planes[number * self.planes // len(self.scales)]) for number, scale in enumerate(self.scales)]
        if features is not None:
            found.append(features)
        return self.rest(self.merge(torch.cat(found, 1)))

    def _merged(self, slab: Tensor) -> Tensor:
        """Return what the first dense layer makes of the scales, at each voxel of a padded image."""
        weights = self.merge.weight[:, : sum(self.widths)].split(self.widths, 1)
        total = self.merge.bias.view([1, -1] + [1] * self.spatial_dims)
        for number, scale in enumerate(self.scales):
            total = total + scale.whole(slab, weights[number])
        return total

    @torch.jit.unused
    def _check(self, x: Tensor) -> None:
        require_image(self, x)
        if self.padding == "reflect" and min(x.shape[2:]) <= self.patch_size // 2:
            raise ConfigError(
                f"input of shape {tuple(x.shape)} cannot be padded by reflection for patches of {self.patch_size} "
                f"voxels: expected at least {self.patch_size // 2 + 1} along each axis, or another padding"
            )

    @torch.jit.unused
    def _check_patches(self, patches: Tensor, features: Tensor | None) -> None:
        channels = (self.in_channels - self.features) * self.planes
        expected = (channels, *[self.patch_size] * (2 if self.triplanar else self.spatial_dims))
        given = 0 if features is None else features.shape[1]
        if tuple(patches.shape[1:]) != expected or given != self.features:
            raise ConfigError(
                f"patches of shape {tuple(patches.shape)} with {given} features: expected (patches, "
                f"{', '.join(map(str, expected))}) and {self.features} features each"
            )


class TriplanarClassifier(PatchClassifier):
    """A 2.5D classifier: three orthogonal patches around a voxel of a volume, each with sub-networks of its own.

    As :class:`PatchClassifier`, with a sub-network for each plane and scale, merged by the first dense layer::

        volume -+- axes 0, 1 -+- scale 0: 2D [conv -> act -> pool] * n -> flatten -+- dense -> act -> ... -> logits
                |             +- scale 1: ...                                      +
                +- axes 0, 2 --- ...                                               +
                +- axes 1, 2 --- ...                                               +
                +- features of the voxel itself, such as distances to centroids ---+

    Patches are given as channels, plane by plane, as :class:`medseg.transforms.RandVoxelPatches` cuts them:
    ``(N, 3 * (in_channels - features), patch_size, patch_size)``. Whoever wants the planes to be channels of one
    network from the first convolution on, as in the tutorial's example, applies ``PatchClassifier(2, 3, ...)`` through
    :class:`PatchByPatch`: neighboring voxels then share nothing that could be computed once.

    Its kernels are 2D: their channels-last layout is ``torch.channels_last``.

    Args:
        in_channels: channels of the image, ``features`` included.
        out_channels: channels of the output.
        scales: as there; by default 29 voxels, and 29 averages of 3 voxels.
        kwargs: the other arguments of :class:`PatchClassifier`.

    Shape:
        ``(B, in_channels, X, Y, Z)`` -> ``(B, out_channels, X, Y, Z)``, logits

    Source:
        de Brébisson and Montana 2015, Deep neural networks for anatomical brain segmentation: planes, two scales and
        distances to centroids, merged before the dense layers; Išgum et al. 2017, tutorial on deep learning in medical
        image analysis. That each plane has its own weights is a choice.

    Example:
        >>> network = TriplanarClassifier(5, 3, scales=[(7, 1), (7, 3)], convolutions=[(4, 3, 1)], features=4)
        >>> network(torch.zeros(1, 5, 9, 10, 11)).shape
        torch.Size([1, 3, 9, 10, 11])
        >>> network.forward_patches(torch.zeros(2, 3, 21, 21), torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    triplanar = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        scales: Sequence[tuple[int, int]] = ((29, 1), (29, 3)),
        **kwargs: Any,
    ) -> None:
        super().__init__(3, in_channels, out_channels, scales, **kwargs)

    def _merged(self, slab: Tensor) -> Tensor:
        """Return what the first dense layer makes of planes and scales, at each voxel of a padded volume."""
        weights = self.merge.weight[:, : sum(self.widths)].split(self.widths, 1)
        total = self.merge.bias.view(1, -1, 1, 1, 1)
        for number, scale in enumerate(self.scales):
            normal = 4 - number * self.planes // len(self.scales)
            slices = slab.narrow(normal, self.patch_size // 2, slab.shape[normal] - self.patch_size + 1)
            slices = slices.movedim(normal, 1)
            at_once = max(1, self.largest_map // max(1, self.widest * slices[0, 0, 0].numel()))
            parts = slices.flatten(0, 1).split(at_once)
            found = torch.cat([scale.whole(part, weights[number]) for part in parts])
            total = total + found.unflatten(0, (slices.shape[0], slices.shape[1])).movedim(1, normal)
        return total


class PatchByPatch(nn.Module):
    """A patch classifier applied to an image as it was trained: a patch around every voxel, in batches.

    It gives what the network's own ``forward`` gives, only slower. It is needed where the planes of a triplanar patch
    are channels of a 2D network: their sum behind the first convolution belongs to one voxel alone, so the work for
    one is of no use to the next, and no convolution of the volume replaces it.

    Args:
        network: classifies patches.
        triplanar: give it three orthogonal patches as channels; a :class:`TriplanarClassifier` gets them in any case.
        batch_size: patches at a time.

    Shape:
        ``(B, C, *spatial)`` -> ``(B, out_channels, *spatial)``, logits; with planes as channels of a 2D network
        ``(B, (in_channels - features) / 3 + features, X, Y, Z)`` -> ``(B, out_channels, X, Y, Z)``

    Example:
        >>> network = PatchClassifier(2, 3, 4, scales=[(9, 1)], convolutions=[(4, 3, 2)], hidden=[8])
        >>> PatchByPatch(network, triplanar=True)(torch.zeros(1, 1, 6, 5, 4)).shape
        torch.Size([1, 4, 6, 5, 4])
    """

    def __init__(self, network: PatchClassifier, triplanar: bool = False, batch_size: int = 1024) -> None:
        super().__init__()
        images = network.in_channels - network.features
        if triplanar and not network.triplanar:
            if network.spatial_dims != 2 or images % 3:
                raise ConfigError(
                    f"network of {network.spatial_dims} spatial dimensions and {images} channels: expected 2 "
                    "dimensions and 3 channels per channel of the volume, one for each plane"
                )
            images //= 3
        self.network = network
        self.triplanar = triplanar or network.triplanar
        self.batch_size = batch_size
        self.in_channels = images + network.features
        self.out_channels = network.out_channels
        self.spatial_dims = 3 if self.triplanar else network.spatial_dims

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of every voxel of a batch of images."""
        if not torch.jit.is_scripting() and not torch.jit.is_tracing():
            self._check(x)
        size, features = self.network.patch_size, self.network.features
        channels = x.shape[1] - features
        padded = pad_by(x[:, :channels], size // 2, self.network.padding)
        axes = [torch.arange(n, device=x.device) for n in x.shape[2:]]
        voxels = torch.stack(torch.meshgrid(axes, indexing="ij"), -1).flatten(0, -2)
        images: list[Tensor] = []
        for image in range(x.shape[0]):
            at = x[image, channels:].flatten(1).t()
            logits: list[Tensor] = []
            for start in range(0, len(voxels), self.batch_size):
                part = slice(start, start + self.batch_size)
                patches = gather(padded[image], voxels[part], size, self.triplanar)
                logits.append(self.network.forward_patches(patches, at[part] if features > 0 else None))
            images.append(torch.cat(logits).t().unflatten(1, x.shape[2:]))
        return torch.stack(images)

    @torch.jit.unused
    def _check(self, x: Tensor) -> None:
        if x.ndim != self.spatial_dims + 2 or x.shape[1] != self.in_channels:
            raise ConfigError(
                f"input of shape {tuple(x.shape)} does not fit the network: expected "
                f"(batch, {self.in_channels} channels, {self.spatial_dims} spatial axes)"
            )
