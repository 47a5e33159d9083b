"""Product-key top-k against the full table of n * n scores in float64, outputs and gradients."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from strata.ops import product_key_topk
from strata.ops.product_key_topk import cpu, num_staircase_pairs, pick_pairs, reference

# Shapes as in the source: n tokens, h heads, m half-keys, d width of a half, k picks.
SIZES = [(5, 3, 7, 5, 4), (1, 1, 1, 1, 1), (0, 2, 5, 3, 2), (13, 2, 33, 17, 32), (4, 1, 6, 3, 6)]


def full_table(query_nhsd: Tensor, keys_hsmd: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The plain formula: score all m * m rows in float64, then pick."""
    half_nhsm = torch.einsum("nhsd,hsmd->nhsm", query_nhsd.double(), keys_hsmd.double())
    table_nhmm = half_nhsm[:, :, 0, :, None] + half_nhsm[:, :, 1, None, :]
    best = table_nhmm.flatten(2).topk(top_k, dim=-1)
    return best.values, best.indices


def draw(
    n: int, h: int, m: int, d: int, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    query = torch.randn(n, h, 2, d, dtype=torch.float64).to(dtype).requires_grad_()
    keys = torch.randn(h, 2, m, d, dtype=torch.float64).to(dtype).requires_grad_()
    return query, keys


# fp64: rounding of a few sums of products only. fp32: the same in fp32, sums of at most 2 * 17
# products of deviation 1. bf16: products of bf16 are exact in fp32 and so is the comparison, but
# gradients come back in bf16, with 8 bits of mantissa.
@pytest.mark.parametrize(
    ("dtype", "tolerance", "grad_tolerance"),
    [(torch.float64, 1e-10, 1e-10), (torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-5, 2**-7)],
)
@pytest.mark.parametrize("size", SIZES)
def test_outputs_and_gradients(
    size: tuple[int, ...], dtype: torch.dtype, tolerance: float, grad_tolerance: float
) -> None:
    n, h, m, d, k = size
    query, keys = draw(n, h, m, d, dtype=dtype)
    scores, rows = product_key_topk(query, keys, top_k=k)
    query64, keys64 = (x.detach().double().requires_grad_() for x in (query, keys))
    expected, expected_rows = full_table(query64, keys64, k)

    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert scores.shape == rows.shape == (n, h, k)
    assert torch.equal(rows, expected_rows)
    torch.testing.assert_close(scores.double(), expected, atol=tolerance, rtol=tolerance)

    cotangent = torch.randn(n, h, k, dtype=torch.float64)
    scores.backward(cotangent.to(scores.dtype))
    expected.backward(cotangent)
    for mine, truth in ((query, query64), (keys, keys64)):
        assert mine.grad is not None and truth.grad is not None
        assert mine.grad.dtype == dtype
        scale = max(1.0, float(truth.grad.abs().amax())) if truth.grad.numel() else 1.0
        error = (mine.grad.double() - truth.grad).abs()
        assert not error.numel() or error.max() <= grad_tolerance * scale


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 4),
    h=st.integers(1, 3),
    m=st.integers(1, 40),
    d=st.integers(1, 9),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_any_shape_finds_the_winners_of_the_full_table(
    n: int, h: int, m: int, d: int, share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    k = 1 + round(share * (m - 1))
    query, keys = draw(n, h, m, d)
    scores, rows = product_key_topk(query, keys, top_k=k)
    expected, expected_rows = full_table(query, keys, k)
    assert torch.equal(rows, expected_rows)  # float64 and continuous draws: no ties
    torch.testing.assert_close(scores, expected, atol=1e-10, rtol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 24),
    k_share=st.floats(0, 1),
    levels=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_ties_lose_no_score(m: int, k_share: float, levels: int, seed: int) -> None:
    """Few distinct scores: which of the tied rows win is free, the winning scores are not."""
    generator = torch.Generator().manual_seed(seed)
    k = 1 + round(k_share * (m - 1))
    half = torch.randint(0, levels, (3, 2, 2, m), generator=generator).double()
    pairs = pick_pairs(half, k)
    first, second = pairs.unbind(-1)
    picked = half[:, :, 0].gather(-1, first) + half[:, :, 1].gather(-1, second)
    full = (half[:, :, 0, :, None] + half[:, :, 1, None, :]).flatten(2)
    assert torch.equal(picked, full.topk(k, dim=-1).values)
    distinct = (first * m + second).sort(dim=-1).values
    assert (distinct.diff(dim=-1) > 0).all()


def test_all_scores_equal() -> None:
    query = torch.zeros(3, 2, 2, 4, requires_grad=True)
    keys = torch.randn(2, 2, 9, 4, requires_grad=True)
    scores, rows = product_key_topk(query, keys, top_k=9)
    assert torch.equal(scores, torch.zeros(3, 2, 9))
    assert (rows.sort(dim=-1).values.diff(dim=-1) > 0).all()
    scores.sum().backward()
    assert query.grad is not None and query.grad.isfinite().all()


def test_staircase_has_119_pairs_at_32() -> None:
    assert num_staircase_pairs(32) == 119
    for k in (1, 2, 3, 8, 31, 64):
        assert num_staircase_pairs(k) == sum(
            (i + 1) * (j + 1) <= k for i in range(k) for j in range(k)
        )


def test_every_stair_can_win() -> None:
    """No pair of the staircase is superfluous: for each there are scores that make it a winner."""
    k = 6
    for i in range(k):
        for j in range(k // (i + 1)):
            # Entries above and left of (i, j) are equal to it but for a hair, all others far below.
            half = torch.full((1, 1, 2, k), -100.0, dtype=torch.float64)
            half[0, 0, 0, : i + 1] = torch.linspace(0.02, 0.01, i + 1, dtype=torch.float64)
            half[0, 0, 1, : j + 1] = torch.linspace(0.02, 0.01, j + 1, dtype=torch.float64)
            picks = pick_pairs(half, k)[0, 0].tolist()
            assert [i, j] in picks


def test_bf16_inputs_are_scored_and_picked_in_fp32() -> None:
    """In bf16 a top-32 was seen to hold 27 distinct scores; in fp32 all 32 are distinct."""
    query, keys = draw(16, 4, 128, 64, dtype=torch.bfloat16)
    scores, rows = product_key_topk(query, keys, top_k=32)
    _, expected_rows = full_table(query, keys, 32)
    assert torch.equal(rows, expected_rows)
    assert all(len(head.unique()) == 32 for head in scores.flatten(0, 1))
    coarse = torch.einsum("nhsd,hsmd->nhsm", query, keys)
    coarse = (coarse[:, :, 0, :, None] + coarse[:, :, 1, None, :]).flatten(2).topk(32).values
    assert min(len(head.unique()) for head in coarse.flatten(0, 1)) < 32  # the trap is real


def test_autocast_does_not_reach_the_scores() -> None:
    query, keys = draw(16, 2, 64, 32, dtype=torch.float32)
    expected, expected_rows = product_key_topk(query, keys, top_k=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, rows = product_key_topk(query, keys, top_k=32)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected)
    assert torch.equal(rows, expected_rows)


@pytest.mark.usefixtures("poisoned_empty")
def test_nothing_uninitialised_is_read() -> None:
    query, keys = draw(7, 3, 11, 5, dtype=torch.float32)
    scores, rows = product_key_topk(query, keys, top_k=5)
    _, expected_rows = full_table(query, keys, 5)
    scores.sum().backward()
    assert torch.equal(rows, expected_rows)
    assert query.grad is not None and query.grad.isfinite().all()
    assert keys.grad is not None and keys.grad.isfinite().all()


def test_non_contiguous_inputs() -> None:
    query = torch.randn(2, 5, 3, 7, dtype=torch.float64).permute(3, 2, 0, 1)  # (7, 3, 2, 5)
    keys = torch.randn(5, 11, 2, 3, dtype=torch.float64).permute(3, 2, 1, 0)  # (3, 2, 11, 5)
    scores, rows = product_key_topk(query, keys, top_k=6)
    expected, expected_rows = full_table(query, keys, 6)
    assert torch.equal(rows, expected_rows)
    torch.testing.assert_close(scores, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("first_call", ["inference_mode", "fake", "meta"])
def test_a_first_call_without_data_leaves_nothing_behind(first_call: str) -> None:
    """The staircase is cached; it must not be cached as a tensor that cannot be used later."""
    k = {"inference_mode": 9, "fake": 10, "meta": 11}[first_call]  # used nowhere else
    if first_call == "inference_mode":
        with torch.inference_mode():
            product_key_topk(*draw(2, 1, 12, 3, dtype=torch.float32), top_k=k)
    elif first_call == "fake":
        with FakeTensorMode():
            product_key_topk(torch.empty(2, 1, 2, 3), torch.empty(1, 2, 12, 3), top_k=k)
    else:
        query, keys = torch.empty(2, 1, 2, 3, device="meta"), torch.empty(1, 2, 12, 3)
        product_key_topk(query, keys.to("meta"), top_k=k)
    query, keys = draw(4, 2, 12, 3)
    scores, rows = product_key_topk(query, keys, top_k=k)
    scores.sum().backward()
    assert torch.equal(rows, full_table(query, keys, k)[1])


# Many tokens at once are scored in fp32 tiles of tokens by half-keys: sizes that fill tiles and
# sizes that do not, fewer half-keys than a tile is wide, and the most picks there can be.
TILED = [(64, 2, 256, 96, 16), (67, 1, 50, 7, 5), (97, 3, 130, 33, 32), (200, 2, 9, 1, 9)]


@pytest.mark.parametrize(("n", "h", "m", "d", "k"), TILED)
def test_tiles_score_like_whole_products(
    n: int, h: int, m: int, d: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_MIN_TOKENS", 64)
    query, keys = (x.detach() for x in draw(n, h, m, d, dtype=torch.float32))
    assert cpu.can_score(query, keys) and not cpu.can_score(query[:63], keys)
    threads = torch.get_num_threads()
    try:
        results = []
        for torch_threads in (1, 3, 3):
            torch.set_num_threads(torch_threads)
            results.append(product_key_topk(query, keys, top_k=k))
    finally:
        torch.set_num_threads(threads)
    scores, rows = results[0]
    for again in results[1:]:
        assert torch.equal(again[0], scores) and torch.equal(again[1], rows)
    # Sums of d products of deviation 1 in one chain; near-ties may come in another order.
    expected, _ = full_table(query, keys, k)
    torch.testing.assert_close(scores.double(), expected, atol=2e-5, rtol=1e-5)
    half_nhsm = reference.score_halves(query.double(), keys.double())
    named = half_nhsm[:, :, 0].gather(-1, rows // m) + half_nhsm[:, :, 1].gather(-1, rows % m)
    torch.testing.assert_close(scores.double(), named, atol=2e-5, rtol=1e-5)
    assert all(len(set(head.tolist())) == k for head in rows.flatten(0, 1))


def test_tokens_that_are_not_finite_harm_only_themselves_in_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "_MIN_TOKENS", 64)
    query, keys = (x.detach() for x in draw(70, 2, 80, 6, dtype=torch.float32))
    expected = product_key_topk(query, keys, top_k=4)
    query[5], query[66, 1, 0, 2] = torch.nan, torch.inf
    scores, rows = product_key_topk(query, keys, top_k=4)
    others = [n for n in range(70) if n not in (5, 66)]
    assert torch.equal(scores[others], expected[0][others])
    assert torch.equal(rows[others], expected[1][others])
    assert rows.min() >= 0 and rows.max() < 80 * 80


DEVICES = [
    ("cpu", "_SCORE_BYTES"),
    pytest.param("cuda", "_DEVICE_SCORE_BYTES", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("device", "constant"), DEVICES)
@pytest.mark.parametrize("tokens_held", [0, 1, 5, 36, 37])
def test_tokens_in_parts_give_the_same(
    device: str, constant: str, tokens_held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, keys = (x.detach().to(device).requires_grad_() for x in draw(37, 2, 64, 8))
    module = sys.modules["strata.ops.product_key_topk"]
    results = []
    for held_bytes in (1 << 40, tokens_held * 2 * 2 * 64 * 8):  # whole, and in parts
        monkeypatch.setattr(module, constant, held_bytes)
        scores, rows = product_key_topk(query, keys, top_k=4)
        results.append((scores, rows, *torch.autograd.grad(scores.sum(), (query, keys))))
    whole, parts = results
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=1e-12)


def test_off_the_cpu_half_scores_are_held_in_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which has no data but counts: each part stays within its bytes."""
    module = sys.modules["strata.ops.product_key_topk"]
    monkeypatch.setattr(module, "_DEVICE_SCORE_BYTES", 5 * 2 * 2 * 64 * 4)
    scored: list[int] = []
    score_halves = module.score_halves

    def counted(query: Tensor, keys: Tensor) -> Tensor:
        scored.append(len(query))
        return score_halves(query, keys)

    monkeypatch.setattr(module, "score_halves", counted)
    query, keys = torch.empty(37, 2, 2, 8, device="meta"), torch.empty(2, 2, 64, 8, device="meta")
    scores, rows = module._score_and_pick(query, keys, 4)
    assert scored == [5] * 7 + [2]
    assert scores.shape == rows.shape == (37, 2, 4)


def test_compiles_whole_with_gradients() -> None:
    query, keys = draw(6, 2, 16, 4)
    compiled = torch.compile(
        lambda q, c: product_key_topk(q, c, top_k=8), fullgraph=True, backend="aot_eager"
    )
    scores, rows = compiled(query, keys)
    expected, expected_rows = product_key_topk(query, keys, top_k=8)
    assert torch.equal(rows, expected_rows)
    grads = torch.autograd.grad(scores.square().sum(), (query, keys))
    truth = torch.autograd.grad(expected.square().sum(), (query, keys))
    torch.testing.assert_close(grads, truth, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("query_shape", "keys_shape", "top_k", "says"),
    [
        ((2, 3, 2, 4), (3, 2, 8, 4), 9, "top_k 9 is not in 1..8"),
        ((2, 3, 2, 4), (3, 2, 8, 4), 0, "top_k 0 is not in 1..8"),
        ((2, 3, 2, 4), (4, 2, 8, 4), 2, "differ"),
        ((2, 3, 3, 4), (3, 3, 8, 4), 2, "differ"),
        ((2, 3, 2, 4), (3, 2, 8, 5), 2, "differ"),
        ((2, 3, 8), (3, 2, 8, 4), 2, "needed"),
    ],
)
def test_shapes_that_do_not_fit(
    query_shape: tuple[int, ...], keys_shape: tuple[int, ...], top_k: int, says: str
) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        product_key_topk(torch.zeros(query_shape), torch.zeros(keys_shape), top_k=top_k)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_tokens", [1, 255, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_key_gradients_are_those_of_bags(num_tokens: int, dtype: torch.dtype) -> None:
    n, h, m, d, k = num_tokens, 3, 7, 5, 4
    grad_scores, query = torch.randn(n, h, k, dtype=dtype), torch.randn(n, h, 2, d, dtype=dtype)
    keys, rows = torch.randn(h, 2, m, d, dtype=dtype), torch.randint(m * m, (n, h, k))
    found = cpu.half_key_gradients(grad_scores, query, keys, rows)
    wanted = reference.half_key_gradients(grad_scores.double(), query.double(), keys.double(), rows)
    for gradient, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), truth, rtol=1e-5, atol=1e-5)


def test_gradient_of_a_half_key_that_every_token_picks_does_not_drift() -> None:
    n = 20_000
    grad_scores, query = torch.full((n, 1, 1), 0.1), torch.full((n, 1, 2, 2), 0.1)
    keys, rows = torch.zeros(1, 2, 3, 2), torch.zeros(n, 1, 1, dtype=torch.int64)
    _, grad_keys = cpu.half_key_gradients(grad_scores, query, keys, rows)
    term = float(torch.tensor(0.1).double() ** 2)
    assert float(grad_keys[0, 0, 0, 0]) == pytest.approx(n * term, rel=1e-5)
    assert not grad_keys[0, 0, 1:].any()


def test_picks_do_not_depend_on_how_scores_lie_in_memory() -> None:
    by_codebook = torch.randn(6, 2, 11, 40).permute(2, 0, 1, 3)
    by_token = by_codebook.contiguous()
    for found, wanted in zip(
        cpu.pick_rows(by_codebook, 5), cpu.pick_rows(by_token, 5), strict=True
    ):
        assert torch.equal(found, wanted)
