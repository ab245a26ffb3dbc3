from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets.resnet import ResNetFeatures
from torch import nn

from medseg.errors import ConfigError
from medseg.networks import BottleneckResNet, InvertedResidual, MobileNetV2, count_parameters

ENCODERS = {
    "MobileNetV2": partial(MobileNetV2, width=0.25),
    "ResNet": partial(BottleneckResNet, layers=(1, 2, 2, 2), width=0.125),
    "ResNet, deep stem": partial(BottleneckResNet, layers=(1, 1, 1, 2), width=0.125, deep_stem=True),
}


@pytest.fixture(params=ENCODERS.values(), ids=ENCODERS.keys())
def encoder(request):
    return request.param


def lively(network: nn.Module) -> nn.Module:
    """In eval mode, with statistics under which no feature dies out on its way."""
    network.train()
    with torch.no_grad():
        for _ in range(30):
            network(torch.randn(2, 2, 64, 64))
    return network.eval()


def test_counts_of_the_published_networks():
    # As torchvision's mobilenet_v2 (3,504,872) without its classifier of 1,000 and the 1×1 convolution before it.
    assert count_parameters(MobileNetV2(2, 3)) == 3_504_872 - 1_281_000 - (320 * 1280 + 2 * 1280) == 1_811_712
    # As torchvision's resnet50 (25,557,032) without its classifier.
    assert count_parameters(BottleneckResNet(2, 3)) == 25_557_032 - 2_049_000 == 23_508_032


def test_widths_are_multiples_of_eight_as_published():
    # The widths of Keras' and torchvision's MobileNetV2 at these multipliers.
    assert MobileNetV2(2, 3, width=0.35).widths == (8, 8, 16, 32, 112)
    assert MobileNetV2(2, 3, width=1.4).widths == (24, 32, 48, 136, 448)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_features_are_what_the_attributes_say(encoder, spatial_dims, output_stride):
    network = encoder(spatial_dims, 2, output_stride=output_stride).eval()
    size = (37, 64, 33)[:spatial_dims]
    with torch.no_grad():
        features = network(torch.zeros(1, 2, *size))
    assert network.strides == tuple(min(2**level, output_stride) for level in range(1, 6))
    expected = [(1, w, *[-(-n // s) for n in size]) for w, s in zip(network.widths, network.strides, strict=True)]
    assert [tuple(f.shape) for f in features] == expected


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation_fills_in_between_the_strided_features(encoder, output_stride):
    """With the same weights every s-th feature is that of the strided network, borders and odd sizes included."""
    torch.manual_seed(0)
    strided = lively(encoder(2, 2, output_stride=32))
    dilated = encoder(2, 2, output_stride=output_stride).eval()
    dilated.load_state_dict(strided.state_dict())
    image = torch.randn(1, 2, 75, 96)
    with torch.no_grad():
        for fine, coarse, own, other in zip(
            dilated(image), strided(image), dilated.strides, strided.strides, strict=True
        ):
            step = other // own
            assert coarse.std() > 0.01
            torch.testing.assert_close(fine[..., ::step, ::step], coarse)
            if step > 1:
                between = fine[..., 1::step, ::step]
                assert not torch.allclose(between, coarse[..., : between.shape[-2], :])


def test_strided_resnet_is_monais():
    torch.manual_seed(0)
    theirs = ResNetFeatures("resnet50", pretrained=False, spatial_dims=2, in_channels=3).eval()
    ours = BottleneckResNet(2, 3).eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(1, 3, 45, 64)
    with torch.no_grad():
        for found, expected in zip(ours(image), theirs(image), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_inverted_residual_adds_its_input_only_where_it_fits():
    x = torch.randn(1, 8, 9, 9)
    for layer, adds in (
        (InvertedResidual(2, 8, 8), True),
        (InvertedResidual(2, 8, 8, strides=2), False),
        (InvertedResidual(2, 8, 16), False),
        (InvertedResidual(2, 8, 8, expansion=1), True),
    ):
        torch.nn.init.zeros_(layer.layers[-1].conv.weight)
        with torch.no_grad():
            y = layer.eval()(x)
        assert torch.equal(y, x) if adds else not y.any()
    # 1×1 to 48, 3×3 on each of 48, 1×1 to 8, and two per channel of normalization.
    assert count_parameters(InvertedResidual(2, 8, 8)) == 8 * 48 + 9 * 48 + 48 * 8 + 2 * (48 + 48 + 8)


@settings(max_examples=15, deadline=None)
@given(
    size=st.lists(st.integers(1, 70), min_size=2, max_size=2),
    output_stride=st.sampled_from([8, 16, 32]),
    kind=st.sampled_from(sorted(ENCODERS)),
)
def test_any_size(size, output_stride, kind):
    network = ENCODERS[kind](2, 1, output_stride=output_stride).eval()
    with torch.no_grad():
        features = network(torch.zeros(1, 1, *size))
    for f, stride in zip(features, network.strides, strict=True):
        assert list(f.shape[2:]) == [-(-n // stride) for n in size]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (partial(MobileNetV2, 1, 3), "spatial_dims is 1"),
        (partial(BottleneckResNet, 2, 0), "in_channels is 0"),
        (partial(MobileNetV2, 2, 3, output_stride=4), "output_stride is 4; expected 8, 16 or 32"),
        (partial(BottleneckResNet, 2, 3, width=0), "width is 0"),
        (partial(BottleneckResNet, 2, 3, layers=(3, 4, 6)), "expected four positive numbers"),
    ],
)
def test_bad_arguments(build, words):
    with pytest.raises(ConfigError, match=words) as caught:
        build()
    assert "\n" not in str(caught.value)
