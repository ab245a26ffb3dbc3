import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks import nets
from torch import nn

from medseg.errors import ConfigError
from medseg.networks import VNet, count_parameters, receptive_field
from medseg.networks.vnet import StridedConv


class Encoder(nn.Module):
    """The levels of an encoder down to one of them."""

    def __init__(self, network: VNet, levels: int) -> None:
        super().__init__()
        self.spatial_dims, self.in_channels = network.spatial_dims, network.in_channels
        self.levels = network.encoder[:levels]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for level in self.levels:
            x = level(x)
        return x


@pytest.mark.parametrize(("levels", "published"), [(1, 5), (2, 22), (3, 72), (4, 172), (5, 372)])
def test_the_receptive_fields_are_those_of_table_1(levels, published):
    network = VNet(2, 1, 1, channels=(1,) * 5)
    size = published + 2 * 2 ** (levels - 1)
    assert receptive_field(Encoder(network, levels), (size, size)) == (published, published)


def test_the_stages_are_those_of_figure_2():
    network = VNet(3, 1, 2, initializer=None)
    kernels = [m.kernel_size for m in network.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)]
    assert kernels.count((5, 5, 5)) == 1 + 2 + 3 + 3 + 3 + 3 + 3 + 2 + 1
    assert kernels.count((2, 2, 2)) == 4 + 4
    assert kernels.count((1, 1, 1)) == 2, "the first stage's shortcut and the head"
    convolutions = [
        [m.out_channels for m in level.modules() if isinstance(m, nn.Conv3d) and m.kernel_size == (5, 5, 5)]
        for level in (*network.encoder, *network.decoder)
    ]
    assert convolutions == [
        [16],
        [32] * 2,
        [64] * 3,
        [128] * 3,
        [256] * 3,
        [256] * 3,
        [128] * 3,
        [64] * 2,
        [32],
    ]
    assert not [m for m in network.modules() if isinstance(m, nn.BatchNorm3d)]
    assert count_parameters(network) == 65_171_919


def test_a_stage_learns_a_residual():
    """With the last convolution at zero, a stage is the activation of its input."""
    network = VNet(2, 1, 1, channels=(4, 6), layers=(1, 3))
    stage = network.encoder[1][1]
    last = [m for m in stage.modules() if isinstance(m, nn.Conv2d)][-1]
    x = torch.randn(1, 6, 7, 7)
    assert not torch.allclose(stage(x), nn.functional.prelu(x, torch.tensor(0.25)))
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    torch.testing.assert_close(stage(x), nn.functional.prelu(x, torch.tensor(0.25)))


def test_a_normalization_and_another_activation_can_be_had():
    network = VNet(2, 1, 1, channels=(4, 8), layers=(1, 2), act="ELU", norm="BATCH")
    kinds = [type(m) for m in network.modules()]
    # 1 + 2 + 1 convolutions in stages, whose last is normalized after the sum; one step down, one up
    assert kinds.count(nn.BatchNorm2d) == 1 + 2 + 1 + 1 + 1
    assert nn.PReLU not in kinds
    assert torch.isfinite(network(torch.randn(2, 1, 9, 9))).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=3))
def test_no_voxel_is_dropped_on_the_way_down(size):
    layer = StridedConv(len(size), 1, 2, act=None)
    nn.init.ones_(layer.conv.conv.weight)
    x = torch.ones(1, 1, *size, requires_grad=True)
    y = layer(x)
    assert list(y.shape[2:]) == [(n + 1) // 2 for n in size]
    y.sum().backward()
    assert (x.grad == 2).all(), "every voxel counts once in each of the two channels"


def test_the_zeros_stand_behind_the_last_voxel():
    layer = StridedConv(2, 1, 1, act=None)
    nn.init.ones_(layer.conv.conv.weight)
    nn.init.zeros_(layer.conv.conv.bias)
    assert layer(torch.tensor([[[[1.0, 10.0, 100.0]]]])).flatten().tolist() == [11, 100]


def test_why_monais_is_not_enough():
    """If these pass one day, MONAI's network is the one to use where its fewer convolutions do."""
    monais = nets.VNet(2, 1, 2)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        monais(torch.zeros(1, 1, 29, 37))
    with pytest.raises(ValueError, match="divisible by in_channels"):
        nets.VNet(2, in_channels=3)
    ours = VNet(2, in_channels=3, out_channels=2, channels=(4, 8, 8, 8, 8)).eval()
    assert ours(torch.zeros(1, 3, 29, 37)).shape == (1, 2, 29, 37)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 1}, "spatial_dims is 1"),
        ({"layers": (1, 2)}, "layers has 2 entries; expected 5"),
        ({"channels": (16, 0, 1, 1, 1)}, r"channels is \(16, 0, 1, 1, 1\)"),
        ({"in_channels": 0}, "in_channels is 0"),
    ],
)
def test_arguments_that_make_no_network(arguments, message):
    with pytest.raises(ConfigError, match=message):
        VNet(**{"spatial_dims": 3, "in_channels": 1, "out_channels": 1, **arguments})


def test_a_single_voxel_is_refused_only_where_it_is_normalized():
    x = torch.randn(1, 1, 2, 2)
    VNet(2, 1, 1, channels=(2, 2), layers=(1, 1))(x).sum().backward()
    with pytest.raises(ConfigError, match="single voxel"):
        VNet(2, 1, 1, channels=(2, 2), layers=(1, 1), norm="BATCH")(x)


def test_an_image_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="does not fit the network"):
        VNet(3, 1, 1, channels=(2, 2), layers=(1, 1))(torch.zeros(1, 1, 8, 8))
