"""Retrievers over a bank: by the likeness of texts, by words, by both, by the model's own queries.

All of them answer many queries at once and may be used from several threads. A blank query finds
nothing; a bank smaller than `top_k` gives what it has. Two references of the same text are one
memory: the one with the smaller score is dropped, unless asked otherwise.
"""

from __future__ import annotations

import threading
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import compress
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strata.errors import ConfigError
from strata.explicit.embed import Embedder
from strata.explicit.hits import MAX_TOP_K, Hit, Ranking
from strata.explicit.key_scan import Keys, KeyScan

MAX_QUERY_WORDS = 256
MAX_QUERY_CHARS = 8_192
MAX_KEY_BYTES = 2 * 2**30
_MAX_DEPTH = 1_000  # hits asked of a bank while equal texts are dropped
_FUSED_DEPTH = 50
_MEAN_OF = 256  # references whose keys make a mean

Where = Mapping[str, Any]
Prepared = TypeVar("Prepared")
Found = TypeVar("Found")


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


class KeyBank(Protocol):
    """What search by the model's own queries needs of a bank."""

    def mean_keys(self, where: Where | None) -> Iterable[tuple[Sequence[str], NDArray[np.float32]]]:
        """Ids and keys (b, s, d), batch by batch: the mean over the tokens that a head kept.

        References without keys, those not yet encoded, are left out.
        """
        ...

    def hits(self, ids: Sequence[str]) -> list[Hit]:
        """These references, in order, with any score."""
        ...

    @property
    def version(self) -> int:
        """Grows with every change."""
        ...


class QueryMaker(Protocol):
    """A model that says what it looks for: an `Encoder`."""

    def queries(self, texts: Sequence[str]) -> Tensor:
        """One query a memory head, before rotary positions: (n, s, d)."""
        ...


class KeyMaker(QueryMaker, Protocol):
    """A model that says how it would keep a text: an `Encoder`."""

    def keys(self, texts: Sequence[str]) -> Tensor:
        """One key a memory head, as `KeyBank.mean_keys`: (n, s, d)."""
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
        wanted, distinct = _distinct_queries(queries, top_k)
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

    def _rank(self, bank: Rankable, prepared: Prepared, depth: int) -> Ranking:
        """As `_fetch`, nothing read."""
        raise NotImplementedError

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


class VectorRetriever(BankRetriever[NDArray[np.float32]]):
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
        super().__init__(**options)
        if bank.embedder_name is None:
            raise ConfigError("this bank was written without vectors: search it by text")
        if bank.embedder_name != embedder.name:
            raise ConfigError(
                f"this bank's vectors are by {bank.embedder_name!r}, the embedder given is "
                f"{embedder.name!r}: search with the bank's own"
            )
        self.bank = bank
        self._embedder = embedder

    def _prepare(self, queries: Sequence[str], depth: int) -> Sequence[NDArray[np.float32]]:
        return list(self._embedder.embed_queries(queries))

    def _fetch(self, prepared: NDArray[np.float32], depth: int) -> list[Hit]:
        return self.bank.search(prepared, depth, self._where)

    def _rank(self, bank: Rankable, prepared: NDArray[np.float32], depth: int) -> Ranking:
        return bank.rank(prepared, depth, self._where)


class TextRetriever(BankRetriever[str]):
    """By words: BM25 over the bank's full-text index.

    The index gets the distinct words of a query without the punctuation around them, for it counts
    a word as often as it stands there: the first 256 of them, and 8,192 characters at most.

    Args:
        bank: any.
        options: see `BankRetriever`; `min_score` is BM25's, which has no upper bound.
    """

    def __init__(self, bank: Searchable, **options: Any) -> None:
        super().__init__(**options)
        self.bank = bank

    def _prepare(self, queries: Sequence[str], depth: int) -> Sequence[str]:
        return [query_words(query) for query in queries]

    def _fetch(self, prepared: str, depth: int) -> list[Hit]:
        return self.bank.search(prepared, depth, self._where) if prepared else []

    def _rank(self, bank: Rankable, prepared: str, depth: int) -> Ranking:
        return bank.rank(prepared, depth, self._where) if prepared else Ranking(None, (), ())


class _Pointed(NamedTuple):
    """A query of the model, and the memories it points at, as deep as it was scanned."""

    scan: KeyScan
    query_sd: NDArray[np.float32]
    best: list[tuple[int, float]]
    depth: int


class QueryRetriever(BankRetriever[_Pointed]):
    """By the model's own queries against the mean of each memory's keys; no second model.

    The keys are read once, at the first search, and again after the bank has changed.

    Args:
        bank: written with keys.
        maker: the model's encoder.
        max_bytes: of RAM for the keys: 4 bytes by memory heads, by head width, by memories.
        options: see `BankRetriever`; `min_score` is `KeyScan`'s, about -1 to 1 and mostly near 0.

    Raises:
        ConfigError: when searching: the keys take more than `max_bytes`.
        ModelError: when searching: the bank belongs to a model of another shape.
    """

    runs_model = True

    def __init__(
        self, bank: KeyBank, maker: QueryMaker, *, max_bytes: int = MAX_KEY_BYTES, **options: Any
    ) -> None:
        super().__init__(**options)
        self._bank = bank
        self._maker = maker
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._scan: tuple[int, KeyScan] | None = None

    def _prepare(self, queries: Sequence[str], depth: int) -> Sequence[_Pointed]:
        with self._lock:  # the model, too, answers one thread at a time
            scan = self._current_scan()
            queries_nsd = self._ask(queries, scan)
        found = scan.top(queries_nsd, depth)
        return [
            _Pointed(scan, query_sd, best, depth)
            for query_sd, best in zip(queries_nsd, found, strict=True)
        ]

    def _ask(self, queries: Sequence[str], scan: KeyScan) -> NDArray[np.float32]:
        """What is searched for: (n, s, d)."""
        return _array(self._maker.queries(queries))

    def _current_scan(self) -> KeyScan:
        version = self._bank.version
        if self._scan is None or self._scan[0] != version:
            self._scan = None  # the old keys go before the new come
            self._scan = (version, self._new_scan(self._bank.mean_keys(self._where)))
        return self._scan[1]

    def _new_scan(self, keys: Keys) -> KeyScan:
        return KeyScan(keys, max_bytes=self._max_bytes)

    def _fetch(self, prepared: _Pointed, depth: int) -> list[Hit]:
        best = prepared.best[:depth]
        if depth > prepared.depth:
            best = prepared.scan.top(prepared.query_sd[None], depth)[0]
        if not best:
            return []
        hits = self._bank.hits([prepared.scan.ids[place] for place, _ in best])
        return [replace(hit, score=score) for hit, (_, score) in zip(hits, best, strict=True)]


class KeyRetriever(QueryRetriever):
    """By the likeness of the model's own keys: those of the query as a memory, and stored ones.

    As `QueryRetriever`, but a query is encoded as if it were a reference. Queries of a decoder ask
    for what helps to predict the next token, which is seldom the topic; keys of two texts that
    share words are alike. A short text's keys differ from a long one's by its length alone, so the
    mean keys of references cut to about the query's length are taken off.
    """

    def __init__(self, bank: KeyBank, maker: KeyMaker, **options: Any) -> None:
        super().__init__(bank, maker, **options)
        self._key_maker = maker
        self._means: dict[int, NDArray[np.float32]] = {}  # length in characters -> (s, d)

    def _new_scan(self, keys: Keys) -> KeyScan:
        self._means = {}
        return KeyScan(keys, max_bytes=self._max_bytes, likeness=True)

    def _ask(self, queries: Sequence[str], scan: KeyScan) -> NDArray[np.float32]:
        made_nsd = _array(self._key_maker.keys(queries))
        if not scan.ids:
            return made_nsd
        return made_nsd - np.stack([self._mean(len(query), scan) for query in queries])

    def _mean(self, length: int, scan: KeyScan) -> NDArray[np.float32]:
        """Of texts of about that length."""
        near = round(2 ** (round(2 * np.log2(max(length, 4))) / 2))
        if near not in self._means:
            step = -(-len(scan.ids) // _MEAN_OF)
            texts = [hit.text[:near].strip() for hit in self._bank.hits(scan.ids[::step])]
            made_nsd = _array(self._key_maker.keys([text for text in texts if text]))
            self._means[near] = made_nsd.mean(axis=0)
        return self._means[near]


def _array(states: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = states.detach().to("cpu", torch.float32).numpy()
    return found


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
        wanted, distinct = _distinct_queries(queries, top_k)
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
        banks = [part.bank for part in parts if isinstance(part, VectorRetriever | TextRetriever)]
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


def make_retriever(
    kind: Literal["vector", "text", "hybrid"],
    bank: Searchable,
    embedder: Embedder | None = None,
    *,
    where: Where | None = None,
) -> Retriever:
    """A retriever by name, with the settings that a bank is searched with by default.

    Raises:
        ConfigError: no such kind, or one that needs an embedder and got none or another than the
            bank's.
    """
    if kind == "text":
        return TextRetriever(bank, where=where)
    if kind not in ("vector", "hybrid"):
        raise ConfigError(f"no retriever {kind!r}: give vector, text or hybrid")
    if embedder is None:
        raise ConfigError(f"the retriever {kind!r} needs the bank's embedder, or search by text")
    vector = VectorRetriever(bank, embedder, where=where)
    if kind == "vector":
        return vector
    return HybridRetriever([vector, TextRetriever(bank, where=where)])


def drop_equal_texts(hits: Iterable[Hit]) -> list[Hit]:
    """The first hit of every text, in order."""
    first: dict[str, Hit] = {}
    for hit in hits:
        first.setdefault(hit.text, hit)
    return list(first.values())


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


def _distinct_queries(queries: Sequence[str], top_k: int) -> tuple[list[str], list[str]]:
    """All queries, blank ones as "", and those to be searched, each once."""
    if isinstance(queries, str):
        raise ConfigError(f"queries must be a list of texts, given one: [{queries[:40]!r}]")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MAX_TOP_K:
        raise ConfigError(f"top_k must be a whole number from 1 to {MAX_TOP_K:,}, given {top_k!r}")
    # Half a surrogate pair, as in an argument that was not UTF-8, is no text to a bank.
    clean = [query.encode("utf-8", "replace").decode("utf-8") for query in queries]
    wanted = [query if query.strip() else "" for query in clean]
    return wanted, [query for query in dict.fromkeys(wanted) if query]
