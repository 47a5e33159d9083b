"""Triton kernels against the reference: in Triton's CPU interpreter, or on a GPU where one is.

The interpreter runs a program at a time in numpy, so sizes are small; they are odd on purpose.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from strata.ops import RowGradients, Use
from strata.ops.product_key_topk import reference as topk_reference
from strata.ops.row_update import ALGORITHMS, UpdateRule, new_state
from strata.ops.row_update import reference as update_reference
from strata.ops.weighted_bag import reference as bag_reference

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from strata.ops.product_key_topk import triton as topk_triton
from strata.ops.row_update import triton as update_triton
from strata.ops.weighted_bag import triton as bag_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the CPU needs TRITON_INTERPRET=1

# n bags, p picks, r rows, v width
SIZES = [(5, 3, 7, 11), (1, 1, 1, 1), (0, 3, 5, 4), (4, 0, 5, 3), (7, 17, 29, 33), (3, 4, 1, 2)]
DTYPES = [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-5)]
OPTIONS: dict[str, Any] = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-8}


def draw(n: int, p: int, r: int, v: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Table, rows, weights, and one vector a bag; fp32 but for fp64 tables."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.randn(r, v, dtype=torch.float64).to(dtype)
    rows = torch.randint(0, r, (n, p))
    weights, vectors = torch.randn(n, p, dtype=wide), torch.randn(n, v, dtype=wide)
    return tuple(tensor.to(DEVICE) for tensor in (values, rows, weights, vectors))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_bags_and_dots(
    size: tuple[int, int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    values, rows, weights, vectors = draw(*size, dtype)
    for name, other in (("bag_forward", weights), ("bag_dots", vectors)):
        found = getattr(bag_triton, name)(values, rows, other)
        expected = getattr(bag_reference, name)(values, rows, other)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("size", SIZES)
def test_bags_and_dots_of_codes(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    values, rows, weights, vectors = draw(*size, torch.float32)
    codes = (values * 40).round().to(dtype)
    wide = codes.float()
    for name, other in (("bag_forward", weights), ("bag_dots", vectors)):
        found = getattr(bag_triton, name)(codes, rows, other)
        expected = getattr(bag_reference, name)(wide, rows, other)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=2e-5)  # entries up to 127


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES[:2])
@pytest.mark.parametrize("size", SIZES)
def test_row_gradients(
    size: tuple[int, int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    _, rows, weights, vectors = draw(*size, dtype)
    found_rows, found = bag_triton.row_gradients(rows, weights, vectors)
    expected_rows, expected = bag_reference.row_gradients(rows, weights, vectors)
    assert torch.equal(found_rows, expected_rows)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_wide_rows_take_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bag_triton, "_WIDEST_TILE", 16)
    values, rows, weights, vectors = draw(3, 5, 7, 37, torch.float32)
    found = (
        bag_triton.bag_forward(values, rows, weights),
        bag_triton.bag_dots(values, rows, vectors),
        bag_triton.row_gradients(rows, weights, vectors)[1],
    )
    expected = (
        bag_reference.bag_forward(values, rows, weights),
        bag_reference.bag_dots(values, rows, vectors),
        bag_reference.row_gradients(rows, weights, vectors)[1],
    )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_a_hot_row_is_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three levels of parts, and the same bits whatever the number of programs."""
    monkeypatch.setattr(bag_triton, "LONG_RUN", 4)
    rows = torch.cat([torch.full((20, 3), 2), torch.randint(0, 5, (4, 3))]).to(DEVICE)
    weights, vectors = torch.randn(24, 3).to(DEVICE), torch.randn(24, 6).to(DEVICE)
    _, found = bag_triton.row_gradients(rows, weights, vectors)
    _, again = bag_triton.row_gradients(rows, weights, vectors)
    _, expected = bag_reference.row_gradients(rows, weights, vectors)
    assert torch.equal(found, again)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_rows_outside_the_table_are_refused() -> None:
    if DEVICE == "cuda":
        pytest.skip("a device assertion ends the process")
    values, _, _, _ = draw(1, 1, 3, 4, torch.float32)
    for row in (-1, 3):
        with pytest.raises(IndexError, match=f"row {row} is not in the table"):
            bag_triton.bag_forward(values, torch.tensor([[row]]), torch.ones(1, 1))


@pytest.mark.parametrize("long_run", [256, 2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_updates(
    algorithm: Any,
    dtype: torch.dtype,
    tolerance: float,
    long_run: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three steps; with a long run of 2 most rows take the way of hot rows."""
    monkeypatch.setattr(bag_triton, "LONG_RUN", long_run)
    monkeypatch.setattr(update_triton, "LONG_RUN", long_run)
    values, *_ = draw(1, 1, 13, 7, dtype)
    expected = values.clone()
    state, expected_state = (new_state(values, algorithm=algorithm) for _ in range(2))
    rule = UpdateRule(algorithm, scale=0.5, **OPTIONS)
    for _ in range(3):
        uses = [Use(*draw(n, 3, 13, 7, torch.float32)[1:]) for n in (5, 2)]
        if dtype == torch.float64:
            uses = [Use(u.rows_np, u.weights_np.double(), u.grad_out_nv.double()) for u in uses]
        queued = update_triton.QueuedGradients(uses)
        norm = queued.norm()
        truth = RowGradients(*_reduced(uses))
        torch.testing.assert_close(norm, truth.norm().double(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(queued.grad_uv, truth.grad_uv, atol=2e-5, rtol=2e-5)
        update_triton.row_update(values, state, queued, rule)
        update_reference.row_update(expected, expected_state, truth, rule)
        torch.testing.assert_close(queued.norm(), norm, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values, expected, atol=tolerance, rtol=tolerance)
    for name in state:
        torch.testing.assert_close(state[name], expected_state[name], atol=1e-4, rtol=1e-4)


def _reduced(uses: list[Use]) -> tuple[Tensor, Tensor]:
    return bag_reference.row_gradients(
        torch.cat([use.rows_np for use in uses]),
        torch.cat([use.weights_np for use in uses]),
        torch.cat([use.grad_out_nv for use in uses]),
    )


def test_gradients_of_rows_update_too() -> None:
    values, *_ = draw(1, 1, 9, 5, torch.float32)
    expected = values.clone()
    gradients = RowGradients(torch.tensor([1, 4]).to(DEVICE), torch.randn(2, 5).to(DEVICE))
    rule = UpdateRule("sgd", **OPTIONS)
    update_triton.row_update(values, {}, gradients, rule)
    update_reference.row_update(expected, {}, gradients, rule)
    torch.testing.assert_close(values, expected)


def test_stochastic_rounding_is_unbiased_and_repeats() -> None:
    count, share = 1600, 0.3
    results = []
    for _ in range(2):
        values = torch.ones(count // 8, 8, dtype=torch.bfloat16).to(DEVICE)
        gradients = RowGradients(
            torch.arange(count // 8).to(DEVICE),
            torch.full((count // 8, 8), -share * 2**-7).to(DEVICE),
        )
        generator = torch.Generator(DEVICE).manual_seed(5)
        rule = UpdateRule("sgd", lr=1.0, rounding="stochastic", generator=generator)
        update_triton.row_update(values, {}, gradients, rule)
        results.append(values)
    assert torch.equal(results[0], results[1])
    up = (results[0].double() == 1 + 2**-7).double()
    assert set(results[0].double().flatten().tolist()) == {1.0, 1 + 2**-7}
    # The share that went up: binomial, five deviations.
    assert abs(float(up.mean()) - share) < 5 * (share * (1 - share) / count) ** 0.5


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("m", "k"), [(7, 4), (1, 1), (33, 32), (64, 5), (100, 16), (6, 6)])
def test_picks(m: int, k: int) -> None:
    half = torch.randn(3, 2, 2, m).to(DEVICE)
    scores, rows = topk_triton.pick_rows(half, k)
    expected, expected_rows = topk_reference.pick_rows(half, k)
    assert torch.equal(scores, expected)
    assert torch.equal(rows, expected_rows)


@pytest.mark.parametrize("kind", ["all equal", "few levels", "minus inf", "negative"])
def test_picks_of_hard_scores(kind: str) -> None:
    half = torch.randn(2, 2, 2, 40).to(DEVICE)
    if kind == "all equal":
        half.fill_(-0.25)
    elif kind == "few levels":
        half = half.round()
    elif kind == "minus inf":
        half[..., 5:] = -torch.inf
    else:
        half = -half.abs() - 1
    scores, rows = topk_triton.pick_rows(half, 8)
    full = (half[:, :, 0, :, None] + half[:, :, 1, None, :]).flatten(2)
    assert torch.equal(scores, full.topk(8).values)
    assert torch.equal(full.gather(-1, rows), scores)
    assert (rows.sort(dim=-1).values.diff(dim=-1) > 0).all()


def test_no_queries() -> None:
    scores, rows = topk_triton.pick_rows(torch.empty(0, 2, 2, 8).to(DEVICE), 3)
    assert scores.shape == rows.shape == (0, 2, 3)
