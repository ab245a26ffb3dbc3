"""Patches around voxels: what a patch classifier is given."""

import torch
from torch import Tensor
from torch.nn import functional

from medseg.errors import ConfigError


def patches_around(
    image: Tensor, voxels: Tensor, size: int, triplanar: bool = False, padding: str = "constant"
) -> Tensor:
    """Return the patches whose middle voxels are the given ones.

    Three orthogonal patches become channels, plane by plane: first those of the plane of axes 0 and 1 (axial, where the
    image lies along the patient's axes), then of 0 and 2 (coronal), then of 1 and 2 (sagittal).

    Args:
        image: ``(C, *spatial)``.
        voxels: their indices, (N, 2) or (N, 3), whole numbers from 0.
        size: voxels along each side, an odd number.
        triplanar: three planes through a voxel of a volume, instead of a square or a cube.
        padding: what lies outside the image: "constant" (zeros), "reflect" or "replicate".

    Returns:
        (N, C, size, size), in 3D (N, C, size, size, size), or triplanar (N, 3 * C, size, size)

    Raises:
        ConfigError: for an even size, and for voxels that the image does not have.

    Example:
        >>> image = torch.arange(12.0).view(1, 3, 4)
        >>> patches_around(image, torch.tensor([[1, 2]]), size=3)
        tensor([[[[ 1.,  2.,  3.],
                  [ 5.,  6.,  7.],
                  [ 9., 10., 11.]]]])
    """
    shape = image.shape[1:]
    if size < 1 or size % 2 == 0:
        raise ConfigError(f"size is {size}; expected an odd number of voxels, so that one is the middle")
    if len(shape) not in ((3,) if triplanar else (2, 3)) or voxels.ndim != 2 or voxels.shape[1] != len(shape):
        raise ConfigError(
            f"image of shape {tuple(image.shape)} and voxels of shape {tuple(voxels.shape)}: expected (channels, "
            f"{'3' if triplanar else '2 or 3'} spatial axes) and (voxels, an index per axis)"
        )
    if len(voxels) and bool(((voxels < 0) | (voxels >= torch.tensor(shape, device=voxels.device))).any()):
        raise ConfigError(f"voxels: some lie outside the image of {'x'.join(map(str, shape))} voxels")
    return gather(pad_by(image[None], size // 2, padding)[0], voxels, size, triplanar)


def pad_by(x: Tensor, width: int, mode: str) -> Tensor:
    """Return a batch of images with `width` voxels more on every side."""
    return functional.pad(x, [width] * (2 * (x.ndim - 2)), mode=mode)


def gather(padded: Tensor, voxels: Tensor, size: int, triplanar: bool) -> Tensor:
    """Return patches of one image, padded by half their size; `voxels` are indices before the padding."""
    if padded.ndim == 3:
        return padded.unfold(1, size, 1).unfold(2, size, 1).movedim(0, 2)[voxels[:, 0], voxels[:, 1]]
    x, y, z = voxels[:, 0], voxels[:, 1], voxels[:, 2]
    if not triplanar:
        return padded.unfold(1, size, 1).unfold(2, size, 1).unfold(3, size, 1).movedim(0, 3)[x, y, z]
    half = size // 2
    planes = [
        padded.unfold(1, size, 1).unfold(2, size, 1).movedim(0, 3)[x, y, z + half],
        padded.unfold(1, size, 1).unfold(3, size, 1).movedim(0, 3)[x, y + half, z],
        padded.unfold(2, size, 1).unfold(3, size, 1).movedim(0, 3)[x + half, y, z],
    ]
    return torch.cat(planes, 1)
