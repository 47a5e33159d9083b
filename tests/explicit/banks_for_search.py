"""Small banks to search: one in memory whose every rule can be seen, and one in Lance."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strata.explicit.hits import Hit


def hits_of(texts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> list[Hit]:
    """References with ids "0", "1", ... and a score of zero."""
    return [
        Hit(str(n), 0.0, text, f"doc{n}", 0, len(text), metadata[n] if metadata else {})
        for n, text in enumerate(texts)
    ]


class WordsEmbedder:
    """A unit vector of the counts of words in a fixed list; counts the calls."""

    name = "words"

    def __init__(self, vocabulary: str) -> None:
        self._words = vocabulary.split()
        self.width = len(self._words) + 1
        self.calls: list[list[str]] = []

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        counts = np.zeros((len(texts), self.width), np.float32)
        counts[:, -1] = 0.01
        for row, text in zip(counts, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                if word in self._words:
                    row[self._words.index(word)] += 1
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    def embed_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.calls.append(list(texts))
        return self.embed_documents(texts)


class BankInMemory:
    """Exact search over a list; keys may be given for search by the model's own queries."""

    def __init__(
        self,
        hits: Sequence[Hit],
        embedder: WordsEmbedder | None = None,
        keys_nsd: NDArray[np.float32] | None = None,
    ) -> None:
        self.rows = list(hits)
        self.embedder_name = None if embedder is None else embedder.name
        self.vectors = embedder and embedder.embed_documents([hit.text for hit in hits])
        self.keys_nsd = keys_nsd
        self.versions = 1
        self.asked: list[tuple[str, int]] = []
        self.scans = 0

    def search(
        self, query: NDArray[np.float32] | str, top_k: int, where: Mapping[str, Any] | None
    ) -> list[Hit]:
        if not isinstance(query, str):
            self.asked.append(("vector", top_k))
            assert self.vectors is not None
            return self._best(self.vectors @ query, top_k, where, -2.0)
        self.asked.append((query, top_k))
        words = set(query.lower().split())
        scores = [len(words & set(re.findall(r"\w+", hit.text.lower()))) for hit in self.rows]
        return self._best(np.array(scores, np.float32), top_k, where, 0.0)

    @property
    def version(self) -> int:
        return self.versions

    def hits(self, ids: Sequence[str]) -> list[Hit]:
        return [self.rows[int(id)] for id in ids]

    def mean_keys(
        self, where: Mapping[str, Any] | None
    ) -> Iterator[tuple[list[str], NDArray[np.float32]]]:
        self.scans += 1
        assert self.keys_nsd is not None
        rows = [n for n, hit in enumerate(self.rows) if _fits(hit, where)]
        for start in range(0, len(rows), 3):
            part = rows[start : start + 3]
            yield [str(n) for n in part], self.keys_nsd[part]

    def _best(
        self, scores: NDArray[np.float32], top_k: int, where: Mapping[str, Any] | None, above: float
    ) -> list[Hit]:
        order = sorted(range(len(self.rows)), key=lambda n: (-scores[n], n))
        fits = [n for n in order if scores[n] > above and _fits(self.rows[n], where)]
        return [replace(self.rows[n], score=float(scores[n])) for n in fits[:top_k]]


def _fits(hit: Hit, where: Mapping[str, Any] | None) -> bool:
    return all(hit.metadata.get(field) == value for field, value in (where or {}).items())


class BankInLance:
    """The same search by Lance: its BM25 index, and an exact scan of vectors."""

    def __init__(self, folder: Path, hits: Sequence[Hit], embedder: Any = None) -> None:
        import lance
        import pyarrow as pa

        columns: dict[str, Any] = {
            "row": list(range(len(hits))),
            "text": [hit.text for hit in hits],
        }
        self.embedder_name = None
        if embedder is not None:
            self.embedder_name = embedder.name
            vectors = embedder.embed_documents(columns["text"])
            flat = pa.array(vectors.reshape(-1), pa.float32())
            columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        self._hits = list(hits)
        self._data = lance.write_dataset(pa.table(columns), str(folder), mode="overwrite")
        self._data.create_scalar_index("text", "INVERTED")

    def search(
        self, query: NDArray[np.float32] | str, top_k: int, where: Mapping[str, Any] | None
    ) -> list[Hit]:
        if not isinstance(query, str):
            nearest = {"column": "vector", "q": query, "k": top_k, "metric": "cosine"}
            found = self._data.to_table(columns=["row", "_distance"], nearest=nearest).to_pylist()
            return [replace(self._hits[r["row"]], score=1 - r["_distance"]) for r in found]
        found = self._data.to_table(
            columns=["row", "_score"], full_text_query=query, limit=top_k
        ).to_pylist()
        return [replace(self._hits[r["row"]], score=r["_score"]) for r in found]
