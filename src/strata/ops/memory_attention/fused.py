"""Attention over memory and context in two parts, merged by their log-sum-exps.

Forward: torch's fused attention answers for the context and gives the log-sum-exp of its scores;
for each chunk a small product gives the scores of its memory. With the log-sum-exp of both, each
part's weights are what they are in the joint softmax, and the two answers add up.

Backward: the gradient of a softmax to a score s with weight p = exp(s - total) is
p * (grad . value - grad . out). A fused backward kernel computes p from the total it is given and
grad . out from the output it is given. Given the total and the output *of both parts*, what it
returns are the gradients of the joint softmax to this part, exactly; ring attention rests on the
same. So no weights are kept, and nothing of size t x l ever exists but a mask that was given.

Private operators of torch are called by name: those of `scaled_dot_product_attention`, whose
public form gives no log-sum-exp that could be changed before its backward. Where one is missing,
`serves` says no. Those of a GPU have only been checked on shapes here; the tests marked `gpu` say
whether they are right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# (query, key, value, bias, scaling) -> out (b, h, t, d), total (b, h, t), and what backward needs
Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor, list[Any]]]
# (grad, query, key, value, bias, out, total, what forward gave, scaling) -> grads
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class _Kernel:
    """A fused attention: without a bias it is causal, with as many keys as queries."""

    name: str
    forward: Forward
    backward: Backward


def serves(query_bhtd: Tensor, mask: Tensor | None) -> bool:
    """Whether there is a kernel for these."""
    return _kernel(query_bhtd, masked=mask is not None) is not None


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
) -> Tensor:
    """See `strata.ops.memory_attention`; memory of all rows and chunks."""
    out: Tensor = _Merged.apply(
        query_bhtd,
        key_bkld,
        value_bkld,
        memory_key_bckmd,
        memory_value_bckmd,
        _held_by_query(held_bcknm, query_bhtd.shape[1] // key_bkld.shape[1], chunk_tokens),
        _as_bias(mask, query_bhtd),
        chunk_tokens,
        scaling,
    )
    return out


class _Merged(torch.autograd.Function):
    """Saves what flash attention saves, and the memory."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        memory_key: Tensor,
        memory_value: Tensor,
        held_bckqm: Tensor | None,
        bias: Tensor | None,
        chunk_tokens: int,
        scaling: float,
    ) -> Tensor:
        kernel = _kernel(query, masked=bias is not None)
        assert kernel is not None
        context_bhtd, context_bht, rest = kernel.forward(query, key, value, bias, scaling)
        cut = _Cut(query.shape, key.shape[1], chunk_tokens)
        scores = _scores(cut.apart(query), memory_key, held_bckqm, scaling)
        # Beside a context a finite total is enough; where nothing is held it is minus infinity.
        memory_bht = cut.together(torch.logsumexp(scores, -1, keepdim=True))[..., 0]
        total_bht = torch.logaddexp(context_bht, memory_bht)
        weights = (scores - cut.apart(total_bht[..., None])).exp_().to(query.dtype)
        share_bht1 = (context_bht - total_bht).exp_()[..., None]
        out = torch.addcmul(
            cut.together(weights @ memory_value).to(share_bht1.dtype), context_bhtd, share_bht1
        ).to(query.dtype)
        ctx.save_for_backward(
            query, key, value, memory_key, memory_value, held_bckqm, bias, out, total_bht, *rest
        )
        ctx.cut, ctx.scaling = cut, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, memory_key, memory_value, held_bckqm, bias, out, total, *rest = (
            ctx.saved_tensors
        )
        cut, scaling = ctx.cut, ctx.scaling
        kernel = _kernel(query, masked=bias is not None)
        assert kernel is not None
        grad = grad.to(query.dtype)
        grad_query, grad_key, grad_value = kernel.backward(
            grad, query, key, value, bias, out, total, rest, scaling
        )
        query_c, grad_c = cut.apart(query), cut.apart(grad)
        scores = _scores(query_c, memory_key, held_bckqm, scaling)
        weights = (scores - cut.apart(total[..., None])).exp_()
        out_grad = (grad.to(weights.dtype) * out).sum(-1, keepdim=True)
        slope = (grad_c @ memory_value.mT).to(weights.dtype) - cut.apart(out_grad)
        slope = slope.mul_(weights).mul_(scaling).to(query.dtype)
        grad_query = grad_query + cut.together(slope @ memory_key)
        return (
            grad_query,
            grad_key,
            grad_value,
            slope.mT @ query_c,
            weights.to(query.dtype).mT @ grad_c,
            *(None,) * 4,
        )


@dataclass(frozen=True)
class _Cut:
    """A text by chunks, the query heads of a KV head side by side, and back."""

    shape: torch.Size
    kv_heads: int
    chunk_tokens: int

    def apart(self, states_bhtx: Tensor) -> Tensor:
        """(b, h, t, x) -> (b, c, k, q, x), q = h / k * chunk_tokens; zeros fill the last chunk."""
        n = self.chunk_tokens
        missing = -self.shape[2] % n
        if missing:
            states_bhtx = F.pad(states_bhtx, (0, 0, 0, missing))
        parted = states_bhtx.unflatten(2, (-1, n)).unflatten(1, (self.kv_heads, -1))
        return parted.permute(0, 3, 1, 2, 4, 5).flatten(3, 4)

    def together(self, states_bckqx: Tensor) -> Tensor:
        """The inverse."""
        parted = states_bckqx.unflatten(3, (-1, self.chunk_tokens))
        return parted.permute(0, 2, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)[:, :, : self.shape[2]]


def _scores(
    query_bckqd: Tensor, key_bckmd: Tensor, held_bckqm: Tensor | None, scaling: float
) -> Tensor:
    """(b, c, k, q, m), at least fp32."""
    scores = query_bckqd @ key_bckmd.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scaling)
    return scores if held_bckqm is None else scores.masked_fill_(~held_bckqm, -torch.inf)


def _held_by_query(held_bcknm: Tensor | None, groups: int, chunk_tokens: int) -> Tensor | None:
    if held_bcknm is None or held_bcknm.shape[3] == 1:
        return held_bcknm
    return held_bcknm.expand(-1, -1, -1, chunk_tokens, -1).repeat(1, 1, 1, groups, 1)


def _as_bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Finite, so that a padded query, which sees nothing, gives no NaN."""
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(query.dtype)
    bias = torch.zeros_like(mask, dtype=query.dtype)
    return bias.masked_fill_(~mask, torch.finfo(query.dtype).min)


def _kernel(query: Tensor, *, masked: bool) -> _Kernel | None:
    kernel = None
    if query.device.type == "cpu":
        kernel = _CPU
    elif query.device.type == "cuda" and query.shape[-1] % 8 == 0:
        half = query.dtype in (torch.bfloat16, torch.float16)
        recent = torch.cuda.get_device_capability(query.device) >= (8, 0)
        if half and recent and not masked and query.shape[-1] <= 256:
            kernel = _FLASH
        elif half or query.dtype == torch.float32:
            kernel = _EFFICIENT
    return kernel if kernel is not None and hasattr(torch.ops.aten, kernel.name) else None


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor, list[Any]]:
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, bias is None, attn_mask=bias, scale=scaling
    )
    return out, total, []


def _cpu_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    total: Tensor,
    rest: list[Any],
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, total, 0.0, bias is None, attn_mask=bias, scale=scaling
    )
    return grads


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor, list[Any]]:
    out, total, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, True, scale=scaling
    )
    return out, total, [seed, offset]


def _flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    total: Tensor,
    rest: list[Any],
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    t = query.shape[2]
    grads: tuple[Tensor, Tensor, Tensor]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, total, None, None, t, t, 0.0, True, *rest, scale=scaling
    )
    return grads


def _efficient_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor, list[Any]]:
    groups = query.shape[1] // key.shape[1]
    out, total, seed, offset = torch.ops.aten._scaled_dot_product_efficient_attention(
        query,
        key.repeat_interleave(groups, 1),
        value.repeat_interleave(groups, 1),
        _aligned(bias, query, key),
        True,
        0.0,
        bias is None,
        scale=scaling,
    )
    return out, total.narrow(2, 0, query.shape[2]), [seed, offset]


def _efficient_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    total: Tensor,
    rest: list[Any],
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    k = key.shape[1]
    groups = query.shape[1] // k
    missing = -query.shape[2] % 32  # its totals come in blocks of 32, the last filled up like this
    grad_query, grad_key, grad_value, _ = (
        torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad,
            query,
            key.repeat_interleave(groups, 1),
            value.repeat_interleave(groups, 1),
            _aligned(bias, query, key),
            out,
            F.pad(total, (0, missing), value=torch.inf),
            *rest,
            0.0,
            [True, True, True, False],
            bias is None,
            scale=scaling,
        )
    )
    return grad_query, *(x.unflatten(1, (k, groups)).sum(2) for x in (grad_key, grad_value))


def _aligned(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The kernel reads rows of a bias that begin at multiples of 16 numbers."""
    if bias is None:
        return None
    width = key.shape[2]
    wide = F.pad(bias, (0, -width % 16)).narrow(-1, 0, width)
    return wide.expand(query.shape[0], query.shape[1], query.shape[2], width)


_CPU = _Kernel("_scaled_dot_product_flash_attention_for_cpu", _cpu_forward, _cpu_backward)
_FLASH = _Kernel("_scaled_dot_product_flash_attention", _flash_forward, _flash_backward)
_EFFICIENT = _Kernel(
    "_scaled_dot_product_efficient_attention", _efficient_forward, _efficient_backward
)
