"""What the CPU kernels are made of: loops compiled by numba, with bf16 read as bits.

A kernel is a plain loop over items `start..stop`, compiled when it is first called and kept in a
cache beside the source (or in numba's own folder where that cannot be written). No compiler is
needed. Where numba cannot be imported `AVAILABLE` is False and the operations run on their
reference, slower and equal.

numpy has no bf16 and no fp8, so such tables come in as their bits, uint16 and uint8: `widen` turns
an element (int8 too) into fp32 and `store` rounds one back to bf16; both leave fp32 and fp64
elements as they are.
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

_BITS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}

_TYPES = {
    getattr(torch, name): np.dtype(name).str
    for name in (
        *("float16", "float32", "float64", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
}

AVAILABLE = intrinsics is not None
lowest_one: Any = getattr(intrinsics, "lowest_one", None)
not_below_16: Any = getattr(intrinsics, "not_below_16", None)
num_ones: Any = getattr(intrinsics, "num_ones", None)
prefetch: Any = getattr(intrinsics, "prefetch", None)
prefetch_row: Any = getattr(intrinsics, "prefetch_row", None)
rank_16: Any = getattr(intrinsics, "rank_16", None)
row_noise: Any = getattr(intrinsics, "row_noise", None)
TILE_ROWS: int = getattr(intrinsics, "TILE_ROWS", 1)
TILE_WIDTH: int = getattr(intrinsics, "TILE_WIDTH", 1)
tile_product: Any = getattr(intrinsics, "tile_product", None)
store: Any = getattr(intrinsics, "store", None)
widen: Any = getattr(intrinsics, "widen", None)


def kernel(function: Kernel) -> Kernel:
    """Compile a loop at its first call; without numba it is never called."""
    return intrinsics.compiled(function) if AVAILABLE else function


def as_array(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor; bf16 and fp8 as their bits.

    Not by `Tensor.numpy`, which forbids for ever to resize the memory: FSDP frees it between uses.
    """
    return np.asarray(_Memory(tensor)) if tensor.numel() else _as_bits(tensor).numpy()


class _Memory:
    """A tensor as numpy's array interface; the array holds this, and this the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = bits = _as_bits(tensor)
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(bits.shape),
            "typestr": _TYPES[bits.dtype],
            "data": (bits.data_ptr(), False),
        }


def _as_bits(tensor: Tensor) -> Tensor:
    bits = _BITS.get(tensor.dtype)
    return tensor.detach() if bits is None else tensor.detach().view(bits)


def supported(*tensors: Tensor) -> bool:
    """Whether the kernels take these: numba is there, fp32, fp64 or bf16, on a CPU."""
    if not AVAILABLE:
        _warn_once()
        return False
    return all(
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.float64, torch.bfloat16)
        for tensor in tensors
    )


def readable(table_rv: Tensor) -> bool:
    """Whether the kernels that only read a table take it: also int8 and fp8 (e4m3fn) codes."""
    if not table_rv.is_contiguous():
        return False
    if table_rv.dtype in (torch.int8, torch.float8_e4m3fn):
        return supported() and table_rv.device.type == "cpu"
    return supported(table_rv)


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "numba cannot be imported here: memory layers run on their reference, several times slower",
        stacklevel=2,
    )
