"""Every sample has its own draw, its mask has the same, and the directions are those of the picture."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import CenterSpatialCropd, Compose
from PIL import Image
from scipy import ndimage

from medseg.data import SeededDataset, SeededLoader
from medseg.errors import ConfigError
from medseg.io import read_image
from medseg.transforms import (
    LesionVariant,
    LesionVariantd,
    kits_augmentation,
    knee_augmentation,
    petct_augmentation,
    prostate_augmentation,
    tutorial_augmentation,
)
from medseg.transforms.augmentation import LESION_VARIANTS

PRESETS = [
    knee_augmentation,
    kits_augmentation,
    partial(prostate_augmentation, size=33),
    petct_augmentation,
    tutorial_augmentation,
]
NAMES = ["knee", "kits", "prostate", "petct", "tutorial"]
presets = pytest.mark.parametrize("preset", PRESETS, ids=NAMES)
dims = pytest.mark.parametrize("spatial_dims", [2, 3])


def blobs(spatial_dims, size=48, seed=0):
    """A picture of smooth regions, and the label map of them: 0, 2 and 5."""
    rng = np.random.default_rng(seed)
    shape = (size, size + 4, 6)[:spatial_dims]
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), (6, 6, 0)[:spatial_dims])
    label = np.select([smooth > np.quantile(smooth, 0.8), smooth < np.quantile(smooth, 0.3)], [5, 2], 0)
    return torch.from_numpy(label[None].astype(np.float32))


def run(preset, seed, spatial_dims, image, label, **arguments):
    transform = Compose(preset(["image"], ["label"], spatial_dims=spatial_dims, **arguments))
    transform.set_random_state(seed)
    return transform({"image": image, "label": label})


@presets
@dims
def test_two_samples_of_a_batch_have_different_draws(preset, spatial_dims):
    image = blobs(spatial_dims)
    items = [{"image": image, "label": image}] * 6
    dataset = SeededDataset(items, Compose(preset("image", "label", spatial_dims=spatial_dims)), seed=3)
    (batch,) = SeededLoader(dataset, batch_size=6, seed=3)
    for one in range(6):
        for other in range(one):
            assert not torch.equal(batch["image"][one], batch["image"][other])


@presets
def test_draws_do_not_depend_on_the_workers(preset):
    items = [{"image": blobs(2, seed=seed), "label": blobs(2, seed=seed)} for seed in range(5)]
    batches = []
    for workers in (0, 2):
        dataset = SeededDataset(items, Compose(preset("image", "label")), seed=9)
        batches.append(list(SeededLoader(dataset, batch_size=2, seed=9, num_workers=workers)))
    for alone, helped in zip(*batches, strict=True):
        assert torch.equal(alone["image"], helped["image"])
        assert torch.equal(alone["label"], helped["label"])


@presets
@dims
@pytest.mark.parametrize("seed", range(4))
def test_masks_keep_their_values_and_lie_where_the_image_does(preset, spatial_dims, seed):
    label = blobs(spatial_dims, seed=seed)
    image = (label == 5).float()  # the image shows where label 5 is
    result = run(preset, seed, spatial_dims, image, label)
    assert set(result["label"].unique().tolist()) <= {0, 2, 5}
    assert result["image"].shape == result["label"].shape
    shown, masked = result["image"] > 0.5, result["label"] == 5
    assert 2 * (shown & masked).sum() / (shown.sum() + masked.sum()) > 0.95


@presets
def test_all_channels_share_the_draw(preset):
    one = blobs(2)
    result = run(preset, 5, 2, torch.cat([one, one, one]), one)
    for channel in (1, 2):
        torch.testing.assert_close(result["image"][channel], result["image"][0])


@pytest.mark.parametrize("preset", PRESETS[:4], ids=NAMES[:4])
@pytest.mark.parametrize("axes", [(0, 1), (2, 1), (1, 0), (0, 2)])
def test_slices_of_a_block_share_the_draw_and_are_not_mixed(preset, axes):
    stack = ({0, 1, 2} - set(axes)).pop()
    alike = blobs(2, 40)[0, :, :40].expand(5, 40, 40).movedim(0, stack)[None]
    moved = run(preset, 7, 3, alike, alike, axes=axes)["image"][0].movedim(stack, 0)
    assert not torch.equal(moved[0], alike[0].movedim(stack, 0)[0])
    for slice_ in moved[1:]:
        torch.testing.assert_close(slice_, moved[0], atol=1e-4, rtol=0)
    planted = torch.zeros(5, 40, 40)
    planted[2] = 9
    planted = planted.movedim(0, stack)[None]
    moved = run(preset, 8, 3, planted, planted, axes=axes)
    for key in ("image", "label"):
        sums = moved[key].abs().sum(dim=[1 + axis for axis in axes]).flatten()
        assert sums[2] > 0
        assert (sums[[0, 1, 3, 4]] < 1e-3 * sums[2]).all()


def test_the_axes_of_a_block_are_those_that_are_named():
    block = torch.zeros(1, 7, 30, 40)  # slice, row, column, as KiTS19 stores it
    block[0, 3, 8, 11] = 5
    for seed in range(20):
        moved = run(knee_augmentation, seed, 3, block, block, shift=3, axes=(2, 1))["label"]
        (_, number, row, column), *_ = torch.nonzero(moved).tolist()
        assert (number, row) == (3, 8)
        assert min(abs(column - 11), abs(column - 28)) <= 3


def picture(tmp_path):
    """A picture with a dot near its upper left corner, read as any picture is."""
    pixels = np.zeros((30, 40), np.uint8)  # rows, columns
    pixels[4, 7] = 255
    Image.fromarray(pixels).save(tmp_path / "dot.png")
    image = read_image(tmp_path / "dot.png")
    return image, lambda moved: tuple(np.argwhere(np.asarray(moved[0]) > 100)[0])


def test_horizontal_is_along_the_rows_of_the_picture(tmp_path):
    image, dot = picture(tmp_path)
    assert dot(image) == (7, 4), "X is the column, Y the row"
    flipped = {dot(run(knee_augmentation, seed, 2, image, image, shift=0)["image"]) for seed in range(20)}
    assert flipped == {(7, 4), (32, 4)}
    rows = set()
    for seed in range(20):
        moved = run(knee_augmentation, seed, 2, image, image, shift=3)["label"]
        rows.add(dot(moved)[1])
    assert rows == {4}
    for preset in (kits_augmentation, petct_augmentation, tutorial_augmentation):
        for seed in range(20):
            moved = run(preset, seed, 2, image, image)["label"]
            assert not (np.argwhere(np.asarray(moved[0]) > 100)[:, 1] > 22).any(), "no flip from top to bottom"


def test_nothing_is_invented_beyond_the_border():
    constant = torch.full((1, 40, 40), -1000.0)
    for preset in PRESETS[:4]:
        result = run(preset, 1, 2, constant, torch.ones(1, 40, 40))
        torch.testing.assert_close(result["image"], torch.full_like(result["image"], -1000.0))
        assert (result["label"] == 1).all()


def displacement(preset, seed, **arguments):
    """Where a preset's affine takes the center and the axes: (shift, matrix), in voxels."""
    image = MetaTensor(torch.zeros(1, 9, 9), affine=torch.eye(4))
    moved = run(preset, seed, 2, image, image, **arguments)["image"]
    affine = np.asarray(moved.affine)[:2][:, [0, 1, 3]]
    linear = affine[:, :2]
    return linear @ [4, 4] + affine[:, 2] - 4, linear


def test_the_draws_fill_the_ranges_of_the_thesis_and_no_more():
    shifts, angles, zooms = [], [], []
    for seed in range(120):
        shift, linear = displacement(kits_augmentation, seed)
        if linear[0, 0] < 0:  # mirrored
            linear, shift = np.diag([-1, 1]) @ linear, np.diag([-1, 1]) @ shift
        shifts.append(shift)
        zooms.append(np.linalg.norm(linear, axis=0))
        angles.append(np.degrees(np.arctan2(linear[1, 0], linear[0, 0])))
    assert 9 < np.abs(shifts).max() < 10 * 1.06  # along axes that were rotated by up to 5 degrees
    assert 4.8 < np.abs(angles).max() <= 5 + 1e-6
    assert 0.95 - 1e-6 <= np.min(zooms) < 0.96
    assert 1.04 < np.max(zooms) <= 1.05 + 1e-6


def test_a_preset_stands_in_a_bundle():
    config = ConfigParser(
        {
            "imports": ["$import medseg"],
            "normalize": [{"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": 0, "a_max": 5}],
            "preprocessing": {
                "_target_": "Compose",
                "transforms": "$@normalize + medseg.transforms.kits_augmentation(['image'], ['label'])",
            },
        }
    )
    transform = config.get_parsed_content("preprocessing").set_random_state(1)
    expected = run(kits_augmentation, 1, 2, blobs(2) / 5, blobs(2))
    found = transform({"image": blobs(2), "label": blobs(2)})
    torch.testing.assert_close(found["image"], expected["image"])
    assert torch.equal(found["label"], expected["label"])


def test_dimensions_and_axes_that_do_not_fit_are_refused():
    for spatial_dims, axes in ((2, (0, 2)), (4, (0, 1)), (3, (1, 1)), (3, (0, 1, 2))):
        with pytest.raises(ConfigError, match="spatial_dims"):
            kits_augmentation("image", "label", spatial_dims=spatial_dims, axes=axes)


def test_the_variants_are_the_246_combinations_of_the_authors():
    assert len(LESION_VARIANTS) == len(set(LESION_VARIANTS)) == 41 * 2 * 3
    assert {angle for angle, _, _ in LESION_VARIANTS} == set(range(-20, 21))
    assert {(mirrored, shift) for _, mirrored, shift in LESION_VARIANTS} == {
        (m, s) for m in (False, True) for s in (-1, 0, 1)
    }
    assert LESION_VARIANTS[0] == (0, False, 0)
    for bad in (-1, 246):
        with pytest.raises(ConfigError, match="0 to 245"):
            LesionVariant()(torch.zeros(1, 5, 5), bad)


@settings(max_examples=40)
@given(number=st.integers(0, 245), columns=st.sampled_from([20, 21]))
def test_a_variant_is_scipys_rotation_then_the_mirror_then_the_shift(number, columns):
    angle, mirrored, shift = LESION_VARIANTS[number]
    image = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(2, columns, 25)), (0, 2, 2)).astype(
        np.float32
    )
    found = LesionVariant()(image, number)
    turn = -angle  # of MONAI's sense; the grid is symmetric
    expected = ndimage.rotate(image, turn, axes=(1, 2), reshape=False, order=3, mode="nearest")
    expected = expected[:, ::-1] if mirrored else expected
    inner = expected[:, 2:-2, 2:-2]
    np.testing.assert_allclose(np.asarray(found)[:, 2 + shift : columns - 2 + shift, 2:-2], inner, atol=1e-4)


def test_a_variant_of_a_patch_of_one_slice_is_that_of_the_picture():
    image = blobs(2, 31)
    for number in (0, 17, 100, 245):
        flat = LesionVariant()(image, number)
        torch.testing.assert_close(LesionVariant()(image[..., None], number)[..., 0], flat, atol=1e-4, rtol=0)
        turned = LesionVariant(axes=(1, 0))(
            image.transpose(1, 2).contiguous(),
            LESION_VARIANTS.index((-LESION_VARIANTS[number][0], *LESION_VARIANTS[number][1:])),
        ).transpose(1, 2)
        torch.testing.assert_close(turned, flat, atol=1e-3, rtol=0)


def test_the_first_variant_changes_nothing_and_a_mask_keeps_its_values():
    image = blobs(2)
    torch.testing.assert_close(LesionVariant()(image, 0), MetaTensor(image), atol=1e-5, rtol=0)
    for number in range(0, 246, 10):
        assert set(LesionVariant(mode=0)(image, number).unique().tolist()) <= {0, 2, 5}


def test_variants_are_cropped_after_the_rotation_so_that_no_corner_is_invented():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(3, 97, 97)).astype(np.float32)
    surround = np.pad(image, ((0, 0), (20, 20), (20, 20)))  # known only to whoever rotated before cropping
    transform = Compose([LesionVariantd("image"), CenterSpatialCropd("image", (65, 65))])
    for number in (3, 60, 245):
        found = transform({"image": image, "variant": number})["image"]
        wide = transform({"image": surround, "variant": number})["image"]
        assert found.shape == (3, 65, 65)
        np.testing.assert_allclose(found[:, 3:-3, 3:-3], wide[:, 3:-3, 3:-3], atol=0.05)


def test_twins_have_the_same_arguments_and_results():
    array = inspect.signature(LesionVariant.__init__).parameters
    twin = inspect.signature(LesionVariantd.__init__).parameters
    assert [name for name in twin if name in array] == list(array)
    image = blobs(2)
    result = LesionVariantd(["image", "label", "absent"], mode=[3, 0, 0], allow_missing_keys=True)(
        {"image": image, "label": image, "variant": 30, "case": "a"}
    )
    assert torch.equal(result["image"], LesionVariant()(image, 30))
    assert torch.equal(result["label"], LesionVariant(mode=0)(image, 30))
    assert result["case"] == "a"
