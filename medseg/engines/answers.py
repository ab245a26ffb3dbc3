"""What a network answers, looked at before a mask is made of it."""

from __future__ import annotations

import torch
from ignite.engine import Engine
from monai.utils import CommonKeys

from medseg.errors import DatasetError


def refuse_nan(evaluator: Engine) -> None:
    """Refuse an answer that holds NaN, once the network has answered a batch: a threshold would make background of it.

    Raises:
        DatasetError: which case it is, and how much of the answer is NaN.
    """
    for case, logits in zip(evaluator.state.batch["case"], evaluator.state.output[CommonKeys.PRED], strict=True):
        unknown = int(torch.as_tensor(logits).isnan().sum())
        if unknown:
            raise DatasetError(
                f"case {case}: {unknown:,} of the network's {logits.numel():,} logits are NaN, so there is no mask; "
                "look for NaN or infinity in its image"
            )
