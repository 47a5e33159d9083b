"""Finding references: by vector, exactly or through an index, and by words (BM25)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strata.errors import BankError
from strata.explicit.bank import records
from strata.explicit.bank.store import Store
from strata.explicit.bank.vectors import VectorTables, has_vector_index
from strata.explicit.hits import MAX_TOP_K, Hit, Ranking

# Exact search below: at width 384 it took 8 ms over 10,000 rows and 96 ms over 100,000, the index
# 8 ms over 100,000 with 83% of the exact five (made-up vectors, benchmarks/bank_latency.py).
INDEX_ROWS = 50_000
_MAX_QUERY_CHARACTERS = 100_000

PROBES = 32
REFINE = 10  # candidates per hit whose distance is computed from their whole vectors

# Indexes that exist from the first version on, over nothing: Lance searches rows that an index
# does not know yet one by one, so that they are right at any time.
_INDEXES = (
    ("id", "BTREE"),
    ("source_id", "BTREE"),
    ("tags", "LABEL_LIST"),
    ("text", "INVERTED"),
)
# Each costs a search by words some 16 microseconds: 4,272 of 17,085 rows made it 70 ms long.
_MAX_UNINDEXED_ROWS = 512
_MAX_UNINDEXED_SHARE = 1 / 256


def set_up(dataset: Any) -> None:
    """Make the indexes of an empty dataset."""
    for column, kind in _INDEXES:
        extra = {"with_position": False} if kind == "INVERTED" else {}
        dataset.create_scalar_index(column, kind, name=f"{column}_idx", **extra)


def by_vector(
    store: Store,
    tables: VectorTables,
    vector: Any,
    top_k: int,
    where: Mapping[str, Any] | None,
    *,
    exact: bool = False,
) -> Ranking:
    """The rows nearest a vector by cosine; rows without a vector are never found.

    Without a vector index the vectors are compared in RAM, unless they are too many.
    """
    _check_top_k(top_k)
    field = store.columns.field("vector") if "vector" in store.columns.names else None
    if field is None:
        raise BankError(
            f"bank {store.files} has no vectors: search it by words, or make it with an embedder"
        )
    query = np.asarray(vector, np.float32)
    if query.shape != (field.type.list_size,):
        raise BankError(
            f"a query vector of shape {query.shape}; this bank's are ({field.type.list_size},)"
        )
    if not np.isfinite(query).all() or not query.any():
        raise BankError("the query vector is zero, or holds NaN or infinity: it has no direction")
    condition = records.condition(where)
    table = tables.of(store)
    if table is not None:
        among = None if condition is None else _addresses(table.store, condition)
        return Ranking(table.store.dataset, *table.nearest(query, top_k, among))
    nearest: dict[str, Any] = {"column": "vector", "q": query, "k": top_k, "metric": "cosine"}
    if exact:
        nearest["use_index"] = False
    else:
        nearest |= {"nprobes": PROBES, "refine_factor": REFINE}
    found = store.find("_distance", nearest=nearest, filter=condition, prefilter=True)
    return replace(found, scores=[1.0 - distance for distance in found.scores])


def by_words(store: Store, text: str, top_k: int, where: Mapping[str, Any] | None) -> Ranking:
    """The rows with the best BM25 for the words of a text; it has no syntax."""
    from lance.query import MatchQuery

    _check_top_k(top_k)
    records.encoded(text, "query")
    store.warm("text_idx")
    found = store.find(
        "_score",
        full_text_query=MatchQuery(text[:_MAX_QUERY_CHARACTERS], "text"),
        limit=top_k,
        filter=records.condition(where),
        prefilter=True,
    )
    pairs = sorted(zip(found.rows, found.scores, strict=True), key=lambda p: (-p[1], p[0]))
    return Ranking(found.version, [row for row, _ in pairs], [score for _, score in pairs])


def hits(store: Store, ranking: Ranking) -> list[Hit]:
    """The rows of a ranking, each checked."""
    rows = store.take(ranking.version, ranking.rows, records.HIT_COLUMNS)
    found = zip(rows, ranking.scores, strict=True)
    return [records.checked_hit(row, score) for row, score in found]


def _addresses(store: Store, where: str) -> NDArray[np.uint64]:
    """Lance's numbers of the rows where an expression holds."""
    found = [np.zeros(0, np.uint64)]
    for batch in store.scan([], where=where, rows_at_once=8192, with_row_id=True):
        found.append(batch["_rowid"].to_numpy())
    return np.concatenate(found)


def unindexed_rows(store: Store) -> int:
    """Rows that the word index does not know yet and that are searched one by one."""
    with store.guarded("cannot be read"):
        return int(store.dataset.stats.index_stats("text_idx")["num_unindexed_rows"])


def keep_indexed(store: Store, *, index_rows: int, all_rows: bool = False) -> None:
    """Index what is new, but for a last few rows; build the vector index once it pays.

    Args:
        index_rows: from so many rows on vectors are searched through an index.
        all_rows: index also the last few.
    """
    rows = store.seal.rows
    build = "vector" in store.columns.names and rows >= index_rows and not has_vector_index(store)
    late = unindexed_rows(store)
    if build:
        store.change(lambda dataset: _build_vector_index(dataset, rows), "index vectors")
    few = 0 if all_rows else max(_MAX_UNINDEXED_ROWS, rows * _MAX_UNINDEXED_SHARE)
    if late > few:
        store.change(lambda dataset: dataset.optimize.optimize_indices(), "index new rows")


def _build_vector_index(dataset: Any, rows: int) -> None:
    """Inverted lists of product codes; distances of the best are computed from whole vectors."""
    width = dataset.schema.field("vector").type.list_size
    dataset.create_index(
        "vector",
        "IVF_PQ",
        name="vector_idx",
        metric="cosine",
        num_partitions=num_lists(rows),
        num_sub_vectors=vector_code_bytes(width),
    )


def num_lists(rows: int) -> int:
    """Lists of an index over so many vectors; a search looks through `PROBES` of them."""
    return max(1, round(rows**0.5 / 2))


def vector_code_bytes(width: int) -> int:
    """What an index keeps of a vector: a byte for each eight numbers, where these divide it."""
    if width < 8:
        return 1
    return max(parts for parts in range(1, width // 8 + 1) if width % parts == 0)


def _check_top_k(top_k: int) -> None:
    if not 1 <= top_k <= MAX_TOP_K:
        raise BankError(f"top_k {top_k} is not between 1 and {MAX_TOP_K:,}")
