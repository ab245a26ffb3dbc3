"""Patch classifiers: the forms for patches and for whole images give the same numbers."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medseg.errors import ConfigError
from medseg.networks import (
    PatchByPatch,
    PatchClassifier,
    TriplanarClassifier,
    count_parameters,
    patches_around,
    receptive_field,
)

SMALL = {"convolutions": [(4, 3, 2), (6, 3, 2)], "hidden": [8]}

NETWORKS = {
    "tutorial": partial(PatchClassifier, 2, 3, 5, hidden=[16]),
    "mlp 5": partial(PatchClassifier, 2, 1, 2, scales=[(5, 1)], convolutions=(), hidden=[8, 8], act="RELU"),
    "mlp 11, reflect": partial(
        PatchClassifier, 2, 1, 2, scales=[(11, 1)], convolutions=(), hidden=[8], padding="reflect"
    ),
    "linear": partial(PatchClassifier, 2, 1, 2, scales=[(5, 1)], convolutions=(), hidden=()),
    "average, replicate": partial(PatchClassifier, 2, 2, 3, scales=[(19, 1)], pool="AVG", padding="replicate", **SMALL),
    "pooling by 3, odd rest": partial(
        PatchClassifier, 2, 1, 2, scales=[(29, 1)], convolutions=[(4, 5, 3), (4, 2, 2), (4, 2, 1)], hidden=[8]
    ),
    "three scales": partial(PatchClassifier, 2, 1, 2, scales=[(15, 1), (11, 3), (15, 5)], **SMALL),
    "features": partial(PatchClassifier, 2, 4, 2, scales=[(15, 1)], features=3, **SMALL),
    "3d": partial(PatchClassifier, 3, 2, 3, scales=[(9, 1), (5, 3)], features=1, convolutions=[(4, 3, 2)], hidden=[8]),
    "triplanar": partial(TriplanarClassifier, 1, 3, scales=[(11, 1)], convolutions=[(4, 3, 2)], hidden=[8]),
    "triplanar, two scales, features, reflect": partial(
        TriplanarClassifier,
        5,
        3,
        scales=[(9, 1), (3, 3)],
        features=3,
        convolutions=[(4, 2, 2)],
        hidden=[8, 8],
        padding="reflect",
    ),
}


def make(build: Callable[[], PatchClassifier]) -> PatchClassifier:
    torch.manual_seed(0)
    network = build().eval()
    for module in network.modules():  # biases that are zero would hide what they are added to
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            nn.init.normal_(module.bias)
    return network


def image_for(network: PatchClassifier, seed: int = 0) -> torch.Tensor:
    size = (16, 19) if network.spatial_dims == 2 else (9, 7, 8)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, network.in_channels, *size, generator=generator)


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def network(request: pytest.FixtureRequest) -> PatchClassifier:
    return make(request.param)


def test_the_whole_image_equals_patch_by_patch(network: PatchClassifier) -> None:
    image = image_for(network)
    with torch.no_grad():
        whole, patches = network(image), PatchByPatch(network, batch_size=100)(image)
    assert whole.shape == (2, network.out_channels, *image.shape[2:])
    scale = patches.std(dim=(0, *range(2, patches.ndim))).max().item()
    assert scale > 0.05, "logits that are the same everywhere prove nothing"
    torch.testing.assert_close(whole, patches, rtol=0, atol=2e-5 * max(1.0, scale))


def test_gradients_are_the_same_too(network: PatchClassifier) -> None:
    image = image_for(network).double()
    network.double()
    found = []
    for form in (network, PatchByPatch(network)):
        network.zero_grad()
        form(image).square().mean().backward()
        found.append([p.grad.clone() for p in network.parameters()])
    for whole, patches in zip(*found, strict=True):
        torch.testing.assert_close(whole, patches)


def test_slabs_do_not_show_and_are_no_thinner_than_a_patch(network: PatchClassifier) -> None:
    size = network.patch_size
    image = torch.randn(1, network.in_channels, 2 * size + 3, *[size // 2 + 2] * (network.spatial_dims - 1))
    slabs = []
    merged = network._merged
    network._merged = lambda slab: (slabs.append(slab.shape[2] - size + 1), merged(slab))[1]
    with torch.no_grad():
        at_once = network(image)
        network.largest_map = 1
        torch.testing.assert_close(network(image), at_once)
    assert slabs == [2 * size + 3, size, size, 3]


def test_layers_that_pool_nothing_cost_nothing() -> None:
    network = PatchClassifier(2, 1, 2, scales=[(9, 1), (5, 3)], convolutions=[(4, 2, 1), (4, 2, 2)])
    pools = [type(module).__name__ for module in network.modules() if "Pool" in type(module).__name__]
    assert sorted(pools) == ["AvgPool2d", "MaxPool2d", "MaxPool2d"]


def test_a_patch_is_what_lies_around_its_voxel(network: PatchClassifier) -> None:
    """Cut by hand: plain slicing of a padded image, three planes one after the other."""
    image, size = image_for(network), network.patch_size
    voxel = (3, 6) if network.spatial_dims == 2 else (8, 0, 5)
    channels = network.in_channels - network.features
    padded = nn.functional.pad(image, [size // 2] * (2 * network.spatial_dims), mode=network.padding)[:1, :channels]
    windows = tuple(slice(at, at + size) for at in voxel)
    patch = padded[(..., *windows)]
    if network.triplanar:
        middle = size // 2
        patch = torch.cat((patch[..., middle], patch[..., middle, :], patch[..., middle, :, :]), 1)
    features = image[(slice(0, 1), slice(channels, None), *voxel)] if network.features else None
    with torch.no_grad():
        alone = network.forward_patches(patch, features)
        whole = network(image)[(slice(0, 1), slice(None), *voxel)]
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-4)


def test_planes_as_channels_of_one_network() -> None:
    network = make(partial(PatchClassifier, 2, 3 * 2 + 1, 4, scales=[(11, 1)], features=1, **SMALL))
    slow = PatchByPatch(network, triplanar=True, batch_size=50)
    assert (slow.in_channels, slow.out_channels, slow.spatial_dims) == (3, 4, 3)
    volume = torch.randn(1, 3, 6, 7, 5)
    voxels = torch.tensor([[0, 0, 0], [3, 6, 2], [5, 1, 4]])
    patches = patches_around(volume[0, :2], voxels, 11, triplanar=True)
    with torch.no_grad():
        expected = network.forward_patches(patches, volume[0, 2:][(slice(None), *voxels.t())].t())
        found = slow(volume)[0][(slice(None), *voxels.t())].t()
    torch.testing.assert_close(found, expected)


def test_the_example_of_the_tutorial() -> None:
    network = PatchClassifier(2, 3, 135)
    first = 5 * 5 * 3 * 20 + 20 + 20
    second = 3 * 3 * 20 * 50 + 50 + 50
    dense = 1250 * 2000 + 2000 + 2000
    assert count_parameters(network) == first + second + dense + 2000 * 135 + 135 == 2_784_775
    assert network.patch_size == 29
    assert network.merge.in_features == 1250
    assert network.forward_patches(torch.zeros(2, 3, 29, 29)).shape == (2, 135)
    # 29 - 4 = 25 is odd: the pooling leaves out the 25th, so the last voxel of the patch is never seen
    assert receptive_field(PatchClassifier(2, 1, 2, hidden=[8]), 40) == (28, 28)


def test_the_mlp_is_plain_dense_layers() -> None:
    torch.manual_seed(0)
    network = PatchClassifier(2, 1, 10, scales=[(11, 1)], convolutions=(), hidden=[64], act="RELU")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(121, 64), nn.ReLU(), nn.Linear(64, 10))
    assert count_parameters(network) == count_parameters(plain) == 121 * 64 + 64 + 64 * 10 + 10
    with torch.no_grad():
        for own, other in zip(network.parameters(), plain.parameters(), strict=True):
            other.copy_(own)
    patches = torch.randn(7, 1, 11, 11)
    torch.testing.assert_close(network.forward_patches(patches), plain(patches))
    bound = (6 / (121 + 64)) ** 0.5
    assert 0.95 * bound < network.merge.weight.abs().max() <= bound, "Glorot, uniform"


def test_each_scale_sees_what_it_says() -> None:
    network = PatchClassifier(2, 1, 2, scales=[(5, 1), (5, 3)], convolutions=[(2, 3, 1)], hidden=[4])
    assert network.patch_size == 15
    assert receptive_field(network, 31) == (15, 15)
    with torch.no_grad():
        network.merge.weight[:, network.widths[0] :] = 0
    assert receptive_field(network, 31) == (5, 5)
    # What a coarse scale sees are averages: moving brightness about within a block changes nothing.
    coarse = make(partial(PatchClassifier, 2, 1, 2, scales=[(5, 3)], convolutions=[(2, 3, 1)], hidden=[4]))
    patch = torch.randn(1, 1, 15, 15)
    blocks = patch.unfold(2, 3, 3).unfold(3, 3, 3).mean((-1, -2))
    torch.testing.assert_close(
        coarse.forward_patches(patch), coarse.forward_patches(blocks.repeat_interleave(3, 2).repeat_interleave(3, 3))
    )


@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=3),
    half=st.integers(0, 3),
    data=st.data(),
)
@settings(max_examples=30)
def test_a_patch_has_its_voxel_in_the_middle_and_zeros_outside(
    shape: list[int], half: int, data: st.DataObject
) -> None:
    image = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(1, *shape)
    voxel = [data.draw(st.integers(0, n - 1)) for n in shape]
    offset = [data.draw(st.integers(-half, half)) for _ in shape]
    patch = patches_around(image, torch.tensor([voxel]), 2 * half + 1)
    assert patch.shape == (1, 1, *[2 * half + 1] * len(shape))
    there = [at + o for at, o in zip(voxel, offset, strict=True)]
    inside = all(0 <= at < n for at, n in zip(there, shape, strict=True))
    assert patch[(0, 0, *(half + o for o in offset))] == (image[(0, *there)] if inside else 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 1}, "spatial_dims is 1"),
        ({"scales": [(28, 1)]}, "odd numbers"),
        ({"scales": [(29, 2)]}, "odd numbers"),
        ({"scales": ()}, "odd numbers"),
        ({"features": 3}, "a channel that is no feature"),
        ({"pool": "max"}, "pool 'max'"),
        ({"padding": "zeros"}, "padding 'zeros'"),
        ({"convolutions": [(4, 3, 2)] * 5}, r"\(4, 3, 2\) leaves nothing of 1 voxels"),
        ({"convolutions": [(4, 3, 0)]}, "all positive"),
        ({"hidden": [0]}, r"hidden \(0,\)"),
    ],
)
def test_impossible_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        PatchClassifier(**{"spatial_dims": 2, "in_channels": 3, "out_channels": 2, **arguments})
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_named() -> None:
    network = PatchClassifier(2, 3, 2, scales=[(9, 1)], features=1, padding="reflect", convolutions=(), hidden=[4])
    with pytest.raises(ConfigError, match=r"expected \(batch, 3 channels, 2 spatial axes\)"):
        network(torch.zeros(1, 2, 20, 20))
    with pytest.raises(ConfigError, match="at least 5 along each axis, or another padding"):
        network(torch.zeros(1, 3, 20, 4))
    with pytest.raises(ConfigError, match=r"with 0 features: expected \(patches, 2, 9, 9\) and 1 features each"):
        network.forward_patches(torch.zeros(4, 2, 9, 9))
    with pytest.raises(ConfigError, match=r"\(4, 2, 7, 7\)"):
        network.forward_patches(torch.zeros(4, 2, 7, 7), torch.zeros(4, 1))
    with pytest.raises(ConfigError, match="3 channels per channel of the volume"):
        PatchByPatch(network, triplanar=True)
    with pytest.raises(ConfigError, match=r"expected \(batch, 3 channels"):
        PatchByPatch(network)(torch.zeros(1, 1, 9, 9))
    with pytest.raises(ConfigError, match="some lie outside"):
        patches_around(torch.zeros(1, 4, 4), torch.tensor([[4, 0]]), 3)
    with pytest.raises(ConfigError, match="odd number"):
        patches_around(torch.zeros(1, 4, 4), torch.tensor([[0, 0]]), 4)
    with pytest.raises(ConfigError, match="3 spatial axes"):
        patches_around(torch.zeros(1, 4, 4), torch.tensor([[0, 0]]), 3, triplanar=True)
