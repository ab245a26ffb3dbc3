"""Distances to the centroids of regions."""

import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Flip, Orientation
from scipy import ndimage
from scipy.spatial.transform import Rotation

from medseg.errors import ConfigError, DatasetError
from medseg.transforms import (
    CentroidDistances,
    CentroidDistancesd,
    PopulationZScored,
    mean_centroids,
    region_centroids,
)


def oblique() -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [12, -7, 30], degrees=True).as_matrix() @ np.diag([1.5, 0.8, 3])
    affine[:3, 3] = [-20, 31, 5]
    return affine


def labels(seed: int = 0, regions: int = 4) -> MetaTensor:
    values = np.random.default_rng(seed).integers(0, regions + 1, (1, 6, 7, 5))
    return MetaTensor(torch.from_numpy(values.astype(np.uint8)), affine=oblique())


def test_centroids_are_those_of_scipy_in_mm() -> None:
    label = labels()
    index = ndimage.center_of_mass(np.ones(label.shape[1:]), np.asarray(label[0]), [1, 2, 3, 4])
    expected = np.c_[np.array(index), np.ones(4)] @ oblique().T
    np.testing.assert_allclose(region_centroids(label, 4), expected[:, :3], atol=1e-9)
    with_others = MetaTensor(torch.where(label == 4, 250, label), affine=label.affine)
    found = region_centroids(with_others, 4)
    np.testing.assert_allclose(found[:3], expected[:3, :3], atol=1e-9)
    assert found[3].isnan().all()


def test_distances_are_those_between_points() -> None:
    image = MetaTensor(torch.zeros(2, 6, 7, 5), affine=oblique())
    centroids = [[0.0, 10.0, 3.0], [-20.0, 31.0, 5.0]]
    distances = CentroidDistances(json.loads(json.dumps(centroids)))(image)
    assert distances.shape == (2, 6, 7, 5)
    assert distances.dtype == torch.float32
    np.testing.assert_array_equal(distances.affine, image.affine)
    for voxel in ((0, 0, 0), (5, 2, 4)):
        point = (oblique() @ [*voxel, 1])[:3]
        expected = [np.linalg.norm(point - c) for c in centroids]
        np.testing.assert_allclose(distances[(slice(None), *voxel)], expected, atol=1e-4)
    assert distances[1, 0, 0, 0] == 0


def test_the_place_in_the_patient_counts_not_the_order_of_the_voxels() -> None:
    image = MetaTensor(torch.zeros(1, 6, 7, 5), affine=oblique())
    transform = CentroidDistances(region_centroids(labels(), 4))
    turn = Compose([Orientation("LPS"), Flip(2)])
    torch.testing.assert_close(transform(turn(image)), turn(transform(image)), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(region_centroids(turn(labels()), 4), transform.centroids, atol=1e-6)


def test_the_mean_is_of_the_cases_that_have_the_region() -> None:
    first, second = labels(1), labels(2)
    second = MetaTensor(torch.where(second == 3, 0, second), affine=second.affine)
    mean = mean_centroids(iter([first, second]), 4)
    one, two = region_centroids(first, 4), region_centroids(second, 4)
    np.testing.assert_allclose(mean[[0, 1, 3]], ((one + two) / 2)[[0, 1, 3]])
    np.testing.assert_allclose(mean[2], one[2])
    with pytest.raises(DatasetError, match="none of 2 label maps has region 5, 6"):
        mean_centroids([first, second], 6)
    with pytest.raises(DatasetError, match="none of 0 label maps"):
        mean_centroids([], 1)


def test_those_of_a_first_segmentation_count_where_it_has_the_region() -> None:
    image = MetaTensor(torch.zeros(1, 6, 7, 5), affine=oblique())
    training = mean_centroids([labels(5)], 4)
    first = labels(6)
    first = MetaTensor(torch.where(first == 2, 0, first), affine=first.affine)
    found = CentroidDistancesd("image", training, segmentation_key="first")({"image": image, "first": first})
    expected = region_centroids(first, 4)
    expected[1] = training[1]
    torch.testing.assert_close(found["image_distances"], CentroidDistances(expected)(image))
    plain = CentroidDistancesd("image", training)({"image": image})["image_distances"]
    torch.testing.assert_close(plain, CentroidDistances(training)(image))
    assert not torch.equal(plain, found["image_distances"])


def test_they_are_normalized_as_other_channels() -> None:
    image = MetaTensor(torch.zeros(1, 6, 7, 5), affine=oblique())
    distances = CentroidDistances(region_centroids(labels(), 4))(image)
    statistics = {"mean": distances.mean((1, 2, 3)).tolist(), "std": distances.std((1, 2, 3)).tolist()}
    found = Compose(
        [
            CentroidDistancesd("image", region_centroids(labels(), 4)),
            PopulationZScored("image_distances", statistics),
        ]
    )({"image": image})["image_distances"]
    np.testing.assert_allclose(found.mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(found.std((1, 2, 3)), 1, atol=1e-5)


def test_pictures_have_distances_too() -> None:
    picture = MetaTensor(torch.zeros(3, 4, 5), affine=np.diag([2.0, 3.0, 1.0, 1.0]))
    label = MetaTensor(torch.zeros(1, 4, 5), affine=picture.affine)
    label[0, 1, 2] = 1
    assert region_centroids(label, 1).tolist() == [[2, 6, 0]]
    assert CentroidDistances([[2, 6, 0]])(picture)[0, 3, 2] == 4


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match="a MetaTensor expected"):
        region_centroids(torch.zeros(1, 2, 2, 2), 1)
    with pytest.raises(ConfigError, match="label of 2 channels"):
        region_centroids(MetaTensor(torch.zeros(2, 2, 2, 2)), 1)
    for centroids in ([[0.0, 1.0]], [[0.0, 1.0, float("nan")]]):
        with pytest.raises(ConfigError, match="three finite numbers"):
            CentroidDistances(centroids)
    with pytest.raises(ConfigError, match=r"expected \(1, 3\)"):
        CentroidDistances([[0, 0, 0]])(MetaTensor(torch.zeros(1, 2, 2, 2)), torch.zeros(2, 3))
