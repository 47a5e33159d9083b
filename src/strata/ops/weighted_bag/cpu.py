"""The weighted bag on a CPU: loops over rows that never gather them into memory.

Same signatures as `reference.py`. Each row of the table is asked for a few picks before it is
needed, so that reading random rows runs at the speed of the memory bus. The value gradient goes
by a reverse index: the picks sorted by row, each run of equal rows one weighted sum over grad_out.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from strata.ops.kernels import (
    Kernel,
    as_array,
    kernel,
    prefetch_row,
    readable,
    supported,
    widen,
)
from strata.ops.precision import accumulation_dtype
from strata.ops.threads import even_bounds, run_split, weighed_bounds
from strata.ops.weighted_bag import reference

_AHEAD = 8  # picks between asking for a row and reading it
_LONG_RUN = 256  # uses of one row added up in one go


def bag_forward(values_rv: Tensor, rows_np: Tensor, weights_np: Tensor) -> Tensor:
    """See `reference.bag_forward`."""
    check_rows(values_rv, rows_np)
    if not readable(values_rv):
        return reference.bag_forward(values_rv, rows_np, weights_np)
    return _over_bags(_bag, values_rv, rows_np, weights_np, out_width=values_rv.shape[1])


def bag_dots(values_rv: Tensor, rows_np: Tensor, vectors_nv: Tensor) -> Tensor:
    """See `reference.bag_dots`."""
    check_rows(values_rv, rows_np)
    if not readable(values_rv):
        return reference.bag_dots(values_rv, rows_np, vectors_nv)
    return _over_bags(_dots, values_rv, rows_np, vectors_nv, out_width=rows_np.shape[1])


def row_gradients(
    rows_np: Tensor, weights_np: Tensor, grad_out_nv: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.row_gradients`.

    A run of many uses of one hot row is summed in parts: one running fp32 sum of 10,000 equal
    terms was seen to drift by 1e-4.
    """
    if not supported(grad_out_nv):
        return reference.row_gradients(rows_np, weights_np, grad_out_nv)
    wide = accumulation_dtype(grad_out_nv)
    index = reverse_index(rows_np)
    grad_uv = torch.empty(len(index.rows_u), grad_out_nv.shape[1], dtype=wide)
    run_split(
        sum_runs,
        index.bounds(bytes_per_pick=grad_out_nv.shape[1] * grad_uv.element_size()),
        index.starts,
        index.order,
        rows_np.shape[1],
        as_array(weights_np.to(wide).contiguous()).reshape(-1),
        as_array(grad_out_nv.to(wide).contiguous()),
        as_array(grad_uv),
    )
    return torch.from_numpy(index.rows_u), grad_uv


@dataclass(frozen=True)
class ReverseIndex:
    """Which picks read each row.

    Attributes:
        rows_u: rows that were read, (u,) int64, ascending, distinct.
        starts: (u + 1,) int64; the picks of rows_u[i] are order[starts[i]:starts[i + 1]].
        order: picks (bag times picks-per-bag plus place), sorted by row, earlier bags first.
    """

    rows_u: np.ndarray
    starts: np.ndarray
    order: np.ndarray

    def bounds(self, *, bytes_per_pick: int) -> list[int]:
        """Ranges of rows with about as many picks each, one a thread."""
        return weighed_bounds(self.starts, bytes_per_unit=bytes_per_pick)


def reverse_index(rows_np: Tensor) -> ReverseIndex:
    """Sort all picks by row, stably, in time that does not depend on the table's length.

    Raises:
        IndexError: a row is negative.
    """
    rows_q = as_array(rows_np.contiguous()).reshape(-1)
    if len(rows_q) == 0:
        nothing = np.empty(0, np.int64)
        return ReverseIndex(nothing, np.zeros(1, np.int64), nothing)
    low, high = (int(bound) for bound in rows_np.aminmax())
    if low < 0:
        raise IndexError(f"row {low} is negative")
    keys = np.empty(len(rows_q), np.uint32 if high < 1 << 32 else np.uint64)
    order = np.empty(len(rows_q), np.uint32 if len(rows_q) < 1 << 32 else np.uint64)
    _radix_sort(rows_q, max(1, high.bit_length()), keys, order)
    starts, rows_u = np.empty(len(keys) + 1, np.int64), np.empty(len(keys), np.int64)
    num_rows = _find_runs(keys, starts, rows_u)
    return ReverseIndex(rows_u[:num_rows].copy(), starts[: num_rows + 1].copy(), order)


def check_rows(values_rv: Sized, rows: Tensor) -> None:
    """A kernel reads and writes whatever lies at a wrong index.

    Raises:
        IndexError: a row is not in the table.
    """
    if rows.numel() == 0:
        return
    low, high = (int(bound) for bound in rows.aminmax())
    if low < 0 or high >= len(values_rv):
        wrong = low if low < 0 else high
        raise IndexError(f"row {wrong} is not in the table: 0..{len(values_rv) - 1} are")


def _over_bags(
    bag_kernel: Kernel, values_rv: Tensor, rows_np: Tensor, other: Tensor, *, out_width: int
) -> Tensor:
    """Run a kernel (values, rows, other, out) over all bags; out is (n, out_width)."""
    wide, (n, p) = accumulation_dtype(values_rv), rows_np.shape
    out = torch.empty(n, out_width, dtype=wide)
    run_split(
        bag_kernel,
        even_bounds(n, bytes_per_item=p * values_rv.shape[1] * values_rv.element_size()),
        as_array(values_rv),
        as_array(rows_np.contiguous()),
        as_array(other.to(wide).contiguous()),
        as_array(out),
    )
    return out


@kernel
def _bag(values, rows, weights, out, start, stop):  # type: ignore[no-untyped-def]
    """out[n] = sum_p weights[n, p] * values[rows[n, p]], four rows at a time."""
    num_picks, width = rows.shape[1], values.shape[1]
    base, row_bytes = np.uint64(values.ctypes.data), width * values.itemsize
    flat, end = rows.reshape(-1), stop * num_picks
    for pick in range(start * num_picks, min(start * num_picks + _AHEAD, end)):
        prefetch_row(base, flat[pick], row_bytes)
    for n in range(start, stop):
        total = out[n]
        total[:] = 0
        whole = num_picks // 4 * 4
        for p in range(0, whole, 4):
            first = n * num_picks + p
            for pick in range(min(first + _AHEAD, end), min(first + _AHEAD + 4, end)):
                prefetch_row(base, flat[pick], row_bytes)
            a, b = values[np.uint64(flat[first])], values[np.uint64(flat[first + 1])]
            c, d = values[np.uint64(flat[first + 2])], values[np.uint64(flat[first + 3])]
            wa, wb, wc, wd = (
                weights[n, p],
                weights[n, p + 1],
                weights[n, p + 2],
                weights[n, p + 3],
            )
            for j in range(width):
                total[j] += (wa * widen(a[j]) + wb * widen(b[j])) + (
                    wc * widen(c[j]) + wd * widen(d[j])
                )
        for p in range(whole, num_picks):
            row, weight = values[np.uint64(rows[n, p])], weights[n, p]
            for j in range(width):
                total[j] += weight * widen(row[j])


@kernel
def _dots(values, rows, vectors, out, start, stop):  # type: ignore[no-untyped-def]
    """out[n, p] = values[rows[n, p]] . vectors[n]."""
    num_picks, width = rows.shape[1], values.shape[1]
    base, row_bytes = np.uint64(values.ctypes.data), width * values.itemsize
    flat, end = rows.reshape(-1), stop * num_picks
    for n in range(start, stop):
        vector = vectors[n]
        for p in range(num_picks):
            pick = n * num_picks + p
            if pick + _AHEAD < end:
                prefetch_row(base, flat[pick + _AHEAD], row_bytes)
            row = values[np.uint64(flat[pick])]
            total = out.dtype.type(0)
            for j in range(width):
                total += widen(row[j]) * vector[j]
            out[n, p] = total


@kernel
def sum_runs(starts, order, num_picks, weights, grad_out, out, start, stop):  # type: ignore[no-untyped-def]
    """out[u] = sum of weights[q] * grad_out[q // num_picks] over the picks q of row u."""
    part = np.empty(grad_out.shape[1], out.dtype)
    for u in range(start, stop):
        add_run(starts[u], starts[u + 1], order, num_picks, weights, grad_out, part, out[u])


@kernel
def add_run(begin, end, order, num_picks, weights, grad_out, part, total):  # type: ignore[no-untyped-def]
    """total = sum of the picks order[begin:end]; long runs in parts, through `part`."""
    if end - begin <= _LONG_RUN:
        _add_picks(begin, end, order, num_picks, weights, grad_out, total)
        return
    total[:] = 0
    for first in range(begin, end, _LONG_RUN):
        last = min(first + _LONG_RUN, end)
        _add_picks(first, last, order, num_picks, weights, grad_out, part)
        for j in range(len(total)):
            total[j] += part[j]


@kernel
def _add_picks(begin, end, order, num_picks, weights, grad_out, total):  # type: ignore[no-untyped-def]
    weight, row = weights[order[begin]], grad_out[np.uint64(order[begin]) // np.uint64(num_picks)]
    for j in range(len(total)):
        total[j] = weight * row[j]
    for place in range(begin + 1, end):
        pick = order[place]
        weight, row = weights[pick], grad_out[np.uint64(pick) // np.uint64(num_picks)]
        for j in range(len(total)):
            total[j] += weight * row[j]


@kernel
def _radix_sort(rows, num_bits, keys_out, order_out):  # type: ignore[no-untyped-def]
    """Stable sort by the lowest `num_bits` bits, 11 or fewer at a time."""
    num_passes = (num_bits + 10) // 11
    digit_bits = (num_bits + num_passes - 1) // num_passes
    num_digits = 1 << digit_bits
    mask = np.uint64(num_digits - 1)
    places = np.zeros((num_passes, num_digits), np.int64)
    for i in range(len(rows)):
        key = np.uint64(rows[i])
        for number in range(num_passes):
            places[number, (key >> np.uint64(number * digit_bits)) & mask] += 1
    for number in range(num_passes):
        before = 0
        for digit in range(num_digits):
            count = places[number, digit]
            places[number, digit] = before
            before += count

    # Two pairs of buffers take turns, so that the last pass ends in the outputs.
    keys, order = np.empty_like(keys_out), np.empty_like(order_out)
    to_outputs = num_passes % 2 == 1
    first_keys, first_order = (keys, order) if to_outputs else (keys_out, order_out)
    for i in range(len(rows)):
        first_keys[i], first_order[i] = rows[i], i
    for number in range(num_passes):
        from_keys, from_order = (keys, order) if to_outputs else (keys_out, order_out)
        to_keys, to_order = (keys_out, order_out) if to_outputs else (keys, order)
        to_outputs = not to_outputs
        shift, next_places = np.uint64(number * digit_bits), places[number]
        for i in range(len(rows)):
            key = from_keys[i]
            bucket = (np.uint64(key) >> shift) & mask
            to = next_places[bucket]
            next_places[bucket] = to + 1
            to_keys[to], to_order[to] = key, from_order[i]


@kernel
def _find_runs(keys, starts, rows):  # type: ignore[no-untyped-def]
    """Starts of the runs of equal keys, with the end behind them, and their keys; how many."""
    count = 0
    for i in range(len(keys)):
        if i == 0 or keys[i] != keys[i - 1]:
            starts[count], rows[count] = i, keys[i]
            count += 1
    starts[count] = len(keys)
    return count
