"""Row-wise optimizers on a GPU, in Triton: one program sums a row's uses and moves the row.

Same formulas as `reference.row_update`. Rows with very many uses are summed in parts beforehand,
all others while they are updated; of the gradient only those few rows are ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from strata.ops.precision import accumulation_dtype
from strata.ops.row_update.reference import ALGORITHMS, TableGradients, UpdateRule
from strata.ops.weighted_bag.queue import Use
from strata.ops.weighted_bag.triton import LONG_RUN, ReverseIndex, reverse_index, sum_runs

_ADAGRAD = tl.constexpr(ALGORITHMS.index("adagrad"))
_ADAM = tl.constexpr(ALGORITHMS.index("adam"))


class QueuedGradients:
    """Gradient of a table that is summed where it is needed; see `cpu.QueuedGradients`.

    Args:
        uses: at least one, all with the same number of picks per bag.
    """

    def __init__(self, uses: Sequence[Use]) -> None:
        wide = accumulation_dtype(uses[0].grad_out_nv)
        rows_np = torch.cat([use.rows_np for use in uses])
        self.weights_np = torch.cat([use.weights_np for use in uses]).to(wide)
        self.grad_out_nv = torch.cat([use.grad_out_nv for use in uses]).to(wide)
        self.index = reverse_index(rows_np)
        self.rows_u = self.index.rows_u
        self._squares: Tensor | None = None

    @classmethod
    def from_rows(cls, gradients: TableGradients) -> QueuedGradients:
        """The same gradient as uses: each row was used once."""
        grad_uv = gradients.grad_uv
        ones = torch.ones(len(grad_uv), 1, dtype=grad_uv.dtype, device=grad_uv.device)
        return cls([Use(gradients.rows_u[:, None], ones, grad_uv)])

    @cached_property
    def grad_uv(self) -> Tensor:
        """(u, v), fp32 or fp64; made when asked for."""
        return sum_runs(self.index, self.weights_np, self.grad_out_nv)

    def norm(self) -> Tensor:
        """Euclidean norm over all rows, 0-d fp64; free once the rows have been updated."""
        if self._squares is None:
            self._launch(self.grad_out_nv, {}, UpdateRule("sgd", lr=0.0), only_squares=True)
        assert self._squares is not None
        return self._squares.sum(dtype=torch.float64).sqrt()

    def update(self, values_rv: Tensor, state: dict[str, Tensor], rule: UpdateRule) -> None:
        """Change the rows that were read; see `strata.ops.row_update`."""
        self._launch(values_rv, state, rule, only_squares=False)

    def _launch(
        self,
        values_rv: Tensor,
        state: dict[str, Tensor],
        rule: UpdateRule,
        *,
        only_squares: bool,
    ) -> None:
        seed = 0 if only_squares else rule.noise_seed(values_rv)
        index, grad_out, weights = self.index, self.grad_out_nv, self.weights_np
        u, v = len(index.rows_u), grad_out.shape[1]
        self._squares = torch.zeros(u, dtype=grad_out.dtype, device=grad_out.device)
        if u == 0:
            return
        names = {"adagrad": ("square_sum",), "adam": ("exp_avg", "exp_avg_sq", "steps")}
        states = [state[name] for name in names.get(rule.algorithm, ()) if name in state]
        states += [grad_out] * (3 - len(states))  # not touched
        long_l = (index.starts.diff() > LONG_RUN).nonzero().squeeze(1)
        runs = [(index, weights, grad_out, self._squares, LONG_RUN)]
        if len(long_l):
            # Their sums, in parts; then they are rows with one use each.
            counts_l = index.starts.diff()[long_l]
            ends_l = counts_l.cumsum(0)
            inside = torch.arange(int(ends_l[-1]), device=ends_l.device)
            inside -= (ends_l - counts_l).repeat_interleave(counts_l)
            places = index.starts[long_l].repeat_interleave(counts_l) + inside
            starts_l = torch.cat([ends_l.new_zeros(1), ends_l])
            part = ReverseIndex(
                index.rows_u[long_l], starts_l, index.order[places], index.num_picks
            )
            sums_lv = sum_runs(part, weights, grad_out)
            ones = torch.ones(len(long_l), 1, dtype=grad_out.dtype, device=grad_out.device)
            each = torch.arange(len(long_l) + 1, device=grad_out.device)
            squares_l = self._squares.new_zeros(len(long_l))
            trivial = ReverseIndex(part.rows_u, each, each[:-1], 1)
            runs.append((trivial, ones, sums_lv, squares_l, LONG_RUN))
        for of, weights_np, grad, squares, longest in runs:
            _update[(len(of.rows_u),)](
                values_rv,
                of.rows_u,
                of.starts,
                of.order,
                weights_np,
                grad,
                squares,
                *states,
                of.num_picks,
                v,
                longest,
                rule.lr,
                rule.scale,
                *rule.betas,
                rule.eps,
                seed,
                ALGORITHM=ALGORITHMS.index(rule.algorithm),
                STOCHASTIC=seed != 0,
                ONLY_SQUARES=only_squares,
                TILE=triton.next_power_of_2(v),
                WIDE=tl.float64 if grad.dtype == torch.float64 else tl.float32,
            )
        if len(long_l):
            self._squares[long_l] = runs[1][3]


def collect_uses(uses: Sequence[Use]) -> TableGradients:
    """See `strata.ops.row_update.collect_uses`; all uses have as many picks per bag."""
    return QueuedGradients(uses)


def row_update(
    values_rv: Tensor, state: dict[str, Tensor], gradients: TableGradients, rule: UpdateRule
) -> None:
    """See `strata.ops.row_update`."""
    if not isinstance(gradients, QueuedGradients):
        gradients = QueuedGradients.from_rows(gradients)
    gradients.update(values_rv, state, rule)


@triton.jit
def _update(  # type: ignore[no-untyped-def]
    values,
    rows,
    starts,
    order,
    weights,
    grad_out,
    squares,
    first,
    second,
    steps,
    num_picks,
    width,
    longest,
    lr,
    scale,
    beta1,
    beta2,
    eps,
    seed,
    ALGORITHM: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ONLY_SQUARES: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    u = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(starts + u), tl.load(starts + u + 1)
    if end - begin <= longest:
        columns = tl.arange(0, TILE)
        inside = columns < width
        total = tl.zeros((TILE,), WIDE)
        for place in range(begin, end):
            pick = tl.load(order + place)
            weight = tl.load(weights + pick).to(WIDE)
            grad = tl.load(grad_out + (pick // num_picks) * width + columns, mask=inside, other=0)
            total += weight * grad.to(WIDE)
        square = tl.sum(total * total, axis=0)
        tl.store(squares + u, square)
        if not ONLY_SQUARES:
            row = tl.load(rows + u)
            at = row * width + columns
            old = tl.load(values + at, mask=inside, other=0)
            grad = total * scale
            if ALGORITHM == _ADAM:
                step = tl.load(steps + row) + 1
                tl.store(steps + row, step)
                mean = tl.load(first + at, mask=inside, other=0)
                mean_square = tl.load(second + at, mask=inside, other=0)
                mean += (1 - beta1) * (grad.to(tl.float32) - mean)
                mean_square += (1 - beta2) * ((grad * grad).to(tl.float32) - mean_square)
                tl.store(first + at, mean, mask=inside)
                tl.store(second + at, mean_square, mask=inside)
                # beta ** step, through exp2: Triton has no power
                mean_share = 1 - tl.exp2(step * tl.log2(beta1))
                square_share = 1 - tl.exp2(step * tl.log2(beta2))
                move = (mean / mean_share) / (tl.sqrt(mean_square / square_share) + eps)
                move = move.to(WIDE)
            elif ALGORITHM == _ADAGRAD:
                seen = tl.load(first + row) + (square * scale * scale / width).to(tl.float32)
                tl.store(first + row, seen)
                move = grad / (tl.sqrt(seen.to(WIDE)) + eps)
            else:
                move = grad
            new = old.to(WIDE) - lr * move
            if STOCHASTIC:
                new = _round_stochastically(new, seed, at)
            tl.store(values + at, new.to(values.dtype.element_ty), mask=inside)


@triton.jit
def _round_stochastically(number, seed, at):  # type: ignore[no-untyped-def]
    """fp32 to an fp32 that bf16 holds exactly: add a random lower half, then cut it off."""
    bits = number.to(tl.int32, bitcast=True)
    noise = tl.randint(seed, at.to(tl.int32)).to(tl.int32) & 0xFFFF
    cut = ((bits + noise) & -65536).to(tl.float32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, cut, number)
