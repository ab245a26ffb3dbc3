"""Inferers that MONAI lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import Inferer


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """Say whether `device` computes convolutions in bfloat16 natively, so that autocast saves time there.

    Args:
        device: a CPU (with AVX-512 BF16 or AMX) or a GPU (compute capability 8.0 on).
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class AutocastInferer(Inferer):
    """Run another inferer under bfloat16 autocast, and return float32.

    bfloat16 has the range of float32, so losses need no scaling; MONAI's own `amp` covers CUDA only.

    Args:
        inferer: the inferer that calls the network.
    """

    def __init__(self, inferer: Inferer) -> None:
        super().__init__()
        self.inferer = inferer

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return `inferer(inputs, network)` as float32, of the network's shape, a tensor of several heads included."""
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
            output = self.inferer(inputs, network, *args, **kwargs)
        return output.float()
