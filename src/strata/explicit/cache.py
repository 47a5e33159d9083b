"""Decoded memories kept in RAM: those used most recently, up to a number of bytes.

Least recently used goes first. Memories are hundreds of kilobytes, so an exact order costs nothing
beside them, and what a text needs it needs again soon: the last chunk's memories are the likeliest
of the next.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from strata.errors import ConfigError
from strata.explicit.memories import Memories

Load = Callable[[Sequence[str]], Memories]


@dataclass(frozen=True)
class CacheStats:
    """What a cache did since it was made.

    Attributes:
        hits: memories asked for that were kept, or on their way for another thread; an id that
            stands twice in one call counts once.
        misses: those that had to be loaded.
        loads: calls of the loader.
        evictions: memories dropped to make room.
        too_large: memories loaded that are larger than the whole cache, and passed through.
        num_bytes: kept now.
        count: memories kept now.
        capacity_bytes: at most kept.
    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    too_large: int = 0
    num_bytes: int = 0
    count: int = 0
    capacity_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits of all that was asked for; 0 before anything was."""
        return self.hits / max(1, self.hits + self.misses)


class MemoryCache:
    """Decoded memories by id, loaded when they are missing; safe to use from several threads.

    The bound holds for what is kept. While a call runs there is also what it loads and returns:
    its own memories, twice.

    Args:
        load: ids to their memories, in order; called with the missing ids of a `get` at once, each
            once, from the thread that asked. It may not ask the same cache.
        capacity_bytes: of the tensors kept; 0 keeps nothing.

    Raises:
        ConfigError: the capacity is negative.
    """

    def __init__(self, load: Load, *, capacity_bytes: int) -> None:
        if capacity_bytes < 0:
            raise ConfigError(f"capacity_bytes must be 0 or more, given {capacity_bytes}")
        self._load = load
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # the least recently used first
        self._coming: dict[str, _Batch] = {}
        self._stats = CacheStats(capacity_bytes=capacity_bytes)

    def get(self, ids: Sequence[str]) -> Memories:
        """Memories of `ids`, in order, in tensors of their own.

        Two threads that ask for the same memory at the same time load it once. Where the loader
        fails, the thread that called it gets the error, and others load for themselves. No ids at
        all are the loader's to answer.

        Raises:
            Exception: whatever the loader raises.
        """
        if not ids:
            return self._load(ids)
        found: dict[str, Memories] = {}
        counted: set[str] = set()
        while missing := [id for id in dict.fromkeys(ids) if id not in found]:
            own, others = self._claim(missing, found, counted)
            if own.ids:
                found.update(self._fetch(own))
            for batch in others:
                batch.done.wait()
                found.update({id: batch.memories[id] for id in missing if id in batch.memories})
        return Memories.cat([found[id] for id in ids])

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Those of `ids` that are not kept now; neither counted nor made more recent."""
        with self._lock:
            return [id for id in ids if id not in self._kept]

    def stats(self) -> CacheStats:
        """Counts so far."""
        with self._lock:
            return self._stats

    def clear(self) -> None:
        """Forget all memories, also those on their way; the counts go on."""
        with self._lock:
            self._kept.clear()
            self._coming.clear()
            self._stats = replace(self._stats, num_bytes=0, count=0)

    def _claim(
        self, missing: Sequence[str], found: dict[str, Memories], counted: set[str]
    ) -> tuple[_Batch, list[_Batch]]:
        """Take what is kept; the rest is to be loaded here, or is being loaded elsewhere."""
        own = _Batch([], {}, threading.Event())
        others: list[_Batch] = []
        hits = 0
        with self._lock:
            for id in missing:
                kept = self._kept.get(id)
                coming = self._coming.get(id)
                if kept is not None:
                    self._kept.move_to_end(id)
                    found[id] = kept.memory
                elif coming is not None:
                    others.append(coming)
                else:
                    own.ids.append(id)
                    self._coming[id] = own
                    continue
                hits += id not in counted
                counted.add(id)
            new = [id for id in own.ids if id not in counted]
            counted.update(new)
            stats = self._stats
            self._stats = replace(
                stats,
                hits=stats.hits + hits,
                misses=stats.misses + len(new),
                loads=stats.loads + bool(own.ids),
            )
        return own, others

    def _fetch(self, batch: _Batch) -> dict[str, Memories]:
        """Load a batch that this thread claimed, keep it, and wake those who wait for it."""
        try:
            loaded = self._load(tuple(batch.ids))
            assert len(loaded) == len(batch.ids), (
                f"the loader gave {len(loaded)} memories for {len(batch.ids)} ids"
            )
            # Copies: a view would keep the whole batch in memory after the others are dropped.
            batch.memories.update({id: loaded[[n]] for n, id in enumerate(batch.ids)})
        finally:
            with self._lock:
                for id in batch.ids:
                    if self._coming.get(id) is batch:  # else it was cleared meanwhile
                        del self._coming[id]
                        if id in batch.memories:
                            self._keep(id, batch.memories[id])
            batch.done.set()
        return batch.memories

    def _keep(self, id: str, memory: Memories) -> None:
        stats = self._stats
        size_bytes = _num_bytes(memory)
        if size_bytes > stats.capacity_bytes:
            self._stats = replace(stats, too_large=stats.too_large + 1)
            return
        num_bytes, evictions = stats.num_bytes + size_bytes, stats.evictions
        while num_bytes > stats.capacity_bytes:
            _, dropped = self._kept.popitem(last=False)
            num_bytes -= dropped.num_bytes
            evictions += 1
        self._kept[id] = _Kept(memory, size_bytes)
        self._stats = replace(
            stats, num_bytes=num_bytes, count=len(self._kept), evictions=evictions
        )


class _Kept(NamedTuple):
    memory: Memories  # one
    num_bytes: int


class _Batch(NamedTuple):
    """Memories on their way: what was loaded, once `done`; none of them where loading failed."""

    ids: list[str]
    memories: dict[str, Memories]
    done: threading.Event


def _num_bytes(memory: Memories) -> int:
    tensors = (memory.keys_nstd, memory.values_nstd, memory.places_nst, memory.kept_n)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
