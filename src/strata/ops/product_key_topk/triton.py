"""Product-key picks on a GPU, in Triton: one program per query and head does both stages.

A score and its position are packed into one 64-bit integer that sorts like the score, ties to the
lower position; then both stages are the same bitonic top-k over integers. Of the k * k sums of
stage 2 those outside the staircase are masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from strata.ops.product_key_topk import reference
from strata.ops.product_key_topk.reference import half_key_gradients

__all__ = ["half_key_gradients", "pick_rows"]

_MOST_PICKS = 64  # beyond it the square of sums no longer fits a program


def pick_rows(half_scores_nhsm: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See `reference.pick_rows`. Ties go to the lower half-key; NaN sorts above infinity."""
    if half_scores_nhsm.dtype != torch.float32 or top_k > _MOST_PICKS:
        return reference.pick_rows(half_scores_nhsm, top_k)
    n, h, _, m = half_scores_nhsm.shape
    scores_nhk = half_scores_nhsm.new_empty(n, h, top_k)
    rows_nhk = torch.empty(n, h, top_k, dtype=torch.int64, device=half_scores_nhsm.device)
    if scores_nhk.numel():
        room = max(2, triton.next_power_of_2(top_k))  # topk of one would be no tensor
        _pick[(n * h,)](
            half_scores_nhsm.contiguous(),
            scores_nhk,
            rows_nhk,
            m,
            top_k,
            KEYS=max(triton.next_power_of_2(m), 2 * room),
            ROOM=room,
        )
    return scores_nhk, rows_nhk


@triton.jit
def _pick(  # type: ignore[no-untyped-def]
    half_scores, scores, rows, num_keys, top_k, KEYS: tl.constexpr, ROOM: tl.constexpr
):
    query = tl.program_id(0).to(tl.int64)
    keys = tl.arange(0, KEYS)
    first = half_scores + query * 2 * num_keys
    left = _best(first, keys, num_keys, KEYS, ROOM)
    right = _best(first + num_keys, keys, num_keys, KEYS, ROOM)

    places = tl.arange(0, ROOM)
    stairs = (places[:, None] + 1) * (places[None, :] + 1) <= top_k
    sums = _score(left)[:, None] + _score(right)[None, :]
    sums = tl.where(stairs, sums, float("-inf"))
    pairs = places[:, None] * ROOM + places[None, :]
    # Masked pairs sort behind all others, also where a real sum is -inf.
    pairs = tl.where(stairs, pairs, pairs + ROOM * ROOM)
    packed = tl.reshape(_pack(sums, pairs), (ROOM * ROOM,))
    winners = tl.topk(packed, ROOM)
    pair = _position(winners) % (ROOM * ROOM)
    first_keys = tl.gather(_position(left), pair // ROOM, 0)
    second_keys = tl.gather(_position(right), pair % ROOM, 0)
    live = places < top_k
    tl.store(scores + query * top_k + places, _score(winners), mask=live)
    row = first_keys.to(tl.int64) * num_keys + second_keys
    tl.store(rows + query * top_k + places, row, mask=live)


@triton.jit
def _best(  # type: ignore[no-untyped-def]
    scores, keys, num_keys, KEYS: tl.constexpr, ROOM: tl.constexpr
):
    """The ROOM best of a half's scores, packed, best first."""
    score = tl.load(scores + keys, mask=keys < num_keys, other=float("-inf"))
    return tl.topk(_pack(score, keys), ROOM)


@triton.jit
def _pack(score, position):  # type: ignore[no-untyped-def]
    """fp32 and a position < 2^31 in one int64 that sorts by score, then by lower position."""
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - position).to(tl.int64)


@triton.jit
def _score(packed):  # type: ignore[no-untyped-def]
    ordered = (packed >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _position(packed):  # type: ignore[no-untyped-def]
    return (0x7FFFFFFF - (packed & 0x7FFFFFFF)).to(tl.int32)
