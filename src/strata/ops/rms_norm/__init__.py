"""RMS normalisation of half queries and half-keys, in fp32 whatever comes in.

An operator of ours on a CPU only, where torch's own is a dozen passes over memory; on a GPU torch
has one kernel for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from strata.ops.dispatch import unwatched
from strata.ops.precision import accumulation_dtype
from strata.ops.rms_norm import cpu, reference

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension.

    Args:
        x: (..., d), fp32, bf16 or fp64.
        weight: (d,).
        eps: above 0.

    Returns:
        (..., d), fp32 (fp64 for fp64); on a CPU differentiable once.

    Raises:
        ValueError: the weight does not fit.

    Source: "Root Mean Square Layer Normalization" (arXiv 1910.07467).
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"a weight {tuple(weight.shape)} does not fit {tuple(x.shape)}")
    if x.device.type != "cpu":
        return reference.rms_norm(x, weight, eps)
    if unwatched(x, weight):
        return cpu.rms_norm(x, weight, eps)
    out: Tensor = _rms_norm(x, weight, eps)
    return out


@torch.library.custom_op("strata::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return cpu.rms_norm(x, weight, eps)


@torch.library.custom_op("strata::rms_norm_backward", mutates_args=())
def _backward(grad_out: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return cpu.rms_norm_backward(grad_out, x, weight, eps)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=accumulation_dtype(x))


@_backward.register_fake
def _(grad_out: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight = _backward(grad_out, x, weight, ctx.eps)
    return grad_x, grad_weight, None


_rms_norm.register_autograd(_gradients, setup_context=_save)
