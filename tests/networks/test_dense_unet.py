from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import densenet
from torch import nn

from medseg.errors import ConfigError
from medseg.networks import (
    GCN,
    AddProjected,
    BottleneckLayer,
    DenseBlock,
    DenseNetUNet,
    DenseUNet,
    FCDenseNet,
    NormActConv,
    ReducedConcatenate,
    TransitionDown,
    TransitionUp,
    VNet,
    count_parameters,
)


def copy_kernels(ours: nn.Module, monais: nn.Module) -> None:
    """Give MONAI's layers the numbers of ours, in order, without the biases that it has not."""
    kinds = (nn.Conv2d, nn.BatchNorm2d)
    pairs = zip(
        (m for m in ours.modules() if isinstance(m, kinds)),
        (m for m in monais.modules() if isinstance(m, kinds)),
        strict=True,
    )
    for mine, theirs in pairs:
        if isinstance(mine, nn.Conv2d):
            nn.init.zeros_(mine.bias)
            theirs.weight.data.copy_(mine.weight)
        else:
            nn.init.normal_(mine.weight)
            nn.init.normal_(mine.bias)
            theirs.load_state_dict(mine.state_dict())


def test_the_small_one_has_the_published_count():
    network = DenseUNet(2, in_channels=3, out_channels=3, initializer=None)
    assert count_parameters(network, running_statistics=True) == 1_636_627
    assert count_parameters(network) == 1_624_659


def test_the_big_one_has_the_published_count():
    network = DenseNetUNet(2, in_channels=3, out_channels=3, initializer=None)
    assert count_parameters(network, running_statistics=True) == 43_024_099
    assert count_parameters(network) == 42_824_067


def test_the_small_one_has_the_published_growth():
    network = DenseUNet(2, 3, 3, initializer=None)
    blocks = [m for m in network.modules() if isinstance(m, DenseBlock)]
    assert [b.growth for b in blocks] == [4, 8, 16, 32, 64, 32, 16, 8, 4]
    assert [b.out_channels for b in blocks] == [32, 64, 128, 256, 512, 256, 128, 64, 32]
    assert all(len(b.layers) == 4 for b in blocks)
    # a step up halves, the concatenation is reduced to a quarter
    assert [m.out_channels for m in network.modules() if isinstance(m, TransitionUp)] == [256, 128, 64, 32]
    assert [m.out_channels for m in network.modules() if isinstance(m, ReducedConcatenate)] == [128, 64, 32, 16]


def test_the_small_one_drops_whole_channels():
    layer = DenseUNet(2, 3, 3, growth=64, layers=2, levels=1, dropout=0.5, initializer=None).encoder[0][1][0].layers[0]
    y = layer(torch.randn(1, 128, 6, 6) + 1)[0]
    dropped = (y == 0).flatten(1)
    assert dropped.any()
    assert torch.equal(dropped.any(1), dropped.all(1))


def test_the_big_ones_decoder_sums():
    torch.manual_seed(0)
    network = DenseNetUNet(2, 1, 2, growth=4, layers=(1, 1), stem_channels=8, channels=(16, 12, 8, 4)).eval()
    projections = [m.project for m in network.modules() if isinstance(m, AddProjected)]
    assert [tuple(p.conv.weight.shape[:2]) for p in projections] == [(16, 12), (12, 8)]
    features, up = torch.randn(1, 12, 4, 4), torch.randn(1, 16, 4, 4)
    torch.testing.assert_close(network.decoder[0].skip(features, up), up + projections[0](features))


def test_a_dense_block_shows_each_layer_everything_before_it():
    """Layers that return the sum of what they see, in every new channel: 1; then 1 + 2·1 = 3; then 3 + 2·3 = 9."""

    class Sum(nn.Module):
        def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
            super().__init__()
            self.seen = in_channels
            self.count = out_channels

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[1] == self.seen
            return x.sum(1, keepdim=True).repeat_interleave(self.count, 1)

    x = torch.ones(1, 1, 2, 2)
    block = DenseBlock(2, 1, 7, layers=3, layer=Sum)
    assert block(x)[0, :, 0, 0].tolist() == [1, 1, 1, 3, 3, 9, 9]
    alone = DenseBlock(2, 1, 6, layers=3, layer=Sum, keep_input=False)
    assert alone(x)[0, :, 1, 1].tolist() == [1, 1, 3, 3, 9, 9]


def test_dense_blocks_with_bottlenecks_are_those_of_monai():
    torch.manual_seed(0)
    ours = DenseBlock(2, 16, 16 + 3 * 8, layers=3, layer=BottleneckLayer)
    monais = densenet._DenseBlock(2, layers=3, in_channels=16, bn_size=4, growth_rate=8, dropout_prob=0.0)
    copy_kernels(ours, monais)
    x = torch.randn(2, 16, 9, 7)
    torch.testing.assert_close(ours(x), monais(x))


def test_the_transition_down_is_that_of_monai_where_windows_are_complete():
    torch.manual_seed(0)
    ours, monais = TransitionDown(2, 16, 8), densenet._Transition(2, 16, 8)
    copy_kernels(ours, monais)
    x = torch.randn(2, 16, 8, 6)
    torch.testing.assert_close(ours(x), monais(x))
    assert ours(x[..., :7, :5]).shape == (2, 8, 4, 3), "MONAI's forgets the last row"


def test_the_transition_up_repeats_voxels():
    layer = TransitionUp(2, 4, 2).eval()
    x = torch.randn(1, 4, 3, 5)
    expected = layer[0](x).repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(layer(x), expected)


def zeros(module: nn.Module) -> None:
    if isinstance(module, nn.modules.conv._ConvNd):
        nn.init.zeros_(module.weight)


@pytest.mark.parametrize(
    "build",
    [
        partial(DenseUNet, growth=2, layers=2, levels=2),
        partial(DenseNetUNet, growth=2, layers=(1,), stem_channels=4, channels=(8, 4, 2)),
        partial(FCDenseNet, growth=2, layers=(1, 1), stem_channels=2),
        partial(GCN, kernel_size=3, channels=(4,), layers=(1,)),
        partial(VNet, channels=(2, 2), layers=(1, 1)),
    ],
    ids=lambda build: build.func.__name__,
)
def test_the_initializer_reaches_every_convolution(build):
    def kernels(network: nn.Module) -> list[torch.Tensor]:
        return [m.weight for m in network.modules() if isinstance(m, nn.modules.conv._ConvNd)]

    assert not any(k.any() for k in kernels(build(2, 1, 1, initializer=zeros)))
    assert all(k.any() for k in kernels(build(2, 1, 1, initializer=None)))
    torch.manual_seed(0)
    default = kernels(build(2, 1, 1))
    torch.manual_seed(0)
    assert not torch.equal(default[0], kernels(build(2, 1, 1, initializer=None))[0])


def dropouts(network: nn.Module) -> list[tuple[type, float]]:
    return [(type(m), m.p) for m in network.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]


def test_dropout_stands_where_it_is_said():
    small = DenseUNet(2, 1, 1, growth=2, layers=2, levels=2)
    assert dropouts(small) == [(nn.Dropout2d, 0.05)] * 2 * 3
    assert dropouts(DenseUNet(3, 1, 1, growth=2, layers=2, levels=1)) == [(nn.Dropout3d, 0.05)] * 2
    big = DenseNetUNet(2, 1, 1, growth=2, layers=(1,), stem_channels=4, channels=(8, 4, 2))
    assert dropouts(big) == dropouts(big.head) == [(nn.Dropout, 0.3)]
    tiramisu = FCDenseNet(2, 1, 1, growth=2, layers=(2, 3), stem_channels=2)
    assert dropouts(tiramisu) == [(nn.Dropout, 0.2)] * (2 + 1 + 3 + 2)


def test_strides_may_leave_an_axis_alone():
    network = DenseUNet(3, 1, 2, growth=2, layers=2, levels=3, strides=[[2, 2, 1], 2]).eval()
    assert network(torch.zeros(1, 1, 17, 16, 3)).shape == (1, 2, 17, 16, 3)
    assert network.encoder[1](network.encoder[0](torch.zeros(1, 1, 17, 16, 3))).shape[2:] == (9, 8, 3)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 6), st.booleans())
def test_a_dense_block_has_the_channels_asked_for_or_is_refused(before, after, layers, keep_input):
    new = after - before if keep_input else after
    if new < 1 or new % layers:
        with pytest.raises(ConfigError, match="cannot share evenly"):
            DenseBlock(2, before, after, layers, keep_input=keep_input)
    else:
        block = DenseBlock(2, before, after, layers, keep_input=keep_input).eval()
        assert block(torch.zeros(1, before, 2, 3)).shape == (1, after, 2, 3)
        assert block.growth * layers == new


@pytest.mark.parametrize("shape", [(1, 2, 64, 64), (1, 1, 64), (1, 1, 8, 8, 8)])
def test_images_that_do_not_fit_are_refused(shape):
    small = DenseUNet(2, 1, 1, growth=1, layers=2, levels=2)
    big = DenseNetUNet(2, 1, 1, growth=2, layers=(1,), stem_channels=4, channels=(8, 4, 2))
    for network in (small, big):
        with pytest.raises(ConfigError, match="does not fit the network"):
            network(torch.zeros(shape))


def test_a_single_voxel_cannot_be_normalized_in_training():
    network = DenseNetUNet(2, 1, 1, growth=2, layers=(1,), stem_channels=4, channels=(8, 4, 2))
    with pytest.raises(ConfigError, match="single voxel"):
        network(torch.zeros(1, 1, 4, 4))
    assert network.eval()(torch.zeros(1, 1, 4, 4)).shape == (1, 1, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 1}, "spatial_dims is 1"),
        ({"layers": (6, 0)}, r"layers is \(6, 0\)"),
        ({"layers": (6, 12)}, "channels has 6 entries; expected 4"),
        ({"growth": 0}, "growth is 0"),
        ({"channels": ()}, r"channels is \(\)"),
    ],
)
def test_arguments_of_the_big_one_that_make_no_network(arguments, message):
    with pytest.raises(ConfigError, match=message):
        DenseNetUNet(**{"spatial_dims": 2, "in_channels": 1, "out_channels": 1, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 4}, "spatial_dims is 4"),
        ({"levels": 0}, "levels is 0"),
        ({"growth": -1}, "growth is -1"),
        ({"out_channels": 0}, "out_channels is 0"),
        ({"strides": [2, 2]}, "strides has 2 entries; expected 4"),
    ],
)
def test_arguments_of_the_small_one_that_make_no_network(arguments, message):
    with pytest.raises(ConfigError, match=message):
        DenseUNet(**{"spatial_dims": 2, "in_channels": 1, "out_channels": 1, **arguments})


def test_the_layers_order():
    kinds = [type(m).__name__ for m in NormActConv(3, 2, 4, dropout=0.1).modules() if not list(m.children())]
    assert kinds == ["BatchNorm3d", "ReLU", "Conv3d", "Dropout"]
