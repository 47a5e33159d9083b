"""What `attach` reads from: a bank, a retriever, a cache, and an encoder for what is still text."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from strata.errors import ConfigError
from strata.explicit.cache import CacheStats, MemoryCache
from strata.explicit.embed import make_embedder
from strata.explicit.encode import Encoder, key_vectors
from strata.explicit.fingerprint import fingerprint
from strata.explicit.hits import Hit
from strata.explicit.host import Host
from strata.explicit.memories import Memories
from strata.explicit.retrieve import QueryRetriever, Retriever, Where, make_retriever

if TYPE_CHECKING:
    from strata.explicit.bank import Bank


class BankSource:
    """A bank as a session reads it.

    References without memories (a cold bank, or an encoder whose settings are not the bank's) are
    encoded when they are first found, in the thread that runs the model, and kept until `save`.

    Args:
        bank: checked against the model if its memories are to be read.
        retriever: over that bank.
        encoder: for cold references; None where all are warm.
        cache_bytes: of RAM for decoded memories.
        from_text: encode everything anew and read no stored memory: for an encoder with settings
            of its own, such as all tokens of all layers.

    Attributes:
        config: the settings that the memories were encoded with.
    """

    def __init__(
        self,
        bank: Bank,
        retriever: Retriever,
        *,
        encoder: Encoder | None = None,
        cache_bytes: int = 2**30,
        from_text: bool = False,
    ) -> None:
        if from_text and encoder is None:
            raise ConfigError("memories from text need an encoder")
        self.config = bank.settings.config if encoder is None else encoder.config
        self._bank, self._retriever, self._encoder = bank, retriever, encoder
        self._from_text = from_text
        self._fresh: dict[str, Memories] = {}
        self._lock = threading.Lock()
        self._cache = MemoryCache(self._load, capacity_bytes=cache_bytes)

    @classmethod
    def of(
        cls,
        bank: Bank,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        retriever: Retriever | None = None,
        cache_bytes: int = 2**30,
    ) -> BankSource:
        """A bank as its own model reads it.

        Args:
            bank: any of that model's.
            model, tokenizer: those that the bank was written with.
            retriever: None for the bank's default: hybrid, or by words where it has no vectors.
            cache_bytes: of RAM for decoded memories.

        Raises:
            BankError: another model's bank; one sentence says what differs.
        """
        config = bank.settings.config
        encoder = Encoder(Host(model), tokenizer, config)
        bank.check(fingerprint(model, tokenizer, config, encoder.shape))
        retriever = retriever or open_retriever(bank)
        return cls(bank, retriever, encoder=encoder, cache_bytes=cache_bytes)

    @property
    def runs_model(self) -> bool:
        """Whether `find` runs the model, so that it may not run beside it."""
        return self._retriever.runs_model

    def find(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """At most `top_k` hits for each query, best first."""
        return self._retriever.search(queries, top_k)

    def load(self, ids: Sequence[str]) -> Memories:
        """The memories of `ids`, in order, in tensors of their own.

        Raises:
            BankError: one is cold: `warm` it first.
        """
        return self._cache.get(ids)

    def cold(self, ids: Sequence[str]) -> list[str]:
        """Those of `ids` that have no memory yet."""
        with self._lock:
            wanted = [identifier for identifier in ids if identifier not in self._fresh]
        if not wanted or self._from_text:
            return wanted
        return self._bank.cold_among(self._cache.missing(wanted))

    def warm(self, ids: Sequence[str]) -> None:
        """Encode references; only where nothing else runs the model.

        Raises:
            ConfigError: there is no encoder.
        """
        if self._encoder is None:
            raise ConfigError(
                f"{len(ids)} references have no memory yet and no encoder was given: encode them, "
                "or give one"
            )
        texts = [record.text for record in self._bank.take(ids)]
        with torch.no_grad():
            memories = self._encoder.encode(texts).to("cpu")
        with self._lock:
            for number, identifier in enumerate(ids):
                self._fresh[identifier] = memories[number : number + 1]

    def save(self) -> int:
        """Store what `warm` made, in one commit; returns how many. Nothing if it is not the bank's.

        Raises:
            BankError: another process is writing; what was made is kept for another try.
        """
        with self._lock:
            fresh = {} if self._from_text else dict(self._fresh)
        if fresh:
            self._bank.fill(list(fresh), Memories.cat(list(fresh.values())))
            with self._lock:
                for identifier in fresh:
                    self._fresh.pop(identifier, None)
        return len(fresh)

    def stats(self) -> CacheStats:
        """What the cache did."""
        return self._cache.stats()

    def _load(self, ids: Sequence[str]) -> Memories:
        with self._lock:
            fresh = {identifier: self._fresh.get(identifier) for identifier in ids}
        stored = [identifier for identifier, memory in fresh.items() if memory is None]
        if stored:
            loaded = self._bank.load(stored)
            for number, identifier in enumerate(stored):
                fresh[identifier] = loaded[number : number + 1]
        parts = [memory for identifier in ids if (memory := fresh[identifier]) is not None]
        dtype = parts[0].keys_nstd.dtype
        return Memories.cat([part.to(dtype) for part in parts])


def open_retriever(
    bank: Bank,
    by: Literal["vector", "text", "hybrid", "queries"] | None = None,
    *,
    where: Where | None = None,
    device: str = "auto",
    encoder: Encoder | None = None,
) -> Retriever:
    """A retriever over a bank, with the embedder that made its vectors, opened.

    Args:
        bank: to search.
        by: None for hybrid, or text in a bank without vectors; "queries" for the model's own
            queries against the keys of its memories.
        where: metadata that a hit must have.
        device: of the embedder.
        encoder: of the bank's own model, for "queries".

    Raises:
        ConfigError: no such way to search, or one that needs vectors or the model.
        ModelError: the embedder cannot be opened.
    """
    if by == "queries":
        if encoder is None:
            raise ConfigError("searching by 'queries' needs the bank's model, which makes them")
        return QueryRetriever(BankKeys(bank), encoder, where=where)
    if by not in (None, "vector", "text", "hybrid"):
        raise ConfigError(f"no way to search {by!r}: give vector, text, hybrid or queries")
    by = by or ("text" if bank.embedder_name is None else "hybrid")
    embedder = None
    if by != "text" and bank.embedder_name is not None:
        embedder = make_embedder(bank.embedder_name, device=device)
        assert embedder.width  # opened now, not when the first question waits
    return make_retriever(by, bank, embedder, where=where)


class BankKeys:
    """A bank as `QueryRetriever` reads it: the mean key of every memory."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank

    @property
    def version(self) -> int:
        """Grows with every change."""
        return self._bank.version

    def mean_keys(self, where: Where | None) -> Iterable[tuple[Sequence[str], NDArray[np.float32]]]:
        """Ids and mean keys (b, s, d) of all memories, batch by batch."""
        for ids, memories in self._bank.memories(where):
            yield ids, key_vectors(memories).float().numpy()

    def hits(self, ids: Sequence[str]) -> list[Hit]:
        """These references, in order."""
        return [
            Hit(r.id, 0.0, r.text, r.source, r.start, r.end, r.metadata)
            for r in self._bank.take(ids)
        ]
