from math import isnan, nan

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.data import MetaTensor
from monai.metrics import DiceMetric, compute_confusion_matrix_metric, get_confusion_matrix

from medseg.errors import ConfigError, GeometryError
from medseg.metrics import Counts, confusion_counts, dice, f_beta, ppv, sensitivity, specificity
from medseg.metrics.counts import soft_sums

masks = arrays(bool, (2, 3, 4, 5))
SCORES = [dice, f_beta, sensitivity, specificity, ppv]


def test_counts_by_hand():
    pred = np.array([[[[1, 1, 0], [0, 0, 1]]]])
    truth = np.array([[[[1, 0, 0], [1, 0, 1]]]])
    assert [c.tolist() for c in confusion_counts(pred, truth)] == [[[2]], [[1]], [[2]], [[1]]]


def test_soft_counts_by_hand():
    pred, truth = torch.tensor([[[0.75, 0.5, 0.25]]]), torch.tensor([[[1.0, 0.0, 0.5]]])
    tp, fp, tn, fn = (c.item() for c in confusion_counts(pred, truth))
    assert (tp, fp, fn, tn) == (0.875, 0.625, 0.625, 0.875)
    squares = [s.item() for s in soft_sums(pred, truth, squared=True)]
    assert squares == pytest.approx([0.875, 0.5625 + 0.25 + 0.0625, 1.25])


@given(masks, masks)
def test_hard_counts_agree_with_numpy_and_monai(pred, truth):
    tp, fp, tn, fn = confusion_counts(pred, truth)
    axes = (2, 3)
    np.testing.assert_array_equal(tp, (pred & truth).sum(axes))
    np.testing.assert_array_equal(fp, (pred & ~truth).sum(axes))
    np.testing.assert_array_equal(tn, (~pred & ~truth).sum(axes))
    np.testing.assert_array_equal(fn, (~pred & truth).sum(axes))
    matrix = get_confusion_matrix(*(torch.from_numpy(mask).float() for mask in (pred, truth)))
    np.testing.assert_array_equal(np.stack([tp, fp, tn, fn], -1), matrix.numpy())


@given(masks, masks, st.sampled_from([np.uint8, np.int64, np.float32, np.float64]))
def test_every_type_of_hard_mask_counts_alike(pred, truth, dtype):
    for a, b in zip(confusion_counts(pred, truth), confusion_counts(pred.astype(dtype), truth), strict=True):
        np.testing.assert_array_equal(a, b)
    tensors = confusion_counts(torch.from_numpy(pred.astype(dtype)), torch.from_numpy(truth))
    for a, b in zip(confusion_counts(pred, truth), tensors, strict=True):
        np.testing.assert_array_equal(a, b.numpy())


@given(masks, masks)
def test_swapping_prediction_and_truth(pred, truth):
    one, other = confusion_counts(pred, truth), confusion_counts(truth, pred)
    np.testing.assert_array_equal(dice(one), dice(other))
    np.testing.assert_array_equal(sensitivity(one), ppv(other))
    np.testing.assert_array_equal(f_beta(one, 2), f_beta(other, 0.5))
    inverse = confusion_counts(~pred, ~truth)
    np.testing.assert_array_equal(specificity(one), sensitivity(inverse))


@given(masks, masks, st.floats(0.1, 10))
def test_f_beta_is_the_weighted_harmonic_mean(pred, truth, beta):
    counts = confusion_counts(pred, truth)
    tpr, precision = sensitivity(counts), ppv(counts)
    defined = (tpr > 0) & (precision > 0)
    expected = (1 + beta**2) / (beta**2 / tpr[defined] + 1 / precision[defined])
    np.testing.assert_allclose(f_beta(counts, beta)[defined], expected)
    np.testing.assert_array_equal(f_beta(counts, 1), dice(counts))


def test_scores_agree_with_monai():
    generator = torch.Generator().manual_seed(0)
    pred, truth = (torch.rand(4, 2, 9, 8, generator=generator) < 0.4 for _ in range(2))
    counts = confusion_counts(pred, truth)
    matrix = torch.stack(counts, -1)
    for name, score in [("sensitivity", sensitivity), ("specificity", specificity), ("precision", ppv)]:
        expected = compute_confusion_matrix_metric(name, matrix.float())
        torch.testing.assert_close(score(counts).float(), expected)
    torch.testing.assert_close(dice(counts).float(), DiceMetric()(pred, truth))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [  # dice, f_beta, sensitivity, specificity, ppv
        (Counts(tp=0, fp=0, tn=9, fn=0), [1, 1, nan, 1, nan]),
        (Counts(tp=0, fp=2, tn=7, fn=0), [0, 0, nan, 7 / 9, 0]),
        (Counts(tp=0, fp=0, tn=7, fn=2), [0, 0, 0, 1, nan]),
        (Counts(tp=9, fp=0, tn=0, fn=0), [1, 1, 1, nan, 1]),
    ],
)
def test_conventions_for_empty_masks(counts, expected):
    kinds = [counts, Counts(*map(np.array, counts)), Counts(*map(torch.tensor, counts))]
    for kind in kinds:
        np.testing.assert_allclose([float(score(kind)) for score in SCORES], expected)


@pytest.mark.parametrize(
    "of",
    [list, lambda n: np.array(n, np.uint8), lambda n: torch.tensor(n, dtype=torch.uint8)],
    ids=["lists", "arrays", "tensors"],
)
def test_small_integers_do_not_overflow_and_lists_are_taken(of):
    counts = Counts(*(of([n]) for n in (200, 100, 200, 60)))
    expected = [400 / 560, 1000 / 1340, 200 / 260, 200 / 300, 200 / 300]
    assert [float(score(counts)[0]) for score in SCORES] == pytest.approx(expected)


def test_the_value_of_an_empty_mask_can_be_chosen():
    empty = Counts(tp=0, fp=0, tn=9, fn=0)
    assert isnan(dice(empty, empty=nan))
    assert isnan(f_beta(empty, 2, empty=nan))
    assert sensitivity(empty, empty=1) == 1
    assert dice(Counts(tp=0, fp=1, tn=8, fn=0), empty=nan) == 0


def test_scores_of_soft_counts_have_finite_gradients_even_when_empty():
    pred = torch.zeros(1, 1, 5, requires_grad=True)
    dice(confusion_counts(pred, torch.zeros(1, 1, 5))).sum().backward()
    assert pred.grad.isfinite().all()


def test_counts_are_exact_where_float32_is_not():
    mask = torch.ones(1, 1, 2**24 + 1, dtype=torch.bool)
    assert confusion_counts(mask, mask).tp.item() == 2**24 + 1


def test_half_precision_is_summed_in_float32():
    mask = torch.ones(1, 1, 70_000, dtype=torch.float16)
    assert confusion_counts(mask, mask).tp.item() == 70_000


def test_arrays_of_any_layout_are_taken():
    truth = np.zeros((1, 1, 4, 4), dtype=">i2")
    truth[..., 1] = 1
    assert confusion_counts(truth[..., ::-1], truth[..., ::-1]).tp.item() == 4


def test_metatensors_give_plain_tensors():
    mask = MetaTensor(torch.ones(1, 1, 3))
    assert type(confusion_counts(mask, mask).tp) is torch.Tensor


def test_bad_input_is_refused():
    ok = np.ones((1, 1, 4), int)
    with pytest.raises(GeometryError, match=r"\(1, 1, 4\) against truth of shape \(1, 1, 3\)"):
        confusion_counts(ok, ok[..., :3])
    with pytest.raises(GeometryError, match=r"expected the same \(batch, channels, \*spatial\)"):
        confusion_counts(ok[0], ok[0])
    with pytest.raises(ConfigError, match="truth holds 2; expected 0 and 1"):
        confusion_counts(ok, ok * 2)
    with pytest.raises(ConfigError, match="prediction holds -1; expected 0 and 1"):
        confusion_counts(-ok, ok)
    with pytest.raises(ConfigError, match="beta is 0"):
        f_beta(Counts(1, 1, 1, 1), 0)


@pytest.mark.parametrize("values", [[0.0, 2.0, 2.0], [-3.0, 5.0, 0.2]], ids=["a label map", "logits"])
def test_what_is_no_probability_is_refused(values):
    values, truth = torch.tensor([[values]]), torch.tensor([[[0.0, 1.0, 1.0]]])
    with pytest.raises(ConfigError, match=r"prediction holds values from .* expected 0 to 1: probabilities"):
        confusion_counts(values, truth)
    with pytest.raises(ConfigError, match="truth holds values from"):
        confusion_counts(truth, values)
    rounded = confusion_counts(truth * (1 + 1e-6), truth)  # such as the mean of an ensemble
    assert rounded.tp.item() == pytest.approx(2)


def test_what_is_no_number_is_no_score():
    pred = torch.tensor([[[0.0, nan, 1.0]]])
    assert isnan(dice(confusion_counts(pred, torch.ones(1, 1, 3))))


def test_no_image_has_no_counts():
    assert all(c.shape == (0, 2) for c in confusion_counts(torch.zeros(0, 2, 4), torch.zeros(0, 2, 4)))


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=60)
def test_scores_lie_between_0_and_1(tp, fp, tn, fn):
    for score in SCORES:
        value = float(score(Counts(tp, fp, tn, fn)))
        assert isnan(value) or 0 <= value <= 1
