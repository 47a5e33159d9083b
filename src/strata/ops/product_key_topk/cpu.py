"""Product-key picks on a CPU: both stages for one query at a time, inside the first cache.

Stage 1 needs the k best of m half scores, in order. The k-th largest of the maxima of 2k groups
bounds the k-th best from below, and is found by halving an interval; it leaves little more than k
candidates, and each candidate's place is the number of candidates that beat it. All of this is
compares and counts over short arrays, sixteen numbers at a time; torch's `topk` sorts.
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
_TOKENS_A_PART = 256  # summed up before they are added to the sums of others


def pick_rows(half_scores_nhsm: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See `reference.pick_rows`. Ties go to the lower half-key; NaN counts as infinite."""
    if not supported(half_scores_nhsm) or half_scores_nhsm.dtype == torch.bfloat16:
        return reference.pick_rows(half_scores_nhsm, top_k)
    n, h, _, m = half_scores_nhsm.shape
    scores_nhk = half_scores_nhsm.new_empty(n, h, top_k)
    rows_nhk = torch.empty(n, h, top_k, dtype=torch.int64)
    by_token = half_scores_nhsm.is_contiguous()  # `score_halves` leaves them by codebook
    half_scores = half_scores_nhsm if by_token else half_scores_nhsm.permute(1, 2, 0, 3)
    run_split(
        _pick,
        even_bounds(n * h, bytes_per_item=64 * m),  # about as long as copying so much
        as_array(half_scores.contiguous()).reshape((n, h * 2, m) if by_token else (h * 2, n, m)),
        by_token,
        _staircase(top_k),
        np.array([-(-top_k // (i + 1)) - 1 for i in range(top_k)], np.int32),  # corners (i, j)
        as_array(scores_nhk),
        as_array(rows_nhk),
    )
    return scores_nhk, rows_nhk


def half_key_gradients(
    grad_scores_nhk: Tensor, query_nhsd: Tensor, keys_hsmd: Tensor, rows_nhk: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.half_key_gradients`; a thread owns whole codebooks, so nothing is sorted."""
    tensors = (grad_scores_nhk, query_nhsd, keys_hsmd)
    if not supported(*tensors) or len({tensor.dtype for tensor in tensors}) > 1:
        return reference.half_key_gradients(grad_scores_nhk, query_nhsd, keys_hsmd, rows_nhk)
    n, h, s, d = query_nhsd.shape
    m, k = keys_hsmd.shape[2], rows_nhk.shape[2]
    grad_scores, query, keys, rows = (
        as_array(tensor.contiguous()) for tensor in (*tensors, rows_nhk)
    )
    grad_query = torch.empty(query.shape, dtype=query_nhsd.dtype)
    grad_keys = torch.empty(keys.shape, dtype=keys_hsmd.dtype)
    row_bytes = d * query.itemsize
    run_split(
        _add_keys,
        even_bounds(n, bytes_per_item=h * s * k * row_bytes),
        grad_scores,
        keys,
        rows,
        as_array(grad_query),
    )
    run_split(
        _add_queries,
        even_bounds(h * s, bytes_per_item=n * k * row_bytes),
        grad_scores,
        query,
        rows,
        as_array(grad_keys).reshape(h * s, m, d),
    )
    return grad_query, grad_keys


def _staircase(top_k: int) -> np.ndarray:
    """(2, p) int32: the pairs (i, j) with (i + 1)(j + 1) <= k."""
    pairs = [(i, j) for i in range(top_k) for j in range(top_k // (i + 1))]
    return np.array(pairs, dtype=np.int32).T.copy()


@kernel
def _pick(half_scores, by_token, staircase, corners, scores, rows, start, stop):  # type: ignore[no-untyped-def]
    """Both stages for queries start..stop of n * h: scores, rows (n, h, k).

    half_scores is (n, h * 2, m) by token, otherwise (h * 2, n, m).
    """
    num_heads, k = rows.shape[1], rows.shape[2]
    m, num_pairs = half_scores.shape[2], staircase.shape[1]
    room = max(m, num_pairs) + _BLOCK
    candidates, numbers = np.empty(room, scores.dtype), np.empty(room, np.int32)
    best = np.empty((2, k), scores.dtype)
    halves = np.empty((2, k), np.int32)
    order = np.empty(k, np.int32)
    sums = np.empty(num_pairs, scores.dtype)
    left, right, first, second = staircase[0], staircase[1], best[0], best[1]
    for q in range(start, stop):
        n, head = q // num_heads, q % num_heads
        for s in range(2):
            codebook = head * 2 + s
            mine = half_scores[n, codebook] if by_token else half_scores[codebook, n]
            count = _threshold_candidates(mine, k, candidates, numbers)
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
        _best_in_order(candidates, count, order, scores[n, head])
        for i in range(k):
            p = numbers[order[i]]
            rows[n, head, i] = np.int64(halves[0, left[p]]) * m + halves[1, right[p]]


@kernel
def _threshold_candidates(scores, k, candidates, numbers):  # type: ignore[no-untyped-def]
    """Copy k or a few more scores, the k best among them, and their positions; return how many."""
    m, num_groups = scores.shape[0], (2 * k + _BLOCK - 1) // _BLOCK * _BLOCK
    infinite = scores.dtype.type(np.inf)
    if m < 2 * num_groups or _num_not_below(scores, infinite) > 0:  # of NaN too
        for j in range(m):
            candidates[j] = scores[j] if scores[j] == scores[j] else infinite
            numbers[j] = j
        return m

    largest = candidates[:num_groups]
    for j in range(num_groups):
        largest[j] = scores[j]
    for group_start in range(num_groups, m - num_groups + 1, num_groups):
        block = scores[group_start : group_start + num_groups]
        for j in range(num_groups):
            largest[j] = block[j] if block[j] > largest[j] else largest[j]
    low = high = largest[0]
    for j in range(1, num_groups):
        low, high = min(low, largest[j]), max(high, largest[j])
    for _ in range(_HALVINGS):
        candidates[num_groups] = low / 2 + high / 2  # through memory: numba would go on in fp64
        middle = candidates[num_groups]
        count = _num_not_below(largest, middle)
        low, high = (middle, high) if count >= k else (low, middle)
        if count == k:
            break
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


@kernel
def _add_keys(grad_scores, keys, rows, grad_query, start, stop):  # type: ignore[no-untyped-def]
    """grad_query[n, h, s] = sum_k grad_scores[n, h, k] * (half-key s of rows[n, h, k])."""
    _, num_heads, num_picks = rows.shape
    m, width = np.uint64(keys.shape[2]), keys.shape[3]
    for n in range(start, stop):
        for head in range(num_heads):
            first, second = grad_query[n, head, 0], grad_query[n, head, 1]
            first[:] = 0
            second[:] = 0
            for i in range(num_picks):
                row, grad = np.uint64(rows[n, head, i]), grad_scores[n, head, i]
                left, right = keys[head, 0, row // m], keys[head, 1, row % m]
                for j in range(width):
                    first[j] += grad * left[j]
                    second[j] += grad * right[j]


@kernel
def _add_queries(grad_scores, query, rows, grad_keys, start, stop):  # type: ignore[no-untyped-def]
    """grad_keys[h * 2 + s, half-key] = sum of grad_scores * query over the picks of that half-key.

    Tokens are summed in parts: one running fp32 sum of very many terms would drift.
    """
    num_tokens, _, num_picks = rows.shape
    m, width = np.uint64(grad_keys.shape[1]), grad_keys.shape[2]
    part = np.empty((grad_keys.shape[1], width), grad_keys.dtype)
    for codebook in range(start, stop):
        head, half, total = codebook // 2, codebook % 2, grad_keys[codebook]
        total[:] = 0
        for first in range(0, num_tokens, _TOKENS_A_PART):
            part[:] = 0
            for n in range(first, min(first + _TOKENS_A_PART, num_tokens)):
                vector = query[n, head, half]
                for i in range(num_picks):
                    row, grad = np.uint64(rows[n, head, i]), grad_scores[n, head, i]
                    to = part[row // m if half == 0 else row % m]
                    for j in range(width):
                        to[j] += grad * vector[j]
            for key in range(len(total)):
                for j in range(width):
                    total[key, j] += part[key, j]
