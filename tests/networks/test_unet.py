from functools import partial

import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks import convert_to_torchscript
from monai.networks.blocks import Convolution, ResidualUnit
from monai.networks.blocks.dynunet_block import UnetResBlock
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
    UNet,
)

CONV_NORM_ACT = partial(Convolution, adn_ordering="NDA", act="LEAKYRELU", norm="INSTANCE", bias=False)

VARIANTS = {
    "thesis 2d": partial(UNet, 2, 2, 1, channels=(4, 8, 16)),
    "residual": partial(UNet, 2, 2, 1, channels=(4, 8, 16), block=PreActResidual),
    "residual, normalized": partial(
        UNet, 2, 2, 1, channels=(4, 8, 16), block=partial(PreActResidual, shortcut_norm="BATCH")
    ),
    "strided, interpolated, anisotropic": partial(
        UNet,
        3,
        1,
        3,
        channels=(4, 8, 16),
        strides=[[2, 2, 1], [2, 2, 2]],
        layers=[1, 1, 2],
        decoder_layers=1,
        block=CONV_NORM_ACT,
        down=CONV_NORM_ACT,
        up=partial(InterpolateConv, conv=CONV_NORM_ACT),
    ),
    "residual units of MONAI": partial(
        UNet, 3, 1, 3, channels=(4, 8), layers=1, block=partial(ResidualUnit, norm="BATCH"), down=MaxPool
    ),
    "thin at full size, for small volumes on a CPU": partial(
        UNet,
        3,
        1,
        3,
        channels=(2, 8, 16),
        layers=(1, 1, 1),
        block=partial(UnetResBlock, kernel_size=3, stride=1, norm_name="batch"),
        down=partial(CONV_NORM_ACT, kernel_size=2, padding=0),
        up=partial(TransposedConv, kernel_size=None, act=None, norm=None),
        head=partial(Head, kernel_size=1),
    ),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small lose more time to a second thread than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def network(request) -> UNet:
    torch.manual_seed(0)
    return request.param()


def image(network: UNet, size: int = 16, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, network.in_channels, *[size] * network.spatial_dims, generator=generator)


def trainable(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize(("channels", "count"), [(1, 34_526_401), (2, 34_526_977)])
def test_default_has_the_parameters_of_table_4_3(channels, count):
    with torch.device("meta"):
        assert trainable(UNet(2, channels, 1)) == count


def test_default_has_the_layers_of_table_4_3():
    with torch.device("meta"):
        network = UNet(2, 2, 1)
    widths = [
        (type(m).__name__, m.in_channels, m.out_channels, m.kernel_size)
        for m in network.modules()
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
    ]
    k = (3, 3)
    down = [(2, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
    down += [(512, 1024), (1024, 1024)]
    expected = [("Conv2d", i, o, k) for i, o in down]
    for width in (512, 256, 128, 64):
        expected += [("ConvTranspose2d", 2 * width, width, k), ("Conv2d", 2 * width, width, k)]
        expected += [("Conv2d", width, width, k)]
    assert widths == [*expected, ("Conv2d", 64, 1, k)]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == 22
    assert sum(isinstance(m, nn.MaxPool2d) for m in network.modules()) == 4


def test_default_emits_logits():
    torch.manual_seed(0)
    y = VARIANTS["thesis 2d"]()(torch.randn(4, 2, 32, 32) * 10)
    assert y.min() < 0
    assert y.max() > 1 or y.min() < -1


def test_kernels_are_he_normal_and_biases_zero():
    torch.manual_seed(0)
    network = UNet(2, 2, 1, channels=(64, 128))
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.weight.numel() > 30_000:
            fan_in = module.weight[0].numel()
            assert module.weight.var().item() == pytest.approx(2 / fan_in, rel=0.05)
            assert module.bias.abs().max() == 0


def test_initializer_is_replaceable():
    def ones(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.ones_(module.weight)

    network = UNet(2, 1, 1, channels=(2, 4), initializer=ones)
    assert network.head.conv.weight.unique().tolist() == [1]


def test_shapes_even_and_odd(network):
    for size in (16, 17, 13):
        x = image(network, size)
        assert network(x).shape == (2, network.out_channels, *x.shape[2:])
    sizes = (11, 16, 7)[: network.spatial_dims]
    assert network(torch.zeros(2, network.in_channels, *sizes)).shape[2:] == sizes


def test_every_parameter_receives_a_gradient(network):
    network(image(network, 17)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_torchscript_gives_the_same_numbers(network, tmp_path):
    network.eval()
    scripted = convert_to_torchscript(network, filename_or_obj=str(tmp_path / "model.ts"))
    loaded = torch.jit.load(tmp_path / "model.ts")
    for size in (16, 17):
        x = image(network, size)
        torch.testing.assert_close(scripted(x), network(x))
        torch.testing.assert_close(loaded(x), network(x))


def test_torchscript_trains(network):
    torch.jit.script(network.train())(image(network)).mean().backward()
    assert next(network.parameters()).grad is not None


@pytest.mark.parametrize("variant", ["thesis 2d", "residual, normalized", "strided, interpolated, anisotropic"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_and_export_give_the_same_numbers(variant):
    network = VARIANTS[variant]().eval()
    x = image(network, 17)
    torch.testing.assert_close(torch.jit.trace(network, x)(x), network(x))
    torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), network(x))


def test_channels_last_gives_the_same_numbers(network):
    layout = torch.channels_last if network.spatial_dims == 2 else torch.channels_last_3d
    x = image(network, 17)
    expected = network.eval()(x)
    actual = network.to(memory_format=layout)(x.to(memory_format=layout))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(network, dtype):
    x = image(network, 17)
    expected = network.eval()(x)
    with torch.autocast("cpu", dtype=dtype):
        autocast = network(x)
    half = network.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    for actual in (autocast, half):
        error = (actual.float() - expected).norm() / expected.norm()
        assert error < 0.05


def test_a_state_dict_round_trips(network, tmp_path):
    network.eval()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    expected = network(image(network))
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    network.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    torch.testing.assert_close(network(image(network)), expected)


class Add(nn.Module):
    def __init__(self, spatial_dims: int, skip_channels: int, up_channels: int) -> None:
        super().__init__()
        assert skip_channels == up_channels
        self.out_channels = up_channels

    def forward(self, skip: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return skip + up


class GrowingBlock(nn.Module):
    """Concatenates its input to its output, so it is wider than it was asked to be."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_channels = in_channels + out_channels
        self.conv = ConvActNorm(spatial_dims, in_channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, self.conv(x)), dim=1)


def test_parts_of_a_user_fit():
    network = UNet(2, 3, 2, channels=(4, 4, 4), skip=Add, bottleneck=partial(ConvActNorm, dropout=0.5))
    assert network(torch.zeros(2, 3, 9, 9)).shape == (2, 2, 9, 9)
    assert sum(isinstance(m, nn.Dropout) for m in network.modules()) == 2
    network = UNet(2, 3, 2, channels=(4, 8, 16), block=GrowingBlock)
    assert network(torch.zeros(2, 3, 9, 9)).shape == (2, 2, 9, 9)


def test_the_way_up_may_be_made_of_other_blocks():
    network = UNet(2, 3, 2, channels=(4, 4, 4), decoder_block=GrowingBlock, bottleneck=PreActResidual)
    assert not any(isinstance(m, GrowingBlock) for m in network.encoder.modules())
    assert not any(isinstance(m, PreActResidual) for m in network.decoder.modules())
    assert sum(isinstance(m, GrowingBlock) for m in network.decoder.modules()) == 4
    assert network(torch.zeros(2, 3, 9, 9)).shape == (2, 2, 9, 9)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_deep_supervision_adds_the_coarser_levels_in_training_only(spatial_dims):
    torch.manual_seed(0)
    network = UNet(spatial_dims, 1, 2, channels=(4, 6, 8, 10), deep_supervision=2)
    x = image(network, 17)
    seen = []
    hooks = [up.register_forward_hook(lambda module, given, output: seen.append(output)) for up in network.decoder]
    logits = network(x)
    for hook in hooks:
        hook.remove()
    assert logits.shape == (2, 3, 2, *x.shape[2:])
    torch.testing.assert_close(logits[:, 0], network.head(seen[2]))
    for number, features in ((1, seen[1]), (2, seen[0])):  # the finest first
        side = network.side_heads[number - 1](features)
        mode = "bilinear" if spatial_dims == 2 else "trilinear"
        torch.testing.assert_close(logits[:, number], nn.functional.interpolate(side, x.shape[2:], mode=mode))
    torch.testing.assert_close(torch.jit.script(network)(x), logits)
    plain = UNet(spatial_dims, 1, 2, channels=(4, 6, 8, 10))
    missing = plain.load_state_dict(network.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all(key.startswith("side_heads.") for key in missing.unexpected_keys)
    torch.testing.assert_close(network.eval()(x), plain.eval()(x))


def test_deep_supervision_teaches_the_coarser_levels_directly():
    network = UNet(2, 1, 1, channels=(4, 6, 8), deep_supervision=1)
    network(image(network))[:, 1].square().mean().backward()
    assert network.decoder[0].up.conv.weight.grad.abs().max() > 0
    assert network.decoder[1].up.conv.weight.grad.abs().max() == 0


def test_a_bundle_configuration_builds_it():
    config = {
        "imports": ["$import functools", "$import medseg"],
        "network": {
            "_target_": "medseg.networks.UNet",
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 3,
            "channels": [4, 8],
            "strides": [[2, 2, 1]],
            "block": "$functools.partial(medseg.networks.ConvActNorm, norm='INSTANCE')",
            "down": "$medseg.networks.ConvActNorm",
            "up": "$medseg.networks.InterpolateConv",
        },
    }
    parser = ConfigParser(config)
    parser["imports"] = config["imports"]
    parser.get_parsed_content("imports")
    network = parser.get_parsed_content("network")
    assert isinstance(network, UNet)
    assert network(torch.zeros(2, 1, 8, 8, 3)).shape == (2, 3, 8, 8, 3)


def test_one_level_has_no_decoder():
    assert UNet(2, 1, 1, channels=(4,))(torch.zeros(2, 1, 5, 5)).shape == (2, 1, 5, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 4}, "spatial_dims is 4; expected 2 or 3"),
        ({"channels": ()}, r"channels is \(\); expected positive numbers"),
        ({"channels": (4, 0)}, r"channels is \(4, 0\)"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"strides": [2]}, "strides has 1 entries; expected 2, one per step"),
        ({"strides": [2, (2, 2, 2)]}, "nor 2, one per axis"),
        ({"strides": 0}, "0 is neither one positive number"),
        ({"layers": (1, 2)}, "layers has 2 entries; expected 3, one per level"),
        ({"strides": [[2, 2], [2]]}, "strides: .2. is neither one positive number"),
        ({"strides": 2.0}, "strides: 2.0 is neither"),
        ({"in_channels": 1.0}, "in_channels is 1.0; expected a positive number"),
        ({"channels": (4.0, 8)}, r"channels is \(4.0, 8\)"),
        ({"layers": 0}, "layers is 0"),
        ({"decoder_layers": (1, 0)}, r"decoder_layers is \(1, 0\)"),
        ({"decoder_layers": (1, 2, 3)}, "decoder_layers has 3 entries; expected 2"),
        ({"deep_supervision": 2}, "deep_supervision 2, head Head: expected at most 1 of 3 levels"),
        ({"deep_supervision": -1}, "deep_supervision -1"),
        ({"deep_supervision": 1, "head": Heads}, "head Heads.*a head of one output"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    arguments = {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (4, 8, 16), **arguments}
    with pytest.raises(ConfigError, match=message) as error:
        UNet(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 16, 16), (2, 16, 16), (2, 2, 16, 16, 16)])
def test_an_image_that_does_not_fit_is_named(shape):
    network = UNet(2, 2, 1, channels=(4, 8))
    with pytest.raises(ConfigError, match=r"expected \(batch, 2 channels, 2 spatial axes\)") as error:
        network(torch.zeros(shape))
    assert str(shape) in str(error.value)


def test_an_image_too_small_to_train_on_is_named():
    network = UNet(2, 1, 1, channels=(4, 8, 16))
    with pytest.raises(ConfigError, match=r"single voxel of the coarsest features.*two images or more"):
        network(torch.zeros(1, 1, 4, 3))
    assert network(torch.zeros(2, 1, 4, 3)).shape == (2, 1, 4, 3)
    assert network(torch.zeros(1, 1, 4, 5)).shape == (1, 1, 4, 5)
    assert network.eval()(torch.zeros(1, 1, 1, 1)).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("norm", ["BATCH_RENORM", "INSTANCE"])
def test_an_image_too_small_for_other_normalizations_is_named(norm):
    network = UNet(2, 1, 1, channels=(4, 8), block=partial(ConvActNorm, norm=norm))
    with pytest.raises(ConfigError, match="single voxel"):
        network(torch.zeros(1, 1, 2, 2))
    if norm == "INSTANCE":  # a single voxel of an image has no variance, however many images there are
        with pytest.raises(ConfigError, match=r"instance normalization.*larger images"):
            network.eval()(torch.zeros(2, 1, 2, 2))
    assert network.train()(torch.zeros(1, 1, 2, 4)).shape == (1, 1, 2, 4)
