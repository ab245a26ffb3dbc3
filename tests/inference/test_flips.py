"""Test-time flips: every mirror image once, back in its place, and the mean of the probabilities."""

from itertools import combinations

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer, SliceInferer

from medseg.errors import ConfigError
from medseg.inference import FlipInferer


class Counting(torch.nn.Module):
    """A network that sees left from right, and counts its calls."""

    def __init__(self, dims, channels=1):
        super().__init__()
        torch.manual_seed(0)
        self.network = (torch.nn.Conv2d, torch.nn.Conv3d)[dims - 2](1, channels, 3, padding=1)
        self.calls = 0

    def forward(self, image):
        self.calls += 1
        return 3 * self.network(image)


@pytest.mark.parametrize(("dims", "axes"), [(2, [0]), (2, [1, 0]), (3, [0, 1, 2]), (3, [2])])
def test_the_mean_over_all_mirror_images_by_hand(dims, axes):
    network = Counting(dims, channels=2)
    image = torch.randn(2, 1, *(6, 5, 4)[:dims])
    with torch.no_grad():
        found = FlipInferer(SimpleInferer(), axes, "softmax")(image, network).softmax(1)
        assert network.calls == 2 ** len(axes)
        expected = torch.zeros_like(found)
        for count in range(len(axes) + 1):
            for mirror in combinations([axis + 2 for axis in axes], count):
                expected += network(image.flip(mirror)).softmax(1).flip(mirror) / 2 ** len(axes)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_network_that_takes_either_way_is_left_as_it_is(activation):
    torch.manual_seed(0)
    pointwise = torch.nn.Sequential(torch.nn.Conv3d(1, 3, 1), torch.nn.Tanh())
    image = torch.randn(1, 1, 5, 4, 3)
    with torch.no_grad():
        logits = pointwise(image)
        found = FlipInferer(SimpleInferer(), [0, 1, 2], activation)(image, pointwise)
    both = [x.sigmoid() if activation == "sigmoid" else x.softmax(1) for x in (found, logits)]
    torch.testing.assert_close(*both)


def test_the_answer_mirrors_with_the_image():
    network, image = Counting(2), torch.randn(1, 1, 6, 5)
    flip = FlipInferer(SimpleInferer(), [0], "sigmoid")
    with torch.no_grad():
        assert not torch.allclose(network(image.flip(2)).flip(2), network(image))
        torch.testing.assert_close(flip(image.flip(2), network).flip(2), flip(image, network))


def test_no_axis_is_the_inferer_itself():
    network, image = Counting(2), torch.randn(1, 1, 6, 5)
    with torch.no_grad():
        assert torch.equal(FlipInferer(SimpleInferer(), [], "sigmoid")(image, network), network(image))
    assert network.calls == 2


def test_a_volume_slice_by_slice_keeps_its_geometry():
    network = Counting(2)
    volume = MetaTensor(torch.randn(1, 1, 6, 5, 3), affine=torch.diag(torch.tensor([2.0, 2, 3, 1])))
    flip = FlipInferer(SliceInferer(roi_size=(-1, -1), spatial_dim=2, sw_batch_size=2), [0, 1], "sigmoid")
    with torch.no_grad():
        found = flip(volume, network)
        slices = [
            FlipInferer(SimpleInferer(), [0, 1], "sigmoid")(volume[..., i].as_tensor(), network) for i in range(3)
        ]
    torch.testing.assert_close(torch.as_tensor(found), torch.stack(slices, -1))
    assert torch.equal(found.affine, volume.affine)


def test_axes_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="expected each axis once"):
        FlipInferer(SimpleInferer(), [0, 0], "sigmoid")
    for axes in ([2], [-1]):
        with pytest.raises(ConfigError, match="expected axes from 0 to 1"):
            FlipInferer(SimpleInferer(), axes, "sigmoid")(torch.zeros(1, 1, 4, 4), Counting(2))
