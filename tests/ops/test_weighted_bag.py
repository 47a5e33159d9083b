"""Bags and dots against plain indexing and einsum in float64: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strata.ops import UseQueue, reduce_uses, row_dots, weighted_bag
from strata.ops.weighted_bag import cpu, reference
from strata.ops.weighted_bag.queue import joined

Op = Callable[..., Tensor]

# n bags, p picks, r rows, v width
SIZES = [(5, 3, 7, 11), (1, 1, 1, 1), (0, 3, 5, 4), (4, 0, 5, 3), (17, 33, 129, 65), (3, 4, 1, 2)]

# fp64: rounding of short sums. fp32: sums of at most 33 * 17 terms of deviation 1, 6e-8 each.
# bf16: tables and gradients to them carry 8 bits; products and sums are fp32, so outputs and all
# other gradients, and queued gradients to the table, are as good as in fp32.
DTYPES = [
    (torch.float64, 1e-10, 1e-10),
    (torch.float32, 2e-5, 2e-5),
    (torch.bfloat16, 2e-5, 2**-7),
]


def plain_bag(values_rv: Tensor, rows_np: Tensor, weights_np: Tensor) -> Tensor:
    return torch.einsum("np,npv->nv", weights_np, values_rv[rows_np])


def plain_dots(values_rv: Tensor, rows_np: Tensor, vectors_nv: Tensor) -> Tensor:
    return torch.einsum("npv,nv->np", values_rv[rows_np], vectors_nv)


OPS: list[tuple[Op, Op]] = [(weighted_bag, plain_bag), (row_dots, plain_dots)]
both_ops = pytest.mark.parametrize(("op", "plain"), OPS, ids=["weighted_bag", "row_dots"])


def draw(
    op: Op, n: int, p: int, r: int, v: int, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """A table in `dtype`, rows, and weights or vectors in fp32 (fp64 for an fp64 table)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.randn(r, v, dtype=torch.float64).to(dtype).requires_grad_()
    shape = (n, p) if op is weighted_bag else (n, v)
    other = torch.randn(shape, dtype=torch.float64).to(wide).requires_grad_()
    return values, torch.randint(0, r, (n, p)), other


def table_gradient(values: Tensor, queue: UseQueue | None) -> Tensor:
    """What backward left for the table, as a dense tensor."""
    if queue is None:
        assert values.grad is not None and values.grad.is_sparse
        assert values.grad.dtype == values.dtype
        return values.grad.to_dense().double()
    assert values.grad is None
    dense = torch.zeros(values.shape, dtype=torch.float64)
    gradients = reduce_uses(queue.take())
    dense[gradients.rows_u] = gradients.grad_uv.double()
    return dense


def assert_close(mine: Tensor, truth: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest entry, or of 1."""
    assert mine.shape == truth.shape
    if truth.numel():
        scale = max(1.0, float(truth.abs().amax()))
        assert float((mine.double() - truth).abs().amax()) <= tolerance * scale


def compare(
    op: Op,
    plain: Op,
    values: Tensor,
    rows: Tensor,
    other: Tensor,
    *,
    queue: UseQueue | None = None,
    tolerance: float = 1e-10,
    table_tolerance: float = 1e-10,
) -> None:
    values64, other64 = (x.detach().double().requires_grad_() for x in (values, other))
    out = op(values, rows, other, queue=queue)
    truth = plain(values64, rows, other64)
    assert out.dtype == (torch.float64 if values.dtype == torch.float64 else torch.float32)
    assert_close(out.detach(), truth.detach(), tolerance)

    cotangent = torch.randn(truth.shape, dtype=torch.float64)
    out.backward(cotangent.to(out.dtype))
    truth.backward(cotangent)
    assert other.grad is not None and other64.grad is not None and values64.grad is not None
    assert other.grad.dtype == other.dtype
    assert_close(other.grad, other64.grad, tolerance)
    if queue is not None:
        table_tolerance = tolerance  # queued in fp32, never rounded to the table's dtype
    assert_close(table_gradient(values, queue), values64.grad, table_tolerance)


@both_ops
@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance", "table_tolerance"), DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_outputs_and_gradients(
    op: Op,
    plain: Op,
    size: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float,
    table_tolerance: float,
    queued: bool,
) -> None:
    compare(
        op,
        plain,
        *draw(op, *size, dtype=dtype),
        queue=UseQueue() if queued else None,
        tolerance=tolerance,
        table_tolerance=table_tolerance,
    )


@settings(max_examples=60, deadline=None)
@given(
    which=st.integers(0, 1),
    n=st.integers(0, 6),
    p=st.integers(0, 9),
    r=st.integers(1, 12),
    v=st.integers(1, 9),
    queued=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(which: int, n: int, p: int, r: int, v: int, queued: bool, seed: int) -> None:
    torch.manual_seed(seed)
    op, plain = OPS[which]
    compare(op, plain, *draw(op, n, p, r, v), queue=UseQueue() if queued else None)


@both_ops
@pytest.mark.parametrize("queued", [False, True])
def test_duplicate_rows_add_up(op: Op, plain: Op, queued: bool) -> None:
    values, _, other = draw(op, 3, 5, 4, 6)
    rows = torch.tensor([[2, 2, 2, 2, 2], [0, 3, 0, 3, 0], [1, 1, 2, 2, 3]])
    compare(op, plain, values, rows, other, queue=UseQueue() if queued else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 10_000), (10_000, 1), (100, 100)])
@both_ops
def test_one_hot_row_read_10_000_times(
    op: Op, plain: Op, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Its gradient is a sum of 10,000 terms; a bf16 accumulator returns 0.031 where 20.5 is due.

    Tolerance: fp32 rounding of 10,000 additions, each at most 6e-8 of the sum so far, random in
    sign: sqrt(10,000) * 6e-8 = 6e-6.
    """
    n, p = shape
    values, _, other = draw(op, n, p, 9, 5, dtype=dtype)
    other.data.abs_().mul_(0.002).add_(0.001)
    rows = torch.full((n, p), 7)
    queue = UseQueue()
    out = op(values, rows, other, queue=queue)
    values64, other64 = (x.detach().double().requires_grad_() for x in (values, other))
    truth = plain(values64, rows, other64)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=0)

    cotangent = torch.rand(truth.shape, dtype=torch.float64) + 0.5
    out.backward(cotangent.to(out.dtype))
    truth.backward(cotangent)
    assert values64.grad is not None and other.grad is not None
    gradients = reduce_uses(queue.take())
    assert gradients.rows_u.tolist() == [7]
    torch.testing.assert_close(
        gradients.grad_uv.double(), values64.grad[7:8], rtol=1e-5, atol=0, check_dtype=False
    )
    torch.testing.assert_close(other.grad.double(), other64.grad, rtol=1e-5, atol=1e-7)


def test_equal_terms_do_not_drift() -> None:
    """10,000 times the same weight: rounding errors do not cancel, the sum must still be right."""
    values = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.full((10_000, 1), 0.00205, requires_grad=True)
    queue = UseQueue()
    rows = torch.ones(10_000, 1, dtype=torch.int64)
    weighted_bag(values, rows, weights, queue=queue).sum().backward()
    truth = float(weights.detach().double().sum())  # 20.5
    for found in reduce_uses(queue.take()).grad_uv[0].tolist():
        # Measured: up to 5e-5 for one running fp32 sum; bf16 would be off by 99.8%.
        assert found == pytest.approx(truth, rel=1e-5)


@both_ops
def test_non_contiguous_inputs(op: Op, plain: Op) -> None:
    n, p, r, v = 6, 5, 9, 7
    table = torch.randn(v, r, dtype=torch.float64).T.requires_grad_()  # columns first
    rows = torch.randint(0, r, (p, 2 * n)).T[::2]
    width = p if op is weighted_bag else v
    other = torch.randn(width, n, dtype=torch.float64).T.requires_grad_()
    assert not (table.is_contiguous() or rows.is_contiguous() or other.is_contiguous())
    compare(op, plain, table, rows, other)
    table.grad = other.grad = None
    compare(op, plain, table, rows, other, queue=UseQueue())


@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_broadcast_inputs_and_gradients(op: Op, plain: Op, dtype: torch.dtype) -> None:
    """Stride 0, as `.expand` and the backward of `.sum()` give it."""
    values, rows, other = draw(op, 4, 3, 6, 5, dtype=dtype)
    other = other.detach()[:1].expand_as(other).requires_grad_()
    queue = UseQueue()
    out = op(values, rows, other, queue=queue)
    out.sum().backward()
    values64, other64 = (x.detach().double().requires_grad_() for x in (values, other))
    plain(values64, rows, other64).sum().backward()
    assert other.grad is not None and other64.grad is not None and values64.grad is not None
    assert_close(other.grad, other64.grad, 2e-5)
    assert_close(table_gradient(values, queue), values64.grad, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_cpu_equals_reference(size: tuple[int, ...], dtype: torch.dtype) -> None:
    n, p, r, v = size
    values, rows, weights = (x.detach() for x in draw(weighted_bag, n, p, r, v, dtype=dtype))
    vectors = torch.randn(n, v, dtype=weights.dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5  # the order of summation may differ
    for name, other in (("bag_forward", weights), ("bag_dots", vectors)):
        fast = getattr(cpu, name)(values, rows, other)
        slow = getattr(reference, name)(values, rows, other)
        torch.testing.assert_close(fast, slow, atol=tolerance, rtol=tolerance)
    fast_rows, fast_grad = cpu.row_gradients(rows, weights, vectors)
    slow_rows, slow_grad = reference.row_gradients(rows, weights, vectors)
    assert torch.equal(fast_rows, slow_rows)
    torch.testing.assert_close(fast_grad, slow_grad, atol=tolerance, rtol=tolerance)


def test_reference_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, rows, weights = (x.detach() for x in draw(weighted_bag, 23, 5, 11, 7))
    vectors = torch.randn(23, 7, dtype=torch.float64)
    whole = (
        reference.bag_forward(values, rows, weights),
        reference.bag_dots(values, rows, vectors),
        reference.row_gradients(rows, weights, vectors)[1],
    )
    monkeypatch.setattr(reference, "_CHUNK_BYTES", 7 * 5 * 4 * 3)  # three bags at a time
    parts = (
        reference.bag_forward(values, rows, weights),
        reference.bag_dots(values, rows, vectors),
        reference.row_gradients(rows, weights, vectors)[1],
    )
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("poisoned_empty")
@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_uninitialised_is_read(
    op: Op, plain: Op, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = draw(op, *size, dtype=dtype)
    compare(op, plain, *inputs, queue=UseQueue(), tolerance=2e-5)


@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(op: Op, plain: Op, dtype: torch.dtype) -> None:
    values, rows, other = draw(op, 9, 8, 20, 16, dtype=dtype)
    expected = op(values, rows, other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = op(values, rows, other)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


def test_results_repeat_bit_for_bit_whatever_the_threads() -> None:
    values, rows, weights = draw(weighted_bag, 300, 8, 50, 16, dtype=torch.float32)
    grad_out = torch.randn(300, 16)
    results = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        forward = cpu.bag_forward(values.detach(), rows, weights.detach())
        results.append((forward, cpu.row_gradients(rows, weights.detach(), grad_out)[1]))
    for again in results[1:]:
        assert torch.equal(results[0][0], again[0])
        assert torch.equal(results[0][1], again[1])


@both_ops
def test_gradients_are_computed_only_where_wanted(op: Op, plain: Op) -> None:
    values, rows, other = draw(op, 4, 3, 6, 5)
    queue = UseQueue()
    frozen = values.detach()
    op(frozen, rows, other, queue=queue).sum().backward()
    assert len(queue) == 0 and other.grad is not None
    op(values, rows, other.detach(), queue=queue).sum().backward()
    assert len(queue) == 1 and values.grad is None
    with torch.no_grad():
        assert not op(values, rows, other, queue=queue).requires_grad
    assert len(queue) == 1


@both_ops
def test_second_derivatives_are_refused(op: Op, plain: Op) -> None:
    """Not implemented; what must not happen is a silent zero."""
    values, rows, other = draw(op, 4, 3, 6, 5)
    out = op(values.detach(), rows, other).square().sum()
    (first,) = torch.autograd.grad(out, other, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula|does not require grad"):
        first.sum().backward()


def test_queue_keeps_copies() -> None:
    """A compiled graph reuses its buffers, so what is queued must not be a view of them."""
    values, rows, weights = draw(weighted_bag, 4, 3, 6, 5, dtype=torch.float32)
    queue = UseQueue()
    weighted_bag(values, rows, weights, queue=queue).sum().backward()
    before = reduce_uses(queue.uses).grad_uv.clone()
    rows.zero_()
    weights.data.zero_()
    assert torch.equal(reduce_uses(queue.uses).grad_uv, before)


@pytest.mark.parametrize("picks", [(3, 3, 3), (3, 2, 3)])
def test_uses_of_later_steps_lie_together(picks: tuple[int, ...]) -> None:
    """From the second step on they are joined without a copy, whatever has changed in between."""
    queue = UseQueue()
    for step, bags in enumerate([(4, 2), (4, 2), (1, 5, 3), (1, 5, 3), (2,)]):
        expected = []
        for n, p in zip(bags, picks, strict=False):
            values, rows, weights = draw(weighted_bag, n, p, 6, 5, dtype=torch.float32)
            weighted_bag(values, rows, weights, queue=queue).sum().backward()
            expected.append((rows.clone(), weights.detach().clone()))
            rows.zero_()
        uses = queue.take()
        for use, (rows, weights) in zip(uses, expected, strict=True):
            assert torch.equal(use.rows_np, rows) and torch.equal(use.weights_np, weights)
            assert use.grad_out_nv.shape == (len(rows), 5) and bool((use.grad_out_nv == 1).all())
        if len(set(picks)) == 1:
            whole = joined([use.grad_out_nv for use in uses])
            assert torch.equal(whole, torch.cat([use.grad_out_nv for use in uses]))
            together = whole.data_ptr() == uses[0].grad_out_nv.data_ptr()
            assert together == (step in (1, 3, 4))


def test_two_queues_in_one_graph() -> None:
    values, rows, weights = draw(weighted_bag, 4, 3, 6, 5)
    more, more_rows, _ = draw(weighted_bag, 4, 3, 8, 5)
    first, second = UseQueue(), UseQueue()
    out = weighted_bag(values, rows, weights, queue=first)
    out = out * weighted_bag(more, more_rows, weights, queue=second)
    out.sum().backward()
    assert torch.equal(first.take()[0].rows_np, rows)
    assert torch.equal(second.take()[0].rows_np, more_rows)


@both_ops
@pytest.mark.parametrize(
    ("values", "rows", "other", "says"),
    [
        (torch.zeros(4), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), "needed"),
        (torch.zeros(4, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3), "needed"),
        (torch.zeros(4, 3), torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3), "int64"),
        (torch.zeros(4, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4), "not fit"),
    ],
)
def test_shapes_that_do_not_fit(
    op: Op, plain: Op, values: Tensor, rows: Tensor, other: Tensor, says: str
) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        op(values, rows, other)
    assert "\n" not in str(caught.value)


@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", [6, -1, 10**12])
def test_rows_outside_the_table(op: Op, plain: Op, row: int, dtype: torch.dtype) -> None:
    """Never read: the kernel underneath would look at whatever lies there."""
    values, rows, other = draw(op, 4, 3, 6, 5, dtype=dtype)
    rows[2, 1] = row
    with pytest.raises(IndexError, match=rf"row {row} is not in the table: 0\.\.5 are"):
        op(values, rows, other)


class TestCustomOperators:
    """What torch asks of an operator that autograd, tracing and compilation treat as opaque."""

    @both_ops
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, op: Op, plain: Op, dtype: torch.dtype) -> None:
        values, rows, other = draw(op, 5, 3, 7, 4, dtype=dtype)
        name = op.__name__
        forward = getattr(torch.ops.strata, name).default
        backward = getattr(torch.ops.strata, f"{name}_backward").default
        # Sparse gradients cannot be traced; with a frozen table every other path is checked.
        torch.library.opcheck(forward, (values.detach(), rows, other, -1))
        grad = torch.randn_like(forward(values, rows, other, -1)).detach()
        torch.library.opcheck(backward, (grad, values.detach(), rows, other.detach(), -1))

    @both_ops
    def test_compiles_whole_with_a_queue(self, op: Op, plain: Op) -> None:
        values, rows, other = draw(op, 5, 3, 7, 4, dtype=torch.float32)
        queue, eager_queue = UseQueue(), UseQueue()
        compiled = self._compiled(lambda v, r, o: op(v, r, o, queue=queue).square())
        out = compiled(values, rows, other)
        out.sum().backward()
        grad, other.grad = other.grad, None
        expected = op(values, rows, other, queue=eager_queue).square()
        expected.sum().backward()
        assert torch.equal(out, expected)
        torch.testing.assert_close(grad, other.grad)
        assert len(queue) == 1
        compiled(values, rows, other).sum().backward()
        assert len(queue) == 2
        twice, once = reduce_uses(queue.take()), reduce_uses(eager_queue.take())
        torch.testing.assert_close(twice.grad_uv, 2 * once.grad_uv)

    @both_ops
    def test_compiles_whole_without_gradients(self, op: Op, plain: Op) -> None:
        values, rows, other = draw(op, 5, 3, 7, 4, dtype=torch.float32)
        queue = UseQueue()
        compiled = self._compiled(lambda v, r, o: op(v, r, o, queue=queue).square())
        with torch.no_grad():
            out = compiled(values, rows, other)
        assert torch.equal(out, op(values, rows, other).square())
        assert len(queue) == 0

    @both_ops
    @pytest.mark.parametrize("backend", ["eager", "aot_eager_decomp_partition"])
    def test_a_frozen_router_still_queues(self, op: Op, plain: Op, backend: str) -> None:
        """Only the table is trained: the backward operator's result is needed by nobody.

        Its use must be queued all the same; a compiler may not drop the operator as dead code.
        """
        values, rows, other = draw(op, 5, 3, 7, 4, dtype=torch.float32)
        other = other.detach()
        queue = UseQueue()
        run = self._compiled(lambda v, r, o: op(v, r, o, queue=queue).square().sum(), backend)
        run(values, rows, other).backward()
        assert len(queue) == 1
        compiled = reduce_uses(queue.take()).grad_uv
        op(values, rows, other, queue=queue).square().sum().backward()
        torch.testing.assert_close(compiled, reduce_uses(queue.take()).grad_uv)

    @both_ops
    @pytest.mark.parametrize("backend", ["eager", "aot_eager_decomp_partition"])
    def test_equal_uses_are_not_merged(self, op: Op, plain: Op, backend: str) -> None:
        """Two identical reads owe the table two gradients; a compiler may not find them common."""
        values, rows, other = draw(op, 5, 3, 7, 4, dtype=torch.float32)
        queue = UseQueue()

        def twice(v: Tensor, r: Tensor, o: Tensor) -> Tensor:
            return op(v, r, o, queue=queue).sum() + op(v, r, o, queue=queue).sum()

        self._compiled(twice, backend)(values, rows, other).backward()
        compiled = reduce_uses(queue.take()).grad_uv
        op(values, rows, other, queue=queue).sum().backward()
        torch.testing.assert_close(compiled, 2 * reduce_uses(queue.take()).grad_uv)

    def test_one_compiled_function_serves_many_queues(self) -> None:
        """The queue's number must not be frozen into the graph."""
        values, rows, weights = draw(weighted_bag, 5, 3, 7, 4, dtype=torch.float32)
        compiled = self._compiled(lambda v, r, w, q: weighted_bag(v, r, w, queue=q).square())
        queues = [UseQueue() for _ in range(4)]
        for queue in [*queues, queues[0]]:
            compiled(values, rows, weights, queue).sum().backward()
        assert [len(queue) for queue in queues] == [2, 1, 1, 1]

    @pytest.mark.slow
    @pytest.mark.parametrize("router", ["trained", "frozen"])
    def test_inductor(self, router: str) -> None:
        """As above, through code generation; caches off, for a stale graph would hide a fault."""
        values, rows, weights = draw(weighted_bag, 5, 3, 7, 4, dtype=torch.float32)
        weights = weights.detach().requires_grad_(router == "trained")
        queue = UseQueue()

        def twice(v: Tensor, r: Tensor, w: Tensor) -> Tensor:
            left = weighted_bag(v, r, w, queue=queue)
            return left.square().sum() + weighted_bag(v, r, w, queue=queue).square().sum()

        with torch.compiler.config.patch(force_disable_caches=True):
            self._compiled(twice, "inductor")(values, rows, weights).backward()
        compiled = reduce_uses(queue.take()).grad_uv
        weighted_bag(values, rows, weights, queue=queue).square().sum().backward()
        torch.testing.assert_close(compiled, 2 * reduce_uses(queue.take()).grad_uv)

    @staticmethod
    def _compiled(function: Callable[..., Tensor], backend: str = "aot_eager") -> Any:
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, backend=backend)
