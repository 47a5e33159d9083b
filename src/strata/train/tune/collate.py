"""Batches that say which references their tokens read.

Shapes: b rows, c chunks of a row on a grid from its first column, n tokens of a chunk, r references
that a chunk reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strata.train.tune.find import stretches

READS = "reads"
REFERENCES, PIECES = "references", "pieces"  # columns of a dataset
Example = Mapping[str, Any]


@dataclass(frozen=True)
class Reads:
    """What the tokens of a batch read.

    Attributes:
        texts: references, each once.
        index_bcr: which of them; -1 for none. c is 1 where every token of a row reads the same.
        held_bcnr: which of a chunk's each token reads; None for all.
    """

    texts: list[str]
    index_bcr: Tensor
    held_bcnr: Tensor | None


class ReadingCollator:
    """Adds `reads` to the batches of one of TRL's collators.

    Args:
        collate: TRL's; it pads on the right.
        chunk_tokens: tokens of a piece.
        answers: rows of a batch for each example: 1 (SFT), or 2 (DPO: all chosen, all rejected).
    """

    def __init__(
        self,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        *,
        chunk_tokens: int,
        answers: int,
    ) -> None:
        self._collate, self._chunk, self._answers = collate, chunk_tokens, answers

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate, and name what is read."""
        batch = self._collate(examples)
        width = batch["input_ids"].shape[1]
        batch[READS] = reads([*examples] * self._answers, width=width, chunk=self._chunk)
        return batch


def prompt_tokens(example: Example) -> int:
    """How many tokens come before the completion."""
    if "prompt_ids" in example:
        return len(example["prompt_ids"])
    labels = example["labels"]
    return next((at for at, label in enumerate(labels) if label != -100), len(labels))


def reads(examples: Sequence[Example], *, width: int, chunk: int) -> Reads:
    """What the rows of a batch read.

    Args:
        examples: one a row, with `references` (texts, or None) and `pieces` (of each piece, which
            of them; None where the whole row reads all).
        width: columns of the batch.
        chunk: tokens of a chunk and of a piece.
    """
    numbers: dict[str, int] = {}
    rows: list[list[tuple[int, int, list[int]]]] = []
    for example in examples:
        texts = example.get(REFERENCES) or []
        mine = [numbers.setdefault(text, len(numbers)) for text in texts]
        pieces = example.get(PIECES)
        if pieces is None or not mine:
            rows.append([(0, width, mine)])
            continue
        parts = stretches(prompt_tokens(example), len(pieces), chunk, width)
        rows.append(
            [
                (start, stop, [mine[at] for at in piece])
                for (start, stop), piece in zip(parts, pieces, strict=True)
            ]
        )
    if all(len(row) == 1 for row in rows):
        most = max(len(row[0][2]) for row in rows)
        index = [[*row[0][2], *[-1] * (most - len(row[0][2]))] for row in rows]
        index_bcr = torch.tensor(index, dtype=torch.int64).view(len(rows), 1, most)
        return Reads(list(numbers), index_bcr, None)
    return Reads(list(numbers), *_by_chunk(rows, width=width, chunk=chunk))


def _by_chunk(
    rows: Sequence[Sequence[tuple[int, int, list[int]]]], *, width: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Index and held of stretches that begin and end within chunks of the grid."""
    chunks = -(-width // chunk)
    places: list[list[list[int]]] = []
    for row in rows:
        of_row: list[list[int]] = []
        for begin in range(0, width, chunk):
            met = [part for part in row if part[0] < begin + chunk and part[1] > begin]
            of_row.append(list(dict.fromkeys(number for part in met for number in part[2])))
        places.append(of_row)
    most = max(len(one) for row in places for one in row)
    index = torch.full((len(rows), chunks, most), -1, dtype=torch.int64)
    held = torch.zeros(len(rows), chunks, chunk, most, dtype=torch.bool)
    for b, row in enumerate(rows):
        for c, numbers in enumerate(places[b]):
            index[b, c, : len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
            for start, stop, read in row:
                first, last = max(start - c * chunk, 0), min(stop - c * chunk, chunk)
                if first < last and read:
                    held[b, c, first:last, [numbers.index(number) for number in read]] = True
    return index, held
