"""What a network can be made of and what it can take: everything else is refused in one line."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg.errors import ConfigError


def require_network(spatial_dims: int, **positive: int | Sequence[int]) -> None:
    """Raise ConfigError unless there are 2 or 3 axes and every other number is positive.

    Example:
        >>> require_network(2, growth=12, layers=(4, 0))
        Traceback (most recent call last):
        medseg.errors.ConfigError: layers is (4, 0); expected positive numbers
    """
    if spatial_dims not in (2, 3):
        raise ConfigError(f"spatial_dims is {spatial_dims}; expected 2 or 3")
    for name, value in positive.items():
        values = (value,) if isinstance(value, int) else tuple(value)
        if not values or min(values) < 1:
            found, expected = (value, "a positive number") if isinstance(value, int) else (values, "positive numbers")
            raise ConfigError(f"{name} is {found}; expected {expected}")


def require_image(network: nn.Module, x: Tensor, least: int = 1) -> None:
    """Raise ConfigError unless a network with `in_channels` and `spatial_dims` can take an image of this shape.

    Args:
        network: which shall take it.
        x: the images.
        least: voxels that the network needs along each axis.
    """
    if x.ndim != network.spatial_dims + 2 or x.shape[1] != network.in_channels or min(x.shape[2:]) < least:
        size = f" of at least {least} voxels" if least > 1 else ""
        raise ConfigError(
            f"input of shape {tuple(x.shape)} does not fit the network: expected "
            f"(batch, {network.in_channels} channels, {network.spatial_dims} spatial axes{size})"
        )


def require_voxels_to_normalize(network: nn.Module, x: Tensor) -> None:
    """Raise ConfigError where statistics would be those of a single voxel, in training.

    Args:
        network: which shall take the images, with `normalized` (see :func:`normalizes`) and `reduction`: what a voxel
            of the deepest level spans along each axis.
        x: the images.
    """
    deepest = [math.ceil(size / factor) for size, factor in zip(x.shape[2:], network.reduction, strict=True)]
    if network.normalized and network.training and x.shape[0] * math.prod(deepest) == 1:
        raise ConfigError(
            f"input of shape {tuple(x.shape)} leaves a single voxel at the deepest level, which cannot be "
            f"normalized in training: give larger images than {tuple(network.reduction)}, more of them or fewer levels"
        )


def normalizes(module: nn.Module) -> bool:
    """Tell whether a module takes statistics of the batch or the image, which a single voxel does not have.

    Example:
        >>> normalizes(nn.BatchNorm2d(1)), normalizes(nn.GroupNorm(1, 1))
        (True, False)
    """
    return any(isinstance(part, torch.nn.modules.batchnorm._NormBase) for part in module.modules())
