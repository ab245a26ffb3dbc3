"""Slices resized one by one, and stacks padded and strided to one length."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd
from PIL import Image

from medseg.errors import ConfigError, GeometryError
from medseg.transforms import PadAndStrideSlices, PadAndStrideSlicesd, ResizeSlices, ResizeSlicesd

AFFINE = np.array([[-0.5, 0, 0, 40], [0, 0, 3, -30], [0, -0.7, 0, 5], [0, 0, 0, 1]], float)


def stack(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> MetaTensor:
    values = np.random.default_rng(seed).integers(0, 200, (1, *shape))
    return MetaTensor(torch.from_numpy(values).to(dtype), affine=torch.from_numpy(AFFINE))


@pytest.mark.parametrize(("old", "new"), [((40, 30), (10, 10)), ((37, 53), (16, 40)), ((12, 20), (29, 31))])
def test_images_are_resized_as_pillow_does(old: tuple[int, int], new: tuple[int, int]) -> None:
    image = stack((*old, 3))
    resized = ResizeSlices(new)(image)
    assert resized.shape == (1, *new, 3)
    for z in range(3):
        expected = Image.fromarray(image.numpy()[0, ..., z]).resize(new[::-1], Image.Resampling.BILINEAR)
        np.testing.assert_allclose(resized[0, ..., z], np.asarray(expected), atol=2e-3)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2))
def test_the_same_field_of_view_and_no_shift(x: int, y: int, new_x: int, new_y: int, axis: int) -> None:
    shape = np.insert([x, y], axis, 3)
    resized = ResizeSlices((new_x, new_y), axis=axis)(stack(tuple(shape)))
    size = np.array(resized.shape[1:])
    assert size.tolist() == np.insert([new_x, new_y], axis, 3).tolist()
    for corner in ((0, 0, 0), (1, 0, 1), (1, 1, 1)):
        old, new = (AFFINE, shape), (resized.affine.numpy(), size)
        places = [affine @ [*(np.array(corner) * n - 0.5), 1] for affine, n in (old, new)]
        np.testing.assert_allclose(*places, atol=1e-9)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_a_constant_image_stays_constant_to_the_edge(mode: str) -> None:
    air = MetaTensor(torch.full((1, 50, 50, 4), -1000.0), affine=torch.from_numpy(AFFINE))
    np.testing.assert_allclose(ResizeSlices((13, 17), mode)(air), -1000, rtol=1e-5)


def test_labels_take_the_nearest_voxel_and_keep_their_type() -> None:
    ramp = torch.arange(20, dtype=torch.uint8)[None, :, None, None].expand(1, 20, 20, 2)
    small = ResizeSlices((4, 20), "nearest")(MetaTensor(ramp, affine=torch.from_numpy(AFFINE)))
    assert small.dtype == torch.uint8
    assert small[0, :, 0, 0].tolist() == [2, 7, 12, 17]  # the middle of each five


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**31))
def test_labels_gain_no_value(old: int, new: int, seed: int) -> None:
    label = stack((old, old, 2), torch.uint8, seed)
    assert set(ResizeSlices((new, new), "nearest")(label).unique().tolist()) <= set(label.unique().tolist())


def test_the_volume_of_a_sphere_survives() -> None:
    x, y, z = np.indices((128, 128, 9)) - np.array([60.3, 66.7, 4]).reshape(3, 1, 1, 1)
    ball = MetaTensor(torch.from_numpy(((x**2 + y**2) / 900 + (z / 4) ** 2 < 1)[None].astype(np.uint8)))
    small = ResizeSlices((32, 32), "nearest")(ball)
    assert int(small.sum()) * 16 == pytest.approx(int(ball.sum()), rel=0.02)
    center = [float(torch.nonzero(part[0]).double().mean(0)[0] * step) for part, step in ((ball, 1), (small, 4))]
    assert center[1] + 1.5 == pytest.approx(center[0], abs=0.6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_inverse_is_on_the_old_grid(axis: int) -> None:
    shape = [24, 24]
    shape.insert(axis, 5)
    image = stack(tuple(shape))
    resize = ResizeSlices((8, 6), axis=axis)
    back = resize.inverse(resize(image))
    assert back.shape == image.shape
    np.testing.assert_allclose(back.affine, image.affine, atol=1e-12)
    label = (image > 100).to(torch.uint8)
    same = ResizeSlices((24, 24), "nearest", axis)
    np.testing.assert_array_equal(same.inverse(same(label)), label)


@given(st.integers(1, 100), st.integers(1, 30))
def test_every_kth_slice_lies_where_it_lay(n: int, count: int) -> None:
    image = stack((2, 3, n)) + 1
    short = PadAndStrideSlices(count)(image)
    stride = max(1, -(-n // count))
    assert short.shape == (1, 2, 3, count)
    kept = list(range(0, n, stride))
    np.testing.assert_array_equal(short[..., : len(kept)], image[..., kept])
    assert not short[..., len(kept) :].any()
    for at, z in enumerate(kept):
        np.testing.assert_allclose(short.affine.numpy() @ [1, 2, at, 1], AFFINE @ [1, 2, z, 1], atol=1e-9)


@pytest.mark.parametrize(("n", "spacing", "real"), [(41, 6.0, 21), (24, 3.0, 24), (20, 3.0, 20), (48, 6.0, 24)])
def test_the_stacks_of_the_knee_work(n: int, spacing: float, real: int) -> None:
    short = PadAndStrideSlices(24)(stack((2, 2, n)) + 1)
    assert short.pixdim[2] == pytest.approx(spacing)
    assert int((short[0, 0, 0] > 0).sum()) == real


@given(st.integers(1, 60), st.integers(1, 30), st.integers(0, 2))
def test_the_inverse_gives_each_slice_the_kept_one_before_it(n: int, count: int, axis: int) -> None:
    shape = [2, 3]
    shape.insert(axis, n)
    image = stack(tuple(shape), torch.uint8)
    harmonize = PadAndStrideSlices(count, axis)
    back = harmonize.inverse(harmonize(image))
    assert (back.shape, back.dtype) == (image.shape, torch.uint8)
    np.testing.assert_allclose(back.affine, image.affine, atol=1e-12)
    stride = max(1, -(-n // count))
    np.testing.assert_array_equal(back, image.index_select(1 + axis, torch.arange(n) // stride * stride))


@pytest.mark.parametrize(("nearest", "values"), [(True, [0, 3]), (False, None)], ids=["mask", "probability"])
def test_a_prediction_is_inverted_by_the_operations_of_its_image(nearest: bool, values: list[int] | None) -> None:
    """A mask takes no value between its own, though its image was interpolated."""
    prepare = Compose([ResizeSlicesd("image", (7, 5)), PadAndStrideSlicesd("image", 4)])
    data = prepare({"image": stack((20, 18, 6))})
    data["pred"] = MetaTensor((data["image"].as_tensor() > 100).to(torch.uint8) * 3)
    found = Invertd("pred", prepare, orig_keys="image", nearest_interp=nearest, to_tensor=True)(data)["pred"]
    assert found.shape == (1, 20, 18, 6)
    np.testing.assert_allclose(found.affine, AFFINE)
    assert (found.unique().tolist() == values) == nearest


def test_the_filling_may_be_air() -> None:
    assert PadAndStrideSlices(5, fill=-1024)(stack((2, 2, 3)))[0, 0, 0, 3:].tolist() == [-1024, -1024]


def test_a_chain_of_both_can_be_undone() -> None:
    data = {"image": stack((20, 30, 41)), "label": (stack((20, 30, 41)) > 100).to(torch.uint8)}
    resize = ResizeSlicesd(["image", "label"], (10, 15), ["linear", "nearest"])
    chain = Compose([resize, PadAndStrideSlicesd("label", 24)])
    done = chain(data)
    assert (done["image"].shape, done["label"].shape) == ((1, 10, 15, 41), (1, 10, 15, 24))
    back = chain.inverse(done)
    for key in data:
        assert (back[key].shape, back[key].dtype) == (data[key].shape, data[key].dtype)
        np.testing.assert_allclose(back[key].affine, AFFINE, atol=1e-12)
    np.testing.assert_array_equal(data["image"], stack((20, 30, 41)))


def test_arrays_and_tensors_will_do() -> None:
    array = np.zeros((1, 8, 8, 3), np.float32)
    for kind in (array, torch.from_numpy(array)):
        assert ResizeSlices((4, 4))(kind).shape == (1, 4, 4, 3)
        assert PadAndStrideSlices(2)(kind).shape == (1, 8, 8, 2)


@pytest.mark.parametrize(
    ("array", "dictionary"), [(ResizeSlices, ResizeSlicesd), (PadAndStrideSlices, PadAndStrideSlicesd)]
)
def test_twins_have_the_same_arguments(array: Any, dictionary: Any) -> None:
    own = list(inspect.signature(array).parameters)
    twin = list(inspect.signature(dictionary).parameters)
    assert twin == ["keys", *own, "allow_missing_keys"]
    assert dictionary("x", 5 if array is PadAndStrideSlices else (5, 5), allow_missing_keys=True)({}) == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResizeSlices((3, 0)), "two positive numbers"),
        (lambda: ResizeSlices((3, 3, 3)), "two positive numbers"),
        (lambda: ResizeSlices((3, 3), "cubic"), "mode 'cubic': expected one of linear, nearest"),
        (lambda: ResizeSlices((3, 3), axis=3), "axis 3"),
        (lambda: PadAndStrideSlices(0), "count 0"),
        (lambda: PadAndStrideSlices(3, axis=-4), "axis -4"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16])
def test_labels_of_every_type_are_resized(dtype: torch.dtype) -> None:
    label = MetaTensor((torch.arange(63 * 50 * 2).reshape(1, 63, 50, 2) % 7).to(dtype), affine=torch.from_numpy(AFFINE))
    small = ResizeSlices((16, 16), "nearest")(label)
    x, y = (np.floor((np.arange(16) + 0.5) * n / 16).astype(int) for n in (63, 50))
    assert small.dtype == dtype
    np.testing.assert_array_equal(small.numpy(), label.numpy()[:, x][:, :, y])


def test_a_picture_is_no_stack() -> None:
    for transform in (ResizeSlices((4, 4)), PadAndStrideSlices(4, axis=0)):
        with pytest.raises(GeometryError, match=r"a stack of shape \(1, 8, 8\): expected \(C, X, Y, Z\)"):
            transform(torch.zeros(1, 8, 8))
