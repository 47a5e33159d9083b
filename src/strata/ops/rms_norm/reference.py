"""RMS normalisation in torch's own words."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from strata.ops.precision import accumulation_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `strata.ops.rms_norm`."""
    wide = accumulation_dtype(x)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps=eps)


def rms_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients to x and to the weight, in their dtypes."""
    with torch.enable_grad():
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = rms_norm(x, weight, eps)
    grad_x, grad_weight = torch.autograd.grad(out, (x, weight), grad_out)
    return grad_x, grad_weight
