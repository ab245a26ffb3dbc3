import math
from functools import partial

import pytest
import torch
from torch import nn

from medseg.errors import ConfigError
from medseg.networks import (
    ConvActNorm,
    Head,
    Heads,
    InterpolateConv,
    MaxPool,
    PreActResidual,
    TransposedConv,
    count_parameters,
    glorot_uniform,
    he_normal,
)


def names(module: nn.Module) -> list[str]:
    return [type(m).__name__ for m in module.modules() if not list(m.children())]


def test_conv_act_norm_has_the_order_of_the_thesis():
    assert names(ConvActNorm(2, 1, 4)) == ["Conv2d", "ReLU", "BatchNorm2d"]
    assert names(TransposedConv(3, 4, 2)) == ["ConvTranspose3d", "ReLU", "BatchNorm3d"]
    x = torch.randn(8, 1, 9, 9) * 5 + 3
    y = ConvActNorm(2, 1, 4)(x)
    assert y.min() < 0, "normalization comes last, so the output is not clipped at zero"
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)


def test_conv_act_norm_without_activation_and_norm_is_the_convolution():
    layer = ConvActNorm(2, 1, 1, act=None, norm=None, kernel_size=1)
    assert names(layer) == ["Conv2d"]


def test_an_even_kernel_keeps_the_size_as_in_keras():
    """[1, 10] over [1, 2, 3] with the zero behind: 1 + 20, 2 + 30, 3 + 0."""
    layer = ConvActNorm(2, 1, 1, kernel_size=(1, 2), act=None, norm=None, bias=False)
    nn.init.constant_(layer.conv[1].weight, 1)
    layer.conv[1].weight.data[..., 1] = 10
    assert layer(torch.tensor([[[[1.0, 2.0, 3.0]]]])).flatten().tolist() == [21, 32, 3]
    layer = ConvActNorm(3, 1, 1, kernel_size=(2, 3, 4), act=None, norm=None, bias=False)
    x = torch.randn(2, 1, 5, 6, 7)
    padded = nn.functional.pad(x, (1, 2, 1, 1, 0, 1))
    torch.testing.assert_close(layer(x), nn.functional.conv3d(padded, layer.conv[1].weight))


def test_pre_activation_residual_follows_algorithm_2_2():
    torch.manual_seed(0)
    layer = PreActResidual(2, 3, 5, strides=2).eval()
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(2, 3, 9, 9)
    parts = dict(layer.named_modules())
    bn1, conv1 = parts["residual.0.0.N"], parts["residual.0.1.conv"]
    bn2, conv2 = parts["residual.1.0.N"], parts["residual.1.1.conv"]
    shortcut = parts["shortcut.conv"]
    z = conv2(torch.relu(bn2(conv1(torch.relu(bn1(x))))))
    torch.testing.assert_close(layer(x), shortcut(x) + z)
    assert conv1.stride == (2, 2)
    assert conv2.stride == (1, 1)
    assert shortcut.stride == (2, 2)
    assert shortcut.kernel_size == (1, 1)


def zero_residual(layer: PreActResidual) -> PreActResidual:
    for p in layer.residual.parameters():
        nn.init.zeros_(p)
    return layer


def test_shortcut_is_identity_or_every_second_voxel():
    x = torch.randn(1, 4, 5, 6)
    torch.testing.assert_close(zero_residual(PreActResidual(2, 4, 4))(x), x)
    torch.testing.assert_close(zero_residual(PreActResidual(2, 4, 4, strides=2))(x), x[:, :, ::2, ::2])
    torch.testing.assert_close(zero_residual(PreActResidual(2, 4, 4, strides=(2, 1)))(x), x[:, :, ::2])


def test_shortcut_is_normalized_only_on_request():
    x = torch.randn(4, 2, 6, 6) * 100
    plain = zero_residual(PreActResidual(2, 2, 8))(x)
    normalized = zero_residual(PreActResidual(2, 2, 8, shortcut_norm="BATCH"))(x)
    assert plain.std().item() > 10
    assert normalized.std().item() == pytest.approx(1, abs=0.05)
    assert names(PreActResidual(2, 2, 8).shortcut) == ["Conv2d"]
    assert names(PreActResidual(2, 2, 8, shortcut_norm="BATCH").shortcut) == ["Conv2d", "BatchNorm2d"]


def test_max_pool_keeps_the_border_of_an_odd_image():
    x = torch.arange(5.0).reshape(1, 1, 5, 1)
    assert MaxPool(2, 1, 9, strides=2)(x).flatten().tolist() == [1, 3, 4]
    assert MaxPool(2, 3, 9).out_channels == 3


@pytest.mark.parametrize("up", [TransposedConv, InterpolateConv, partial(TransposedConv, kernel_size=None)])
@pytest.mark.parametrize("strides", [1, 2, 3, (2, 1), (1, 2)])
def test_up_multiplies_the_size(up, strides):
    sx, sy = (strides, strides) if isinstance(strides, int) else strides
    assert up(2, 4, 2, strides=strides)(torch.zeros(2, 4, 5, 3)).shape == (2, 2, 5 * sx, 3 * sy)


def test_transposed_convolution_of_kernel_four():
    assert TransposedConv(2, 1, 1, kernel_size=4)(torch.zeros(2, 1, 5, 3)).shape == (2, 1, 10, 6)


def test_impossible_arguments_are_refused():
    with pytest.raises(ConfigError, match=r"kernel_size \(2, 2\).*strides \(1, 1\)"):
        TransposedConv(2, 1, 1, strides=1, kernel_size=2)
    with pytest.raises(ConfigError, match="nor 2, one per axis"):
        TransposedConv(2, 1, 1, strides=(2, 2, 2))
    with pytest.raises(ConfigError, match="kernel_size 2 with strides 2"):
        ConvActNorm(2, 1, 1, strides=2, kernel_size=2)
    with pytest.raises(ConfigError, match="count of Heads is 0"):
        Heads(2, 1, 1, count=0)
    with pytest.raises(ConfigError, match="'cubic'"):
        InterpolateConv(2, 1, 1, mode="cubic")


def test_heads_speak_together_in_training_and_the_first_alone_after():
    torch.manual_seed(0)
    heads = Heads(2, 5, 3, count=3, head=partial(Head, kernel_size=1))
    x = torch.randn(2, 5, 4, 6)
    together = heads(x)
    assert together.shape == (2, 3, 3, 4, 6)
    torch.testing.assert_close(together[:, 0], heads.first(x))
    torch.testing.assert_close(together[:, 2], heads.others[1](x))
    torch.testing.assert_close(heads.eval()(x), together[:, 0])
    scripted = torch.jit.script(heads)
    torch.testing.assert_close(scripted.train()(x), together)
    torch.testing.assert_close(scripted.eval()(x), together[:, 0])


def test_parameters_are_counted_once_and_running_statistics_on_request():
    layer = nn.Conv2d(2, 2, 3)
    network = nn.Sequential(layer, nn.BatchNorm2d(2), layer, nn.InstanceNorm2d(2))
    assert count_parameters(network) == 2 * 2 * 9 + 2 + 4
    assert count_parameters(network, running_statistics=True) == 2 * 2 * 9 + 2 + 8
    layer.requires_grad_(False)
    assert count_parameters(network) == 4


def test_glorot_uniform_has_variance_two_over_fan_in_and_out():
    torch.manual_seed(0)
    layer = nn.Conv3d(16, 32, 3)
    glorot_uniform(layer)
    assert layer.weight.var().item() == pytest.approx(2 / (27 * (16 + 32)), rel=0.05)
    assert layer.weight.abs().max().item() <= (6 / (27 * (16 + 32))) ** 0.5
    assert layer.bias.abs().max() == 0


@pytest.mark.parametrize("layer", [nn.Conv2d(32, 64, 3), nn.Conv3d(16, 32, 3), nn.Linear(300, 50)])
def test_he_normal_is_truncated_with_variance_two_over_fan_in(layer):
    torch.manual_seed(0)
    he_normal(layer)
    fan_in = layer.weight[0].numel()
    expected = math.sqrt(2 / fan_in)
    assert layer.weight.std().item() == pytest.approx(expected, rel=0.03)
    assert layer.weight.abs().max().item() <= 2 * expected / 0.8796 + 1e-6
    assert layer.weight.abs().max().item() > 2 * expected, "the cut is at two deviations of the uncut normal"
    assert layer.bias.abs().max() == 0


def test_he_normal_leaves_normalization_alone():
    norm = nn.BatchNorm2d(3)
    nn.init.constant_(norm.weight, 7)
    he_normal(norm)
    assert norm.weight.tolist() == [7, 7, 7]
