import itertools

import pytest
import torch
from torch import nn

from medseg.networks import (
    Head,
    Heads,
    PreActResidual,
    UNet,
    count_parameters,
    kits_unet2d,
    kits_unet3d,
    knee_unet,
    petct_unet,
)

CONVOLUTIONS = nn.Conv2d | nn.Conv3d | nn.ConvTranspose3d


@pytest.fixture
def no_numbers():
    """Networks of full size have their shapes only."""
    with torch.device("meta"):
        yield


def convolutions(network: nn.Module) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(m.in_channels, m.out_channels, m.kernel_size) for m in network.modules() if isinstance(m, CONVOLUTIONS)]


def names(module: nn.Module) -> list[str]:
    return [type(m).__name__ for m in module.modules() if not list(m.children())]


def counted_by_hand(layers: list[tuple[int, int, tuple[int, ...]]], normalized: int) -> int:
    """Kernels and biases, and four numbers for each normalized channel."""
    return sum(i * o * torch.Size(k).numel() + o for i, o, k in layers) + 4 * normalized


def test_petct_unet_is_the_default(no_numbers):
    network = petct_unet()
    assert count_parameters(network) == 34_526_977
    assert count_parameters(petct_unet(in_channels=1)) == 34_526_401
    assert str(network) == str(UNet(2, 2, 1))


def test_petct_unet_of_residual_layers(no_numbers):
    """Each layer of table 4.3 becomes two convolutions and, where the width changes, a 1×1 shortcut."""
    widths = [2, 64, 64, 128, 128, 256, 256, 512, 512, 1024, 1024]
    layers = list(itertools.pairwise(widths))
    ups = [(2 * w, w) for w in (512, 256, 128, 64)]
    layers += [layer for w in (512, 256, 128, 64) for layer in ((2 * w, w), (w, w))]
    by_hand = 0
    for i, o in layers:
        by_hand += 2 * i + (9 * i * o + o) + 2 * o + (9 * o * o + o) + ((i * o + o) if i != o else 0)
    by_hand += sum(9 * i * o + o + 2 * o for i, o in ups) + 9 * 64 + 1
    assert count_parameters(petct_unet(block=PreActResidual)) == by_hand


def test_kits_unet2d_has_the_parameters_of_the_work(no_numbers):
    assert count_parameters(kits_unet2d(), running_statistics=True) == 2_465_619


def test_kits_unet2d_layer_by_layer(no_numbers):
    three, two = (3, 3), (2, 2)
    layers = [(3, 64, three), (64, 64, three), (64, 128, three), (128, 128, three)]
    layers += [(128, 256, three), (256, 256, three), (256, 256, three)]
    layers += [(256, 128, two), (256, 128, three), (128, 128, three)]
    layers += [(128, 64, two), (128, 64, three), (64, 64, three), (64, 10, three), (10, 3, (1, 1))]
    network = kits_unet2d()
    assert convolutions(network) == layers
    assert counted_by_hand(layers, sum(o for _, o, _ in layers[:-1])) == 2_465_619
    assert names(network.encoder[0]) == ["Conv2d", "ReLU", "BatchNorm2d"] * 2
    assert [m.mode for m in network.modules() if isinstance(m, nn.Upsample)] == ["nearest"] * 2


def test_kits_unet3d_has_the_parameters_of_the_work(no_numbers):
    assert count_parameters(kits_unet3d(), running_statistics=True) == 15_296_451


def test_kits_unet3d_layer_by_layer(no_numbers):
    three, two = (3, 3, 3), (2, 2, 2)
    layers, normalized, width = [], 0, 3
    for target in (48, 96, 192):
        layers += [(width, target, three), (target, target, three)]
        normalized += width + 2 * target
        width += target
    layers += [(width, 384, three), (384, 384, three)]
    normalized += width + 384
    width += 384
    for target in (192, 96, 48):
        layers += [(width, target, two), (2 * target, target, three), (target, target, three)]
        normalized += 2 * target + target
        width = 3 * target
    layers.append((width, 3, (1, 1, 1)))
    assert convolutions(kits_unet3d()) == layers
    assert counted_by_hand(layers, normalized) == 15_296_451


def test_kits_unet3d_carries_the_input_along_but_not_across():
    network = kits_unet3d(1, 2, channels=(4, 8)).eval()
    seen = {}
    network.decoder[0].skip.register_forward_hook(lambda module, given, output: seen.update(given=given, output=output))
    x = torch.randn(1, 1, 8, 8, 4)
    first = network.encoder[0](x)
    torch.testing.assert_close(first[:, :1], x)
    network(x)
    assert first.shape[1] == 5
    assert seen["output"].shape[1] == 8
    torch.testing.assert_close(seen["output"][:, 4:], first[:, 1:])
    kinds = ["BatchNorm3d", "Conv3d", "ReLU", "BatchNorm3d", "Conv3d", "ReLU"]
    assert names(network.encoder[0]) == [*kinds, "BatchNorm3d"]
    assert names(network.encoder[1])[1:] == kinds
    assert names(network.decoder[0].blocks) == kinds
    assert names(network.decoder[0].up) == ["ConvTranspose3d"]


@pytest.mark.parametrize(
    ("width", "depth", "count"),
    [(32, 3, 148_225), (32, 4, 194_433), (48, 2, 229_057), (48, 3, 332_929), (48, 4, 436_801)],
)
def test_knee_unet_has_the_parameters_of_the_work(no_numbers, width, depth, count):
    assert count_parameters(knee_unet(width=width, depth=depth)) == count


def test_knee_unet_has_elu_one_dropout_and_no_normalization():
    network = knee_unet()
    kinds = names(network)
    assert kinds.count("ELU") == kinds.count("Conv2d") - 1 == 18
    assert kinds.count("Dropout") == 1
    assert names(network.encoder[-1])[-1] == "Dropout", "at the end of the contracting path"
    assert not any("Norm" in kind or kind == "ReLU" for kind in kinds)
    assert {o for _, o, _ in convolutions(network)[:-1]} == {32}


def test_knee_unet_is_glorot_initialized():
    torch.manual_seed(0)
    for layer in knee_unet().decoder[0].blocks.modules():
        if isinstance(layer, nn.Conv2d):
            limit = (6 / (9 * (layer.in_channels + layer.out_channels))) ** 0.5
            assert 0.99 * limit < layer.weight.abs().max() <= limit
            assert layer.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.03)
            assert layer.bias.abs().max() == 0


def test_knee_unet_in_3d_never_pools_along_z():
    network = knee_unet(3, width=4)
    assert count_parameters(network) == counted_by_hand(convolutions(network), 0)
    assert {k for _, _, k in convolutions(network)} == {(3, 3, 3), (1, 1, 1)}
    depths = []
    for level in network.encoder:
        level.register_forward_hook(lambda module, given, output: depths.append(tuple(output.shape[2:])))
    assert network(torch.zeros(1, 1, 48, 33, 5)).shape == (1, 1, 48, 33, 5)
    assert depths == [(48, 33, 5), (24, 17, 5), (12, 9, 5), (6, 5, 5), (3, 3, 5)]


def test_parts_of_a_preset_are_replaceable():
    network = kits_unet2d(1, 2, channels=(4, 8), head=Heads, deep_supervision=0)
    assert network(torch.zeros(2, 1, 9, 8)).shape == (2, 2, 2, 9, 8)
    assert convolutions(knee_unet(width=4, depth=1, head=Head))[-1][2] == (3, 3)
