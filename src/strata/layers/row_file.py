"""The rows of one tensor in a file, mapped into memory and read where they lie."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from strata.errors import ModelError
from strata.ops.row_cache import Missing, copy_rows


@dataclass(frozen=True)
class RowPlace:
    """Where the rows of a tensor lie.

    Attributes:
        path: the file.
        offset: byte of row 0; need not be aligned to the dtype.
        num_rows: r.
        width: v.
        dtype: of an element.
    """

    path: Path
    offset: int
    num_rows: int
    width: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * self.dtype.itemsize

    @property
    def table_bytes(self) -> int:
        """Bytes of all rows."""
        return self.num_rows * self.row_bytes


class RowFile:
    """An open mapping of a file's rows. A file that shrinks while it is mapped ends the process.

    Args:
        place: which rows.

    Raises:
        ModelError: the file cannot be read, or ends before the last row.
    """

    def __init__(self, place: RowPlace) -> None:
        self.place = place
        try:
            with place.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise ModelError(
                f"{place.path} cannot be mapped ({error}): copy or save the folder again"
            ) from None
        end = place.offset + place.table_bytes
        if len(self._map) < end:
            raise ModelError(
                f"{place.path} ends after {len(self._map):,} bytes, its value table after "
                f"{end:,}: copy or save the folder again"
            )
        self._bytes = np.frombuffer(self._map, np.uint8)
        # Else a page fault reads the 128 KiB around one row. Not every system takes advice.
        self._advise("MADV_RANDOM", 0, len(self._map))

    def read(self, missing: Missing, target_sv: Tensor) -> None:
        """Read rows into slots of a tensor of the same dtype and width, contiguous.

        The kernel is asked for all of them first, so that the disk works on many at a time.
        """
        row_bytes = self.place.row_bytes
        for first, last in _runs(missing.rows):
            begin = self.place.offset + first * row_bytes
            self._advise("MADV_WILLNEED", begin, (last - first + 1) * row_bytes)
        slots = target_sv.view(torch.uint8).numpy() if row_bytes else np.empty((0, 0), np.uint8)
        copy_rows(self._bytes, self.place.offset, missing, slots)

    def blocks(self, rows_per_block: int) -> Iterator[Tensor]:
        """All rows in order, (b, v) each, copied; for passes over the whole table."""
        place = self.place
        for first in range(0, place.num_rows, rows_per_block):
            stop = min(first + rows_per_block, place.num_rows)
            begin, end = (place.offset + row * place.row_bytes for row in (first, stop))
            self._advise("MADV_WILLNEED", begin, end - begin)
            block = torch.from_numpy(self._bytes[begin:end].copy())
            yield block.view(place.dtype).view(stop - first, place.width)
            self._advise("MADV_DONTNEED", begin, end - begin)

    def forget(self) -> None:
        """Let the system drop the pages that were read, so that the next read is the disk's."""
        self._advise("MADV_DONTNEED", 0, len(self._map))  # else they count as in use
        if hasattr(os, "posix_fadvise"):
            with self.place.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _advise(self, advice: str, begin: int, num_bytes: int) -> None:
        if not hasattr(mmap, advice):
            return
        start = begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(getattr(mmap, advice), start, begin + num_bytes - start)


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Neighbouring rows together: (first, last) of each run, ascending."""
    if len(rows) == 0:
        return
    ordered = np.sort(rows)
    breaks = np.flatnonzero(np.diff(ordered) > 1)
    firsts = ordered[np.concatenate(([0], breaks + 1))]
    lasts = ordered[np.concatenate((breaks, [len(ordered) - 1]))]
    yield from zip(firsts.tolist(), lasts.tolist(), strict=True)
