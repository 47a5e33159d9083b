"""By what the model itself asks for, or keeps, against the mean keys of the memories."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strata.explicit.hits import Hit
from strata.explicit.key_scan import Keys, KeyScan
from strata.explicit.retrieve.base import BankRetriever, Where

MAX_KEY_BYTES = 2 * 2**30
_MEAN_OF = 256  # references whose keys make a mean


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
