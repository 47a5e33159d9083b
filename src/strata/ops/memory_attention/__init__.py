"""Attention of a text over its causal context and, beside it, what each chunk of it reads.

One softmax over both. `reference` builds all scores and is the truth; `fused` takes torch's fused
attention for the context, small products for the rest, and merges the two by their log-sum-exps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from strata.ops.memory_attention import fused, reference

__all__ = ["memory_attention"]


def memory_attention(
    query_bhtd: Tensor,
    key_bkld: Tensor,
    value_bkld: Tensor,
    memory_key_bckmd: Tensor,
    memory_value_bckmd: Tensor,
    *,
    chunk_tokens: int,
    held_bcknm: Tensor | None = None,
    mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax over [memory of the query's chunk ; context], in each head.

    The text is cut into c = ceil(t / chunk_tokens) chunks from its first token on; the last may be
    short. Where no place holds anything for a query, its answer is that of attention over the
    context, bit for bit. Under autocast everything is computed in autocast's dtype.

    Args:
        query_bhtd: queries of b rows, h heads, t tokens; float of any width.
        key_bkld, value_bkld: context; k divides h, and KV head i serves query heads
            [i * h / k, (i + 1) * h / k). Only the first t of l count where `mask` is None.
        memory_key_bckmd, memory_value_bckmd: m places of each chunk; b and c may be 1 for what is
            shared. With m = 0 this is plain attention.
        chunk_tokens: tokens of a chunk, at least 1.
        held_bcknm: bool, each dimension 1 or of size (b, c, k, chunk_tokens, m): whether a place
            holds something for the queries of a head, token by token of a chunk; None for all.
        mask: (1 or b, 1 or h, t, l), bool (True: seen) or added to scores; None for causal. A query
            that sees no token at all gets something finite, whatever that is.
        scaling: of scores; None for d ** -0.5.
        softcap: bounds all scores by tanh; None for no bound.

    Returns:
        (b, h, t, d), differentiable once in queries, keys and values of both kinds.

    Raises:
        ValueError: shapes that do not fit.

    Source: "Memory3" (arXiv 2407.01178), section 3.2 and 3.5.
    """
    b, h, t, d = query_bhtd.shape
    k, m = key_bkld.shape[1], memory_key_bckmd.shape[3]
    _check(query_bhtd, key_bkld, value_bkld, memory_key_bckmd, memory_value_bckmd, chunk_tokens)
    scaling = d**-0.5 if scaling is None else scaling
    if mask is None:  # causal: the first query's own key is the first
        key_bkld, value_bkld = key_bkld[:, :, :t], value_bkld[:, :, :t]
    every = (b, -(-t // chunk_tokens), k, m, d)
    query, key, value, memory_key, memory_value = _as_autocast(
        query_bhtd,
        key_bkld,
        value_bkld,
        memory_key_bckmd.expand(every),
        memory_value_bckmd.expand(every),
    )
    with torch.autocast(query.device.type, enabled=False):
        if m == 0 and softcap is None:
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=h > k,
            )
        states = (query, key, value, memory_key, memory_value, held_bcknm, mask)
        if softcap is None and fused.serves(query, mask):
            return fused.memory_attention(*states, chunk_tokens, scaling)
        return reference.memory_attention(*states, chunk_tokens, scaling, softcap)


def _as_autocast(*states: Tensor) -> tuple[Tensor, ...]:
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return states
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in states)


def _check(
    query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor, memory_value: Tensor, chunk: int
) -> None:
    b, h, t, d = query.shape
    k = key.shape[1]
    if key.shape != value.shape or key.shape[0] != b or key.shape[3] != d or h % k:
        raise ValueError(
            f"context keys {tuple(key.shape)} and values {tuple(value.shape)} do not fit queries "
            f"{tuple(query.shape)}"
        )
    if chunk < 1:
        raise ValueError(f"chunk_tokens must be at least 1, given {chunk}")
    rows, chunks, *rest = memory_key.shape
    fits = rows in (1, b) and chunks in (1, -(-t // chunk)) and (rest[0], rest[2]) == (k, d)
    if memory_key.shape != memory_value.shape or not fits:
        raise ValueError(
            f"memory keys {tuple(memory_key.shape)} and values {tuple(memory_value.shape)} are not "
            f"(1 or {b}, 1 or {-(-t // chunk)}, {k}, m, {d})"
        )
