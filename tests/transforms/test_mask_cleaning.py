"""What users rely on of MONAI's transforms that clean a mask: the units, the labels, and the geometry."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import FillHolesd, KeepLargestConnectedComponentd, RemoveSmallObjectsd

SPACING = (2.0, 1.0, 3.0)  # a voxel is 6 mm³


def mask(label_of_the_largest=1):
    """Pieces of 1, 4 and 8 voxels: 6, 24 and 48 mm³; and one of 9 voxels that meet only at edges and corners."""
    array = np.zeros((1, 14, 14, 12), np.uint8)
    array[0, 10, 10, 5] = 1
    array[0, 0:2, 0:2, 0] = 1
    array[0, 5:7, 5:7, 2:4] = label_of_the_largest
    return MetaTensor(torch.from_numpy(array), affine=np.diag([*SPACING, 1.0]))


def sizes(result):
    return {int(value): int((result == value).sum()) for value in result.unique() if value}


def apply(transform, image):
    result = transform({"pred": image})["pred"]
    assert isinstance(result, MetaTensor)
    assert torch.equal(result.affine, image.affine)
    assert result.shape == image.shape
    return result


def test_the_largest_component_of_all():
    assert sizes(apply(KeepLargestConnectedComponentd("pred"), mask())) == {1: 8}


def test_the_largest_component_of_each_label_or_of_all_labels_together():
    assert sizes(apply(KeepLargestConnectedComponentd("pred"), mask(2))) == {1: 4, 2: 8}
    assert sizes(apply(KeepLargestConnectedComponentd("pred", independent=False), mask(2))) == {2: 8}


def test_components_meet_at_corners_unless_connectivity_says_otherwise():
    array = np.zeros((1, 6, 6, 6), np.uint8)
    for i in range(4):
        array[0, i, i, i] = 1
    image = MetaTensor(torch.from_numpy(array), affine=np.eye(4))
    assert sizes(apply(KeepLargestConnectedComponentd("pred"), image)) == {1: 4}
    assert sizes(apply(KeepLargestConnectedComponentd("pred", connectivity=1), image)) == {1: 1}


# An object of just the size is kept or removed, as the version of scikit-image has it, and cubic millimeters are
# rounded up to voxels; so there is none here that is within a voxel of the size.
@pytest.mark.parametrize(("voxels", "left"), [(2, 12), (3, 12), (5, 8), (7, 8), (9, 0)])
def test_a_minimum_size_in_voxels(voxels, left):
    assert sum(sizes(apply(RemoveSmallObjectsd("pred", min_size=voxels), mask())).values()) == left


@pytest.mark.parametrize(("cubic_mm", "left"), [(7, 12), (17, 12), (25, 8), (41, 8), (49, 0)])
def test_a_minimum_size_in_cubic_millimeters_takes_the_spacing_from_the_affine(cubic_mm, left):
    cleaned = apply(RemoveSmallObjectsd("pred", min_size=cubic_mm, by_measure=True), mask())
    assert sum(sizes(cleaned).values()) == left


def test_the_volume_of_a_voxel_is_that_of_an_oblique_image_too():
    angle = np.deg2rad(30)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-2.0, 1.0, 3.0])
    image = MetaTensor(mask().as_tensor(), affine=affine)
    for cubic_mm, left in ((17, 12), (25, 8)):
        assert (
            sum(sizes(apply(RemoveSmallObjectsd("pred", min_size=cubic_mm, by_measure=True), image)).values()) == left
        )


def test_a_minimum_size_of_a_label_map_is_of_the_pieces_of_all_labels_together():
    """By itself, MONAI takes all voxels of a label for one object: the docs say to give independent_channels."""
    cleaned = apply(RemoveSmallObjectsd("pred", min_size=6, independent_channels=False), mask(2))
    assert sizes(cleaned) == {2: 8}
    assert sizes(apply(RemoveSmallObjectsd("pred", min_size=3), mask(2))) == {1: 5, 2: 8}


def test_a_cavity_is_filled_and_a_tunnel_is_not():
    array = np.zeros((1, 9, 9, 7), np.uint8)
    array[0, 1:8, 1:8, 1:6] = 1
    array[0, 3, 3, 3] = 0  # closed on all sides
    array[0, 5, 5, :] = 0  # open at both ends, though closed in every slice
    image = MetaTensor(torch.from_numpy(array), affine=np.diag([*SPACING, 1.0]))
    assert sizes(apply(FillHolesd("pred"), image.clone())) == {1: 7 * 7 * 5 - 5}


@pytest.mark.parametrize(
    "transform",
    [KeepLargestConnectedComponentd("pred"), RemoveSmallObjectsd("pred", by_measure=True), FillHolesd("pred")],
    ids=["largest", "size", "holes"],
)
def test_an_empty_mask_stays_empty(transform):
    assert sizes(apply(transform, torch.zeros_like(mask()))) == {}
