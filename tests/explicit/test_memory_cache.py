"""The cache of memories against a simple model, with several threads, and at its borders."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strata.errors import ConfigError
from strata.explicit.cache import MemoryCache
from strata.explicit.memories import Memories

HEADS, DIM = 2, 4


def memory_of(ids: Sequence[str], tokens: int = 3) -> Memories:
    """Memories whose every number tells which they are: id "7" is all sevens."""
    numbers = torch.tensor([float(id) for id in ids])
    keys = numbers[:, None, None, None].expand(-1, HEADS, tokens, DIM).clone()
    places = numbers[:, None, None].expand(-1, HEADS, tokens).to(torch.int16)
    return Memories(keys, -keys, places, numbers.to(torch.int64))


BYTES = 2 * HEADS * 3 * DIM * 4 + HEADS * 3 * 2 + 8


def check(memories: Memories, ids: Sequence[str]) -> None:
    """These are the memories of `ids`, in order."""
    expected = memory_of(ids)
    torch.testing.assert_close(memories.keys_nstd, expected.keys_nstd, rtol=0, atol=0)
    torch.testing.assert_close(memories.values_nstd, expected.values_nstd, rtol=0, atol=0)
    assert torch.equal(memories.places_nst, expected.places_nst)
    assert torch.equal(memories.kept_n, expected.kept_n)


def wait_until(happened: Callable[[], bool]) -> None:
    """Ten seconds at most."""
    end_s = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < end_s
        time.sleep(0.001)


class Loader:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, ids: Sequence[str]) -> Memories:
        self.calls.append(list(ids))
        return memory_of(ids)


class SimpleLru:
    """What the cache has to do, without sizes, threads or tensors."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.kept: list[str] = []
        self.calls: list[list[str]] = []
        self.hits = self.misses = self.evictions = 0

    def get(self, ids: Sequence[str]) -> None:
        distinct = list(dict.fromkeys(ids))
        missing = [id for id in distinct if id not in self.kept]
        for id in distinct:
            if id in self.kept:
                self.kept.remove(id)
                self.kept.append(id)
        self.hits += len(distinct) - len(missing)
        self.misses += len(missing)
        if missing:
            self.calls.append(missing)
        for id in missing if self.places else []:
            if len(self.kept) == self.places:
                self.kept.pop(0)
                self.evictions += 1
            self.kept.append(id)


@given(
    places=st.integers(0, 5),
    spare_bytes=st.integers(0, BYTES - 1),
    asked=st.lists(st.lists(st.integers(0, 9).map(str), min_size=1, max_size=7), max_size=25),
    clear_after=st.integers(0, 40),
)
def test_same_as_a_simple_model(
    places: int, spare_bytes: int, asked: list[list[str]], clear_after: int
) -> None:
    loader, model = Loader(), SimpleLru(places)
    capacity_bytes = places * BYTES + spare_bytes
    cache = MemoryCache(loader, capacity_bytes=capacity_bytes)
    for step, ids in enumerate(asked):
        check(cache.get(ids), ids)
        model.get(ids)
        stats = cache.stats()
        assert loader.calls == model.calls
        assert (stats.hits, stats.misses, stats.evictions, stats.count, stats.loads) == (
            model.hits,
            model.misses,
            model.evictions,
            len(model.kept),
            len(model.calls),
        )
        assert stats.num_bytes == len(model.kept) * BYTES <= capacity_bytes
        assert stats.too_large == (0 if places else model.misses)
        if step == clear_after:
            cache.clear()
            model.kept.clear()
            assert cache.stats().num_bytes == cache.stats().count == 0


def test_what_is_larger_than_the_cache_passes_through() -> None:
    def load(ids: Sequence[str]) -> Memories:
        return memory_of(ids, tokens=300 if ids == ("9",) else 3)

    cache = MemoryCache(load, capacity_bytes=2 * BYTES)
    cache.get(["1", "2"])
    assert cache.get(["9"]).keys_nstd.shape == (1, HEADS, 300, DIM)
    stats = cache.stats()
    assert (stats.too_large, stats.evictions, stats.count) == (1, 0, 2)
    cache.get(["1", "2"])
    assert cache.stats().hits == 2 and cache.stats().hit_rate == 2 / 5


def test_what_was_returned_stays_as_it_is() -> None:
    cache = MemoryCache(memory_of, capacity_bytes=2 * BYTES)
    first = cache.get(["1", "2"])
    for id in range(3, 9):
        cache.get([str(id)])
    check(first, ["1", "2"])


def test_writing_into_what_was_returned_changes_nothing_kept() -> None:
    cache = MemoryCache(memory_of, capacity_bytes=9 * BYTES)
    for ids in (["1"], ["1"], ["2", "1"]):
        got = cache.get(ids)
        check(got, ids)
        got.keys_nstd.zero_()
        got.kept_n.zero_()


def test_a_kept_memory_does_not_hold_its_whole_batch() -> None:
    batches = []

    def load(ids: Sequence[str]) -> Memories:
        batches.append(memory_of(ids))
        return batches[-1]

    cache = MemoryCache(load, capacity_bytes=BYTES)
    cache.get(["1", "2", "3"])
    kept = cache._kept["3"].memory
    assert kept.keys_nstd.untyped_storage().nbytes() == HEADS * 3 * DIM * 4
    batches[0].keys_nstd.zero_()
    check(cache.get(["3"]), ["3"])


def test_threads_that_ask_for_the_same_load_it_once() -> None:
    """The second asks while the first is loading, and both ask for more than what they share."""
    started, may_end = threading.Event(), threading.Event()
    calls = []

    def load(ids: Sequence[str]) -> Memories:
        calls.append(list(ids))
        if "1" in ids:
            started.set()
            assert may_end.wait(10)
        return memory_of(ids)

    cache = MemoryCache(load, capacity_bytes=9 * BYTES)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, ["1", "2"])
        assert started.wait(10)
        second = pool.submit(cache.get, ["3", "2"])
        wait_until(lambda: len(calls) == 2)
        assert not second.done()
        may_end.set()
        check(first.result(10), ["1", "2"])
        check(second.result(10), ["3", "2"])
    assert calls == [["1", "2"], ["3"]]
    assert (cache.stats().hits, cache.stats().misses) == (1, 3)


def test_many_threads_at_once_on_a_small_cache() -> None:
    loads = []

    def load(ids: Sequence[str]) -> Memories:
        loads.extend(ids)
        return memory_of(ids)

    cache = MemoryCache(load, capacity_bytes=5 * BYTES)

    def ask(seed: int) -> None:
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        for start in range(0, 12, 3):
            ids = [str(int(n)) for n in order[start : start + 3]]
            check(cache.get(ids), ids)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(200)))
    stats = cache.stats()
    assert stats.hits + stats.misses == 200 * 12 and stats.misses == len(loads)
    assert stats.count == 5 and stats.num_bytes == 5 * BYTES
    assert stats.evictions == stats.misses - 5
    assert not cache._coming


def test_a_failed_load_is_its_own_threads_error() -> None:
    """Who waited for it loads for himself; the next call loads again."""
    started, may_end = threading.Event(), threading.Event()

    def load(ids: Sequence[str]) -> Memories:
        if "1" in ids:
            started.set()
            assert may_end.wait(10)
            raise OSError("the disk is gone")
        return memory_of(ids)

    cache = MemoryCache(load, capacity_bytes=9 * BYTES)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, ["1", "2"])
        assert started.wait(10)
        second = pool.submit(cache.get, ["2", "3"])
        wait_until(lambda: cache.stats().loads == 2)
        may_end.set()
        with pytest.raises(OSError, match="the disk is gone"):
            first.result(10)
        check(second.result(10), ["2", "3"])
    assert not cache._coming
    check(cache.get(["2"]), ["2"])


def test_what_was_on_its_way_when_cleared_is_not_kept() -> None:
    started, may_end = threading.Event(), threading.Event()

    def load(ids: Sequence[str]) -> Memories:
        started.set()
        assert may_end.wait(10)
        return memory_of(ids)

    cache = MemoryCache(load, capacity_bytes=9 * BYTES)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.get, ["1"])
        assert started.wait(10)
        cache.clear()
        may_end.set()
        check(first.result(10), ["1"])
    assert cache.stats().count == 0


def test_a_loader_that_gives_too_few() -> None:
    cache = MemoryCache(lambda ids: memory_of(ids[1:]), capacity_bytes=BYTES)
    with pytest.raises(AssertionError, match="gave 1 memories for 2 ids"):
        cache.get(["1", "2"])
    assert not cache._coming


def test_no_ids_and_no_room() -> None:
    loader = Loader()
    assert len(MemoryCache(loader, capacity_bytes=BYTES).get([])) == 0
    cache = MemoryCache(loader, capacity_bytes=0)
    check(cache.get(["4", "4"]), ["4", "4"])
    assert cache.stats().count == 0
    with pytest.raises(ConfigError, match="capacity_bytes must be 0 or more, given -1"):
        MemoryCache(loader, capacity_bytes=-1)


def test_what_is_missing_is_said_without_a_trace() -> None:
    """Asking counts nothing and saves nothing from being dropped."""
    cache = MemoryCache(memory_of, capacity_bytes=2 * BYTES)
    cache.get(["1", "2"])
    before = cache.stats()
    assert cache.missing(["3", "1", "2", "4"]) == ["3", "4"]
    assert cache.stats() == before
    cache.get(["3"])
    assert cache.missing(["1", "2", "3"]) == ["1"]
