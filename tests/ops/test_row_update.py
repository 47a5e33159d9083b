"""Row-wise updates against plain per-row formulas in float64, and what must not change at all."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strata.ops import RowGradients, Use, reduce_uses, row_update
from strata.ops.row_update import ALGORITHMS, new_state

LR, BETAS, EPS = 0.03, (0.9, 0.95), 1e-8

each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def draw_use(n: int, p: int, r: int, v: int, *, dtype: torch.dtype = torch.float32) -> Use:
    return Use(
        torch.randint(0, r, (n, p)), torch.randn(n, p, dtype=dtype), torch.randn(n, v, dtype=dtype)
    )


def dense_gradient(uses: Sequence[Use], r: int, v: int) -> Tensor:
    """One pick at a time, in float64."""
    dense = torch.zeros(r, v, dtype=torch.float64)
    for use in uses:
        for n in range(use.rows_np.shape[0]):
            for p in range(use.rows_np.shape[1]):
                row = int(use.rows_np[n, p])
                dense[row] += use.weights_np[n, p].double() * use.grad_out_nv[n].double()
    return dense


class DenseRows:
    """The three algorithms on one dense float64 table, a row at a time."""

    def __init__(self, values: Tensor, algorithm: str) -> None:
        self.values = values.double().clone()
        self.algorithm = algorithm
        self.square_sum = torch.zeros(len(values), dtype=torch.float64)
        self.mean = torch.zeros_like(self.values)
        self.square = torch.zeros_like(self.values)
        self.steps = [0] * len(values)

    def step(self, uses: Sequence[Use], *, scale: float = 1.0) -> None:
        gradient = dense_gradient(uses, *self.values.shape) * scale
        for row in sorted({int(i) for use in uses for i in use.rows_np.flatten()}):
            self.values[row] -= LR * self._direction(row, gradient[row])

    def _direction(self, row: int, gradient_v: Tensor) -> Tensor:
        if self.algorithm == "sgd":
            return gradient_v
        if self.algorithm == "adagrad":
            self.square_sum[row] += (gradient_v**2).mean()
            return gradient_v / (self.square_sum[row].sqrt() + EPS)
        self.steps[row] += 1
        self.mean[row] = BETAS[0] * self.mean[row] + (1 - BETAS[0]) * gradient_v
        self.square[row] = BETAS[1] * self.square[row] + (1 - BETAS[1]) * gradient_v**2
        mean_v = self.mean[row] / (1 - BETAS[0] ** self.steps[row])
        square_v = self.square[row] / (1 - BETAS[1] ** self.steps[row])
        return mean_v / (square_v.sqrt() + EPS)


def update(values: Tensor, state: dict[str, Tensor], uses: Sequence[Use], **kwargs: object) -> None:
    options: dict[str, object] = {"lr": LR, "betas": BETAS, "eps": EPS}
    row_update(values, state, reduce_uses(uses), **(options | kwargs))  # type: ignore[arg-type]


# fp64 tables keep fp32 state, so Adagrad and Adam are good to 1e-6 there; SGD has no state. fp32:
# a few dozen roundings of numbers near 1.
@each_algorithm
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)], ids=["fp32", "fp64"]
)
def test_several_steps_of_several_layers(
    algorithm: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Layers differ in tokens and in picks per bag; rows are read in some steps only."""
    r, v = 23, 7
    values = torch.randn(r, v, dtype=dtype)
    truth = DenseRows(values, algorithm)
    state = new_state(values, algorithm=algorithm)
    for _ in range(6):
        uses = [draw_use(n, p, r, v, dtype=dtype) for n, p in ((3, 2), (1, 5), (4, 1))]
        truth.step(uses, scale=0.5)
        update(values, state, uses, algorithm=algorithm, scale=0.5)
    if dtype == torch.float64 and algorithm == "sgd":
        tolerance = 1e-12
    torch.testing.assert_close(values.double(), truth.values, atol=tolerance, rtol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    algorithm=st.sampled_from(ALGORITHMS),
    r=st.integers(1, 9),
    v=st.integers(1, 6),
    sizes=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_any_shape(algorithm: str, r: int, v: int, sizes: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.randn(r, v, dtype=torch.float64)
    truth = DenseRows(values, algorithm)
    state = new_state(values, algorithm=algorithm)
    for _ in range(2):
        uses = [draw_use(n, p, r, v, dtype=torch.float64) for n, p in sizes]
        truth.step(uses)
        update(values, state, uses, algorithm=algorithm)
    # Adagrad's and Adam's state is fp32.
    torch.testing.assert_close(values, truth.values, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("algorithm", ["adam", "sgd"])
def test_equals_torch_where_every_row_is_read(algorithm: str) -> None:
    """With all rows in each step laziness makes no difference: torch's optimizers are the truth."""
    r, v = 5, 6
    values = torch.randn(r, v)
    parameter = torch.nn.Parameter(values.clone())
    dense = (
        torch.optim.Adam([parameter], lr=LR, betas=BETAS, eps=EPS)
        if algorithm == "adam"
        else torch.optim.SGD([parameter], lr=LR)
    )
    state = new_state(values, algorithm=algorithm)
    for _ in range(5):
        use = Use(torch.arange(r)[:, None], torch.ones(r, 1), torch.randn(r, v))
        parameter.grad = use.grad_out_nv.clone()
        dense.step()
        update(values, state, [use], algorithm=algorithm)
    torch.testing.assert_close(values, parameter.detach(), atol=1e-6, rtol=1e-5)  # fp32 rounding


@each_algorithm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_that_were_not_read_stay_bit_identical(algorithm: str, dtype: torch.dtype) -> None:
    """Also once they have momentum: no drift."""
    r, v = 12, 5
    values = torch.randn(r, v).to(dtype)
    state = new_state(values, algorithm=algorithm)
    everything = Use(torch.arange(r)[:, None], torch.ones(r, 1), torch.randn(r, v))
    update(values, state, [everything], algorithm=algorithm)
    rest = [i for i in range(r) if i not in (2, 7)]
    for _ in range(4):
        before, state_before = values.clone(), copy.deepcopy(state)
        use = Use(torch.tensor([[2, 7], [7, 7]]), torch.ones(2, 2), torch.randn(2, v))
        update(values, state, [use], algorithm=algorithm, rounding="stochastic")
        assert torch.equal(values[rest], before[rest])
        assert not torch.equal(values[[2, 7]], before[[2, 7]])
        for name, tensor in state.items():
            assert torch.equal(tensor[rest], state_before[name][rest])


@each_algorithm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_learning_rate_of_zero_changes_no_bit(algorithm: str, dtype: torch.dtype) -> None:
    values = torch.randn(9, 5, dtype=torch.float64).to(dtype)
    before = values.clone()
    state = new_state(values, algorithm=algorithm)
    for rounding in ("nearest", "stochastic"):
        use = draw_use(6, 3, 9, 5)
        update(values, state, [use], algorithm=algorithm, lr=0.0, rounding=rounding)
        assert torch.equal(values, before)


@each_algorithm
def test_a_zero_gradient_gives_no_nan(algorithm: str) -> None:
    values = torch.randn(4, 3)
    before = values.clone()
    use = Use(torch.tensor([[1, 2]]), torch.zeros(1, 2), torch.randn(1, 3))
    update(values, new_state(values, algorithm=algorithm), [use], algorithm=algorithm)
    assert torch.equal(values, before)


@each_algorithm
def test_uses_without_rows_change_nothing(algorithm: str) -> None:
    values = torch.randn(4, 3)
    before = values.clone()
    use = Use(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), torch.zeros(0, 3))
    gradients = reduce_uses([use])
    assert float(gradients.norm()) == 0.0
    row_update(
        values,
        new_state(values, algorithm=algorithm),
        gradients,
        algorithm=algorithm,  # type: ignore[arg-type]
        lr=1.0,
    )
    assert torch.equal(values, before)


@each_algorithm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_repeat_bit_for_bit_whatever_the_threads(
    algorithm: str, dtype: torch.dtype
) -> None:
    r, v = 60, 33
    start = torch.randn(r, v).to(dtype)
    uses = [draw_use(200, 8, r, v), draw_use(150, 3, r, v)]
    results = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        values = start.clone()
        state = new_state(values, algorithm=algorithm)
        generator = torch.Generator().manual_seed(3)
        for _ in range(2):
            update(
                values,
                state,
                uses,
                algorithm=algorithm,
                rounding="stochastic",
                generator=generator,
            )
        results.append(values)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@each_algorithm
@pytest.mark.parametrize("row", [-1, 6, 10**12])
@pytest.mark.parametrize("columns_first", [False, True])
def test_rows_outside_the_table_change_nothing(
    algorithm: str, row: int, columns_first: bool
) -> None:
    values = torch.randn(4, 6).T if columns_first else torch.randn(6, 4)
    before = values.clone()
    state = new_state(values, algorithm=algorithm)
    rows = torch.tensor([2, row]).sort().values
    gradients = RowGradients(rows, torch.ones(2, 4))
    with pytest.raises(IndexError, match=rf"row {row} is not in the table: 0\.\.5 are"):
        row_update(values, state, gradients, algorithm=algorithm, lr=1.0)  # type: ignore[arg-type]
    assert torch.equal(values, before)
    assert not any(tensor.any() for tensor in state.values())


class TestReduceUses:
    def test_rows_are_ascending_and_distinct(self) -> None:
        uses = [draw_use(5, 4, 9, 3), draw_use(2, 7, 9, 3)]
        gradients = reduce_uses(uses)
        assert (gradients.rows_u.diff() > 0).all()
        dense = torch.zeros(9, 3, dtype=torch.float64)
        dense[gradients.rows_u] = gradients.grad_uv.double()
        expected = dense_gradient(uses, 9, 3)
        torch.testing.assert_close(dense, expected, atol=1e-5, rtol=1e-5)  # fp32 sums
        assert float(gradients.norm()) == pytest.approx(float(expected.norm()), rel=1e-5)

    @pytest.mark.parametrize("shape", [(5_000_000, 1), (20_000, 250), (1, 5_000)])
    def test_the_norm_does_not_drift(self, shape: tuple[int, int]) -> None:
        """One running fp32 sum over five million entries loses 1e-4."""
        grad_uv = torch.randn(shape)
        norm = RowGradients(torch.arange(shape[0]), grad_uv).norm()
        assert float(norm) == pytest.approx(float(grad_uv.double().norm()), rel=1e-6)

    def test_nothing_of_the_tables_size_is_made(self) -> None:
        far = Use(torch.tensor([[2**40]]), torch.ones(1, 1), torch.ones(1, 3))
        gradients = reduce_uses([far])
        assert gradients.rows_u.tolist() == [2**40] and gradients.grad_uv.shape == (1, 3)

    def test_no_uses(self) -> None:
        with pytest.raises(ValueError, match="not read"):
            reduce_uses([])


class TestStochasticRounding:
    def one_step(self, value: float, gradient: float, count: int, *, rounding: str) -> Tensor:
        """SGD of lr 1 on a (count, 1) bf16 table filled with `value`."""
        values = torch.full((count, 1), value, dtype=torch.bfloat16)
        gradients = RowGradients(torch.arange(count), torch.full((count, 1), gradient))
        row_update(
            values,
            {},
            gradients,
            algorithm="sgd",
            lr=1.0,
            rounding=rounding,  # type: ignore[arg-type]
            generator=torch.Generator().manual_seed(1),
        )
        return values.double().flatten()

    @pytest.mark.parametrize("value", [1.0, -1.0, 0.75, -3.140625, 1e-20, 0.0])
    @pytest.mark.parametrize("share", [0.03, 0.55, 0.9, -0.2])
    def test_it_is_unbiased(self, value: float, share: float) -> None:
        """The mean of many draws is the unrounded number; each draw is one of its neighbours."""
        count = 40_000
        spacing = 2.0**-7 * 2.0 ** torch.tensor(abs(value) or 1e-30).log2().floor().item()
        gradient = float(torch.tensor(share * spacing))
        wide = float(torch.tensor(value, dtype=torch.bfloat16)) - gradient
        drawn = self.one_step(value, gradient, count, rounding="stochastic")
        assert len(drawn.unique()) == 2
        assert drawn.min() < wide < drawn.max()
        assert drawn.max() - drawn.min() <= spacing * 1.001
        # A draw deviates by at most half a spacing; five deviations of the mean of 40,000.
        assert abs(float(drawn.mean()) - wide) < 5 * 0.5 * spacing / count**0.5

    def test_columns_are_rounded_independently(self) -> None:
        """Up or down in one column says nothing about its neighbours, near or far."""
        rows, width = 20_000, 40
        values = torch.ones(rows, width, dtype=torch.bfloat16)
        gradients = RowGradients(torch.arange(rows), torch.full((rows, width), -0.4 * 2.0**-7))
        row_update(values, {}, gradients, algorithm="sgd", lr=1.0, rounding="stochastic")
        up = (values > 1).double() - 0.4
        for lag in (1, 2, 16, 32):
            correlation = float((up[:, lag:] * up[:, :-lag]).mean()) / (0.4 * 0.6)
            # Pairs of one row share its two numbers, so rows count: five deviations of their mean.
            assert abs(correlation) < 5 / rows**0.5
            assert abs(float((up[lag:] * up[:-lag]).mean())) / (0.4 * 0.6) < 5 / rows**0.5

    def test_small_updates_survive_where_nearest_loses_them(self) -> None:
        small = 2.0**-12  # a thirty-second of the spacing of bf16 at 1
        assert (self.one_step(1.0, small, 1000, rounding="nearest") == 1.0).all()
        values = torch.ones(1000, 1, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(1)
        gradients = RowGradients(torch.arange(1000), torch.full((1000, 1), small))
        for _ in range(256):
            row_update(
                values,
                {},
                gradients,
                algorithm="sgd",
                lr=1.0,
                rounding="stochastic",
                generator=generator,
            )
        # 256 steps of 2**-12 are a sixteenth; 1,000 random walks of deviation < 2**-4 average out.
        assert float(values.double().mean()) == pytest.approx(1 - 2**-4, abs=0.004)

    def test_infinities_and_nan_stay_what_they_are(self) -> None:
        for gradient in (float("inf"), float("-inf"), float("nan")):
            found = self.one_step(1.0, gradient, 100, rounding="stochastic")
            wanted = torch.full((100,), 1.0 - gradient, dtype=torch.float64)
            torch.testing.assert_close(found, wanted, equal_nan=True)

    def test_only_for_bf16(self) -> None:
        gradients = RowGradients(torch.arange(2), torch.ones(2, 3))
        with pytest.raises(ValueError, match="bfloat16"):
            row_update(
                torch.ones(2, 3, dtype=torch.float16),
                {},
                gradients,
                algorithm="sgd",
                lr=1.0,
                rounding="stochastic",
            )


def test_unknown_algorithm() -> None:
    with pytest.raises(ValueError, match="adagrad, adam, sgd"):
        new_state(torch.zeros(2, 2), algorithm="adamax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="adagrad, adam, sgd"):
        row_update(
            torch.zeros(2, 2),
            {},
            RowGradients(torch.arange(2), torch.ones(2, 2)),
            algorithm="adamax",  # type: ignore[arg-type]
            lr=1.0,
        )
