from math import isnan

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from scipy.ndimage import binary_erosion, distance_transform_edt
from skimage.metrics import hausdorff_distance

from medseg.errors import ConfigError, GeometryError
from medseg.metrics import case_scores, slice_scores

COLUMNS = ["label", "tp", "fp", "tn", "fn", "dice", "f_beta", "sensitivity", "specificity", "ppv"]
COLUMNS += ["hd95_mm", "surface_dice", "truth_empty", "pred_empty"]


def blob(seed: int, shape: tuple[int, ...] = (14, 12, 10)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    center = np.array(shape) / 2 + rng.uniform(-2, 2, len(shape))
    distance = np.sqrt(((grid - center.reshape(-1, *[1] * len(shape))) ** 2).sum(0))
    return (distance + rng.normal(0, 0.4, shape) < 3.5).astype(np.uint8)


def test_two_labels_by_hand():
    truth = np.array([[0, 1, 1], [2, 2, 0]], np.uint8)
    pred = np.array([[0, 1, 2], [2, 2, 0]], np.uint8)
    one, two = case_scores(pred, truth, (1, 1), {"one": 1, "two": 2}, beta=2)
    assert list(one) == COLUMNS
    assert [one[k] for k in COLUMNS[:5]] == ["one", 1, 0, 4, 1]
    assert [two[k] for k in COLUMNS[:5]] == ["two", 2, 1, 3, 0]
    assert one["dice"] == pytest.approx(2 / 3)
    assert one["f_beta"] == pytest.approx(5 / (5 + 4))
    assert (one["sensitivity"], one["ppv"], two["sensitivity"]) == (0.5, 1, 1)
    assert two["specificity"] == pytest.approx(3 / 4)
    assert all(isinstance(one[k], int) for k in ("tp", "fp", "tn", "fn"))


def test_distances_are_in_millimeters_along_the_right_axis():
    truth = np.zeros((12, 12, 12), np.uint8)
    truth[4:7, 4:7, 4:7] = 1
    for axis, spacing in enumerate((1.0, 2.0, 5.0)):
        [row] = case_scores(np.roll(truth, 2, axis), truth, (1.0, 2.0, 5.0), {"cube": 1}, tolerance_mm=2 * spacing)
        assert row["hd95_mm"] == pytest.approx(2 * spacing)
        assert row["surface_dice"] == 1
        [row] = case_scores(np.roll(truth, 2, axis), truth, (1.0, 2.0, 5.0), {"cube": 1}, tolerance_mm=spacing * 0.99)
        assert row["surface_dice"] < 1


@given(
    st.integers(0, 1000),
    st.tuples(*[st.sampled_from([0.7, 1.0, 3.0])] * 3),
    st.sampled_from([(14, 12, 10), (5, 12, 10), (4, 5, 6)]),
)
@settings(max_examples=15, deadline=None)
def test_surface_scores_against_distance_transforms(seed, spacing, shape):
    """Also where the blobs are cut by the border of the image."""
    pred, truth = blob(seed, shape), blob(seed + 1, shape)
    [row] = case_scores(pred, truth, spacing, {"blob": 1}, tolerance_mm=1.5)
    edges = [mask & ~binary_erosion(mask) for mask in (pred.astype(bool), truth.astype(bool))]
    there = distance_transform_edt(~edges[1], sampling=spacing)[edges[0]]
    back = distance_transform_edt(~edges[0], sampling=spacing)[edges[1]]
    assert row["hd95_mm"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)
    right = (there <= 1.5).sum() + (back <= 1.5).sum()
    assert row["surface_dice"] == pytest.approx(right / (len(there) + len(back)), abs=1e-6)


def test_hd95_does_not_exceed_the_hausdorff_distance_of_skimage():
    pred, truth = blob(0), blob(1)
    [row] = case_scores(pred, truth, (1, 1, 1), {"blob": 1})
    assert 0 < row["hd95_mm"] <= hausdorff_distance(pred, truth) + 1e-6


def test_empty_masks_follow_the_conventions():
    empty, full = np.zeros((6, 6, 3), np.uint8), np.zeros((6, 6, 3), np.uint8)
    full[2:4, 2:4, 1] = 1
    both, missed, alarm = (
        case_scores(pred, truth, (1, 1, 1), {"tumour": 1})[0]
        for pred, truth in ((empty, empty), (empty, full), (full, empty))
    )
    assert (both["dice"], both["surface_dice"], both["f_beta"]) == (1, 1, 1)
    assert (missed["dice"], missed["surface_dice"], missed["sensitivity"]) == (0, 0, 0)
    assert (alarm["dice"], alarm["surface_dice"], alarm["ppv"]) == (0, 0, 0)
    assert isnan(both["sensitivity"])
    assert isnan(alarm["sensitivity"])
    assert isnan(missed["ppv"])
    assert all(isnan(row["hd95_mm"]) for row in (both, missed, alarm))
    assert [(r["truth_empty"], r["pred_empty"]) for r in (both, missed, alarm)] == [
        (True, True),
        (False, True),
        (True, False),
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_slices_are_cases_of_one_slice(seed):
    pred, truth = blob(seed), blob(seed + 5)
    for axis in (0, 1, 2, -1):
        rows = slice_scores(pred, truth, {"blob": 1}, axis=axis)
        assert [row["slice"] for row in rows] == list(range(truth.shape[axis]))
        for row in rows:
            planes = [np.take(mask, row["slice"], axis) for mask in (pred, truth)]
            [expected] = case_scores(*planes, (1, 1), {"blob": 1})
            for key, value in row.items():
                if key != "slice":
                    np.testing.assert_equal(value, expected[key])


def test_slice_counts_add_up_to_the_case():
    pred, truth = blob(3) + blob(4), blob(5) * 2
    labels = {"a": 1, "b": 2}
    slices = slice_scores(pred, truth, labels)
    for case in case_scores(pred, truth, (1, 1, 1), labels):
        for count in ("tp", "fp", "tn", "fn"):
            assert sum(row[count] for row in slices if row["label"] == case["label"]) == case[count]


def test_tensors_metatensors_and_a_channel_axis_are_taken():
    pred, truth = blob(0), blob(1)
    expected = case_scores(pred, truth, (1, 1, 2), {"blob": 1})
    image = MetaTensor(torch.from_numpy(truth)[None], affine=torch.diag(torch.tensor([1.0, 1, 2, 1])))
    assert case_scores(torch.from_numpy(pred).float(), image, image.pixdim, {"blob": 1}) == expected
    np.testing.assert_equal(slice_scores(pred[None], image, {"blob": 1}), slice_scores(pred, truth, {"blob": 1}))


@pytest.mark.filterwarnings("error")
def test_arrays_of_any_layout_are_taken():
    pred, truth = blob(0), blob(1)
    expected = case_scores(pred, truth, (1, 1, 2), {"blob": 1})
    fixed = truth.copy()
    fixed.flags.writeable = False  # as a cache of nibabel's or a file that is mapped
    for one, other in ((pred.astype(">i2"), truth.astype(">f4")), (pred[::-1], truth[::-1]), (pred, fixed)):
        np.testing.assert_equal(case_scores(one, other, (1, 1, 2), {"blob": 1}), expected)


@pytest.mark.parametrize("value", [0.5, np.inf, np.nan])
def test_what_is_no_label_is_refused(value):
    mask = blob(0).astype(float)
    mask[0, 0, 0] = value
    with pytest.raises(ConfigError, match="truth holds fractions or what is no finite number"):
        case_scores(blob(0), mask, (1, 1, 1), {"blob": 1})


def test_bad_input_is_refused():
    mask = blob(0)
    with pytest.raises(GeometryError, match=r"\(14, 12, 10\) against truth of shape \(14, 12, 9\)"):
        case_scores(mask, mask[..., :9], (1, 1, 1), {"blob": 1})
    with pytest.raises(GeometryError, match="with 2 spatial axes"):
        case_scores(mask, mask, (1, 1), {"blob": 1})
    with pytest.raises(GeometryError, match=r"spacing .* expected positive numbers"):
        case_scores(mask, mask, (1, 1, 0), {"blob": 1})
    with pytest.raises(ConfigError, match="prediction holds fractions"):
        case_scores(mask * 0.5, mask, (1, 1, 1), {"blob": 1})
    with pytest.raises(ConfigError, match="tolerance_mm is -1"):
        case_scores(mask, mask, (1, 1, 1), {"blob": 1}, tolerance_mm=-1)
    with pytest.raises(ConfigError, match="axis is 3"):
        slice_scores(mask, mask, {"blob": 1}, axis=3)
