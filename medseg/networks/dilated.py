"""The dilated CNN: context by holes in the kernels, without pooling."""

import math
from collections.abc import Callable, Sequence

import torch
from monai.networks.blocks import Convolution
from torch import Tensor, nn

from .arguments import require_image, require_network, require_voxels_to_normalize
from .blocks import he_normal


class DilatedCNN(nn.Module):
    """Ten convolutions that see 131 voxels along each axis at full resolution, with few parameters.

    The layers and what a voxel of each has seen of the image, along each axis::

        kernel            3   3   3   3   3   3   3    3    1    1
        dilation          1   1   2   4   8  16  32    1    1    1
        receptive field   3   5   9  17  33  65 129  131  131  131
        channels         32  32  32  32  32  32  32   32  192  out_channels

    The tutorial's table has nine kernels of 3; its receptive field of 131 needs eight of 3 and two of 1, which this
    network has. :func:`receptive_field` measures it.

    Padded, every convolution keeps the size: zeros stand for what lies outside the image, in every layer anew. Without
    padding the output is 130 voxels smaller, and the patch of 131 voxels gives one voxel: the network of the work, a
    classifier of patches. Both give the same logits wherever the receptive field lies within the image.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the output: 1 for one class against background by sigmoid, else one per class.
        channels: of the convolutions with a kernel of 3.
        features: channels of the first of the two with a kernel of 1, which is batch normalized.
        dilations: of the convolutions with a kernel of 3.
        act: a MONAI activation after each convolution but the last.
        padding: whether the output has the size of the image; else it is ``2 * sum(dilations)`` voxels smaller.
        initializer: applied to every module when the network is built; None leaves torch's own initialization.

    Shape:
        ``(B, in_channels, *spatial)`` -> ``(B, out_channels, *spatial)``, logits; without padding
        ``(B, out_channels, *(spatial - 130))``

    Raises:
        ConfigError: for arguments that make no network, and in ``forward`` for an image that does not fit it.

    Source:
        Wolterink et al. 2016, Dilated convolutional neural networks for cardiovascular MR segmentation in congenital
        heart disease; Išgum et al. 2017, tutorial on deep learning in medical image analysis. The sources at hand leave
        open the activation, the features of the last layers and the initialization: ELU, 192 and He's are choices.

    Example:
        >>> network = DilatedCNN(2, in_channels=1, out_channels=3)
        >>> network(torch.zeros(1, 1, 40, 33)).shape
        torch.Size([1, 3, 40, 33])
        >>> DilatedCNN(2, 1, 3, padding=False)(torch.zeros(2, 1, 131, 131)).shape
        torch.Size([2, 3, 1, 1])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        channels: int = 32,
        features: int = 192,
        dilations: Sequence[int] = (1, 1, 2, 4, 8, 16, 32, 1),
        act: str | tuple = "ELU",
        padding: bool = True,
        initializer: Callable[[nn.Module], None] | None = he_normal,
    ) -> None:
        super().__init__()
        require_network(
            spatial_dims,
            in_channels=in_channels,
            out_channels=out_channels,
            channels=channels,
            features=features,
            dilations=dilations,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.spatial_dims = spatial_dims
        # Voxels along each axis without which there is no output.
        self.least = 1 if padding else 1 + 2 * sum(dilations)
        layers: list[nn.Module] = []
        width = in_channels
        for dilation in dilations:
            layers.append(
                Convolution(
                    spatial_dims,
                    width,
                    channels,
                    dilation=dilation,
                    act=act,
                    norm=None,
                    padding=None if padding else 0,
                )
            )
            width = channels
        layers.append(Convolution(spatial_dims, width, features, kernel_size=1, act=act, norm="BATCH", bias=False))
        layers.append(Convolution(spatial_dims, features, out_channels, kernel_size=1, conv_only=True))
        self.layers = nn.Sequential(*layers)
        if initializer is not None:
            self.apply(initializer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images, or of patches."""
        if not torch.jit.is_scripting() and not torch.jit.is_tracing():
            self._check(x)
        return self.layers(x)

    @torch.jit.unused
    def _check(self, x: Tensor) -> None:
        require_image(self, x, self.least)
        require_voxels_to_normalize(x, math.prod([n - self.least + 1 for n in x.shape[2:]]), self)
