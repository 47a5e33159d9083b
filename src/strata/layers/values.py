"""The value table: rows of knowledge, one object handed to all layers that share it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from strata.ops.pages import use_huge_pages
from strata.ops.weighted_bag import UseQueue, row_dots, weighted_bag


class Factory(TypedDict):
    """Where new weights go: the two keyword arguments of torch's module constructors."""

    device: torch.device | str | None
    dtype: torch.dtype | None


class RowTable(nn.Module, ABC):
    """What memory layers read: rows, however they are stored.

    `ValueTable` is the one that trains; `strata.layers.stored` and `mapped` hold the others.

    Attributes:
        storage: "float", "int8", "fp8" or "mapped".
    """

    storage: str

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """r."""

    @property
    @abstractmethod
    def width(self) -> int:
        """v, numbers per row."""

    @abstractmethod
    def bag(self, rows_np: Tensor, weights_np: Tensor) -> Tensor:
        """Weighted sums of rows: (n, p) int64 and (n, p) -> (n, v), see `ops.weighted_bag`."""

    @abstractmethod
    def dots(self, rows_np: Tensor, vectors_nv: Tensor) -> Tensor:
        """Rows times their bag's vector: (n, p) int64 and (n, v) -> (n, p), see `ops.row_dots`."""

    @abstractmethod
    def blocks(self, rows_per_block: int) -> Iterable[Tensor]:
        """All rows in order as floats, some at a time, (b, v) each."""

    def extra_repr(self) -> str:
        return f"num_rows={self.num_rows}, width={self.width}"


class ValueTable(RowTable):
    """A trainable table of rows, read by index and updated only where it was read.

    Without a row optimizer the table's gradient is a sparse COO tensor in `weight.grad`, so
    torch.optim.SparseAdam, SGD and Adagrad train it. A `RowOptimizer` turns `queued` on: backward
    then queues what it owes in `queue`, and `weight.grad` stays None.

    Args:
        num_rows: r.
        width: v, numbers per row.
        device, dtype: as for any module.

    Attributes:
        weight: (r, v).
        queue: uses since the last update, see `strata.ops.UseQueue`.
        queued: whether backward queues instead of writing `weight.grad`.
    """

    storage = "float"

    def __init__(
        self,
        num_rows: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width, device=device, dtype=dtype))
        self.queue = UseQueue()
        self.queued = False
        use_huge_pages(self.weight.detach())
        self.reset_parameters()

    @property
    def num_rows(self) -> int:
        """r."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """v."""
        return self.weight.shape[1]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw rows from N(0, 1/sqrt(v)), in place."""
        self.weight.normal_(std=self.width**-0.5)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has no row optimizer yet, so nobody would empty its queue."""
        super().__setstate__(state)
        self.queued = False

    def forward(self, rows: Tensor) -> Tensor:
        """Plain lookup of rows (...,) -> (..., v), for inspection; layers read through the ops."""
        return self.weight[rows]

    def bag(self, rows_np: Tensor, weights_np: Tensor) -> Tensor:
        return weighted_bag(self.weight, rows_np, weights_np, queue=self.active_queue)

    def dots(self, rows_np: Tensor, vectors_nv: Tensor) -> Tensor:
        return row_dots(self.weight, rows_np, vectors_nv, queue=self.active_queue)

    def blocks(self, rows_per_block: int) -> Iterable[Tensor]:
        return self.weight.detach().split(rows_per_block)

    @property
    def active_queue(self) -> UseQueue | None:
        """The queue that backward should fill, or None for a sparse gradient."""
        return self.queue if self.queued else None
