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

from strata.ops.kernels import as_array, kernel, supported
from strata.ops.product_key_topk import reference
from strata.ops.threads import even_bounds, run_split

_HALVINGS = 12  # of the threshold's interval, at most
_BLOCK = 64  # candidates are compared in whole vectors


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
        as_array(scores_nhk).reshape(n * h, top_k),
        as_array(rows_nhk).reshape(n * h, top_k),
    )
    return scores_nhk, rows_nhk


def _staircase(top_k: int) -> np.ndarray:
    """(2, p) int32: the pairs (i, j) with (i + 1)(j + 1) <= k; each row's last pair comes first."""
    widths = [top_k // (i + 1) for i in range(top_k)]
    steps = [(i, width - 1) for i, width in enumerate(widths)]
    inner = [(i, j) for i, width in enumerate(widths) for j in range(width - 1)]
    return np.array(steps + inner, dtype=np.int32).T.copy()


@kernel
def _pick(half_scores, staircase, scores, rows, start, stop):  # type: ignore[no-untyped-def]
    """Both stages for queries start..stop: half_scores (q, 2, m) -> scores, rows (q, k)."""
    m, k, num_pairs = half_scores.shape[2], rows.shape[1], staircase.shape[1]
    room = max(m, num_pairs) + _BLOCK
    candidates, numbers = np.empty(room, scores.dtype), np.empty(room, np.int32)
    best = np.empty((2, k), scores.dtype)
    halves = np.empty((2, k), np.int32)
    order = np.empty(k, np.int32)
    left, right = staircase[0], staircase[1]
    for q in range(start, stop):
        for s in range(2):
            count = _threshold_candidates(half_scores[q, s], k, candidates, numbers)
            _best_in_order(candidates, count, order, best[s])
            for i in range(k):
                halves[s, i] = numbers[order[i]]
        # A step of the staircase (i, j) is beaten or matched by the (i + 1)(j + 1) pairs above and
        # left of it. Those with (i + 1)(j + 2) > k and a product of k or more bound the k-th best.
        bound = -np.inf
        for i in range(k):
            j = (k + i) // (i + 1) - 1
            bound = max(bound, best[0, i] + best[1, j])
        count = 0
        for p in range(num_pairs):
            pair_score = best[0, left[p]] + best[1, right[p]]
            candidates[count], numbers[count] = pair_score, p
            count += not pair_score < bound
        _best_in_order(candidates, count, order, scores[q])
        for i in range(k):
            p = numbers[order[i]]
            rows[q, i] = np.int64(halves[0, left[p]]) * m + halves[1, right[p]]


@kernel
def _threshold_candidates(scores, k, candidates, numbers):  # type: ignore[no-untyped-def]
    """Copy k or a few more scores, the k best among them, and their positions; return how many."""
    m = scores.shape[0]
    num_nan = 0
    for j in range(m):
        num_nan += scores[j] != scores[j]
    if num_nan > 0 or 2 * m <= 3 * k:
        for j in range(m):
            candidates[j] = scores[j] if scores[j] == scores[j] else np.inf
            numbers[j] = j
        return m

    for j in range(k):
        candidates[j] = scores[j]
    for group_start in range(k, m - k + 1, k):
        for j in range(k):
            score = scores[group_start + j]
            candidates[j] = score if score > candidates[j] else candidates[j]
    low = high = candidates[0]
    for j in range(1, k):
        low, high = min(low, candidates[j]), max(high, candidates[j])
    for _ in range(_HALVINGS):
        candidates[k] = low / 2 + high / 2  # through memory: numba would go on in fp64
        middle = candidates[k]
        count = 0
        for j in range(m):
            count += scores[j] >= middle
        if count >= k:
            low = middle
            if 2 * count <= 3 * k:
                break
        else:
            high = middle

    count = 0
    for j in range(m):
        candidates[count], numbers[count] = scores[j], j
        count += scores[j] >= low
    return count


@kernel
def _best_in_order(candidates, count, order, best):  # type: ignore[no-untyped-def]
    """Positions and values of the best candidates, best first: as many as `order` holds.

    Pads `candidates` behind `count`, so that whole vectors are compared.
    """
    k = order.shape[0]
    padded = (count + _BLOCK - 1) // _BLOCK * _BLOCK
    for j in range(count, padded):
        candidates[j] = -np.inf
    for i in range(k):
        order[i] = -1
    for i in range(count):
        mine = candidates[i]
        place = np.int32(0)
        for j in range(padded):
            place += np.int32(candidates[j] > mine)
        while place < k and order[place] >= 0:  # equal to one before it
            place += 1
        if place < k:
            order[place] = i
            best[place] = mine
