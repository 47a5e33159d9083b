"""Every operation at thousands of drawn shapes, layouts and dtypes, against the reference in fp64.

A case is named by its seed alone: `check(17)` draws and checks case 17, so a failure is repeated by
its number. Seeds that once failed stand in `REGRESSIONS` and are always replayed.

Half of the cases hold small multiples of 1/8: every sum is then exact in fp32 in whatever order,
and results must equal the reference's bit for bit. In the others rounding may take up at most what
theory allows: for a sum of t products, t + 2 roundings of the sum of their absolute values.

Whatever torch and numpy leave uninitialised is poisoned. What kernels allocate inside compiled code
is out of reach of that: there, an element that was not written shows in the results only.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from strata.ops import (
    Use,
    UseQueue,
    collect_uses,
    product_key_topk,
    row_dots,
    row_update,
    weighted_bag,
)
from strata.ops import threads as splitting
from strata.ops.kernels import TILE_ROWS
from strata.ops.product_key_topk import cpu as topk_cpu
from strata.ops.product_key_topk import pick_rows
from strata.ops.product_key_topk import reference as topk_reference
from strata.ops.row_update import ALGORITHMS, RowGradients, UpdateRule, new_state
from strata.ops.row_update import reference as update_reference
from strata.ops.weighted_bag import reference as bag_reference
from strata.ops.weighted_bag import row_gradients

# A change to how cases are drawn gives seeds other cases: find these anew then.
REGRESSIONS = (
    13,  # a row outside a table that is not contiguous was not refused
    97,
    849,  # the norm of gradients from layers with different picks drifted
    2217,
    3909,
)

DEFAULT_SEEDS = range(1000)
TRITON_SEEDS = range(1_000_000, 1_000_040)
BLOCK, NUM_BLOCKS = 10_000, 10  # of the slow test

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# What is special about a width: vectors of 4, 8 and 16 numbers, tiles, their neighbours.
WIDTHS = [w + d for w in (2, 4, 8, 16, 32, 64, 128, 256) for d in (-1, 0, 1)]
OUTSIDE = (-1, -(2**40), 2**40)  # and the first row behind the table
LR, SCALE, BETAS, EPS = 0.25, 0.5, (0.9, 0.95), 1e-8


class Draw:
    """What is drawn for one case.

    Args:
        seed: names the case.
        small: sizes for Triton's interpreter.
    """

    def __init__(self, seed: int, *, small: bool) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.small = small
        self.dtype = self.random.choice(DTYPES)
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.exact = self.random.random() < 0.5

    def up_to(self, most: int, *, least: int = 0) -> int:
        """least..most, small ones more often; for the interpreter a handful at most."""
        if self.small:
            most = max(least, min(most, 4 + most // 20))
        return least + int(self.random.random() ** 1.5 * (most + 1 - least))

    def width(self) -> int:
        special = self.random.choice(WIDTHS)
        if self.random.random() < 0.5 and not (self.small and special > 40):
            return special
        return self.up_to(300, least=1)

    def num_rows(self) -> int:
        return int(5001 ** self.random.random()) if not self.small else self.up_to(20, least=1)

    def numbers(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Numbers near 1 of either sign, laid out at random."""
        pool = _pool(self.exact)
        count = 1
        for size in shape:
            count *= size
        first = self.random.randrange(len(pool) - count)
        return self.laid_out(pool[first : first + count].view(shape).to(dtype, copy=True))

    def rows(self, n: int, p: int, r: int) -> Tensor:
        """(n, p) picks of r rows: uniform, one row only, very few, the first and the last."""
        kind = self.random.choice(("uniform", "uniform", "one", "few", "ends"))
        if kind == "one":
            rows = torch.full((n, p), self.random.randrange(r))
        elif kind == "ends":
            rows = torch.randint(0, 2, (n, p), generator=self.generator) * (r - 1)
        else:
            most = min(r, 3) if kind == "few" else r
            rows = torch.randint(0, most, (n, p), generator=self.generator)
        return self.laid_out(rows)

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The same numbers in memory of another order, with poison around them."""
        kind = self.random.choice(("plain", "plain", "plain", "shifted", "transposed", "strided"))
        if tensor.numel() == 0 or kind == "plain":
            return tensor.contiguous()
        poison = torch.nan if tensor.is_floating_point() else 2**60
        if kind == "shifted":  # contiguous, not aligned
            room = tensor.new_full((tensor.numel() + 2,), poison)
            inside = room[1:-1].view(tensor.shape)
        elif kind == "transposed":
            inside = torch.empty_like(tensor.transpose(0, -1).contiguous()).transpose(0, -1)
        else:
            wide_shape = (*tensor.shape[:-1], 2 * tensor.shape[-1])
            inside = tensor.new_full(wide_shape, poison)[..., ::2]
        inside.copy_(tensor)
        return inside


@cache
def _pool(exact: bool) -> Tensor:
    """Numbers to cut tables from: drawing them anew would be most of the time."""
    generator = torch.Generator().manual_seed(0)
    if exact:
        return torch.randint(-8, 9, (1 << 21,), generator=generator).double() / 8
    return torch.randn(1 << 21, generator=generator, dtype=torch.float64)


def assert_near(draw: Draw, found: Tensor, truth: Tensor, scale: Tensor, *, terms: int) -> None:
    """Whether sums of products are right.

    Args:
        draw: tells whether sums are exact, and in which precision they run.
        found: what an operation gave, in fp32 or fp64, or rounded to bf16.
        truth: in fp64.
        scale: sums of the absolute products.
        terms: products in the longest sum.
    """
    assert found.shape == truth.shape
    unit = 2.0**-53 if draw.wide == torch.float64 else 2.0**-24
    allowed = scale * (0.0 if draw.exact else 2 * (terms + 2) * unit)
    if found.dtype == torch.bfloat16:
        allowed = allowed * 1.01 + 2.0**-8 * truth.abs()
    wrong = ~((found.double() - truth).abs() <= allowed)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, first {wrong.nonzero()[0]}"


def bf16_rounding(draw: Draw) -> float:
    """Half a spacing, to nearest; Triton's interpreter cuts off, a whole one."""
    return 2.0**-7 if draw.small else 2.0**-8


def check_bags(draw: Draw) -> list[Tensor]:
    """`weighted_bag` and `row_dots`: each one's output is the other's gradient."""
    n, p, r, v = draw.up_to(40), draw.up_to(70), draw.num_rows(), draw.width()
    table, rows = draw.numbers(r, v, dtype=draw.dtype), draw.rows(n, p, r)
    weights, vectors = (draw.numbers(n, size, dtype=draw.wide) for size in (p, v))

    wide_inputs = (table.double(), weights.double(), vectors.double())
    truths, scales = (
        (
            bag_reference.bag_forward(table64, rows, weights64),
            bag_reference.bag_dots(table64, rows, vectors64),
            bag_reference.row_gradients(rows, weights64, vectors64),
        )
        for table64, weights64, vectors64 in (wide_inputs, [x.abs() for x in wide_inputs])
    )
    most_uses = int(rows.flatten().bincount().max()) if rows.numel() else 0

    found: list[Tensor] = []
    for op, other, cotangent in ((weighted_bag, weights, vectors), (row_dots, vectors, weights)):
        leaf, other_leaf = table.detach().requires_grad_(), other.detach().requires_grad_()
        queue = UseQueue() if draw.random.random() < 0.7 else None
        out = op(leaf, rows, other_leaf, queue=queue)
        out.backward(cotangent)
        assert other_leaf.grad is not None
        if queue is not None:
            assert leaf.grad is None
            gradients = collect_uses(queue.take())
            rows_u, grad_uv = gradients.rows_u, gradients.grad_uv
            torch.testing.assert_close(
                gradients.norm().double(), grad_uv.double().norm(), rtol=1e-5, atol=1e-30
            )
        else:
            assert leaf.grad is not None and leaf.grad.shape == table.shape
            sparse = leaf.grad.coalesce()
            rows_u, grad_uv = sparse.indices()[0], sparse.values()
        bag, dots = (out, other_leaf.grad) if op is weighted_bag else (other_leaf.grad, out)
        assert bag.dtype == dots.dtype == draw.wide
        assert_near(draw, bag.detach(), truths[0], scales[0], terms=p)
        assert_near(draw, dots.detach(), truths[1], scales[1], terms=v)
        assert torch.equal(rows_u, truths[2][0])
        assert_near(draw, grad_uv, truths[2][1], scales[2][1], terms=most_uses)
        found += [bag.detach(), dots.detach(), rows_u, grad_uv]

    rows_u, grad_uv = row_gradients(rows, weights, vectors)
    assert torch.equal(rows_u, truths[2][0])
    assert_near(draw, grad_uv, truths[2][1], scales[2][1], terms=most_uses)

    if rows.numel() and draw.random.random() < 0.3:
        wrong = rows.contiguous().clone()
        wrong.view(-1)[draw.random.randrange(wrong.numel())] = draw.random.choice((r, *OUTSIDE))
        for op, other in ((weighted_bag, weights), (row_dots, vectors)):
            with pytest.raises(IndexError):
                op(table, wrong, other)
    return [*found, rows_u, grad_uv]


def check_update(draw: Draw) -> list[Tensor]:
    """`collect_uses` and `row_update`, two steps; gradients are exact, the rules round."""
    draw.exact = True
    r, v = draw.num_rows(), draw.width()
    algorithm = draw.random.choice(ALGORITHMS)
    values = draw.numbers(r, v, dtype=draw.dtype)
    state = new_state(values, algorithm=algorithm)
    state64 = new_state(values, algorithm=algorithm)
    rule = UpdateRule(algorithm, lr=LR, scale=SCALE, betas=BETAS, eps=EPS)
    options = {"lr": LR, "scale": SCALE, "betas": BETAS, "eps": EPS}
    picks = draw.up_to(70, least=1)

    def draw_use() -> Use:
        n = draw.up_to(40)
        p = picks if draw.random.random() < 0.8 else draw.up_to(20)  # layers may differ
        weights, grad_out = (draw.numbers(n, size, dtype=draw.wide) for size in (p, v))
        return Use(draw.rows(n, p, r), weights, grad_out)

    for _ in range(2):
        uses = [draw_use() for _ in range(draw.random.randint(1, 3))]
        uses64 = [Use(u.rows_np, u.weights_np.double(), u.grad_out_nv.double()) for u in uses]
        truth = update_reference.reduce_uses(uses64)
        before, expected = values.clone(), values.double()
        update_reference.row_update(expected, state64, truth, rule)
        gradients = collect_uses(uses)
        norm = gradients.norm() if draw.random.random() < 0.5 else None
        row_update(values, state, gradients, algorithm=algorithm, **options)

        assert torch.equal(gradients.rows_u, truth.rows_u)
        for found_norm in (norm, gradients.norm()):
            if found_norm is not None:
                torch.testing.assert_close(found_norm.double(), truth.norm(), rtol=1e-5, atol=0)
        assert torch.equal(gradients.grad_uv.double(), truth.grad_uv)
        # State is fp32 and a row's squares are summed in fp32: v roundings at most. A step is its
        # learning rate times the gradient (sgd) or at most sqrt(v) (adagrad) or so (adam).
        longest = v**0.5
        if algorithm == "sgd" and truth.grad_uv.numel():
            longest = float(truth.grad_uv.abs().max())
        allowed = 4 * (v + 8) * 2.0**-24 * LR * longest
        found_uv, truth_uv = values[truth.rows_u].double(), expected[truth.rows_u]
        rounding = bf16_rounding(draw) if draw.dtype == torch.bfloat16 else 2.0**-22
        wrong = ~((found_uv - truth_uv).abs() <= allowed + rounding * truth_uv.abs())
        assert not wrong.any(), f"{algorithm}: {int(wrong.sum())} of {wrong.numel()}"
        untouched = torch.ones(r, dtype=torch.bool)
        untouched[truth.rows_u] = False
        assert torch.equal(values[untouched], before[untouched])
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, state64[name], rtol=4 * (v + 8) * 2**-24, atol=1e-6)
            assert not tensor[untouched].isnan().any()

    if draw.random.random() < 0.3 and not draw.small:
        check_wrong_rows_change_nothing(draw, values, state, algorithm)
    return [values, *state.values()]


def check_wrong_rows_change_nothing(
    draw: Draw, values: Tensor, state: dict[str, Tensor], algorithm: str
) -> None:
    before = [tensor.clone() for tensor in (values, *state.values())]
    rows = torch.tensor([[0, draw.random.choice((len(values), *OUTSIDE))]])
    ones = torch.ones(1, 2, dtype=draw.wide)
    use = Use(rows, ones, torch.ones(1, values.shape[1], dtype=draw.wide))
    gradients = RowGradients(rows.sort().values[0], torch.ones(2, values.shape[1]))
    for make in (lambda: collect_uses([use]), lambda: gradients):
        with pytest.raises(IndexError):
            row_update(values, state, make(), algorithm=algorithm, lr=LR)  # type: ignore[arg-type]
    for tensor, old in zip((values, *state.values()), before, strict=True):
        assert torch.equal(tensor, old)


def check_picks(draw: Draw) -> list[Tensor]:
    """`pick_rows`: equal scores, and rows that have them; which of tied rows win is free."""
    n, h, m = draw.up_to(12), draw.up_to(4, least=1), draw.width()
    top_k = draw.up_to(min(m, 70), least=1)
    dtype = torch.float64 if draw.dtype == torch.float64 else torch.float32
    half = draw.numbers(n, h, 2, m, dtype=dtype)
    if draw.random.random() < 0.3:
        worst = draw.random.randrange(m + 1)  # also all of them
        half[..., worst:] = draw.random.choice((-torch.inf, 0.0, -1e30))
    scores, rows = pick_rows(half, top_k)
    expected, _ = topk_reference.pick_rows(half, top_k)
    assert torch.equal(scores, expected)
    assert_rows_have_scores(half, scores, rows)
    return [scores, rows]


def assert_rows_have_scores(half: Tensor, scores: Tensor, rows: Tensor) -> None:
    m = half.shape[-1]
    assert ((rows >= 0) & (rows < m * m)).all()
    sums = half[:, :, 0].gather(-1, rows // m) + half[:, :, 1].gather(-1, rows % m)
    assert torch.equal(sums, scores)
    assert (rows.sort(dim=-1).values.diff(dim=-1) > 0).all()


def check_topk(draw: Draw) -> list[Tensor]:
    """`product_key_topk` and its gradients, by the plain formula at the rows that it picked."""
    n, h, m, d = draw.up_to(12), draw.up_to(4, least=1), draw.width(), draw.up_to(70, least=1)
    top_k = draw.up_to(min(m, 40), least=1)
    query, keys = (draw.numbers(*shape, dtype=draw.dtype) for shape in ((n, h, 2, d), (h, 2, m, d)))
    leaves = [query.detach().requires_grad_(), keys.detach().requires_grad_()]
    scores, rows = product_key_topk(*leaves, top_k=top_k)
    cotangent = draw.numbers(n, h, top_k, dtype=draw.wide)
    scores.backward(cotangent)
    assert scores.dtype == draw.wide and scores.shape == (n, h, top_k)
    assert ((rows >= 0) & (rows < m * m)).all()
    assert (rows.sort(dim=-1).values.diff(dim=-1) > 0).all()

    def plain(query: Tensor, keys: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        query, keys = query.detach().requires_grad_(), keys.detach().requires_grad_()
        half = torch.einsum("nhsd,hsmd->nhsm", query, keys)
        sums = half[:, :, 0].gather(-1, rows // m) + half[:, :, 1].gather(-1, rows % m)
        sums.backward(cotangent)
        assert query.grad is not None and keys.grad is not None
        best = topk_reference.pick_rows(half.detach(), top_k)[0]
        return sums.detach(), query.grad, keys.grad, best

    wide_inputs = (query.double(), keys.double(), cotangent.double())
    truths, scales = plain(*wide_inputs), plain(*(x.abs() for x in wide_inputs))
    assert_near(draw, scores.detach(), truths[0], scales[0], terms=2 * d)
    # The i-th best of rounded scores is off by no more than any score is.
    most = torch.full_like(truths[3], float(scales[3].max()) if scales[3].numel() else 0.0)
    assert_near(draw, scores.detach(), truths[3], most, terms=2 * d)
    found = [scores.detach(), rows]
    for leaf, truth, scale, terms in zip(
        leaves, truths[1:3], scales[1:3], (top_k, n * top_k), strict=True
    ):
        assert leaf.grad is not None and leaf.grad.dtype == draw.dtype
        assert_near(draw, leaf.grad, truth, scale, terms=terms)
        found.append(leaf.grad)
    return found


FAMILIES: tuple[Callable[[Draw], list[Tensor]], ...] = (
    check_bags,
    check_update,
    check_picks,
    check_topk,
)


def check(seed: int, *, small: bool = False) -> list[Tensor]:
    """Draw and check a case; returns what the operations gave."""
    family = FAMILIES[seed % len(FAMILIES)]
    draw = Draw(seed, small=small)
    # Every second case scores in tiles from the fewest tokens on that fill one.
    in_tiles = seed // len(FAMILIES) % 2 and not small
    fewest = TILE_ROWS if in_tiles else topk_cpu._MIN_TOKENS
    try:
        with patch.object(topk_cpu, "_MIN_TOKENS", fewest):
            return family(draw)
    except (Exception, pytest.fail.Exception) as error:
        raise AssertionError(f"{family.__name__}, seed {seed}, {draw.dtype}") from error


@pytest.fixture(scope="module")
def _compiled() -> None:
    """Every kernel has run for every dtype, and is compiled: numba knows no poisoned numpy."""
    for seed in DEFAULT_SEEDS[:400]:
        check(seed)


@pytest.fixture
def poisoned_memory(_compiled: None, poisoned_empty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's uninitialised arrays too hold NaN, or the largest integer."""

    def poisoned(make: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def make_poisoned(*args: Any, **kwargs: Any) -> np.ndarray:
            array = make(*args, **kwargs)
            if array.dtype.kind == "f":
                array.fill(np.nan)
            elif array.dtype.kind in "iu":
                array.fill(np.iinfo(array.dtype).max)
            return array

        return make_poisoned

    monkeypatch.setattr(np, "empty", poisoned(np.empty))
    monkeypatch.setattr(np, "empty_like", poisoned(np.empty_like))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("first", range(0, len(DEFAULT_SEEDS), 100))
def test_drawn_shapes(first: int) -> None:
    for seed in DEFAULT_SEEDS[first : first + 100]:
        check(seed)


@pytest.mark.usefixtures("poisoned_memory")
def test_seeds_that_once_failed() -> None:
    for seed in REGRESSIONS:
        check(seed)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("block", range(NUM_BLOCKS))
def test_100_000_drawn_shapes(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All failing seeds of a block are told; every second block splits even small work in two."""
    if block % 2:
        torch.set_num_threads(2)
        monkeypatch.setattr(splitting, "_BYTES_WORTH_A_THREAD", 64)
    failed = []
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        try:
            check(seed)
        except AssertionError as error:
            failed.append(f"{error}: {error.__cause__}")
    assert not failed, f"{len(failed)} of {BLOCK}:\n" + "\n".join(failed[:40])


def test_results_repeat_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """At one number of threads everything; across numbers all but torch's product that scores."""
    monkeypatch.setattr(splitting, "_BYTES_WORTH_A_THREAD", 64)  # small work is split too
    for seed in range(200):
        results = []
        for num_threads in (1, 1, 2, 2):
            torch.set_num_threads(num_threads)
            results.append(check(seed))
        pairs = [(0, 1), (2, 3)]
        if FAMILIES[seed % len(FAMILIES)] is not check_topk:
            pairs.append((0, 2))
        for one, other in pairs:
            for first, second in zip(results[one], results[other], strict=True):
                assert torch.equal(first, second), (seed, one, other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device assertion ends the process")
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("family", range(len(FAMILIES)))
def test_drawn_shapes_through_triton(family: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same cases, made small, through the kernels in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    for operation in ("weighted_bag", "row_update", "product_key_topk"):
        __import__(f"strata.ops.{operation}.triton")
        kernels = sys.modules[f"strata.ops.{operation}.triton"]
        package = sys.modules[f"strata.ops.{operation}"]
        monkeypatch.setattr(package, "implementation", lambda _name, _tensor, of=kernels: of)
    for seed in TRITON_SEEDS:
        if seed % len(FAMILIES) == family:
            check(seed, small=True)
