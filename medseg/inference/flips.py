"""Test-time flips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from monai.inferers import Inferer

from medseg.errors import ConfigError
from medseg.inference.ensemble import pool_logits


class FlipInferer(Inferer):
    """Predict the image and its mirror images, and take the mean of the probabilities.

    Every combination of the axes is predicted: 2 of one axis, 4 of two, 8 of three, and the time is as many times
    as long. Flip along axes that the network was trained to take either way; of others the mean is worse than the
    image alone. MONAI's `TestTimeAugmentation` draws random transforms of one item of a dataset, and returns mode, mean
    and deviation; this is an exact mean, and stands in an evaluator.

    Args:
        inferer: the inferer that calls the network, such as `SlidingWindowInferer`.
        spatial_axes: the axes to flip along, counted from 0 without batch and channel; none: the image alone.
        activation: what makes probabilities of the logits, ``"sigmoid"`` or ``"softmax"``.

    Raises:
        ConfigError: for an axis given twice; when it is called, for one that the image does not have.

    Example:
        >>> from monai.inferers import SimpleInferer
        >>> image = torch.rand(1, 1, 6, 5)
        >>> ramp = torch.linspace(-1, 1, 5)
        >>> flip = FlipInferer(SimpleInferer(), [1], activation="sigmoid")
        >>> flip(image, lambda x: 0 * x + ramp).sigmoid()[0, 0, 0]
        tensor([0.5000, 0.5000, 0.5000, 0.5000, 0.5000])
    """

    def __init__(self, inferer: Inferer, spatial_axes: Sequence[int], activation: str) -> None:
        super().__init__()
        if len(set(spatial_axes)) != len(spatial_axes):
            raise ConfigError(f"spatial_axes: found {list(spatial_axes)}, expected each axis once")
        self.inferer, self.spatial_axes, self.activation = inferer, [int(axis) for axis in spatial_axes], activation

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return the logits of the mean probabilities, see :func:`pool_logits`; shape (batch, classes, spatial...)."""
        if not self.spatial_axes:
            return self.inferer(inputs, network, *args, **kwargs)
        last = inputs.ndim - 3
        if not all(0 <= axis <= last for axis in self.spatial_axes):
            raise ConfigError(f"spatial_axes: found {self.spatial_axes}, expected axes from 0 to {last} of the image")
        axes = [axis + 2 for axis in self.spatial_axes]
        mirrors = [mirror for count in range(len(axes) + 1) for mirror in combinations(axes, count)]
        predictions = (
            self.inferer(inputs.flip(mirror), network, *args, **kwargs).flip(mirror) if mirror else
            self.inferer(inputs, network, *args, **kwargs)
            for mirror in mirrors
        )  # fmt: skip
        return pool_logits(predictions, self.activation)
