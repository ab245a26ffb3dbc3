import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.losses import DeepSupervisionLoss, DiceCELoss, DiceLoss
from monai.networks.nets import DynUNet

from medseg.errors import ConfigError, GeometryError
from medseg.losses import FBetaLoss, HeadsLoss


def batch(heads: int = 2, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, heads, classes, 6, 5, generator=generator), torch.randint(
        0, classes, (2, 1, 6, 5), generator=generator
    )


def dice() -> DiceLoss:
    return DiceLoss(softmax=True, to_onehot_y=True)


def test_two_heads_have_a_loss_each():
    logits, labels = batch(2)
    f1, ce = FBetaLoss(1, softmax=True, to_onehot_y=True), DiceCELoss(lambda_dice=0, softmax=True, to_onehot_y=True)
    expected = f1(logits[:, 0], labels) + ce(logits[:, 1], labels)
    torch.testing.assert_close(HeadsLoss([f1, ce])(logits, labels), expected)
    weighted = 0.25 * f1(logits[:, 0], labels) + 2 * ce(logits[:, 1], labels)
    torch.testing.assert_close(HeadsLoss([f1, ce], [0.25, 2])(logits, labels), weighted)


def test_in_evaluation_it_is_the_first_loss_without_weight():
    logits, labels = batch(2)
    loss = HeadsLoss([dice(), FBetaLoss(softmax=True, to_onehot_y=True)], [0.25, 2])
    torch.testing.assert_close(loss(logits[:, 0], labels), dice()(logits[:, 0], labels))


@pytest.mark.parametrize("heads", [1, 3, 5])
def test_deep_supervision_is_monais_at_full_size(heads):
    logits, labels = batch(heads)
    ours = HeadsLoss(dice(), weights=[0.5**i for i in range(heads)])
    monai = DeepSupervisionLoss(dice(), weight_mode="exp")
    torch.testing.assert_close(ours(logits, labels), monai(list(logits.unbind(1)), labels))
    same = DeepSupervisionLoss(dice(), weight_mode="same")
    torch.testing.assert_close(HeadsLoss(dice())(logits, labels), same(list(logits.unbind(1)), labels))


def test_it_takes_what_monais_dynunet_gives():
    torch.manual_seed(0)
    network = DynUNet(
        2, 1, 3, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=[4, 4, 8, 8], deep_supervision=True, deep_supr_num=2
    )
    image, labels = torch.randn(2, 1, 16, 16), torch.randint(0, 3, (2, 1, 16, 16))
    loss = HeadsLoss(dice(), weights=[1, 0.5, 0.25])
    loss(network(image), labels).backward()
    assert all(head.conv.conv.weight.grad.abs().sum() > 0 for head in network.deep_supervision_heads)
    assert network.eval()(image).ndim == 4
    torch.testing.assert_close(loss(network(image), labels), dice()(network(image), labels))


@given(st.lists(st.floats(0, 4), min_size=3, max_size=3))
def test_gradients_reach_each_head_by_its_weight(weights):
    logits, labels = batch(3)
    logits[:] = logits[:, :1].clone()
    logits.requires_grad_()
    HeadsLoss(dice(), weights)(logits, labels).backward()
    one = logits.detach()[:, 0].clone().requires_grad_()
    dice()(one, labels).backward()
    for head, weight in enumerate(weights):
        torch.testing.assert_close(logits.grad[:, head], weight * one.grad)


def test_gradients_against_finite_differences():
    logits, labels = batch(2)
    loss = HeadsLoss([dice(), DiceCELoss(softmax=True, to_onehot_y=True)], [1, 0.5])
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits.double().requires_grad_())


def test_metatensors_are_taken_and_a_plain_number_returned():
    logits, labels = batch(2)
    value = HeadsLoss(dice())(MetaTensor(logits), MetaTensor(labels))
    assert type(value) is torch.Tensor
    torch.testing.assert_close(value, HeadsLoss(dice())(logits, labels))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_none_are_refused(weight):
    with pytest.raises(ConfigError, match=r"weights: \[1.0, .*\] given, numbers from 0"):
        HeadsLoss(dice(), [1.0, weight])


def test_losses_move_with_it():
    loss = HeadsLoss([DiceLoss(weight=[1.0, 2.0, 3.0]), DiceLoss()]).to(torch.float64)
    assert loss.losses[0].class_weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("loss", "weights"),
    [([], None), ([dice(), dice()], [1.0]), ([dice(), dice()], []), (dice(), [])],
)
def test_losses_and_weights_that_do_not_fit_are_refused(loss, weights):
    with pytest.raises(ConfigError, match=r"loss, weights: \d and .* given"):
        HeadsLoss(loss, weights)


@pytest.mark.parametrize(
    ("loss", "shape", "target"),
    [
        (HeadsLoss([dice(), dice()]), (2, 3, 3, 6, 5), (2, 1, 6, 5)),
        (HeadsLoss(dice(), [1, 0.5]), (2, 3, 3, 6, 5), (2, 1, 6, 5)),
        (HeadsLoss(dice()), (2, 2, 3, 6, 5), (2, 6, 5)),
        (HeadsLoss(dice()), (2, 3, 6), (2, 1, 6, 5)),
    ],
)
def test_heads_that_do_not_fit_are_refused(loss, shape, target):
    with pytest.raises(GeometryError, match=r"expected \(batch, \d heads, classes, \*spatial\) or"):
        loss(torch.zeros(shape), torch.zeros(target))
