"""What one attention layer reads before its context, and the attention over both.

Keys and values of the context are never copied beside the memory's. Either the scores of both parts
share one softmax and each part's weights meet its own values (`attend`: for single tokens, and
where gradients are wanted), or torch's fused attention answers for the context and the two are
merged by their log-sum-exps (`attend_context`, `attend_memory`, `merge`: for prompts).

Shapes: b rows, h query heads, k KV heads, g query heads of one KV head, n queries, c context
tokens, p places of memory (the marker's first), d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LayerMemory:
    """The marker and the memories of one piece of text, at their positions, for one layer.

    Attributes:
        keys_bkpd: with rotary, in the decoder's dtype.
        values_bkpd: the same.
        bias_bkp: added to scores: 0, or the dtype's least number in places that hold nothing;
            None where every place holds something.
        marker: how many of the first places are the marker.
        window: of a sliding layer, which drops the marker once it is this far away.
        marker_at_bm: positions of the marker, for that.
    """

    keys_bkpd: Tensor
    values_bkpd: Tensor
    bias_bkp: Tensor | None
    marker: int
    window: int | None = None
    marker_at_bm: Tensor | None = None

    def rows(self, start: int, stop: int) -> LayerMemory:
        """The same for some of the rows, without a copy."""
        part = slice(start, stop)
        return replace(
            self,
            keys_bkpd=self.keys_bkpd[part],
            values_bkpd=self.values_bkpd[part],
            bias_bkp=None if self.bias_bkp is None else self.bias_bkp[part],
            marker_at_bm=None if self.marker_at_bm is None else self.marker_at_bm[part],
        )

    def select(self, rows: Tensor) -> LayerMemory:
        """The same for other rows, by index."""
        return replace(
            self,
            keys_bkpd=self.keys_bkpd[rows],
            values_bkpd=self.values_bkpd[rows],
            bias_bkp=None if self.bias_bkp is None else self.bias_bkp[rows],
            marker_at_bm=None if self.marker_at_bm is None else self.marker_at_bm[rows],
        )


@dataclass(frozen=True)
class Weighing:
    """What happens to scores: the host's part, and the preset's."""

    scaling: float
    softcap: float | None = None
    dropout: float = 0.0
    temperature: float = 1.0
    scale: float = 1.0


def attend(
    memory: LayerMemory,
    query_bhnd: Tensor,
    key_bkcd: Tensor,
    value_bkcd: Tensor,
    mask: Tensor | None,
    weighing: Weighing,
    *,
    first: int = 0,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Attention of some queries over their memory and their context.

    Args:
        memory: for these queries.
        query_bhnd: queries, with rotary.
        key_bkcd, value_bkcd: context, with rotary; may reach beyond what the queries may see.
        mask: (b, 1 or h, n, c), bool (True: seen) or added to scores; None for causal, or for all
            of the context where n is 1.
        weighing: scaling and the like.
        first: with mask None, how many context tokens come before the first query's own.
        position_ids: (1 or b, n), needed in sliding layers only.

    Returns:
        (b, n, h, d).

    Source: "Memory3" (arXiv 2407.01178), section 3.2; temperature and scale from APE
    (arXiv 2502.05431), section 4.
    """
    b, h, n, d = query_bhnd.shape
    k = key_bkcd.shape[1]
    g = h // k
    context = _scores(query_bhnd, key_bkcd, weighing)
    c = key_bkcd.shape[2]
    if mask is None and n > 1:
        mask = torch.ones(n, c, dtype=torch.bool, device=query_bhnd.device).tril(first)[None, None]
    if mask is not None:
        mask = mask[..., :c]
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (k, g))
        least = torch.finfo(context.dtype).min
        seen = mask.dtype == torch.bool
        context = context.masked_fill(~mask, least) if seen else context + mask
    held = _memory_scores(memory, query_bhnd, weighing, position_ids)
    scores = torch.cat([held, context.to(held.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query_bhnd.dtype)
    if weighing.dropout:
        weights = F.dropout(weights, p=weighing.dropout)
    weights = weights.view(b, k, g * n, -1)
    p = memory.keys_bkpd.shape[2]
    out = torch.matmul(weights[..., :p], memory.values_bkpd)
    out = out + torch.matmul(weights[..., p:], value_bkcd)
    return out.view(b, h, n, d).transpose(1, 2)


def attend_context(
    query_bhnd: Tensor,
    key_bkcd: Tensor,
    value_bkcd: Tensor,
    mask: Tensor | None,
    weighing: Weighing,
) -> tuple[Tensor, Tensor] | None:
    """Attention over the context alone, by torch's fused kernels, and its log-sum-exp.

    Returns:
        (b, h, n, d) and fp32 (b, h, n); None where there is no such kernel: with softcap, dropout
        or gradients, and on other devices than the CPU.
    """
    if not _is_fused(weighing, query_bhnd, key_bkcd, value_bkcd):
        return None
    h, n = query_bhnd.shape[1:3]
    if mask is None:  # causal: the first query's own key is the first
        key_bkcd, value_bkcd = key_bkcd[:, :, :n], value_bkcd[:, :, :n]
    groups = h // key_bkcd.shape[1]
    key = key_bkcd.repeat_interleave(groups, 1) if groups > 1 else key_bkcd
    value = value_bkcd.repeat_interleave(groups, 1) if groups > 1 else value_bkcd
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        if mask.dtype == torch.bool:
            least = torch.finfo(query_bhnd.dtype).min
            mask = torch.zeros_like(mask, dtype=query_bhnd.dtype).masked_fill(~mask, least)
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query_bhnd, key, value, 0.0, mask is None, attn_mask=mask, scale=weighing.scaling
    )
    return out, total


def attend_memory(
    memory: LayerMemory, query_bhnd: Tensor, weighing: Weighing, position_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention over marker and memories alone, and its log-sum-exp.

    Returns:
        (b, h, n, d) and fp32 (b, h, n).
    """
    b, h, n, d = query_bhnd.shape
    keys, values, bias = memory.keys_bkpd, memory.values_bkpd, memory.bias_bkp
    as_they_are = weighing.temperature == weighing.scale == 1.0 and memory.window is None
    if as_they_are and _is_fused(weighing, query_bhnd, keys, values):
        query = query_bhnd.reshape(b, keys.shape[1], -1, d)
        if bias is not None:
            bias = bias[:, :, None].to(query.dtype).expand(-1, -1, query.shape[2], -1)
        out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, False, attn_mask=bias, scale=weighing.scaling
        )
        return out.reshape(b, h, n, d), total.reshape(b, h, n)
    scores = _memory_scores(memory, query_bhnd, weighing, position_ids).float()
    total = torch.logsumexp(scores, dim=-1)
    weights = (scores - total[..., None]).exp().to(query_bhnd.dtype)
    out = torch.matmul(weights.flatten(2, 3), memory.values_bkpd)
    return out.view(b, h, n, d), total.view(b, h, n)


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Two attentions as one over both, by their log-sum-exps.

    Args:
        one, other: (b, h, n, d) and fp32 (b, h, n).

    Returns:
        (b, n, h, d), in the dtype of `one`.
    """
    share = torch.sigmoid(one[1] - other[1])[..., None]
    out = torch.lerp(other[0].float(), one[0].float(), share)
    return out.to(one[0].dtype).transpose(1, 2)


def _is_fused(weighing: Weighing, *inputs: Tensor) -> bool:
    """Whether torch has a kernel that also gives the log-sum-exp."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return False
    on_cpu = inputs[0].device.type == "cpu"
    return on_cpu and weighing.softcap is None and not weighing.dropout


def _scores(query_bhnd: Tensor, keys_bkpd: Tensor, weighing: Weighing) -> Tensor:
    """(b, k, g, n, p)."""
    b, h, n, d = query_bhnd.shape
    k, p = keys_bkpd.shape[1:3]
    query = query_bhnd.reshape(b, k, h // k * n, d)
    scores = torch.matmul(query, keys_bkpd.transpose(2, 3)) * weighing.scaling
    if weighing.softcap is not None:
        scores = torch.tanh(scores / weighing.softcap) * weighing.softcap
    return scores.view(b, k, h // k, n, p)


def _memory_scores(
    memory: LayerMemory, query_bhnd: Tensor, weighing: Weighing, position_ids: Tensor | None
) -> Tensor:
    held = _scores(query_bhnd, memory.keys_bkpd, weighing)
    if weighing.temperature != 1.0 or weighing.scale != 1.0:
        held = _reweighed(held, memory, weighing)
    elif memory.bias_bkp is not None:
        held = held + memory.bias_bkp[:, :, None, None]
    if memory.window is not None:
        assert memory.marker_at_bm is not None and position_ids is not None
        away = position_ids[:, :, None] - memory.marker_at_bm[:, None, :]
        gone = F.pad(away >= memory.window, (0, held.shape[-1] - memory.marker))
        held = held.masked_fill(gone[:, None, None], torch.finfo(held.dtype).min)
    return held


def _reweighed(held: Tensor, memory: LayerMemory, weighing: Weighing) -> Tensor:
    """Scores of the marker as they are, those of the memories with temperature and scale."""
    m = memory.marker
    marker, memories = held[..., :m].float(), held[..., m:].float() / weighing.temperature
    if memories.shape[-1] == 0:
        return marker
    if memory.bias_bkp is not None:  # of fp32, whatever the scores were: it must outlast `scale`
        empty = memory.bias_bkp[:, :, None, None, m:] < 0
        memories = memories.masked_fill(empty, torch.finfo(torch.float32).min)
    together = torch.logsumexp(memories, dim=-1, keepdim=True)
    return torch.cat([marker, memories + (weighing.scale - 1) * together], dim=-1)
