"""The row cache in plain Python: slow, and slot for slot what the kernel does."""

from __future__ import annotations

import numpy as np


def admit(
    rows: np.ndarray,
    slot_of_row: np.ndarray,
    row_of_slot: np.ndarray,
    read_again: np.ndarray,
    call_of_slot: np.ndarray,
    clock: np.ndarray,
    slots: np.ndarray,
    missing_rows: np.ndarray,
    missing_slots: np.ndarray,
) -> tuple[int, int, int]:
    """Find or give slots; see `RowCache`. Returns rows missing, picks that hit, rows evicted."""
    clock[0] += 1
    call, hand = int(clock[0]), int(clock[1])
    here = slot_of_row[rows]
    found = here[here >= 0]
    call_of_slot[found], read_again[found] = call, 1
    num_missing = evictions = 0
    for row in rows[here < 0].tolist():
        if slot_of_row[row] >= 0:
            continue
        while call_of_slot[hand] == call or read_again[hand]:
            if call_of_slot[hand] != call:
                read_again[hand] = 0
            hand = (hand + 1) % len(row_of_slot)
        if row_of_slot[hand] >= 0:
            slot_of_row[row_of_slot[hand]] = -1
            evictions += 1
        slot_of_row[row], row_of_slot[hand], call_of_slot[hand] = hand, row, call
        missing_rows[num_missing], missing_slots[num_missing] = row, hand
        num_missing += 1
        hand = (hand + 1) % len(row_of_slot)
    slots[:] = slot_of_row[rows]
    clock[1] = hand
    return num_missing, len(found), evictions


def copy_rows(
    source: np.ndarray, start: int, rows: np.ndarray, slots: np.ndarray, target: np.ndarray
) -> None:
    """target[slot] = the bytes of the row in `source`."""
    row_bytes = target.shape[1]
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        first = start + row * row_bytes
        target[slot] = source[first : first + row_bytes]
