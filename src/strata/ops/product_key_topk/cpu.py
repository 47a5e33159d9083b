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
    TILE_ROWS,
    TILE_WIDTH,
    as_array,
    kernel,
    lowest_one,
    not_below_16,
    num_ones,
    rank_16,
    supported,
    tile_product,
)
from strata.ops.product_key_topk import reference
from strata.ops.threads import even_bounds, run_split

_HALVINGS = 12  # of the threshold's interval, at most
_BLOCK = 16  # numbers compared at once
_TOKENS_A_PART = 256  # summed up before they are added to the sums of others
_TOKENS_A_TURN = 8 * TILE_ROWS  # scored before they are picked from
_MIN_TOKENS = 256  # fewer may not pay for turning the half-keys round


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
        *_staircase(top_k),
        as_array(scores_nhk),
        as_array(rows_nhk),
    )
    return scores_nhk, rows_nhk


def can_score(query_nhsd: Tensor, keys_hsmd: Tensor) -> bool:
    """Whether `score_and_pick` takes these, and is the faster way."""
    both_fp32 = query_nhsd.dtype == keys_hsmd.dtype == torch.float32
    return both_fp32 and supported(query_nhsd, keys_hsmd) and len(query_nhsd) >= _MIN_TOKENS


def score_and_pick(query_nhsd: Tensor, keys_hsmd: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Scores (n, h, k) and rows (n, h, k); half scores never leave a core's caches."""
    n, h, s, d = query_nhsd.shape
    m = keys_hsmd.shape[2]
    keys = torch.zeros(h * s, d, -(-m // TILE_WIDTH) * TILE_WIDTH)
    keys[:, :, :m] = keys_hsmd.reshape(h * s, m, d).transpose(1, 2)
    scores_nhk = torch.empty(n, h, top_k)
    rows_nhk = torch.empty(n, h, top_k, dtype=torch.int64)
    run_split(
        _score_and_pick,
        even_bounds(n, bytes_per_item=h * s * m * d),
        as_array(query_nhsd.contiguous()).reshape(n, h * s * d),
        as_array(keys),
        m,
        *_staircase(top_k),
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


def _staircase(top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs (i, j) with (i + 1)(j + 1) <= k, (2, p), and the j of each i's corner, (k,)."""
    pairs = [(i, j) for i in range(top_k) for j in range(top_k // (i + 1))]
    corners = [-(-top_k // (i + 1)) - 1 for i in range(top_k)]
    return np.array(pairs, dtype=np.int32).T.copy(), np.array(corners, np.int32)


@kernel
def _pick(half_scores, by_token, staircase, corners, scores, rows, start, stop):  # type: ignore[no-untyped-def]
    """Both stages for queries start..stop of n * h: scores, rows (n, h, k).

    half_scores is (n, h * 2, m) by token, otherwise (h * 2, n, m).
    """
    num_heads = rows.shape[1]
    space = _space(scores, half_scores.shape[2], rows.shape[2], staircase.shape[1])
    for q in range(start, stop):
        n, head = q // num_heads, q % num_heads
        left = half_scores[n, head * 2] if by_token else half_scores[head * 2, n]
        right = half_scores[n, head * 2 + 1] if by_token else half_scores[head * 2 + 1, n]
        _pick_pairs(left, right, staircase, corners, scores[n, head], rows[n, head], space)


@kernel
def _score_and_pick(query, keys, m, staircase, corners, scores, rows, start, stop):  # type: ignore[no-untyped-def]
    """Score and pick for tokens start..stop, some at a time: scores, rows (n, h, k).

    query is (n, h * 2 * d), keys (h * 2, d, m and padding).
    """
    num_tokens, num_heads = len(query), rows.shape[1]
    width, padded = keys.shape[1], keys.shape[2]
    space = _space(scores, m, rows.shape[2], staircase.shape[1])
    # A tile that would reach past the last token moves back: its first rows are not wanted.
    halves = np.empty((2, TILE_ROWS + _TOKENS_A_TURN, padded), np.float32)
    query_base, keys_base = np.uint64(query.ctypes.data), np.uint64(keys.ctypes.data)
    halves_base = np.uint64(halves.ctypes.data)
    for first in range(start, stop, _TOKENS_A_TURN):
        last = min(first + _TOKENS_A_TURN, stop)
        for head in range(num_heads):
            for s in range(2):
                codebook = head * 2 + s
                for column in range(0, padded, TILE_WIDTH):
                    for token in range(first, last, TILE_ROWS):
                        top = min(token, num_tokens - TILE_ROWS)
                        line = s * halves.shape[1] + TILE_ROWS + top - first
                        tile_product(
                            query_base + np.uint64(4 * (top * query.shape[1] + codebook * width)),
                            query.shape[1],
                            keys_base + np.uint64(4 * (codebook * width * padded + column)),
                            padded,
                            width,
                            halves_base + np.uint64(4 * (line * padded + column)),
                            padded,
                        )
            for n in range(first, last):
                left, right = halves[0, TILE_ROWS + n - first], halves[1, TILE_ROWS + n - first]
                to_scores, to_rows = scores[n, head], rows[n, head]
                _pick_pairs(left[:m], right[:m], staircase, corners, to_scores, to_rows, space)


@kernel
def _space(scores, m, k, num_pairs):  # type: ignore[no-untyped-def]
    """What picking writes to on its way."""
    room = max(m, num_pairs) + _BLOCK
    return (
        np.empty(room, scores.dtype),  # candidates
        np.empty(room, scores.dtype),  # sums
        np.empty(room, scores.dtype),  # best of the first half
        np.empty(room, scores.dtype),  # and of the second
        np.empty(room, np.int32),  # where candidates come from
        np.empty(room, np.int32),  # candidates in order
        np.empty(room, np.int32),  # half-keys of the first half
        np.empty(room, np.int32),  # and of the second
        np.empty(room, np.int32),  # ranks
    )


@kernel
def _pick_pairs(left, right, staircase, corners, scores, rows, space):  # type: ignore[no-untyped-def]
    """Both stages for one query: its scores over both codebooks (m,), to scores and rows (k,)."""
    k, m, num_pairs = len(rows), len(left), staircase.shape[1]
    candidates, sums, first, second, numbers, order, first_halves, second_halves, ranks = space
    count = _threshold_candidates(left, k, candidates, numbers)
    _best_in_order(candidates, count, k, ranks, order, first)
    for i in range(k):
        first_halves[i] = numbers[order[i]]
    count = _threshold_candidates(right, k, candidates, numbers)
    _best_in_order(candidates, count, k, ranks, order, second)
    for i in range(k):
        second_halves[i] = numbers[order[i]]
    # A corner (i, j) of the staircase is beaten or matched by the (i + 1)(j + 1) pairs above
    # and left of it, k or more, so it bounds the k-th best from below.
    bound = scores.dtype.type(-np.inf)
    for i in range(k):
        bound = max(bound, first[i] + second[corners[i]])
    for p in range(num_pairs):
        sums[p] = first[staircase[0, p]] + second[staircase[1, p]]
    count = _keep(sums, num_pairs, bound, candidates, numbers)
    _best_in_order(candidates, count, k, ranks, order, scores)
    for i in range(k):
        p = numbers[order[i]]
        rows[i] = np.int64(first_halves[staircase[0, p]]) * m + second_halves[staircase[1, p]]


@kernel
def _threshold_candidates(scores, k, candidates, numbers):  # type: ignore[no-untyped-def]
    """Copy k or a few more scores, the k best among them, and their positions; return how many."""
    m, num_groups = scores.shape[0], (2 * k + _BLOCK - 1) // _BLOCK * _BLOCK
    infinite = scores.dtype.type(np.inf)
    if m < 2 * num_groups or _num_not_below(scores, m, infinite) > 0:  # of NaN too
        for j in range(m):
            candidates[j] = scores[j] if scores[j] == scores[j] else infinite
            numbers[j] = j
        return m

    for j in range(num_groups):  # `candidates` holds the largest of each group for now
        candidates[j] = scores[j]
    for group_start in range(num_groups, m - num_groups + 1, num_groups):
        block = scores[group_start : group_start + num_groups]
        for j in range(num_groups):
            candidates[j] = block[j] if block[j] > candidates[j] else candidates[j]
    low = high = candidates[0]
    for j in range(1, num_groups):
        low, high = min(low, candidates[j]), max(high, candidates[j])
    for _ in range(_HALVINGS):
        candidates[num_groups] = low / 2 + high / 2  # through memory: numba would go on in fp64
        middle = candidates[num_groups]
        count = _num_not_below(candidates, num_groups, middle)
        low, high = (middle, high) if count >= k else (low, middle)
        if count == k:
            break
    return _keep(scores, m, low, candidates, numbers)


@kernel
def _num_not_below(scores, num_scores, bound):  # type: ignore[no-untyped-def]
    """How many scores reach a bound, or are NaN."""
    address, whole = np.uint64(scores.ctypes.data), num_scores // _BLOCK * _BLOCK
    count = 0
    for j in range(0, whole, _BLOCK):
        count += num_ones(not_below_16(address + np.uint64(j * scores.itemsize), bound))
    for j in range(whole, num_scores):
        count += not scores[j] < bound
    return count


@kernel
def _keep(scores, num_scores, bound, candidates, numbers):  # type: ignore[no-untyped-def]
    """Copy scores that reach a bound, NaN as infinite, and their positions; return how many.

    Sixty-four scores are compared before any is copied: where a loop over bits ends cannot be
    guessed, and each wrong guess costs as much as five copies.
    """
    address, whole = np.uint64(scores.ctypes.data), num_scores // _BLOCK * _BLOCK
    count = 0
    for first in range(0, whole, 64):
        found = np.uint64(0)
        for j in range(first, min(first + 64, whole), _BLOCK):
            bits = not_below_16(address + np.uint64(j * scores.itemsize), bound)
            found |= bits << np.uint64(j - first)
        while found != 0:
            number = first + lowest_one(found)
            score = scores[number]
            candidates[count], numbers[count] = score if score == score else np.inf, number
            count += 1
            found &= found - np.uint64(1)
    for j in range(whole, num_scores):
        candidates[count] = scores[j] if scores[j] == scores[j] else np.inf
        numbers[count] = j
        count += not scores[j] < bound
    return count


@kernel
def _best_in_order(candidates, count, k, ranks, order, best):  # type: ignore[no-untyped-def]
    """Positions and values of the k best candidates, best first; `order` has room for them all.

    Writes to `order` beyond k; to `candidates` and `ranks` behind `count`, up to a whole block.
    """
    address, ranks_address = np.uint64(candidates.ctypes.data), np.uint64(ranks.ctypes.data)
    for j in range(count, (count + _BLOCK - 1) // _BLOCK * _BLOCK):
        candidates[j] = -np.inf
    for first in range(0, count, _BLOCK):
        rank_16(address, count, first, candidates[0], ranks_address + np.uint64(first * 4))
    for i in range(count):
        order[ranks[i]] = i
    for i in range(k):
        best[i] = candidates[order[i]]


@kernel
def _add_keys(grad_scores, keys, rows, grad_query, start, stop):  # type: ignore[no-untyped-def]
    """grad_query[n, h, s] = sum_k grad_scores[n, h, k] * (half-key s of rows[n, h, k])."""
    _, num_heads, num_picks = rows.shape
    width, whole = keys.shape[3], num_picks // 4 * 4
    picked = np.empty(num_picks, np.uint64)
    for n in range(start, stop):
        for head in range(num_heads):
            grads = grad_scores[n, head]
            for s in range(2):
                _half_of(rows[n, head], s, keys.shape[2], picked)
                codebook, total = keys[head, s], grad_query[n, head, s]
                total[:] = 0
                for i in range(0, whole, 4):  # the total is read and written once for four
                    a, b = codebook[picked[i]], codebook[picked[i + 1]]
                    c, d = codebook[picked[i + 2]], codebook[picked[i + 3]]
                    ga, gb, gc, gd = grads[i], grads[i + 1], grads[i + 2], grads[i + 3]
                    for j in range(width):
                        total[j] += (ga * a[j] + gb * b[j]) + (gc * c[j] + gd * d[j])
                for i in range(whole, num_picks):
                    half_key, grad = codebook[picked[i]], grads[i]
                    for j in range(width):
                        total[j] += grad * half_key[j]


@kernel
def _add_queries(grad_scores, query, rows, grad_keys, start, stop):  # type: ignore[no-untyped-def]
    """grad_keys[h * 2 + s, half-key] = sum of grad_scores * query over the picks of that half-key.

    Tokens are summed in parts: one running fp32 sum of very many terms would drift.
    """
    num_tokens, _, num_picks = rows.shape
    m, width = grad_keys.shape[1], grad_keys.shape[2]
    part = np.empty((m, width), grad_keys.dtype)
    picked = np.empty(num_picks, np.uint64)
    for codebook in range(start, stop):
        head, half, total = codebook // 2, codebook % 2, grad_keys[codebook]
        total[:] = 0
        for first in range(0, num_tokens, _TOKENS_A_PART):
            part[:] = 0
            for n in range(first, min(first + _TOKENS_A_PART, num_tokens)):
                vector = query[n, head, half]
                _half_of(rows[n, head], half, m, picked)
                for i in range(num_picks):
                    grad, to = grad_scores[n, head, i], part[picked[i]]
                    for j in range(width):
                        to[j] += grad * vector[j]
            for key in range(m):
                for j in range(width):
                    total[key, j] += part[key, j]


@kernel
def _half_of(rows, half, m, picked):  # type: ignore[no-untyped-def]
    """The first (0) or second (1) half-keys of rows; all at once, as a division takes long."""
    for i in range(len(rows)):
        row = np.uint64(rows[i])
        picked[i] = row // np.uint64(m) if half == 0 else row % np.uint64(m)
