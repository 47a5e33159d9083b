"""How often each retriever finds the paragraph that a question was asked about.

    python benchmarks/retrieval_recall.py DATA --references 2000

DATA holds `qa/squad_dev_v1.jsonl.gz` (id, question, answers, context) and
`corpora/wiki_en-*.parquet` (title, text). Half of the references are cut from paragraphs of SQuAD,
with one question about each; the other half from Wikipedia articles. All are windows of words
without overlap. Counted is whether the first `--top-k` hits hold a window of the question's own
paragraph, and whether they hold one with an accepted answer in it. Prints one Markdown row a
retriever, with the time of a query, and the speed of the embedder.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from planted import COLUMNS, Question, paragraphs, recall_row

from strata.explicit.documents import ReadReport, read_documents
from strata.explicit.embed import Embedder, make_embedder
from strata.explicit.hits import Hit
from strata.explicit.retrieve import HybridRetriever, Retriever, TextRetriever, VectorRetriever


class LanceReferences:
    """References in a Lance dataset: BM25 by its index, vectors by an exact scan."""

    def __init__(self, folder: Path, hits: Sequence[Hit], embedder: Embedder) -> None:
        self.embedder_name = embedder.name
        self._hits = list(hits)
        texts = [hit.text for hit in hits]
        started_s = time.perf_counter()
        vectors = embedder.embed_documents(texts)
        self.embedding_s = time.perf_counter() - started_s
        rows = {
            "row": pa.array(range(len(hits)), pa.int64()),
            "text": pa.array(texts),
            "vector": pa.FixedSizeListArray.from_arrays(
                pa.array(vectors.reshape(-1), pa.float32()), vectors.shape[1]
            ),
        }
        self._data = lance.write_dataset(pa.table(rows), str(folder))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--references", type=int, default=2000, help="in the bank")
    parser.add_argument("--words", type=int, default=90, help="in a window; 90 are ~128 tokens")
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--embedder", default="minilm")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    hits, questions = plant(options, rng)
    embedder = make_embedder(options.embedder)
    embedder.embed_documents([hit.text for hit in hits[:64]])  # opened and warm
    with tempfile.TemporaryDirectory() as folder:
        bank = LanceReferences(Path(folder) / "references.lance", hits, embedder)
        vector, text = VectorRetriever(bank, embedder), TextRetriever(bank)
        retrievers: dict[str, Retriever] = {
            "BM25": text,
            options.embedder: vector,
            "hybrid": HybridRetriever([vector, text]),
        }
        print(
            f"{len(hits)} references, {len(questions)} questions, top {options.top_k}, seed "
            f"{options.seed}; {embedder.name}: {len(hits) / bank.embedding_s:.0f} references/s on "
            f"{torch.get_num_threads()} threads\n"
        )
        print(COLUMNS)
        for name, retriever in retrievers.items():
            print(recall_row(name, retriever, questions, options.top_k))


def plant(options: argparse.Namespace, rng: random.Random) -> tuple[list[Hit], list[Question]]:
    """References of the bank, shuffled, and one question about each paragraph in it."""
    hits: list[Hit] = []
    questions: list[Question] = []
    for context, question in paragraphs(options.data / "qa" / "squad_dev_v1.jsonl.gz", rng):
        hits.extend(windows(context, question.source, options.words, len(hits)))
        questions.append(question)
        if len(hits) >= options.references // 2:
            break
    if len(hits) < options.references // 2:
        sys.exit(f"SQuAD gives {len(hits)} references: ask for {2 * len(hits)} at most")
    for reference in wikipedia(options, rng):
        if len(hits) >= options.references:
            break
        hits.append(replace(reference, id=str(len(hits))))
    rng.shuffle(hits)
    return hits, questions


def wikipedia(options: argparse.Namespace, rng: random.Random) -> Iterator[Hit]:
    """Windows of articles picked at random, two of each."""
    paths = sorted((options.data / "corpora").glob("wiki_en-*.parquet"))
    for document in read_documents(paths, report=ReadReport()):
        if rng.random() < 0.3:
            yield from list(windows(document.text, document.source, options.words, 0))[:2]


def windows(text: str, source: str, words: int, first: int) -> Iterator[Hit]:
    """A text in pieces of so many words."""
    pieces = text.split()
    for number, start in enumerate(range(0, len(pieces), words)):
        piece = " ".join(pieces[start : start + words])
        yield Hit(str(first + number), 0.0, piece, source, start, start + words)


if __name__ == "__main__":
    main()
