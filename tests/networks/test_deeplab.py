from functools import partial

import pytest
import torch
from torch import nn

from medseg.errors import ConfigError
from medseg.networks import ASPP, BottleneckResNet, DeepLabV3Plus, MobileNetV2, count_parameters, kits_deeplab

NARROW = partial(MobileNetV2, width=0.25)
GROUP = ("GROUP", {"num_groups": 4})


class HalvesOnce(nn.Conv2d):
    """An encoder that has no features of stride 4."""

    def __init__(self, spatial_dims: int, in_channels: int, output_stride: int) -> None:
        super().__init__(in_channels, 8, 2, stride=2)
        self.widths, self.strides = (8,), (2,)


def test_count_of_the_kidney_work():
    network = kits_deeplab()
    assert count_parameters(network, running_statistics=True) == 2_142_019
    assert network.encoder.strides == (2, 4, 8, 8, 8)
    with torch.no_grad():
        assert network.eval()(torch.zeros(1, 3, 128, 128)).shape == (1, 3, 128, 128)
    assert {m.eps for m in network.encoder.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}


def test_count_of_the_published_network_is_the_sum_of_its_parts():
    aspp = 2 * 320 * 256 + 3 * 9 * 320 * 256 + 5 * 256 * 256 + 2 * 6 * 256
    decoder = 24 * 48 + 2 * 48 + 9 * (256 + 48) * 256 + 9 * 256 * 256 + 4 * 256
    assert count_parameters(DeepLabV3Plus(2, 3, 3)) == 1_811_712 + aspp + decoder + 3 * 256 + 3


@pytest.mark.parametrize(
    ("output_stride", "rates"), [(8, (12, 24, 36)), (16, (6, 12, 18)), (32, (3, 6, 9))], ids=["8", "16", "32"]
)
def test_rates_cover_the_same_part_of_the_image(output_stride, rates):
    network = DeepLabV3Plus(2, 1, 2, encoder=NARROW, output_stride=output_stride, channels=8)
    assert [branch.conv.dilation for branch in network.aspp.atrous] == [(rate, rate) for rate in rates]
    assert network.encoder.strides[-1] == output_stride


def test_aspp_looks_exactly_where_its_rates_say():
    torch.manual_seed(0)
    aspp = ASPP(2, 1, 1, rates=(2, 5), norm=("GROUP", {"num_groups": 1})).eval()
    for branch in aspp.atrous:
        x = torch.zeros(1, 1, 13, 13, requires_grad=True)
        branch.conv(x)[0, 0, 6, 6].backward()
        rate = branch.conv.dilation[0]
        seen = [(6 + rate * i, 6 + rate * j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        assert [tuple(p) for p in x.grad[0, 0].nonzero().tolist()] == seen


def test_aspp_sees_the_whole_image_through_its_mean():
    torch.manual_seed(0)
    aspp = ASPP(2, 4, 8, rates=()).eval()
    x = torch.randn(1, 4, 9, 9)
    moved = x.clone()
    moved[..., 0, 0] += 100.0
    with torch.no_grad():
        assert not torch.allclose(aspp(x)[..., 8, 8], aspp(moved)[..., 8, 8])
        # The same mean, arranged in another way: nothing changes but the place itself.
        swapped = x.clone()
        swapped[..., 0, 0], swapped[..., 0, 1] = x[..., 0, 1], x[..., 0, 0]
        torch.testing.assert_close(aspp(x)[..., 1:, :], aspp(swapped)[..., 1:, :])


def test_decoder_takes_the_features_of_stride_4():
    network = DeepLabV3Plus(2, 1, 2, encoder=partial(BottleneckResNet, layers=(1, 1, 1, 1), width=0.125), channels=8)
    assert network.decoder.project.conv.in_channels == network.encoder.widths[1] == 32
    with torch.no_grad():
        coarse, fine = torch.zeros(2, 8, 3, 3), torch.zeros(2, 32, 11, 12)
        assert network.decoder(coarse, fine).shape == (2, 8, 11, 12)


def test_a_single_image_in_training():
    network = DeepLabV3Plus(2, 1, 2, encoder=NARROW, channels=8)
    with pytest.raises(ConfigError, match="two images or more"):
        network(torch.zeros(1, 1, 64, 64))
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()  # as a fine-tuning with frozen statistics has it
    assert network(torch.zeros(1, 1, 64, 64)).shape == (1, 2, 64, 64)
    network = DeepLabV3Plus(2, 1, 2, encoder=NARROW, channels=8, low_level_channels=4, norm=GROUP)
    assert network(torch.zeros(1, 1, 64, 64)).shape == (1, 2, 64, 64)
    with pytest.raises(ConfigError, match="single voxel"):
        network(torch.zeros(1, 1, 16, 16))
    groups = DeepLabV3Plus(2, 1, 2, encoder=partial(NARROW, norm=GROUP), channels=8, low_level_channels=4, norm=GROUP)
    assert groups(torch.zeros(1, 1, 16, 16)).shape == (1, 2, 16, 16)


@pytest.mark.parametrize(("norm", "images"), [("BATCH_RENORM", 1), ("INSTANCE", 2)])
def test_the_mean_of_an_image_has_nothing_to_normalize(norm, images):
    network = DeepLabV3Plus(2, 1, 2, encoder=NARROW, channels=8, norm=norm)
    with pytest.raises(ConfigError, match="single voxel"):
        network(torch.zeros(images, 1, 64, 64))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (partial(DeepLabV3Plus, 2, 1, 0), "out_channels is 0"),
        (partial(DeepLabV3Plus, 2, 1, 2, output_stride=12), "output_stride is 12; expected 8, 16 or 32"),
        (partial(DeepLabV3Plus, 4, 1, 2), "spatial_dims is 4"),
        (partial(DeepLabV3Plus, 2, 1, 2, rates=(0, 6)), "expected positive rates"),
        (
            partial(DeepLabV3Plus, 2, 1, 2, encoder=HalvesOnce),
            "strides \\(2,\\), but the decoder takes those of stride 4",
        ),
    ],
)
def test_bad_arguments(build, words):
    with pytest.raises(ConfigError, match=words) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 32, 32, 32)])
def test_images_that_do_not_fit(shape):
    network = DeepLabV3Plus(2, 1, 2, encoder=NARROW, channels=8)
    with pytest.raises(ConfigError, match="does not fit the network"):
        network(torch.zeros(shape))
