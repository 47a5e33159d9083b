"""The attention function that stands in for the decoder's own while memory is attached."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from strata.explicit.attach.fetch import AttachError, Statistics
from strata.explicit.attach.layer_memory import (
    LayerMemory,
    Weighing,
    attend,
    attend_context,
    attend_memory,
    merge,
)
from strata.explicit.attach.placing import Placer, RowMemories
from strata.explicit.attach.presets import Preset

# Memories up to this size are put in place in all layers at once. Of larger ones the work is in the
# bytes, not in the calls, and layer by layer it is done in memory that is there already.
_AT_ONCE_BYTES = 8 * 2**20

_UNSUPPORTED = ("s_aux", "position_bias", "cache")


class PieceMemory:
    """What the rows of a batch read, or the rows of several pieces one after another.

    Attributes:
        has_memory_b: rows that have a memory; the others attend plainly. None for all.
    """

    def __init__(self, placer: Placer, rows: RowMemories, statistics: Statistics) -> None:
        self._placer = placer
        self._rows = rows
        self._statistics = statistics
        self._placed: dict[int, LayerMemory] | None = None
        has = (rows.index_rk >= 0).any(1)
        self.has_memory_b: Tensor | None = None if bool(has.all()) else has

    def __len__(self) -> int:
        return len(self._rows.origin_r)

    def layer(self, number: int, start: int, stop: int) -> LayerMemory | None:
        """What some rows read in one layer; None for nothing."""
        whole = (start, stop) == (0, len(self))
        if self._placed is None and whole and self._is_small:
            self.place()
        if self._placed is not None:
            layer = self._placed.get(number)
            return layer if layer is None or whole else layer.rows(start, stop)
        if not any(number in group for group in self._placer.groups):
            return None
        mine = self._rows
        some = RowMemories(mine.memories, mine.index_rk[start:stop], mine.origin_r[start:stop])
        with self._statistics.timed("inject_ms"):
            return self._placer.place([number], some)[0]

    @property
    def placed(self) -> dict[int, LayerMemory]:
        """What all rows read, by layer; layers that read nothing are left out."""
        assert self._placed is not None
        return self._placed

    def place(self) -> PieceMemory:
        """Put it in place in all layers now, for many steps to read."""
        if self._placed is None:
            self._placed = {}
            with self._statistics.timed("inject_ms"):
                for group in self._placer.groups:
                    parts = [group] if self._is_small else [[layer] for layer in group]
                    for part in parts:
                        layers = self._placer.place(part, self._rows)
                        self._placed |= dict(zip(part, layers, strict=True))
        return self

    @property
    def _is_small(self) -> bool:
        """Whether all rows in all layers are few bytes, once placed."""
        memories, count = self._rows.memories, self._rows.index_rk.numel()
        one = memories.keys_nstd[0].numel() if len(memories) else 0
        return 2 * one * count * self._placer.host.dtype.itemsize <= _AT_ONCE_BYTES

    def is_as(self, other: PieceMemory) -> bool:
        """Whether the rows read the same memories at the same positions as those of another."""
        mine, its = self._rows, other._rows
        return (
            mine.memories is its.memories
            and torch.equal(mine.index_rk, its.index_rk)
            and torch.equal(mine.origin_r, its.origin_r)
        )

    def select(self, rows: Tensor) -> PieceMemory:
        """The same for other rows, by index."""
        mine = self._rows
        chosen = RowMemories(mine.memories, mine.index_rk[rows], mine.origin_r[rows])
        other = PieceMemory(self._placer, chosen, self._statistics)
        if self._placed is not None:
            other._placed = {n: layer.select(rows) for n, layer in self._placed.items()}
        return other


@dataclass
class Plan:
    """What the columns of a text of more than one token read.

    Attributes:
        stretches: (start, stop) of columns that read the same, in order; all columns.
        memory: of all rows of the first stretch, then of all rows of the second, and so on; None
            where nothing was found for any.
        plain_sb: which rows of which stretch have no memory and attend plainly, on the CPU.
        seen: columns that have been through the decoder.
        now: the columns that are going through it.
    """

    stretches: list[tuple[int, int]]
    memory: PieceMemory | None
    plain_sb: Tensor
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
        several = query.shape[2] > 1 and self.plan is not None
        memory = self.plan.memory if several and self.plan is not None else self.current
        if memory is None:
            return underneath(module, query, key, value, mask, **kwargs)
        weighing = self._weighing(module, kwargs)
        if several:
            out = self._text(underneath, module, query, key, value, mask, weighing, kwargs)
            return out.contiguous(), None
        layer = memory.placed.get(int(module.layer_idx))
        if layer is None:
            return underneath(module, query, key, value, mask, **kwargs)
        out = attend(
            layer, query, key, value, mask, weighing, position_ids=kwargs.get("position_ids")
        )
        if memory.has_memory_b is not None:
            plain, _ = underneath(module, query, key, value, mask, **kwargs)
            out = torch.where(memory.has_memory_b[:, None, None, None], out, plain)
        return out.contiguous(), None

    def _text(
        self,
        underneath: Any,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        weighing: Weighing,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Attention of several columns of the plan: (b, n, h, d)."""
        plan = self.plan
        assert plan is not None and plan.memory is not None
        first, last = plan.now
        b, n = query.shape[0], query.shape[2]
        assert last - first == n
        number = [s for s, (a, z) in enumerate(plan.stretches) if a < last and z > first]
        low, high = number[0], number[-1] + 1
        spans = [(max(a, first) - first, min(z, last) - first) for a, z in plan.stretches[low:high]]
        plain_sb = plan.plain_sb[low:high]
        layer = None
        if not bool(plain_sb.all()):
            layer = plan.memory.layer(int(module.layer_idx), low * b, high * b)
        if layer is None:
            return underneath(module, query, key, value, mask, **kwargs)[0]
        position_ids = kwargs.get("position_ids")
        context = attend_context(query, key, value, mask, weighing)
        if context is not None:
            parts = []
            for start, stop, length in _runs(spans):
                of = layer.rows(start * b, stop * b)
                a, z = spans[start][0], spans[stop - 1][1]
                parts.append(_pieces_of(of, query[:, :, a:z], weighing, length, position_ids, a, z))
            outs, totals = zip(*parts, strict=True)
            out = merge(context, (torch.cat(outs, 2), torch.cat(totals, 2)))
        else:
            out = torch.cat(
                [
                    attend(
                        layer.rows(s * b, (s + 1) * b),
                        query[:, :, a:z],
                        # Keys after the last query's own are of no use. Without a mask, the first
                        # query's own key is the first; with one, the last's is the last or before.
                        key[:, :, : z if mask is None else key.shape[2] - n + z],
                        value[:, :, : z if mask is None else key.shape[2] - n + z],
                        None if mask is None else mask[:, :, a:z],
                        weighing,
                        first=a,
                        position_ids=None if position_ids is None else position_ids[:, a:z],
                    )
                    for s, (a, z) in enumerate(spans)
                ],
                dim=1,
            )
        if bool(plain_sb.any()):
            plain, _ = underneath(module, query, key, value, mask, **kwargs)
            lengths = torch.tensor([z - a for a, z in spans])
            where = plain_sb.T.repeat_interleave(lengths, 1).to(out.device)
            out = torch.where(where[:, :, None, None], plain, out)
        return out

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


def _runs(spans: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(first span, span after the last, length) of neighbours of one length."""
    runs: list[tuple[int, int, int]] = []
    for number, (start, stop) in enumerate(spans):
        if runs and runs[-1][2] == stop - start:
            runs[-1] = (runs[-1][0], number + 1, stop - start)
        else:
            runs.append((number, number + 1, stop - start))
    return runs


def _pieces_of(
    memory: LayerMemory,
    query_bhnd: Tensor,
    weighing: Weighing,
    length: int,
    position_ids: Tensor | None,
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor]:
    """Pieces of one length, each over its own rows of the memory, in one go."""
    b, n = query_bhnd.shape[0], query_bhnd.shape[2]
    pieces = n // length

    def apart(states: Tensor) -> Tensor:  # (b, h, n, ...) -> (pieces * b, h, length, ...)
        return states.unflatten(2, (pieces, length)).movedim(2, 0).flatten(0, 1)

    def together(states: Tensor) -> Tensor:
        return states.unflatten(0, (pieces, b)).movedim(0, 2).flatten(2, 3)

    if position_ids is not None:
        wide = position_ids[:, start:stop].expand(b, -1)[:, None]
        position_ids = apart(wide)[:, 0]
    out, total = attend_memory(memory, apart(query_bhnd), weighing, position_ids)
    return together(out), together(total)
