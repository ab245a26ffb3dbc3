"""The dense CRF: against all pairs summed one by one, and on noisy masks whose truth is known."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from medseg.errors import ConfigError, GeometryError
from medseg.transforms import DenseCRF, DenseCRFd

SIZES = {2: ((32, 30), (1.0, 1.5)), 3: ((14, 12, 8), (1.0, 1.0, 2.0))}


def exact(q, image, spacing, intensity, mm, weight, smooth_mm, smooth_weight, iterations):
    """Mean field with every pair of voxels; q (classes, *spatial) sums to 1."""
    x = np.stack(np.meshgrid(*[np.arange(n) * s for n, s in zip(q.shape[1:], spacing, strict=True)], indexing="ij"))
    x, colors = x.reshape(len(spacing), -1).T, image.reshape(len(image), -1).T / np.asarray(intensity)
    far, unlike = (((a[:, None] - a[None]) ** 2).sum(-1) for a in (x, colors))
    total = 0
    for w, kernel in (
        (weight, np.exp(-far / 2 / mm**2 - unlike / 2)),
        (smooth_weight, np.exp(-far / 2 / smooth_mm**2)),
    ):
        sums = kernel.sum(1)
        total = total + w * kernel / np.sqrt(sums[:, None] * sums[None])
    unary = np.log(q).reshape(len(q), -1)
    flat = q.reshape(len(q), -1)
    for _ in range(iterations):
        energy = unary + flat @ total
        flat = np.exp(energy - energy.max(0))
        flat /= flat.sum(0)
    return flat.reshape(q.shape)


def ball(shape, spacing, radius):
    center = [(n - 1) / 2 for n in shape]
    axes = [(np.arange(n) - c) * s for n, c, s in zip(shape, center, spacing, strict=True)]
    return (np.stack(np.meshgrid(*axes, indexing="ij")) ** 2).sum(0) < radius**2


def noisy(dims, channels=1, seed=0):
    """Truth, an image that shows it in noise, and a probability that is wrong in a third of all voxels."""
    rng = np.random.default_rng(seed)
    shape, spacing = SIZES[dims]
    truth = ball(shape, spacing, 10 if dims == 2 else 4.5)
    image = np.stack([100 * truth + rng.normal(0, 10, shape) for _ in range(channels)])
    logits = 1.6 * (truth - 0.5) + rng.normal(0, 1.5, shape)
    return truth, torch.from_numpy(image).float(), torch.from_numpy(1 / (1 + np.exp(-logits))).float()[None], spacing


def dice(pred, truth):
    return 2 * (pred & truth).sum() / (pred.sum() + truth.sum())


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dims", [2, 3])
def test_it_mends_a_noisy_mask_and_equals_the_sum_over_all_pairs(dims, channels):
    truth, image, p, spacing = noisy(dims, channels)
    refined = DenseCRF([30.0] * channels, 5.0, 3.0, 2.0, 1.0, spacing=spacing)(p, image)
    assert refined.shape == p.shape
    before, after = (dice(x[0].numpy() > 0.5, truth) for x in (p, refined))
    assert before < 0.65
    assert after > 0.95
    both = torch.cat([1 - p, p]).double().numpy()
    expected = exact(both, image.numpy(), spacing, [30.0] * channels, 5.0, 3.0, 2.0, 1.0, 5)[1]
    difference = np.abs(refined[0].numpy() - expected)
    assert difference.mean() < 0.006
    assert difference.max() < 0.12
    assert ((refined[0].numpy() > 0.5) != (expected > 0.5)).mean() < 0.005


@pytest.mark.parametrize("dims", [2, 3])
def test_smoothing_alone_equals_the_sum_over_all_pairs_exactly(dims):
    _, image, p, spacing = noisy(dims)
    refined = DenseCRF(30.0, appearance_weight=0, smoothness_mm=1.6, smoothness_weight=2, spacing=spacing)(p, image)
    both = torch.cat([1 - p, p]).double().numpy()
    expected = exact(both, image.numpy(), spacing, [30.0], 5.0, 0.0, 1.6, 2.0, 5)[1]
    assert np.abs(refined[0].numpy() - expected).max() < 1e-3  # the kernel ends at four standard deviations


def test_several_classes_sum_to_one_and_the_order_of_classes_is_nothing():
    truth, image, p, spacing = noisy(2)
    classes = torch.cat([0.6 * (1 - p), 0.4 * (1 - p), p])
    crf = DenseCRF(30.0, 5.0, spacing=spacing)
    refined = crf(classes, image)
    torch.testing.assert_close(refined.sum(0), torch.ones(truth.shape))
    torch.testing.assert_close(crf(classes[[2, 0, 1]], image), refined[[2, 0, 1]])
    expected = exact(classes.double().numpy(), image.numpy(), spacing, [30.0], 5.0, 3.0, 2.0, 1.0, 5)
    assert np.abs(refined.numpy() - expected).mean() < 0.006


def test_one_channel_is_the_second_of_two():
    _, image, p, spacing = noisy(3)
    crf = DenseCRF(30.0, spacing=spacing)
    torch.testing.assert_close(crf(p, image), crf(torch.cat([1 - p, p]), image)[1:])


@pytest.mark.parametrize("options", [{"appearance_weight": 0, "smoothness_weight": 0}, {"iterations": 0}])
def test_without_weights_or_iterations_nothing_changes(options):
    _, image, p, spacing = noisy(2)
    torch.testing.assert_close(DenseCRF(30.0, spacing=spacing, **options)(p, image), p)


def test_an_offset_or_another_unit_of_the_image_is_nothing():
    _, image, p, spacing = noisy(2)
    image = image.round()  # so that the offset is exact in float32
    expected = DenseCRF(32.0, spacing=spacing)(p, image)
    assert torch.equal(DenseCRF(32.0, spacing=spacing)(p, image - 1024), expected)
    assert torch.equal(DenseCRF(8.0, spacing=spacing)(p, image / 4), expected)


def test_another_unit_of_length_is_nothing_and_the_spacing_counts():
    _, image, p, _ = noisy(2)
    crf = DenseCRF(30.0, 4.0, 3.0, 2.0, spacing=(1.0, 2.0))
    torch.testing.assert_close(crf(p, image), DenseCRF(30.0, 8.0, 3.0, 4.0, spacing=(2.0, 4.0))(p, image))
    assert not torch.allclose(crf(p, image), DenseCRF(30.0, 4.0, 3.0, 2.0, spacing=(2.0, 1.0))(p, image), atol=0.01)


def test_a_border_of_the_image_stops_it():
    """Two plains, the left one uncertain near the border: the class stays on its side."""
    image = torch.zeros(1, 20, 40)
    image[..., 20:] = 100
    p = torch.full((1, 20, 40), 0.1)
    p[..., 24:] = 0.9
    p[..., 16:24] = 0.5
    refined = DenseCRF(20.0, 8.0, spacing=(1.0, 1.0), smoothness_weight=0.5)(p, image)[0] > 0.5
    assert torch.equal(refined, (image[0] == 100))


def test_the_dictionary_twin_keeps_geometry_and_everything_else():
    _, image, p, spacing = noisy(3)
    affine = torch.diag(torch.tensor([-1.0, -1.0, 2.0, 1.0]))
    data = {"image": MetaTensor(image, affine=affine), "pred": MetaTensor(p, affine=affine), "case": "a"}
    refined = Compose([DenseCRFd("pred", appearance_intensity=30.0)])(data)
    assert isinstance(refined["pred"], MetaTensor)
    assert torch.equal(refined["pred"].affine, data["pred"].affine)
    assert refined["image"] is data["image"]
    assert refined["case"] == "a"
    torch.testing.assert_close(torch.as_tensor(refined["pred"]), DenseCRF(30.0, spacing=spacing)(p, image))
    torch.testing.assert_close(
        DenseCRF(30.0, spacing=spacing)(p.half(), image), refined["pred"].as_tensor(), atol=0.01, rtol=0
    )
    given = DenseCRF(30.0, spacing=spacing)(p.numpy(), image.numpy())
    assert isinstance(given, np.ndarray)
    np.testing.assert_allclose(given, refined["pred"].numpy(), atol=1e-6)


def test_a_slice_takes_the_first_two_of_three_spacings():
    _, image, p, spacing = noisy(2)
    for more in ((*spacing, 3.0), np.array([*spacing, 3.0])):
        assert torch.equal(DenseCRF(30.0, spacing=more)(p, image), DenseCRF(30.0, spacing=spacing)(p, image))


def test_certain_probabilities_and_a_flat_image_give_numbers():
    p = torch.zeros(1, 12, 12)
    p[:, :6] = 1
    refined = DenseCRF(1.0, spacing=(1.0, 1.0))(p, torch.zeros(1, 12, 12))
    assert refined.isfinite().all()
    assert torch.equal(refined > 0.5, p > 0.5)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"appearance_intensity": 0.0}, "appearance_intensity: found"),
        ({"appearance_intensity": [1.0, -1.0]}, "appearance_intensity: found"),
        ({"appearance_intensity": 1.0, "smoothness_mm": 0.0}, "smoothness_mm: found"),
        ({"appearance_intensity": 1.0, "appearance_weight": -1.0}, "appearance_weight: found -1.0"),
        ({"appearance_intensity": 1.0, "iterations": -1}, "iterations: found -1"),
    ],
)
def test_bad_arguments_are_refused(options, line):
    with pytest.raises(ConfigError, match=line):
        DenseCRF(**options)


def test_bad_images_are_refused():
    image, p, plane = torch.rand(1, 8, 8), torch.full((1, 8, 8), 0.5), (1.0, 1.0)
    with pytest.raises(GeometryError, match="is no MetaTensor"):
        DenseCRF(1.0)(p, image)
    with pytest.raises(GeometryError, match="expected one for each of 2 or 3"):
        DenseCRF(1.0, spacing=(1.0,))(p, image)
    with pytest.raises(GeometryError, match="expected one grid"):
        DenseCRF(1.0, spacing=plane)(p, image[:, 1:])
    with pytest.raises(ConfigError, match="activate the logits"):
        DenseCRF(1.0, spacing=plane)(p + 3, image)
    with pytest.raises(ConfigError, match="do not sum to 1"):
        DenseCRF(1.0, spacing=plane)(torch.cat([p, p, p]), image)
    with pytest.raises(ConfigError, match="found 2 for 1 channels"):
        DenseCRF([1.0, 1.0], spacing=plane)(p, image)
    with pytest.raises(ConfigError, match="clip the image"):
        DenseCRF(1e-9, spacing=plane)(p, image)
    with pytest.raises(ConfigError, match="found NaN"):
        DenseCRF(1.0, spacing=plane)(p, image / 0)
