"""The evaluator of a segmentation network, built from parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer, SimpleInferer
from torch.utils.data import DataLoader

from medseg.engines.inferers import AutocastInferer, has_fast_bfloat16


def segmentation_evaluator(
    device: torch.device | str,
    val_data_loader: DataLoader,
    network: torch.nn.Module,
    inferer: Inferer | None = None,
    postprocessing: Callable | None = None,
    key_val_metric: dict[str, Any] | None = None,
    val_handlers: Sequence[Any] = (),
    amp: bool = False,
    **kwargs: Any,
) -> SupervisedEvaluator:
    """Return a MONAI `SupervisedEvaluator` that computes in the precision which the trainer uses.

    Args:
        device: where the network is.
        val_data_loader: batches with the key `image` (batch, channels, spatial...), and `label` where there is truth.
        network: maps an image batch to logits.
        inferer: how the network is called; default: `monai.inferers.SimpleInferer`.
        postprocessing: from logits to masks, per sample.
        key_val_metric: the metric by which checkpoints are compared, by name.
        val_handlers: further handlers with an `attach` method, such as :class:`medseg.engines.Scores`.
        amp: see :func:`medseg.engines.segmentation_trainer`.
        kwargs: further arguments of `monai.engines.SupervisedEvaluator`.
    """
    bfloat16 = amp and has_fast_bfloat16(device)
    inferer = inferer or SimpleInferer()
    return SupervisedEvaluator(
        device=device,
        val_data_loader=val_data_loader,
        network=network,
        inferer=AutocastInferer(inferer) if bfloat16 else inferer,
        postprocessing=postprocessing,
        key_val_metric=key_val_metric,
        val_handlers=list(val_handlers),
        amp=amp and not bfloat16 and torch.device(device).type == "cuda",
        **kwargs,
    )
