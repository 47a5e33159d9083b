"""Product-key picks on a CPU: both stages for one query at a time, inside the first cache.

Stage 1 needs the k best of m half scores, in order. The largest of each of k groups bounds the
k-th best from below; halving the interval above it a few times leaves little more than k
candidates, and each candidate's place is the number of candidates that beat it. All of this is
compares and counts over short arrays, which compile to vector instructions; torch's `topk` sorts.
Stage 2 does the same with the staircase's sums.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from strata.ops.kernels import (
    above_16,
    as_array,
    kernel,
    lowest_one,
    not_below_16,
    num_ones,
    supported,
)
from strata.ops.product_key_topk import reference
from strata.ops.threads import even_bounds, run_split

_HALVINGS = 12  # of the threshold's interval, at most
_BLOCK = 16  # numbers compared at once


def pick_rows(half_scores_nhsm: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See `reference.pick_rows`. Ties go to the lower half-key; NaN counts as infinite."""
    if not supported(half_scores_nhsm) or half_scores_nhsm.dtype == torch.bfloat16:
        return reference.pick_rows(half_scores_nhsm, top_k)
    n, h, _, m = half_scores_nhsm.shape
    scores_nhk = half_scores_nhsm.new_empty(n, h, top_k)
    rows_nhk = torch.empty(n, h, top_k, dtype=torch.int64)
    half_scores = as_array(half_scores_nhsm.contiguous()).reshape(n * h, 2, m)
    run_split(
        _pick,
        even_bounds(n * h, bytes_per_item=64 * m),  # about as long as copying so much
        half_scores,
        _staircase(top_k),
        np.array([-(-top_k // (i + 1)) - 1 for i in range(top_k)], np.int32),  # corners (i, j)
        as_array(scores_nhk).reshape(n * h, top_k),
        as_array(rows_nhk).reshape(n * h, top_k),
    )
    return scores_nhk, rows_nhk


def _staircase(top_k: int) -> np.ndarray:
    """(2, p) int32: the pairs (i, j) with (i + 1)(j + 1) <= k."""
    pairs = [(i, j) for i in range(top_k) for j in range(top_k // (i + 1))]
    return np.array(pairs, dtype=np.int32).T.copy()


@kernel
def _pick(half_scores, staircase, corners, scores, rows, start, stop):  # type: ignore[no-untyped-def]
    """Both stages for queries start..stop: half_scores (q, 2, m) -> scores, rows (q, k)."""
    m, k, num_pairs = half_scores.shape[2], rows.shape[1], staircase.shape[1]
    room = max(m, num_pairs) + _BLOCK
    candidates, numbers = np.empty(room, scores.dtype), np.empty(room, np.int32)
    best = np.empty((2, k), scores.dtype)
    halves = np.empty((2, k), np.int32)
    order = np.empty(k, np.int32)
    sums = np.empty(num_pairs, scores.dtype)
    left, right, first, second = staircase[0], staircase[1], best[0], best[1]
    for q in range(start, stop):
        for s in range(2):
            count = _threshold_candidates(half_scores[q, s], k, candidates, numbers)
            _best_in_order(candidates, count, order, best[s])
            for i in range(k):
                halves[s, i] = numbers[order[i]]
        # A corner (i, j) of the staircase is beaten or matched by the (i + 1)(j + 1) pairs above
        # and left of it, k or more, so it bounds the k-th best from below.
        bound = scores.dtype.type(-np.inf)
        for i in range(k):
            bound = max(bound, first[i] + second[corners[i]])
        for p in range(num_pairs):
            sums[p] = first[left[p]] + second[right[p]]
        count = _keep(sums, bound, candidates, numbers)
        _best_in_order(candidates, count, order, scores[q])
        for i in range(k):
            p = numbers[order[i]]
            rows[q, i] = np.int64(halves[0, left[p]]) * m + halves[1, right[p]]


@kernel
def _threshold_candidates(scores, k, candidates, numbers):  # type: ignore[no-untyped-def]
    """Copy k or a few more scores, the k best among them, and their positions; return how many."""
    m, num_groups = scores.shape[0], (k + _BLOCK - 1) // _BLOCK * _BLOCK
    infinite = scores.dtype.type(np.inf)
    if 2 * m <= 3 * num_groups or _num_not_below(scores, infinite) > 0:  # of NaN too
        for j in range(m):
            candidates[j] = scores[j] if scores[j] == scores[j] else infinite
            numbers[j] = j
        return m

    for j in range(num_groups):
        candidates[j] = scores[j]
    for group_start in range(num_groups, m - num_groups + 1, num_groups):
        for j in range(num_groups):
            score = scores[group_start + j]
            candidates[j] = score if score > candidates[j] else candidates[j]
    low = high = candidates[0]
    for j in range(1, num_groups):
        low, high = min(low, candidates[j]), max(high, candidates[j])
    for _ in range(_HALVINGS):
        candidates[num_groups] = low / 2 + high / 2  # through memory: numba would go on in fp64
        middle = candidates[num_groups]
        count = _num_not_below(scores, middle)
        if count >= k:
            low = middle
            if 2 * count <= 3 * k:
                break
        else:
            high = middle
    return _keep(scores, low, candidates, numbers)


@kernel
def _num_not_below(scores, bound):  # type: ignore[no-untyped-def]
    """How many scores reach a bound, or are NaN."""
    address, whole = np.uint64(scores.ctypes.data), len(scores) // _BLOCK * _BLOCK
    count = np.int32(0)
    for j in range(0, whole, _BLOCK):
        count += num_ones(not_below_16(address + np.uint64(j * scores.itemsize), bound))
    for j in range(whole, len(scores)):
        count += np.int32(not scores[j] < bound)
    return count


@kernel
def _keep(scores, bound, candidates, numbers):  # type: ignore[no-untyped-def]
    """Copy scores that reach a bound, or are NaN, and their positions; return how many."""
    address, whole = np.uint64(scores.ctypes.data), len(scores) // _BLOCK * _BLOCK
    count = 0
    for j in range(0, whole, _BLOCK):
        found = not_below_16(address + np.uint64(j * scores.itemsize), bound)
        while found != 0:
            number = j + lowest_one(found)
            candidates[count], numbers[count] = scores[number], number
            count += 1
            found = np.uint32(found & np.uint32(found - np.uint32(1)))
    for j in range(whole, len(scores)):
        candidates[count], numbers[count] = scores[j], j
        count += not scores[j] < bound
    return count


@kernel
def _best_in_order(candidates, count, order, best):  # type: ignore[no-untyped-def]
    """Positions and values of the best candidates, best first: as many as `order` holds.

    Pads `candidates` behind `count`, so that whole blocks are compared.
    """
    k = order.shape[0]
    address = np.uint64(candidates.ctypes.data)
    padded = (count + _BLOCK - 1) // _BLOCK * _BLOCK
    for j in range(count, padded):
        candidates[j] = -np.inf
    for i in range(k):
        order[i] = -1
    for i in range(count):
        mine = candidates[i]
        place = np.int32(0)
        for j in range(0, padded, _BLOCK):
            place += num_ones(above_16(address + np.uint64(j * candidates.itemsize), mine))
        while place < k and order[place] >= 0:  # equal to one before it
            place += 1
        if place < k:
            order[place] = i
            best[place] = mine
