"""The memory layer: product keys choose rows of a value table, the layer returns their sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from strata.layers.config import MemoryLayerConfig
from strata.layers.keys import ProductKeys
from strata.layers.usage import RowUsage
from strata.layers.values import Factory, RowTable


class ProductKeyMemory(nn.Module):
    """A sparse key-value layer that stands where a feed-forward layer stood.

    y = W_o(bag(x) * silu(W_g x)) with the Memory+ gate; without it y = bag(x), projected by W_o
    only if the widths differ. bag(x) is the weighted sum of heads * top_k rows.

    Args:
        hidden_dim: the decoder's width d.
        config: everything else.
        values: the table to read; hand the same one to several layers and they share it.
        own_values: register the table as this module's child. `install` keeps shared tables in
            one place in the model and passes False, so that a checkpoint holds them once.

    Source: "Memory Layers at Scale" (arXiv 2412.09764), section 2.
    """

    def __init__(
        self,
        hidden_dim: int,
        config: MemoryLayerConfig,
        values: RowTable,
        *,
        own_values: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if values.num_rows != config.num_rows:
            raise ValueError(
                f"the value table has {values.num_rows} rows, {config.num_half_keys} half-keys "
                f"address {config.num_rows}"
            )
        width = values.width
        factory: Factory = {"device": device, "dtype": dtype}
        self.keys = ProductKeys(hidden_dim, config.key_dim or even_half(width), config, **factory)
        if own_values:
            self.values = values
        self._table = (values,)  # in a tuple: seen by copies, not registered twice
        projected = config.gate != "none" or width != hidden_dim
        self.value_gate = _linear(hidden_dim, width, factory) if config.gate != "none" else None
        self.value_proj = _linear(width, hidden_dim, factory) if projected else None
        self.scalar_gate = ScalarGate(hidden_dim, config, **factory)
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.value_dropout = nn.Dropout(config.value_dropout)
        self.usage: RowUsage | None = None
        self.reset_parameters()

    @property
    def table(self) -> RowTable:
        """The value table this layer reads."""
        return self._table[0]

    @property
    def tables(self) -> tuple[RowTable, ...]:
        """The same, as PEER has it."""
        return self._table

    def use_tables(self, tables: Sequence[RowTable]) -> None:
        """Read another table from now on, of the same size."""
        (table,) = tables
        if hasattr(self, "values"):
            self.values = table
        self._table = (table,)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the gate and the output projection from N(0, 1/sqrt(d)); keys draw their own."""
        for linear in (self.value_gate, self.value_proj):
            if linear is not None:
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., d), in the dtype of `hidden`."""
        hidden_nd = hidden.reshape(-1, hidden.shape[-1])
        rows_np, weights_np = self.keys(self.input_dropout(hidden_nd))
        if self.usage is not None and self.training:
            self.usage.count(rows_np)
        bag_nv = self.table.bag(rows_np, weights_np)
        out_nv = self.value_dropout(bag_nv.to(hidden.dtype))
        if self.value_gate is not None:
            out_nv = out_nv * F.silu(self.value_gate(hidden_nd))
        out_nd = self.value_proj(out_nv) if self.value_proj is not None else out_nv
        return self.scalar_gate(hidden_nd, out_nd).to(hidden.dtype).view_as(hidden)


class ScalarGate(nn.Module):
    """A gate on a memory's output: none, a sigmoid of the input, or one scale that starts at 0."""

    def __init__(
        self,
        hidden_dim: int,
        config: MemoryLayerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: Factory = {"device": device, "dtype": dtype}
        self.kind = config.scalar_gate
        # Beside a trained FFN a half-open random memory costs perplexity at once: start near shut.
        self.start = -4.0 if config.placement == "beside" else 0.0
        if self.kind == "sigmoid":
            self.gate = nn.Linear(hidden_dim, 1, **factory)
        elif self.kind == "zero":
            self.scale = nn.Parameter(torch.empty((), **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sigmoid: zero weights and a bias of 0 (replace) or -4 (beside); zero: a scale of 0."""
        if self.kind == "sigmoid":
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, self.start)
        elif self.kind == "zero":
            nn.init.zeros_(self.scale)

    def forward(self, hidden_nd: Tensor, out_nd: Tensor) -> Tensor:
        if self.kind == "sigmoid":
            return out_nd * self.gate(hidden_nd).sigmoid()
        return out_nd * self.scale if self.kind == "zero" else out_nd


def even_half(width: int) -> int:
    """The default key width: half of the value width, rounded up to an even number."""
    return 2 * max(1, -(-width // 4))


def _linear(in_features: int, out_features: int, factory: Factory) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=False, **factory)
