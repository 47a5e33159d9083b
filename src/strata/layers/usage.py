"""Counting which rows a layer reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RowUsage:
    """How often each row was picked by one layer since the last reset.

    Four bytes a row and one scatter-add a forward pass; `strata.layers.track_usage` attaches it
    to the layers for the steps that are to be looked at.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.counts_r: Tensor | None = None

    @torch.compiler.disable
    @torch.no_grad()
    def count(self, rows: Tensor) -> None:
        """Add the picks in `rows`, any shape, int64.

        Inside a backward pass nothing is added: gradient checkpointing runs the forward pass
        again there, and those picks were counted the first time.
        """
        if torch._C._current_graph_task_id() != -1:
            return
        if self.counts_r is None or self.counts_r.device != rows.device:
            self.counts_r = torch.zeros(self.num_rows, dtype=torch.int32, device=rows.device)
        flat = rows.reshape(-1)
        self.counts_r.index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))

    def reset(self) -> None:
        """Forget all counts."""
        self.counts_r = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RowUsage:
        return RowUsage(self.num_rows)
