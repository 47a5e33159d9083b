"""What is searched, what searches it, and what all retrievers over one bank share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from strata.errors import ConfigError
from strata.explicit.hits import MAX_TOP_K, Hit, Ranking

_MAX_DEPTH = 1_000  # hits asked of a bank while equal texts are dropped

Where = Mapping[str, Any]
Prepared = TypeVar("Prepared")


class Searchable(Protocol):
    """What search by vector or by words needs of a bank; hits come best first."""

    @property
    def embedder_name(self) -> str | None:
        """Which embedder made its vectors; None where it has none."""
        ...

    def search(
        self, query: NDArray[np.float32] | str, top_k: int, where: Where | None
    ) -> list[Hit]:
        """References for a unit vector (the score is the cosine) or for words (BM25)."""
        ...


@runtime_checkable
class Rankable(Protocol):
    """A bank that can leave unread what it finds."""

    def rank(self, query: NDArray[np.float32] | str, top_k: int, where: Where | None) -> Ranking:
        """As `Searchable.search`, nothing read of the references found."""
        ...

    def read(self, ranking: Ranking) -> list[Hit]:
        """The references of a ranking, in order."""
        ...


class Retriever(Protocol):
    """Finds references for texts; safe to use from several threads.

    Attributes:
        runs_model: whether a search runs the model, so that it may not run beside it.
    """

    @property
    def runs_model(self) -> bool: ...

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """At most `top_k` hits for each query, best first."""
        ...


class BankRetriever(ABC, Generic[Prepared]):
    """What the retrievers over one bank share.

    Args:
        where: metadata that a reference must have, field by field equal.
        min_score: drop what scores less, in the units of the retriever.
        keep_equal_texts: give references of the same text each on its own.

    Raises:
        ConfigError: a condition is no text, number or truth value.
    """

    runs_model = False

    def __init__(
        self,
        *,
        where: Where | None = None,
        min_score: float | None = None,
        keep_equal_texts: bool = False,
    ) -> None:
        for field, value in (where or {}).items():
            if not isinstance(value, str | int | float):
                raise ConfigError(
                    f"where: {field!r} is compared to {type(value).__name__}; give a text, a "
                    "number, true or false"
                )
        self._where = dict(where) if where else None
        self._min_score = min_score
        self._keep_equal_texts = keep_equal_texts

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """At most `top_k` hits for each query, best first; none for a blank one.

        Equal queries are searched once.

        Raises:
            ConfigError: `top_k` is not from 1 to 10,000.
        """
        wanted, distinct = distinct_queries(queries, top_k)
        found: dict[str, list[Hit]] = {"": []}
        if distinct:
            depth = top_k if self._keep_equal_texts else min(top_k + 2, MAX_TOP_K)
            for query, prepared in zip(distinct, self._prepare(distinct, depth), strict=True):
                found[query] = self._pick(prepared, top_k, depth)
        return [list(found[query]) for query in wanted]

    @abstractmethod
    def _prepare(self, queries: Sequence[str], depth: int) -> Sequence[Prepared]:
        """All queries at once, into what `_fetch` searches with, first to this depth."""

    @abstractmethod
    def _fetch(self, prepared: Prepared, depth: int) -> list[Hit]:
        """The best `depth` of the bank, best first."""

    def _pick(self, prepared: Prepared, top_k: int, depth: int) -> list[Hit]:
        """Fetch, deeper again where equal texts leave too few."""
        while True:
            hits = self._fetch(prepared, depth)
            good = [hit for hit in hits if self._min_score is None or hit.score >= self._min_score]
            kept = good if self._keep_equal_texts else drop_equal_texts(good)
            is_all = len(hits) < depth or len(good) < len(hits) or depth >= _MAX_DEPTH
            if len(kept) >= top_k or is_all:
                return kept[:top_k]
            depth *= 4


def drop_equal_texts(hits: Iterable[Hit]) -> list[Hit]:
    """The first hit of every text, in order."""
    first: dict[str, Hit] = {}
    for hit in hits:
        first.setdefault(hit.text, hit)
    return list(first.values())


def distinct_queries(queries: Sequence[str], top_k: int) -> tuple[list[str], list[str]]:
    """All queries, blank ones as "", and those to be searched, each once."""
    if isinstance(queries, str):
        raise ConfigError(f"queries must be a list of texts, given one: [{queries[:40]!r}]")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MAX_TOP_K:
        raise ConfigError(f"top_k must be a whole number from 1 to {MAX_TOP_K:,}, given {top_k!r}")
    # Half a surrogate pair, as in an argument that was not UTF-8, is no text to a bank.
    clean = [query.encode("utf-8", "replace").decode("utf-8") for query in queries]
    wanted = [query if query.strip() else "" for query in clean]
    return wanted, [query for query in dict.fromkeys(wanted) if query]
