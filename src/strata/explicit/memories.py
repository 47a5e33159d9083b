"""References and the memories that they become.

Shapes: n references, s memory heads (pairs of layer and KV head, layer by layer), t tokens kept,
d head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """A piece of a document, short enough to be one memory.

    Attributes:
        text: exactly document[start:end].
        source: where the document came from: a path, a URL, a name.
        start, end: characters in the document.
        metadata: of the document: flat, JSON values.
    """

    text: str
    source: str
    start: int
    end: int
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryShape:
    """What one memory holds.

    Attributes:
        heads: (layer, KV head) of each memory head, layer by layer, ascending.
        tokens: kept per head.
        head_dim: width of a key or value.
    """

    heads: tuple[tuple[int, int], ...]
    tokens: int
    head_dim: int

    @property
    def layers(self) -> tuple[int, ...]:
        """Memory layers, ascending."""
        return tuple(sorted({layer for layer, _ in self.heads}))

    @property
    def vectors(self) -> int:
        """Keys and values in one memory."""
        return 2 * len(self.heads) * self.tokens


@dataclass(frozen=True)
class Memories:
    """Keys and values of n references, cut down to what their heads kept.

    A reference shorter than `t` tokens leaves the last places of every head empty: zeros there,
    never attended to.

    Attributes:
        keys_nstd: before rotary positions are applied (but after a key norm), float.
        values_nstd: float.
        places_nst: which token of the reference each is, counted from 0 after the marker, int16,
            ascending within a head; 0 in empty places.
        kept_n: tokens kept by each head of a reference, int64, at most t.
    """

    keys_nstd: Tensor
    values_nstd: Tensor
    places_nst: Tensor
    kept_n: Tensor

    def __len__(self) -> int:
        return len(self.kept_n)

    def __getitem__(self, index: slice | Sequence[int]) -> Memories:
        return Memories(
            self.keys_nstd[index],
            self.values_nstd[index],
            self.places_nst[index],
            self.kept_n[index],
        )

    def to(self, *args: Any, **kwargs: Any) -> Memories:
        """Keys and values as `torch.Tensor.to` gives them; the others change device only."""
        keys = self.keys_nstd.to(*args, **kwargs)
        return replace(
            self,
            keys_nstd=keys,
            values_nstd=self.values_nstd.to(*args, **kwargs),
            places_nst=self.places_nst.to(keys.device),
            kept_n=self.kept_n.to(keys.device),
        )

    @classmethod
    def cat(cls, parts: Sequence[Memories]) -> Memories:
        """All memories of `parts`, in order; at least one part."""
        return cls(
            torch.cat([part.keys_nstd for part in parts]),
            torch.cat([part.values_nstd for part in parts]),
            torch.cat([part.places_nst for part in parts]),
            torch.cat([part.kept_n for part in parts]),
        )
