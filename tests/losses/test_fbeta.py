import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.losses import DiceLoss

from medseg.errors import ConfigError, GeometryError
from medseg.losses import FBetaLoss


def batch(channels: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pred = torch.rand(3, channels, 6, 5, generator=generator, dtype=dtype)
    truth = (torch.rand(3, channels, 6, 5, generator=generator) < 0.3).to(dtype)
    return pred, truth


def test_squared_form_by_hand():
    pred, truth = torch.tensor([[[0.5, 1.0, 0.0, 0.25]]]), torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    # 1 - (1 + 4) * 1.5 / (4 * 2 + 0.25 + 1 + 0.0625)
    assert FBetaLoss(beta=2, smooth=0)(pred, truth).item() == pytest.approx(1 - 7.5 / 9.3125, rel=1e-6)


def test_linear_form_by_hand():
    pred, truth = torch.tensor([[[0.5, 1.0, 0.0, 0.25]]]), torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    # 1 - (1 + 4) * 1.5 / (4 * 2 + 1.75)
    assert FBetaLoss(beta=2, squared=False, smooth=0)(pred, truth).item() == pytest.approx(1 - 7.5 / 9.75, rel=1e-6)


def test_beta_one_is_dice_in_both_forms():
    pred, truth = batch(dtype=torch.float64)
    for squared in (True, False):
        dice = DiceLoss(squared_pred=squared, smooth_nr=0, smooth_dr=0)(pred, truth)
        torch.testing.assert_close(FBetaLoss(1, squared=squared, smooth=0)(pred, truth), dice, rtol=1e-12, atol=0)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("activation", [{}, {"sigmoid": True}, {"softmax": True}])
def test_gradients_against_finite_differences(squared, activation):
    pred, truth = batch(channels=2, dtype=torch.float64)
    loss = FBetaLoss(2, squared=squared, **activation)
    assert torch.autograd.gradcheck(lambda p: loss(p, truth), pred.requires_grad_())


def test_each_image_counts_alike_whatever_its_size():
    pred, truth = torch.zeros(2, 1, 100), torch.zeros(2, 1, 100)
    truth[0, 0, :1] = pred[0, 0, :1] = 1  # a small mask, found
    truth[1, 0, :90] = 1  # a large one, missed
    assert FBetaLoss(smooth=0)(pred, truth).item() == pytest.approx(0.5)
    assert FBetaLoss(smooth=0, reduction="sum")(pred, truth).item() == pytest.approx(1)
    assert FBetaLoss(smooth=0, reduction="none")(pred, truth).tolist() == [[0], [1]]


def test_classes_are_averaged_one_against_the_rest():
    pred, truth = batch(channels=3)
    each = [FBetaLoss(2)(pred[:, c : c + 1], truth[:, c : c + 1]) for c in range(3)]
    torch.testing.assert_close(FBetaLoss(2)(pred, truth), torch.stack(each).mean())
    torch.testing.assert_close(FBetaLoss(2, include_background=False)(pred, truth), torch.stack(each[1:]).mean())
    torch.testing.assert_close(FBetaLoss(2, reduction="sum")(pred, truth), 3 * torch.stack(each).mean())
    assert FBetaLoss(2, reduction="none")(pred, truth).shape == (3, 3)


def test_logits_and_label_maps():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 1, 4, 4))
    onehot = torch.nn.functional.one_hot(labels[:, 0], 3).movedim(-1, 1)
    expected = FBetaLoss(2)(logits.softmax(1), onehot)
    torch.testing.assert_close(FBetaLoss(2, softmax=True, to_onehot_y=True)(logits, labels), expected)
    torch.testing.assert_close(
        FBetaLoss(2, sigmoid=True)(logits, onehot.bool()), FBetaLoss(2)(logits.sigmoid(), onehot.float())
    )


@given(st.floats(1, 8), st.booleans(), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_the_true_mask_is_best(beta, squared, seed):
    pred, truth = batch(seed=seed, dtype=torch.float64)
    truth[:, :, 0, 0] = 1
    loss = FBetaLoss(beta, squared=squared)
    perfect = loss(truth, truth)
    assert perfect.item() == pytest.approx(0, abs=1e-12)
    assert 0 < loss(pred, truth) <= 1


def test_a_larger_beta_punishes_misses_more_than_false_alarms():
    truth = torch.tensor([[[1.0] * 4 + [0.0] * 4]])
    missed = torch.tensor([[[1.0] * 2 + [0.0] * 6]])
    alarm = torch.tensor([[[1.0] * 6 + [0.0] * 2]])
    for squared in (True, False):
        loss = FBetaLoss(4, squared=squared)
        assert loss(missed, truth) > 2 * loss(alarm, truth)


def test_the_trap_below_one_is_real_and_refused_by_name():
    pred, truth = torch.full((1, 1, 9), 0.5), torch.ones(1, 1, 9)
    squared = 1 - 1.25 * (pred * truth).sum() / (0.25 * truth.pow(2).sum() + pred.pow(2).sum())
    assert squared.item() == pytest.approx(-0.25)
    with pytest.raises(ConfigError, match=r"beta 0.5 < 1 with squared=True.*use squared=False"):
        FBetaLoss(0.5)
    loss = FBetaLoss(0.5, squared=False)
    assert loss(truth, truth) < loss(pred, truth)


def test_empty_truth_is_finite():
    empty = torch.zeros(1, 1, 50)
    for squared in (True, False):
        loss = FBetaLoss(2, squared=squared)
        assert loss(empty, empty).item() == 0
        pred = torch.full((1, 1, 50), 0.5, requires_grad=True)
        value = loss(pred, empty)
        value.backward()
        assert value.item() == pytest.approx(1, abs=1e-3)
        assert pred.grad.isfinite().all()
        assert (pred.grad >= 0).all()
    taught = torch.full((1, 1, 50), 0.5, requires_grad=True)
    FBetaLoss(2, smooth=1)(taught, empty).backward()
    assert taught.grad.min() > 100 * pred.grad.min()


def test_a_wrong_certainty_still_has_a_gradient_in_half_precision():
    logits = torch.full((1, 1, 8), 12.0, dtype=torch.bfloat16, requires_grad=True)
    truth = torch.tensor([[[1.0] + [0.0] * 7]])
    FBetaLoss(sigmoid=True)(logits, truth).backward()
    assert (logits.grad[0, 0, 1:] > 0).all(), "a sigmoid in bfloat16 is exactly 1 here"


def test_autocast_and_compile_give_the_same_number():
    logits, truth = batch()
    loss = FBetaLoss(2, sigmoid=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(logits, truth), loss(logits, truth.to(torch.uint8)))
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, truth), loss(logits, truth))


def test_metatensors_are_taken_and_a_plain_number_returned():
    pred, truth = batch()
    leaf = MetaTensor(pred).requires_grad_()
    value = FBetaLoss()(leaf, MetaTensor(truth))
    assert type(value) is torch.Tensor
    value.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(value, FBetaLoss()(pred, truth))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0}, "beta is 0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"smooth": -1}, "smooth is -1"),
        ({"sigmoid": True, "softmax": True}, "sigmoid and softmax are both on"),
        ({"reduction": "median"}, "'median'; expected 'mean', 'sum' or 'none'"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        FBetaLoss(**arguments)


def test_softmax_of_one_channel_is_refused():
    with pytest.raises(ConfigError, match="one channel"):
        FBetaLoss(softmax=True)(*batch())


def test_shapes_that_differ_are_refused():
    with pytest.raises(GeometryError, match=r"\(3, 1, 6, 5\) against truth of shape \(3, 1, 6, 4\)"):
        FBetaLoss()(batch()[0], batch()[1][..., :4])


@pytest.mark.parametrize("squared", [True, False])
def test_over_the_batch_false_alarms_in_an_empty_image_cost(squared):
    truth = torch.zeros(2, 1, 4, 4)
    truth[0, 0, :2] = 1
    pred = truth.clone()
    pred[1, 0, 0] = 0.5
    pred.requires_grad_()
    loss = FBetaLoss(beta=2, squared=squared, batch=True)(pred, truth)
    # 8 found, none missed, and 4 false alarms of a half (of a quarter, squared), weighted 1 / 5
    alarms = 4 * (0.25 if squared else 0.5) / 5
    assert loss.item() == pytest.approx(1 - 8 / (8 + alarms), abs=1e-5)
    loss.backward()
    assert (pred.grad[1, 0, 0] > 1e-3).all()


def test_over_the_batch_is_one_large_image():
    torch.manual_seed(0)
    pred, truth = torch.rand(3, 2, 4, 4), (torch.rand(3, 2, 4, 4) > 0.5).float()
    as_one = [x.movedim(0, 2).flatten(2)[None] for x in (pred, truth)]
    assert torch.allclose(FBetaLoss(beta=2, batch=True)(pred, truth), FBetaLoss(beta=2)(*as_one))


@pytest.mark.parametrize("squared", [True, False])
def test_sums_of_a_large_volume_are_exact_enough(squared):
    # 2^22 numbers: torch's vector_norm, in float32 on the CPU, would be half a percent off
    pred = torch.full((1, 1, 64, 256, 256), 0.731)
    truth = torch.zeros_like(pred)
    truth[..., 128:] = 1
    p = pred.flatten()[0].item()
    dice = 2 * (p / 2) / (1 / 2 + (p**2 if squared else p))
    assert FBetaLoss(1, squared=squared)(pred, truth).item() == pytest.approx(1 - dice, rel=1e-5)
