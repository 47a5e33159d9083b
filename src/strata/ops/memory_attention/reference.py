"""Attention over memory and context with all scores at once."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_attention(
    query_bhtd: Tensor,
    key_bkld: Tensor,
    value_bkld: Tensor,
    memory_key_bckmd: Tensor,
    memory_value_bckmd: Tensor,
    held_bcknm: Tensor | None,
    mask: Tensor | None,
    chunk_tokens: int,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """See `strata.ops.memory_attention`."""
    b, h, t, _ = query_bhtd.shape
    groups = h // key_bkld.shape[1]
    token_t = torch.arange(t, device=query_bhtd.device)
    chunk_t = token_t // chunk_tokens

    def by_head(states_bk: Tensor) -> Tensor:
        return states_bk.repeat_interleave(groups, 1)

    key_bhtmd = by_head(memory_key_bckmd[:, chunk_t].transpose(1, 2))
    value_bhtmd = by_head(memory_value_bckmd[:, chunk_t].transpose(1, 2))
    memory_bhtm = capped((key_bhtmd @ query_bhtd[..., None])[..., 0] * scaling, softcap)
    context_bhtl = capped(query_bhtd @ by_head(key_bkld).mT * scaling, softcap)

    least = torch.finfo(query_bhtd.dtype).min
    if held_bcknm is not None:
        held_btkm = every_token(held_bcknm, b, t, chunk_tokens)
        held_bhtm = held_btkm.transpose(1, 2)
        held_bhtm = by_head(held_bhtm) if held_bhtm.shape[1] > 1 else held_bhtm
        memory_bhtm = memory_bhtm.masked_fill(~held_bhtm, least)
    if mask is None:
        mask = (token_t[:, None] >= token_t)[None, None]
    if mask.dtype == torch.bool:
        context_bhtl = context_bhtl.masked_fill(~mask, least)
    else:
        context_bhtl = context_bhtl + mask

    scores = torch.cat([memory_bhtm, context_bhtl], -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(query_bhtd.dtype)
    m = memory_bhtm.shape[-1]
    read_bhtd = (weights[..., None, :m] @ value_bhtmd)[..., 0, :]
    return read_bhtd + weights[..., m:] @ by_head(value_bkld)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores bounded by tanh."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def every_token(held_bcknm: Tensor, b: int, t: int, chunk_tokens: int) -> Tensor:
    """What each token holds, (b, t, k or 1, m or 1), of what is given by chunk."""
    _, _, k, _, m = held_bcknm.shape
    chunks = -(-t // chunk_tokens)
    held_bcnkm = held_bcknm.expand(b, chunks, k, chunk_tokens, m).transpose(2, 3)
    return held_bcnkm.flatten(1, 2)[:, :t]
