"""What the CPU kernels are made of: loops compiled by numba, with bf16 read as bits.

A kernel is a plain loop over items `start..stop`, compiled when it is first called and kept in a
cache beside the source (or in numba's own folder where that cannot be written). No compiler is
needed. Where numba cannot be imported `AVAILABLE` is False and the operations run on their
reference, slower and equal.

Low-precision tables come in as their bits, uint16, because numpy has no bf16: `widen` turns an
element into fp32 and `store` rounds one back; both leave fp32 and fp64 elements as they are.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Kernel = Callable[..., Any]

try:
    from strata.ops import intrinsics
except ImportError:  # no wheel of numba for this Python or processor
    intrinsics = None  # type: ignore[assignment]

AVAILABLE = intrinsics is not None
above_16: Any = getattr(intrinsics, "above_16", None)
lowest_one: Any = getattr(intrinsics, "lowest_one", None)
not_below_16: Any = getattr(intrinsics, "not_below_16", None)
num_ones: Any = getattr(intrinsics, "num_ones", None)
prefetch_row: Any = getattr(intrinsics, "prefetch_row", None)
row_noise: Any = getattr(intrinsics, "row_noise", None)
store: Any = getattr(intrinsics, "store", None)
widen: Any = getattr(intrinsics, "widen", None)


def kernel(function: Kernel) -> Kernel:
    """Compile a loop at its first call; without numba it is never called."""
    return intrinsics.compiled(function) if AVAILABLE else function


def as_array(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor; bf16 as its bits."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


def supported(*tensors: Tensor) -> bool:
    """Whether the kernels take these: numba is there, dtypes fp32, fp64 or bf16, on a CPU."""
    if not AVAILABLE:
        _warn_once()
        return False
    return all(
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.float64, torch.bfloat16)
        for tensor in tensors
    )


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "numba cannot be imported here: memory layers run on their reference, several times slower",
        stacklevel=2,
    )
