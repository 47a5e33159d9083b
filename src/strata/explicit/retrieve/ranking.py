"""By the likeness of texts, and by words: the bank itself searches, and may leave unread."""

from __future__ import annotations

import unicodedata
from abc import abstractmethod
from collections.abc import Sequence
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strata.errors import ConfigError
from strata.explicit.embed import Embedder
from strata.explicit.hits import Hit, Ranking
from strata.explicit.retrieve.base import BankRetriever, Prepared, Rankable, Searchable

MAX_QUERY_WORDS = 256
MAX_QUERY_CHARS = 8_192


class RankingRetriever(BankRetriever[Prepared]):
    """What retrievers share whose bank searches by itself: it may rank, and read nothing.

    Args:
        bank: to be searched; an attribute too.
        options: see `BankRetriever`.
    """

    def __init__(self, bank: Searchable, **options: Any) -> None:
        super().__init__(**options)
        self.bank = bank

    def rankings(self, bank: Rankable, queries: Sequence[str], depth: int) -> list[Ranking]:
        """What each query finds in a bank that can rank, equal texts included."""
        found = []
        for prepared in self._prepare(queries, depth):
            ranking = self._rank(bank, prepared, depth)
            if self._min_score is not None:
                good = [score >= self._min_score for score in ranking.scores]
                rows = list(compress(ranking.rows, good))
                scores = list(compress(ranking.scores, good))
                ranking = Ranking(ranking.version, rows, scores)
            found.append(ranking)
        return found

    @abstractmethod
    def _rank(self, bank: Rankable, prepared: Prepared, depth: int) -> Ranking:
        """As `_fetch`, nothing read."""


class VectorRetriever(RankingRetriever[NDArray[np.float32]]):
    """By the likeness of texts: the cosine of their embeddings.

    A query longer than the embedder reads is cut by the embedder itself.

    Args:
        bank: with vectors.
        embedder: the one that made them.
        options: see `BankRetriever`; `min_score` is a cosine, -1 to 1.

    Raises:
        ConfigError: the bank has no vectors, or another embedder's.
    """

    def __init__(self, bank: Searchable, embedder: Embedder, **options: Any) -> None:
        super().__init__(bank, **options)
        if bank.embedder_name is None:
            raise ConfigError("this bank was written without vectors: search it by text")
        if bank.embedder_name != embedder.name:
            raise ConfigError(
                f"this bank's vectors are by {bank.embedder_name!r}, the embedder given is "
                f"{embedder.name!r}: search with the bank's own"
            )
        self._embedder = embedder

    def _prepare(self, queries: Sequence[str], depth: int) -> Sequence[NDArray[np.float32]]:
        return list(self._embedder.embed_queries(queries))

    def _fetch(self, prepared: NDArray[np.float32], depth: int) -> list[Hit]:
        return self.bank.search(prepared, depth, self._where)

    def _rank(self, bank: Rankable, prepared: NDArray[np.float32], depth: int) -> Ranking:
        return bank.rank(prepared, depth, self._where)


class TextRetriever(RankingRetriever[str]):
    """By words: BM25 over the bank's full-text index.

    The index gets the distinct words of a query without the punctuation around them, for it counts
    a word as often as it stands there: the first 256 of them, and 8,192 characters at most.

    Args:
        bank: any.
        options: see `BankRetriever`; `min_score` is BM25's, which has no upper bound.
    """

    def _prepare(self, queries: Sequence[str], depth: int) -> Sequence[str]:
        return [query_words(query) for query in queries]

    def _fetch(self, prepared: str, depth: int) -> list[Hit]:
        return self.bank.search(prepared, depth, self._where) if prepared else []

    def _rank(self, bank: Rankable, prepared: str, depth: int) -> Ranking:
        return bank.rank(prepared, depth, self._where) if prepared else Ranking(None, (), ())


def query_words(query: str) -> str:
    """The distinct words of a query, at most `MAX_QUERY_WORDS`, without punctuation around them."""
    words: dict[str, str] = {}
    num_chars = 0
    for piece in query[: 64 * MAX_QUERY_CHARS].split():
        word = _without_edges(piece)[: MAX_QUERY_CHARS - num_chars]
        if word and word.casefold() not in words:
            words[word.casefold()] = word
            num_chars += len(word) + 1
            if len(words) == MAX_QUERY_WORDS or num_chars >= MAX_QUERY_CHARS:
                break
    return " ".join(words.values())


def _without_edges(word: str) -> str:
    """A word without punctuation, symbols and control characters before and behind it."""
    start, end = 0, len(word)
    while start < end and unicodedata.category(word[start])[0] in "PSC":
        start += 1
    while end > start and unicodedata.category(word[end - 1])[0] in "PSC":
        end -= 1
    return word[start:end]
