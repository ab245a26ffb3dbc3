"""Parameter groups for torch's optimizers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from medseg.errors import ConfigError


def kernel_weight_decay(network: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameters of a network in two groups for a torch optimizer: kernels decay, all others do not.

    Kernels are the weights of convolutions and linear layers. Biases, normalizations, learnable windows and activations
    are the others: to pull these towards zero regularizes nothing.

    A penalty of gamma times the sum of squared weights, as Keras' `l2(gamma)` and equation 2.37 of the PET/CT thesis
    have it (there is no 1/2 in it), is a `weight_decay` of 2 gamma in `torch.optim.SGD` and `torch.optim.Adam`.
    `AdamW` takes the same argument for something else: it shrinks the weights by lr * weight_decay apart from the
    gradient.

    `monai.optimizers.generate_param_groups` makes groups of other learning rates, not of other weight decays.

    Args:
        network: whose parameters are grouped; every one is in one group.
        weight_decay: of the kernels.

    Raises:
        ConfigError: if the network has no kernel, or one that is computed from other parameters; or for a weight decay
            that is negative or no finite number.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
        >>> optimizer = torch.optim.Adam(kernel_weight_decay(network, 2e-4))
        >>> [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
        [(0.0002, 1), (0.0, 3)]
    """
    if not 0 <= weight_decay < math.inf:
        raise ConfigError(f"weight_decay: found {weight_decay}, expected a finite number, at least 0")
    parameters = {id(parameter): parameter for parameter in network.parameters()}
    kernels = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
            if id(layer.weight) not in parameters:
                raise ConfigError(
                    f"network: the kernel of {name} is computed from other parameters, expected a parameter of its "
                    "own; take the parametrization off, or group the parameters yourself"
                )
            kernels[id(layer.weight)] = layer.weight
    if not kernels:
        raise ConfigError("network: found no convolution and no linear layer in it, expected kernels that decay")
    others = [parameter for key, parameter in parameters.items() if key not in kernels]
    return [
        {"params": list(kernels.values()), "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
