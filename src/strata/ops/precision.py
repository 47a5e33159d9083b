"""In which precision the operations sum, whatever their inputs come in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype sums run in: fp64 stays fp64, everything else is summed in fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turn autocast off on a device, for it would run products in bf16; "meta" has none."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
