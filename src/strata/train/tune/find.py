"""References of rows that name none, found piece by piece as `attach` finds them.

The queries are those that `generate` will make: the text of each piece of the prompt, counted from
its end, and of each piece of the completion that another one follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from strata.explicit.attach.pieces import generated_piece, prompt_pieces
from strata.explicit.retrieve import Retriever

_SEARCHED_AT_ONCE = 64


@dataclass(frozen=True)
class Found:
    """What one row reads.

    Attributes:
        references: texts.
        pieces: for each piece, prompt first, which of them it reads.
    """

    references: list[str]
    pieces: list[list[int]]


@dataclass(frozen=True)
class Finder:
    """Finds what the pieces of rows read.

    Attributes:
        retriever: over a bank.
        tokenizer: of the model.
        chunk_tokens: tokens of a piece.
        top_k: references of a piece, at most.
        min_score: leave out what scores less.
    """

    retriever: Retriever
    tokenizer: Any
    chunk_tokens: int
    top_k: int
    min_score: float | None = None

    def find(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Found]:
        """Search for all pieces of some rows.

        Args:
            prompts: token ids, at least one each.
            completions: the same; empty where the whole completion reads what the prompt's last
                piece reads.
            progress: told of the queries answered.

        Raises:
            StrataError: the bank cannot be searched.
        """
        # After the last token nothing follows: what it would read is of no use.
        asked = [
            [
                self._text([*prompt, *completion][slice(*query)])
                for query in queries(len(prompt), len(completion) - 1, self.chunk_tokens)
            ]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        hits = self._search(list(dict.fromkeys(text for row in asked for text in row)), progress)
        return [_of_row([hits[text] for text in row]) for row in asked]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _search(
        self, texts: list[str], progress: Callable[[int], None] | None
    ) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {"": []}
        wanted = [text for text in texts if text]
        for begin in range(0, len(wanted), _SEARCHED_AT_ONCE):
            part = wanted[begin : begin + _SEARCHED_AT_ONCE]
            for text, hits in zip(part, self.retriever.search(part, self.top_k), strict=True):
                kept = dict.fromkeys(
                    hit.text
                    for hit in hits
                    if self.min_score is None or hit.score >= self.min_score
                )
                found[text] = list(kept)[: self.top_k]
            if progress is not None:
                progress(begin + len(part))
        return found


def queries(prompt: int, completion: int, chunk: int) -> list[tuple[int, int]]:
    """Columns [a, b) whose text each piece of a row asks with, prompt first."""
    asked = [piece.query for piece in prompt_pieces(0, prompt, chunk)]
    further = range(1, -(-completion // chunk))
    return asked + [generated_piece(0, prompt, number, chunk, 0).query for number in further]


def stretches(prompt: int, pieces: int, chunk: int, width: int) -> list[tuple[int, int]]:
    """Columns [start, stop) that read what each piece asked for; the last reads to `width`."""
    parts = [(piece.start, piece.stop) for piece in prompt_pieces(0, prompt, chunk)]
    for number in range(1, pieces - len(parts) + 1):
        parts[-1] = (parts[-1][0], prompt + number * chunk)
        parts.append((prompt + number * chunk, width))
    parts[-1] = (parts[-1][0], width)
    return parts


def _of_row(pieces: list[list[str]]) -> Found:
    texts = list(dict.fromkeys(text for piece in pieces for text in piece))
    numbers = {text: number for number, text in enumerate(texts)}
    return Found(texts, [[numbers[text] for text in piece] for piece in pieces])
