"""Real sentences: fillers of references, and text that is no exercise."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal

from strata.data.facts.entities import Names
from strata.data.order import content_fraction
from strata.data.readers import ReadOptions, read_documents
from strata.data.sources import Source
from strata.errors import DataError

Split = Literal["train", "val", "test"]

_SENTENCE_END = re.compile(r"(?<=[a-z)][.!?]) (?=[A-Z])")
_FILLER = re.compile(r"[A-Z][^\n?!;:\"]{30,118}\.")
_HELD_SHARE = 0.1  # of articles, half for val and half for test
MAX_FILLERS = 50_000


class Prose:
    """Articles, each on one side of the split.

    Args:
        files: of articles; without any there is no prose.
        avoid: names that no training text may hold; sentences with one are left out there.
        seed: of the split.
    """

    def __init__(self, files: Sequence[Source], *, avoid: Names, seed: int) -> None:
        self._files = files
        self._avoid = avoid
        self._seed = seed

    def __bool__(self) -> bool:
        return bool(self._files)

    def fillers(self, split: Split, *, most: int = MAX_FILLERS) -> list[str]:
        """Plain sentences of 32 to 120 characters, in the order of the sources.

        Raises:
            DataError: there are articles, but no such sentence.
        """
        found: list[str] = []
        for sentences in self.paragraphs(split):
            found += [sentence for sentence in sentences if _FILLER.fullmatch(sentence)]
            if len(found) >= most:
                break
        if self._files and not found:
            raise DataError(f"no plain sentence for {split} in {self._files[0].path}: give more")
        return found[:most]

    def paragraphs(self, split: Split) -> Iterator[list[str]]:
        """The sentences of each paragraph."""
        for file in self._files:
            for document in read_documents(file, options=ReadOptions()):
                if self._side(document.text) != split:
                    continue
                for paragraph in document.text.split("\n"):
                    sentences = _SENTENCE_END.split(paragraph.strip())
                    if split == "train":
                        sentences = [one for one in sentences if not self._avoid.found_in(one)]
                    if len(sentences) > 1 or _FILLER.fullmatch("".join(sentences)):
                        yield sentences

    def _side(self, text: str) -> Split:
        share = content_fraction(text.encode(), seed=self._seed, purpose="prose")
        if share >= _HELD_SHARE:
            return "train"
        return "val" if share < _HELD_SHARE / 2 else "test"
