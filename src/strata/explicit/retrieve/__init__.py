"""Retrievers over a bank: by the likeness of texts, by words, by both, by the model's own queries.

All of them answer many queries at once and may be used from several threads. A blank query finds
nothing; a bank smaller than `top_k` gives what it has. Two references of the same text are one
memory: the one with the smaller score is dropped, unless asked otherwise.
"""

from strata.explicit.retrieve.base import (
    BankRetriever,
    Rankable,
    Retriever,
    Searchable,
    Where,
    drop_equal_texts,
)
from strata.explicit.retrieve.batching import BatchingRetriever
from strata.explicit.retrieve.hybrid import HybridRetriever
from strata.explicit.retrieve.make import make_retriever
from strata.explicit.retrieve.own_keys import (
    MAX_KEY_BYTES,
    KeyBank,
    KeyMaker,
    KeyRetriever,
    QueryMaker,
    QueryRetriever,
)
from strata.explicit.retrieve.ranking import (
    MAX_QUERY_CHARS,
    MAX_QUERY_WORDS,
    RankingRetriever,
    TextRetriever,
    VectorRetriever,
    query_words,
)

__all__ = [
    "MAX_KEY_BYTES",
    "MAX_QUERY_CHARS",
    "MAX_QUERY_WORDS",
    "BankRetriever",
    "BatchingRetriever",
    "HybridRetriever",
    "KeyBank",
    "KeyMaker",
    "KeyRetriever",
    "QueryMaker",
    "QueryRetriever",
    "Rankable",
    "RankingRetriever",
    "Retriever",
    "Searchable",
    "TextRetriever",
    "VectorRetriever",
    "Where",
    "drop_equal_texts",
    "make_retriever",
    "query_words",
]
