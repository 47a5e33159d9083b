"""Several retrievers as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from strata.errors import ConfigError
from strata.explicit.hits import MAX_TOP_K, Hit, Ranking
from strata.explicit.retrieve.base import Rankable, Retriever, distinct_queries, drop_equal_texts
from strata.explicit.retrieve.ranking import RankingRetriever

_FUSED_DEPTH = 50

Found = TypeVar("Found")


class HybridRetriever:
    """Several retrievers as one, by reciprocal rank fusion: the sum of weight / (k + rank).

    Ranks count from 1. Metadata conditions and thresholds are those of the parts; a fused score
    says only how a hit stands among its query's others.

    Args:
        retrievers: at least one.
        weights: one a retriever, 0 or more, not all 0; None for 1 each.
        k: how little the first ranks are preferred.

    Raises:
        ConfigError: no retriever, or weights that do not fit.

    Source: Cormack, Clarke, Buettcher (2009), "Reciprocal Rank Fusion outperforms Condorcet and
        individual Rank Learning Methods", SIGIR.
    """

    def __init__(
        self,
        retrievers: Sequence[Retriever],
        *,
        weights: Sequence[float] | None = None,
        k: float = 60.0,
        keep_equal_texts: bool = False,
    ) -> None:
        weights = [1.0] * len(retrievers) if weights is None else list(weights)
        if not retrievers or len(weights) != len(retrievers):
            raise ConfigError(
                f"{len(retrievers)} retrievers with {len(weights)} weights: give at least one, and "
                "a weight for each"
            )
        if not all(0 <= weight < np.inf for weight in weights) or not any(weights):
            raise ConfigError(f"weights must be 0 or more and not all 0, given {weights}")
        if not 0 < k < np.inf:
            raise ConfigError(f"k must be above 0, given {k}")
        self._parts = list(zip(retrievers, weights, strict=True))
        self._k = k
        self._keep_equal_texts = keep_equal_texts
        self._pool = ThreadPoolExecutor(len(retrievers), thread_name_prefix="strata-search")

    @property
    def runs_model(self) -> bool:
        """Whether one of its retrievers does."""
        return any(part.runs_model for part, _ in self._parts)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """At most `top_k` hits for each query, best first.

        Each part is searched to four times that depth, 50 at least and 10,000 at most, all of them
        at once. Of parts by vector and by words over one bank only the hits returned are read.

        Raises:
            ConfigError: `top_k` is not from 1 to 10,000.
        """
        wanted, distinct = distinct_queries(queries, top_k)
        depth = min(max(4 * top_k, _FUSED_DEPTH), MAX_TOP_K)
        found: dict[str, list[Hit]] = {"": []}
        if (bank := self._common_bank()) is not None:
            unread = self._side_by_side(lambda part: part.rankings(bank, distinct, depth))
            for query, *rankings in zip(distinct, *unread, strict=True):
                if len({id(ranking.version) for ranking in rankings if ranking.rows}) > 1:
                    continue  # somebody wrote meanwhile
                hits = self._read(bank, rankings, top_k)
                # Else equal texts left too few, and there are more.
                if len(hits) == top_k or all(len(ranking.rows) < depth for ranking in rankings):
                    found[query] = hits
        late = [query for query in distinct if query not in found]
        if late:
            ranked = self._side_by_side(lambda part: part.search(late, depth))
            for query, *lists in zip(late, *ranked, strict=True):
                found[query] = self._fuse(lists)[:top_k]
        return [list(found[query]) for query in wanted]

    def _common_bank(self) -> Rankable | None:
        """The bank of all parts, where it can rank what it need not read."""
        parts = [part for part, weight in self._parts if weight]
        banks = [part.bank for part in parts if isinstance(part, RankingRetriever)]
        same = len(banks) == len(parts) and all(bank is banks[0] for bank in banks)
        return banks[0] if same and isinstance(banks[0], Rankable) else None

    def _read(self, bank: Rankable, rankings: Sequence[Ranking], top_k: int) -> list[Hit]:
        """Fuse rows and read the best; reading all that the parts found takes 10 ms and more."""
        scores: dict[int, float] = {}
        for ranking, weight in zip(rankings, self._weights(), strict=True):
            for rank, row in enumerate(ranking.rows, 1):
                scores[row] = scores.get(row, 0.0) + weight / (self._k + rank)
        order = sorted(scores, key=lambda row: (-scores[row], row))
        version = next((ranking.version for ranking in rankings if ranking.rows), None)
        hits: list[Hit] = []
        step = top_k if self._keep_equal_texts else top_k + 2
        while order and len(hits) < top_k:
            best, order = order[:step], order[step:]
            hits += bank.read(Ranking(version, best, [scores[row] for row in best]))
            hits = hits if self._keep_equal_texts else drop_equal_texts(hits)
        return hits[:top_k]

    def _side_by_side(self, act: Callable[[Any], Found]) -> list[Found]:
        """What each part gives, all at once: words are searched while a text is embedded.

        What runs the model, and the first part, run in the caller's thread.
        """
        parts = [part for part, weight in self._parts if weight]
        coming = {
            number: self._pool.submit(act, part)
            for number, part in enumerate(parts)
            if number and not part.runs_model
        }
        here = {number: act(part) for number, part in enumerate(parts) if number not in coming}
        return [
            here[number] if number in here else coming[number].result()
            for number in range(len(parts))
        ]

    def _weights(self) -> list[float]:
        return [weight for _, weight in self._parts if weight]

    def _fuse(self, lists: Sequence[Sequence[Hit]]) -> list[Hit]:
        # By text, where equal texts are one: parts may have kept different ones of two.
        scores: dict[str, float] = {}
        firsts: dict[str, Hit] = {}
        for hits, weight in zip(lists, self._weights(), strict=True):
            for rank, hit in enumerate(hits, 1):
                name = hit.id if self._keep_equal_texts else hit.text
                firsts.setdefault(name, hit)
                scores[name] = scores.get(name, 0.0) + weight / (self._k + rank)
        order = sorted(scores, key=lambda name: (-scores[name], firsts[name].id))
        return [replace(firsts[name], score=scores[name]) for name in order]
