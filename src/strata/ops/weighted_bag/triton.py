"""The weighted bag on a GPU, in Triton. Same signatures as `reference.py`.

One program per bag and tile of columns; rows are asked for several at a time, sums are fp32. The
value gradient goes by a reverse index like on the CPU: picks sorted by row, one program per run of
equal rows, runs longer than `LONG_RUN` summed in parts first, so that one hot row does not wait for
one program and the order of summation is always the same. No atomics.

fp8 codes go through the reference, which gathers the rows that are read: Triton loads e4m3fn on
some generations of GPUs only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from strata.ops.precision import accumulation_dtype
from strata.ops.rows import check_rows
from strata.ops.weighted_bag import reference

LONG_RUN = 256  # uses of one row added up by one program
_UNROLL = 8  # rows in flight in one program
_WIDEST_TILE = 1024  # columns of one program


def bag_forward(values_rv: Tensor, rows_np: Tensor, weights_np: Tensor) -> Tensor:
    """See `reference.bag_forward`."""
    check_rows(len(values_rv), rows_np)
    if values_rv.dtype == torch.float8_e4m3fn:
        return reference.bag_forward(values_rv, rows_np, weights_np)
    n, p = rows_np.shape
    v = values_rv.shape[1]
    out_nv = torch.empty(n, v, dtype=accumulation_dtype(values_rv), device=values_rv.device)
    tile = min(_WIDEST_TILE, triton.next_power_of_2(v))
    if out_nv.numel():
        _bag[(n, triton.cdiv(v, tile))](
            values_rv.contiguous(),
            rows_np.contiguous(),
            weights_np.contiguous(),
            out_nv,
            p,
            v,
            TILE=tile,
            UNROLL=_UNROLL,
            WIDE=_tl_dtype(out_nv),
        )
    return out_nv


def bag_dots(values_rv: Tensor, rows_np: Tensor, vectors_nv: Tensor) -> Tensor:
    """See `reference.bag_dots`."""
    check_rows(len(values_rv), rows_np)
    if values_rv.dtype == torch.float8_e4m3fn:
        return reference.bag_dots(values_rv, rows_np, vectors_nv)
    n, p = rows_np.shape
    v = values_rv.shape[1]
    out_np = torch.empty(n, p, dtype=accumulation_dtype(values_rv), device=values_rv.device)
    if out_np.numel():
        _dots[(n, triton.cdiv(p, _UNROLL))](
            values_rv.contiguous(),
            rows_np.contiguous(),
            vectors_nv.contiguous(),
            out_np,
            p,
            v,
            TILE=min(_WIDEST_TILE, triton.next_power_of_2(v)),
            UNROLL=_UNROLL,
            WIDE=_tl_dtype(out_np),
        )
    return out_np


def row_gradients(
    rows_np: Tensor, weights_np: Tensor, grad_out_nv: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.row_gradients`."""
    index = reverse_index(rows_np)
    return index.rows_u, sum_runs(index, weights_np, grad_out_nv)


@dataclass(frozen=True)
class ReverseIndex:
    """Which picks read each row; all on the device.

    Attributes:
        rows_u: rows that were read, (u,) int64, ascending, distinct.
        starts: (u + 1,) int64; the picks of rows_u[i] are order[starts[i]:starts[i + 1]].
        order: picks sorted by row, earlier bags first, int64.
        num_picks: picks per bag; pick q belongs to bag q // num_picks.
    """

    rows_u: Tensor
    starts: Tensor
    order: Tensor
    num_picks: int


def reverse_index(rows_np: Tensor) -> ReverseIndex:
    """Sort all picks by row, stably."""
    sorted_q, order = rows_np.reshape(-1).sort(stable=True)
    rows_u, counts_u = torch.unique_consecutive(sorted_q, return_counts=True)
    starts = torch.zeros(len(rows_u) + 1, dtype=torch.int64, device=rows_np.device)
    torch.cumsum(counts_u, 0, out=starts[1:])
    return ReverseIndex(rows_u, starts, order, max(1, rows_np.shape[1]))


def sum_runs(index: ReverseIndex, weights_np: Tensor, grad_out_nv: Tensor) -> Tensor:
    """Gradients of the rows that were read, (u, v) in fp32 (fp64 for fp64 grad_out)."""
    wide = accumulation_dtype(grad_out_nv)
    u, v = len(index.rows_u), grad_out_nv.shape[1]
    counts_u = index.starts.diff()
    parts_u = (counts_u + LONG_RUN - 1) // LONG_RUN
    run_s = torch.arange(u, device=grad_out_nv.device).repeat_interleave(parts_u)
    first_u = parts_u.cumsum(0) - parts_u
    part_s = torch.arange(len(run_s), device=grad_out_nv.device) - first_u[run_s]
    begin_s = index.starts[run_s] + part_s * LONG_RUN
    end_s = torch.minimum(begin_s + LONG_RUN, index.starts[1:][run_s])
    grad_sv = torch.empty(len(run_s), v, dtype=wide, device=grad_out_nv.device)
    tile = min(_WIDEST_TILE, triton.next_power_of_2(v))
    if grad_sv.numel():
        _sum_picks[(len(run_s), triton.cdiv(v, tile))](
            begin_s,
            end_s,
            index.order,
            weights_np.contiguous(),
            grad_out_nv.contiguous(),
            grad_sv,
            index.num_picks,
            v,
            TILE=tile,
            WIDE=_tl_dtype(grad_sv),
        )
    if len(run_s) > u:
        ones = torch.ones(len(run_s), 1, dtype=wide, device=grad_sv.device)
        _, grad_sv = row_gradients(run_s[:, None], ones, grad_sv)
    return grad_sv


@triton.jit
def _bag(  # type: ignore[no-untyped-def]
    values,
    rows,
    weights,
    out,
    num_picks,
    width,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDE: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < width
    picks = tl.arange(0, UNROLL)
    total = tl.zeros((TILE,), WIDE)
    for first in range(0, num_picks, UNROLL):
        live = first + picks < num_picks
        row = tl.load(rows + bag * num_picks + first + picks, mask=live, other=0)
        weight = tl.load(weights + bag * num_picks + first + picks, mask=live, other=0).to(WIDE)
        block = tl.load(
            values + row[:, None] * width + columns[None, :],
            mask=live[:, None] & inside[None, :],
            other=0,
        )
        total += tl.sum(weight[:, None] * block.to(WIDE), axis=0)
    tl.store(out + bag * width + columns, total, mask=inside)


@triton.jit
def _dots(  # type: ignore[no-untyped-def]
    values,
    rows,
    vectors,
    out,
    num_picks,
    width,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDE: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64)
    picks = tl.program_id(1) * UNROLL + tl.arange(0, UNROLL)
    live = picks < num_picks
    row = tl.load(rows + bag * num_picks + picks, mask=live, other=0)
    total = tl.zeros((UNROLL,), WIDE)
    for first in range(0, width, TILE):
        columns = first + tl.arange(0, TILE)
        inside = columns < width
        vector = tl.load(vectors + bag * width + columns, mask=inside, other=0).to(WIDE)
        block = tl.load(
            values + row[:, None] * width + columns[None, :],
            mask=live[:, None] & inside[None, :],
            other=0,
        )
        total += tl.sum(block.to(WIDE) * vector[None, :], axis=1)
    tl.store(out + bag * num_picks + picks, total, mask=live)


@triton.jit
def _sum_picks(  # type: ignore[no-untyped-def]
    begins,
    ends,
    order,
    weights,
    grad_out,
    out,
    num_picks,
    width,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < width
    total = tl.zeros((TILE,), WIDE)
    for place in range(tl.load(begins + part), tl.load(ends + part)):
        pick = tl.load(order + place)
        weight = tl.load(weights + pick).to(WIDE)
        grad = tl.load(grad_out + (pick // num_picks) * width + columns, mask=inside, other=0)
        total += weight * grad.to(WIDE)
    tl.store(out + part * width + columns, total, mask=inside)


def _tl_dtype(tensor: Tensor) -> Any:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
