"""Batch renormalization: batch normalization that trains as it predicts, for small batches."""

from collections.abc import Sequence

import torch
from monai.networks.layers import Norm
from torch import Tensor, nn
from torch.nn import functional

from medseg.errors import ConfigError


class BatchRenorm(nn.Module):
    """Batch normalization corrected, in training too, towards the running statistics with which it predicts.

    A batch of two volumes has a mean and a deviation far from those of the data, so a network trained on normalized
    batches predicts with other numbers than it was trained with. Here::

        y = weight * ((x - mean of batch) / deviation of batch * r + d) + bias
        r = deviation of batch / running deviation            within 1 / r_bound ... r_bound
        d = (mean of batch - running mean) / running deviation  within -d_bound ... d_bound

    where no gradient flows through r and d. Within the bounds, training computes what prediction computes; with bounds
    of 1 and 0 it is batch normalization. The bounds start there and grow to `r_max` and `d_max` in a straight line
    over the iterations `r_ramp` and `d_ramp`, while the running statistics settle.

    It serves every network that takes a MONAI normalization, as ``norm="BATCH_RENORM"`` or
    ``norm=("BATCH_RENORM", {"r_ramp": [500, 4000], "d_ramp": [500, 2500]})``, once :mod:`medseg.networks` is imported.
    Parameters and buffers have the names of :class:`torch.nn.BatchNorm3d`, whose weights it loads.
    ``num_batches_tracked`` counts the iterations, so a training that is resumed goes on with its bounds.
    `torch.nn.SyncBatchNorm` leaves it alone: each process of a distributed run has the statistics of its own batches.

    Args:
        num_features: channels.
        eps: added to variances.
        momentum: share of a batch in the running statistics.
        r_max: bound on r, at least 1.
        d_max: bound on the size of d, at least 0.
        r_ramp: iterations at which the bound on r leaves 1 and at which it reaches `r_max`. The published values are
            for trainings of 100,000 iterations and more; scale them with yours.
        d_ramp: likewise for d.

    Shape:
        ``(B, num_features, *spatial)`` -> the same, for any number of spatial axes

    Raises:
        ConfigError: for bounds or ramps that cannot be.

    Source:
        Ioffe 2017, Batch renormalization: towards reducing minibatch dependence in batch-normalized models,
        algorithm 1. It averages the deviation over the batches; here, as in torch, the unbiased variance is averaged.

    Example:
        >>> network = nn.Sequential(nn.Conv3d(1, 4, 3), BatchRenorm(4))
        >>> network(torch.zeros(2, 1, 5, 5, 5)).shape
        torch.Size([2, 4, 3, 3, 3])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.01,
        r_max: float = 3.0,
        d_max: float = 5.0,
        r_ramp: Sequence[int] = (5000, 40000),
        d_ramp: Sequence[int] = (5000, 25000),
    ) -> None:
        super().__init__()
        if not (r_max >= 1 and d_max >= 0):
            raise ConfigError(f"r_max and d_max of BatchRenorm are {r_max} and {d_max}; expected at least 1 and 0")
        for name, ramp in (("r_ramp", r_ramp), ("d_ramp", d_ramp)):
            if len(ramp) != 2 or not 0 <= ramp[0] < ramp[1]:
                raise ConfigError(f"{name} of BatchRenorm is {list(ramp)}; expected two iterations, the first smaller")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.r_max, self.d_max = float(r_max), float(d_max)
        self.r_start, self.r_end = r_ramp
        self.d_start, self.d_end = d_ramp
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized features, in training after a step of the running statistics."""
        weight, bias = self.weight, self.bias
        if self.training:
            # The batch's part in y is linear in weight * r and weight * d + bias, so torch's fused kernel computes it.
            r, d = self._correction(x)
            bias = bias + weight * d.to(weight.dtype)
            weight = weight * r.to(weight.dtype)
            self.num_batches_tracked.add_(1)
        return functional.batch_norm(
            x, self.running_mean, self.running_var, weight, bias, self.training, self.momentum, self.eps
        )

    def _correction(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return r and d, one per channel, in float32 at least."""
        with torch.no_grad():
            if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
                x = x.float()  # a variance soon exceeds float16
            axes = list(range(x.dim()))
            axes.pop(1)
            variance, mean = torch.var_mean(x, dim=axes, correction=0)
            deviation = (self.running_var.to(x.dtype) + self.eps).sqrt()
            steps = self.num_batches_tracked.to(x.dtype)
            r_share = ((steps - self.r_start) / (self.r_end - self.r_start)).clamp(0.0, 1.0)
            d_share = ((steps - self.d_start) / (self.d_end - self.d_start)).clamp(0.0, 1.0)
            r_bound, d_bound = 1 + (self.r_max - 1) * r_share, self.d_max * d_share
            r = ((variance + self.eps).sqrt() / deviation).clamp(1 / r_bound, r_bound)
            d = ((mean - self.running_mean.to(x.dtype)) / deviation).clamp(-d_bound, d_bound)
            return r, d

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, r_max={self.r_max}, d_max={self.d_max}, "
            f"r_ramp=({self.r_start}, {self.r_end}), d_ramp=({self.d_start}, {self.d_end})"
        )


Norm.add_factory_class("batch_renorm", BatchRenorm)
