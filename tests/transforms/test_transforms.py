import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.data import MetaTensor
from monai.transforms import Compose, ScaleIntensityRange

from medseg.errors import ConfigError
from medseg.transforms import HounsfieldWindow, HounsfieldWindowd, SelectChannels, SelectChannelsd

hu = arrays(np.float32, (2, 3, 4), elements=st.floats(-1024, 3000, width=32))
TWINS = [(HounsfieldWindow, HounsfieldWindowd), (SelectChannels, SelectChannelsd)]


def petct(kind=np.asarray):
    ct = np.linspace(-1000, 1000, 24, dtype=np.float32).reshape(2, 3, 4)
    return kind(np.stack([ct, np.ones_like(ct)]))


def meta_image() -> MetaTensor:
    affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    return MetaTensor(petct(torch.from_numpy), affine=affine, meta={"modality": "CT"})


def test_window_by_hand():
    ct = np.array([[-1000.0, -30.0, 20.0, 70.0, 170.0, 400.0]])
    np.testing.assert_allclose(HounsfieldWindow((70, 200))(ct), [[0, 0, 0.25, 0.5, 1, 1]])
    np.testing.assert_allclose(HounsfieldWindow((70, 200), scale=False)(ct), [[-30, -30, 20, 70, 170, 170]])


@given(hu, st.floats(-200, 200), st.floats(1, 2000))
def test_window_is_equation_6_1_and_the_scaling_of_monai(image, c, w):
    clipped = np.minimum(c + w / 2, np.maximum(c - w / 2, image))
    np.testing.assert_allclose(HounsfieldWindow((c, w), scale=False)(image)[0], clipped[0], rtol=1e-5, atol=1e-3)
    scaled = ScaleIntensityRange(c - w / 2, c + w / 2, 0, 1, clip=True)(image[:1])
    np.testing.assert_allclose(HounsfieldWindow((c, w))(image)[:1], scaled, atol=1e-4)
    np.testing.assert_array_equal(HounsfieldWindow((c, w))(image)[1], image[1])


def test_several_windows_stand_in_the_place_of_the_ct_and_the_raw_ct_comes_last():
    image = petct()[[1, 0, 1]] * np.array([1, 1, 5], np.float32).reshape(3, 1, 1, 1)
    result = HounsfieldWindow([(70, 200), (60, 100)], channel=1, keep_raw=True)(image)
    assert result.shape == (5, 2, 3, 4)
    np.testing.assert_array_equal(result[0], image[0])
    np.testing.assert_array_equal(result[1:2], HounsfieldWindow((70, 200))(image[1:2]))
    np.testing.assert_array_equal(result[2:3], HounsfieldWindow((60, 100))(image[1:2]))
    np.testing.assert_array_equal(result[3], image[2])
    np.testing.assert_array_equal(result[4], image[1])


@pytest.mark.parametrize(
    "windows",
    [(70, 200), [70, 200], [[70, 200]], {"center": 70, "width": 200}, [{"center": 70, "width": 200}], ((70.0, 200.0),)],
)
def test_windows_may_be_written_in_each_way(windows):
    np.testing.assert_array_equal(HounsfieldWindow(windows)(petct()), HounsfieldWindow((70, 200))(petct()))


def test_integer_images_become_float():
    ct = np.array([[-1000, 20, 300]], np.int16)
    result = HounsfieldWindow((70, 200))(ct)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, [[0, 0.25, 1]])


@pytest.mark.parametrize("transform", [HounsfieldWindow([(70, 200), (60, 100)]), SelectChannels([1])])
def test_the_kind_of_image_is_kept(transform):
    expected = transform(petct())
    assert type(expected) is np.ndarray
    tensor = transform(petct(torch.from_numpy))
    assert type(tensor) is torch.Tensor
    np.testing.assert_array_equal(tensor.numpy(), expected)
    image = transform(meta_image())
    assert isinstance(image, MetaTensor)
    np.testing.assert_array_equal(image.numpy(), expected)
    np.testing.assert_array_equal(image.affine, meta_image().affine)
    assert image.meta["modality"] == "CT"


@pytest.mark.parametrize("transform", [HounsfieldWindow((70, 200), keep_raw=True), SelectChannels([1, 0])])
def test_the_given_image_is_not_changed(transform):
    image = petct()
    result = transform(image)
    np.testing.assert_array_equal(image, petct())
    result[:] = 7
    np.testing.assert_array_equal(image, petct())


@pytest.mark.parametrize(("array", "dictionary"), TWINS)
def test_twins_have_the_same_arguments_and_results(array, dictionary):
    own = inspect.signature(array).parameters
    twin = dict(inspect.signature(dictionary).parameters)
    assert twin.pop("keys").default is inspect.Parameter.empty
    assert twin.pop("allow_missing_keys").default is False
    assert list(own.values()) == list(twin.values())
    argument = (70, 200) if array is HounsfieldWindow else [1]
    data = {"image": petct(), "label": 3}
    result = dictionary("image", argument)(data)
    np.testing.assert_array_equal(result["image"], array(argument)(petct()))
    assert result["label"] == 3
    np.testing.assert_array_equal(data["image"], petct())


def test_missing_keys():
    with pytest.raises(KeyError):
        SelectChannelsd("image", [0])({})
    assert SelectChannelsd("image", [0], allow_missing_keys=True)({}) == {}


def test_a_pipeline_of_both():
    chain = Compose([HounsfieldWindowd("image", [(70, 200), (60, 100)]), SelectChannelsd("image", [2, 0])])
    result = chain({"image": meta_image()})["image"]
    np.testing.assert_array_equal(result[0], petct()[1])
    assert result.shape == (2, 2, 3, 4)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_selection_is_numpy_indexing(channels):
    image = np.arange(5 * 6).reshape(5, 6)
    result = SelectChannels(channels)(image)
    np.testing.assert_array_equal(result, image[channels])
    assert result.dtype == image.dtype


@pytest.mark.parametrize(
    "windows",
    [
        (70, 0),
        (70, -1),
        (70,),
        (1, 2, 3),
        (float("nan"), 1),
        ("a", "b"),
        "ab",
        {"center": 1},
        {"center": 1, "with": 2},
        {"center": 1, "width": 2, "level": 3},
        [(70, 200), (60, 0)],
    ],
)
def test_impossible_windows_are_refused(windows):
    with pytest.raises(ConfigError, match="expected center and width in HU, the width positive"):
        HounsfieldWindow(windows)


def test_no_window_and_no_channel_are_refused():
    with pytest.raises(ConfigError, match="windows is empty"):
        HounsfieldWindow([])
    with pytest.raises(ConfigError, match="channels is empty"):
        SelectChannels([])


def test_a_channel_out_of_range_says_how_many_there_are():
    with pytest.raises(ConfigError, match="channel 2 of an image with 2 channels: expected 0 to 1"):
        SelectChannels([0, 2])(petct())
    with pytest.raises(ConfigError, match="channel -1 of an image with 2 channels"):
        SelectChannels([-1])(petct())
    with pytest.raises(ConfigError, match="channel 3 of an image with 1 channel: expected 0 to 0"):
        HounsfieldWindow((0, 1), channel=3)(petct()[:1])


def test_one_channel_may_stand_alone():
    image = np.arange(6).reshape(3, 2)
    for channel in (0, 2):
        np.testing.assert_array_equal(SelectChannels(channel)(image), image[[channel]])
