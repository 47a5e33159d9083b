"""Product-key top-k: the best rows of a table of m * m rows, found from two lists of m scores.

One torch custom operator (namespace `strata`). Its backward needs no scores: the gradient to a
half query is a weighted bag over the half-keys that it picked, and the gradient to the half-keys
is that bag's gradient to its table.

Shapes: n tokens, h heads, s = 2 halves, m half-keys per codebook, d width of a half-key, k picks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from strata.ops.dispatch import implementation, unwatched
from strata.ops.precision import accumulation_dtype
from strata.ops.product_key_topk import cpu
from strata.ops.product_key_topk.reference import (
    num_staircase_pairs,
    pick_pairs,
    score_halves,
)

__all__ = [
    "num_staircase_pairs",
    "pick_pairs",
    "pick_rows",
    "product_key_topk",
    "score_halves",
]

Shape = tuple[int, ...]

# Half scores held at once. On a CPU they are picked from while they are in the cache; elsewhere
# large products count, and only memory is saved (32,768 tokens of four heads and 1,024 half-keys
# would score 1 GB).
_SCORE_BYTES = 1 << 22
_DEVICE_SCORE_BYTES = 1 << 28


def product_key_topk(query_nhsd: Tensor, keys_hsmd: Tensor, *, top_k: int) -> tuple[Tensor, Tensor]:
    """Find the `top_k` rows of a product-key table that score highest for each query.

    Row `i * m + j` has the key (first half-key i, second half-key j), so its score is the sum of
    two half scores, and only m + m of the m * m scores are ever computed. Scoring and picking run
    in fp32 (fp64 for fp64 inputs), also under autocast: in bf16 near-ties collapse, and a top-32
    was seen to hold 27 distinct values.

    Args:
        query_nhsd: queries, (n, h, 2, d), any float dtype.
        keys_hsmd: half-key codebooks, (h, 2, m, d), any float dtype.
        top_k: picks per head, 1..m.

    Returns:
        scores_nhk: (n, h, k), fp32, descending, differentiable in queries and keys.
        rows_nhk: (n, h, k), int64 in 0..m*m-1, distinct within a head.

    Raises:
        ValueError: shapes do not fit, or top_k is not in 1..m.

    Source: "Large Memory Layers with Product Keys" (arXiv 1907.05242), section 3.1.
    """
    _check(query_nhsd, keys_hsmd, top_k)
    wide = accumulation_dtype(query_nhsd)
    query_nhsd, keys_hsmd = query_nhsd.to(wide), keys_hsmd.to(wide)
    if unwatched(query_nhsd, keys_hsmd):
        return _score_and_pick(query_nhsd, keys_hsmd, top_k)
    scores_nhk, rows_nhk = _topk(query_nhsd, keys_hsmd, top_k)
    return scores_nhk, rows_nhk


def pick_rows(half_scores_nhsm: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Both stages of picking, from half scores; see `reference.pick_rows`."""
    return implementation("product_key_topk", half_scores_nhsm).pick_rows(half_scores_nhsm, top_k)


def _score_and_pick(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    if query.device.type == "cpu" and cpu.can_score(query, keys):
        return cpu.score_and_pick(query, keys, top_k)
    n, h, _, _ = query.shape
    m = keys.shape[2]
    held_bytes = _SCORE_BYTES if query.device.type == "cpu" else _DEVICE_SCORE_BYTES
    step = max(1, held_bytes // (h * 2 * m * query.element_size()))
    if n <= step:
        return pick_rows(score_halves(query, keys), top_k)
    scores = query.new_empty(n, h, top_k)
    rows = torch.empty(n, h, top_k, dtype=torch.int64, device=query.device)
    for start in range(0, n, step):
        part = slice(start, start + step)
        scores[part], rows[part] = pick_rows(score_halves(query[part], keys), top_k)
    return scores, rows


_topk = torch.library.custom_op("strata::product_key_topk", _score_and_pick, mutates_args=())


@_topk.register_fake
def _(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:2], top_k)
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("strata::product_key_topk_backward", mutates_args=())
def _topk_backward(
    grad_scores: Tensor, query: Tensor, keys: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    backend = implementation("product_key_topk", query)
    grad_query, grad_keys = backend.half_key_gradients(grad_scores, query, keys, rows)
    return grad_query, grad_keys


@_topk_backward.register_fake
def _(grad_scores: Tensor, query: Tensor, keys: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(query, memory_format=contiguous),
        torch.empty_like(keys, memory_format=contiguous),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, keys, _ = inputs
    _, rows = output
    ctx.save_for_backward(query, keys, rows)
    ctx.mark_non_differentiable(rows)


def _gradients(ctx: Any, grad_scores: Tensor, _grad_rows: Any) -> tuple[Tensor | None, ...]:
    query, keys, rows = ctx.saved_tensors
    return (*_topk_backward(grad_scores, query, keys, rows), None)


_topk.register_autograd(_gradients, setup_context=_save)


def _check(query_nhsd: Tensor, keys_hsmd: Tensor, top_k: int) -> None:
    if query_nhsd.ndim != 4 or keys_hsmd.ndim != 4:
        raise ValueError(
            f"queries of shape (n, h, 2, d) and keys of shape (h, 2, m, d) are needed, "
            f"given {tuple(query_nhsd.shape)} and {tuple(keys_hsmd.shape)}"
        )
    _, h, s, d = query_nhsd.shape
    if keys_hsmd.shape[:2] != (h, s) or keys_hsmd.shape[3] != d or s != 2:
        raise ValueError(
            f"heads, halves or widths differ: queries {tuple(query_nhsd.shape)}, "
            f"keys {tuple(keys_hsmd.shape)}"
        )
    if not 1 <= top_k <= keys_hsmd.shape[2]:
        raise ValueError(
            f"top_k {top_k} is not in 1..{keys_hsmd.shape[2]} (the half-keys per codebook)"
        )


# torch's FLOP counter cannot see into an operator. Comparisons count nothing.
@register_flop_formula(torch.ops.strata.product_key_topk)
def _topk_flops(query: Shape, keys: Shape, *_: Any, **__: Any) -> int:
    n, h, s, d = query
    return 2 * n * h * s * keys[2] * d


@register_flop_formula(torch.ops.strata.product_key_topk_backward)
def _topk_backward_flops(_scores: Shape, query: Shape, _keys: Shape, rows: Shape, **_: Any) -> int:
    n, h, s, d = query
    return 2 * 2 * n * h * s * rows[2] * d
