"""When memories change: before a prompt, and every so many generated tokens.

What a row reads is a function of its own text up to the last border, never of its place in the
batch: beams change places at every step, and each takes what belongs to its text.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strata.explicit.attach.fetch import AttachError, Fetched, Fetcher, FoundHit, Statistics, Window
from strata.explicit.attach.pieces import (
    Piece,
    Query,
    generated_piece,
    prompt_pieces,
    stretches,
    with_first_generated,
)
from strata.explicit.attach.placing import Placer, RowMemories
from strata.explicit.attach.reader import PieceMemory, Plan, Reader
from strata.explicit.memories import Memories


@dataclass(frozen=True)
class UsedMemory:
    """A memory that was injected, and where its text stands: document[start:end]."""

    id: str
    source: str
    start: int
    end: int
    score: float
    text: str


@dataclass(frozen=True)
class Used:
    """What one piece of one row read.

    Attributes:
        call: number of the `generate` or forward call, from 0.
        row: of the batch that was given.
        beam: which of the row's beams or returned sequences, at that step.
        start, stop: tokens that read, counted in the row's text without its padding; the text may
            end before `stop`.
        query: the text that was searched for.
        memories: what was injected before the piece, best first.
    """

    call: int
    row: int
    beam: int
    start: int
    stop: int
    query: str
    memories: tuple[UsedMemory, ...]

    @property
    def injected(self) -> int:
        """How many memories."""
        return len(self.memories)


@dataclass
class _Text:
    """The text of one call, row by row (repeated for beams).

    Attributes:
        firsts, ends: columns of each row's prompt.
        origins_b: position of each row's first token.
        pieces: of the prompt.
        windows: what each piece asked with.
        expand: rows of the decoder for each given row.
        eos_ids: after one of these a row is finished; empty for beams, which end otherwise.
        number: of the generated piece that is being read; 0 for what the prompt's last piece reads.
    """

    firsts: list[int]
    ends: list[int]
    origins_b: Tensor
    pieces: list[list[Piece]]
    windows: list[list[Window]]
    expand: int
    eos_ids: Tensor | None
    number: int = 0


class Refresher:
    """Decides what the reader reads.

    Args:
        reader, placer, fetcher, statistics: of the session.
        chunk_tokens: tokens of a piece.
        prompt_query: whose text the pieces of a prompt ask with.
        prefetch_tokens: how many tokens before a border the query for it ends; 0 searches at the
            border, more searches on a thread meanwhile.
        top_k: memories of a piece, at most; the room kept for them while decoding.
        used: is appended to.
    """

    def __init__(
        self,
        reader: Reader,
        placer: Placer,
        fetcher: Fetcher,
        statistics: Statistics,
        *,
        chunk_tokens: int,
        prompt_query: Query,
        prefetch_tokens: int,
        top_k: int,
        used: list[Used],
    ) -> None:
        self._reader = reader
        self._placer = placer
        self._fetcher = fetcher
        self._statistics = statistics
        self._chunk = chunk_tokens
        self._query = prompt_query
        self._prefetch = prefetch_tokens
        self._top_k = top_k
        self._used = used
        self._text: _Text | None = None
        self._fetched = Fetched({}, None, {})
        self._windows: tuple[Window, ...] = ()
        self._calls = 0
        self._warned = False

    def begin(
        self,
        ids_bt: Tensor,
        mask_bt: Tensor | None,
        position_ids: Tensor | None,
        *,
        generating: bool,
        expand: int = 1,
        eos_ids: Tensor | None = None,
        past: int = 0,
    ) -> None:
        """Find the memories of a prompt's pieces and give the reader its plan.

        Args:
            ids_bt: the prompt, padded on either side (generating: on the left).
            mask_bt: 0 where it is padded.
            position_ids: (1 or b, t) if the caller chose them.
            generating: whether tokens follow.
            expand: rows of the decoder for each row here.
            eos_ids: what ends a row; None for beams.
            past: columns that the decoder's cache holds already.

        Raises:
            AttachError: a row without a token.
            RetrievalError: the source failed.
        """
        self._reader.clear()
        width = ids_bt.shape[1]
        firsts, ends = _bounds(ids_bt, mask_bt)
        if position_ids is not None:
            chosen = position_ids.expand(len(firsts), -1)
            origins = torch.stack([chosen[row, first] for row, first in enumerate(firsts)])
        elif generating:
            origins = torch.zeros(len(firsts), dtype=torch.long)
        else:  # without position ids a forward call counts columns
            origins = torch.tensor(firsts)
        tokens = ids_bt.tolist()
        pieces = [
            prompt_pieces(a, b, self._chunk, query=self._query)
            for a, b in zip(firsts, ends, strict=True)
        ]
        if generating:
            pieces = [
                with_first_generated(parts, self._chunk, query=self._query) for parts in pieces
            ]
        windows = [
            [tuple(row[slice(*piece.query)]) for piece in parts]
            for row, parts in zip(tokens, pieces, strict=True)
        ]
        self._take(self._fetcher.fetch(w for row in windows for w in row))
        call = self._calls
        self._calls += 1
        for row, parts in enumerate(pieces):
            for piece, window in zip(parts, windows[row], strict=True):
                self._record(call, row, 0, firsts[row], piece, window)
        self._statistics.refreshes += 1
        each = torch.arange(len(firsts)).repeat_interleave(expand)
        rows = each.tolist()
        self._text = _Text(
            [firsts[r] for r in rows],
            [ends[r] for r in rows],
            origins[each.to(origins.device)].to(self._placer.host.device),
            [pieces[r] for r in rows],
            [windows[r] for r in rows],
            expand,
            eos_ids,
        )
        self._plan(self._text.pieces, self._text.windows, width, past)
        self._read([row[-1] for row in self._text.windows])

    def step(self, ids_bt: Tensor, *, cached: bool) -> None:
        """Called before each forward pass after the prompt's, with all tokens so far.

        Args:
            ids_bt: one row for each of the decoder's.
            cached: whether only the last column goes through the decoder.
        """
        text = self._text
        assert text is not None
        width, end = ids_bt.shape[1], max(text.ends)
        generated = width - end
        number = (generated - 1) // self._chunk
        if cached:
            self._reader.plan = None
        coming = (generated + self._prefetch) // self._chunk
        if self._prefetch and coming and (generated + self._prefetch) % self._chunk == 0:
            alive = self._alive(ids_bt)
            asked = self._windows_of(ids_bt, coming)
            self._fetcher.ahead(asked[row] for row in alive)
        turned = number > text.number
        text.number = number
        beams = text.eos_ids is None and text.expand > 1
        if number and (turned or beams or not cached):
            self._turn(ids_bt, number, record=turned)
        if not cached:
            parts, windows = list(text.pieces), list(text.windows)
            for earlier in range(1, number + 1):
                asked = self._windows_of(ids_bt, earlier)
                self._take(self._missing(asked), add=True)
                for row, window in enumerate(asked):
                    parts[row] = [*parts[row], self._piece(row, earlier)]
                    windows[row] = [*windows[row], window]
            self._plan(parts, windows, width, 0)
            assert self._reader.plan is not None
            self._reader.plan.begin(width)

    def end(self) -> None:
        """The call is over: read nothing, wait for nothing."""
        self._reader.clear()
        self._fetcher.drop_ahead()
        self._text = None
        self._take(Fetched({}, None, {}))
        self._windows = ()

    def _turn(self, ids_bt: Tensor, number: int, *, record: bool) -> None:
        text = self._text
        assert text is not None
        alive = self._alive(ids_bt)
        if not alive:
            return
        asked = self._windows_of(ids_bt, number)
        # What a finished row reads is thrown away: let it read what the others do.
        windows = [w if row in alive else asked[min(alive)] for row, w in enumerate(asked)]
        if set(windows) <= set(self._windows):
            if tuple(windows) != self._windows:
                where = [self._windows.index(window) for window in windows]
                current = self._reader.current
                if current is not None:
                    at = torch.tensor(where, device=self._placer.host.device)
                    self._reader.current = current.select(at)
                self._windows = tuple(windows)
        else:
            self._take(self._fetcher.fetch(windows), add=self._reader.plan is not None)
            self._read(windows)
        if record:
            self._statistics.refreshes += 1
            for row in sorted(alive):
                given, beam = divmod(row, text.expand)
                piece = self._piece(row, number)
                self._record(self._calls - 1, given, beam, text.firsts[row], piece, asked[row])

    def _missing(self, windows: Sequence[Window]) -> Fetched:
        unknown = [window for window in windows if window not in self._fetched.hits]
        return self._fetcher.fetch(unknown) if unknown else Fetched({}, None, {})

    def _take(self, fetched: Fetched, *, add: bool = False) -> None:
        """Hold what was found, instead of what was found before or beside it."""
        memories = fetched.memories
        if memories is not None:
            memories = memories.to(self._placer.host.device)
        if add and self._fetched.memories is not None:
            old = self._fetched
            assert old.memories is not None
            slots = dict(old.slots)
            if memories is not None:
                slots |= {name: n + len(old.memories) for name, n in fetched.slots.items()}
                memories = Memories.cat([old.memories, memories])
            self._fetched = Fetched(
                old.hits | fetched.hits, old.memories if memories is None else memories, slots
            )
        elif add:
            self._fetched = Fetched(self._fetched.hits | fetched.hits, memories, fetched.slots)
        else:
            self._fetched = Fetched(fetched.hits, memories, fetched.slots)

    def _read(self, windows: Sequence[Window]) -> None:
        """Let single tokens read what these windows found, in room for `top_k` memories."""
        self._windows = tuple(windows)
        memory = self._memory(windows, self._top_k)
        prompt = None if self._reader.plan is None else self._reader.plan.memory
        if memory is not None and prompt is not None and prompt.is_as(memory):
            memory = prompt  # of one piece: it is put in place once
        self._reader.current = None if memory is None else memory.place()

    def _plan(
        self, pieces: list[list[Piece]], windows: list[list[Window]], width: int, past: int
    ) -> None:
        asked = [
            dict(zip(row_pieces, row_windows, strict=True))
            for row_pieces, row_windows in zip(pieces, windows, strict=True)
        ]
        cut = stretches(pieces, width)
        rows = [
            (None if piece is None else asked[r][piece])
            for *_, read in cut
            for r, piece in enumerate(read)
        ]
        found = self._fetched.hits
        has = torch.tensor([w is not None and bool(found[w]) for w in rows]).view(len(cut), -1)
        # What padding reads is of no use: it need not be plain, unless all of its row is.
        padding = torch.tensor([w is None for w in rows]).view_as(has)
        self._reader.plan = Plan(
            [(start, stop) for start, stop, _ in cut],
            self._memory(rows, None),
            ~has & ~(padding & has.any(0)),
            seen=past,
        )

    def _memory(self, windows: Sequence[Window | None], room: int | None) -> PieceMemory | None:
        assert self._text is not None
        found = self._fetched
        hits: list[tuple[FoundHit, ...]] = [
            () if window is None else found.hits[window] for window in windows
        ]
        if found.memories is None or not any(hits):
            return None
        index = torch.full((len(hits), room or max(map(len, hits))), -1)
        for row, row_hits in enumerate(hits):
            for place, hit in enumerate(row_hits):
                index[row, place] = found.slots[hit.id]
        index = index.to(self._placer.host.device)
        origins = self._text.origins_b.repeat(len(hits) // len(self._text.origins_b))
        rows = RowMemories(found.memories, index, origins)
        return PieceMemory(self._placer, rows, self._statistics)

    def _piece(self, row: int, number: int) -> Piece:
        text = self._text
        assert text is not None
        return generated_piece(
            text.firsts[row], text.ends[row], number, self._chunk, self._prefetch
        )

    def _windows_of(self, ids_bt: Tensor, number: int) -> list[Window]:
        text = self._text
        assert text is not None
        queries = [self._piece(row, number).query for row in range(len(text.firsts))]
        low, high = min(a for a, _ in queries), max(b for _, b in queries)
        tokens = ids_bt[:, low:high].tolist()
        return [tuple(row[a - low : b - low]) for row, (a, b) in zip(tokens, queries, strict=True)]

    def _alive(self, ids_bt: Tensor) -> set[int]:
        """Rows whose text goes on."""
        text = self._text
        assert text is not None
        if text.eos_ids is None:
            return set(range(len(ids_bt)))
        generated = ids_bt[:, max(text.ends) :]
        over = torch.isin(generated, text.eos_ids.to(generated.device)).any(1)
        return {row for row, done in enumerate(over.tolist()) if not done}

    def _record(
        self, call: int, row: int, beam: int, first: int, piece: Piece, window: Window
    ) -> None:
        hits = self._fetched.hits[window]
        query = self._fetcher.query(window)
        self._statistics.injected += len(hits)
        self._used.append(
            Used(
                call,
                row,
                beam,
                piece.start - first,
                piece.stop - first,
                query,
                tuple(
                    UsedMemory(h.id, h.source, h.start, h.end, float(h.score), h.text) for h in hits
                ),
            )
        )
        if query and not hits and not self._warned:
            self._warned = True
            warnings.warn(
                f"no memory was injected for tokens {piece.start - first} to {piece.stop - first} "
                f"of row {row}: the source found nothing for their text (said once; "
                "see memory.used)",
                stacklevel=2,
            )


def _bounds(ids_bt: Tensor, mask_bt: Tensor | None) -> tuple[list[int], list[int]]:
    """First column and column after the last, of each row's text."""
    rows, width = ids_bt.shape
    if width == 0:
        raise AttachError("the prompt has no token; give at least one")
    if mask_bt is None:
        return [0] * rows, [width] * rows
    there = mask_bt != 0
    if there.shape != ids_bt.shape:
        raise AttachError(
            f"the attention mask has shape {list(there.shape)}, the prompt {list(ids_bt.shape)}; "
            "memory needs one number for each token"
        )
    empty = (~there.any(1)).nonzero().flatten().tolist()
    if empty:
        raise AttachError(f"row {empty[0]} of the prompt has no token; give at least one")
    numbers = there.int()
    firsts = numbers.argmax(1).tolist()
    ends = (width - numbers.flip(1).argmax(1)).tolist()
    return firsts, ends
