"""Memories and the marker, put at their positions before the text.

Shapes: r rows, k memories of a row, s memory heads, t tokens kept, m tokens of the marker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strata.explicit.attach.layer_memory import LayerMemory
from strata.explicit.host import Host
from strata.explicit.memories import Memories, MemoryShape
from strata.explicit.settings import Positions


@dataclass(frozen=True)
class RowMemories:
    """Which memories the rows of a batch read.

    Attributes:
        memories: all of them, on the decoder's device.
        index_rk: into `memories`, best hit first; -1 where a row has fewer than k.
        origin_r: position of each row's first token.
    """

    memories: Memories
    index_rk: Tensor
    origin_r: Tensor


class Placer:
    """Puts memories and the marker before the text, layer by layer.

    The marker's keys and values are computed once, here. They stand in every layer and head;
    memories stand in their own.

    Args:
        host: the decoder.
        shape: of its memories.
        marker: token ids; may be empty.
        reference_tokens: the interval of positions that a memory takes.
        positions: see `ExplicitMemoryConfig`.

    Attributes:
        groups: layers that are placed in one go, since they hold as many heads and turn alike; a
            layer that reads neither marker nor memories is in none.
    """

    def __init__(
        self,
        host: Host,
        shape: MemoryShape,
        *,
        marker: Sequence[int],
        reference_tokens: int,
        positions: Positions,
    ) -> None:
        self.host = host
        self.shape = shape
        self.reference_tokens = reference_tokens
        self.positions = positions
        self.marker_tokens = len(marker)
        self._marker = marker_states(host, marker) if marker else []
        self._heads: dict[int, list[int]] = {}
        self._first: dict[int, int] = {}
        for number, (layer, head) in enumerate(shape.heads):
            self._first.setdefault(layer, number)
            self._heads.setdefault(layer, []).append(head)
        self.groups = self._groups()

    def place(self, layers: Sequence[int], rows: RowMemories) -> list[LayerMemory]:
        """What some layers of one group read.

        Args:
            layers: numbers of the layers.
            rows: rows without a memory of their own get the marker alone.
        """
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        marker_at_rm, bias = None, None
        if self.marker_tokens:
            marker_at_rm = self._marker_at(rows)
            parts.append(self._marker_states(layers, marker_at_rm))
        if layers[0] in self._heads and rows.index_rk.shape[1]:
            heads = [self._heads[layer] for layer in layers]
            parts.append(self._memory_states(layers, heads, rows))
            bias = self._bias(rows, heads)
        keys, values, places = (torch.cat(kind, 3) for kind in zip(*parts, strict=True))
        keys = self.host.rotate(layers[0], keys, places).to(self.host.dtype)
        values = values.to(self.host.dtype)
        window = self.host.window(layers[0])
        return [
            LayerMemory(
                keys[number],
                values[number],
                None if bias is None else bias[number],
                self.marker_tokens,
                window,
                None if window is None else marker_at_rm,
            )
            for number in range(len(layers))
        ]

    def _groups(self) -> list[list[int]]:
        groups: dict[tuple[object, ...], list[int]] = {}
        for layer in range(self.host.num_layers):
            held = len(self._heads.get(layer, ()))
            if held or self.marker_tokens:
                kind = (held, self.host.rotary_kind(layer), self.host.window(layer))
                groups.setdefault(kind, []).append(layer)
        return list(groups.values())

    def _marker_at(self, rows: RowMemories) -> Tensor:
        """Positions of the marker: (r, m)."""
        m = self.marker_tokens
        intervals = torch.ones_like(rows.origin_r)
        if self.positions == "sequential":
            intervals = (rows.index_rk >= 0).sum(1)
        start = rows.origin_r - intervals * self.reference_tokens - m
        return start[:, None] + torch.arange(m, device=start.device)

    def _marker_states(self, layers: Sequence[int], at_rm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values (layers, r, kv, m, d) and positions (layers, r, kv, m)."""
        n, r, kv = len(layers), len(at_rm), self.host.num_kv_heads
        keys, values = (
            torch.stack([self._marker[layer][kind] for layer in layers])[:, None] for kind in (0, 1)
        )
        return (
            keys.expand(n, r, -1, -1, -1),
            values.expand(n, r, -1, -1, -1),
            at_rm[None, :, None].expand(n, r, kv, -1),
        )

    def _memory_states(
        self, layers: Sequence[int], heads: list[list[int]], rows: RowMemories
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values (layers, r, kv, k * t, d) and positions (layers, r, kv, k * t).

        Heads without memory get zeros.
        """
        memories, n, kv = rows.memories, len(layers), self.host.num_kv_heads
        slots = [
            self._first[layer] + number
            for layer, its in zip(layers, heads, strict=True)
            for number in range(len(its))
        ]
        near = slots == list(range(slots[0], slots[-1] + 1))
        chosen = slice(slots[0], slots[-1] + 1) if near else slots  # a slice copies nothing
        pick = rows.index_rk.clamp(min=0)

        def by_head(states: Tensor) -> Tensor:
            some = states[:, chosen][pick].unflatten(2, (n, -1))  # (r, k, layers, heads, t, ...)
            some = some.movedim((2, 3), (0, 2)).flatten(3, 4)
            if some.shape[2] == kv:
                return some
            every = some.new_zeros(n, len(pick), kv, *some.shape[3:])
            for number, its in enumerate(heads):
                every[number][:, its] = some[number]
            return every

        shift_rp = self._shift(rows).repeat_interleave(memories.places_nst.shape[2], 1)
        return (
            by_head(memories.keys_nstd),
            by_head(memories.values_nstd),
            by_head(memories.places_nst).long() + shift_rp[None, :, None],
        )

    def _shift(self, rows: RowMemories) -> Tensor:
        """Position of each memory's first token: (r, k)."""
        index_rk = rows.index_rk
        shift_rk = torch.full_like(index_rk, -self.reference_tokens)
        if self.positions == "sequential":
            place_k = torch.arange(index_rk.shape[1], device=index_rk.device)
            shift_rk = shift_rk * ((index_rk >= 0).sum(1, keepdim=True) - place_k)
        return shift_rk + rows.origin_r[:, None]

    def _bias(self, rows: RowMemories, heads: list[list[int]]) -> Tensor | None:
        """What is added to scores, (layers, r, kv, marker and k * t); None where all is held."""
        memories, index_rk = rows.memories, rows.index_rk
        t, kv, dtype = memories.places_nst.shape[2], self.host.num_kv_heads, self.host.dtype
        kept_rk = memories.kept_n[index_rk.clamp(min=0)].masked_fill(index_rk < 0, 0)
        held_rp = (torch.arange(t, device=index_rk.device) < kept_rk[:, :, None]).flatten(1)
        if len(heads[0]) == kv and bool(held_rp.all()):
            return None
        least = torch.finfo(dtype).min
        one_rp = held_rp.new_zeros(held_rp.shape, dtype=dtype).masked_fill(~held_rp, least)
        one_rp = torch.nn.functional.pad(one_rp, (self.marker_tokens, 0))
        bias = one_rp[None, :, None].expand(len(heads), -1, kv, -1)
        if len(heads[0]) < kv:
            bias = bias.clone()
            for number, its in enumerate(heads):
                others = [head for head in range(kv) if head not in its]
                bias[number, :, others, self.marker_tokens :] = least
        return bias


def marker_states(
    host: Host, marker: Sequence[int], *, with_grad: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """Keys (before rotary) and values of the marker alone at every layer, fp32 (k, m, d).

    Args:
        host: the decoder.
        marker: token ids, at least one.
        with_grad: keep the graph to the decoder's weights, and the decoder in its mode of training;
            else it is read as in evaluation.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(
        underneath: Any,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        **kw: Any,
    ) -> tuple[Tensor, Tensor | None]:
        found[int(module.layer_idx)] = (key[0], value[0])
        return underneath(module, query, key, value, *rest, **kw)

    ids = torch.tensor([list(marker)], device=host.device)
    training = [] if with_grad else [m for m in host.model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        with torch.set_grad_enabled(with_grad), host.intercepted(keep):
            host.model.get_decoder()(input_ids=ids, use_cache=False)
    finally:
        for module in training:
            module.training = True
    # After the pass: a checkpointed layer is computed again without our work in it.
    at = torch.arange(len(marker), device=host.device)
    return [
        (host.unrotate(layer, found[layer][0], at), found[layer][1].float())
        for layer in range(host.num_layers)
    ]
