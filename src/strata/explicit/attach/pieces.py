"""Which tokens ask for memories, and which tokens read them.

A prompt is cut into pieces of `chunk` tokens counted from its end, so that the rows of a
left-padded batch share borders and padding moves none. Each piece reads what was found for its own
text; the first `chunk` generated tokens read what the prompt's last piece asked for; then every
`chunk` generated tokens ask for those that follow. Or each piece of the prompt, too, reads what was
found for the piece before it, as if it had been generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

Query = Literal["own", "previous"]


@dataclass(frozen=True)
class Piece:
    """Columns of one row of a batch: [start, stop) read what was found for the text of the query.

    Attributes:
        query: columns [a, b) whose text is the query.
        start, stop: columns that read.
    """

    query: tuple[int, int]
    start: int
    stop: int


def prompt_pieces(first: int, end: int, chunk: int, *, query: Query = "own") -> list[Piece]:
    """The pieces of a prompt in columns [first, end); the first may be short.

    Args:
        first, end: columns of the prompt.
        chunk: tokens in a piece.
        query: "previous": each asks with the text of the one before it, the first with none.
    """
    borders = [*range(end, first, -chunk), first][::-1]
    pieces = [Piece((a, b), a, b) for a, b in pairwise(borders)]
    if query == "own":
        return pieces
    asked = [(first, first), *(piece.query for piece in pieces[:-1])]
    return [replace(piece, query=span) for piece, span in zip(pieces, asked, strict=True)]


def with_first_generated(
    pieces: Sequence[Piece], chunk: int, *, query: Query = "own"
) -> list[Piece]:
    """The pieces of a prompt, and the first `chunk` generated tokens, which ask with its last one.

    Where that one asks for itself, too, it is lengthened; else they are a piece of their own.

    Args:
        pieces: of the prompt, at least one, asked for as `query` says.
        chunk: tokens in a piece.
        query: as in `prompt_pieces`.
    """
    *others, last = pieces
    if query == "own":
        return [*others, replace(last, stop=last.stop + chunk)]
    return [*pieces, Piece((last.start, last.stop), last.stop, last.stop + chunk)]


def generated_piece(first: int, end: int, number: int, chunk: int, ahead: int) -> Piece:
    """A piece of generated text: number 1 begins `chunk` tokens after the prompt's end.

    Args:
        first, end: columns of the prompt.
        number: 1, 2, ...; the tokens of number 0 read what the prompt's last piece reads.
        chunk: tokens in a piece.
        ahead: how many tokens before the piece its query ends.
    """
    start = end + number * chunk
    asked = start - ahead
    return Piece((max(first, asked - chunk), asked), start, start + chunk)


def stretches(rows: list[list[Piece]], width: int) -> list[tuple[int, int, list[Piece | None]]]:
    """Columns cut where any row changes its piece.

    Args:
        rows: pieces of each row, in order, not overlapping.
        width: number of columns.

    Returns:
        (start, stop, piece of each row or None) for all columns, in order.
    """
    edges = {0, width}
    for pieces in rows:
        edges.update(edge for p in pieces for edge in (p.start, p.stop) if 0 < edge < width)
    borders = sorted(edges)
    return [
        (a, b, [next((p for p in pieces if p.start <= a < p.stop), None) for pieces in rows])
        for a, b in pairwise(borders)
    ]
