"""Threads that search together find what each finds alone, with fewer embeddings."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import tiny_bank
from strata.errors import ConfigError
from strata.explicit.hits import Hit
from strata.explicit.retrieve import BatchingRetriever, make_retriever

pytest.importorskip("lance")


class CountingEmbedder(tiny_bank.TinyEmbedder):
    """Waits at its first call until it may go on."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.may_go = threading.Event()

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(len(texts))
        assert self.may_go.wait(20)
        vectors = self.embed_documents(texts)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


QUERIES = [f"the {word} of stone {number}" for number, word in enumerate(tiny_bank.WORDS)]


def until(happened: Callable[[], bool]) -> None:
    """Wait for another thread."""
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.001)


def gather(
    retriever: BatchingRetriever, queries: list[list[str]], embedder: CountingEmbedder
) -> list[list[list[Hit]]]:
    """Each list from a thread of its own, all of them asked before the first search ends."""
    gathering = retriever._gathering
    with ThreadPoolExecutor(len(queries)) as pool:
        asked = [pool.submit(retriever.search, queries[0], 3)]
        until(lambda: bool(embedder.calls))
        asked += [pool.submit(retriever.search, query, 3) for query in queries[1:]]
        wanted = {query for given in queries[1:] for query in given}
        until(lambda: 3 in gathering and set(gathering[3].queries) == wanted)
        embedder.may_go.set()
        return [future.result(20) for future in asked]


@pytest.mark.parametrize("kind", ["vector", "hybrid"])
def test_threads_find_what_each_finds_alone(tmp_path: Path, kind: str) -> None:
    bank, embedder = tiny_bank.create(tmp_path / "bank"), CountingEmbedder()
    tiny_bank.add(bank, tiny_bank.documents(40))
    alone = make_retriever(kind, bank, embedder)  # type: ignore[arg-type]
    together = BatchingRetriever(make_retriever(kind, bank, embedder))  # type: ignore[arg-type]
    queries = [[query] for query in QUERIES[:-1]] + [[QUERIES[-1], QUERIES[1]]]
    found = gather(together, queries, embedder)
    assert embedder.calls == [1, len(QUERIES) - 1]  # ten threads, two embeddings
    expected = [alone.search(given, 3) for given in queries]
    for mine, theirs in zip(found, expected, strict=True):
        assert [[hit.id for hit in hits] for hits in mine] == [
            [hit.id for hit in hits] for hits in theirs
        ]
        np.testing.assert_allclose(
            [hit.score for hits in mine for hit in hits],
            [hit.score for hits in theirs for hit in hits],
            rtol=1e-6,  # a product of another shape may be rounded otherwise
        )


class Recorder:
    """Finds what it is asked; fails for some."""

    runs_model = False

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], int]] = []

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        self.calls.append((list(queries), top_k))
        if "bad" in queries:
            raise ConfigError("no")
        return [[Hit(query, 1.0, query, "s", 0, 1, {})] * top_k for query in queries]


def test_a_lone_thread_is_answered_at_once() -> None:
    inner = Recorder()
    retriever = BatchingRetriever(inner)
    found = retriever.search(["a", " ", "b", "a"], 2)
    assert [[hit.id for hit in hits] for hits in found] == [["a", "a"], [], ["b", "b"], ["a", "a"]]
    assert inner.calls == [(["a", "b"], 2)]
    assert retriever.search([" "], 1) == [[]] and len(inner.calls) == 1


def test_another_top_k_is_another_search() -> None:
    inner = Recorder()
    retriever = BatchingRetriever(inner, wait_s=0.2)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(retriever.search, ["a"], top_k) for top_k in (1, 2, 2)]
        assert [len(future.result(20)[0]) for future in asked] == [1, 2, 2]
    assert sorted(inner.calls) == [(["a"], 1), (["a"], 2)]


def test_too_many_are_two_searches() -> None:
    inner = Recorder()
    retriever = BatchingRetriever(inner, wait_s=0.2, most_queries=2)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(retriever.search, [name], 1) for name in "abcd"]
        assert {future.result(20)[0][0].id for future in asked} == set("abcd")
    assert len(inner.calls) == 2 and all(len(queries) == 2 for queries, _ in inner.calls)


def test_an_error_reaches_all_who_asked_and_no_one_later() -> None:
    inner = Recorder()
    retriever = BatchingRetriever(inner, wait_s=0.2)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(retriever.search, [name], 1) for name in ("bad", "good")]
        for future in asked:
            with pytest.raises(ConfigError, match="no"):
                future.result(20)
    assert retriever.search(["good"], 1)[0][0].id == "good"


def test_what_cannot_be_batched_is_refused() -> None:
    class Model(Recorder):
        runs_model = True

    with pytest.raises(ConfigError, match="runs the model"):
        BatchingRetriever(Model())
    with pytest.raises(ConfigError, match="wait_s 2"):
        BatchingRetriever(Recorder(), wait_s=2)
    with pytest.raises(ConfigError, match="top_k"):
        BatchingRetriever(Recorder()).search(["a"], 0)
