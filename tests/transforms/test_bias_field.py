"""The bias field is ITK's, and goes where the image is."""

import inspect
import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from scipy import ndimage
from skimage.filters import threshold_otsu

from medseg.errors import ConfigError, GeometryError, ReadError
from medseg.io import read_image
from medseg.transforms import N4BiasFieldCorrection, N4BiasFieldCorrectiond
from medseg.transforms.bias_field import _spread

QUICK = {"maximum_number_of_iterations": [4]}


@cache
def phantom(shape=(40, 36, 10)):
    """Two tissues in air, the log of a smooth field, and their product with a little noise."""
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.hypot(*grid[:2])
    tissue = np.where(radius < 0.9, np.where(np.sin(7 * grid[0]) * np.cos(5 * grid[1]) > 0, 60.0, 100.0), 2.0)
    field = 0.25 * grid[0] - 0.15 * grid[1] ** 2 + (0.1 * grid[-1] if len(shape) == 3 else 0)
    noise = np.random.default_rng(0).normal(0, 1, shape)
    return tissue, field, np.maximum(tissue * np.exp(field) + noise, 0.1).astype(np.float32)


@pytest.fixture
def threads():
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    yield sitk.ProcessObject.SetGlobalDefaultNumberOfThreads
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def channel_first(image=None):
    return (phantom()[2] if image is None else image)[None]


def simpleitk_default(image, mask=None):
    """What SimpleITK's own documentation does."""
    itk = sitk.GetImageFromArray(image.T)
    mask = sitk.OtsuThreshold(itk, 0, 1, 200) if mask is None else sitk.GetImageFromArray(mask.T.astype(np.uint8))
    return sitk.GetArrayFromImage(sitk.N4BiasFieldCorrection(itk, mask)).T


@pytest.mark.parametrize("shape", [(28, 26, 8), (40, 36)])
def test_at_full_resolution_it_is_simpleitks_default(shape, threads):
    threads(4)
    image = phantom(shape)[2]
    ours = N4BiasFieldCorrection(shrink_factor=1)(image[None])[0]
    np.testing.assert_allclose(ours, simpleitk_default(image), rtol=1e-6)


def test_at_full_resolution_with_a_mask_it_is_simpleitks_default(threads):
    threads(4)
    tissue, _, image = phantom((28, 26, 8))
    ours = N4BiasFieldCorrection(shrink_factor=1)(image[None], mask=tissue > 50)[0]
    np.testing.assert_allclose(ours, simpleitk_default(image, tissue > 50), rtol=1e-6)


@pytest.mark.parametrize("shape", [(112, 96, 12), (112, 96, 1), (112, 96)])
def test_a_known_field_is_found(shape):
    tissue, field, image = phantom(shape)
    corrected = N4BiasFieldCorrection()(image[None])[0]
    inside = tissue > 50
    left = np.log(corrected / tissue)[inside]
    assert corrected.shape == shape
    assert left.std() < 0.2 * field[inside].std()
    found = np.log(image / corrected)[inside]
    assert np.corrcoef(found, field[inside])[0, 1] > 0.99


def test_the_field_is_at_full_resolution_and_in_its_place():
    """The field of the shrunk image, stretched as SimpleITK's users do, would lie a voxel beside that of the image."""
    tissue, _, image = phantom((112, 96, 12))
    inside = tissue > 50
    fields = [
        np.log(image / N4BiasFieldCorrection(shrink_factor=factor, **QUICK)(image[None])[0]) for factor in (1, 3, 3.5)
    ]
    for field in fields[1:]:
        assert (field - fields[0])[inside].std() < 0.1 * fields[0][inside].std()
        # Smooth: no step from one voxel of the shrunk image to the next.
        assert np.abs(np.diff(field, n=2, axis=0)).max() < 0.004


@given(size=st.integers(1, 600), factor=st.floats(1, 20))
def test_few_voxels_are_spread_from_the_first_to_the_last(size, factor):
    kept = _spread(size, factor)
    assert (kept[0], kept[-1]) == ((0, size - 1) if size > 1 else (0, 0))
    assert len(kept) == min(size, max(32, math.ceil(size / factor)))
    assert (np.diff(kept) > 0).all()
    assert len(kept) == 1 or np.diff(kept).max() <= math.ceil((size - 1) / (len(kept) - 1)) + 1


def test_thick_slices_are_not_thinned_out():
    assert [len(_spread(n, 3.5)) for n in (512, 512, 24)] == [147, 147, 24]
    assert [len(_spread(n, 4)) for n in (224, 224, 24)] == [56, 56, 24]
    np.testing.assert_array_equal(_spread(24, 4), np.arange(24))


def test_each_channel_has_its_own_field():
    one, other = phantom()[2], phantom()[2][::-1, ::-1] * 3
    n4 = N4BiasFieldCorrection(**QUICK)
    both = n4(np.stack([one, other]))
    np.testing.assert_array_equal(both[:1], n4(one[None]))
    np.testing.assert_array_equal(both[1:], n4(other[None]))


def test_the_kind_of_image_is_kept_and_its_geometry_has_no_influence():
    n4 = N4BiasFieldCorrection(**QUICK)
    image = channel_first()
    expected = n4(image)
    assert type(expected) is np.ndarray
    assert expected.dtype == np.float32
    tensor = n4(torch.from_numpy(image))
    assert type(tensor) is torch.Tensor
    np.testing.assert_array_equal(tensor, expected)
    affine = torch.tensor([[0.0, 0.4, 3.9, 7], [-0.4, 0, 0.3, 8], [0, 0.05, 1, 9], [0, 0, 0, 1]], dtype=torch.float64)
    given_image = MetaTensor(torch.from_numpy(image.copy()), affine=affine, meta={"modality": "MR"})
    result = n4(given_image)
    assert isinstance(result, MetaTensor)
    np.testing.assert_array_equal(result.as_tensor(), expected)
    np.testing.assert_array_equal(result.affine, affine)
    assert result.meta["modality"] == "MR"
    np.testing.assert_array_equal(given_image.as_tensor(), image)


def test_simpleitks_field_does_not_depend_on_the_spacing_either():
    """N4 counts its control points along each axis, so there is no reason to hand the spacing on."""
    fields = []
    for spacing, direction in [((1, 1, 1), np.eye(3)), ((0.7, 0.8, 4), [[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])]:
        itk = sitk.GetImageFromArray(phantom()[2].T.copy())
        itk.SetSpacing(spacing)
        itk.SetDirection(np.ravel(direction).tolist())
        n4 = sitk.N4BiasFieldCorrectionImageFilter()
        n4.SetMaximumNumberOfIterations([4])
        n4.Execute(itk)
        fields.append(sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(itk)))
    np.testing.assert_allclose(*fields, atol=1e-5)


def test_the_number_of_threads_has_no_influence_and_is_left_as_it_was(threads):
    n4 = N4BiasFieldCorrection(**QUICK)
    results = []
    for number in (1, 2, 5):
        threads(number)
        results.append(n4(channel_first()))
        assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == number
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_several_images_at_once(threads):
    threads(3)
    images = [channel_first() * k for k in (1, 2, 3, 4)]
    n4 = N4BiasFieldCorrection(**QUICK)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(n4, images))
    for image, result in zip(images, together, strict=True):
        np.testing.assert_array_equal(n4(image), result)
    assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == 3


@pytest.mark.parametrize("factor", [1e-3, 4096.0])
def test_the_unit_of_brightness_does_not_matter(factor):
    n4 = N4BiasFieldCorrection(**QUICK)
    np.testing.assert_allclose(n4(channel_first() * np.float32(factor)), n4(channel_first()) * factor, rtol=5e-3)


def test_a_mask_may_be_given_in_each_form():
    tissue = phantom()[0]
    n4 = N4BiasFieldCorrection(**QUICK)
    expected = n4(channel_first(), mask=tissue > 50)
    masks = [(tissue > 50)[None], torch.from_numpy((tissue > 50)[None]), (np.where(tissue > 50, tissue, 0))[None]]
    for mask in (*masks, MetaTensor(torch.from_numpy((tissue > 50)[None].astype(np.uint8)))):
        np.testing.assert_array_equal(n4(channel_first(), mask=mask), expected)
    assert not np.array_equal(n4(channel_first(), mask=tissue == 60), expected)
    assert not np.array_equal(N4BiasFieldCorrection(mask=None, **QUICK)(channel_first()), expected)
    both = n4(np.repeat(channel_first(), 2, 0), mask=np.stack([tissue > 50, tissue == 60]))
    np.testing.assert_array_equal(both[:1], expected)
    np.testing.assert_array_equal(both[1:], n4(channel_first(), mask=tissue == 60))


@pytest.mark.parametrize("value", [0.0, -5.0])
def test_voxels_without_a_logarithm_do_not_count_but_are_divided(value):
    tissue, _, image = phantom()
    image = image.copy()
    image[15:18, 15:18] = value
    n4 = N4BiasFieldCorrection(**QUICK)
    inside = tissue > 50
    expected = n4(image[None], mask=inside & (image > 0))
    np.testing.assert_array_equal(n4(image[None], mask=inside), expected)
    assert np.isfinite(expected).all()
    assert (expected[0][15:18, 15:18] <= 0).all()
    assert (expected[0][15:18, 15:18] < 0).all() == (value < 0)


def test_whole_numbers_become_float():
    image = np.round(channel_first() * 100).astype(np.int16)
    n4 = N4BiasFieldCorrection(**QUICK)
    result = n4(image)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, n4(image.astype(np.float64)))


def test_the_twin_has_the_same_arguments_and_result():
    own = dict(inspect.signature(N4BiasFieldCorrection).parameters)
    twin = dict(inspect.signature(N4BiasFieldCorrectiond).parameters)
    assert twin.pop("keys").default is inspect.Parameter.empty
    assert twin.pop("mask_key").default is None
    assert twin.pop("allow_missing_keys").default is False
    assert list(own.values()) == list(twin.values())
    tissue, _, image = phantom()
    data = {"t1": image[None], "t2": image[None] * 2, "body": (tissue > 50)[None], "other": 3}
    array = N4BiasFieldCorrection(2, None, [3, 3], 0.01, 5, 0.2)
    result = N4BiasFieldCorrectiond(["t1", "t2"], None, 2, None, [3, 3], 0.01, 5, 0.2)(data)
    np.testing.assert_array_equal(result["t2"], array(image[None] * 2))
    assert result["other"] == 3
    masked = N4BiasFieldCorrectiond("t1", mask_key="body", **QUICK)(data)
    np.testing.assert_array_equal(masked["t1"], N4BiasFieldCorrection(**QUICK)(image[None], mask=(tissue > 50)[None]))
    np.testing.assert_array_equal(data["t1"], image[None])
    assert N4BiasFieldCorrectiond("t3", allow_missing_keys=True)(data).keys() == data.keys()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"shrink_factor": 0.5}, "shrink_factor 0.5: expected at least 1"),
        ({"shrink_factor": math.nan}, "shrink_factor nan"),
        ({"mask": "body"}, "mask 'body': expected 'otsu' or None"),
        ({"maximum_number_of_iterations": []}, "expected a whole number"),
        ({"maximum_number_of_iterations": [50, 0]}, "at least 1, for each fitting level"),
        ({"number_of_control_points": 3}, "number_of_control_points 3: expected a whole number, at least 4"),
        ({"convergence_threshold": -1}, "convergence_threshold -1"),
        ({"bias_field_full_width_at_half_maximum": 0}, "the second above it"),
    ],
)
def test_impossible_parameters_are_refused(arguments, match):
    with pytest.raises(ConfigError, match=match) as caught:
        N4BiasFieldCorrection(**arguments)
    assert "\n" not in str(caught.value)


def with_value(value):
    image = channel_first().copy()
    image[0, 3, 3, 3] = value
    return image


@pytest.mark.parametrize(
    ("image", "mask", "error", "match"),
    [
        (with_value(math.nan), None, ReadError, "mr: the image holds NaN or infinite"),
        (with_value(math.inf), None, ReadError, "NaN or infinite"),
        (np.zeros((1, 8, 8, 8)), None, ReadError, "the image is 0 everywhere"),
        (np.full((1, 8, 8, 8), 7.0), None, ReadError, "the image is 7 everywhere"),
        (np.full((1, 8, 8, 8), 7.0), np.ones((8, 8, 8)), ReadError, "a single value.*512 voxels"),
        (-np.arange(512.0).reshape(1, 8, 8, 8), np.ones((8, 8, 8)), GeometryError, "no voxel that is above 0"),
        (channel_first(), np.zeros((40, 36, 10)), GeometryError, "no voxel that is above 0"),
        (channel_first(), np.ones((40, 36, 9)), GeometryError, r"a mask of shape \(40, 36, 9\) for an image of shape"),
        (channel_first(), np.ones((2, 40, 36, 10)), GeometryError, "a mask of shape"),
        (np.ones((40, 36)), None, GeometryError, r"shape \(40, 36\): expected \(C, X, Y, Z\)"),
        (np.ones((1, 4, 4, 4, 4)), None, GeometryError, "expected"),
        (np.ones((1, 40, 1, 1)), None, GeometryError, "two spatial axes"),
        (np.ones((0, 40, 4, 1)), None, GeometryError, "two spatial axes"),
    ],
)
def test_unusable_images_are_refused_in_one_line(image, mask, error, match, threads):
    threads(2)
    data = {"mr": image} if mask is None else {"mr": image, "mask": mask}
    with pytest.raises(error, match=match) as caught:
        N4BiasFieldCorrectiond("mr", mask_key=None if mask is None else "mask")(data)
    assert "\n" not in str(caught.value)
    assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == 2


def test_a_mask_that_the_shrunk_image_does_not_meet_is_refused():
    image = np.random.default_rng(0).random((1, 200, 200)) + 1
    mask = np.zeros((200, 200))
    mask[1, 1] = 1
    with pytest.raises(ReadError, match=r"no voxel, at the 0 voxels of the mask that shrink_factor 4 leaves of 1"):
        N4BiasFieldCorrection(4)(image, mask=mask)


def test_a_mask_key_that_is_not_there_says_what_is():
    with pytest.raises(ConfigError, match=r"mask_key 'body': found only 'mr'"):
        N4BiasFieldCorrectiond("mr", mask_key="body")({"mr": channel_first()})


@pytest.mark.realdata
def test_tissue_of_the_real_flair_becomes_more_even(data):
    """The coefficient of variation falls over the whole brain, whose outline is taken before the correction.

    Classes by brightness in the image before correction would hide its bias, so there are none.
    """
    image = read_image(data / "mr_registration" / "study1_FLAIR.nii.gz")
    corrected = N4BiasFieldCorrection()(image)
    before, after = image[0].numpy(), corrected[0].numpy()
    assert corrected.shape == image.shape
    np.testing.assert_array_equal(corrected.affine, image.affine)
    spacing = np.linalg.norm(image.affine[:3, :3].numpy(), axis=0)
    # Opened by 8 mm: the scalp is thinner, and the brain is the largest piece that is left.
    bright = before > 0.6 * threshold_otsu(before[before > 0])
    pieces, _ = ndimage.label(ndimage.distance_transform_edt(bright, sampling=spacing) > 8)
    largest = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    brain = bright & (ndimage.distance_transform_edt(~largest, sampling=spacing) < 8)
    assert 1000 < brain.sum() * spacing.prod() / 1000 < 1300, "mL of a brain"
    variation = [values.std() / values.mean() for values in (before[brain], after[brain])]
    assert variation[0] == pytest.approx(0.169, abs=0.002)
    assert variation[1] < 0.9 * variation[0]
    otsu = before > threshold_otsu(before)
    assert after[otsu].std() / after[otsu].mean() < 0.95 * before[otsu].std() / before[otsu].mean()


def test_a_mask_at_another_place_is_refused():
    """The same shape is not enough: a mask that is stored the other way round would choose other tissue."""
    image = MetaTensor(torch.from_numpy(channel_first().copy()), affine=torch.diag(torch.tensor([2.0, 2, 4, 1])))
    mask = MetaTensor((image.as_tensor() > 50).to(torch.uint8), affine=torch.diag(torch.tensor([-2.0, 2, 4, 1])))
    with pytest.raises(GeometryError, match=r"mr: the mask lies up to 156 mm away .* expected one grid"):
        N4BiasFieldCorrectiond("mr", mask_key="mask", **QUICK)({"mr": image, "mask": mask})
    same = N4BiasFieldCorrection(**QUICK)(image, mask=mask.as_tensor())
    mask.affine = image.affine + 1e-4
    np.testing.assert_array_equal(N4BiasFieldCorrection(**QUICK)(image, mask=mask), same)
