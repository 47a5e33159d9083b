"""A value table of which each process of a group holds some columns.

Columns, not rows: whatever rows are hot, every process reads the same number of bytes. A bag costs
the group its picks (an all-gather of rows and weights) and its sums (an all-to-all); rows never
travel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strata.errors import ConfigError
from strata.layers.collectives import Group, gather, scatter_sum, to_columns, to_tokens
from strata.layers.values import ValueTable
from strata.ops.weighted_bag import row_dots, weighted_bag

ROWS_AT_ONCE = 4096  # a multiple of 16: torch draws whole blocks as it draws the whole


class ShardedTable(ValueTable):
    """The columns that this process holds of a table; `weight` is (r, v / g).

    Reads are collective: all processes of the group read with equally many bags, in one order.

    Args:
        num_rows: r.
        width: v of the whole table.
        group: the g processes that hold one copy.
        device, dtype: as for any module.

    Raises:
        ConfigError: the width cannot be split evenly.

    Source: "Memory Layers at Scale" (arXiv 2412.09764), section 2.2.
    """

    def __init__(
        self,
        num_rows: int,
        width: int,
        group: Group,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_columns(width, group.size())
        self._whole_width, self._group = width, group
        super().__init__(num_rows, width // group.size(), device=device, dtype=dtype)

    @property
    def width(self) -> int:
        """v of the whole table."""
        return self._whole_width

    @property
    def group(self) -> Group:
        """The processes that hold one copy of the table."""
        return self._group

    @property
    def columns(self) -> slice:
        """Which columns of the whole table these are."""
        count = self.width // self._group.size()
        return slice(self._group.rank() * count, (self._group.rank() + 1) * count)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw what a whole table would, and keep these columns: all ranks draw from one seed."""
        for rows in self.weight.split(ROWS_AT_ONCE):
            whole = rows.new_empty(len(rows), self.width).normal_(std=self.width**-0.5)
            rows.copy_(whole[:, self.columns])

    def bag(self, rows_np: Tensor, weights_np: Tensor) -> Tensor:
        rows_mp = self._all_rows(rows_np)
        weights_mp = gather(weights_np, self._group)
        sums_mc = weighted_bag(self.weight, rows_mp, weights_mp, queue=self.active_queue)
        return to_tokens(sums_mc, self._group)

    def dots(self, rows_np: Tensor, vectors_nv: Tensor) -> Tensor:
        vectors_mc = to_columns(vectors_nv, self._group)
        rows_mp = self._all_rows(rows_np)
        dots_mp = row_dots(self.weight, rows_mp, vectors_mc, queue=self.active_queue)
        return scatter_sum(dots_mp, self._group)

    def blocks(self, rows_per_block: int) -> list[Tensor]:
        raise TypeError("a process holds some columns of this table: save a checkpoint, open that")

    def _all_rows(self, rows_np: Tensor) -> Tensor:
        """All tokens' picks; four bytes each on the wire where that holds them."""
        small = self.num_rows <= 2**31
        sent = rows_np.to(torch.int32) if small else rows_np
        return gather(sent, self._group).to(torch.int64)


def check_columns(width: int, num_processes: int) -> None:
    """Refuse a group that cannot hold equal shares of a row.

    Raises:
        ConfigError: it cannot.
    """
    if width % num_processes:
        raise ConfigError(
            f"{num_processes} processes cannot share rows of {width} numbers evenly: give "
            "distributed.memory_group a divisor of that"
        )
