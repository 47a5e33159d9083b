"""The row optimizer of tables that several processes share.

Within a memory group every process has the picks of all the group's tokens, so the gradients of its
columns are whole. Replicas exchange what their tokens asked for: distinct rows and their gradients,
nothing of rows that were not read; or all rows, some at a time, where they read so many that this
costs less. A row's squared gradient, which clipping and Adagrad need over
all columns, is one number a row to the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from strata.layers import ValueTable
from strata.layers.collectives import all_gather
from strata.ops import row_update
from strata.ops.row_update import RowGradients, reduce_uses
from strata.ops.weighted_bag import Use, row_gradients
from strata.train.optim import RowOptimizer
from strata.train.world import World

ROWS_AT_ONCE = 1 << 16


class ShardedRowOptimizer(RowOptimizer):
    """`RowOptimizer` over the columns of this process; every process steps at the same time.

    Args:
        tables: the tables to train, whole or sharded over the world's memory group.
        world: the processes.
        options: as of `RowOptimizer`.
    """

    def __init__(self, tables: Sequence[ValueTable], world: World, **options: Any) -> None:
        super().__init__(tables, **options)
        self._world = world

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every row that any process read since the last step, then forget the uses."""
        if closure is not None:
            raise TypeError("a step over several processes takes no closure: call it before")
        gradients = [(table, self._gradients(table, table.queue.take())) for table in self.tables]
        squares = [self._squares(gradient) for _, gradient in gradients]
        self.rows_updated = sum(len(gradient.rows_u) for _, gradient in gradients)
        self.grad_norm = float(torch.stack([u.double().sum() for u in squares]).sum().sqrt())
        scale = 1.0
        if self.max_norm is not None:
            scale = min(1.0, self.max_norm / max(self.grad_norm, 1e-30))
        group = self.param_groups[0]
        self._steps += 1
        for number, ((table, gradient), squares_u) in enumerate(
            zip(gradients, squares, strict=True)
        ):
            algorithm, state = group["algorithm"], self.state[table.weight]
            if not len(gradient.rows_u):
                continue
            if algorithm == "adagrad":
                # By hand, for the mean is over columns that are elsewhere too.
                total_u = state["square_sum"][gradient.rows_u]
                total_u = total_u + (squares_u * scale**2 / table.width).float()
                state["square_sum"][gradient.rows_u] = total_u
                root_u = total_u.sqrt() + group["eps"]
                gradient = RowGradients(gradient.rows_u, gradient.grad_uv / root_u[:, None])
                algorithm = "sgd"
            row_update(
                table.weight,
                {} if algorithm == "sgd" else state,
                gradient,
                algorithm=algorithm,
                lr=group["lr"],
                scale=scale,
                betas=group["betas"],
                eps=group["eps"],
                rounding=group["rounding"],
                generator=self._generator(table, number),
            )

    def _gradients(self, table: ValueTable, uses: list[Use]) -> RowGradients:
        """Over the tokens of all replicas, of the columns that this process holds."""
        if uses:
            own = reduce_uses(uses)
        else:
            rows_u = torch.empty(0, dtype=torch.int64, device=table.weight.device)
            own = RowGradients(rows_u, table.weight.new_empty(0, table.weight.shape[1]))
        group = self._world.replica_group
        return own if group is None else together(own, group, num_rows=table.num_rows)

    def _squares(self, gradient: RowGradients) -> Tensor:
        """(u,): squared norm of each row's gradient over all columns."""
        squares_u = gradient.grad_uv.square().sum(1)
        if self._world.memory_group is not None:
            dist.all_reduce(squares_u, group=self._world.memory_group)
        return squares_u

    def _generator(self, table: ValueTable, number: int) -> torch.Generator | None:
        """As of a whole table, but columns that lie apart draw apart, and replicas alike."""
        generator = super()._generator(table, number)
        group = self._world.memory_group
        if generator is not None and group is not None:
            generator.manual_seed(generator.initial_seed() * 1_009 + group.rank())
        return generator


def together(own: RowGradients, group: dist.ProcessGroup, *, num_rows: int) -> RowGradients:
    """The sum of what every replica owes to each row of a table; the same bits in all of them."""
    counts = own.rows_u.new_empty(group.size())
    all_gather(counts, own.rows_u.new_tensor([len(own.rows_u)]), group=group)
    lengths = counts.tolist()
    if not max(lengths):
        return own
    if adds_up_all(max(lengths), replicas=group.size(), num_rows=num_rows):
        return add_up_all(own, group, num_rows=num_rows)
    return add_up_read(own, group, lengths)


def adds_up_all(longest: float, *, replicas: int, num_rows: int) -> bool:
    """Whether a ring over all rows sends less than handing the read ones to all replicas.

    A ring sends each row twice in parts of 1 / replicas; the other way, `longest` rows go to each.
    """
    return replicas * longest > 2 * num_rows


def add_up_read(
    own: RowGradients, group: dist.ProcessGroup, lengths: Sequence[int]
) -> RowGradients:
    """The sum over replicas, of whose rows each is handed to all."""
    longest = max(lengths)
    rows = _gathered(own.rows_u.to(torch.int32), longest, group)
    grads = _gathered(own.grad_uv, longest, group)
    rows_m = torch.cat([part[:n] for part, n in zip(rows, lengths, strict=True)]).to(torch.int64)
    grads_mv = torch.cat([part[:n] for part, n in zip(grads, lengths, strict=True)])
    ones_m1 = torch.ones_like(grads_mv[:, :1])
    return RowGradients(*row_gradients(rows_m[:, None], ones_m1, grads_mv))


def add_up_all(own: RowGradients, group: dist.ProcessGroup, *, num_rows: int) -> RowGradients:
    """The same over all rows, `ROWS_AT_ONCE` at a time, so that no gradient has a table's size."""
    v = own.grad_uv.shape[1]
    starts = torch.arange(0, num_rows + ROWS_AT_ONCE, ROWS_AT_ONCE, device=own.rows_u.device)
    bounds = torch.searchsorted(own.rows_u, starts).tolist()
    rows, grads = [], []
    for number, (first, last) in enumerate(pairwise(bounds)):
        start = number * ROWS_AT_ONCE
        mine = own.rows_u[first:last] - start
        sums = own.grad_uv.new_zeros(min(ROWS_AT_ONCE, num_rows - start), v + 1)
        sums[mine, :v] = own.grad_uv[first:last]
        sums[mine, v] = 1  # was read
        dist.all_reduce(sums, group=group)
        read = sums[:, v].nonzero().squeeze(1)
        rows.append(read + start)
        grads.append(sums[read, :v])
    return RowGradients(torch.cat(rows), torch.cat(grads))


def _gathered(part: Tensor, longest: int, group: dist.ProcessGroup) -> Tensor:
    """(replicas, longest, ...), each filled up behind its own."""
    padded = part.new_zeros(longest, *part.shape[1:])
    padded[: len(part)] = part
    whole = part.new_empty(group.size() * longest, *part.shape[1:])
    all_gather(whole, padded, group=group)
    return whole.unflatten(0, (group.size(), longest))
