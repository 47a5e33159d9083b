"""RMS normalisation beside torch's, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from strata.ops.rms_norm import rms_norm

EPS = 1e-6
# Rounding of fp32 sums of at most 300 terms; bf16 gradients keep 8 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2}
SHAPES = [(1, 1), (3, 7), (5, 16), (2, 3, 2, 33), (700, 96), (513, 256), (0, 8)]


def _truth(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    out = F.rms_norm(x, weight.shape, weight, eps=EPS)
    return out.detach(), *torch.autograd.grad(out, (x, weight), grad.double())


def _close(found: Tensor, true: Tensor, tolerance: float, *, scale: float) -> None:
    torch.testing.assert_close(found.double(), true, atol=tolerance * scale, rtol=0)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 1.0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strided", [False, True])
def test_values_and_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, strided: bool, poisoned_empty: None
) -> None:
    torch.manual_seed(len(shape) + shape[0])
    x = torch.randn(shape).to(dtype)
    if strided:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    weight = (torch.rand(shape[-1]) + 0.5).to(dtype)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    out = rms_norm(x, weight, eps=EPS)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == wide
    grad = torch.randn(shape, dtype=wide)
    grads = torch.autograd.grad(out, (x, weight), grad)
    assert [g.dtype for g in grads] == [dtype, dtype]
    true_out, *true_grads = _truth(x.detach(), weight.detach(), grad)
    _close(out.detach(), true_out, min(TOLERANCE[dtype], 5e-6), scale=_largest(true_out))
    # The gradient to x is a difference of terms as large as this.
    terms = (grad * weight / x.detach().square().mean(-1, keepdim=True).sqrt()).detach()
    _close(grads[0], true_grads[0], TOLERANCE[dtype], scale=_largest(terms))
    _close(grads[1], true_grads[1], TOLERANCE[dtype], scale=_largest(true_grads[1]))


def test_threads_change_no_bit() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5000, 96), torch.rand(96)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
            out = rms_norm(a, b, eps=EPS)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), (a, b))))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_a_frozen_weight_and_a_frozen_input() -> None:
    x, weight = torch.randn(4, 8), torch.rand(8)
    frozen = rms_norm(x.requires_grad_(), weight, eps=EPS)
    frozen.sum().backward()
    assert x.grad is not None and weight.grad is None
    learned = rms_norm(x.detach(), weight.requires_grad_(), eps=EPS)
    learned.sum().backward()
    assert weight.grad is not None


def test_nothing_is_recorded_without_gradients() -> None:
    x, weight = torch.randn(4, 8), torch.rand(8, requires_grad=True)
    with torch.no_grad():
        assert rms_norm(x, weight, eps=EPS).grad_fn is None


def test_compiled_it_is_the_same_bit_for_bit() -> None:
    x, weight = torch.randn(40, 8), torch.rand(8)
    compiled = torch.compile(
        lambda a, b: rms_norm(a, b, eps=EPS), fullgraph=True, backend="aot_eager"
    )
    results = []
    for norm in (compiled, lambda a, b: rms_norm(a, b, eps=EPS)):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = norm(a, b)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), (a, b))))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_the_operators_are_what_torch_expects() -> None:
    x, weight = torch.randn(6, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    torch.library.opcheck(torch.ops.strata.rms_norm, (x, weight, EPS))
    grad = torch.randn(6, 8)
    arguments = (grad, x.detach(), weight.detach(), EPS)
    torch.library.opcheck(torch.ops.strata.rms_norm_backward, arguments)


def test_other_devices_run_on_torch() -> None:
    x, weight = torch.randn(4, 8, device="meta"), torch.rand(8, device="meta")
    assert rms_norm(x, weight, eps=EPS).shape == (4, 8)


def test_a_weight_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        rms_norm(torch.randn(4, 8), torch.rand(7), eps=EPS)
