from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medseg.errors import ConfigError
from medseg.networks import (
    BottleneckResNet,
    KitsEncoder,
    MobileNetV2,
    PSPNet,
    PyramidPooling,
    count_parameters,
    kits_pspnet_big,
    kits_pspnet_small,
)
from medseg.networks.pspnet import WindowMean

NARROW = partial(BottleneckResNet, layers=(1, 1, 1, 1), width=0.125)
GROUP = ("GROUP", {"num_groups": 4})


def test_counts_of_the_kidney_work():
    assert count_parameters(kits_pspnet_small(), running_statistics=True) == 1_651_331
    assert count_parameters(kits_pspnet_big(initializer=None), running_statistics=True) == 46_765_763


def test_small_one_is_what_its_text_says():
    network = kits_pspnet_small().eval()
    seen = {}
    network.pyramid.register_forward_hook(lambda _, inputs, output: seen.update(inputs=inputs, output=output))
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert network(image).shape == (1, 3, 128, 128)
    features, pooled = seen["inputs"]
    assert features.shape == (1, 256, 32, 32)
    assert pooled is image
    assert seen["output"].shape == (1, 1280, 32, 32)
    assert [branch[0].window for branch in network.pyramid.branches] == [16, 8, 4, 2]


def test_big_one_is_what_its_text_says():
    network = kits_pspnet_big(initializer=None).eval()
    seen = {}
    network.pyramid.register_forward_hook(lambda _, inputs, output: seen.update(inputs=inputs, output=output))
    with torch.no_grad():
        assert network(torch.randn(1, 3, 128, 128)).shape == (1, 3, 128, 128)
    features, pooled = seen["inputs"]
    assert features is pooled
    assert features.shape == (1, 2048, 16, 16)
    assert seen["output"].shape == (1, 4096, 16, 16)


@pytest.mark.parametrize("layer", ["encoder", "fuse"])
def test_convolution_of_an_even_kernel_pads_at_the_end(layer):
    """As Keras' "same": the first output sees the first two voxels, the last one the last voxel and a zero."""
    if layer == "encoder":
        convolution = KitsEncoder(2, 1, channels=(1, 1, 1)).coarse[0].conv
    else:
        pad, layers = PSPNet(2, 1, 1, encoder=NARROW, channels=1, kernel_size=2).fuse[0]
        convolution = nn.Sequential(pad, layers.conv)
    kernel = next(m for m in convolution.modules() if isinstance(m, nn.Conv2d))
    assert kernel.kernel_size == (2, 2)
    nn.init.ones_(kernel.weight)
    if kernel.bias is not None:
        nn.init.zeros_(kernel.bias)
    image = torch.zeros(1, kernel.in_channels, 3, 3)
    image[0, 0] = torch.arange(1.0, 10.0).reshape(3, 3)
    with torch.no_grad():
        assert convolution(image)[0, 0].tolist() == [[12, 16, 9], [24, 28, 15], [15, 17, 9]]


@settings(max_examples=40, deadline=None)
@given(size=st.lists(st.integers(1, 12), min_size=2, max_size=3), window=st.integers(1, 16))
def test_window_means_cover_every_voxel_once(size, window):
    x = torch.rand(1, 2, *size, dtype=torch.float64)
    if len(size) == 3:
        x = x.float()
    found = WindowMean(window)(x)
    assert list(found.shape[2:]) == [-(-n // window) for n in size]
    expected = x
    for axis in range(2, x.ndim):
        expected = torch.cat([part.mean(axis, keepdim=True) for part in expected.split(window, axis)], axis)
    torch.testing.assert_close(found, expected)


def test_pyramid_lays_resized_means_beside_the_features():
    torch.manual_seed(0)
    pyramid = PyramidPooling(2, 1, 1, [nn.AdaptiveAvgPool2d(1), WindowMean(2)]).eval()
    for branch in pyramid.branches:
        nn.init.ones_(branch[1].conv.weight)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    features = torch.rand(1, 3, 2, 2)
    with torch.no_grad():
        found = pyramid(features, x)
    scale = (1 + 1e-5) ** -0.5  # of a normalization that has seen nothing
    assert torch.equal(found[:, :3], features)
    torch.testing.assert_close(found[0, 3], torch.full((2, 2), 7.5) * scale)
    torch.testing.assert_close(found[0, 4], torch.tensor([[2.5, 4.5], [10.5, 12.5]]) * scale)


def test_the_encoder_shares_its_channels_out():
    network = PSPNet(2, 1, 2, encoder=NARROW, channels=8)
    assert network.encoder.widths[-1] == 256
    assert [branch[1].conv.out_channels for branch in network.pyramid.branches] == [64] * 4
    assert [branch[0].output_size for branch in network.pyramid.branches] == [1, 2, 3, 6]


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (7, 9), (20, 33)])
def test_images_smaller_than_the_windows(size):
    network = kits_pspnet_small(2, 1, 2, encoder=partial(KitsEncoder, channels=(4, 8, 8)), channels=8).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 1, *size)).shape == (1, 2, *size)


def test_a_single_image_in_training():
    image = torch.zeros(1, 1, 64, 64)
    with pytest.raises(ConfigError, match="two images or more"):
        PSPNet(2, 1, 2, encoder=NARROW, channels=8)(image)
    assert PSPNet(2, 1, 2, encoder=NARROW, bins=(2, 4), channels=8)(image).shape == (1, 2, 64, 64)
    assert PSPNet(2, 1, 2, encoder=NARROW, channels=8, norm=GROUP)(image).shape == (1, 2, 64, 64)
    windows = PSPNet(2, 1, 2, encoder=NARROW, windows=(4, 2), channels=8)
    assert windows(image).shape == (1, 2, 64, 64)
    with pytest.raises(ConfigError, match="single voxel"):
        windows(image[..., :32, :32])


def test_instance_normalization_needs_more_than_one_region():
    pair = torch.zeros(2, 1, 64, 64)
    with pytest.raises(ConfigError, match="instance normalization"):
        PSPNet(2, 1, 2, encoder=NARROW, channels=8, norm="INSTANCE").eval()(pair)
    assert PSPNet(2, 1, 2, encoder=NARROW, bins=(2, 3), channels=8, norm="INSTANCE")(pair).shape == (2, 2, 64, 64)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (partial(PSPNet, 2, 0, 2), "in_channels is 0"),
        (partial(PSPNet, 2, 1, 2, encoder=NARROW, bins=()), "expected positive numbers, one per branch"),
        (partial(PSPNet, 2, 1, 2, encoder=NARROW, windows=(8, 0)), "expected positive numbers, one per branch"),
        (partial(PSPNet, 5, 1, 2, encoder=MobileNetV2), "spatial_dims is 5"),
        (partial(KitsEncoder, 1, 1), "spatial_dims is 1"),
        (partial(KitsEncoder, 2, 1, channels=(8, 16)), "expected three numbers"),
        (partial(PSPNet, 2, 1, 2, encoder=KitsEncoder, output_stride=8), "output_stride is 8; expected 4"),
    ],
)
def test_bad_arguments(build, words):
    with pytest.raises(ConfigError, match=words) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 32, 32, 32)])
def test_images_that_do_not_fit(shape):
    network = PSPNet(2, 1, 2, encoder=NARROW, channels=8)
    with pytest.raises(ConfigError, match="does not fit the network"):
        network(torch.zeros(shape))
