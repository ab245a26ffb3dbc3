"""One answer out of several: networks, folds, snapshots in time, or mirrored copies of an image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from medseg.errors import ConfigError

ACTIVATIONS = ("sigmoid", "softmax")
MODES = ("mean", "vote")

#: A class that nobody voted for, or that everybody did, is this far from 0 or 1, so that its logit is finite.
_MARGIN = 1e-6


def pool_logits(
    predictions: Iterable[Tensor], activation: str, mode: str = "mean", weights: Sequence[float] | None = None
) -> Tensor:
    """Pool predictions of one image, as logits: the activation of the result is the pooled probability.

    So whatever takes the logits of one network takes these, its activation included. The probabilities are

    - ``mean``: the (weighted) mean of the predictions' probabilities; of logits it would be another number;
    - ``vote``: the (weighted) share of the predictions that say yes: for a softmax those whose largest class it is,
      for a sigmoid those of probability ½ or more. A threshold of ½ then asks for half of the votes.
      Shares of 0 and 1 come out as 10⁻⁶ and 1 − 10⁻⁶. Of a tie, thresholding at ½ makes yes, and argmax the first
      class.

    Where a prediction is NaN, so is the result, in either mode.

    Args:
        predictions: logits ``(B, C, *spatial)``, of one shape; taken one by one, and not kept.
        activation: ``"sigmoid"`` where every channel is a label of its own, ``"softmax"`` where they are exclusive.
        mode: ``"mean"`` or ``"vote"``.
        weights: one for each prediction, positive; default: all the same.

    Returns:
        Logits ``(B, C, *spatial)``, float32.

    Raises:
        ConfigError: for another activation or mode, for weights that do not fit, for no prediction at all, and for
            predictions of several shapes.

    Example:
        >>> sure, unsure = torch.tensor([[[9.0]]]), torch.tensor([[[0.0]]])
        >>> [round(pool_logits([sure, unsure], "sigmoid", mode).sigmoid().item(), 3) for mode in MODES]
        [0.75, 1.0]
    """
    _check_pool(activation, mode, weights)
    part_of = _vote if mode == "vote" else _log_probabilities
    weigh = [1.0] if weights is None else [float(weight) for weight in weights]
    total: Tensor | None = None
    count = 0
    for count, logits in enumerate(predictions, start=1):
        if weights is not None and count > len(weights):
            raise ConfigError(f"predictions: found more than {len(weights)}, expected one for each weight")
        part = part_of(logits, activation, weigh[(count - 1) % len(weigh)])
        if total is None:
            total = part
        elif part.shape != total.shape:
            found, first = tuple(logits.shape), tuple(total.shape[1:])
            raise ConfigError(f"predictions: number {count} is of shape {found}, the first of {first}; expected one")
        else:
            total = total + part if mode == "vote" else torch.logaddexp(total, part)
    if total is None or (weights is not None and count < len(weights)):
        raise ConfigError(f"predictions: found {count}, expected {'one or more' if weights is None else len(weights)}")
    if mode == "mean":
        return total[0] - total[1] if activation == "sigmoid" else total[0].log_softmax(1)
    share = (total[0] / sum(weigh if weights is not None else [1.0] * count)).clamp(_MARGIN, 1 - _MARGIN)
    return share.logit() if activation == "sigmoid" else share.log()


def _log_probabilities(logits: Tensor, activation: str, weight: float) -> Tensor:
    """Return log(w p), and for a sigmoid log(w (1 - p)) behind it: far from ½, p itself would round to 0 or 1."""
    logits = logits.float()
    logs = [logsigmoid(logits), logsigmoid(-logits)] if activation == "sigmoid" else [logits.log_softmax(1)]
    return torch.stack(logs) + math.log(weight)


def _vote(logits: Tensor, activation: str, weight: float) -> Tensor:
    yes = logits >= 0 if activation == "sigmoid" else one_hot(logits.argmax(1), logits.shape[1]).movedim(-1, 1)
    unknown = logits.isnan() if activation == "sigmoid" else logits.isnan().any(1, keepdim=True)
    return yes.float().masked_fill(unknown, torch.nan)[None] * weight


def _check_pool(activation: str, mode: str, weights: Sequence[float] | None) -> None:
    for name, found, expected in (("activation", activation, ACTIVATIONS), ("mode", mode, MODES)):
        if found not in expected:
            raise ConfigError(f"{name}: found {found!r}, expected {' or '.join(expected)}")
    if weights is not None and not all(0 < float(weight) < float("inf") for weight in weights):
        raise ConfigError(f"weights: found {list(weights)}, expected positive numbers")


class Ensemble(torch.nn.Module):
    """Several networks that answer as one, by the mean of their probabilities or by vote.

    It stands wherever a network does (an evaluator, an inferer, `torch.jit.trace`), and emits logits as a network does.
    The members may be different architectures, the folds of a cross-validation, or snapshots of one training
    (Huang et al. 2017). They are called one after another, so the time is that of all; of the maps in between, those of
    one network are held at a time. The weights of all are kept on the device (a U-Net of 34.5 million parameters: 138
    MB each).

    ::

        image (B, in, *spatial) -> networks[0] -> (B, C, *spatial) -+
                                -> networks[1] -> (B, C, *spatial) -+-> pool_logits -> logits (B, C, *spatial)
                                -> ...                             -+

    Args:
        networks: they take the same input and emit logits of the same shape. Of networks that need inferers of their
            own, such as windows of different sizes, pool what these return by :func:`pool_logits`.
        activation: what makes probabilities of the logits, ``"sigmoid"`` or ``"softmax"``.
        mode: ``"mean"`` or ``"vote"``, see :func:`pool_logits`.
        weights: one for each network, positive; default: all the same.

    Raises:
        ConfigError: for no network, for an unknown activation or mode, and for weights that do not fit.

    Source:
        Huang et al. 2017, Snapshot ensembles: train 1, get M for free.

    Example:
        >>> pair = Ensemble([torch.nn.Conv2d(1, 3, 1), torch.nn.Conv2d(1, 3, 1)], activation="softmax")
        >>> pair(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(
        self,
        networks: Sequence[torch.nn.Module],
        activation: str,
        mode: str = "mean",
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check_pool(activation, mode, weights)
        if not networks or (weights is not None and len(weights) != len(networks)):
            expected = "one or more" if weights is None else f"{len(weights)}, one for each weight"
            raise ConfigError(f"networks: found {len(networks)}, expected {expected}")
        self.networks = torch.nn.ModuleList(networks)
        self.activation, self.mode, self.weights = activation, mode, weights

    def forward(self, image: Tensor) -> Tensor:
        """Return the pooled logits ``(B, C, *spatial)`` of an image ``(B, in, *spatial)``."""
        return pool_logits((network(image) for network in self.networks), self.activation, self.mode, self.weights)
