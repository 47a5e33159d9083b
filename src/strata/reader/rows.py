"""Rows of training text: references in front of questions, questions alone, or prose.

A row is one document: `<bos>`, the text, `<eos>`, as full as its parts allow. Its tokens can be
counted part by part, for a byte-level tokenizer splits a text before every line break.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from strata.data.references import Chosen
from strata.reader.draw import Draw
from strata.reader.settings import Level
from strata.reader.writing import BREAK, Said, Told, Writer, line

_ENDS = 2  # <bos> and <eos>
_REFERENCES_SHARE = 5 / 8  # of the room, at most, so that there is some for questions
_LEAST_EPISODE_TOKENS = 64  # room in which another reference is begun
_TIMES_ASKED = 2


@dataclass(frozen=True)
class Row:
    """A row.

    Attributes:
        text: without special tokens.
        own: the reference of each of its chunks, None where it has none.
        kind: "text", "memory" or "prose".
        num_tokens: special ones included.
    """

    text: str
    own: tuple[Chosen | None, ...]
    kind: str
    num_tokens: int


class _Lines:
    """The lines of a row while it is written: each after a line break, while there is room."""

    def __init__(self, writer: Writer, room: int) -> None:
        self.position = 0
        self._count = writer.count
        self.room = room
        self._chunk_tokens = writer.config.chunk_tokens
        self.parts: list[str] = []

    def row(self, kind: str, own: Sequence[Chosen | None] = ()) -> Row:
        """What was written."""
        num_tokens = self.position + _ENDS
        used = -(-num_tokens // self._chunk_tokens)
        return Row("".join(self.parts), (*own, *[None] * used)[:used], kind, num_tokens)

    def add(self, text: str) -> bool:
        """Add a part; False where it does not fit."""
        (size,) = self._count([text])
        if size > self.room:
            return False
        self.room -= size
        self.parts.append(text)
        self.position += size
        return True


def text_row(writer: Writer, draw: Draw, level: Level) -> Row:
    """References, then questions about their facts, and so on until the row is full.

    Every fact of the references is asked for, in random order, before any is asked for again.
    """
    lines = _Lines(writer, level.row_tokens - _ENDS)
    while lines.room >= _LEAST_EPISODE_TOKENS:
        told = _references(writer, draw, level, int(lines.room * _REFERENCES_SHARE))
        before = BREAK if lines.parts else ""
        if not lines.add(before + BREAK.join(one.text for one in told)):
            break
        facts = [said for one in told for said in one.said]
        before = BREAK
        for said in (said for _ in range(_TIMES_ASKED) for said in draw.order(facts)):
            if not lines.add(before + line(draw, said, level)):
                return lines.row("text")
            before = "\n"
    return lines.row("text")


def _references(writer: Writer, draw: Draw, level: Level, room: int) -> list[Told]:
    """One reference, and more while there is room."""
    told = writer.references(draw, draw.between(*level.references), level, most_tokens=room)
    counts = writer.count([one.text + BREAK for one in told])
    fitting = [n for n in range(len(told)) if n == 0 or sum(counts[: n + 1]) <= room]
    return [told[n] for n in fitting]


def memory_row(writer: Writer, draw: Draw, level: Level, name: str) -> Row:
    """Questions alone; what answers them stands in the references of the chunks.

    The first line that begins in a chunk is about the chunk's own reference; later ones about
    facts, not asked for before, of this and the `reach - 1` chunks before it. A line may end in the
    next chunk, which reads `reach + 1`: so all it needs is read until its end.

    Args:
        name: of the row; names its references.
    """
    config = writer.config
    chunk_tokens = config.chunk_tokens
    num_chunks = -(-level.row_tokens // chunk_tokens)
    told = writer.references(draw, num_chunks, level)
    lines = _Lines(writer, level.row_tokens - _ENDS)
    own: list[Chosen | None] = [None] * num_chunks
    asked: dict[int, list[Said]] = {}
    while True:
        # Behind <bos>, and the line break that is no part of a line's own chunk.
        chunk = (1 + lines.position + bool(lines.parts)) // chunk_tokens
        if chunk >= num_chunks:
            break
        is_first = chunk not in asked
        if is_first:
            unasked = draw.order(told[chunk].said)
        else:
            reached = range(max(0, chunk - config.reach + 1), chunk + 1)
            unasked = draw.order([said for c in reached for said in asked.get(c, ())])
        said = unasked[0] if unasked else draw.pick(told[chunk].said)
        if not lines.add(("\n" if lines.parts else "") + line(draw, said, level)):
            break
        if is_first:
            own[chunk] = Chosen(f"{name}.{chunk}", name, told[chunk].text)
            asked[chunk] = list(told[chunk].said)
        for waiting in asked.values():
            if said in waiting:
                waiting.remove(said)
    return lines.row("memory", own)


def prose_row(writer: Writer, paragraphs: Iterator[list[str]], level: Level) -> Row:
    """Whole sentences of consecutive paragraphs, a paragraph a line."""
    lines = _Lines(writer, level.row_tokens - _ENDS)
    for sentences in paragraphs:
        for number, sentence in enumerate(sentences):
            before = (" " if number else "\n") if lines.parts else ""
            if not lines.add(before + sentence):
                if lines.parts:
                    return lines.row("prose")
                break  # a sentence longer than a row
    return lines.row("prose")
