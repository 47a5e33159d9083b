"""PEER: a product-key layer whose rows are tiny experts, one hidden unit each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from strata.layers.config import MemoryLayerConfig
from strata.layers.keys import ProductKeys
from strata.layers.product_key import ScalarGate, even_half
from strata.layers.usage import RowUsage
from strata.layers.values import Factory, RowTable


class PEER(nn.Module):
    """y = sum_p g_p * gelu(u_p . x) * v_p over the picked experts p.

    The dots u_p . x and the weighted sum of v_p are the two adjoint bag operations, so the
    (tokens, heads, top_k, d) gather of either table is never held.

    Args:
        hidden_dim: the decoder's width d.
        config: heads, picks, half-keys, norms, dropout; `value_dim` must be None or d.
        down: the table of u, (r, d).
        up: the table of v, (r, d).
        own_values: register the tables as children, see `ProductKeyMemory`.

    Source: "Mixture of A Million Experts" (arXiv 2407.04153), section 2.
    """

    def __init__(
        self,
        hidden_dim: int,
        config: MemoryLayerConfig,
        down: RowTable,
        up: RowTable,
        *,
        own_values: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, table in (("down", down), ("up", up)):
            if table.num_rows != config.num_rows or table.width != hidden_dim:
                raise ValueError(
                    f"PEER's {name} table is {table.num_rows} x {table.width}, "
                    f"{config.num_rows} x {hidden_dim} is needed"
                )
        factory: Factory = {"device": device, "dtype": dtype}
        self.keys = ProductKeys(
            hidden_dim, config.key_dim or even_half(hidden_dim), config, **factory
        )
        if own_values:
            self.down, self.up = down, up
        self._tables = (down, up)
        self.scalar_gate = ScalarGate(hidden_dim, config, **factory)
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.value_dropout = nn.Dropout(config.value_dropout)
        self.usage: RowUsage | None = None

    @property
    def tables(self) -> tuple[RowTable, RowTable]:
        """The tables of u and v."""
        return self._tables

    def use_tables(self, tables: Sequence[RowTable]) -> None:
        """Read other tables of u and v from now on, of the same size."""
        down, up = tables
        if hasattr(self, "down"):
            self.down, self.up = down, up
        self._tables = (down, up)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., d), in the dtype of `hidden`."""
        hidden_nd = hidden.reshape(-1, hidden.shape[-1])
        down, up = self._tables
        rows_np, weights_np = self.keys(self.input_dropout(hidden_nd))
        if self.usage is not None and self.training:
            self.usage.count(rows_np)
        units_np = F.gelu(down.dots(rows_np, hidden_nd))
        out_nd = up.bag(rows_np, weights_np * units_np)
        out_nd = self.value_dropout(out_nd.to(hidden.dtype))
        return self.scalar_gate(hidden_nd, out_nd).to(hidden.dtype).view_as(hidden)
