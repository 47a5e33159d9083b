"""The attention function that stands in for the decoder's own while memory is attached."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from strata.explicit.attach.fetch import AttachError, Statistics
from strata.explicit.attach.layer_memory import LayerMemory, Weighing, attend
from strata.explicit.attach.placing import Placer, RowMemories
from strata.explicit.attach.presets import Preset

_UNSUPPORTED = ("s_aux", "position_bias", "cache")


class PieceMemory:
    """What all rows read in one stretch of columns.

    Attributes:
        has_memory_b: rows that have a memory; the others attend plainly. None for all.
    """

    def __init__(self, placer: Placer, rows: RowMemories, statistics: Statistics) -> None:
        self._placer = placer
        self._rows = rows
        self._statistics = statistics
        self._placed: list[LayerMemory | None] | None = None
        has = (rows.index_rk >= 0).any(1)
        self.has_memory_b: Tensor | None = None if bool(has.all()) else has

    def __len__(self) -> int:
        return len(self._rows.origin_r)

    def layer(self, number: int) -> LayerMemory | None:
        """What one layer reads; None for nothing."""
        if self._placed is not None:
            return self._placed[number]
        with self._statistics.timed("inject_ms"):
            return self._placer.place(number, self._rows)

    def place(self) -> PieceMemory:
        """Put it in place in all layers now, for many steps to read."""
        self._placed = [self.layer(n) for n in range(self._placer.host.num_layers)]
        return self

    def select(self, rows: Tensor) -> PieceMemory:
        """The same for other rows, by index."""
        mine = self._rows
        chosen = RowMemories(mine.memories, mine.index_rk[rows], mine.origin_r[rows])
        other = PieceMemory(self._placer, chosen, self._statistics)
        if self._placed is not None:
            other._placed = [None if m is None else m.select(rows) for m in self._placed]
        return other


@dataclass
class Plan:
    """What the columns of a text of more than one token read.

    Attributes:
        stretches: (start, stop, memory or None) of all columns, in order.
        seen: columns that have been through the decoder.
        now: the columns that are going through it.
    """

    stretches: list[tuple[int, int, PieceMemory | None]]
    seen: int = 0
    now: tuple[int, int] = field(default=(0, 0))

    def begin(self, tokens: int) -> None:
        """The decoder is given this many columns next."""
        self.now = (self.seen, self.seen + tokens)
        self.seen += tokens


class Reader:
    """Answers attention calls: with memory where there is some, else as the decoder would.

    Attributes:
        plan: while a text of several tokens goes through the decoder.
        current: what a single token reads; None for nothing.
    """

    def __init__(self, preset: Preset) -> None:
        self._preset = preset
        self.plan: Plan | None = None
        self.current: PieceMemory | None = None

    def clear(self) -> None:
        """Read nothing."""
        self.plan = self.current = None

    def __call__(
        self,
        underneath: Any,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """One attention call (see `Host.intercepted`). Weights are given by plain calls only."""
        if self.plan is None and self.current is None:
            return underneath(module, query, key, value, mask, **kwargs)
        n = query.shape[2]
        parts: list[tuple[int, int, PieceMemory | None, LayerMemory | None]] = []
        for start, stop, memory in self._stretches(n):
            layer = None if memory is None else memory.layer(int(module.layer_idx))
            parts.append((start, stop, memory, layer))
        plain: Tensor | None = None
        if any(layer is None or m is None or m.has_memory_b is not None for *_, m, layer in parts):
            plain, weights = underneath(module, query, key, value, mask, **kwargs)
            if all(layer is None for *_, layer in parts):
                return plain, weights
        weighing = self._weighing(module, kwargs)
        position_ids = kwargs.get("position_ids")
        outs = []
        for start, stop, memory, layer in parts:
            if layer is None or memory is None:
                assert plain is not None
                outs.append(plain[:, start:stop])
                continue
            # Keys after the last query's own are of no use to these queries. Without a mask, the
            # first query's own key is the first; with one, the last query's is the last or before.
            last = key.shape[2] if n == 1 else stop if mask is None else key.shape[2] - n + stop
            out = attend(
                layer,
                query[:, :, start:stop],
                key[:, :, :last],
                value[:, :, :last],
                None if mask is None else mask[:, :, start:stop],
                weighing,
                first=start,
                position_ids=None if position_ids is None else position_ids[:, start:stop],
            )
            if memory.has_memory_b is not None:
                assert plain is not None
                out = torch.where(
                    memory.has_memory_b[:, None, None, None], out, plain[:, start:stop]
                )
            outs.append(out)
        return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)).contiguous(), None

    def _stretches(self, n: int) -> list[tuple[int, int, PieceMemory | None]]:
        if n == 1 or self.plan is None:
            return [(0, n, self.current)]
        first, last = self.plan.now
        assert last - first == n
        return [
            (max(start, first) - first, min(stop, last) - first, memory)
            for start, stop, memory in self.plan.stretches
            if start < last and stop > first
        ]

    def _weighing(self, module: Any, kwargs: dict[str, Any]) -> Weighing:
        for name in _UNSUPPORTED:
            if kwargs.get(name) is not None:
                raise AttachError(
                    f"{type(module).__name__} calls its attention with {name!r}, which memory "
                    "cannot join; this decoder cannot read memories"
                )
        scaling = kwargs.get("scaling")
        return Weighing(
            scaling=module.head_dim**-0.5 if scaling is None else scaling,
            softcap=kwargs.get("softcap"),
            dropout=kwargs.get("dropout") or 0.0,
            temperature=self._preset.temperature,
            scale=self._preset.scale,
        )
