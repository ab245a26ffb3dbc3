"""What a network can be made of and what it can take: everything else is refused in one line."""

from collections.abc import Sequence
from numbers import Integral

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from medseg.errors import ConfigError

from .batch_renorm import BatchRenorm


def require_network(spatial_dims: int, **positive: int | Sequence[int]) -> None:
    """Raise ConfigError unless there are 2 or 3 axes and all other numbers are positive whole ones.

    Example:
        >>> require_network(2, growth=12, layers=(4, 0))
        Traceback (most recent call last):
        medseg.errors.ConfigError: layers is (4, 0); expected positive numbers
    """
    if spatial_dims not in (2, 3):
        raise ConfigError(f"spatial_dims is {spatial_dims!r}; expected 2 or 3")
    for name, value in positive.items():
        if isinstance(value, Sequence) and not _all_positive(value):
            raise ConfigError(f"{name} is {tuple(value)}; expected positive numbers")
        if not isinstance(value, Sequence) and not _all_positive([value]):
            raise ConfigError(f"{name} is {value!r}; expected a positive number")


def per_axis(name: str, value: int | Sequence[int], spatial_dims: int) -> tuple[int, ...]:
    """Return one positive number per axis, given so or as one for all.

    Example:
        >>> per_axis("strides", 2, 3), per_axis("strides", (2, 2, 1), 3)
        ((2, 2, 2), (2, 2, 1))
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * spatial_dims
    if len(values) != spatial_dims or not _all_positive(values):
        raise ConfigError(f"{name}: {value!r} is neither one positive number nor {spatial_dims}, one per axis")
    return values


def _all_positive(values: Sequence[int]) -> bool:
    return bool(values) and all(isinstance(v, Integral) and int(v) > 0 for v in values)


def one_per(name: str, value: int | Sequence, count: int, what: str) -> list:
    """Return `count` entries, given so or as one for all; `what` says what each belongs to.

    Example:
        >>> one_per("layers", 2, 3, "level"), one_per("layers", (1, 2, 3), 3, "level")
        ([2, 2, 2], [1, 2, 3])
    """
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise ConfigError(f"{name} has {len(values)} entries; expected {count}, one per {what}, or one number")
    return values


def require_image(network: nn.Module, x: Tensor, least: int = 1) -> None:
    """Raise ConfigError unless a network with `in_channels` and `spatial_dims` can take an image of this shape.

    Args:
        network: which shall take it.
        x: the images.
        least: voxels that the network needs along each axis.
    """
    if x.ndim != network.spatial_dims + 2 or x.shape[1] != network.in_channels or min(x.shape[2:]) < least:
        size = f" of at least {least} voxels" if least > 1 or 0 in x.shape[2:] else ""
        raise ConfigError(
            f"input of shape {tuple(x.shape)} does not fit the network: expected "
            f"(batch, {network.in_channels} channels, {network.spatial_dims} spatial axes{size})"
        )


def require_voxels_to_normalize(x: Tensor, voxels: int, layers: nn.Module) -> None:
    """Raise ConfigError where a mean and a variance would be those of a single voxel.

    Args:
        x: the images.
        voxels: that are left of each image where they are fewest.
        layers: that see so few.
    """
    if voxels > 1:
        return
    parts = list(layers.modules())
    if any(isinstance(part, _InstanceNorm) for part in parts):
        what, give = "instance normalization cannot take", "larger images"
    elif x.shape[0] == 1 and any(isinstance(part, _BatchNorm | BatchRenorm) and part.training for part in parts):
        what, give = "batch normalization cannot take in training", "two images or more, larger ones"
    else:
        return
    raise ConfigError(
        f"input of shape {tuple(x.shape)} leaves a single voxel of the coarsest features, which {what}: give {give}, "
        "or another normalization, such as ('GROUP', {'num_groups': 8})"
    )
