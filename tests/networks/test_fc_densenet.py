import math

import pytest
import torch
from torch import nn

from medseg.errors import ConfigError
from medseg.networks import FCDenseNet, count_parameters, he_uniform
from medseg.networks.encoder_decoder import UpLevel

#: growth, layers; number of convolutions, which gives the name; parameters with and without running statistics.
PUBLISHED = [
    (12, [4] * 6, 56, 1_397_963, 1_376_795),
    (16, [5] * 6, 67, 3_502_923, 3_463_243),
    (16, [4, 5, 7, 10, 12, 15], 103, 9_425_163, 9_322_091),
]


@pytest.mark.parametrize(("growth", "layers", "convolutions", "all_numbers", "parameters"), PUBLISHED)
def test_the_published_networks(growth, layers, convolutions, all_numbers, parameters):
    """The paper, table 3: 9.4, 3.5 and 1.5 million; only the last is not what its own table 2 gives."""
    network = FCDenseNet(2, 3, 11, growth=growth, layers=layers, initializer=None)
    kinds = nn.Conv2d | nn.ConvTranspose2d
    assert sum(isinstance(m, kinds) for m in network.modules()) == convolutions
    assert count_parameters(network, running_statistics=True) == all_numbers
    assert count_parameters(network) == parameters


def test_the_default_has_the_widths_of_table_2():
    """Table 2 counts in the input of each block on the way up; its 578 is a misprint, 304 + 160 + 112 = 576."""
    network = FCDenseNet(2, 3, 11, initializer=None)
    down = [level[1].out_channels for level in network.encoder]
    assert down == [112, 192, 304, 464, 656, 15 * 16]
    widths = []
    for level, skip, depth in zip(network.decoder, down[-2::-1], [12, 10, 7, 5, 4], strict=True):
        assert isinstance(level, UpLevel)
        assert level.skip.out_channels == skip + level.up.conv.out_channels
        widths.append(level.skip.out_channels + 16 * depth)
    assert widths == [1088, 816, 576, 384, 256]
    assert network.head.conv.in_channels == 256


def test_he_uniform_is_uniform_with_variance_2_over_fan_in():
    torch.manual_seed(0)
    layer = nn.Conv3d(10, 200, 3)
    he_uniform(layer)
    bound = math.sqrt(6 / 270)
    assert bound * 0.999 < layer.weight.abs().max().item() <= bound
    assert math.isclose(layer.weight.var().item(), 2 / 270, rel_tol=0.02)
    assert not layer.bias.any()
    norm = nn.BatchNorm2d(4)
    he_uniform(norm)
    assert norm.weight.tolist() == [1] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 1}, "spatial_dims is 1"),
        ({"layers": []}, r"layers is \(\)"),
        ({"layers": [4, -1]}, r"layers is \(4, -1\)"),
        ({"stem_channels": 0}, "stem_channels is 0"),
        ({"out_channels": 0}, "out_channels is 0"),
    ],
)
def test_arguments_that_make_no_network(arguments, message):
    with pytest.raises(ConfigError, match=message):
        FCDenseNet(**{"spatial_dims": 2, "in_channels": 1, "out_channels": 1, **arguments})


def test_an_image_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="does not fit the network"):
        FCDenseNet(2, 3, 1, growth=2, layers=[1, 1], stem_channels=2)(torch.zeros(1, 1, 8, 8))
