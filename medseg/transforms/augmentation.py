"""Augmentation as each published work describes it, made of MONAI's transforms.

A preset is a list of transforms, drawn anew for every sample; masks get the same draw as the image and keep their
values (nearest neighbor). Beyond the border the nearest voxel is repeated, which is right for Hounsfield units, windows
and z-scores alike, where 0 would be water, black or the mean. MONAI's lazy resampling ignores both: leave it off.

``axes`` are the spatial axes of a slice: the horizontal one, along the rows of the picture (in axial and coronal slices
it runs from one side of the patient to the other), then the vertical one. In a picture, a DICOM series and the slices
of one they are (0, 1), for X is the column. KiTS19's own files are slice, row, column, which is (2, 1); the recipe
``kits19`` turns them. All slices of a 3D block share one draw, and none is mixed with its neighbors.
"""

from collections.abc import Hashable, Mapping, Sequence
from math import radians
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import (
    Affine,
    CenterSpatialCropd,
    Flip,
    MapTransform,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGridDistortiond,
    RandScaleIntensityd,
    Transform,
)
from monai.utils import convert_to_tensor, ensure_tuple, ensure_tuple_rep

from medseg.errors import ConfigError

#: The 246 variants of a lesion: rotation in degrees, whether mirrored, shift in pixels. The first changes nothing.
LESION_VARIANTS = tuple(
    (angle, mirrored, shift)
    for angle in sorted(range(-20, 21), key=abs)
    for mirrored in (False, True)
    for shift in (0, -1, 1)
)


def knee_augmentation(
    keys: KeysCollection,
    label_keys: KeysCollection = (),
    *,
    spatial_dims: int = 2,
    shift: float = 10,
    axes: Sequence[int] = (0, 1),
) -> list[Transform]:
    """Mirror half of the samples from left to right, and shift them a little to the side.

    There is no vertical flip: in a coronal or sagittal knee it would put the tibia above the femur.

    Args:
        keys: the images.
        label_keys: the masks.
        spatial_dims: 2 for slices, 3 for blocks.
        shift: largest shift in voxels, either way. The thesis says *small*; the number is ours.
        axes: spatial axes of a slice, the horizontal one first.

    Source:
        Pröve 2017, which removed it again for lack of gain.

    Example:
        >>> [type(transform).__name__ for transform in knee_augmentation("image", "label")]
        ['RandFlipd', 'RandAffined']
    """
    return [
        _mirror(keys, label_keys, axes),
        _affine(keys, label_keys, spatial_dims, axes, shift=(shift, 0)),
    ]


def kits_augmentation(
    keys: KeysCollection, label_keys: KeysCollection = (), *, spatial_dims: int = 2, axes: Sequence[int] = (0, 1)
) -> list[Transform]:
    """Mirror half of the samples from left to right; rotate by up to 5°, zoom by up to 5 %, shift by up to 10 voxels.

    Rotation is in the plane of the slices; zoom and shift are drawn for each of its two axes. The authors' code draws
    once per batch, and interpolates the masks; here every sample has its own draw, and masks keep their values.

    Args:
        keys: the images.
        label_keys: the masks.
        spatial_dims: 2 for slices, 3 for blocks, whose slices share the draw.
        axes: spatial axes of a slice, the horizontal one first.

    Source:
        Detko 2020.

    Example:
        >>> [type(transform).__name__ for transform in kits_augmentation("image", "label", spatial_dims=3)]
        ['RandFlipd', 'RandAffined']
    """
    return [
        _mirror(keys, label_keys, axes),
        _affine(keys, label_keys, spatial_dims, axes, rotation=5, zoom=0.05, shift=(10, 10)),
    ]


def prostate_augmentation(
    keys: KeysCollection,
    label_keys: KeysCollection = (),
    *,
    size: int = 65,
    spatial_dims: int = 2,
    axes: Sequence[int] = (0, 1),
) -> list[Transform]:
    """Rotate a lesion patch by up to 20°, mirror half of them, shift by up to a pixel, and crop its center last.

    All channels share the draw; values are interpolated by cubic splines. The crop comes after the rotation, so that no
    corner is invented. Angle and shift are drawn continuously; the authors' own grid is :class:`LesionVariantd`.

    Args:
        keys: the patches, larger than ``size`` by half or more.
        label_keys: masks, where there are any.
        size: of the crop, in pixels.
        spatial_dims: 2, or 3 for patches of one slice [C, X, Y, 1], which takes ten times as long (``SqueezeDimd``).
        axes: spatial axes of a slice, the horizontal one first.

    Source:
        Clément and Jobin 2020, chapter on augmentation.

    Example:
        >>> [type(transform).__name__ for transform in prostate_augmentation("image")]
        ['RandFlipd', 'RandAffined', 'CenterSpatialCropd']
    """
    roi_size = [size if axis in axes else -1 for axis in range(spatial_dims)]
    return [
        _mirror(keys, label_keys, axes),
        _affine(keys, label_keys, spatial_dims, axes, rotation=20, shift=(1, 0), cubic=True),
        CenterSpatialCropd(_all(keys, label_keys), roi_size=roi_size),
    ]


def petct_augmentation(
    keys: KeysCollection, label_keys: KeysCollection = (), *, spatial_dims: int = 2, axes: Sequence[int] = (0, 1)
) -> list[Transform]:
    """Mirror half of the samples from left to right, and rotate them by up to 10°.

    The PET/CT thesis trains without augmentation and suggests random rotation and mirroring for later (section 6.1); it
    gives no angle.

    Args:
        keys: the images.
        label_keys: the masks.
        spatial_dims: 2 for slices, 3 for blocks.
        axes: spatial axes of a slice, the horizontal one first.

    Source:
        Moe 2019, future work.

    Example:
        >>> [type(transform).__name__ for transform in petct_augmentation("image", "label")]
        ['RandFlipd', 'RandAffined']
    """
    return [
        _mirror(keys, label_keys, axes),
        _affine(keys, label_keys, spatial_dims, axes, rotation=10),
    ]


def tutorial_augmentation(
    keys: KeysCollection, label_keys: KeysCollection = (), *, spatial_dims: int = 2, axes: Sequence[int] = (0, 1)
) -> list[Transform]:
    """Apply the families of the methods tutorial: rotation, mirroring, scaling, non-linear deformation, intensity.

    The tutorial gives no numbers; ours are up to 15°, 10 % and 5 voxels of shift; a grid deformed by up to 15 % of its
    cells for three samples in ten; contrast (gamma 0.7 to 1.5) for three in ten, and brightness by up to 20 % for half.
    Leave out what is not plausible for the images at hand.

    Args:
        keys: the images.
        label_keys: the masks; intensities of masks stay.
        spatial_dims: 2 for slices, 3 for blocks (which the deformation bends along the third axis too).
        axes: spatial axes of a slice, the horizontal one first.

    Source:
        Išgum, de Vos, Lessmann, Wolterink, Nielsen and Pai 2017.

    Example:
        >>> [type(transform).__name__ for transform in tutorial_augmentation("image", "label")]
        ['RandFlipd', 'RandAffined', 'RandGridDistortiond', 'RandAdjustContrastd', 'RandScaleIntensityd']
    """
    return [
        _mirror(keys, label_keys, axes),
        _affine(keys, label_keys, spatial_dims, axes, rotation=15, zoom=0.1, shift=(5, 5)),
        RandGridDistortiond(
            _all(keys, label_keys),
            num_cells=4,
            prob=0.3,
            distort_limit=0.15,
            mode=["bilinear"] * len(ensure_tuple(keys)) + ["nearest"] * len(ensure_tuple(label_keys)),
            padding_mode="border",
        ),
        RandAdjustContrastd(keys, prob=0.3, gamma=(0.7, 1.5)),
        RandScaleIntensityd(keys, factors=0.2, prob=0.5),
    ]


class LesionVariant(Transform):
    """Make one of 246 variants of a lesion patch: rotated by -20° to 20°, mirrored or not, shifted by -1, 0 or 1 pixel.

    It is the authors' grid of 41 · 2 · 3 combinations, from which they draw without replacement: a number makes the
    same variant each time, so a data set can be expanded (:func:`medseg.data.lesion_variants`), and the probabilities
    of a lesion's variants averaged. The patch is rotated about its center, then mirrored, then shifted, all channels
    alike. Crop it afterwards (``CenterSpatialCropd(keys, (65, 65))``), so that no corner is invented.

    Args:
        mode: order of the spline: 3 is cubic; 0 is nearest neighbor, for masks.
        axes: spatial axes of the patch; along the first is mirrored and shifted.

    Shape:
        ``(C, X, Y)`` or, of one slice, ``(C, X, Y, 1)`` -> the same, float32 tensor; a MetaTensor's affine moves along.

    Raises:
        ConfigError: for a number that no variant has.

    Source:
        Clément and Jobin 2020, with the authors' public code.

    Example:
        >>> from medseg.transforms.augmentation import LESION_VARIANTS
        >>> LESION_VARIANTS[2], LESION_VARIANTS[245]
        ((0, False, 1), (20, True, 1))
        >>> LesionVariant()(torch.tensor([[[1.0], [2.0], [3.0]]]), 4).flatten()
        metatensor([2., 1., 1.])
    """

    def __init__(self, mode: int = 3, axes: Sequence[int] = (0, 1)) -> None:
        self.mode = mode
        self.axes = tuple(axes)
        self.mirror = Flip(self.axes[0])

    def __call__(self, img: NdarrayOrTensor, variant: int) -> torch.Tensor:
        """Return the variant of that number, 0 to 245."""
        if not 0 <= variant < len(LESION_VARIANTS):
            raise ConfigError(f"variant: {variant} given, 0 to {len(LESION_VARIANTS) - 1} expected")
        angle, mirrored, shift = LESION_VARIANTS[variant]
        # MONAI says where an output pixel comes from. The shift is the last step, after the mirror, which turns it.
        move = Affine(
            rotate_params=_rotation(radians(angle), img.ndim - 1, self.axes),
            translate_params=_along((shift if mirrored else -shift, 0), img.ndim - 1, self.axes),
            mode=self.mode,
            padding_mode="nearest",
            image_only=True,
        )
        moved = move(convert_to_tensor(img, dtype=torch.float32))
        return self.mirror(moved) if mirrored else moved


class LesionVariantd(MapTransform):
    """Dictionary twin of :class:`LesionVariant`; the number of the variant stands in the dictionary.

    Args:
        keys: the patches.
        mode: as there; one for all keys, or one for each.
        axes: as there.
        variant_key: where the number is.
        allow_missing_keys: whether a key may be absent.

    Example:
        >>> LesionVariantd("image")({"image": torch.tensor([[[1.0], [2.0], [3.0]]]), "variant": 3})["image"].flatten()
        metatensor([3., 2., 1.])
    """

    def __init__(
        self,
        keys: KeysCollection,
        mode: int | Sequence[int] = 3,
        axes: Sequence[int] = (0, 1),
        variant_key: str = "variant",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.variants = [LesionVariant(order, axes) for order in ensure_tuple_rep(mode, len(self.keys))]
        self.variant_key = variant_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the dictionary with the variant of its patches."""
        result = dict(data)
        for key, variant in self.key_iterator(result, self.variants):
            result[key] = variant(result[key], result[self.variant_key])
        return result


def _all(keys: KeysCollection, label_keys: KeysCollection) -> tuple[Hashable, ...]:
    return (*ensure_tuple(keys), *ensure_tuple(label_keys))


def _mirror(keys: KeysCollection, label_keys: KeysCollection, axes: Sequence[int]) -> RandFlipd:
    return RandFlipd(_all(keys, label_keys), prob=0.5, spatial_axis=axes[0])


def _affine(
    keys: KeysCollection,
    label_keys: KeysCollection,
    spatial_dims: int,
    axes: Sequence[int],
    *,
    rotation: float = 0,
    zoom: float = 0,
    shift: tuple[float, float] = (0, 0),
    cubic: bool = False,
) -> RandAffined:
    """A random affine in the plane of the slices: degrees, share of the size, voxels along the two axes."""
    if spatial_dims not in (2, 3) or len(set(axes)) != 2 or not set(axes) <= set(range(spatial_dims)):
        raise ConfigError(
            f"spatial_dims {spatial_dims} and axes {tuple(axes)} given, 2 or 3 and two axes of these expected"
        )
    images, labels = len(ensure_tuple(keys)), len(ensure_tuple(label_keys))
    return RandAffined(
        _all(keys, label_keys),
        prob=1.0,
        rotate_range=_rotation(radians(rotation), spatial_dims, axes),
        scale_range=_along((zoom, zoom), spatial_dims, axes),
        translate_range=_along(shift, spatial_dims, axes),
        mode=[3 if cubic else "bilinear"] * images + ["nearest"] * labels,
        # of a spline, "nearest" is what "border" is otherwise
        padding_mode=["nearest" if cubic else "border"] * images + ["border"] * labels,
    )


def _along(values: Sequence[float], spatial_dims: int, axes: Sequence[int]) -> list[float]:
    """Values along the two axes of a slice as values along all axes."""
    result = [0.0] * spatial_dims
    for axis, value in zip(axes, values, strict=True):
        result[axis] = float(value)
    return result


def _rotation(angle: float, spatial_dims: int, axes: Sequence[int]) -> list[float]:
    """A rotation in the plane of the slices, as MONAI takes it: one angle, or one about each axis."""
    return [angle] if spatial_dims == 2 else [0.0 if axis in axes else angle for axis in range(3)]
