"""A cache of table rows in memory: which slot holds which row, and who makes room.

`RowCache` keeps the books; the rows themselves lie in a tensor of the caller's, one slot each.
Eviction is CLOCK (second chance): a hand goes round the slots, spares those read again since it
last came by, and takes the first that was not. Slots that the current call reads are never taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from strata.ops.kernels import AVAILABLE
from strata.ops.row_cache import reference

__all__ = ["CacheCounts", "Missing", "RowCache", "copy_rows"]


@dataclass(frozen=True)
class CacheCounts:
    """What a cache did since it was made.

    Attributes:
        hits: picks whose row was there before the call that read it.
        misses: rows that were read from the file.
        evictions: rows that made room for others.
        bytes_read: bytes of the rows that were read from the file.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_read: int = 0


@dataclass(frozen=True)
class Missing:
    """Rows that must now be written into the slots given to them; int64 both."""

    rows: np.ndarray
    slots: np.ndarray


class RowCache:
    """The books of a cache.

    Args:
        num_rows: rows of the table; four bytes are kept for each.
        num_slots: rows that fit in the cache.
        row_bytes: bytes of a row, for the counts.
    """

    def __init__(self, num_rows: int, num_slots: int, *, row_bytes: int) -> None:
        self.num_rows, self.num_slots, self.row_bytes = num_rows, num_slots, row_bytes
        self.counts = CacheCounts()
        self.forget()

    def forget(self) -> None:
        """Empty the cache; the counts go on."""
        self.slot_of_row = np.full(self.num_rows, -1, np.int32)
        self.row_of_slot = np.full(self.num_slots, -1, np.int64)
        self.read_again = np.zeros(self.num_slots, np.uint8)
        self.call_of_slot = np.zeros(self.num_slots, np.int64)  # the call that last read it
        self.clock = np.zeros(2, np.int64)  # calls so far, the hand

    def admit(self, rows: np.ndarray) -> tuple[np.ndarray, Missing]:
        """Find the slot of each row, giving slots to rows that have none.

        Args:
            rows: (q,) int64 in 0..num_rows-1, contiguous, with at most num_slots distinct rows.
                Trusted: the kernel writes wherever it is told to.

        Returns:
            slots: (q,) int64.
            missing: the rows whose slots the caller must fill before reading.
        """
        slots = np.empty(len(rows), np.int64)
        most = min(len(rows), self.num_slots)
        missing_rows, missing_slots = np.empty(most, np.int64), np.empty(most, np.int64)
        if AVAILABLE:
            from strata.ops.row_cache.cpu import admit
        else:
            from strata.ops.row_cache.reference import admit
        num_missing, hits, evictions = admit(
            rows,
            self.slot_of_row,
            self.row_of_slot,
            self.read_again,
            self.call_of_slot,
            self.clock,
            slots,
            missing_rows,
            missing_slots,
        )
        self.counts = replace(
            self.counts,
            hits=self.counts.hits + hits,
            misses=self.counts.misses + num_missing,
            evictions=self.counts.evictions + evictions,
            bytes_read=self.counts.bytes_read + num_missing * self.row_bytes,
        )
        return slots, Missing(missing_rows[:num_missing], missing_slots[:num_missing])


def copy_rows(source: np.ndarray, start: int, missing: Missing, target: np.ndarray) -> None:
    """Copy missing rows into their slots.

    Args:
        source: (bytes,) uint8, a mapped file.
        start: where row 0 begins in it; need not be aligned.
        missing: from `RowCache.admit`.
        target: (slots, bytes of a row) uint8.
    """
    if not AVAILABLE:
        reference.copy_rows(source, start, missing.rows, missing.slots, target)
        return
    from strata.ops.row_cache import cpu

    cpu.copy_rows(source, start, missing.rows, missing.slots, target)
