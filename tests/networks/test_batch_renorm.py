"""Batch renormalization trains as it predicts."""

import copy
import io
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from medseg.errors import ConfigError
from medseg.networks import BatchRenorm, ConvActNorm, TransposedConv, UNet

#: The bounds are at r_max and d_max from the second iteration on.
AT_ONCE = {"r_ramp": (0, 1), "d_ramp": (0, 1)}
BATCH_NORM = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = [(6, 3), (2, 3, 7), (2, 3, 5, 4), (1, 3, 3, 4, 5)]


def features(shape, seed=0, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 3).to(dtype)


def settled(shape, dtype=torch.float32, **kwargs) -> BatchRenorm:
    """With weights, running statistics and a number of iterations that are not those of the start."""
    layer = BatchRenorm(shape[1], **kwargs).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            value.copy_(torch.rand(shape[1], generator=generator) + 0.5)
        layer.num_batches_tracked.fill_(10)
    return layer


@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_with_bounds_of_1_and_0_it_is_batch_normalization(shape):
    ours = settled(shape, r_max=1, d_max=0, momentum=0.1)
    torchs = BATCH_NORM[len(shape)](shape[1], momentum=0.1)
    torchs.load_state_dict(ours.state_dict())
    for seed in range(3):
        ours_in, torchs_in = (features(shape, seed).requires_grad_() for _ in range(2))
        found, expected = ours(ours_in), torchs(torchs_in)
        torch.testing.assert_close(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(ours_in.grad, torchs_in.grad)
    torch.testing.assert_close(ours.weight.grad, torchs.weight.grad)
    for name, value in torchs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_predicting_is_that_of_batch_normalization(shape):
    ours = settled(shape).eval()
    torchs = BATCH_NORM[len(shape)](shape[1]).eval()
    torchs.load_state_dict(ours.state_dict())
    before = copy.deepcopy(ours.state_dict())
    assert torch.equal(ours(features(shape)), torchs(features(shape)))
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())


def explicit(layer: BatchRenorm, x: Tensor, r_bound: float, d_bound: float) -> Tensor:
    """Algorithm 1 of the paper, written out."""
    axes = [0, *range(2, x.ndim)]
    shape = (1, -1, *[1] * (x.ndim - 2))
    mean = x.mean(axes)
    deviation = ((x - mean.view(shape)).square().mean(axes) + layer.eps).sqrt()
    running = (layer.running_var + layer.eps).sqrt()
    r = (deviation / running).clamp(1 / r_bound, r_bound).detach()
    d = ((mean - layer.running_mean) / running).clamp(-d_bound, d_bound).detach()
    normalized = (x - mean.view(shape)) / deviation.view(shape) * r.view(shape) + d.view(shape)
    return normalized * layer.weight.view(shape) + layer.bias.view(shape)


@given(
    shape=st.sampled_from(SHAPES),
    step=st.integers(0, 50),
    r_max=st.floats(1, 4),
    d_max=st.floats(0, 6),
    seed=st.integers(0, 99),
)
def test_output_and_gradients_are_those_of_the_paper_at_every_step(shape, step, r_max, d_max, seed):
    layer = settled(shape, torch.float64, r_max=r_max, d_max=d_max, r_ramp=(10, 40), d_ramp=(5, 20))
    layer.num_batches_tracked.fill_(step)
    r_bound = 1 + (r_max - 1) * min(max((step - 10) / 30, 0), 1)
    d_bound = d_max * min(max((step - 5) / 15, 0), 1)
    x = features(shape, seed, torch.float64).requires_grad_()
    coefficients = features(shape, seed + 1, torch.float64)  # a loss whose gradient is not zero by symmetry
    reference = copy.deepcopy(layer)
    expected = explicit(reference, x, r_bound, d_bound)
    wanted = torch.autograd.grad((expected * coefficients).sum(), [x, reference.weight, reference.bias])
    found = layer(x)
    torch.testing.assert_close(found, expected)
    got = torch.autograd.grad((found * coefficients).sum(), [x, layer.weight, layer.bias])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_within_the_bounds_a_small_batch_is_trained_as_it_is_predicted():
    shape = (2, 3, 4, 4)
    layer = settled(shape, r_max=1e3, d_max=1e3, **AT_ONCE)
    predicting = copy.deepcopy(layer).eval()
    torch.testing.assert_close(layer(features(shape)), predicting(features(shape)), atol=1e-5, rtol=1e-5)


def test_in_the_long_run_training_comes_nearer_to_predicting_than_batch_normalization_does():
    """Batches of one image each: what training computes, against what predicting computes of the same image."""
    layers = {"renorm": BatchRenorm(1, **AT_ONCE), "norm": nn.BatchNorm2d(1, momentum=0.01)}
    batches = [features((1, 1, 4, 4), seed) * (1 + seed % 3) + seed % 5 for seed in range(600)]
    apart = {}
    for name, layer in layers.items():
        for x in batches:
            layer(x)
        with torch.no_grad():
            apart[name] = sum(float((layer.train()(x) - layer.eval()(x)).abs().mean()) for x in batches[:30])
    assert apart["renorm"] < 0.1 * apart["norm"]


def test_the_statistics_of_an_unmoving_stream_are_found():
    layer = BatchRenorm(3, momentum=0.1)
    for seed in range(200):
        layer(features((8, 3, 6, 6), seed))
    torch.testing.assert_close(layer.running_mean, torch.full((3,), 3.0), atol=0.15, rtol=0)
    torch.testing.assert_close(layer.running_var, torch.full((3,), 4.0), atol=0.5, rtol=0)


def test_a_resumed_training_goes_on_with_its_bounds():
    straight = BatchRenorm(2, r_ramp=(1, 9), d_ramp=(1, 7))
    for seed in range(5):
        straight(features((2, 2, 3, 3), seed))
    resumed = BatchRenorm(2, r_ramp=(1, 9), d_ramp=(1, 7))
    resumed.load_state_dict(straight.state_dict())
    assert resumed.num_batches_tracked == 5
    for seed in range(5, 12):
        x = features((2, 2, 3, 3), seed)
        assert torch.equal(straight(x), resumed(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    shape = (2, 3, 8, 8)
    layer = settled(shape, **AT_ONCE)
    x = features(shape) * 300  # the variance overflows float16
    with torch.no_grad():
        expected = copy.deepcopy(layer)(x)
        found = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, atol=0.05 * float(expected.abs().max()), rtol=0)
        with torch.autocast("cpu", dtype=dtype):
            found = copy.deepcopy(layer)(x.to(dtype))
        torch.testing.assert_close(found.float(), expected, atol=0.05 * float(expected.abs().max()), rtol=0)


def test_torchscript_and_compile_train_alike():
    torch._dynamo.reset()
    layer = settled((2, 3, 5, 4), r_ramp=(9, 14), d_ramp=(9, 12))
    saved = io.BytesIO()
    torch.jit.save(torch.jit.script(copy.deepcopy(layer)), saved)
    saved.seek(0)
    scripted = torch.jit.load(saved)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    for seed in range(4):
        x = features((2, 3, 5, 4), seed)
        expected = layer(x)
        torch.testing.assert_close(scripted(x), expected)
        torch.testing.assert_close(compiled(x), expected)
    for other in (scripted, compiled._orig_mod):
        for name, value in layer.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value)


def test_monais_factory_knows_it_wherever_medseg_networks_is_imported():
    code = (
        "import medseg.networks; from monai.networks.blocks import Convolution; "
        "print(Convolution(3, 1, 2, norm=('BATCH_RENORM', {'d_max': 2})).adn.N)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("BatchRenorm(2, "), done.stderr
    assert "d_max=2.0" in done.stdout


def test_a_network_takes_it_as_any_normalization():
    network = UNet(
        3,
        1,
        2,
        channels=(2, 4),
        block=partial(ConvActNorm, norm="BATCH_RENORM"),
        up=partial(TransposedConv, norm="BATCH_RENORM"),
    )
    assert not [m for m in network.modules() if isinstance(m, nn.BatchNorm3d)]
    layers = [m for m in network.modules() if isinstance(m, BatchRenorm)]
    assert layers
    network(torch.rand(2, 1, 8, 8, 8)).sum().backward()
    assert all(layer.num_batches_tracked == 1 for layer in layers)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"r_max": 0.5}, "r_max and d_max of BatchRenorm are 0.5 and 5.0; expected at least 1 and 0"),
        ({"d_max": -1}, "expected at least 1 and 0"),
        ({"r_max": float("nan")}, "r_max and d_max of BatchRenorm are nan"),
        ({"r_ramp": (7, 7)}, r"r_ramp of BatchRenorm is \[7, 7\]; expected two iterations"),
        ({"d_ramp": (7,)}, r"d_ramp of BatchRenorm is \[7\]"),
    ],
)
def test_bounds_that_cannot_be_are_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        BatchRenorm(2, **kwargs)
