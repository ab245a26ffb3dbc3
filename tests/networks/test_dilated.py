"""The dilated CNN: what it sees, and its two forms."""

from functools import partial

import pytest
import torch
from torch import nn

from medseg.errors import ConfigError
from medseg.networks import ConvActNorm, DilatedCNN, UNet, count_parameters, receptive_field


def test_it_sees_131_voxels_in_eight_kernels_of_3_and_two_of_1() -> None:
    network = DilatedCNN(2, 1, 3)
    kernels = [m.kernel_size for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [(3, 3)] * 8 + [(1, 1)] * 2
    assert [m.dilation[0] for m in network.modules() if isinstance(m, nn.Conv2d)] == [1, 1, 2, 4, 8, 16, 32, 1, 1, 1]
    assert receptive_field(DilatedCNN(2, 1, 3, channels=4), 140) == (131, 131)
    # 320 + 7 * 9248 in kernels and biases, 192 * 32 + 2 * 192 with its normalization, 192 * 3 + 3
    assert count_parameters(network) == 320 + 7 * 9248 + 6144 + 384 + 579


@pytest.mark.parametrize(
    ("dilations", "fields"), [((1,) * 3, 7), ((1, 2, 4), 15), ((1, 1, 2, 4, 8, 16, 32), 129), ((1, 1, 2), 9)]
)
def test_receptive_fields_of_the_table(dilations: tuple[int, ...], fields: int) -> None:
    assert receptive_field(DilatedCNN(2, 1, 1, channels=2, features=2, dilations=dilations), 140) == (fields, fields)


def test_in_3d_it_sees_as_far_along_each_axis() -> None:
    network = DilatedCNN(3, 1, 2, channels=2, features=2, dilations=(1, 2, 4))
    assert receptive_field(network, (17, 18, 19)) == (15, 15, 15)


def test_without_padding_it_is_the_classifier_of_patches() -> None:
    torch.manual_seed(0)
    padded = DilatedCNN(2, 2, 3, channels=8).eval()
    valid = DilatedCNN(2, 2, 3, channels=8, padding=False).eval()
    valid.load_state_dict(padded.state_dict())
    image = torch.randn(1, 2, 134, 133)
    with torch.no_grad():
        whole = padded(image)
        inner = valid(image)
        assert inner.shape == (1, 3, 4, 3)
        torch.testing.assert_close(whole[..., 65:-65, 65:-65], inner, rtol=1e-4, atol=1e-5)
        patch = image[..., 2 : 2 + 131, 1 : 1 + 131]
        torch.testing.assert_close(valid(patch)[..., 0, 0], inner[..., 2, 1], rtol=1e-4, atol=1e-5)
    assert receptive_field(valid, 131) == (131, 131)


def test_a_receptive_field_that_may_be_cut_off_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"size \(131, 131\).*larger size"):
        receptive_field(DilatedCNN(2, 1, 1, channels=2, features=2), 131)


def test_a_receptive_field_is_measured_through_pooling_and_negative_weights() -> None:
    network = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 3, padding=1))
    network.in_channels, network.spatial_dims = 1, 2
    with torch.no_grad():
        network[2].weight.fill_(-1)
    assert receptive_field(network, 9) == (5, 5)
    assert network[2].weight.unique().tolist() == [-1], "the network itself is left as it is"
    assert receptive_field(UNet(2, 1, 1, channels=(4,)), 16) == (7, 7)  # two convolutions and a head of 3


@pytest.mark.parametrize("act", ["RELU", "RELU6", "PRELU", "SIGMOID"])
def test_what_a_network_has_learned_does_not_change_what_it_sees(act: str) -> None:
    """With biases and statistics that stop every ReLU, or images that saturate it, it sees as far as at first."""
    torch.manual_seed(0)
    network = UNet(2, 1, 1, channels=(4, 4), block=partial(ConvActNorm, act=act))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.constant_(module.running_mean, 5)
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.bias, -5)
            nn.init.constant_(module.weight, 9)
    assert receptive_field(network, 32) == (22, 22)


@pytest.mark.parametrize("padding", [True, False])
def test_a_single_voxel_is_not_normalized(padding: bool) -> None:
    network = DilatedCNN(2, 1, 2, channels=2, features=2, dilations=(1, 2), padding=padding)
    x = torch.zeros(2, 1, *[1 if padding else 7] * 2)
    with pytest.raises(ConfigError, match="single voxel"):
        network(x[:1])
    assert network(x).shape == network.eval()(x).shape == (2, 2, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 1}, "spatial_dims is 1"),
        ({"dilations": ()}, r"dilations is \(\); expected positive numbers"),
        ({"channels": 0}, "channels is 0"),
    ],
)
def test_impossible_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        DilatedCNN(**{"spatial_dims": 2, "in_channels": 1, "out_channels": 2, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("padding", "shape"), [(True, (1, 2, 9, 9)), (True, (1, 1, 9)), (False, (1, 1, 130, 140))])
def test_an_image_that_does_not_fit_is_named(padding: bool, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="does not fit the network"):
        DilatedCNN(2, 1, 2, channels=2, features=2, padding=padding)(torch.zeros(shape))
