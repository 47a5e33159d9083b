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
from strata.reader.writing import BREAK, Said, Told, ToldBy, line

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
        kind: "text", "memory" or "prose"; "country_text" and "country_memory" for the first two
            where they tell of countries; "known" for what is told without any reference.
        num_tokens: special ones included.
    """

    text: str
    own: tuple[Chosen | None, ...]
    kind: str
    num_tokens: int


class Lines:
    """The lines of a row while it is written: each after a line break, while there is room."""

    def __init__(self, writer: ToldBy, row_tokens: int) -> None:
        self.position = 0
        self._count = writer.count
        self.room = row_tokens - _ENDS
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


def text_row(writer: ToldBy, draw: Draw, level: Level, aside: Draw, *, kind: str = "text") -> Row:
    """References, then questions about their facts, and so on until the row is full.

    Every fact of the references is asked for, in random order, before any is asked for again.

    Args:
        writer, draw: tell.
        level: how hard it is.
        aside: draws the questions that nothing answers, so that the others are the same without.
        kind: of the row.
    """
    lines = Lines(writer, level.row_tokens)
    before_them: list[Told] = []
    while lines.room >= _LEAST_EPISODE_TOKENS:
        told = _references(writer, draw, level, int(lines.room * _REFERENCES_SHARE))
        before = BREAK if lines.parts else ""
        if not lines.add(before + BREAK.join(one.text for one in told)):
            break
        before_them += told
        facts = [said for one in told for said in one.said]
        before = BREAK
        for said in (said for _ in range(_TIMES_ASKED) for said in draw.order(facts)):
            if aside.chance(level.unanswerable):
                missing = writer.missing(aside, before_them)
                if missing and lines.add(before + missing):
                    before = "\n"
            if not lines.add(before + line(draw, said, level)):
                return lines.row(kind)
            before = "\n"
    return lines.row(kind)


def _references(writer: ToldBy, draw: Draw, level: Level, room: int) -> list[Told]:
    """One reference, and more while there is room."""
    told = writer.references(draw, draw.between(*level.references), level, most_tokens=room)
    counts = writer.count([one.text + BREAK for one in told])
    fitting = [n for n in range(len(told)) if n == 0 or sum(counts[: n + 1]) <= room]
    return [told[n] for n in fitting]


def memory_row(
    writer: ToldBy, draw: Draw, level: Level, aside: Draw, name: str, *, kind: str = "memory"
) -> Row:
    """Questions alone; what answers them stands in the references of the chunks.

    The first line that begins in a chunk is about the chunk's own reference; later ones about
    facts, not asked for before, of this and the `reach - 1` chunks before it. A line may end in the
    next chunk, which reads `reach + 1`: so all it needs is read until its end. A line that nothing
    answers may stand anywhere; no reference of the whole row answers it.

    Args:
        writer, draw, level, aside, kind: as in `text_row`.
        name: of the row; names its references.
    """
    config = writer.config
    chunk_tokens = config.chunk_tokens
    num_chunks = -(-level.row_tokens // chunk_tokens)
    told = writer.references(draw, num_chunks, level)
    lines = Lines(writer, level.row_tokens)
    own: list[Chosen | None] = [None] * num_chunks
    asked: dict[int, list[Said]] = {}
    while True:
        # Behind <bos>, and the line break that is no part of a line's own chunk.
        chunk = (1 + lines.position + bool(lines.parts)) // chunk_tokens
        if chunk >= num_chunks:
            break
        is_first = chunk not in asked
        said, text = None, None
        if aside.chance(level.unanswerable):
            text = writer.missing(aside, told)
        if text is None:
            if is_first:
                unasked = draw.order(told[chunk].said)
            else:
                reached = range(max(0, chunk - config.reach + 1), chunk + 1)
                unasked = draw.order([said for c in reached for said in asked.get(c, ())])
            said = unasked[0] if unasked else draw.pick(told[chunk].said)
            text = line(draw, said, level)
        if not lines.add(("\n" if lines.parts else "") + text):
            break
        if is_first:
            own[chunk] = Chosen(f"{name}.{chunk}", name, told[chunk].text)
            asked[chunk] = list(told[chunk].said)
        for waiting in asked.values():
            if said in waiting:
                waiting.remove(said)
    return lines.row(kind, own)


def prose_row(writer: ToldBy, paragraphs: Iterator[list[str]], level: Level) -> Row:
    """Whole sentences of consecutive paragraphs, a paragraph a line."""
    lines = Lines(writer, level.row_tokens)
    for sentences in paragraphs:
        for number, sentence in enumerate(sentences):
            before = (" " if number else "\n") if lines.parts else ""
            if not lines.add(before + sentence):
                if lines.parts:
                    return lines.row("prose")
                break  # a sentence longer than a row
    return lines.row("prose")
