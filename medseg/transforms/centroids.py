"""How far a voxel lies from where the regions of the body are, as channels for a network."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from numpy.typing import NDArray
from torch import Tensor

from medseg.errors import ConfigError, DatasetError


def region_centroids(label: MetaTensor, regions: int) -> Tensor:
    """Return the centroid of each region 1 ... ``regions`` of a label map, in RAS mm.

    Args:
        label: ``(1, *spatial)``, with its affine.
        regions: how many regions there are; 0 is the background.

    Returns:
        (regions, 3), float64; NaN for a region that the label map does not have

    Raises:
        ConfigError: for a label without an affine, or of several channels.

    Example:
        >>> label = MetaTensor(torch.zeros(1, 5, 5, 5), affine=np.diag([2.0, 1.0, 3.0, 1.0]))
        >>> label[0, 1:4, 2, 2:4] = 1
        >>> region_centroids(label, regions=2).tolist()
        [[4.0, 2.0, 7.5], [nan, nan, nan]]
    """
    affine = _affine(label)
    if len(label) != 1:
        raise ConfigError(f"label of {len(label)} channels: one expected, with a number for each region")
    values = np.asarray(label[0].cpu()).astype(np.int64).ravel()
    # Voxels of a number that is no region are counted with the background.
    values = np.where((values >= 0) & (values <= regions), values, 0)
    counts = np.bincount(values, minlength=regions + 1)
    index = np.ones((regions, affine.shape[1]))
    with np.errstate(invalid="ignore"):
        for axis, n in enumerate(label.shape[1:]):
            shape = [1] * (label.ndim - 1)
            shape[axis] = n
            along = np.broadcast_to(np.arange(n, dtype=np.float64).reshape(shape), label.shape[1:])
            sums = np.bincount(values, weights=along.ravel(), minlength=regions + 1)
            index[:, axis] = (sums / counts)[1:]
    return torch.from_numpy(index @ affine.T)


def mean_centroids(labels: Iterable[MetaTensor], regions: int) -> Tensor:
    """Return where the centroids of the regions lie on average in the label maps of the training part, in RAS mm.

    The images must share a space in which the same place is the same anatomy, such as that of an atlas; where they do
    not, take the centroids of a first segmentation of each image (:func:`region_centroids`).

    Args:
        labels: label maps, one by one, of the training part and of nothing else; a region may lack in some.
        regions: how many regions there are.

    Returns:
        (regions, 3), float64

    Raises:
        DatasetError: a region is in none of them.

    Example:
        >>> labels = (MetaTensor(torch.eye(4)[None, :, :, None] * (k == 2), affine=np.eye(4)) for k in range(3))
        >>> mean_centroids(labels, regions=1).tolist()
        [[1.5, 1.5, 0.0]]
    """
    found = [region_centroids(label, regions) for label in labels]
    mean = torch.stack(found).nanmean(0) if found else torch.full((regions, 3), torch.nan)
    missing = (mean.isnan().any(1).nonzero()[:, 0] + 1).tolist()
    if missing:
        raise DatasetError(f"labels: none of {len(found)} label maps has region {', '.join(map(str, missing))}")
    return mean


class CentroidDistances(Transform):
    """Return the distance of each voxel of an image to the centroid of each region, in mm.

    They tell a network where in the body it is, which helps with organs that lie in the same order in everyone, and
    may not where a lesion can be anywhere. :class:`PopulationZScore` normalizes them as it does other channels, with
    the statistics that :func:`medseg.data.training_statistics` measures behind this transform.

    Args:
        centroids: of each region, in RAS mm: of the training part (:func:`mean_centroids`), or of a first segmentation
            of the same image (:func:`region_centroids`).

    Shape:
        ``(C, *spatial)`` -> ``(regions, *spatial)``, float32, with the affine of the image

    Raises:
        ConfigError: centroids that are no finite points, or an image without an affine.

    Source:
        de Brébisson and Montana 2015, Deep neural networks for anatomical brain segmentation, where a first network
        without distances finds the centroids, and a second one takes the distances to them.

    Example:
        >>> image = MetaTensor(torch.zeros(1, 3, 4, 1), affine=np.diag([1.0, 2.0, 5.0, 1.0]))
        >>> CentroidDistances([[2.0, 0.0, 0.0]])(image)[0, ..., 0].tolist()[2]
        [0.0, 2.0, 4.0, 6.0]
    """

    def __init__(self, centroids: Sequence[Sequence[float]] | Tensor) -> None:
        self.centroids = torch.as_tensor(centroids, dtype=torch.float64)
        if self.centroids.ndim != 2 or self.centroids.shape[1] != 3 or not bool(self.centroids.isfinite().all()):
            raise ConfigError(
                f"centroids {self.centroids.tolist()}: expected three finite numbers (RAS mm) per region; a region "
                "that a label map does not have has no centroid of its own, take that of mean_centroids"
            )

    def __call__(self, img: MetaTensor, centroids: Tensor | None = None) -> MetaTensor:
        """Return the distances; given other centroids, those count, and where they are NaN, the transform's own."""
        points = self.centroids
        if centroids is not None:
            if centroids.shape != points.shape:
                raise ConfigError(f"centroids of shape {tuple(centroids.shape)}: expected {tuple(points.shape)}")
            points = torch.where(centroids.isnan(), points, centroids.to(points))
        affine = torch.from_numpy(_affine(img))
        position = affine[:, -1].view(3, *[1] * (img.ndim - 1))
        for axis, n in enumerate(img.shape[1:]):
            shape = [3] + [1] * (img.ndim - 1)
            shape[axis + 1] = n
            position = position + (affine[:, axis, None] * torch.arange(n, dtype=torch.float64)).view(shape)
        distances = torch.stack(
            [torch.linalg.vector_norm(position - p.view(3, *[1] * (img.ndim - 1)), dim=0).float() for p in points]
        )
        return MetaTensor(distances.to(img.device), affine=img.affine)


class CentroidDistancesd(MapTransform):
    """Dictionary twin of :class:`CentroidDistances`: the distances go under a new key.

    Args:
        keys: the image whose voxels are meant.
        centroids: as there.
        segmentation_key: a first segmentation of the image, whose own centroids count; those of ``centroids`` stand
            in for a region that it lacks.
        postfix: the new key is ``KEY_POSTFIX``.
        allow_missing_keys: whether a key may be absent.

    Example:
        >>> image = MetaTensor(torch.zeros(1, 3, 4, 1), affine=np.eye(4))
        >>> data = CentroidDistancesd("image", [[0.0, 0, 0], [2.0, 3.0, 0.0]])({"image": image})
        >>> tuple(data["image_distances"].shape)
        (2, 3, 4, 1)
    """

    def __init__(
        self,
        keys: KeysCollection,
        centroids: Sequence[Sequence[float]] | Tensor,
        segmentation_key: str | None = None,
        postfix: str = "distances",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.distances = CentroidDistances(centroids)
        self.segmentation_key = segmentation_key
        self.postfix = postfix

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the dictionary with the distances added."""
        result = dict(data)
        own = None
        if self.segmentation_key is not None:
            own = region_centroids(result[self.segmentation_key], len(self.distances.centroids))
        for key in self.key_iterator(dict(data)):
            result[f"{key}_{self.postfix}"] = self.distances(result[key], own)
        return result


def _affine(image: MetaTensor) -> NDArray[np.float64]:
    """The map from index (one per axis, then 1) to RAS mm: (3, axes + 1)."""
    if not isinstance(image, MetaTensor):
        raise ConfigError(
            f"image is a {type(image).__name__}: a MetaTensor expected, because distances need its affine"
        )
    axes = image.ndim - 1
    affine = np.asarray(image.affine, dtype=np.float64)
    return np.concatenate([affine[:3, :axes], affine[:3, -1:]], axis=1)
