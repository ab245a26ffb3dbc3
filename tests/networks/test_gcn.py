import pytest
import torch
from monai.networks import blocks
from torch import nn
from torch.nn import functional

from medseg.errors import ConfigError
from medseg.networks import GCN, BoundaryRefinement, GlobalConv, count_parameters


@pytest.mark.parametrize("k", [3, 7])
def test_a_global_convolution_is_one_with_the_outer_products_as_kernel(k):
    torch.manual_seed(0)
    layer = GlobalConv(2, 1, 1, kernel_size=k).double()
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    (down, across), (across_first, down_last) = layer.branches
    assert down.conv.weight.shape[2:] == (k, 1) == down_last.conv.weight.shape[2:]
    assert across.conv.weight.shape[2:] == (1, k) == across_first.conv.weight.shape[2:]
    kernel = down.conv.weight * across.conv.weight + across_first.conv.weight * down_last.conv.weight
    assert kernel.shape == (1, 1, k, k)
    x = torch.randn(2, 1, 11, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), functional.conv2d(x, kernel, padding="same"))


def test_a_global_convolution_in_2d_is_that_of_monai():
    torch.manual_seed(0)
    ours, monais = GlobalConv(2, 6, 3, kernel_size=5), blocks.GCN(6, 3, ks=5)
    monais.load_state_dict(dict(zip(monais.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.randn(2, 6, 9, 12)
    torch.testing.assert_close(ours(x), monais(x))


@pytest.mark.parametrize(("dims", "k"), [(2, 5), (3, 5)])
def test_a_global_convolution_sees_a_window_of_k_along_every_axis(dims, k):
    torch.manual_seed(0)
    layer = GlobalConv(dims, 2, 3, kernel_size=k)
    x = torch.randn(1, 2, *[11] * dims, requires_grad=True)
    layer(x)[(0, slice(None), *[5] * dims)].sum().backward()
    seen = (x.grad[0] != 0).any(0)
    window = torch.zeros_like(seen)
    window[(slice(3, 8),) * dims] = True
    assert torch.equal(seen, window)


@pytest.mark.parametrize(("dims", "branches"), [(2, 2), (3, 3)])
def test_its_price_grows_with_k_not_with_the_window(dims, branches):
    """Each branch: k · in · out, then k · out · out, and a bias each."""
    layer = GlobalConv(dims, 8, 3, kernel_size=15)
    assert count_parameters(layer) == branches * (15 * 8 * 3 + (dims - 1) * 15 * 3 * 3 + dims * 3)


def test_the_refinement_corrects_what_is_there():
    torch.manual_seed(0)
    layer = BoundaryRefinement(2, 3)
    x = torch.randn(1, 3, 6, 6)
    assert not torch.allclose(layer(x), x)
    first, last = (m for m in layer.modules() if isinstance(m, nn.Conv2d))
    expected = x + functional.conv2d(
        functional.conv2d(x, first.weight, first.bias, padding=1).relu(), last.weight, last.bias, padding=1
    )
    torch.testing.assert_close(layer(x), expected)


def test_the_decoder_adds_score_maps():
    """One global convolution per level of the encoder, each to as many channels as there are classes."""
    network = GCN(2, 1, 4, kernel_size=3, channels=(8, 12, 16), layers=(1, 2, 1)).eval()
    ins = [m.branches[0][0].conv.in_channels for m in network.modules() if isinstance(m, GlobalConv)]
    assert sorted(ins) == [8, 12, 16]
    score, up = torch.randn(1, 12, 4, 4), torch.randn(1, 4, 4, 4)
    skip = network.decoder[0].skip
    torch.testing.assert_close(skip(score, up), up + skip.project(score))
    x, sizes = torch.zeros(1, 1, 33, 64), []
    for level in network.encoder:
        x = level(x)
        sizes.append(tuple(x.shape[2:]))
    assert sizes == [(33, 64), (17, 32), (9, 16), (5, 8), (3, 4)]
    assert x.shape[1] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 1}, "spatial_dims is 1"),
        ({"kernel_size": 4}, "kernel_size of GlobalConv is 4; expected an odd number"),
        ({"kernel_size": -3}, "kernel_size of GlobalConv is -3"),
        ({"layers": (1, 1)}, "layers has 2 entries; expected 4"),
        ({"in_channels": 0}, "in_channels is 0"),
    ],
)
def test_arguments_that_make_no_network(arguments, message):
    with pytest.raises(ConfigError, match=message):
        GCN(**{"spatial_dims": 2, "in_channels": 1, "out_channels": 1, **arguments})


def test_an_image_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="does not fit the network"):
        GCN(2, 3, 1, kernel_size=3, channels=(4,), layers=(1,))(torch.zeros(1, 1, 8, 8))
