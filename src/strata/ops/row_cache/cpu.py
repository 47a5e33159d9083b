"""The row cache as loops that numba compiles. Same signatures as `reference.py`."""

from __future__ import annotations

import numpy as np

from strata.ops.kernels import kernel
from strata.ops.threads import even_bounds, run_split


def copy_rows(
    source: np.ndarray, start: int, rows: np.ndarray, slots: np.ndarray, target: np.ndarray
) -> None:
    """See `reference.copy_rows`."""
    bounds = even_bounds(len(rows), bytes_per_item=target.shape[1])
    run_split(_copy, bounds, source, start, rows, slots, target)


@kernel
def admit(  # type: ignore[no-untyped-def]
    rows,
    slot_of_row,
    row_of_slot,
    read_again,
    call_of_slot,
    clock,
    slots,
    missing_rows,
    missing_slots,
):
    """See `reference.admit`."""
    clock[0] += 1
    call, hand = clock[0], clock[1]
    num_slots = len(row_of_slot)
    hits = 0
    for i in range(len(rows)):
        slot = slot_of_row[rows[i]]
        slots[i] = slot
        if slot >= 0:
            call_of_slot[slot] = call
            read_again[slot] = 1
            hits += 1
    num_missing = evictions = 0
    if hits < len(rows):
        for i in range(len(rows)):
            if slots[i] >= 0:
                continue
            row = rows[i]
            if slot_of_row[row] < 0:
                while call_of_slot[hand] == call or read_again[hand] != 0:
                    if call_of_slot[hand] != call:
                        read_again[hand] = 0
                    hand = hand + 1 if hand + 1 < num_slots else 0
                if row_of_slot[hand] >= 0:
                    slot_of_row[row_of_slot[hand]] = -1
                    evictions += 1
                slot_of_row[row] = hand
                row_of_slot[hand] = row
                call_of_slot[hand] = call
                missing_rows[num_missing] = row
                missing_slots[num_missing] = hand
                num_missing += 1
                hand = hand + 1 if hand + 1 < num_slots else 0
            slots[i] = slot_of_row[row]
    clock[1] = hand
    return num_missing, hits, evictions


@kernel
def _copy(source, begin, rows, slots, target, start, stop):  # type: ignore[no-untyped-def]
    """The rows start..stop of the list."""
    row_bytes = target.shape[1]
    for i in range(start, stop):
        first = begin + rows[i] * row_bytes
        slot = slots[i]
        for j in range(row_bytes):
            target[slot, j] = source[first + j]
