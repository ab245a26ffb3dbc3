"""What a network sees, measured."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from medseg.errors import ConfigError


def receptive_field(network: nn.Module, size: int | Sequence[int]) -> tuple[int, ...]:
    """Return how many voxels of the image, along each axis, have an influence on the middle voxel of the output.

    Measured by the gradient of that voxel, on several images, because a maximum passes the gradient on to one voxel
    only; and on a copy without biases and running statistics, whose kernels are random, positive and small where they
    are not zero, so that no influences cancel and no activation is saturated, whatever the network has learned.

    Args:
        network: with the attributes ``in_channels`` and ``spatial_dims``, as all networks of medseg have them.
        size: of the images it is measured on, one number or one per axis; larger than the answer, unless the output
            is a single voxel.

    Returns:
        the extent along each axis, in voxels

    Raises:
        ConfigError: if what the voxel sees ends at the border of the image, and may so be cut off, as it does in every
            image for a network that takes a mean of the whole image.

    Example:
        >>> from medseg.networks import UNet
        >>> receptive_field(UNet(2, 1, 1, channels=(4, 4)), size=32)
        (22, 22)
    """
    dims = int(network.spatial_dims)
    sizes = (size,) * dims if isinstance(size, int) else tuple(size)
    model = copy.deepcopy(network).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            role = name.rpartition(".")[2]
            if role in ("bias", "running_mean"):
                value.zero_()
            elif role == "running_var":
                value.fill_(1)
            elif role == "weight":
                positive = torch.rand(value.shape, generator=generator, dtype=value.dtype) / value[0].numel()
                value.copy_(positive * (value != 0))
    seen = torch.zeros(sizes, dtype=torch.bool)
    for _ in range(8):
        image = torch.rand(1, int(network.in_channels), *sizes, generator=generator, dtype=torch.float64)
        output = model(image.requires_grad_())
        voxel = output[(0, slice(None), *(n // 2 for n in output.shape[2:]))]
        seen |= (torch.autograd.grad(voxel.sum(), image)[0][0] != 0).any(0)
    where = seen.nonzero()
    low, high = where.min(0).values, where.max(0).values
    alone = all(n == 1 for n in output.shape[2:])
    if not alone and (bool((low == 0).any()) or bool((high == torch.tensor(sizes) - 1).any())):
        raise ConfigError(f"size {sizes}: what the middle voxel sees ends at the border; give a larger size")
    return tuple((high - low + 1).tolist())
