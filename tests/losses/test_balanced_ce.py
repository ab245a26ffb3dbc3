import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.losses import FocalLoss
from torch.nn.functional import cross_entropy, one_hot

from medseg.errors import GeometryError
from medseg.losses import BalancedCELoss


def batch(channels: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, channels, 6, 5, generator=generator, dtype=torch.float64)
    return logits, (torch.rand(2, 1, 6, 5, generator=generator) ** 2 * max(channels, 2)).long()


def test_by_hand():
    logits, truth = torch.tensor([[[0.0, 1.0, 2.0, -1.0]]]), torch.tensor([[[1, 0, 0, 0]]])
    p = [1 / (1 + math.exp(-x)) for x in (0.0, 1.0, 2.0, -1.0)]
    expected = 0.75 * math.log(p[0]) + 0.25 * sum(math.log(1 - q) for q in p[1:])
    assert BalancedCELoss()(logits, truth).item() == pytest.approx(-expected / 4)


def test_the_formula_image_by_image():
    logits, truth = batch()
    expected = [
        FocalLoss(gamma=0, alpha=1 - y.double().mean().item())(x[None], y[None]) for x, y in zip(*batch(), strict=True)
    ]
    assert BalancedCELoss()(logits, truth).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)
    over_batch = FocalLoss(gamma=0, alpha=1 - truth.double().mean().item())(logits, truth)
    assert BalancedCELoss(batch=True)(logits, truth).item() == pytest.approx(over_batch.item(), rel=1e-6)


def test_several_classes_by_their_shares():
    logits, labels = batch(3)
    expected = []
    for x, y in zip(logits, labels, strict=True):
        weight = torch.stack([(y != c).double().mean() for c in range(3)])
        expected.append((weight[y] * cross_entropy(x[None], y, reduction="none")).mean())
    torch.testing.assert_close(BalancedCELoss()(logits, labels), torch.stack(expected).mean())
    channels = one_hot(labels[:, 0], 3).movedim(-1, 1)
    torch.testing.assert_close(BalancedCELoss()(logits, channels), BalancedCELoss()(logits, labels))


@given(st.integers(0, 1000), st.booleans())
def test_two_classes_with_a_softmax_are_one_with_a_sigmoid(seed, over_batch):
    logits, truth = batch(seed=seed)
    loss = BalancedCELoss(over_batch)
    two = torch.cat([torch.zeros_like(logits), logits], 1)
    torch.testing.assert_close(loss(two, truth), loss(logits, truth))


def test_a_rare_class_is_worth_as_much_as_the_rest():
    truth = torch.zeros(1, 1, 100)
    truth[..., 0] = 1
    logits = torch.zeros(1, 1, 100, requires_grad=True)
    BalancedCELoss()(logits, truth).backward()
    assert logits.grad[..., 0].item() == pytest.approx(-logits.grad[..., 1:].sum().item())


def test_an_image_of_one_class_teaches_only_within_a_batch():
    truth = torch.zeros(2, 1, 8)
    truth[0, 0, :2] = 1
    for over_batch in (False, True):
        logits = torch.ones(2, 1, 8, requires_grad=True)
        BalancedCELoss(over_batch)(logits, truth).backward()
        assert (logits.grad[1] > 0).all() == over_batch
        assert (logits.grad[0] != 0).all()


def test_certainty_is_finite():
    logits = torch.full((1, 1, 4), -200.0, requires_grad=True)
    loss = BalancedCELoss()(logits, torch.tensor([[[1, 0, 0, 0]]]))
    assert loss.item() == pytest.approx(0.75 * 200 / 4)
    loss.backward()
    assert logits.grad.isfinite().all()


def test_metatensors_and_compile():
    logits, labels = batch(3)
    loss = BalancedCELoss()
    assert type(loss(MetaTensor(logits), MetaTensor(labels))) is torch.Tensor
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, labels), loss(logits, labels))


@pytest.mark.parametrize(("channels", "target"), [(1, (2, 1, 6, 4)), (3, (2, 2, 6, 5)), (3, (2, 6, 5)), (1, (2, 6, 5))])
def test_what_does_not_fit_is_refused(channels, target):
    with pytest.raises(GeometryError, match=r"input of shape \(2, \d, 6, 5\) against target of shape"):
        BalancedCELoss()(batch(channels)[0], torch.zeros(target))
