"""A fully connected conditional random field, which moves the borders of a segmentation to those of the image."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from math import prod

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor
from nibabel.affines import voxel_sizes
from torch import Tensor

from medseg.errors import ConfigError, GeometryError

#: Probabilities are kept this far from 0, because a logarithm is taken of them.
_FLOOR = 1e-6
#: Kernels end at this many standard deviations.
_CUT = 4.0
#: Cells of the bilateral grid; 2²⁷ floats are half a gigabyte for each class.
_MAX_CELLS = 2**27


class DenseCRF(Transform):
    r"""Refine probabilities by a conditional random field that connects every voxel with every other.

    Voxels that are near each other, and more so if they look alike, are drawn to the same class. The energy is that of
    Krähenbühl and Koltun 2011: -log of the probability for each voxel, and for each pair of voxels of different
    classes

    .. math:: w_a \exp\left(-\frac{|x_i - x_j|^2}{2\theta_\alpha^2}
        -\sum_c \frac{(I_{ic} - I_{jc})^2}{2\theta_{\beta c}^2}\right)
        + w_s \exp\left(-\frac{|x_i - x_j|^2}{2\theta_\gamma^2}\right)

    (x in mm, I the image, c its channels). Each kernel is normalized on both sides, by the roots of its row sums, as in
    the authors' program; so a weight is what a class gains in a voxel whose whole surrounding is of that class. The
    energy is minimized by mean field iterations, in which a voxel is among its own neighbors, as there.

    The kernel of appearance is computed on a bilateral grid (Paris and Durand 2009), in cells of one standard
    deviation, along the axes of the image and its channels; linear interpolation into and out of the grid widens a
    kernel by a known amount, which the blur between leaves out. The other kernel is a separable convolution.

    The values below are a start, to be tuned on validation cases. An image that shows no border leaves only
    smoothing, and thin structures are smoothed away.

    Args:
        appearance_intensity: θβ, in units of the image; one number for each channel, or one for all.
        appearance_mm: θα, in mm.
        appearance_weight: w_a.
        smoothness_mm: θγ, in mm.
        smoothness_weight: w_s.
        iterations: of the mean field.
        spacing: mm per voxel along each axis, of which a slice takes the first two; default: that of the MetaTensor.

    Shape:
        probabilities ``(C, *spatial)`` and image ``(channels, *spatial)``, 2D or 3D -> ``(C, *spatial)``, float32.
        With one channel it is the probability of the foreground (of a sigmoid); several sum to 1 (of a softmax).
        A MetaTensor keeps its affine and meta.

    Raises:
        ConfigError: for a width that is not positive, a negative weight or number of iterations, channels that are no
            probabilities or do not sum to 1, and for an image with NaN, or with values so far apart that the grid would
            be too large.
        GeometryError: for another shape of the image, and where nothing tells the spacing.

    Note:
        128³ voxels, one channel and two classes take 7 s of one CPU core and 0.2 GB beside the input, with a second
        channel 12 s, with a third class 10 s and 0.4 GB. The grid has (extent / θα + 2) × ... × (range of a channel /
        θβ + 2) × ... cells, each of 12 bytes for each class: clip an image to the values that matter.

    Source:
        Krähenbühl and Koltun 2011, Efficient inference in fully connected CRFs with Gaussian edge potentials. The
        authors filter on a permutohedral lattice; MONAI's `CRF` does so too, where MONAI was compiled with its C++
        extensions, which its wheels are not.

    Example:
        >>> image = torch.zeros(1, 9, 9)
        >>> image[:, 3:6, 3:6] = 1.0
        >>> probabilities = 0.3 + 0.4 * image
        >>> probabilities[:, 4, 4] = 0.45  # a voxel that the network got wrong
        >>> refined = DenseCRF(appearance_intensity=0.2, spacing=(1.0, 1.0))(probabilities, image)
        >>> bool(refined[0, 4, 4] > 0.5), bool(refined[0, 0, 0] < 0.3)
        (True, True)
    """

    backend = (TransformBackends.TORCH,)

    def __init__(
        self,
        appearance_intensity: float | Sequence[float],
        appearance_mm: float = 10.0,
        appearance_weight: float = 3.0,
        smoothness_mm: float = 2.0,
        smoothness_weight: float = 1.0,
        iterations: int = 5,
        spacing: Sequence[float] | None = None,
    ) -> None:
        intensity = appearance_intensity if isinstance(appearance_intensity, Sequence) else [appearance_intensity]
        self.appearance_intensity = [float(width) for width in intensity]
        widths = {
            "appearance_intensity": self.appearance_intensity,
            "appearance_mm": [appearance_mm],
            "smoothness_mm": [smoothness_mm],
            "spacing": [] if spacing is None else spacing,
        }
        for name, values in widths.items():
            if not all(0 < value < float("inf") for value in values):
                raise ConfigError(f"{name}: found {list(values)}, expected positive numbers")
        counts = {"appearance_weight": appearance_weight, "smoothness_weight": smoothness_weight}
        for name, value in {**counts, "iterations": iterations}.items():
            if not value >= 0:
                raise ConfigError(f"{name}: found {value}, expected 0 or more")
        self.appearance_mm, self.appearance_weight = float(appearance_mm), float(appearance_weight)
        self.smoothness_mm, self.smoothness_weight = float(smoothness_mm), float(smoothness_weight)
        self.iterations, self.spacing = int(iterations), spacing

    def __call__(self, probabilities: Tensor, image: Tensor) -> Tensor:
        """Return the refined probabilities of an image."""
        spacing = self._spacing(probabilities, image)
        values = convert_to_tensor(probabilities, track_meta=False).float()
        features = convert_to_tensor(image, track_meta=False, device=values.device).float()
        widths = self._check(values, features, spacing)
        one = len(values) == 1
        q = torch.cat([1 - values, values]) if one else values
        unary = q.clamp_min(_FLOOR).log()
        pairs: list[_Pairs] = []
        if self.smoothness_weight > 0:
            smooth = partial(_smooth, stds=[self.smoothness_mm / s for s in spacing])
            pairs.append(_Pairs(smooth, self.smoothness_weight, q))
        if self.appearance_weight > 0:
            grid = _BilateralGrid(features, [self.appearance_mm / s for s in spacing], widths)
            pairs.append(_Pairs(grid, self.appearance_weight, q))
        for _ in range(self.iterations):
            energy = unary.clone()
            for pair in pairs:
                pair.add_to(energy, q)
            q = energy.softmax(0)
        return convert_to_dst_type(q[1:] if one else q, probabilities, dtype=torch.float32)[0]

    def _spacing(self, probabilities: Tensor, image: Tensor) -> list[float]:
        dims = probabilities.ndim - 1
        if self.spacing is not None:
            spacing = [float(s) for s in self.spacing]
        else:
            known = [tensor for tensor in (image, probabilities) if isinstance(tensor, MetaTensor)]
            if not known:
                raise GeometryError(
                    "spacing: the image is no MetaTensor that tells it; give DenseCRF its spacing in mm"
                )
            spacing = [float(s) for s in voxel_sizes(known[0].affine.cpu().numpy())]
        spacing = spacing[:dims]
        if len(spacing) != dims or dims not in (2, 3):
            raise GeometryError(f"spacing: found {spacing} for {dims} axes, expected one for each of 2 or 3")
        return spacing

    def _check(self, values: Tensor, features: Tensor, spacing: Sequence[float]) -> list[float]:
        if features.shape[1:] != values.shape[1:]:
            raise GeometryError(
                f"image of shape {tuple(features.shape)} for probabilities of shape {tuple(values.shape)}: expected "
                "one grid; refine before the inversion to the original grid"
            )
        if not features.isfinite().all():
            raise ConfigError("image: found NaN or infinity, expected numbers; look for them with data_prep check")
        if not (values.min() >= 0 and values.max() <= 1):
            low, high = values.min().item(), values.max().item()
            raise ConfigError(
                f"probabilities: found {low:.3g} to {high:.3g}, expected 0 to 1; activate the logits first"
            )
        if len(values) > 1 and not torch.allclose(values.sum(0), torch.ones(()).to(values), atol=1e-2):
            raise ConfigError("probabilities: the channels do not sum to 1; refine labels that overlap one by one")
        widths = self.appearance_intensity
        if len(widths) == 1:
            widths = widths * len(features)
        if len(widths) != len(features):
            raise ConfigError(f"appearance_intensity: found {len(widths)} for {len(features)} channels, expected each")
        return widths


class DenseCRFd(MapTransform):
    """Dictionary twin of :class:`DenseCRF`: stands behind the activation, before inversion and mask.

    Args:
        keys: probabilities.
        image_key: the image on the same grid.
        appearance_intensity, appearance_mm, appearance_weight, smoothness_mm, smoothness_weight, iterations, spacing:
            see :class:`DenseCRF`.
        allow_missing_keys: do not raise for an absent key.
    """

    backend = DenseCRF.backend

    def __init__(
        self,
        keys: KeysCollection,
        appearance_intensity: float | Sequence[float],
        appearance_mm: float = 10.0,
        appearance_weight: float = 3.0,
        smoothness_mm: float = 2.0,
        smoothness_weight: float = 1.0,
        iterations: int = 5,
        spacing: Sequence[float] | None = None,
        image_key: str = "image",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key
        self.refine = DenseCRF(
            appearance_intensity,
            appearance_mm,
            appearance_weight,
            smoothness_mm,
            smoothness_weight,
            iterations,
            spacing,
        )

    def __call__(self, data: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Return the data with refined probabilities."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.refine(d[key], d[self.image_key])
        return d


def _gaussian(std: float, device: torch.device) -> Tensor:
    radius = max(1, int(_CUT * std + 0.5))
    return torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=device) / std) ** 2)


def _blur(values: Tensor, axis: int, taps: Tensor) -> Tensor:
    """Return the convolution along one axis, zero beyond the ends."""
    size, radius = values.shape[axis], len(taps) // 2
    moved = values.movedim(axis, -1)
    lines = moved.reshape(-1, 1, size)
    return torch.conv1d(lines, taps[None, None], padding=radius).reshape(moved.shape).movedim(-1, axis)


def _smooth(q: Tensor, stds: Sequence[float]) -> Tensor:
    for axis, std in enumerate(stds, start=1):
        q = _blur(q, axis, _gaussian(std, q.device))
    return q


class _Pairs:
    """The part of the energy that one kernel gives: the weighted, normalized sum over all voxels, of each class."""

    def __init__(self, kernel: Callable[[Tensor], Tensor], weight: float, q: Tensor) -> None:
        self.kernel, self.weight = kernel, weight
        self.scale = kernel(torch.ones_like(q[:1])).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        self.all_classes = weight * self.scale * kernel(self.scale)

    def add_to(self, energy: Tensor, q: Tensor) -> None:
        """Add to the energy of each class; the first class has what the others leave, as the classes sum to 1."""
        sums = self.weight * self.scale * self.kernel(self.scale * q[1:])
        energy[1:] += sums
        energy[:1] += self.all_classes - sums.sum(0, keepdim=True)


class _BilateralGrid:
    """Sums over all voxels, weighted by a Gaussian of position and intensity: splat into a coarse grid, blur, slice.

    The hat functions of splat and slice each have a variance of 1/6 cell², so with a blur of 2/3 the three together
    have that of the Gaussian, whose standard deviation is one cell.
    """

    def __init__(self, features: Tensor, stds: Sequence[float], widths: Sequence[float]) -> None:
        shape, device = features.shape[1:], features.device
        axes = [torch.arange(size, device=device) / std for size, std in zip(shape, stds, strict=True)]
        values = [channel - channel.min() for channel in features]
        coordinates = [c.flatten() for c in torch.meshgrid(*axes, indexing="ij")]
        coordinates += [value.flatten() / width for value, width in zip(values, widths, strict=True)]
        self.cells = [int(c.max()) + 2 for c in coordinates]
        if prod(self.cells) > _MAX_CELLS:
            raise ConfigError(
                f"appearance_intensity: found an image that needs a grid of {'x'.join(map(str, self.cells))} cells, "
                f"expected {_MAX_CELLS} at most; clip the image to the values that matter, or widen the kernel"
            )
        self.strides = [prod(self.cells[axis + 1 :]) for axis in range(len(self.cells))]
        self.fractions = [c.frac() for c in coordinates]
        self.first = torch.zeros_like(coordinates[0], dtype=torch.long)
        for stride, coordinate in zip(self.strides, coordinates, strict=True):
            self.first += stride * coordinate.long()
        self.taps = _gaussian((2 / 3) ** 0.5, device)

    def __call__(self, q: Tensor) -> Tensor:
        flat = q.flatten(1)
        grid = q.new_zeros(len(q), prod(self.cells))
        for index, weight in self._corners():
            grid.index_add_(1, index, flat * weight)
        grid = grid.reshape(len(q), *self.cells)
        for axis in range(1, grid.ndim):
            grid = _blur(grid, axis, self.taps)
        grid = grid.flatten(1)
        result = torch.zeros_like(flat)
        for index, weight in self._corners():
            result += grid[:, index] * weight
        return result.reshape(q.shape)

    def _corners(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each corner of a cell, the index of the grid and the weight there, for every voxel."""
        for corner in product((0, 1), repeat=len(self.cells)):
            weight = torch.ones_like(self.fractions[0])
            for upper, fraction in zip(corner, self.fractions, strict=True):
                weight *= fraction if upper else 1 - fraction
            offset = sum(upper * stride for upper, stride in zip(corner, self.strides, strict=True))
            yield self.first + offset, weight
