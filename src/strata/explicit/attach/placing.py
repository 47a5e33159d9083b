"""Memories and the marker, put at their positions before the text.

Shapes: r rows, k memories of a row, s memory heads, t tokens kept, m tokens of the marker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from strata.explicit.attach.layer_memory import LayerMemory
from strata.explicit.host import Host
from strata.explicit.memories import Memories, MemoryShape


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
        positions: "parallel" or "sequential" (see `Preset`).
    """

    def __init__(
        self,
        host: Host,
        shape: MemoryShape,
        *,
        marker: Sequence[int],
        reference_tokens: int,
        positions: Literal["parallel", "sequential"],
    ) -> None:
        self.host = host
        self.shape = shape
        self.reference_tokens = reference_tokens
        self.positions = positions
        self.marker_tokens = len(marker)
        self._marker = marker_states(host, marker) if marker else []
        self._heads: dict[int, tuple[slice, list[int]]] = {}
        for layer in shape.layers:
            places = [n for n, (at, _) in enumerate(shape.heads) if at == layer]
            heads = [head for at, head in shape.heads if at == layer]
            self._heads[layer] = (slice(places[0], places[-1] + 1), heads)

    def place(self, layer: int, rows: RowMemories) -> LayerMemory | None:
        """What one layer reads; None for nothing.

        Args:
            layer: number of the layer.
            rows: rows without a memory of their own get the marker alone.
        """
        parts: list[LayerMemory] = []
        if self.marker_tokens:
            parts.append(self._place_marker(layer, rows))
        if layer in self._heads and rows.index_rk.shape[1]:
            parts.append(self._place_memories(layer, rows))
        if not parts:
            return None
        if len(parts) == 1:
            return parts[0]
        marker, memories = parts
        bias = memories.bias_bkp
        if bias is not None:
            bias = torch.nn.functional.pad(bias, (self.marker_tokens, 0))
        return replace(
            marker,
            keys_bkpd=torch.cat([marker.keys_bkpd, memories.keys_bkpd], dim=2),
            values_bkpd=torch.cat([marker.values_bkpd, memories.values_bkpd], dim=2),
            bias_bkp=bias,
        )

    def _place_marker(self, layer: int, rows: RowMemories) -> LayerMemory:
        key_kmd, value_kmd = self._marker[layer]
        r, m = len(rows.origin_r), self.marker_tokens
        intervals = torch.ones_like(rows.origin_r)
        if self.positions == "sequential":
            intervals = (rows.index_rk >= 0).sum(1)
        start = rows.origin_r - intervals * self.reference_tokens - m
        at_rm = start[:, None] + torch.arange(m, device=start.device)
        keys = self.host.rotate(layer, key_kmd.expand(r, -1, -1, -1), at_rm[:, None])
        window = self.host.window(layer)
        return LayerMemory(
            keys.to(self.host.dtype),
            value_kmd.expand(r, -1, -1, -1).to(self.host.dtype),
            None,
            m,
            window,
            None if window is None else at_rm,
        )

    def _place_memories(self, layer: int, rows: RowMemories) -> LayerMemory:
        chosen, heads = self._heads[layer]
        memories, index_rk = rows.memories, rows.index_rk
        r, k = index_rk.shape
        there_rk = index_rk >= 0
        pick = index_rk.clamp(min=0)
        shift_rk = torch.full_like(index_rk, -self.reference_tokens)
        if self.positions == "sequential":
            after_rk = there_rk.sum(1, keepdim=True) - torch.arange(k, device=pick.device)
            shift_rk = shift_rk * after_rk
        shift_rk = shift_rk + rows.origin_r[:, None]

        def by_head(states: Tensor) -> Tensor:  # (n, s, t, ...) -> (r, heads, k * t, ...)
            return states[:, chosen][pick].transpose(1, 2).flatten(2, 3)

        t = memories.places_nst.shape[2]
        at = by_head(memories.places_nst).long() + shift_rk.repeat_interleave(t, 1)[:, None]
        keys = self.host.rotate(layer, by_head(memories.keys_nstd), at).to(self.host.dtype)
        values = by_head(memories.values_nstd).to(self.host.dtype)
        held_rkt = torch.arange(t, device=pick.device) < memories.kept_n[pick][:, :, None]
        held_rp = (held_rkt & there_rk[:, :, None]).flatten(1)
        held = held_rp[:, None].expand(r, len(heads), k * t)
        if len(heads) < self.host.num_kv_heads:
            every = (r, self.host.num_kv_heads, k * t)
            wide = keys.new_zeros(*every, keys.shape[-1])
            keys, values = wide.index_copy(1, _like(heads, wide), keys), wide.index_copy(
                1, _like(heads, wide), values
            )  # fmt: skip
            held = held.new_zeros(every).index_copy(1, _like(heads, wide), held)
        bias = None
        if not bool(held.all()):
            least = torch.finfo(keys.dtype).min
            bias = torch.zeros(held.shape, dtype=keys.dtype, device=keys.device)
            bias = bias.masked_fill(~held, least)
        return LayerMemory(keys, values, bias, 0)


def _like(heads: list[int], states: Tensor) -> Tensor:
    return torch.tensor(heads, device=states.device)


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
