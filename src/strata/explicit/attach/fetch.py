"""Searching and loading memories, in the caller's thread or ahead of time in one of our own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from strata.errors import StrataError
from strata.explicit.memories import Memories, MemoryShape

# The tokens of a query: what a row reads is a function of them alone.
Window = tuple[int, ...]


class AttachError(StrataError):
    """Memory cannot be attached or read as asked."""


class RetrievalError(StrataError):
    """Searching or loading memories failed."""

    exit_code = 1


class FoundHit(Protocol):
    """A reference that was found; `strata.explicit.bank.Hit` is one."""

    @property
    def id(self) -> str:
        """Names its memory."""

    @property
    def score(self) -> float:
        """How well it fits; more is better."""

    @property
    def text(self) -> str:
        """Of the reference."""

    @property
    def source(self) -> str:
        """Of the document."""

    @property
    def start(self) -> int:
        """First character in the document."""

    @property
    def end(self) -> int:
        """Character after the last."""


class Source(Protocol):
    """Where memories come from: a bank joined with a retriever and a cache.

    A source whose memories may still be text only also has `cold(ids) -> ids without keys` (any
    thread) and `warm(ids) -> None` (encodes them; called in the thread that runs the model).
    """

    def find(self, queries: Sequence[str], top_k: int) -> Sequence[Sequence[FoundHit]]:
        """For each query the best references, best first; thread-safe."""

    def load(self, ids: Sequence[str]) -> Memories:
        """The memories of these references, in order; thread-safe. They are never written to."""


@dataclass
class Statistics:
    """Counts and times since `attach`.

    Attributes:
        queries: texts searched for.
        searches: batches of them.
        loaded: memories loaded, each once a refresh.
        refreshes: times that memories were put in place.
        injected: memories put before a piece of a row, over all pieces and rows.
        search_ms, load_ms: in `source.find` and `source.load`, in whichever thread.
        wait_ms: of the model's thread for a search begun ahead.
        inject_ms: turning memories to their positions.
    """

    queries: int = 0
    searches: int = 0
    loaded: int = 0
    refreshes: int = 0
    injected: int = 0
    search_ms: float = 0.0
    load_ms: float = 0.0
    wait_ms: float = 0.0
    inject_ms: float = 0.0

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time that passes to one of the times."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + (time.perf_counter() - start) * 1000)


@dataclass
class Fetched:
    """What was found for some windows.

    Attributes:
        hits: what each window reads, best first.
        memories: of all of them, None where there are none or they are not loaded yet.
        slots: where in `memories` each id is.
    """

    hits: dict[Window, tuple[FoundHit, ...]]
    memories: Memories | None
    slots: dict[str, int]


class Fetcher:
    """Finds and loads the memories of query windows.

    Args:
        source: of the memories.
        decode: token ids to the text that is searched for.
        shape: what every memory must hold.
        top_k: memories of a window, at most.
        min_score: hits below it are left out.
        statistics: are counted up here.
    """

    def __init__(
        self,
        source: Source,
        decode: Callable[[Window], str],
        shape: MemoryShape,
        *,
        top_k: int,
        min_score: float | None,
        statistics: Statistics,
    ) -> None:
        self._source = source
        self._decode = decode
        self._shape = shape
        self._top_k = top_k
        self._min_score = min_score
        self._statistics = statistics
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: Future[Fetched] | None = None

    def query(self, window: Window) -> str:
        """The text that is searched for."""
        return self._decode(window).strip()

    def fetch(self, windows: Iterable[Window]) -> Fetched:
        """Find and load, or take what `ahead` was asked for if it holds all of these windows.

        Raises:
            RetrievalError: the source failed, here or on the thread.
            AttachError: a memory has another shape.
        """
        wanted = list(dict.fromkeys(windows))
        fetched = None
        if self._ahead is not None:
            with self._statistics.timed("wait_ms"):
                pending, self._ahead = self._ahead, None
                fetched = pending.result()
        if fetched is None or not fetched.hits.keys() >= set(wanted):
            fetched = self._find(wanted)
        if fetched.memories is None and any(fetched.hits.values()):
            self._load(fetched, warm=True)
        return fetched

    def ahead(self, windows: Iterable[Window]) -> None:
        """Begin to find and load on a thread; the next `fetch` waits for it."""
        self.drop_ahead()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="strata-memory")
        self._ahead = self._pool.submit(self._find_and_load, list(dict.fromkeys(windows)))

    def drop_ahead(self) -> None:
        """Forget what `ahead` was asked for: the text ended before it was needed."""
        if self._ahead is not None and not self._ahead.cancel():
            self._ahead.exception()  # waits: the source must be idle when the next call begins
        self._ahead = None

    def close(self) -> None:
        """End the thread."""
        self.drop_ahead()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _find_and_load(self, windows: list[Window]) -> Fetched:
        fetched = self._find(windows)
        self._load(fetched, warm=False)
        return fetched

    def _find(self, windows: list[Window]) -> Fetched:
        queries = {window: self.query(window) for window in windows}
        texts = list(dict.fromkeys(text for text in queries.values() if text))
        found: dict[str, tuple[FoundHit, ...]] = {"": ()}
        if texts:
            with self._statistics.timed("search_ms"), _explained("searching for memories"):
                results = self._source.find(texts, self._top_k)
            if len(results) != len(texts):
                raise RetrievalError(
                    f"the source answered {len(texts)} queries with {len(results)} lists of hits; "
                    "it must give one list for each"
                )
            self._statistics.searches += 1
            self._statistics.queries += len(texts)
            found.update(zip(texts, map(self._kept, results), strict=True))
        return Fetched({window: found[text] for window, text in queries.items()}, None, {})

    def _kept(self, hits: Sequence[FoundHit]) -> tuple[FoundHit, ...]:
        kept: dict[str, FoundHit] = {}  # two references of one text are one memory
        for hit in hits:
            if self._min_score is None or hit.score >= self._min_score:
                kept.setdefault(hit.text, hit)
        return tuple(kept.values())[: self._top_k]

    def _load(self, fetched: Fetched, *, warm: bool) -> None:
        ids = list(dict.fromkeys(hit.id for hits in fetched.hits.values() for hit in hits))
        if not ids:
            return
        with self._statistics.timed("load_ms"), _explained("loading memories"):
            cold = list(self._source.cold(ids)) if hasattr(self._source, "cold") else []
            if cold and not warm:
                return  # only the model's own thread encodes
            if cold:
                self._source.warm(cold)  # type: ignore[attr-defined]
            memories = self._source.load(ids)
        self._check(memories, len(ids))
        self._statistics.loaded += len(ids)
        fetched.memories = memories
        fetched.slots = {name: n for n, name in enumerate(ids)}

    def _check(self, memories: Memories, number: int) -> None:
        shape = self._shape
        want = (number, len(shape.heads), shape.tokens, shape.head_dim)
        given = (tuple(memories.keys_nstd.shape), tuple(memories.values_nstd.shape))
        if given != (want, want) or tuple(memories.places_nst.shape) != want[:3]:
            raise AttachError(
                f"the memories have shape {list(given[0])} (memories, heads, tokens, width); this "
                f"model with these settings reads {list(want)}: attach with the settings that the "
                "bank was written with"
            )


@contextmanager
def _explained(doing: str) -> Iterator[None]:
    try:
        yield
    except StrataError:
        raise
    except Exception as error:
        cause = " ".join(str(error).split()) or "no message"
        raise RetrievalError(f"{doing} failed: {type(error).__name__}: {cause}") from error
