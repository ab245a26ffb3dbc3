"""What torch's schedules lack."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from medseg.errors import ConfigError


def time_decay(optimizer: torch.optim.Optimizer, decay: float) -> LambdaLR:
    """Return the schedule that Keras calls decay: the rate is lr / (1 + decay * iterations done).

    The other schedules are torch's; :doc:`/how_to/schedule_the_learning_rate` has them all.

    Args:
        optimizer: whose rates fall, each from its own.
        decay: at least 0; after 1 / decay iterations half of the rate is left.

    Raises:
        ConfigError: for a decay that is negative or no finite number.

    Example:
        >>> optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.001)
        >>> schedule = time_decay(optimizer, 0.001)
        >>> for _ in range(9000):
        ...     optimizer.step(); schedule.step()
        >>> f"{schedule.get_last_lr()[0]:.4f}"
        '0.0001'
    """
    if not 0 <= decay < math.inf:
        raise ConfigError(f"decay: found {decay}, expected a finite number, at least 0")
    return LambdaLR(optimizer, lambda iteration: 1 / (1 + decay * iteration))
