"""RMS normalisation on a CPU: one pass forward and one back, where torch makes a dozen.

The gradient to the weight is summed in blocks of rows, so that it does not depend on the threads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from strata.ops.kernels import as_array, kernel, store, supported, widen
from strata.ops.precision import accumulation_dtype
from strata.ops.rms_norm import reference
from strata.ops.threads import even_bounds, run_split

_BLOCK = 256  # rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `strata.ops.rms_norm`."""
    if not supported(x, weight):
        return reference.rms_norm(x, weight, eps)
    wide, width = accumulation_dtype(x), x.shape[-1]
    out = torch.empty(x.shape, dtype=wide)
    rows = as_array(x.contiguous()).reshape(-1, width)
    run_split(
        _normalise,
        even_bounds(len(rows), bytes_per_item=2 * width * out.element_size()),
        rows,
        as_array(weight.to(wide)),
        as_array(out).reshape(-1, width),
        _number(wide, eps),
    )
    return out


def rms_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `reference.rms_norm_backward`."""
    if not supported(grad_out, x, weight):
        return reference.rms_norm_backward(grad_out, x, weight, eps)
    wide, width = accumulation_dtype(x), x.shape[-1]
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    rows = as_array(x.contiguous()).reshape(-1, width)
    num_blocks = -(-len(rows) // _BLOCK)
    sums = torch.empty(num_blocks, width, dtype=wide)
    run_split(
        _gradients,
        even_bounds(num_blocks, bytes_per_item=3 * _BLOCK * width * sums.element_size()),
        as_array(grad_out.to(wide).contiguous()).reshape(-1, width),
        rows,
        as_array(weight.to(wide)),
        as_array(grad_x).reshape(-1, width),
        as_array(sums),
        _number(wide, eps),
    )
    return grad_x, sums.sum(0).to(weight.dtype)


def _number(dtype: torch.dtype, number: float) -> np.floating:
    return np.float64(number) if dtype == torch.float64 else np.float32(number)


@kernel
def _normalise(rows, weight, out, eps, start, stop):  # type: ignore[no-untyped-def]
    """out = weight * row / sqrt(mean(row^2) + eps)."""
    width = rows.shape[1]
    for r in range(start, stop):
        row, to = rows[r], out[r]
        square = out.dtype.type(0)
        for j in range(width):
            square += widen(row[j]) * widen(row[j])
        scale = out.dtype.type(1) / np.sqrt(square / out.dtype.type(width) + eps)
        for j in range(width):
            to[j] = widen(row[j]) * scale * weight[j]


@kernel
def _gradients(grad_out, rows, weight, grad_rows, sums, eps, start, stop):  # type: ignore[no-untyped-def]
    """Of the rows in blocks start..stop; sums[block] is the block's gradient to the weight."""
    num_rows, width = rows.shape
    for block in range(start, stop):
        total = sums[block]
        total[:] = 0
        for r in range(block * _BLOCK, min(num_rows, (block + 1) * _BLOCK)):
            grad, row, to = grad_out[r], rows[r], grad_rows[r]
            square = dot = sums.dtype.type(0)
            for j in range(width):
                x = widen(row[j])
                square += x * x
                dot += grad[j] * weight[j] * x
            scale = sums.dtype.type(1) / np.sqrt(square / sums.dtype.type(width) + eps)
            share = dot * scale * scale / sums.dtype.type(width)
            for j in range(width):
                x = widen(row[j])
                total[j] += grad[j] * x * scale
                store(to, j, scale * (grad[j] * weight[j] - x * share), np.uint64(0))
