"""The window of the standard and the guarded 8 bits, against numbers by hand and against pydicom."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.data import MetaTensor
from pydicom.dataset import Dataset
from pydicom.pixels import apply_windowing

from medseg.errors import ConfigError, MissingTagError
from medseg.transforms import DicomWindow, DicomWindowd, HounsfieldWindow, RescaleTo8Bit, RescaleTo8Bitd

FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
stored = arrays(np.uint16, st.integers(0, 40), elements=st.integers(0, 4095))
real = arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 8)), elements=st.floats(-1e6, 1e6, width=32))


def image(values: object = (0.0, 50.0, 100.0), **meta: object) -> MetaTensor:
    return MetaTensor(torch.tensor(values), affine=torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0])), meta=meta)


def by_pydicom(values: np.ndarray, center: float, width: float, function: str, bits: int) -> np.ndarray:
    ds = Dataset()
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.PixelRepresentation, ds.BitsStored = 0, bits
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = center, width, function
    return apply_windowing(values, ds)


def test_linear_by_hand_with_its_bounds() -> None:
    # c 50, w 101: c - 0.5 - (w - 1) / 2 = -0.5 is the last black, 99.5 the last of the ramp and already white.
    values = np.array([-100.0, -0.5, -0.25, 24.5, 49.5, 99.25, 99.5, 99.75, 4000.0], np.float32)
    expected = [0, 0, 0.6375, 63.75, 127.5, 254.3625, 255, 255, 255]
    np.testing.assert_allclose(DicomWindow(50, 101)(values), expected, rtol=1e-6)


def test_linear_of_width_1_is_a_step_at_center_minus_a_half() -> None:
    values = np.array([99.0, 99.5, np.nextafter(np.float32(99.5), np.float32(100)), 100.0], np.float32)
    np.testing.assert_array_equal(DicomWindow(100, 1)(values), [0, 0, 255, 255])


def test_linear_of_width_2() -> None:
    np.testing.assert_array_equal(DicomWindow(10, 2, low=0, high=1)(np.array([9, 9.25, 9.5, 10.0])), [0, 0.25, 0.5, 1])


def test_the_examples_of_the_standard() -> None:
    # PS3.3 C.11.2.1.2.1: "c=2048 and w=4096", and "c=0 and w=100"
    values = np.array([0.0, 4095.0, -1.0, 4096.0])
    np.testing.assert_allclose(DicomWindow(2048, 4096)(values), [0, 255, 0, 255], rtol=1e-6)
    values = np.array([-51.0, -50.0, -49.0, 49.0, 50.0])
    ramp = (values + 0.5) / 99 + 0.5
    np.testing.assert_allclose(DicomWindow(0, 100)(values), 255 * np.clip(ramp, 0, 1), rtol=1e-6)


def test_linear_exact_by_hand_with_its_bounds() -> None:
    values = np.array([-1.0, 0.0, 25.0, 50.0, 100.0, 101.0])
    expected = [0, 0, 63.75, 127.5, 255, 255]
    np.testing.assert_allclose(DicomWindow(50, 100, "LINEAR_EXACT")(values), expected, rtol=1e-6)
    # a width below 1 is allowed here, as images of small real numbers need it
    np.testing.assert_allclose(
        DicomWindow(0.5, 0.5, "LINEAR_EXACT", high=1)(np.array([0.25, 0.5, 0.625])), [0, 0.5, 0.75]
    )


@given(stored, st.floats(-1000, 5000), st.floats(1, 9000))
def test_linear_exact_is_the_hounsfield_window(values: np.ndarray, center: float, width: float) -> None:
    exact = DicomWindow(center, width, "LINEAR_EXACT", high=1)(values[None])
    # The Hounsfield window computes in float32: near 5000 HU its error is a few parts in 10,000 of a width of 1.
    np.testing.assert_allclose(exact, HounsfieldWindow((center, width))(values[None]), atol=1e-3)


def test_sigmoid_by_hand() -> None:
    values = np.array([-1e9, 0.0, 50.0, 100.0, 1e9])
    inner = 1 / (1 + math.exp(2))
    expected = np.array([0, inner, 0.5, 1 - inner, 1]) * 255
    np.testing.assert_allclose(DicomWindow(50, 100, "SIGMOID")(values), expected, rtol=1e-6)


@given(stored, st.integers(-500, 5000).map(lambda n: n / 2), st.integers(2, 9000), st.sampled_from(FUNCTIONS))
def test_every_function_is_that_of_pydicom(values: np.ndarray, center: float, halves: int, function: str) -> None:
    width = halves / 2
    result = DicomWindow(center, width, function, low=0, high=4095)(values)
    if function == "LINEAR" and width == 1:
        expected = np.where(values > center - 0.5, 4095.0, 0.0)  # pydicom divides 0 by 0 on the bound
    else:
        expected = by_pydicom(values, center, width, function, bits=12)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-3)


@given(
    stored, st.floats(-1000, 5000), st.floats(1, 9000), st.sampled_from(FUNCTIONS), st.floats(-9, 9), st.floats(1, 9)
)
def test_gray_levels_stay_in_range_and_never_fall(
    values: np.ndarray, center: float, width: float, function: str, low: float, span: float
) -> None:
    result = DicomWindow(center, width, function, low, low + span)(np.sort(values))
    assert result.dtype == np.float32
    assert (np.diff(result) >= 0).all()
    assert ((result >= np.float32(low) - 1e-5) & (result <= np.float32(low + span) + 1e-5)).all()


def test_low_above_high_inverts() -> None:
    np.testing.assert_allclose(DicomWindow(50.5, 101, low=255, high=0)(np.array([0.0, 50, 100])), [255, 127.5, 0])


def test_what_is_no_number() -> None:
    values = np.array([-np.inf, np.nan, np.inf])
    for function in FUNCTIONS:
        np.testing.assert_array_equal(DicomWindow(50, 100, function)(values), [0, np.nan, 255])
    np.testing.assert_array_equal(DicomWindow(50, 1)(values), [0, np.nan, 255])


def test_the_window_of_the_tags() -> None:
    tagged = image(window=(50.5, 101.0), window_function="LINEAR")
    np.testing.assert_allclose(DicomWindow()(tagged), [0, 127.5, 255])
    assert DicomWindow()(image(window=(50.0, 100.0), window_function="SIGMOID"))[1] == 127.5
    # what is given goes before the tags, with its own function
    np.testing.assert_array_equal(
        DicomWindow(50, 100)(image(window=(1.0, 2.0), window_function="SIGMOID")),
        DicomWindow(50, 100, "LINEAR")(image()),
    )
    np.testing.assert_array_equal(
        DicomWindow(function="LINEAR_EXACT")(image(window=(50.0, 100.0), window_function="LINEAR")), [0, 127.5, 255]
    )
    batched = image(window=torch.tensor([50.5, 101.0]))
    np.testing.assert_allclose(DicomWindow()(batched), [0, 127.5, 255])


@pytest.mark.parametrize(
    "without", [image(), image(window=(math.nan, math.nan)), image(window=(math.nan, 5.0)), np.zeros(3), torch.zeros(3)]
)
def test_an_image_without_window_says_so_and_which(without: object) -> None:
    with pytest.raises(MissingTagError, match=r"^ct: the image has no window .* give center and width$"):
        DicomWindowd("ct")({"ct": without})


def test_messages_name_the_file() -> None:
    with pytest.raises(MissingTagError, match=r"the image of 7\.dcm has no window"):
        DicomWindow()(image(filename_or_obj="7.dcm"))
    with pytest.raises(MissingTagError, match=r"image of 7\.dcm is unusable: .* width 0\.5: .* at least 1 for LINEAR"):
        DicomWindow()(image(window=(5.0, 0.5), filename_or_obj="7.dcm"))
    with pytest.raises(MissingTagError, match=r"unusable: VOI LUT function 'CUBIC'"):
        DicomWindow()(image(window=(5.0, 9.0), window_function="CUBIC"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"center": 4},
        {"width": 4},
        {"center": 4, "width": 0.99},
        {"center": 4, "width": 0, "function": "LINEAR_EXACT"},
        {"center": 4, "width": -1, "function": "SIGMOID"},
        {"center": math.nan, "width": 10},
        {"center": 4, "width": math.inf},
        {"center": 4, "width": math.nan},
        {"center": 4, "width": 10, "function": "linear"},
    ],
)
def test_impossible_windows_are_refused(arguments: dict) -> None:
    with pytest.raises(ConfigError):
        DicomWindow(**arguments)


# -- 8 bits


def test_8_bits_by_hand() -> None:
    # 255 * 1 / 4 = 63.75, 255 * 2 / 4 = 127.5 and 255 * 3 / 4 = 191.25; halves to even
    result = RescaleTo8Bit()(np.array([10, 11, 12, 13, 14], np.int16))
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, [0, 64, 128, 191, 255])
    np.testing.assert_array_equal(RescaleTo8Bit()(np.array([0.0, 0.5, 2.5, 255.0])), [0, 0, 2, 255])


@given(real)
def test_8_bits_are_the_published_formula(values: np.ndarray) -> None:
    result = RescaleTo8Bit()(values)
    p = values.astype(np.float64)
    if p.min() == p.max():
        assert not result.any()
    else:
        np.testing.assert_array_equal(result, np.rint((p - p.min()) * 255 / (p.max() - p.min())))
        assert result.min() == 0
        assert result.max() == 255


@pytest.mark.parametrize("value", [0, 7, -1000, 1e30, np.nan, np.inf, -np.inf])
def test_a_constant_image_is_black(value: float) -> None:
    result = RescaleTo8Bit()(np.full((2, 3), value))
    np.testing.assert_array_equal(result, np.zeros((2, 3), np.uint8))


def test_an_empty_image_stays_empty() -> None:
    assert RescaleTo8Bit()(np.zeros((0, 3))).shape == (0, 3)
    assert RescaleTo8Bit(channel_wise=True)(np.zeros((0, 3))).shape == (0, 3)


def test_what_is_no_number_does_not_count() -> None:
    values = np.array([np.nan, -np.inf, -5.0, 5.0, np.inf])
    np.testing.assert_array_equal(RescaleTo8Bit()(values), [0, 0, 0, 255, 255])


def test_given_bounds_and_percentiles() -> None:
    values = np.arange(101.0)
    np.testing.assert_array_equal(
        RescaleTo8Bit(a_min=20, a_max=80)(values)[[0, 20, 50, 80, 100]], [0, 0, 128, 255, 255]
    )
    np.testing.assert_array_equal(RescaleTo8Bit(lower=10, upper=90)(values), RescaleTo8Bit(a_min=10, a_max=90)(values))
    assert RescaleTo8Bit(lower=10, upper=90).bounds(values) == (10, 90)


def test_a_mask_of_few_voxels_is_still_seen_with_percentiles() -> None:
    mask = np.zeros(10_000)
    mask[5] = 1
    result = RescaleTo8Bit(lower=1, upper=99)(mask)
    assert result[5] == 255
    assert result.sum() == 255


def test_bounds_per_channel() -> None:
    values = np.array([[0, 5, 10], [0, 50, 100], [3, 3, 3]])
    np.testing.assert_array_equal(RescaleTo8Bit()(values), [[0, 13, 26], [0, 128, 255], [8, 8, 8]])
    np.testing.assert_array_equal(RescaleTo8Bit(channel_wise=True)(values), [[0, 128, 255], [0, 128, 255], [0, 0, 0]])


@pytest.mark.parametrize(
    "arguments",
    [
        {"a_min": 1},
        {"a_max": 1},
        {"a_min": 1, "a_max": 1},
        {"a_min": 2, "a_max": 1},
        {"a_min": math.nan, "a_max": 1},
        {"a_min": 0, "a_max": math.inf},
        {"lower": -1},
        {"upper": 101},
        {"lower": 60, "upper": 40},
    ],
)
def test_impossible_bounds_are_refused(arguments: dict) -> None:
    with pytest.raises(ConfigError):
        RescaleTo8Bit(**arguments)


# -- both


@pytest.mark.parametrize("transform", [DicomWindow(50, 101), DicomWindow(), RescaleTo8Bit()])
def test_the_kind_of_image_and_its_meta_are_kept_and_the_image_is_not_changed(transform) -> None:
    given_image = image(window=(50.5, 101.0), modality="CT")
    result = transform(given_image)
    assert isinstance(result, MetaTensor)
    np.testing.assert_array_equal(result.affine, given_image.affine)
    assert result.meta["modality"] == "CT"
    np.testing.assert_array_equal(given_image, [0, 50, 100])
    if transform.__dict__.get("center", 0) is not None:
        for plain in (np.array([0.0, 50.0, 100.0]), torch.tensor([0.0, 50.0, 100.0])):
            other = transform(plain)
            assert type(other) is type(plain)
            np.testing.assert_array_equal(
                other, DicomWindow(50, 101)(image()) if "center" in vars(transform) else result
            )


@pytest.mark.parametrize(("array", "dictionary"), [(DicomWindow, DicomWindowd), (RescaleTo8Bit, RescaleTo8Bitd)])
def test_twins_have_the_same_arguments_and_results(array, dictionary) -> None:
    own = inspect.signature(array).parameters
    twin = dict(inspect.signature(dictionary).parameters)
    assert twin.pop("keys").default is inspect.Parameter.empty
    assert twin.pop("allow_missing_keys").default is False
    assert list(own.values()) == list(twin.values())
    result = dictionary(["a", "b"], 10, 70)({"a": image(), "b": image([1.0, 30.0, 5.0]), "label": 3})
    np.testing.assert_array_equal(result["a"], array(10, 70)(image()))
    np.testing.assert_array_equal(result["b"], array(10, 70)(image([1.0, 30.0, 5.0])))
    assert result["label"] == 3
    with pytest.raises(KeyError):
        dictionary("absent", 10, 70)({})
    assert dictionary("absent", 10, 70, allow_missing_keys=True)({}) == {}
