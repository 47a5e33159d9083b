"""Row-wise optimizers on a CPU: one pass that sums each row's uses, reads the row and writes it.

Same formulas as `reference.row_update`. The gradient is never held as a whole: it has as many
entries as the rows that were read have, and fresh memory of that size costs more than the sums.
Stochastic rounding draws its noise from a counter (seed, row, column), so it needs no memory and
does not depend on the threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from strata.ops.kernels import (
    as_array,
    kernel,
    prefetch,
    prefetch_row,
    row_noise,
    store,
    supported,
    widen,
)
from strata.ops.precision import accumulation_dtype
from strata.ops.row_update import reference
from strata.ops.row_update.reference import ALGORITHMS, TableGradients, UpdateRule
from strata.ops.threads import run_split
from strata.ops.weighted_bag.cpu import ReverseIndex, add_run, reverse_index, sum_runs
from strata.ops.weighted_bag.queue import Use, joined

_AHEAD = 4  # rows between asking for a row and changing it
_ADAGRAD, _ADAM = ALGORITHMS.index("adagrad"), ALGORITHMS.index("adam")


class QueuedGradients:
    """Gradient of a table that is summed where it is needed: a `RowGradients` in uses.

    Args:
        uses: at least one, all with the same number of picks per bag.

    Attributes:
        rows_u: rows that were read, (u,) int64, ascending, distinct.
    """

    def __init__(self, uses: Sequence[Use]) -> None:
        wide = accumulation_dtype(uses[0].grad_out_nv)
        rows_np = joined([use.rows_np for use in uses])
        weights_np = joined([use.weights_np for use in uses]).to(wide)
        self.num_picks = max(1, rows_np.shape[1])
        self.index = reverse_index(rows_np)
        self.weights_q = as_array(weights_np).reshape(-1)
        self.grad_out_nv = as_array(joined([use.grad_out_nv for use in uses]).to(wide))
        self.rows_u = torch.from_numpy(self.index.rows_u)
        self._squares: np.ndarray | None = None

    @classmethod
    def from_rows(cls, gradients: TableGradients) -> QueuedGradients:
        """The same gradient as uses: each row was used once."""
        one = torch.ones(len(gradients.rows_u), 1, dtype=gradients.grad_uv.dtype)
        return cls([Use(gradients.rows_u[:, None], one, gradients.grad_uv)])

    @cached_property
    def grad_uv(self) -> Tensor:
        """(u, v), fp32 or fp64; made when asked for."""
        grad_uv = torch.empty(len(self.rows_u), self.grad_out_nv.shape[1], dtype=self._dtype)
        self._split(sum_runs, as_array(grad_uv))
        return grad_uv

    def norm(self) -> Tensor:
        """Euclidean norm over all rows, 0-d fp64; free once the rows have been updated."""
        if self._squares is None:
            self._squares = np.empty(len(self.rows_u), self.grad_out_nv.dtype)
            self._split(_square, self._squares)
        return torch.from_numpy(self._squares).sum(dtype=torch.float64).sqrt()

    def update(self, values_rv: Tensor, state: dict[str, Tensor], rule: UpdateRule) -> None:
        """Change the rows that were read; see `row_update`."""
        wide = np.float64 if accumulation_dtype(values_rv) == torch.float64 else np.float32
        nothing = torch.empty(0, 0)  # where an algorithm has no such state
        names = {"adagrad": ("square_sum",), "adam": ("exp_avg", "exp_avg_sq")}
        rows = [state[name].view(len(values_rv), -1) for name in names.get(rule.algorithm, ())]
        rows += [nothing, nothing]
        self._squares = np.empty(len(self.rows_u), self.grad_out_nv.dtype)
        self._split(
            _update,
            self._squares,
            as_array(values_rv),
            self.index.rows_u,
            ALGORITHMS.index(rule.algorithm),
            as_array(rows[0]),
            as_array(rows[1]),
            as_array(state.get("steps", torch.empty(0))),
            wide(rule.scale),
            wide(rule.lr),
            wide(rule.eps),
            np.float32(rule.betas[0]),
            np.float32(rule.betas[1]),
            np.uint64(rule.noise_seed(values_rv)),
        )

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.grad_out_nv.dtype == np.float64 else torch.float32

    def _split(self, kernel: object, *arguments: object) -> None:
        index: ReverseIndex = self.index
        row_bytes = self.grad_out_nv.shape[1] * self.grad_out_nv.itemsize
        run_split(
            kernel,  # type: ignore[arg-type]
            index.bounds(bytes_per_pick=2 * row_bytes),
            index.starts,
            index.order,
            self.num_picks,
            self.weights_q,
            self.grad_out_nv,
            *arguments,
        )


def collect_uses(uses: Sequence[Use]) -> TableGradients:
    """See `strata.ops.row_update.collect_uses`; all uses have as many picks per bag."""
    if supported(*(use.grad_out_nv for use in uses)):
        return QueuedGradients(uses)
    return reference.reduce_uses(uses)


def row_update(
    values_rv: Tensor, state: dict[str, Tensor], gradients: TableGradients, rule: UpdateRule
) -> None:
    """See `strata.ops.row_update`."""
    if not supported(values_rv, *state.values()):
        return reference.row_update(values_rv, state, gradients, rule)
    if not isinstance(gradients, QueuedGradients):
        gradients = QueuedGradients.from_rows(gradients)
    if len(gradients.rows_u):
        gradients.update(values_rv, state, rule)


@kernel
def _square(starts, order, num_picks, weights, grad_out, squares, start, stop):  # type: ignore[no-untyped-def]
    """Squared length of each row's gradient."""
    width = grad_out.shape[1]
    total, part = np.empty(width, squares.dtype), np.empty(width, squares.dtype)
    for u in range(start, stop):
        add_run(starts[u], starts[u + 1], order, num_picks, weights, grad_out, part, total)
        square = squares.dtype.type(0)
        for j in range(width):
            square += total[j] * total[j]
        squares[u] = square


@kernel
def _update(  # type: ignore[no-untyped-def]
    starts,
    order,
    num_picks,
    weights,
    grad_out,
    squares,
    values,
    rows,
    algorithm,
    first,
    second,
    steps,
    scale,
    lr,
    eps,
    beta1,
    beta2,
    seed,
    start,
    stop,
):
    """Sum a row's uses, and move the row: first and second are the optimizer's state by row."""
    width = values.shape[1]
    one = np.float32(1)
    total, part = np.empty(width, squares.dtype), np.empty(width, squares.dtype)
    base, row_bytes = np.uint64(values.ctypes.data), width * values.itemsize
    first_base, second_base = np.uint64(first.ctypes.data), np.uint64(second.ctypes.data)
    for u in range(start, stop):
        if u + _AHEAD < stop:
            ahead = rows[u + _AHEAD]
            prefetch_row(base, ahead, row_bytes)
            if algorithm == _ADAGRAD:
                prefetch(first_base + np.uint64(ahead) * np.uint64(first.itemsize))
            if algorithm == _ADAM:
                prefetch_row(first_base, ahead, width * first.itemsize)
                prefetch_row(second_base, ahead, width * second.itemsize)
        number = np.uint64(rows[u])
        row, noise = values[number], row_noise(seed, number)
        add_run(starts[u], starts[u + 1], order, num_picks, weights, grad_out, part, total)
        square = squares.dtype.type(0)
        for j in range(width):
            square += total[j] * total[j]
        squares[u] = square
        if algorithm == _ADAM:
            mean, mean_square = first[number], second[number]
            steps[number] += one
            mean_share = one - beta1 ** steps[number]
            square_share = one - beta2 ** steps[number]
            for j in range(width):
                gradient = scale * total[j]
                mean[j] += (one - beta1) * (gradient - mean[j])
                mean_square[j] += (one - beta2) * (gradient * gradient - mean_square[j])
                step = (mean[j] / mean_share) / (np.sqrt(mean_square[j] / square_share) + eps)
                store(row, j, widen(row[j]) - lr * step, noise)
        else:
            factor = lr * scale
            if algorithm == _ADAGRAD:
                first[number, 0] += scale * scale * square / squares.dtype.type(width)
                factor = factor / (np.sqrt(first[number, 0]) + eps)
            for j in range(width):
                store(row, j, widen(row[j]) - factor * total[j], noise)
