"""The weighted bag: sums of table rows picked by index, with gradients that never have its size.

`weighted_bag` and its adjoint `row_dots` are torch custom operators (namespace `strata`), so
autograd, torch.compile and activation checkpointing see one opaque node each. The gradient to
the table goes one of two ways:

* without a queue: a sparse COO gradient in `.grad`, for any optimizer that takes those;
* with a queue: (rows, weights, grad_out) is queued for `row_update`, and `.grad` stays None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import EffectType
from torch.utils.flop_counter import register_flop_formula

from strata.ops.dispatch import implementation, unwatched
from strata.ops.precision import accumulation_dtype
from strata.ops.weighted_bag.queue import Use, UseQueue, queue_of

__all__ = ["Use", "UseQueue", "bag_forward", "row_dots", "row_gradients", "weighted_bag"]

Shape = tuple[int, ...]

_NO_QUEUE = -1


def weighted_bag(
    values_rv: Tensor, rows_np: Tensor, weights_np: Tensor, *, queue: UseQueue | None = None
) -> Tensor:
    """Sum weighted rows of a table, one bag per token: out[n] = sum_p w[n, p] * values[rows[n, p]].

    Args:
        values_rv: the table, (r, v), fp32, bf16 or fp64; int8 and fp8 (e4m3fn) can be read, not
            trained: see `quantized_rows`.
        rows_np: picks, (n, p), int64 in 0..r-1; repeats within a bag add up.
        weights_np: (n, p), float.
        queue: where backward leaves the table's gradient; None gives a sparse `.grad`.

    Returns:
        (n, v), summed in fp32 and returned in fp32 (fp64 for fp64 tables).

    Raises:
        ValueError: shapes do not fit.

    Source: "Memory Layers at Scale" (arXiv 2412.09764), section 2.
    """
    _check(values_rv, rows_np)
    if weights_np.shape != rows_np.shape:
        raise ValueError(
            f"weights {tuple(weights_np.shape)} do not fit rows {tuple(rows_np.shape)}"
        )
    if unwatched(values_rv, rows_np, weights_np):
        return bag_forward(values_rv, rows_np, weights_np)
    return _bag(values_rv, rows_np, weights_np, _number(queue))


def row_dots(
    values_rv: Tensor, rows_np: Tensor, vectors_nv: Tensor, *, queue: UseQueue | None = None
) -> Tensor:
    """Dot picked rows with their bag's vector: out[n, p] = values[rows[n, p]] . vectors[n].

    The adjoint of `weighted_bag`; PEER's first half. Shapes, dtypes and the queue as there, with
    vectors (n, v) in and (n, p) out.
    """
    _check(values_rv, rows_np)
    if vectors_nv.shape != (rows_np.shape[0], values_rv.shape[1]):
        raise ValueError(
            f"vectors {tuple(vectors_nv.shape)} do not fit {rows_np.shape[0]} bags of width "
            f"{values_rv.shape[1]}"
        )
    if unwatched(values_rv, rows_np, vectors_nv):
        return implementation("weighted_bag", values_rv).bag_dots(values_rv, rows_np, vectors_nv)
    return _dots(values_rv, rows_np, vectors_nv, _number(queue))


def bag_forward(values_rv: Tensor, rows_np: Tensor, weights_np: Tensor) -> Tensor:
    """`weighted_bag` without autograd."""
    return implementation("weighted_bag", values_rv).bag_forward(values_rv, rows_np, weights_np)


def row_gradients(
    rows_np: Tensor, weights_np: Tensor, grad_out_nv: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of a weighted bag to the rows it read: (rows_u ascending, grad_uv in fp32)."""
    return implementation("weighted_bag", grad_out_nv).row_gradients(
        rows_np, weights_np, grad_out_nv
    )


@torch.library.custom_op("strata::weighted_bag", mutates_args=())
def _bag(values: Tensor, rows: Tensor, weights: Tensor, queue: int) -> Tensor:
    return implementation("weighted_bag", values).bag_forward(values, rows, weights)


@torch.library.custom_op("strata::row_dots", mutates_args=())
def _dots(values: Tensor, rows: Tensor, vectors: Tensor, queue: int) -> Tensor:
    return implementation("weighted_bag", values).bag_dots(values, rows, vectors)


# The two operators below return a gradient and, when given a queue, leave a use in it. That side
# effect is not in their schema, so it is registered: a compiler would drop the operator where the
# router is frozen and nobody needs its result, and merge two equal uses into one. The queue keeps
# copies, for a compiled graph reuses its buffers.


@torch.library.custom_op("strata::weighted_bag_backward", mutates_args=())
def _bag_backward(
    grad_out: Tensor, values: Tensor, rows: Tensor, weights: Tensor, queue: int
) -> Tensor:
    if queue != _NO_QUEUE:
        queue_of(queue).put(rows, weights, grad_out, dtype=accumulation_dtype(values))
    return implementation("weighted_bag", values).bag_dots(values, rows, grad_out).to(weights.dtype)


@torch.library.custom_op("strata::row_dots_backward", mutates_args=())
def _dots_backward(
    grad_out: Tensor, values: Tensor, rows: Tensor, vectors: Tensor, queue: int
) -> Tensor:
    if queue != _NO_QUEUE:
        queue_of(queue).put(rows, grad_out, vectors, dtype=accumulation_dtype(values))
    return (
        implementation("weighted_bag", values).bag_forward(values, rows, grad_out).to(vectors.dtype)
    )


_bag_backward.register_effect(EffectType.ORDERED)
_dots_backward.register_effect(EffectType.ORDERED)


@_bag.register_fake
def _(values: Tensor, rows: Tensor, weights: Tensor, queue: int) -> Tensor:
    wide = accumulation_dtype(values)
    return values.new_empty((rows.shape[0], values.shape[1]), dtype=wide)


@_dots.register_fake
def _(values: Tensor, rows: Tensor, vectors: Tensor, queue: int) -> Tensor:
    return values.new_empty(rows.shape, dtype=accumulation_dtype(values))


@_bag_backward.register_fake
def _(grad_out: Tensor, values: Tensor, rows: Tensor, weights: Tensor, queue: int) -> Tensor:
    return torch.empty_like(weights, memory_format=torch.contiguous_format)


@_dots_backward.register_fake
def _(grad_out: Tensor, values: Tensor, rows: Tensor, vectors: Tensor, queue: int) -> Tensor:
    return torch.empty_like(vectors, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, rows, other, ctx.queue = inputs
    ctx.save_for_backward(values, rows, other)


def _bag_gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    values, rows, weights = ctx.saved_tensors
    wants_values, _, wants_weights, _ = ctx.needs_input_grad
    queue = ctx.queue if wants_values else _NO_QUEUE
    grad_weights = grad_values = None
    if wants_weights or queue != _NO_QUEUE:
        grad_weights = _bag_backward(grad_out, values, rows, weights, queue)
    if wants_values and queue == _NO_QUEUE:
        grad_values = _sparse(values, *row_gradients(rows, weights, grad_out))
    return grad_values, None, grad_weights, None


def _dots_gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    values, rows, vectors = ctx.saved_tensors
    wants_values, _, wants_vectors, _ = ctx.needs_input_grad
    queue = ctx.queue if wants_values else _NO_QUEUE
    grad_vectors = grad_values = None
    if wants_vectors or queue != _NO_QUEUE:
        grad_vectors = _dots_backward(grad_out, values, rows, vectors, queue)
    if wants_values and queue == _NO_QUEUE:
        grad_values = _sparse(values, *row_gradients(rows, grad_out, vectors))
    return grad_values, None, grad_vectors, None


_bag.register_autograd(_bag_gradients, setup_context=_save)
_dots.register_autograd(_dots_gradients, setup_context=_save)


def _sparse(values_rv: Tensor, rows_u: Tensor, grad_uv: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(
        rows_u[None],
        grad_uv.to(values_rv.dtype),
        values_rv.shape,
        is_coalesced=True,
        check_invariants=False,
    )


def _number(queue: UseQueue | None) -> int:
    return _NO_QUEUE if queue is None else queue.number


def _check(values_rv: Tensor, rows_np: Tensor) -> None:
    if values_rv.ndim != 2 or rows_np.ndim != 2:
        raise ValueError(
            f"a table (r, v) and rows (n, p) are needed, given {tuple(values_rv.shape)} and "
            f"{tuple(rows_np.shape)}"
        )
    if rows_np.dtype != torch.int64:
        raise ValueError(f"rows must be int64, given {rows_np.dtype}")


# torch's FLOP counter cannot see into an operator; the table's gradient is the row optimizer's.


@register_flop_formula([torch.ops.strata.weighted_bag, torch.ops.strata.row_dots])
def _flops(values: Shape, rows: Shape, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * rows[1] * values[1]


@register_flop_formula([torch.ops.strata.weighted_bag_backward, torch.ops.strata.row_dots_backward])
def _backward_flops(_grad_out: Shape, values: Shape, rows: Shape, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * rows[1] * values[1]
