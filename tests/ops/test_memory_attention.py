"""Attention over memory and context beside its definition, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from strata.ops.memory_attention import fused, memory_attention

# Sums of at most 60 terms of order 1; bf16 keeps 8 bits, and rounds scores and weights as well.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}
CHUNK = 8
# b, h, k, t, d, m; the last chunk is short where CHUNK does not divide t
SIZES = [(2, 4, 2, 21, 8, 5), (1, 3, 3, 32, 16, 1), (3, 6, 1, 5, 8, 7), (1, 2, 2, 1, 4, 3)]


def _states(
    size: tuple[int, ...], dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> list[Tensor]:
    b, h, k, t, d, m = size
    c = -(-t // CHUNK)
    torch.manual_seed(seed)
    shapes = [(b, h, t, d), (b, k, t, d), (b, k, t, d), (b, c, k, m, d), (b, c, k, m, d)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def _held(kind: str, size: tuple[int, ...]) -> Tensor | None:
    b, _, k, t, _, m = size
    c = -(-t // CHUNK)
    shape = {
        "all": None,
        "places": (b, c, 1, 1, m),  # memories of different length
        "heads": (1, 1, k, 1, 1),  # heads without memory
        "chunks": (b, c, 1, 1, 1),  # chunks that read nothing
        "tokens": (b, c, 1, CHUNK, m),
        "everything": (b, c, k, CHUNK, m),
    }[kind]
    generator = torch.Generator().manual_seed(3)
    return None if shape is None else torch.rand(shape, generator=generator) < 0.6


def _documents(b: int, t: int) -> Tensor:
    """A mask of documents of three to nine tokens, other ones in each row: bool (b, 1, t, t)."""
    generator = torch.Generator().manual_seed(4)
    starts = torch.rand(b, t, generator=generator) < 0.2
    document_bt = starts.cumsum(1)
    same = document_bt[:, :, None] == document_bt[:, None]
    return (same & torch.ones(t, t, dtype=torch.bool).tril())[:, None]


def _truth(
    states: list[Tensor], grad: Tensor, held: Tensor | None, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Row by row, chunk by chunk, query by query: one softmax over a list of keys."""
    query, key, value, memory_key, memory_value = wide = [
        x.detach().double().requires_grad_() for x in states
    ]
    b, h, t, d = query.shape
    k, m = key.shape[1], memory_key.shape[3]
    c = -(-t // CHUNK)
    if held is not None:
        held = held.expand(b, c, k, CHUNK, m)
    rows = []
    for i in range(b):
        for j in range(h):
            head = j * k // h
            for at in range(t):
                seen = torch.arange(key.shape[2]) <= at
                if mask is not None:
                    seen = mask.expand(b, h, t, -1)[i, j, at]
                chunk, within = divmod(at, CHUNK)
                there = torch.ones(m, dtype=torch.bool)
                if held is not None:
                    there = held[i, chunk, head, within]
                keys = torch.cat([memory_key[i, chunk, head][there], key[i, head][seen]])
                values = torch.cat([memory_value[i, chunk, head][there], value[i, head][seen]])
                scores = keys @ query[i, j, at] * kwargs.get("scaling", d**-0.5)
                if (cap := kwargs.get("softcap")) is not None:
                    scores = cap * torch.tanh(scores / cap)
                rows.append(scores.softmax(0) @ values)
    out = torch.stack(rows).view(b, h, t, d)
    return out.detach(), torch.autograd.grad(out, wide, grad.double(), materialize_grads=True)


def _compare(
    states: list[Tensor], held: Tensor | None, mask: Tensor | None, **kwargs: Any
) -> Tensor:
    dtype = states[0].dtype
    out = memory_attention(*states, chunk_tokens=CHUNK, held_bcknm=held, mask=mask, **kwargs)
    assert out.dtype == dtype
    grad = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, states, grad, retain_graph=True)
    true_out, true_grads = _truth(states, grad, held, mask, **kwargs)
    torch.testing.assert_close(out.double(), true_out, atol=TOLERANCE[dtype], rtol=0)
    for found, true in zip(grads, true_grads, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), true, atol=2 * TOLERANCE[dtype], rtol=0)
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(
    size: tuple[int, ...], masked: bool, dtype: torch.dtype, poisoned_empty: None
) -> None:
    mask = _documents(size[0], size[3]) if masked else None
    out = _compare(_states(size, dtype), _held("places", size), mask)
    assert type(out.grad_fn).__name__ == "_MergedBackward"


@pytest.mark.parametrize("kind", ["all", "heads", "chunks", "tokens", "everything"])
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_held_may_differ_by_place_head_chunk_and_token(kind: str, masked: bool) -> None:
    size = SIZES[0]
    mask = _documents(size[0], size[3]) if masked else None
    _compare(_states(size), _held(kind, size), mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_the_reference_is_the_definition_too(
    dtype: torch.dtype, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "serves", lambda *_: False)
    size = SIZES[0]
    mask = _documents(size[0], size[3]) if masked else None
    for kind in ("all", "tokens"):
        out = _compare(_states(size, dtype), _held(kind, size), mask, scaling=0.7)
        assert type(out.grad_fn).__name__ != "_MergedBackward"


def test_softcap_bounds_the_scores_of_both() -> None:
    size = SIZES[0]
    _compare(_states(size), _held("tokens", size), None, softcap=0.8, scaling=1.3)


def test_an_additive_mask_and_more_keys_than_queries() -> None:
    size = SIZES[0]
    b, h, _, t, _, _ = size
    states = _states(size)
    longer = [torch.randn(*x.shape[:2], t + 6, x.shape[3]).requires_grad_() for x in states[1:3]]
    states = [states[0], *longer, *states[3:]]
    mask = torch.rand(b, h, t, t + 6) < 0.5
    mask[..., 0] = True
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    out = _compare(states, None, mask)
    assert torch.equal(out, memory_attention(*states, chunk_tokens=CHUNK, mask=added))
    # without a mask only as many keys count as there are queries
    cut = [states[0], *(x[:, :, :t] for x in longer), *states[3:]]
    assert torch.equal(
        memory_attention(*states, chunk_tokens=CHUNK), memory_attention(*cut, chunk_tokens=CHUNK)
    )


def test_gradcheck() -> None:
    size = (1, 4, 2, 6, 3, 2)
    states = _states(size, torch.float64)
    for held in (None, torch.tensor([[True, False]]).view(1, 1, 1, 1, 2)):
        for mask in (None, _documents(1, 6)):
            assert torch.autograd.gradcheck(
                lambda *x, held=held, mask=mask: memory_attention(
                    *x, chunk_tokens=CHUNK, held_bcknm=held, mask=mask
                ),
                states,
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_without_memory_it_is_plain_attention_bit_for_bit(dtype: torch.dtype, masked: bool) -> None:
    size = SIZES[0]
    query, key, value, memory_key, memory_value = _states(size, dtype)
    mask = _documents(size[0], size[3]) if masked else None
    plain = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=not masked, enable_gqa=True
    )
    grads = torch.autograd.grad(plain.sum(), (query, key, value))
    none = (memory_key[..., :0, :], memory_value[..., :0, :])
    nothing_held = torch.zeros(1, 1, 1, 1, 1, dtype=torch.bool)
    for memory, held in ((none, None), ((memory_key, memory_value), nothing_held)):
        out = memory_attention(
            query, key, value, *memory, chunk_tokens=CHUNK, held_bcknm=held, mask=mask
        )
        assert torch.equal(out, plain)
        found = torch.autograd.grad(out.sum(), (query, key, value))
        assert all(torch.equal(a, b) for a, b in zip(found, grads, strict=True))


def test_chunks_without_memory_are_plain_beside_others_that_read() -> None:
    size = SIZES[0]
    states = _states(size)
    held = torch.tensor([True, False, True]).view(1, 3, 1, 1, 1)
    out = memory_attention(*states, chunk_tokens=CHUNK, held_bcknm=held)
    plain = F.scaled_dot_product_attention(*states[:3], is_causal=True, enable_gqa=True)
    assert torch.equal(out[:, :, 8:16], plain[:, :, 8:16])
    assert not torch.equal(out[:, :, :8], plain[:, :, :8])
    grads = torch.autograd.grad(out.sum(), states[3:])
    assert all(not bool(g[:, 1].any()) and bool(g[:, 0].any()) for g in grads)


def test_shared_memory_is_every_chunk_s_memory() -> None:
    size = SIZES[0]
    b, _, k, _, d, m = size
    states = _states(size)
    shared = [torch.randn(1, 1, k, m, d).requires_grad_() for _ in range(2)]
    out = memory_attention(*states[:3], *shared, chunk_tokens=CHUNK)
    copies = [x.detach().expand(b, 3, k, m, d).clone().requires_grad_() for x in shared]
    again = memory_attention(*states[:3], *copies, chunk_tokens=CHUNK)
    torch.testing.assert_close(out, again, atol=1e-6, rtol=0)  # another order of the same sums
    grads = torch.autograd.grad(out.sum(), shared)
    for grad, one in zip(grads, torch.autograd.grad(again.sum(), copies), strict=True):
        torch.testing.assert_close(grad, one.sum((0, 1), keepdim=True))


def test_padding_on_the_left_sees_nothing_and_breaks_nothing() -> None:
    size = SIZES[0]
    states = _states(size)
    mask = torch.ones(21, 21, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[0, :, :, :5] = False
    weight = torch.ones(2, 1, 21, 1)
    weight[0, :, :5] = 0  # no loss falls on padding
    for held in (None, torch.zeros(1, 1, 1, 1, 1, dtype=torch.bool)):
        out = memory_attention(*states, chunk_tokens=CHUNK, held_bcknm=held, mask=mask)
        assert out.isfinite().all()
        grads = torch.autograd.grad((out * weight).sum(), states)
        assert all(g.isfinite().all() for g in grads)
        assert not grads[1][0, :, :5].any()


def test_strided_states_and_frozen_ones() -> None:
    size = SIZES[0]
    states = _states(size)
    flipped = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in states]
    want = memory_attention(*states, chunk_tokens=CHUNK)
    out = memory_attention(*flipped, chunk_tokens=CHUNK)
    torch.testing.assert_close(out, want, atol=1e-6, rtol=0)
    assert out.grad_fn is None
    flipped[3].requires_grad_()
    memory_attention(*flipped, chunk_tokens=CHUNK).sum().backward()
    assert flipped[3].grad is not None and flipped[0].grad is None


def test_autocast_decides_the_dtype() -> None:
    size = SIZES[0]
    states = _states(size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = memory_attention(*states, chunk_tokens=CHUNK)
    low = [x.detach().bfloat16() for x in states]
    assert torch.equal(out, memory_attention(*low, chunk_tokens=CHUNK))
    grads = torch.autograd.grad(out.float().sum(), states)
    assert all(g.dtype == torch.float32 for g in grads)


def test_compiled_it_is_the_same() -> None:
    size = SIZES[0]
    held = _held("tokens", size)

    def attend(*states: Tensor) -> Tensor:
        return memory_attention(*states, chunk_tokens=CHUNK, held_bcknm=held)

    states = _states(size)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for found, want in zip(
        (out := compiled(*states), *torch.autograd.grad(out.square().sum(), states)),
        (out := attend(*states), *torch.autograd.grad(out.square().sum(), states)),
        strict=True,
    ):
        torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_kernels_of_a_gpu(dtype: torch.dtype, masked: bool) -> None:
    size = (2, 4, 2, 70, 16, 5)
    mask = _documents(2, 70) if masked else None
    states = _states(size, dtype)
    grad = torch.randn(2, 4, 70, 16).to(dtype)
    true = _truth(states, grad, None, mask)
    there = [x.detach().cuda().requires_grad_() for x in states]
    on_gpu = None if mask is None else mask.cuda()
    out = memory_attention(*there, chunk_tokens=CHUNK, mask=on_gpu)
    assert type(out.grad_fn).__name__ == "_MergedBackward"
    grads = torch.autograd.grad(out, there, grad.cuda())
    for found, wanted in zip((out, *grads), (true[0], *true[1]), strict=True):
        torch.testing.assert_close(
            found.cpu().double(), wanted, atol=2 * TOLERANCE[dtype], rtol=2e-2
        )


def test_what_does_not_fit_is_refused() -> None:
    query, key, value, memory_key, memory_value = _states(SIZES[0])
    with pytest.raises(ValueError, match="do not fit queries"):
        memory_attention(query[:, :3], key, value, memory_key, memory_value, chunk_tokens=CHUNK)
    with pytest.raises(ValueError, match="memory keys"):
        memory_attention(query, key, value, memory_key[:, :2], memory_value[:, :2], chunk_tokens=8)
    with pytest.raises(ValueError, match="at least 1"):
        memory_attention(query, key, value, memory_key, memory_value, chunk_tokens=0)
