"""An ensemble's activation is the pooled probability, whoever computes it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import SlidingWindowInferer
from monai.transforms import MeanEnsemble, VoteEnsemble

from medseg.errors import ConfigError
from medseg.inference import Ensemble, pool_logits


class Constant(torch.nn.Module):
    """Emits the same logits for every image."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, image):
        return self.logits.expand(len(image), *self.logits.shape[1:])


def some(activation, count=3, channels=4, scale=4.0):
    torch.manual_seed(1)
    return [scale * torch.randn(2, channels, 6, 5) for _ in range(count)]


def activate(logits, activation):
    return logits.sigmoid() if activation == "sigmoid" else logits.softmax(1)


@pytest.mark.parametrize("weights", [None, [0.2, 3.0, 1.0]])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_activation_of_a_mean_is_the_mean_of_monai(activation, weights):
    predictions = some(activation)
    expected = MeanEnsemble(weights)([activate(p, activation) for p in predictions])
    found = activate(pool_logits(predictions, activation, weights=weights), activation)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_vote_decides_as_that_of_monai(activation):
    predictions = some(activation, count=5)
    pooled = pool_logits(predictions, activation, "vote")
    if activation == "sigmoid":
        expected = VoteEnsemble()([(p.sigmoid() >= 0.5).float() for p in predictions])
        assert torch.equal((pooled.sigmoid() >= 0.5).float(), expected)
    else:
        votes = [p.argmax(1)[:, None] for p in predictions]
        shares = torch.stack([torch.cat([v == c for c in range(4)], 1).float() for v in votes]).mean(0)
        torch.testing.assert_close(pooled.softmax(1), shares, rtol=0, atol=1e-5)
        # where two classes have as many votes, MONAI and we both take the first
        for sample, decided in enumerate(pooled.argmax(1)):
            assert torch.equal(decided, VoteEnsemble(num_classes=4)([v[sample] for v in votes])[0])


def test_by_hand():
    yes, no = torch.full((1, 1, 1), math.log(9.0)), torch.full((1, 1, 1), -math.log(4.0))  # 0.9 and 0.2
    assert pool_logits([yes, no, no], "sigmoid").sigmoid().item() == pytest.approx(1.3 / 3)
    assert pool_logits([yes, no, no], "sigmoid", "vote").sigmoid().item() == pytest.approx(1 / 3)
    assert pool_logits([yes, no, no], "sigmoid", weights=[2, 1, 1]).sigmoid().item() == pytest.approx(2.2 / 4)
    assert pool_logits([yes, no], "sigmoid", "vote", [3, 1]).sigmoid().item() == pytest.approx(0.75)
    assert pool_logits([yes] * 3 + [no] * 3, "sigmoid", "vote").sigmoid().item() == 0.5  # a tie is a yes
    assert pool_logits([no] * 4, "sigmoid", "vote").sigmoid().item() == pytest.approx(1e-6, rel=0.01)


def test_networks_that_are_very_sure_stay_sure():
    """A probability that float32 rounds to 1 has a logit that tells more; so has the mean of such."""
    pooled = pool_logits([torch.full((1, 1, 2), 40.0), torch.full((1, 1, 2), 60.0)], "sigmoid")
    torch.testing.assert_close(pooled, torch.full((1, 1, 2), 40.0 + math.log(2)))
    torch.testing.assert_close(pool_logits([-pooled, -pooled], "sigmoid"), -pooled)
    assert pool_logits([torch.tensor([[[500.0], [-500.0]]])] * 2, "softmax").isfinite().all()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(-20, 20), min_size=1, max_size=6),
    st.sampled_from(["sigmoid", "softmax"]),
    st.sampled_from(["mean", "vote"]),
)
def test_pooling_is_between_its_members_and_in_no_order(values, activation, mode):
    predictions = [torch.tensor([[[v], [0.5]]]) for v in values]
    pooled = activate(pool_logits(predictions, activation, mode), activation)
    backwards = activate(pool_logits(predictions[::-1], activation, mode), activation)
    torch.testing.assert_close(pooled, backwards)
    members = torch.stack([activate(p, activation) for p in predictions])
    if mode == "mean":
        assert (pooled >= members.amin(0) - 1e-6).all()
        assert (pooled <= members.amax(0) + 1e-6).all()
    if activation == "softmax":
        torch.testing.assert_close(pooled.sum(1), torch.ones(1, 1))


@pytest.mark.parametrize("mode", ["mean", "vote"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_network_that_knows_no_answer_is_not_outvoted_without_a_word(activation, mode):
    predictions = some(activation)
    predictions[1][0, 2, 3, 4] = torch.nan
    pooled = pool_logits(predictions, activation, mode)
    unknown = torch.zeros(pooled.shape, dtype=torch.bool)
    unknown[(0, 2, 3, 4) if activation == "sigmoid" else (0, slice(None), 3, 4)] = True
    assert torch.equal(pooled.isnan(), unknown)


def test_half_precision_is_pooled_in_float32():
    predictions = [p.half() for p in some("softmax")]
    pooled = pool_logits(predictions, "softmax")
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, pool_logits([p.float() for p in predictions], "softmax"))


@pytest.mark.parametrize("mode", ["mean", "vote"])
def test_an_ensemble_stands_where_a_network_does(mode):
    torch.manual_seed(0)
    networks = [torch.nn.Conv2d(1, 3, 3, padding=1) for _ in range(3)]
    ensemble = Ensemble(networks, "softmax", mode).eval()
    image = torch.randn(2, 1, 12, 10)
    with torch.no_grad():
        expected = pool_logits([n(image) for n in networks], "softmax", mode)
        assert torch.equal(ensemble(image), expected)
        torch.testing.assert_close(SlidingWindowInferer((12, 10))(image, ensemble), expected)
        traced = torch.jit.trace(ensemble, image)
        torch.testing.assert_close(traced(image), expected)
    assert len(ensemble.state_dict()) == 6


@pytest.mark.parametrize(
    ("networks", "options", "line"),
    [
        (0, {}, "networks: found 0, expected one or more"),
        (2, {"weights": [1.0]}, "networks: found 2, expected 1, one for each weight"),
        (2, {"weights": [1.0, 0.0]}, "weights: found"),
        (2, {"weights": [1.0, math.nan]}, "weights: found"),
        (2, {"mode": "median"}, "mode: found 'median', expected mean or vote"),
        (2, {"activation": "tanh"}, "activation: found 'tanh', expected sigmoid or softmax"),
    ],
)
def test_what_is_no_ensemble_is_refused(networks, options, line):
    with pytest.raises(ConfigError, match=line):
        Ensemble([torch.nn.Identity()] * networks, **{"activation": "sigmoid", **options})


def test_predictions_that_do_not_fit_are_refused():
    a, b = torch.zeros(1, 2, 4), torch.zeros(1, 1, 4)  # these would broadcast
    with pytest.raises(ConfigError, match=r"number 2 is of shape \(1, 1, 4\), the first of \(1, 2, 4\)"):
        Ensemble([Constant(a), Constant(b)], "sigmoid")(torch.zeros(1, 1, 4))
    with pytest.raises(ConfigError, match="found 0, expected one or more"):
        pool_logits([], "sigmoid")
    with pytest.raises(ConfigError, match="found 1, expected 2"):
        pool_logits([a], "sigmoid", weights=[1, 1])
    with pytest.raises(ConfigError, match="found more than 1"):
        pool_logits([a, a], "sigmoid", weights=[1])
