"""The searches of several threads as one."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from strata.errors import ConfigError
from strata.explicit.hits import Hit
from strata.explicit.retrieve.base import Retriever, distinct_queries


class BatchingRetriever:
    """A retriever for threads that answer at the same time: they embed and search together.

    One search runs at a time, and who asks meanwhile is asked for in the next one, all at once. So
    a lone thread never waits, and many share the embedder's batches instead of queueing for it.
    Threads find what they would have found alone, to the rounding of the embedder's batches.

    Args:
        retriever: to search with; not one that runs the model, which stays in its own thread.
        wait_s: how long a search that could begin waits for others.
        most_queries: of one search; a call with more is not divided.

    Raises:
        ConfigError: the retriever runs the model, or a number is out of range.
    """

    runs_model = False

    def __init__(
        self, retriever: Retriever, *, wait_s: float = 0.0, most_queries: int = 256
    ) -> None:
        if retriever.runs_model:
            raise ConfigError("a retriever that runs the model cannot search for other threads")
        if not 0 <= wait_s <= 1 or most_queries < 1:
            raise ConfigError(
                f"wait_s {wait_s} is 0 to 1 second, most_queries {most_queries} at least 1"
            )
        self._retriever, self._wait_s, self._most = retriever, wait_s, most_queries
        self._gathering: dict[int, _Batch] = {}  # by top_k
        self._lock = threading.Lock()  # of what is gathered
        self._turn = threading.Lock()  # to search

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """At most `top_k` hits for each query, best first.

        Raises:
            ConfigError: `top_k` is not from 1 to 10,000.
        """
        wanted, distinct = distinct_queries(queries, top_k)
        if not distinct:
            return [[] for _ in wanted]
        with self._lock:
            batch = self._gathering.get(top_k)
            is_first = batch is None or len(batch.queries) + len(distinct) > self._most
            if batch is None or is_first:
                batch = self._gathering[top_k] = _Batch()
            batch.queries.update(dict.fromkeys(distinct))
        if is_first:
            if self._wait_s:
                time.sleep(self._wait_s)
            with self._turn:
                with self._lock:
                    if self._gathering.get(top_k) is batch:
                        del self._gathering[top_k]
                batch.run(self._retriever, top_k)
        batch.done.wait()
        if batch.error is not None:
            raise batch.error
        return [list(batch.found[query]) if query else [] for query in wanted]


class _Batch:
    """What is searched together."""

    def __init__(self) -> None:
        self.queries: dict[str, None] = {}
        self.found: dict[str, list[Hit]] = {}
        self.error: BaseException | None = None
        self.done = threading.Event()

    def run(self, retriever: Retriever, top_k: int) -> None:
        """Search, and let all who asked go on, whatever happens."""
        try:
            queries = list(self.queries)
            self.found = dict(zip(queries, retriever.search(queries, top_k), strict=True))
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()
