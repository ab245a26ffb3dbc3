"""One class of ours, and what MONAI's normalizations do that the documentation relies on."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.data import MetaTensor
from monai.transforms import (
    AsDiscrete,
    ClipIntensityPercentiles,
    LabelFilter,
    MapLabelValue,
    NormalizeIntensity,
    ScaleIntensity,
    ScaleIntensityRangePercentiles,
)

from medseg.errors import ConfigError
from medseg.transforms import MergeMasks, MergeMasksd, PopulationZScore, PopulationZScored

STATISTICS = {"mean": [10.0, -500.0], "std": [4.0, 250.0]}
images = arrays(np.float32, (2, 3, 4), elements=st.floats(-2048, 2048, width=32))


def test_it_is_the_z_score_by_hand():
    image = np.array([[10, 14, 2], [-500, 0, -1000]], np.float32)
    np.testing.assert_array_equal(PopulationZScore(STATISTICS)(image), [[0, 1, -2], [0, 2, -2]])


@given(images)
def test_it_is_monais_given_the_same_numbers_but_leaves_its_input_alone(image):
    before = image.copy()
    found = PopulationZScore(STATISTICS)(image)
    assert np.array_equal(image, before)
    monais = NormalizeIntensity(STATISTICS["mean"], STATISTICS["std"], channel_wise=True)(image.copy())
    np.testing.assert_allclose(found, monais, rtol=1e-6, atol=1e-6)


@given(images)
def test_the_population_that_was_measured_gets_mean_0_and_deviation_1(image):
    image = image + np.arange(12, dtype=np.float32).reshape(3, 4)
    channels = image.reshape(2, -1).astype(np.float64)
    if (channels.std(axis=1) < 1).any():
        return
    statistics = {"mean": channels.mean(axis=1).tolist(), "std": channels.std(axis=1).tolist()}
    normalized = PopulationZScore(statistics)(image).reshape(2, -1).astype(np.float64)
    np.testing.assert_allclose(normalized.mean(axis=1), 0, atol=1e-3)
    np.testing.assert_allclose(normalized.std(axis=1), 1, atol=1e-3)


def test_types_and_geometry_stay():
    affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    image = MetaTensor(torch.ones(2, 3, 4, 5, dtype=torch.int16), affine=affine, meta={"modality": "CT"})
    result = PopulationZScore(STATISTICS)(image)
    assert isinstance(result, MetaTensor)
    assert result.dtype == torch.float32
    assert torch.equal(result.affine, affine)
    assert result.meta["modality"] == "CT"
    assert type(PopulationZScore(STATISTICS)(np.ones((2, 3)))) is np.ndarray


def test_statistics_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="of 2 channels, the image has 3"):
        PopulationZScore(STATISTICS)(np.zeros((3, 2, 2)))
    nan, inf = float("nan"), float("inf")
    wrong = [([1.0], [std]) for std in (0.0, -1.0, nan, inf)] + [([mean], [1.0]) for mean in (nan, inf)]
    with pytest.raises(ConfigError, match="a number per channel"):
        PopulationZScore({"mean": [1.0]})
    for mean, std in [*wrong, ([1.0, 2.0], [1.0]), ([], [])]:
        with pytest.raises(ConfigError, match="a number per channel"):
            PopulationZScore({"mean": mean, "std": std})


def test_the_union_of_masks():
    masks = np.zeros((3, 4, 4), np.uint8)
    masks[0, 0], masks[1, :, 1], masks[2, 3, 3] = 1, 1, 1
    union = MergeMasks()(masks)
    assert (union.shape, union.dtype) == ((1, 4, 4), np.uint8)
    np.testing.assert_array_equal(union[0], masks.max(axis=0))
    as_meta = MergeMasks()(MetaTensor(torch.from_numpy(masks).float(), affine=2 * torch.eye(4)))
    assert as_meta.dtype == torch.float32
    assert as_meta.affine[0, 0] == 2


@pytest.mark.parametrize(("array", "twin"), [(PopulationZScore, PopulationZScored), (MergeMasks, MergeMasksd)])
def test_twins_have_the_same_arguments_and_results(array, twin):
    arguments = [p for p in inspect.signature(array.__init__).parameters if p not in ("self", "args", "kwargs")]
    parameters = inspect.signature(twin.__init__).parameters
    assert [name for name in parameters if name not in ("self", "keys", "allow_missing_keys")] == arguments
    given_ = [STATISTICS] if arguments else []
    image = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    result = twin(["image", "absent"], *given_, allow_missing_keys=True)({"image": image, "case": "a"})
    np.testing.assert_array_equal(result["image"], array(*given_)(image))
    assert result["case"] == "a"


# What docs/explanation/preprocessing.md says of MONAI's own.


@pytest.mark.parametrize(
    "transform",
    [
        NormalizeIntensity(channel_wise=True),
        ScaleIntensity(channel_wise=True),
        ScaleIntensityRangePercentiles(0.5, 99.5, 0, 1, clip=True, channel_wise=True),
    ],
)
@pytest.mark.filterwarnings("ignore:Divide by zero")
def test_monai_makes_a_constant_channel_0(transform):
    image = torch.stack([torch.full((4, 4), 7.0), torch.arange(16.0).reshape(4, 4)])
    result = transform(image)
    assert (result[0] == 0).all()
    assert result[1].std() > 0


def test_monai_normalizes_each_sequence_by_itself():
    image = torch.stack([torch.arange(16.0).reshape(4, 4), 100 + 5 * torch.rand(4, 4)])
    result = NormalizeIntensity(channel_wise=True)(image.clone())
    torch.testing.assert_close(torch.as_tensor(result).mean(dim=(1, 2)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.as_tensor(result).std(dim=(1, 2), unbiased=False), torch.ones(2))
    scaled = ScaleIntensity(channel_wise=True)(image)
    assert scaled.amin(dim=(1, 2)).tolist() == [0, 0]
    assert scaled.amax(dim=(1, 2)).tolist() == [1, 1]


def test_monai_clips_at_percentiles():
    image = torch.arange(101.0)[None]
    clipped = ClipIntensityPercentiles(5, 95)(image)
    assert (clipped.min(), clipped.max()) == (5, 95)


def test_monai_selects_merges_and_renumbers_label_values():
    label = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)

    def mapped(orig, target):
        return MapLabelValue(orig, target, dtype=np.uint8)(label)

    assert mapped([1, 2, 3], [1, 1, 1]).tolist() == [[0, 1, 1, 1]]
    assert mapped([1, 2, 3], [0, 1, 0]).tolist() == [[0, 0, 1, 0]]
    assert mapped([1, 2], [2, 1]).tolist() == [[0, 2, 1, 3]]
    assert mapped([1, 2], [2, 1]).dtype == torch.uint8
    assert LabelFilter([2])(label).tolist() == [[0, 0, 2, 0]]
    assert AsDiscrete(to_onehot=4)(label).argmax(0).tolist() == label[0].tolist()
