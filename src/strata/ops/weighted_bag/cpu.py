"""The weighted bag on a CPU: loops over rows that never gather them into memory.

Same signatures as `reference.py`. Each row of the table is asked for a few picks before it is
needed, so that reading random rows runs at the speed of the memory bus. The value gradient goes
by a reverse index: the picks sorted by row, each run of equal rows one weighted sum over grad_out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from strata.ops.kernels import (
    Kernel,
    as_array,
    kernel,
    prefetch,
    prefetch_row,
    readable,
    supported,
    widen,
)
from strata.ops.precision import accumulation_dtype
from strata.ops.rows import check_rows
from strata.ops.threads import even_bounds, run_split, weighed_bounds
from strata.ops.weighted_bag import reference

_AHEAD = 8  # picks between asking for a row and reading it
_USES_AHEAD = 4  # uses of rows between asking for their gradients and adding them
_LONG_RUN = 256  # uses of one row added up in one go


def bag_forward(values_rv: Tensor, rows_np: Tensor, weights_np: Tensor) -> Tensor:
    """See `reference.bag_forward`."""
    check_rows(len(values_rv), rows_np)
    if not readable(values_rv):
        return reference.bag_forward(values_rv, rows_np, weights_np)
    return _over_bags(_bag, values_rv, rows_np, weights_np, out_width=values_rv.shape[1])


def bag_dots(values_rv: Tensor, rows_np: Tensor, vectors_nv: Tensor) -> Tensor:
    """See `reference.bag_dots`."""
    check_rows(len(values_rv), rows_np)
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
    keys, order = _radix_sort(rows_q, num_bits=max(1, high.bit_length()))
    return _find_runs(keys, order)


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
    """out[n, p] = values[rows[n, p]] . vectors[n], four rows at a time."""
    num_picks, width = rows.shape[1], values.shape[1]
    base, row_bytes = np.uint64(values.ctypes.data), width * values.itemsize
    flat, end = rows.reshape(-1), stop * num_picks
    for pick in range(start * num_picks, min(start * num_picks + _AHEAD, end)):
        prefetch_row(base, flat[pick], row_bytes)
    for n in range(start, stop):
        vector, to = vectors[n], out[n]
        whole = num_picks // 4 * 4
        for p in range(0, whole, 4):
            first = n * num_picks + p
            for pick in range(min(first + _AHEAD, end), min(first + _AHEAD + 4, end)):
                prefetch_row(base, flat[pick], row_bytes)
            a, b = values[np.uint64(flat[first])], values[np.uint64(flat[first + 1])]
            c, d = values[np.uint64(flat[first + 2])], values[np.uint64(flat[first + 3])]
            dot_a = dot_b = dot_c = dot_d = out.dtype.type(0)
            for j in range(width):
                dot_a += widen(a[j]) * vector[j]
                dot_b += widen(b[j]) * vector[j]
                dot_c += widen(c[j]) * vector[j]
                dot_d += widen(d[j]) * vector[j]
            to[p], to[p + 1], to[p + 2], to[p + 3] = dot_a, dot_b, dot_c, dot_d
        for p in range(whole, num_picks):
            row, dot = values[np.uint64(rows[n, p])], out.dtype.type(0)
            for j in range(width):
                dot += widen(row[j]) * vector[j]
            to[p] = dot


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
    """total = sum of the picks order[begin:end]; asks ahead for those of the rows that follow."""
    row_bytes = grad_out.shape[1] * grad_out.itemsize
    grad_base, weight_base = np.uint64(grad_out.ctypes.data), np.uint64(weights.ctypes.data)
    for place in range(begin, end):
        ahead = np.uint64(order[min(place + _USES_AHEAD, len(order) - 1)])
        prefetch(weight_base + ahead * np.uint64(weights.itemsize))
        prefetch_row(grad_base, ahead // np.uint64(num_picks), row_bytes)
        pick = np.uint64(order[place])
        weight, row = weights[pick], grad_out[pick // np.uint64(num_picks)]
        if place == begin:
            for j in range(len(total)):
                total[j] = weight * row[j]
        else:
            for j in range(len(total)):
                total[j] += weight * row[j]


def _radix_sort(rows_q: np.ndarray, *, num_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Stable sort by the lowest `num_bits` bits, 11 or fewer at a time: (sorted rows, order).

    In each pass every thread counts the digits of its part of the picks, and then moves them to
    where the counts of all parts say; the order does not depend on how many parts there are.
    """
    num_passes = -(-num_bits // 11)
    digit_bits = -(-num_bits // num_passes)
    bounds = even_bounds(len(rows_q), bytes_per_item=16)
    starts = np.array(bounds[:-1], np.int64)
    key_type = np.uint32 if num_bits <= 32 else np.uint64
    order_type = np.uint32 if len(rows_q) < 1 << 32 else np.uint64
    keys, order = rows_q, np.empty(0, order_type)  # the first pass makes its order
    spare: list[np.ndarray] = []
    for number in range(num_passes):
        counts = np.zeros((len(starts), 1 << digit_bits), np.int64)
        run_split(_count_digits, bounds, keys, number * digit_bits, starts, counts)
        # Where each part's picks of a digit begin: after lower digits, and after earlier parts.
        ends = counts.T.reshape(-1).cumsum().reshape(counts.T.shape).T
        to_keys = spare.pop() if len(spare) > 1 else np.empty(len(rows_q), key_type)
        to_order = spare.pop() if spare else np.empty(len(rows_q), order_type)
        run_split(
            _move,
            bounds,
            keys,
            order,
            number * digit_bits,
            starts,
            ends - counts,
            to_keys,
            to_order,
        )
        spare = [order, keys] if number > 0 else []
        keys, order = to_keys, to_order
    return keys, order


def _find_runs(keys: np.ndarray, order: np.ndarray) -> ReverseIndex:
    """The index of sorted rows."""
    bounds = even_bounds(len(keys), bytes_per_item=16)
    parts = np.array(bounds[:-1], np.int64)
    counts = np.zeros(len(parts), np.int64)
    run_split(_count_runs, bounds, keys, parts, counts)
    ends = counts.cumsum()
    starts, rows_u = np.empty(ends[-1] + 1, np.int64), np.empty(ends[-1], np.int64)
    run_split(_mark_runs, bounds, keys, parts, ends - counts, starts, rows_u)
    starts[-1] = len(keys)
    return ReverseIndex(rows_u, starts, order)


@kernel
def _count_digits(keys, shift, parts, counts, start, stop):  # type: ignore[no-untyped-def]
    """How often each digit comes in the part of the picks that begins at `start`."""
    part = np.searchsorted(parts, start)
    mask = np.uint64(counts.shape[1] - 1)
    for i in range(start, stop):
        counts[part, (np.uint64(keys[i]) >> np.uint64(shift)) & mask] += 1


@kernel
def _move(keys, order, shift, parts, places, to_keys, to_order, start, stop):  # type: ignore[no-untyped-def]
    """Move picks to the places of their digits; without an order yet they are in their own."""
    part = np.searchsorted(parts, start)
    mask = np.uint64(places.shape[1] - 1)
    ordered = len(order) > 0
    for i in range(start, stop):
        digit = (np.uint64(keys[i]) >> np.uint64(shift)) & mask
        to = places[part, digit]
        places[part, digit] = to + 1
        to_keys[to] = keys[i]
        to_order[to] = order[i] if ordered else i


@kernel
def _count_runs(keys, parts, counts, start, stop):  # type: ignore[no-untyped-def]
    """How many runs of equal keys begin in the part that begins at `start`."""
    count = 0
    for i in range(start, stop):
        count += i == 0 or keys[i] != keys[i - 1]
    counts[np.searchsorted(parts, start)] = count


@kernel
def _mark_runs(keys, parts, places, starts, rows, start, stop):  # type: ignore[no-untyped-def]
    """Write where runs begin, and their keys."""
    place = places[np.searchsorted(parts, start)]
    for i in range(start, stop):
        if i == 0 or keys[i] != keys[i - 1]:
            starts[place], rows[place] = i, keys[i]
            place += 1
