"""A retriever by name."""

from __future__ import annotations

from typing import Literal

from strata.errors import ConfigError
from strata.explicit.embed import Embedder
from strata.explicit.retrieve.base import Retriever, Searchable, Where
from strata.explicit.retrieve.hybrid import HybridRetriever
from strata.explicit.retrieve.ranking import TextRetriever, VectorRetriever


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
