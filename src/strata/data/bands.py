"""Finding equal band hashes among more documents than memory holds.

For every run of the spill and every band the file holds the hashes, sorted, and beside each the row
of its document. A band is gone through in ranges of hashes that fit in memory: each run's part of a
range lies in one piece. Of the documents that share a hash the first in the order of the sources
stays, the others are dropped, whether or not it is dropped itself for another one. That is a
statement about documents alone, so the result depends on neither memory nor runs, and marking a
document twice does no harm.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from strata.data.progress import ProgressBar
from strata.data.spill import RunEntry

_HASHES = "<u8"
_ROWS = "<u4"
_MATCH_BYTES = 48  # of memory for one document in a range, its sorted copies included
BYTES_A_BAND = 32  # of memory for one document while a run is sorted


class Bands:
    """The band hashes of a spill, in two files that only grow.

    Args:
        folder: where the spill is.
        num_bands: hashes of a document.
    """

    def __init__(self, folder: Path, *, num_bands: int) -> None:
        self._hashes = folder / "bands"
        self._rows = folder / "band_rows"
        self._num_bands = num_bands

    def cut_to(self, runs: Sequence[RunEntry]) -> None:
        """Cut the files to exactly these runs, creating them where they are missing."""
        count = self._num_bands * sum(run.num_documents for run in runs)
        for path, dtype in ((self._hashes, _HASHES), (self._rows, _ROWS)):
            with open(path, "ab") as file:
                num_bytes = count * np.dtype(dtype).itemsize
                assert file.tell() >= num_bytes, f"{path.name} is shorter than its state says"
                file.truncate(num_bytes)

    def append_run(self, hashes: np.ndarray, order: np.ndarray) -> None:
        """Write the hashes of one run.

        Args:
            hashes: (num_documents, num_bands) uint64, in the order of the sources.
            order: (num_documents,) which document lies in each row of the run.
        """
        row_of = np.empty(len(order), _ROWS)
        row_of[order] = np.arange(len(order), dtype=_ROWS)
        with open(self._hashes, "ab") as hash_file, open(self._rows, "ab") as row_file:
            for band in range(self._num_bands):
                # Stable: of equal hashes the earlier document comes first.
                ascending = np.argsort(hashes[:, band], kind="stable")
                for file, values in (
                    (hash_file, hashes[ascending, band].astype(_HASHES)),
                    (row_file, row_of[ascending]),
                ):
                    file.write(values.view(np.uint8).data)
            for file in (hash_file, row_file):
                file.flush()
                os.fsync(file.fileno())

    def match(
        self, runs: Sequence[RunEntry], dropped: Path, *, range_bytes: int, progress: bool
    ) -> int:
        """Mark all documents that share a band with an earlier one.

        Args:
            runs: the runs of the spill.
            dropped: the file to write: for every row of the spill a byte, 1 where it is dropped.
            range_bytes: how much memory a range may take, but for the documents of one run and of
                one hash.
            progress: show a progress bar on stderr.

        Returns:
            How many are dropped.
        """
        num_documents = sum(run.num_documents for run in runs)
        with open(dropped, "wb") as file:
            file.truncate(num_documents)
        marks = np.memmap(dropped, np.uint8, mode="r+", shape=(num_documents,))
        with ProgressBar("near duplicates", total=self._num_bands, enabled=progress) as bar:
            for band in range(self._num_bands):
                for rows in self._repeated(runs, band, num_documents, range_bytes):
                    marks[rows] = 1
                bar.update(band + 1)
        count = int(np.count_nonzero(marks))
        marks.flush()
        del marks
        with open(dropped, "rb+") as file:
            os.fsync(file.fileno())
        return count

    def _repeated(
        self, runs: Sequence[RunEntry], band: int, num_documents: int, range_bytes: int
    ) -> Iterator[np.ndarray]:
        """Rows of the spill whose hash an earlier document has, range by range."""
        num_ranges = max(1, -(-num_documents * _MATCH_BYTES // range_bytes))
        # Hashes are uniform, so equal ranges hold about equally many.
        borders = [2**64 * number // num_ranges for number in range(num_ranges + 1)]
        all_hashes = np.memmap(self._hashes, _HASHES, mode="r")
        all_rows = np.memmap(self._rows, _ROWS, mode="r")
        for low, high in pairwise(borders):
            hashes, rows = [], []
            before = 0
            for run in runs:
                begin = before * self._num_bands + band * run.num_documents
                own = all_hashes[begin : begin + run.num_documents]
                first, last = _within(own, low, high)
                found = np.array(own[first:last])
                own_rows = np.array(all_rows[begin + first : begin + last], np.int64) + before
                is_first = np.ones(len(found), bool)
                is_first[1:] = found[1:] != found[:-1]
                yield own_rows[~is_first]
                hashes.append(found[is_first])
                rows.append(own_rows[is_first])
                before += run.num_documents
            merged, merged_rows = np.concatenate(hashes), np.concatenate(rows)
            # A run holds a hash once now, and later runs hold later documents in higher rows.
            order = np.lexsort((merged_rows, merged))
            merged, merged_rows = merged[order], merged_rows[order]
            yield merged_rows[1:][merged[1:] == merged[:-1]]


def _within(ascending: np.ndarray, low: int, high: int) -> tuple[int, int]:
    """Where the values of [low, high) stand; high may be 2**64."""
    first = int(np.searchsorted(ascending, np.uint64(low)))
    if high >= 2**64:
        return first, len(ascending)
    return first, int(np.searchsorted(ascending, np.uint64(high)))
