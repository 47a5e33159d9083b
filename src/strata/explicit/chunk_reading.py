"""What chunks of a batch read, put in place for one attention layer after the other.

Shapes: b rows, t tokens of a row, c chunks of a row, n tokens of a chunk or memories, r references
that a chunk reads, s memory heads of all layers, g memory heads of a layer, k KV heads, p tokens
kept, m tokens of the marker, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from strata.explicit.attach.fetch import AttachError
from strata.explicit.host import Host
from strata.explicit.memories import Memories, MemoryShape
from strata.explicit.settings import ExplicitMemoryConfig

_UNSUPPORTED = ("s_aux", "position_bias", "cache")


@dataclass(frozen=True)
class ReadLayer:
    """What the chunks read in one layer, as `memory_attention` takes it."""

    keys_bckmd: Tensor
    values_bckmd: Tensor
    held_bcknm: Tensor


class ChunkReading:
    """What the chunks of one batch read; each layer is put in place when it is reached.

    Args:
        host: the decoder.
        memories: n of them.
        marker: keys and values (k, m, d) of the marker by layer; none where it has no tokens.
        index_bcr: which memories a chunk reads, -1 for none.
        held_bcnr: which of them each token of a chunk reads; None for all.
        shape: of the memories.
        config: the settings that they are encoded with.
        chunk_tokens: tokens of a chunk.
        shared: all chunks of a row read the same; c is 1.
    """

    def __init__(
        self,
        host: Host,
        memories: Memories,
        marker: list[tuple[Tensor, Tensor]],
        index_bcr: Tensor,
        held_bcnr: Tensor | None,
        *,
        shape: MemoryShape,
        config: ExplicitMemoryConfig,
        chunk_tokens: int,
        shared: bool,
    ) -> None:
        self._host = host
        self._chunk_tokens = chunk_tokens
        self._reference_tokens = config.reference_tokens
        self._memories = memories
        self._marker = marker
        self._rows, self._chunks, _ = index_bcr.shape
        self._shared = shared
        self._index_bcr = index_bcr.clamp(min=0)
        self._held_bcnr = (index_bcr >= 0)[:, :, None]
        if held_bcnr is not None:
            self._held_bcnr = self._held_bcnr & held_bcnr.to(index_bcr.device)
        # Positions of each memory's first token, None where one interval serves all.
        self._at_bcr: Tensor | None = None
        intervals_bc1 = index_bcr.new_ones(1, 1, 1)
        if config.positions == "sequential":
            reads_bcr = index_bcr >= 0
            intervals_bc1 = reads_bcr.sum(-1, keepdim=True)
            self._at_bcr = reads_bcr.cumsum(-1) - 1 - intervals_bc1
            self._at_bcr *= self._reference_tokens
        self._marker_ends_bc1 = -intervals_bc1 * self._reference_tokens
        # One who reads nothing does not see the marker either.
        self._any_bcn1 = self._held_bcnr.any(-1, keepdim=True)
        self._heads = {
            layer: (
                [number for number, (at, _) in enumerate(shape.heads) if at == layer],
                [head for at, head in shape.heads if at == layer],
            )
            for layer in shape.layers
        }

    def check(self, module: Any, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
        """Refuse a call that these memories do not belong to, or that they cannot join."""
        b, _, t, _ = query.shape
        needed = -(-t // self._chunk_tokens)
        chunks = self._held_bcnr.shape[1]
        if b != self._rows or (chunks != needed and not (self._shared and chunks == 1)):
            raise AttachError(
                f"memories were named for {self._rows} rows of {chunks} chunks of "
                f"{self._chunk_tokens} tokens, the model was given {b} rows of {t} tokens"
            )
        if key.shape[2] != t:
            raise AttachError(
                f"the model was given {t} tokens behind {key.shape[2] - t} in a cache: chunks are "
                "counted from a row's first token, so give whole rows and use_cache=False"
            )
        if kwargs.get("dropout"):
            raise AttachError(
                f"attention dropout {kwargs['dropout']} cannot join with memory: set the model's "
                "attention_dropout to 0"
            )
        for name in _UNSUPPORTED:
            if kwargs.get(name) is not None:
                raise AttachError(
                    f"{type(module).__name__} calls its attention with {name!r}, which memory "
                    "cannot join; this decoder cannot read memories"
                )

    def layer(self, layer: int, query: Tensor, position_ids: Tensor | None) -> ReadLayer | None:
        """What one layer reads; None for nothing."""
        parts: list[ReadLayer] = []
        if self._marker:
            parts.append(self._place_marker(layer, query, position_ids))
        if layer in self._heads:
            parts.append(self._place_memories(layer))
        if len(parts) < 2:
            return parts[0] if parts else None
        marker, memories = parts
        b, c = self._rows, self._chunks
        shape = [max(x, y) for x, y in zip(marker.held_bcknm.shape, memories.held_bcknm.shape,
                                           strict=True)][:-1]  # fmt: skip
        return ReadLayer(
            torch.cat([marker.keys_bckmd.expand(b, c, -1, -1, -1), memories.keys_bckmd], 3),
            torch.cat([marker.values_bckmd.expand(b, c, -1, -1, -1), memories.values_bckmd], 3),
            torch.cat([part.held_bcknm.expand(*shape, -1) for part in parts], 4),
        )

    def _place_marker(self, layer: int, query: Tensor, position_ids: Tensor | None) -> ReadLayer:
        key_kmd, value_kmd = self._marker[layer]
        m = key_kmd.shape[1]
        at_bcm = self._marker_ends_bc1 + torch.arange(-m, 0, device=query.device)
        key_bckmd = self._host.rotate(layer, key_kmd, at_bcm[:, :, None])
        held_bcknm = self._any_bcn1[:, :, None].expand(-1, -1, -1, -1, m)
        window = self._host.window(layer)
        if window is not None:
            n, t = self._chunk_tokens, query.shape[2]
            if position_ids is None:
                position_ids = torch.arange(t, device=query.device)[None]
            position_ids = F.pad(position_ids, (0, -t % n))
            away_bcnm = position_ids.unflatten(1, (-1, n))[..., None] - at_bcm[:, :, None]
            held_bcknm = held_bcknm & (away_bcnm < window)[:, :, None]
        dtype = query.dtype
        value_bckmd = value_kmd.to(dtype).expand(*key_bckmd.shape)
        return ReadLayer(key_bckmd.to(dtype), value_bckmd, held_bcknm)

    def _place_memories(self, layer: int) -> ReadLayer:
        numbers, heads = self._heads[layer]
        memories, part = self._memories, slice(numbers[0], numbers[-1] + 1)
        p, k = memories.places_nst.shape[2], self._host.num_kv_heads
        places_ngp = memories.places_nst[:, part].long()
        keys_ngpd = memories.keys_nstd[:, part]
        if self._at_bcr is None:
            at_ngp = places_ngp - self._reference_tokens
            keys_ngpd = self._host.rotate(layer, keys_ngpd, at_ngp).to(self._host.dtype)
            keys_bckmd = self._by_chunk(keys_ngpd, heads)
        else:  # the same memory stands elsewhere for other chunks
            at_bckm = self._by_chunk(places_ngp[..., None], heads)[..., 0]
            at_bckm = at_bckm + self._at_bcr.repeat_interleave(p, -1)[:, :, None]
            keys_bckmd = self._by_chunk(keys_ngpd, heads)
            keys_bckmd = self._host.rotate(layer, keys_bckmd, at_bckm).to(self._host.dtype)
        held_np = torch.arange(p, device=places_ngp.device) < memories.kept_n[:, None]
        held_bcrp = held_np[self._index_bcr]
        held_bcnrp = self._held_bcnr[..., None] & held_bcrp[:, :, None]
        held_bcknm = held_bcnrp.flatten(3)[:, :, None]
        if len(heads) < k:
            has_k = torch.zeros(k, dtype=torch.bool, device=places_ngp.device)
            has_k[heads] = True
            held_bcknm = held_bcknm & has_k[:, None, None]
        return ReadLayer(
            keys_bckmd,
            self._by_chunk(memories.values_nstd[:, part].to(self._host.dtype), heads),
            held_bcknm,
        )

    def _by_chunk(self, states_ngpd: Tensor, heads: list[int]) -> Tensor:
        """(n, g, p, d) of memories as (b, c, k, r * p, d) of chunks."""
        k = self._host.num_kv_heads
        if len(heads) < k:
            wide = states_ngpd.new_zeros(len(states_ngpd), k, *states_ngpd.shape[2:])
            states_ngpd = wide.index_copy(1, torch.tensor(heads, device=wide.device), states_ngpd)
        b, c, r = self._index_bcr.shape
        chosen = states_ngpd.index_select(0, self._index_bcr.flatten())
        return chosen.view(b, c, r, *states_ngpd.shape[1:]).transpose(2, 3).flatten(3, 4)


def filled(
    memories: Memories, index_bcr: Tensor, held_bcnr: Tensor | None
) -> tuple[Memories, Tensor, Tensor | None]:
    """The same without places that no memory fills, and columns in which no chunk reads.

    Dense memories of short references and rows of few chunks are mostly that.
    """
    longest = int(memories.kept_n.max())
    if longest < memories.places_nst.shape[2]:
        memories = Memories(
            memories.keys_nstd[:, :, :longest],
            memories.values_nstd[:, :, :longest],
            memories.places_nst[:, :, :longest],
            memories.kept_n,
        )
    reads_r = (index_bcr >= 0).flatten(0, 1).any(0)
    columns = reads_r.nonzero().flatten()
    if 0 < len(columns) < len(reads_r):
        index_bcr = index_bcr[..., columns]
        if held_bcnr is not None and held_bcnr.shape[3] > 1:
            held_bcnr = held_bcnr[..., columns.to(held_bcnr.device)]
    return memories, index_bcr, held_bcnr
