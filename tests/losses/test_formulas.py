"""Every loss of the published works, by the class that docs/explanation/losses.md names for it."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.losses import DiceCELoss, DiceLoss, FocalLoss, GeneralizedDiceLoss, TverskyLoss
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from medseg.data import balanced_class_weights
from medseg.errors import ConfigError
from medseg.losses import BalancedCELoss, FBetaLoss, HeadsLoss, PooledTverskyLoss

exact = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
SMOOTH = {"smooth_nr": 0, "smooth_dr": 0}


def batch(classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in double precision and a label map; the classes are not equally frequent."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, 6, 5, generator=generator, dtype=torch.float64)
    labels = (torch.rand(2, 1, 6, 5, generator=generator) ** 2 * max(classes, 2)).long()
    return logits, labels


def channels(labels: torch.Tensor, classes: int = 3) -> torch.Tensor:
    return one_hot(labels[:, 0], classes).movedim(-1, 1).double()


def with_gradient(loss, logits, target):
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, target)
    value.backward()
    return value.detach(), leaf.grad


def test_tversky_of_a_half_is_dice_and_of_one_is_jaccard():
    logits, labels = batch()
    options = {"softmax": True, "to_onehot_y": True, **SMOOTH}
    for half_or_one, jaccard in ((0.5, False), (1.0, True)):
        tversky = TverskyLoss(alpha=half_or_one, beta=half_or_one, **options)
        exact(
            with_gradient(tversky, logits, labels), with_gradient(DiceLoss(jaccard=jaccard, **options), logits, labels)
        )
    p, y = logits.softmax(1), channels(labels)
    jaccard = ((p * y).sum((2, 3)) / (p + y - p * y).sum((2, 3))).mean()
    exact(DiceLoss(jaccard=True, **options)(logits, labels), 1 - jaccard)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("over_batch", [False, True])
def test_linear_f_beta_is_tversky(beta, over_batch):
    logits, labels = batch()
    options = {"softmax": True, "to_onehot_y": True, "batch": over_batch, "include_background": False}
    ours = FBetaLoss(beta, squared=False, **options)
    tversky = TverskyLoss(alpha=1 / (1 + beta**2), beta=beta**2 / (1 + beta**2), **options)
    exact(with_gradient(ours, logits, labels), with_gradient(tversky, logits, labels))


def test_cross_entropy():
    logits, labels = batch()
    ce = DiceCELoss(lambda_dice=0, softmax=True, to_onehot_y=True)
    exact(with_gradient(ce, logits, labels), with_gradient(cross_entropy, logits, labels[:, 0]))
    logits, labels = batch(1)
    ce = DiceCELoss(lambda_dice=0, sigmoid=True)
    truth = labels.double()
    exact(with_gradient(ce, logits, labels), with_gradient(binary_cross_entropy_with_logits, logits, truth))
    torch.testing.assert_close(FocalLoss(gamma=0)(logits, labels).double(), ce(logits, labels))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.93])
def test_balanced_cross_entropy_of_a_fixed_beta(beta):
    logits, labels = batch(1)
    p, y = logits.sigmoid(), labels
    expected = -(beta * y * p.log() + (1 - beta) * (1 - y) * (1 - p).log()).mean()
    torch.testing.assert_close(FocalLoss(gamma=0, alpha=beta)(logits, labels).double(), expected)


def test_class_weights_of_cross_entropy_and_what_they_are_divided_by():
    logits, labels = batch()
    weight = torch.tensor([0.4, 2.0, 9.0], dtype=torch.float64)
    each = weight[labels[:, 0]] * cross_entropy(logits, labels[:, 0], reduction="none")
    monai = DiceCELoss(lambda_dice=0, softmax=True, to_onehot_y=True, weight=weight)
    exact(monai(logits, labels), each.sum() / weight[labels].sum())  # divided by the weights
    keras = FocalLoss(gamma=0, use_softmax=True, to_onehot_y=True, alpha=weight)
    torch.testing.assert_close(3 * keras(logits, labels).double(), each.mean())  # by the voxels, and by the classes


def test_focal_by_hand_and_what_one_alpha_means():
    logits, labels = batch()
    p, y = logits.softmax(1), channels(labels)
    each = -y * (1 - p) ** 2 * p.log()
    focal = partial(FocalLoss, gamma=2, use_softmax=True, to_onehot_y=True)
    torch.testing.assert_close(focal(alpha=[0.25] * 3)(logits, labels).double(), 0.25 * each.mean())
    # one number is the weight of all but channel 0, which gets the rest
    one = (torch.tensor([0.75, 0.25, 0.25]).view(3, 1, 1) * each).mean()
    torch.testing.assert_close(focal(alpha=0.25)(logits, labels).double(), one)
    logits, labels = batch(1)
    p, y = logits.sigmoid(), labels
    expected = -(0.25 * y * (1 - p) ** 2 * p.log() + 0.75 * (1 - y) * p**2 * (1 - p).log()).mean()
    torch.testing.assert_close(FocalLoss(gamma=2, alpha=0.25)(logits, labels).double(), expected)


def test_softmax_dice_is_cross_entropy_and_dice():
    logits, labels = batch()
    p, y = logits.softmax(1), channels(labels)
    dice = 1 - (2 * (p * y).sum((2, 3)) / (p + y).sum((2, 3))).mean()
    loss = DiceCELoss(lambda_ce=0.3, lambda_dice=0.7, softmax=True, to_onehot_y=True, **SMOOTH)
    exact(loss(logits, labels), 0.3 * cross_entropy(logits, labels[:, 0]) + 0.7 * dice)


WEIGHTED = {
    "cross-entropy": {"_target_": "DiceCELoss", "lambda_dice": 0, "softmax": True, "weight": "@tensor"},
    "softmax-Dice": {"_target_": "DiceCELoss", "softmax": True, "weight": "@tensor"},
    "focal": {"_target_": "FocalLoss", "use_softmax": True, "alpha": "@weights"},
    "Dice": {"_target_": "DiceLoss", "softmax": True, "weight": "@weights"},
    "DCL_w": {"_target_": "medseg.losses.PooledTverskyLoss", "softmax": True, "weight": "@weights"},
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_bundle_gives_the_weights_of_the_training_set_to_each_loss(name):
    logits, labels = batch()
    counts = torch.bincount(labels.flatten(), minlength=3).tolist()
    multipliers = [1, 1, 4]  # of background, kidney and tumor
    losses = {}
    for key, by_class in (("plain", [1, 1, 1]), ("weighted", multipliers)):
        config = {
            "statistics": {"class_weights": balanced_class_weights(counts)},
            "multipliers": by_class,
            "weights": "$[w * m for w, m in zip(@statistics['class_weights'], @multipliers)]",
            "tensor": "$torch.tensor(@weights)",
            "loss": {**WEIGHTED[name], "to_onehot_y": True},
        }
        parser = ConfigParser(config)
        parser["imports"] = ["$import torch"]
        losses[key] = parser.get_parsed_content("loss")
    tumor = labels == 2
    assert tumor.any()

    def share_of_tumor(loss):
        _, gradient = with_gradient(loss, logits.float(), labels)
        return (gradient[:, 2:][tumor].abs().sum() / gradient.abs().sum()).item()

    assert share_of_tumor(losses["weighted"]) > share_of_tumor(losses["plain"])


LOSSES = {
    "cross-entropy": DiceCELoss(lambda_dice=0, softmax=True, to_onehot_y=True),
    "weighted cross-entropy": DiceCELoss(
        lambda_dice=0, softmax=True, to_onehot_y=True, weight=torch.tensor([0.4, 2.0, 9.0], dtype=torch.float64)
    ),
    "balanced cross-entropy": BalancedCELoss(),
    "balanced cross-entropy of the batch": BalancedCELoss(batch=True),
    "Dice": DiceLoss(softmax=True, to_onehot_y=True),
    "squared Dice": DiceLoss(softmax=True, to_onehot_y=True, squared_pred=True),
    "Jaccard": DiceLoss(softmax=True, to_onehot_y=True, jaccard=True),
    "Tversky": TverskyLoss(softmax=True, to_onehot_y=True, alpha=0.3, beta=0.7),
    "F2": FBetaLoss(2, softmax=True, to_onehot_y=True),
    "linear F2": FBetaLoss(2, squared=False, softmax=True, to_onehot_y=True),
    "F2 of the batch": FBetaLoss(2, softmax=True, to_onehot_y=True, batch=True),
    "softmax-Dice": DiceCELoss(softmax=True, to_onehot_y=True),
    "DCL_w": PooledTverskyLoss(weight=[0.4, 2, 9], softmax=True, to_onehot_y=True),
    "JCL_w": PooledTverskyLoss(1, 1, weight=[0.4, 2, 9], softmax=True, to_onehot_y=True),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_against_finite_differences(name):
    logits, labels = batch()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, labels), logits.requires_grad_())


def test_gradients_of_focal_against_finite_differences():
    logits, labels = batch()  # computed in float32, whatever it gets
    loss = FocalLoss(gamma=2, use_softmax=True, to_onehot_y=True, alpha=[0.4, 2, 9])
    gradient = with_gradient(loss, logits, labels)[1]
    step = torch.zeros_like(logits)
    for index in np.ndindex(2, 3, 2, 2):
        step.zero_()[index] = 1e-2
        slope = (loss(logits + step, labels) - loss(logits - step, labels)).item() / 2e-2
        assert slope == pytest.approx(gradient[index].item(), rel=2e-2, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in LOSSES if "softmax" not in name])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=10)
def test_the_truth_is_best_and_nearer_is_better(name, seed):
    labels = batch(seed=seed)[1]
    labels[:, :, 0, :3] = torch.arange(3)  # each class is somewhere
    sure = channels(labels) * 40
    other = batch(seed=seed + 1)[0]
    losses = [LOSSES[name](sure * t + other * (1 - t), labels).item() for t in (0.0, 0.1, 0.2, 0.4, 1.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_classes_are_in_the_order_of_the_label_values(name):
    labels = torch.tensor([[[[0, 0, 0, 1, 1, 2]]]])
    right = channels(labels) * 20
    swapped = right[:, [0, 2, 1]]
    assert LOSSES[name](right, labels) < 1e-4 < LOSSES[name](swapped, labels)


NOTHING, EVERYTHING = -40.0, 40.0


@pytest.mark.parametrize(
    ("loss", "nothing", "everything"),
    [
        (DiceLoss(sigmoid=True), 0, 1),
        (DiceLoss(sigmoid=True, jaccard=True), 0, 1),
        (TverskyLoss(sigmoid=True), 0, 1),
        (FBetaLoss(2, sigmoid=True), 0, 1),
        (FBetaLoss(2, squared=False, sigmoid=True), 0, 1),
        (PooledTverskyLoss(sigmoid=True), 0, 1),
        (BalancedCELoss(), 0, 0),
        (DiceCELoss(lambda_dice=0, sigmoid=True), 0, 40),
        (HeadsLoss(DiceLoss(sigmoid=True)), 0, 1),
    ],
)
def test_where_there_is_nothing_to_find(loss, nothing, everything):
    empty = torch.zeros(2, 1, 8, 8)
    for logit, expected in ((NOTHING, nothing), (EVERYTHING, everything)):
        logits = torch.full((2, 1, 8, 8), logit, requires_grad=True)
        value = loss(logits, empty)
        value.backward()
        assert value.item() == pytest.approx(expected, abs=1e-4)
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "loss",
    [
        FBetaLoss(2, sigmoid=True),
        FBetaLoss(2, squared=False, sigmoid=True),
        PooledTverskyLoss(sigmoid=True),
        BalancedCELoss(),
        HeadsLoss(DiceLoss(sigmoid=True)),
        HeadsLoss(TverskyLoss(sigmoid=True)),
    ],
)
def test_sums_beyond_the_largest_half_precision_number(loss, dtype):
    truth = torch.zeros(1, 1, 128, 1024)
    truth[..., 1:] = 1
    logits = torch.full((1, 1, 1, 1), 1.0, dtype=dtype).expand(truth.shape).clone().requires_grad_()
    value = loss(logits, truth.to(dtype))
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(logits.detach().double(), truth).item(), rel=1e-5)
    assert logits.grad.isfinite().all()


def test_generalized_dice_is_pooled_with_weights_of_the_batch():
    logits, labels = batch()
    volumes = channels(labels).sum((0, 2, 3))
    options = {"softmax": True, "to_onehot_y": True}
    for kind, weight in (("uniform", None), ("simple", 1 / volumes), ("square", 1 / volumes**2)):
        monai = GeneralizedDiceLoss(batch=True, w_type=kind, **options, **SMOOTH)
        ours = PooledTverskyLoss(weight=weight, smooth=0, **options)
        torch.testing.assert_close(ours(logits, labels), monai(logits, labels), rtol=1e-6, atol=0)


OURS = {
    "F2": FBetaLoss(2, softmax=True, to_onehot_y=True),
    "DCL_w": PooledTverskyLoss(weight=[1, 2, 3], softmax=True, to_onehot_y=True),
    "balanced cross-entropy": BalancedCELoss(),
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64, torch.float32])
def test_labels_of_any_type_are_taken_and_those_of_no_class_refused(name, dtype):
    logits, labels = batch()
    exact(OURS[name](logits, labels.to(dtype)), OURS[name](logits, labels))
    labels[0, 0, 0, 0] = 3
    with pytest.raises(ConfigError, match="target holds values from 0 to 3; expected labels from 0 to 2"):
        OURS[name](logits, labels.to(dtype))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("value", [-1, 0.5, float("nan")])
def test_labels_to_ignore_or_interpolated_are_refused(name, value):
    logits, labels = batch()
    labels = labels.double()
    labels[0, 0, 0, 0] = value
    with pytest.raises(ConfigError, match=r"target holds (values from -1|fractions)"):
        OURS[name](logits, labels)


@pytest.mark.parametrize("loss", [FBetaLoss(2, sigmoid=True), PooledTverskyLoss(sigmoid=True), BalancedCELoss()])
def test_a_mask_of_0_and_255_is_refused(loss):
    logits, labels = batch(1)
    with pytest.raises(ConfigError, match=r"(truth|target) holds values from 0 to 255; expected 0 to 1"):
        loss(logits, labels.clamp(max=1) * 255)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint16])
def test_masks_of_any_type_are_taken(dtype):
    logits, labels = batch()
    truth = channels(labels)
    exact(FBetaLoss(2, softmax=True)(logits, truth.to(dtype)), FBetaLoss(2, softmax=True)(logits, truth))


@pytest.mark.parametrize("loss", [FBetaLoss(2), PooledTverskyLoss()])
def test_logits_without_activation_are_refused(loss):
    logits, labels = batch()
    with pytest.raises(ConfigError, match=r"prediction holds values from .* expected 0 to 1: probabilities"):
        loss(logits, channels(labels))


@pytest.mark.parametrize("loss", [FBetaLoss(2, sigmoid=True), PooledTverskyLoss(sigmoid=True), BalancedCELoss()])
def test_what_is_no_number_stays_none(loss):
    """So that the trainer stops, and a GradScaler leaves the step out."""
    logits, labels = batch(1)
    assert loss(logits * torch.nan, labels).isnan()
