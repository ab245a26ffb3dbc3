"""Transforms of stacks of slices: each slice resized by itself, and stacks of different length made one length."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform
from monai.transforms.utils import scale_affine
from monai.utils import TraceKeys, convert_to_tensor, ensure_tuple_rep

from medseg.errors import ConfigError, GeometryError


class ResizeSlices(InvertibleTransform):
    """Resize every slice of a stack by itself; nothing is interpolated across slices.

    A pixel is a box, and the boxes of the result cover the same field of view. ``linear`` weighs what lies under a
    triangle as wide as two pixels of the result, so that a smaller image neither aliases nor is shifted (the filter of
    Pillow's ``BILINEAR``); at the edge the weights are those of the pixels that there are. MONAI's ``Resize`` differs:
    its Gaussian ``anti_aliasing`` takes what lies outside the image for 0 (air of -1000 HU becomes -804 at the edge),
    its ``area`` moves pixels by up to half of one where the sizes are no multiples, and its ``nearest`` shifts labels.

    Args:
        size: pixels along the two axes of a slice, in the order of the array's axes.
        mode: ``"linear"`` for images, ``"nearest"`` for labels.
        axis: spatial axis along which the slices are stacked; it stays as it is.

    Shape:
        ``(C, X, Y, Z)`` -> ``(C, *size, Z)`` for the last axis; float32 for ``linear``, else the type of the image. A
        MetaTensor's affine follows, and its ``inverse`` brings it back to the old size.

    Raises:
        ConfigError: a size below 1, an unknown mode or axis.
        GeometryError: no stack in 3D.

    Example:
        >>> image = MetaTensor(torch.arange(8.0).reshape(1, 8, 1, 1).expand(1, 8, 8, 3), affine=np.eye(4))
        >>> small = ResizeSlices((2, 2))(image)
        >>> tuple(small.shape), small.pixdim.tolist(), small.affine[0, 3].item()
        ((1, 2, 2, 3), [4.0, 4.0, 1.0], 1.5)
        >>> ResizeSlices((2, 2), mode="nearest")(image)[0, :, 0, 0].tolist()
        [2.0, 6.0]
    """

    def __init__(self, size: Sequence[int], mode: str = "linear", axis: int = -1) -> None:
        if len(size) != 2 or min(size) < 1:
            raise ConfigError(f"size {tuple(size)}: expected two positive numbers")
        if mode not in ("linear", "nearest"):
            raise ConfigError(f"mode {mode!r}: expected one of linear, nearest")
        self.size, self.mode, self.axis = tuple(int(n) for n in size), mode, _spatial(axis)

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        """Return the stack of resized slices."""
        img = _stack(img)
        old = tuple(img.shape[1:])
        new = (*self.size[: self.axis], old[self.axis], *self.size[self.axis :])
        result = MetaTensor(_resize(img.as_tensor(), new, self.axis, self.mode))
        return result.copy_meta_from(
            self.track_transform_meta(
                img,
                sp_size=new,
                affine=scale_affine(old, new),
                extra_info={"mode": self.mode},
                orig_size=old,
                transform_info=self.get_transform_info(),
            )
        )

    def inverse(self, img: torch.Tensor) -> torch.Tensor:
        """Bring a stack back to the size that it had."""
        done = self.pop_transform(img)
        old = tuple(done[TraceKeys.ORIG_SIZE])
        # `Invertd` writes "nearest" there for a mask that is inverted by the operations of its image.
        mode = done[TraceKeys.EXTRA_INFO]["mode"]
        result = MetaTensor(_resize(img.as_tensor(), old, self.axis, mode))
        result.copy_meta_from(img)
        result.affine = img.affine @ torch.as_tensor(scale_affine(tuple(img.shape[1:]), old), dtype=torch.float64)
        return result


class ResizeSlicesd(MapTransform, InvertibleTransform):
    """Dictionary twin of :class:`ResizeSlices`.

    Args:
        keys: the stacks.
        size: as there.
        mode: as there; one for all keys, or one per key.
        axis: as there.
        allow_missing_keys: whether a key may be absent.

    Example:
        >>> data = {"image": torch.zeros(1, 8, 8, 3), "label": torch.zeros(1, 8, 8, 3, dtype=torch.uint8)}
        >>> small = ResizeSlicesd(["image", "label"], (4, 4), mode=["linear", "nearest"])(data)
        >>> {key: (tuple(stack.shape), str(stack.dtype)) for key, stack in small.items()}
        {'image': ((1, 4, 4, 3), 'torch.float32'), 'label': ((1, 4, 4, 3), 'torch.uint8')}
    """

    def __init__(
        self,
        keys: KeysCollection,
        size: Sequence[int],
        mode: str | Sequence[str] = "linear",
        axis: int = -1,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.modes = ensure_tuple_rep(mode, len(self.keys))
        self.resizers = [ResizeSlices(size, one, axis) for one in self.modes]

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the dictionary with its stacks resized."""
        result = dict(data)
        for key, resize in self.key_iterator(result, self.resizers):
            result[key] = resize(result[key])
        return result

    def inverse(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Bring the stacks back to the sizes that they had."""
        result = dict(data)
        for key, resize in self.key_iterator(result, self.resizers):
            result[key] = resize.inverse(result[key])
        return result


class PadAndStrideSlices(InvertibleTransform):
    """Bring a stack to a number of slices without interpolating: pad it at its end, and keep every k-th slice.

    k is the smallest stride with which all slices fit: 41 slices are padded to 48, of which every second is kept, the
    first among them; 24 stay; 20 are padded to 24. Masks so stay as they were drawn. The affine stays true: the kept
    slices lie where they lay, and the spacing along the axis is k times as large.

    The inverse puts the kept slices back in their places, gives each slice that was left out the values of the kept one
    before it, and drops the padding: a mask predicted for 24 slices becomes one for all 41.

    Args:
        count: slices of the result.
        axis: spatial axis along which the slices are stacked.
        fill: value of the empty slices.

    Shape:
        ``(C, X, Y, Z)`` -> ``(C, X, Y, count)`` for the last axis, type kept.

    Raises:
        ConfigError: a count below 1, an unknown axis.
        GeometryError: no stack in 3D.

    Source:
        Knee bones in MRI (2017): 41 slices padded to 48 with empty ones, every second kept. Where the empty ones go is
        not said there.

    Example:
        >>> stack = MetaTensor(torch.arange(1.0, 42.0).reshape(1, 1, 1, 41), affine=np.diag([1.0, 1.0, 2.5, 1.0]))
        >>> short = PadAndStrideSlices(24)(stack)
        >>> short[0, 0, 0, :3].tolist(), short[0, 0, 0, -4:].tolist(), short.pixdim[2].item()
        ([1.0, 3.0, 5.0], [41.0, 0.0, 0.0, 0.0], 5.0)
        >>> PadAndStrideSlices(24)(stack[..., :24]).shape[-1]
        24
    """

    def __init__(self, count: int, axis: int = -1, fill: float = 0) -> None:
        if count < 1:
            raise ConfigError(f"count {count}: expected at least 1")
        self.count, self.axis, self.fill = int(count), _spatial(axis), fill

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        """Return the stack with ``count`` slices."""
        img = _stack(img)
        old = tuple(img.shape[1:])
        stride = max(1, -(-old[self.axis] // self.count))
        widths = [0] * 6  # of the last axis first, as torch has it
        widths[2 * (2 - self.axis) + 1] = stride * self.count - old[self.axis]
        padded = torch.nn.functional.pad(img.as_tensor(), widths, value=self.fill)
        kept = torch.arange(0, stride * self.count, stride)
        result = MetaTensor(padded.index_select(1 + self.axis, kept))
        strided = np.eye(4)
        strided[self.axis, self.axis] = stride
        return result.copy_meta_from(
            self.track_transform_meta(
                img,
                sp_size=result.shape[1:],
                affine=strided,
                extra_info={"stride": stride},
                orig_size=old,
                transform_info=self.get_transform_info(),
            )
        )

    def inverse(self, img: torch.Tensor) -> torch.Tensor:
        """Bring a stack back to the number of slices that it had."""
        done = self.pop_transform(img)
        stride, count = done[TraceKeys.EXTRA_INFO]["stride"], done[TraceKeys.ORIG_SIZE][self.axis]
        repeated = img.as_tensor().repeat_interleave(stride, dim=1 + self.axis)
        result = MetaTensor(repeated.narrow(1 + self.axis, 0, count).contiguous())
        result.copy_meta_from(img)
        strided = torch.eye(4, dtype=torch.float64)
        strided[self.axis, self.axis] = 1 / stride
        result.affine = img.affine @ strided
        return result


class PadAndStrideSlicesd(MapTransform, InvertibleTransform):
    """Dictionary twin of :class:`PadAndStrideSlices`.

    Args:
        keys: the stacks.
        count: as there.
        axis: as there.
        fill: as there.
        allow_missing_keys: whether a key may be absent.

    Example:
        >>> PadAndStrideSlicesd("label", 2)({"label": torch.tensor([[[[1, 2, 3]]]])})["label"].tolist()
        [[[[1, 3]]]]
    """

    def __init__(
        self,
        keys: KeysCollection,
        count: int,
        axis: int = -1,
        fill: float = 0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.harmonize = PadAndStrideSlices(count, axis, fill)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the dictionary with ``count`` slices in each stack."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.harmonize(result[key])
        return result

    def inverse(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Bring the stacks back to the numbers of slices that they had."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.harmonize.inverse(result[key])
        return result


def _spatial(axis: int) -> int:
    if axis not in (-3, -2, -1, 0, 1, 2):
        raise ConfigError(f"axis {axis}: expected one of the three spatial axes, 0 to 2 or -1")
    return axis % 3


def _stack(img: torch.Tensor) -> MetaTensor:
    stack: MetaTensor = convert_to_tensor(img, track_meta=True)
    if stack.ndim != 4:
        raise GeometryError(f"a stack of shape {tuple(stack.shape)}: expected (C, X, Y, Z)")
    return stack


def _resize(stack: torch.Tensor, size: Sequence[int], axis: int, mode: str) -> torch.Tensor:
    plane = [other for other in range(3) if other != axis]
    if mode == "nearest":
        # The voxel whose center is nearest. By index: torch's `nearest-exact` does that for uint8 and floats only; its
        # `nearest` takes the first of each block, which shifts a label by (factor - 1) / 2 voxels against its image.
        for other in plane:
            old, new = stack.shape[1 + other], size[other]
            index = (2 * torch.arange(new, device=stack.device) + 1) * old // (2 * new)
            stack = stack.index_select(1 + other, index)
        return stack
    # torch's anti-aliasing is made for pictures, so the slices become a batch of them.
    slices = stack.float().movedim(1 + axis, 1)
    sides = [size[other] for other in plane]
    pictures = slices.reshape(-1, 1, *slices.shape[2:])
    resized = torch.nn.functional.interpolate(pictures, sides, mode="bilinear", antialias=True)
    return resized.reshape(*slices.shape[:2], *sides).movedim(1, 1 + axis).contiguous()
