import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.losses import DiceLoss, TverskyLoss

from medseg.errors import ConfigError, GeometryError
from medseg.losses import PooledTverskyLoss
from medseg.metrics import Counts, confusion_counts, pooled_tversky

weights = st.lists(st.floats(0.01, 100), min_size=3, max_size=3)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pred = torch.rand(2, 3, 4, 3, generator=generator, dtype=torch.float64)
    return pred, (torch.rand(2, 3, 4, 3, generator=generator) < 0.3).double()


def test_by_hand():
    pred = torch.tensor([[[0.5, 1.0, 0.0], [0.5, 0.0, 1.0]]])
    truth = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    # class 0: 1.5 found, 0.5 missed; class 1: 1 found, 0.5 false
    assert PooledTverskyLoss(smooth=0)(pred, truth).item() == pytest.approx(1 - 2.5 / 3)
    loss = PooledTverskyLoss(alpha=0.3, beta=0.7, weight=[1, 10], smooth=0)
    assert loss(pred, truth).item() == pytest.approx(1 - 11.5 / (11.5 + 0.3 * 5 + 0.7 * 0.5))


@given(weights, st.floats(0, 2), st.floats(0.01, 2), st.integers(0, 1000))
def test_voxel_by_voxel(weight, alpha, beta, seed):
    pred, truth = batch(seed)
    found = whole = 0.0
    for b, c, x, y in np.ndindex(2, 3, 4, 3):
        p, t = pred[b, c, x, y].item(), truth[b, c, x, y].item()
        found += weight[c] * t * p
        whole += weight[c] * (t * p + alpha * (1 - t) * p + beta * t * (1 - p))
    loss = PooledTverskyLoss(alpha, beta, weight)(pred, truth).item()
    assert loss == pytest.approx(1 - (found + 1e-6) / (whole + 1e-6), rel=1e-5)
    assert 0 <= loss <= 1


@given(weights, st.integers(0, 1000))
def test_only_the_ratios_of_the_weights_count(weight, seed):
    losses = [PooledTverskyLoss(weight=[k * w for w in weight], smooth=0)(*batch(seed)).item() for k in (1, 7)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_of_one_class_it_is_tversky_over_the_batch():
    pred, truth = (x[:, :1] for x in batch())
    monai = TverskyLoss(alpha=0.3, beta=0.7, batch=True, smooth_nr=1e-6, smooth_dr=1e-6)
    torch.testing.assert_close(PooledTverskyLoss(0.3, 0.7)(pred, truth), monai(pred, truth))


def test_a_heavy_class_counts_inside_the_sums_and_not_as_a_factor():
    pred, truth = batch()
    assert DiceLoss(batch=True, weight=[1, 1, 50])(pred, truth) > 1 > PooledTverskyLoss(weight=[1, 1, 50])(pred, truth)
    # with all the weight on one class it is that class's loss
    alone = PooledTverskyLoss(weight=[0, 0, 5])(pred, truth)
    torch.testing.assert_close(alone, PooledTverskyLoss()(pred[:, 2:], truth[:, 2:]), rtol=1e-6, atol=0)


def test_false_alarms_in_an_image_without_the_object_cost():
    truth = torch.zeros(2, 1, 10)
    truth[0, 0, :5] = 1
    pred = truth.clone()
    pred[1, 0, :2] = 0.5
    pred.requires_grad_()
    loss = PooledTverskyLoss()(pred, truth)
    assert loss.item() == pytest.approx(1 - 5 / 5.5)
    loss.backward()
    assert (pred.grad[1] > 0.01).all()


def test_the_background_is_left_out_with_its_weight():
    pred, truth = batch()
    loss = PooledTverskyLoss(weight=[2, 9], include_background=False)
    torch.testing.assert_close(loss(pred, truth), PooledTverskyLoss(weight=[2, 9])(pred[:, 1:], truth[:, 1:]))
    with pytest.raises(ConfigError, match=r"weight: .* a number for each of 2 classes"):
        PooledTverskyLoss(weight=[1, 2, 9], include_background=False)(pred, truth)


def test_the_loss_is_one_minus_the_score():
    pred, truth = batch()
    score = pooled_tversky(confusion_counts(pred, truth), 1, 1, [1, 2, 9])
    assert PooledTverskyLoss(1, 1, [1, 2, 9])(pred, truth).item() == pytest.approx(1 - score.item())
    arrays = pooled_tversky(confusion_counts(pred.numpy(), truth.numpy()), 1, 1, [1, 2, 9])
    assert arrays.item() == pytest.approx(score.item())


def test_the_score_of_hard_counts_pools_and_does_not_average():
    counts = Counts(tp=[[90], [0]], fp=[[0], [0]], tn=None, fn=[[10], [100]])
    assert pooled_tversky(counts, 1, 1).item() == pytest.approx(90 / 200)
    nothing = Counts(tp=[[0]], fp=[[0]], tn=[[9]], fn=[[0]])
    assert pooled_tversky(nothing).item() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1}, "alpha -1, beta 0.5"),
        ({"alpha": 0, "beta": 0}, "a positive one"),
        ({"alpha": math.nan}, "alpha nan"),
        ({"weight": 2.0}, "a list of a number"),
        ({"weight": [1, -1]}, "a number from 0 per class"),
        ({"weight": [0, 0]}, "one positive"),
        ({"weight": [1, math.inf]}, "a number from 0 per class"),
        ({"weight": [1, math.nan]}, "a number from 0 per class"),
        ({"smooth": -1}, "smooth is -1"),
        ({"sigmoid": True, "softmax": True}, "at most one"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        PooledTverskyLoss(**arguments)


def test_what_does_not_fit_is_refused():
    pred, truth = batch()
    with pytest.raises(GeometryError, match=r"\(2, 3, 4, 3\) against truth of shape \(2, 3, 4, 2\)"):
        PooledTverskyLoss()(pred, truth[..., :2])
    with pytest.raises(GeometryError, match=r"target of shape \(2, 3, 4, 3\): with to_onehot_y, expected a label map"):
        PooledTverskyLoss(to_onehot_y=True)(pred, truth)
    with pytest.raises(ConfigError, match=r"each of 3 classes"):
        PooledTverskyLoss(weight=[1, 2])(pred, truth)


def test_it_compiles():
    pred, truth = batch()
    loss = PooledTverskyLoss(weight=[1, 2, 9])
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(pred, truth), loss(pred, truth))
