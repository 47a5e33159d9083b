"""The row cache: the kernel is the reference slot for slot, and what it says is there is there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strata.ops import row_cache
from strata.ops.row_cache import CacheCounts, RowCache, copy_rows

STREAMS = st.integers(1, 12).flatmap(
    lambda num_slots: st.tuples(
        st.just(num_slots),
        st.lists(st.lists(st.integers(0, 29), max_size=num_slots), max_size=30),
    )
)


def books(cache: RowCache) -> list[np.ndarray]:
    return [cache.slot_of_row, cache.row_of_slot, cache.read_again, cache.call_of_slot, cache.clock]


@settings(max_examples=150, deadline=None)
@given(STREAMS)
def test_the_kernel_does_what_the_reference_does(stream: tuple[int, list[list[int]]]) -> None:
    num_slots, calls = stream
    mine, theirs = RowCache(30, num_slots, row_bytes=5), RowCache(30, num_slots, row_bytes=5)
    for call in calls:
        rows = np.array(call, np.int64)
        slots, missing = mine.admit(rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(row_cache, "AVAILABLE", False)
            slots_, missing_ = theirs.admit(rows)
        assert np.array_equal(slots, slots_)
        assert np.array_equal(missing.rows, missing_.rows)
        assert np.array_equal(missing.slots, missing_.slots)
        for left, right in zip(books(mine), books(theirs), strict=True):
            assert np.array_equal(left, right)
    assert mine.counts == theirs.counts


@settings(max_examples=150, deadline=None)
@given(STREAMS, st.integers(0, 3), st.booleans())
def test_every_pick_finds_its_row(
    stream: tuple[int, list[list[int]]], start: int, compiled: bool
) -> None:
    num_slots, calls = stream
    source = np.random.default_rng(0).integers(0, 256, start + 30 * 5, dtype=np.uint8)
    rows_of_file = source[start:].reshape(30, 5)
    cache, held = RowCache(30, num_slots, row_bytes=5), np.zeros((num_slots, 5), np.uint8)
    read: set[int] = set()
    hits = misses = 0
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(row_cache, "AVAILABLE", False)
        for call in calls:
            before = set(cache.row_of_slot.tolist())
            slots, missing = cache.admit(np.array(call, np.int64))
            copy_rows(source, start, missing, held)
            assert np.array_equal(held[slots], rows_of_file[call])
            assert sorted(missing.rows.tolist()) == sorted(set(call) - before)
            hits += sum(row in before for row in call)
            misses += len(missing.rows)
            read |= set(call)
    filled = int((cache.row_of_slot >= 0).sum())
    assert filled == min(num_slots, len(read))
    counts = cache.counts
    assert (counts.hits, counts.misses) == (hits, misses)
    assert counts.evictions == misses - filled


def test_a_row_read_again_gets_a_second_chance() -> None:
    cache = RowCache(10, 3, row_bytes=5)
    for call in ([0, 1, 2], [0], [3]):  # the hand spares 0, takes the slot of 1
        cache.admit(np.array(call, np.int64))
    assert sorted(cache.row_of_slot.tolist()) == [0, 2, 3]
    cache.admit(np.array([4], np.int64))
    assert sorted(cache.row_of_slot.tolist()) == [0, 3, 4]


def test_rows_of_the_current_call_stay() -> None:
    cache = RowCache(10, 3, row_bytes=5)
    cache.admit(np.array([0, 1, 2], np.int64))
    slots, missing = cache.admit(np.array([5, 1, 6, 1], np.int64))
    assert missing.rows.tolist() == [5, 6] and len(set(slots.tolist())) == 3
    assert cache.row_of_slot[slots].tolist() == [5, 1, 6, 1]


def test_forgetting_empties_and_keeps_the_counts() -> None:
    cache = RowCache(10, 3, row_bytes=5)
    cache.admit(np.array([0, 1, 0], np.int64))
    cache.forget()
    _, missing = cache.admit(np.array([1], np.int64))
    assert missing.rows.tolist() == [1]
    assert cache.counts == CacheCounts(hits=0, misses=3, evictions=0, bytes_read=15)
