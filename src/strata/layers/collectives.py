"""What the processes of a group tell each other within a layer, with gradients.

Each holds n tokens of its own and v / g columns of every row. Three exchanges, each the other's or
its own gradient: `gather` brings all tokens' picks to every process, `to_columns` and `to_tokens`
turn whole vectors of some tokens into some columns of all tokens and back, `scatter_sum` adds up
what the columns gave. All processes of a group have equally many tokens and call in the same order.

Processes that read the same tokens have four others, each the gradient of another: `enter` and
`leave` around what is split among them, `my_tokens` and `all_tokens` around what each does for a
part of every sequence.

Shapes: g processes, n tokens of each, p picks of a token, c = v / g columns of each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup
# torch 2.13 gave them other names, and warns of the old ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather(part: Tensor, group: Group) -> Tensor:
    """(n, ...) of each -> (g * n, ...) in the order of ranks; the gradient is summed back."""
    return _Gather.apply(part, group)


def scatter_sum(part: Tensor, group: Group) -> Tensor:
    """(g * n, ...) of each, summed over the group -> the (n, ...) of this process."""
    return _ScatterSum.apply(part, group)


def to_tokens(columns: Tensor, group: Group) -> Tensor:
    """(g * n, c): my columns of all tokens -> (n, g * c): all columns of my tokens."""
    return _ToTokens.apply(columns, group)


def to_columns(tokens: Tensor, group: Group) -> Tensor:
    """(n, g * c): all columns of my tokens -> (g * n, c): my columns of all tokens."""
    return _ToColumns.apply(tokens, group)


def enter(x: Tensor, group: Group) -> Tensor:
    """What all have -> the same; what each owes to it is summed."""
    return _Enter.apply(x, group)


def leave(part: Tensor, group: Group) -> Tensor:
    """The sum of what each has; its gradient, which all have, is that of each."""
    return _Leave.apply(part, group)


def my_tokens(whole: Tensor, group: Group) -> Tensor:
    """(b, t, ...) that all have -> (b, t / g, ...): tokens of this process."""
    return _MyTokens.apply(whole, group)


def all_tokens(part: Tensor, group: Group) -> Tensor:
    """(b, t / g, ...) of each -> (b, t, ...)."""
    return _AllTokens.apply(part, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gathered(part, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _scattered(grad, ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _scattered(part, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.group), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, columns: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _columns_together(columns, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _columns_apart(grad, ctx.group), None


class _ToColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _columns_apart(tokens, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _columns_together(grad, ctx.group), None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        return _summed(part, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _MyTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _tokens_of(whole, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _tokens_together(grad, ctx.group), None


class _AllTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _tokens_together(part, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _tokens_of(grad, ctx.group), None


def _gathered(part: Tensor, group: Group) -> Tensor:
    whole = part.new_empty(group.size() * len(part), *part.shape[1:])
    all_gather(whole, part.contiguous(), group=group)
    return whole


def _scattered(part: Tensor, group: Group) -> Tensor:
    mine = part.new_empty(len(part) // group.size(), *part.shape[1:])
    reduce_scatter(mine, part.contiguous(), group=group)
    return mine


def _columns_together(columns: Tensor, group: Group) -> Tensor:
    got = torch.empty_like(columns, memory_format=torch.contiguous_format)
    dist.all_to_all_single(got, columns.contiguous(), group=group)
    g = group.size()
    return got.unflatten(0, (g, -1)).transpose(0, 1).flatten(1)


def _columns_apart(tokens: Tensor, group: Group) -> Tensor:
    g = group.size()
    sent = tokens.unflatten(1, (g, -1)).transpose(0, 1).contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    return got.flatten(0, 1)


def _summed(part: Tensor, group: Group) -> Tensor:
    whole = part.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(whole, group=group)
    return whole


def _tokens_of(whole: Tensor, group: Group) -> Tensor:
    return whole.unflatten(1, (group.size(), -1))[:, group.rank()].contiguous()


def _tokens_together(part: Tensor, group: Group) -> Tensor:
    whole = _gathered(part, group)
    return whole.unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1, 2)
