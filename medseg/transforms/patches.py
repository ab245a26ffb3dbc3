"""Patches around a lesion: of a physical size around a point in the patient, or a part of a picture around a pixel."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import CropForeground, MapTransform, Transform
from numpy.typing import NDArray
from scipy import ndimage

from medseg.errors import ConfigError, GeometryError

#: Slices tilted more than this (degrees) to those of the patch do not show the same plane.
MOST_TILT = 15.0


class LesionPatch(Transform):
    """Cut a square patch of a physical size around a point in the patient, from the slice that lies nearest to it.

    The patch lies along the axes of the slice, its pixel ``(size // 2, size // 2)`` on the point. Given another patch,
    it has that one's grid instead: patches of sequences with different spacings then cover the same millimeters pixel
    for pixel. Each is interpolated by cubic splines in its own slice, never across slices.

    Args:
        size: pixels along both sides. An odd number has the point at the center of rotation too.
        spacing: mm per pixel.
        fill: value where the image has nothing.

    Shape:
        ``(C, X, Y, Z)`` -> ``(C, size, size, 1)``, float32; the affine (RAS mm) says where the patch lies. Its ``meta``
        has ``slice_index`` (which slice of the image was taken, from 0) and ``outside`` (the part of the patch that
        lies outside the image).

    Raises:
        ConfigError: no size, or no spacing.
        GeometryError: an image that has no affine or is not 3D, the point lies outside of it, or the slices are tilted
            more than 15° to those of ``like``.

    Example:
        >>> image = MetaTensor(torch.zeros(1, 40, 30, 5), affine=np.diag([0.5, 0.5, 3.0, 1.0]))
        >>> image[0, 20, 10, 2] = 1  # lies at (10, 5, 6) mm
        >>> patch = LesionPatch(size=9, spacing=0.5)(image, (10.0, 5.0, 6.4))
        >>> tuple(patch.shape), round(float(patch[0, 4, 4, 0]), 3), patch.affine[:3, 3].tolist()
        ((1, 9, 9, 1), 1.0, [8.0, 3.0, 6.0])
    """

    def __init__(self, size: int, spacing: float, fill: float = 0.0) -> None:
        if size < 1 or not spacing > 0:
            raise ConfigError(f"size {size} and spacing {spacing:g}: at least a pixel, and positive mm expected")
        self.size, self.spacing, self.fill = size, spacing, fill

    def __call__(self, img: MetaTensor, position: Sequence[float], like: MetaTensor | None = None) -> MetaTensor:
        """Return the patch of ``img`` around ``position`` (RAS mm), on the grid of ``like`` where it is given."""
        if not isinstance(img, MetaTensor) or img.ndim != 4 or len(position) != 3:
            raise GeometryError(
                f"a {type(img).__name__} of shape {tuple(img.shape)} and a point of {len(position)} numbers: expected "
                "a MetaTensor (C, X, Y, Z), as read_image gives it, and a point in RAS mm"
            )
        affine = np.asarray(img.affine, dtype=np.float64)
        index = np.linalg.inv(affine) @ [*position, 1.0]
        shape = np.array(img.shape[1:])
        if not ((index[:3] >= -0.5) & (index[:3] <= shape - 0.5)).all():
            near = affine @ [*np.clip(index[:3], -0.5, shape - 0.5), 1.0]
            beyond = np.linalg.norm(near[:3] - np.asarray(position))
            raise GeometryError(
                f"the point {_text(position)} (RAS mm) lies {beyond:.3g} mm outside of the image: its index is "
                f"{_text(index[:3])}, of {'x'.join(map(str, shape))} voxels"
            )
        k = int(np.clip(np.floor(index[2] + 0.5), 0, shape[2] - 1))
        if like is None:
            side, patch_affine = (self.size, self.size), self._grid(affine, index, k)
        else:
            side, patch_affine = tuple(like.shape[1:3]), np.asarray(like.affine, dtype=np.float64)
            _check_tilt(affine, patch_affine)
        pixels = np.stack([*np.meshgrid(*map(np.arange, side), indexing="ij"), np.zeros(side), np.ones(side)])
        x, y = np.tensordot(np.linalg.inv(affine) @ patch_affine, pixels, 1)[:2]
        inside = (x >= -0.5) & (x <= shape[0] - 0.5) & (y >= -0.5) & (y <= shape[1] - 0.5)
        voxels = np.asarray(img[..., k], dtype=np.float32)
        values = np.stack([ndimage.map_coordinates(plane, [x, y], order=3, mode="nearest") for plane in voxels])
        values[:, ~inside] = self.fill
        meta = {"slice_index": k, "outside": float(1 - inside.mean())}
        return MetaTensor(torch.from_numpy(values[..., None]), affine=torch.from_numpy(patch_affine), meta=meta)

    def _grid(self, affine: NDArray[np.float64], index: NDArray[np.float64], k: int) -> NDArray[np.float64]:
        """The affine of the patch: in the plane of slice ``k``, with its middle pixel at ``index``."""
        grid = affine.copy()
        grid[:3, :2] *= self.spacing / np.linalg.norm(affine[:3, :2], axis=0)
        middle = affine @ [index[0], index[1], k, 1.0]
        grid[:3, 3] = middle[:3] - grid[:3, :2].sum(axis=1) * (self.size // 2)
        return grid


class LesionPatchd(MapTransform):
    """Dictionary twin of :class:`LesionPatch`: patches of several sequences on the grid of the first.

    Args:
        keys: the images of one patient in one space; the first gives the grid.
        size: as there.
        spacing: as there.
        fill: as there.
        position_key: where the point is (RAS mm).
        allow_missing_keys: whether a key may be absent.

    Example:
        >>> t2 = MetaTensor(torch.rand(1, 40, 40, 5), affine=np.diag([0.5, 0.5, 3.0, 1.0]))
        >>> adc = MetaTensor(torch.rand(1, 10, 10, 5), affine=np.diag([2.0, 2.0, 3.0, 1.0]))
        >>> cut = LesionPatchd(["t2", "adc"], size=9, spacing=0.5)
        >>> patches = cut({"t2": t2, "adc": adc, "position": (9.0, 9.0, 6.0)})
        >>> tuple(patches["adc"].shape), bool((patches["adc"].affine == patches["t2"].affine).all())
        ((1, 9, 9, 1), True)
    """

    def __init__(
        self,
        keys: KeysCollection,
        size: int,
        spacing: float,
        fill: float = 0.0,
        position_key: str = "position",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.patch = LesionPatch(size, spacing, fill)
        self.position_key = position_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the dictionary with a patch in place of each image."""
        result = dict(data)
        first: MetaTensor | None = None
        for key in self.key_iterator(result):
            result[key] = self.patch(result[key], result[self.position_key], like=first)
            first = result[key] if first is None else first
        return result


class CropFraction(Transform):
    """Cut a part of an image's width and height around a pixel, and pad where it reaches beyond the border.

    Each side is an odd number of pixels (the nearest; of two, the larger), so that the pixel is the center: of the
    crop, of a rotation, and of a smaller crop (:class:`monai.transforms.CenterSpatialCrop`) after the rotation. A
    lesion near the border stays in the center.

    Args:
        fraction: of the image's size along X (width) and Y (height): 1/6 and 1/6 for a lung CT, 1/4 and 2/7 for a
            picture of a brain in Clément & Jobin (2020). Larger where a rotation and a second crop follow.
        fill: value outside the image: 0, or -1024 HU.

    Shape:
        ``(C, X, Y)`` or ``(C, X, Y, Z)`` -> the same with another X and Y; the affine moves along, and ``outside`` in
        the ``meta`` is the part of the crop that lies outside the image.

    Raises:
        ConfigError: a fraction that is not above 0 and at most 1.
        GeometryError: the pixel is not in the image.

    Example:
        >>> ct = MetaTensor(torch.zeros(1, 512, 512, 1))
        >>> ct[0, 134, 302, 0] = 1
        >>> crop = CropFraction((1 / 6, 1 / 6))(ct, (134, 302))
        >>> tuple(crop.shape), float(crop[0, 42, 42, 0]), crop.affine[:2, 3].tolist()
        ((1, 85, 85, 1), 1.0, [92.0, 260.0])
    """

    def __init__(self, fraction: Sequence[float], fill: float = 0.0) -> None:
        if len(fraction) != 2 or not all(0 < part <= 1 for part in fraction):
            raise ConfigError(f"fraction: {_text(fraction)} given, of width and height, above 0 and at most 1 expected")
        self.fraction = tuple(fraction)
        self.cropper = CropForeground(allow_smaller=False, value=fill)

    def __call__(self, img: MetaTensor, center: Sequence[float]) -> MetaTensor:
        """Return the crop around the pixel nearest to ``center`` (X, Y, from 0)."""
        shape = img.shape[1:3]
        if not all(-0.5 <= at < n - 0.5 for at, n in zip(center[:2], shape, strict=True)):
            raise GeometryError(
                f"the pixel {_text(center)} is not in the image of {shape[0]} × {shape[1]} pixels (X × Y, from 0)"
            )
        middle = np.floor(np.asarray(center[:2]) + 0.5).astype(int)
        half = (np.array(shape) * self.fraction / 2).astype(int)
        start, end = middle - half, middle + half + 1
        deep = img.shape[3:]
        cut = self.cropper.crop_pad(img, np.array([*start, *[0] * len(deep)]), np.array([*end, *deep]))
        if isinstance(cut, MetaTensor):
            there = np.minimum(end, shape) - np.maximum(start, 0)
            cut.meta["outside"] = float(1 - there.prod() / (end - start).prod())
        return cut


class CropFractiond(MapTransform):
    """Dictionary twin of :class:`CropFraction`.

    Args:
        keys: the images.
        fraction: as there.
        fill: as there.
        center_key: where the pixel is (X, Y, from 0).
        allow_missing_keys: whether a key may be absent.

    Example:
        >>> crop = CropFractiond("image", (1 / 4, 2 / 7))
        >>> tuple(crop({"image": MetaTensor(torch.zeros(1, 200, 210)), "center": (0, 209)})["image"].shape)
        (1, 51, 61)
    """

    def __init__(
        self,
        keys: KeysCollection,
        fraction: Sequence[float],
        fill: float = 0.0,
        center_key: str = "center",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.crop = CropFraction(fraction, fill)
        self.center_key = center_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the dictionary with a crop in place of each image."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.crop(result[key], result[self.center_key])
        return result


def _check_tilt(affine: NDArray[np.float64], other: NDArray[np.float64]) -> None:
    normals = [np.cross(matrix[:3, 0], matrix[:3, 1]) for matrix in (affine, other)]
    cosine = abs(normals[0] @ normals[1]) / np.prod([np.linalg.norm(normal) for normal in normals])
    tilt = float(np.degrees(np.arccos(min(1.0, cosine))))
    if tilt > MOST_TILT:
        raise GeometryError(
            f"the slices are tilted {tilt:.3g}° to those of the patch: at most {MOST_TILT:g}° expected; "
            "is the series of the same orientation?"
        )


def _text(values: Sequence[float] | NDArray[np.float64]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
