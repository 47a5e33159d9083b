"""Sorting more documents than memory holds: an external merge sort on disk.

Documents come in source order and are spilled as *runs*: as many as fit in memory, sorted by key.
Every key is unique, so the order of all documents is settled by the keys alone, wherever the runs
were cut. Afterwards the key space is walked from below in *ranges* that fit in memory; each run
holds its part of a range in one piece, because it is sorted.

The spill is four files that only grow, one per column. A run counts once its length stands in the
caller's state; whatever lies behind the last such length is cut off on resumption.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from strata.config import FrozenConfig

_GATHER_TOKENS = 1 << 20
_COLUMNS = {"keys": "<u8", "ends": "<i8", "loss_from": "<i4"}
_LAST_KEY = 2**64 - 1


@dataclass
class Documents:
    """Some tokenised documents.

    Attributes:
        tokens: (num_tokens,) uint16 or uint32, one document after the other.
        lengths: (num_documents,) int64, tokens of each.
        loss_from: (num_documents,) int32, leading tokens of each without loss.
        is_val: (num_documents,) bool, which belong to the validation split.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    loss_from: np.ndarray
    is_val: np.ndarray

    @staticmethod
    def concatenate(parts: Sequence[Documents]) -> Documents:
        """Put several behind one another."""
        return Documents(
            tokens=np.concatenate([part.tokens for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            loss_from=np.concatenate([part.loss_from for part in parts]),
            is_val=np.concatenate([part.is_val for part in parts]),
        )


class RunEntry(FrozenConfig):
    """One run in the spill: the validation documents first, each split sorted by key."""

    num_documents: int
    num_val: int
    num_tokens: int
    num_val_tokens: int


@dataclass(frozen=True)
class SortedDocuments:
    """The documents of one key range, in order of their keys.

    Attributes:
        tokens: (num_tokens,) as they lay in the spill, not in order.
        starts: (num_documents,) int64, where in `tokens` each document starts.
        lengths, loss_from: (num_documents,) as in `Documents`.
        keys: (num_documents,) uint64, ascending.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    loss_from: np.ndarray
    keys: np.ndarray

    def gather(self, begin: int, stop: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Copy documents [begin, stop) out in order: (first, last + 1, tokens), in portions."""
        yield from _gather(self.tokens, self.starts[begin:stop], self.lengths[begin:stop], begin)


def run_order(documents: Documents, keys: np.ndarray) -> np.ndarray:
    """(num_documents,) which document comes in each row of a run: sorted by (not val, key)."""
    return np.lexsort((keys, ~documents.is_val))


class Spill:
    """The four files of a spill in `folder`."""

    def __init__(self, folder: Path, *, dtype: np.dtype) -> None:
        self._folder = folder
        self._dtype = np.dtype(dtype)

    def cut_to(self, runs: Sequence[RunEntry]) -> None:
        """Cut the files to exactly these runs, creating them where they are missing."""
        num_documents = sum(run.num_documents for run in runs)
        num_tokens = sum(run.num_tokens for run in runs)
        self._cut("tokens", num_tokens * self._dtype.itemsize)
        for name, dtype in _COLUMNS.items():
            self._cut(name, num_documents * np.dtype(dtype).itemsize)

    def append_run(self, documents: Documents, keys: np.ndarray, *, num_before: int) -> RunEntry:
        """Write documents behind the earlier runs, in the order of `run_order`.

        Args:
            documents: what to write.
            keys: (num_documents,) uint64, unique over all runs.
            num_before: how many tokens all earlier runs hold.
        """
        order = run_order(documents, keys)
        starts = (np.cumsum(documents.lengths) - documents.lengths)[order]
        lengths = documents.lengths[order]
        with open(self._folder / "tokens", "ab") as file:
            for _, _, tokens in _gather(documents.tokens, starts, lengths, 0):
                file.write(tokens.view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        columns = {
            "keys": keys[order],
            "ends": np.cumsum(lengths) + num_before,
            "loss_from": documents.loss_from[order],
        }
        for name, values in columns.items():
            with open(self._folder / name, "ab") as file:
                file.write(values.astype(_COLUMNS[name]).view(np.uint8).data)
                file.flush()
                os.fsync(file.fileno())
        num_val = int(documents.is_val.sum())
        return RunEntry(
            num_documents=len(lengths),
            num_val=num_val,
            num_tokens=int(lengths.sum()),
            num_val_tokens=int(lengths[:num_val].sum()),
        )

    def sorted_ranges(
        self,
        runs: Sequence[RunEntry],
        *,
        val: bool,
        from_key: int,
        range_bytes: int,
        dropped: Path | None = None,
    ) -> Iterator[SortedDocuments]:
        """Walk one split in key order, from `from_key` on, in ranges that fit in memory.

        Args:
            runs: the runs of the spill.
            val: which split.
            from_key: the first key of interest.
            range_bytes: the most bytes of a range, but for a single longer document.
            dropped: a file with a byte for each row; documents with a 1 are left out.
        """
        slices = _split_slices(runs, val=val)
        while from_key <= _LAST_KEY:
            # Mapped anew for each range, so that pages read do not add up to the whole index.
            cursor = _Cursor(self._map("keys"), self._map("ends"), slices, self._dtype.itemsize)
            cursor.start_at(from_key)
            next_key = cursor.reach(range_bytes)
            if next_key is None:
                return
            yield self._load(cursor.begins, cursor.stops, dropped)
            from_key = next_key

    def _load(self, begins: np.ndarray, stops: np.ndarray, dropped: Path | None) -> SortedDocuments:
        ends = self._map("ends")
        token_begins = [int(ends[begin - 1]) if begin else 0 for begin in begins]
        token_counts = [
            int(ends[stop - 1]) - token_begin if stop > begin else 0
            for begin, stop, token_begin in zip(begins, stops, token_begins, strict=True)
        ]
        tokens = np.empty(sum(token_counts), self._dtype)
        keys, starts, lengths, loss_from, stays = [], [], [], [], []
        filled = 0
        with open(self._folder / "tokens", "rb", buffering=0) as file:
            for begin, stop, token_begin, count in zip(
                begins, stops, token_begins, token_counts, strict=True
            ):
                if count == 0:
                    continue
                file.seek(token_begin * self._dtype.itemsize)
                _read_into(file, tokens[filled : filled + count])
                document_ends = self._read("ends", begin, stop) - token_begin
                document_starts = np.concatenate(([0], document_ends[:-1]))
                starts.append(document_starts + filled)
                lengths.append(document_ends - document_starts)
                keys.append(self._read("keys", begin, stop))
                loss_from.append(self._read("loss_from", begin, stop))
                if dropped is not None:
                    marks = np.fromfile(dropped, np.uint8, int(stop - begin), offset=int(begin))
                    stays.append(marks == 0)
                filled += count
        all_keys = np.concatenate(keys)
        order = np.argsort(all_keys)
        if stays:
            order = order[np.concatenate(stays)[order]]
        return SortedDocuments(
            tokens=tokens,
            starts=np.concatenate(starts)[order],
            lengths=np.concatenate(lengths)[order],
            loss_from=np.concatenate(loss_from)[order],
            keys=all_keys[order],
        )

    def _cut(self, name: str, num_bytes: int) -> None:
        with open(self._folder / name, "ab") as file:
            assert file.tell() >= num_bytes, f"{name} is shorter than its state says"
            file.truncate(num_bytes)

    def _map(self, name: str) -> np.ndarray:
        path = self._folder / name
        if path.stat().st_size == 0:  # an empty file cannot be mapped
            return np.empty(0, _COLUMNS[name])
        return np.memmap(path, _COLUMNS[name], mode="r").view(np.ndarray)

    def _read(self, name: str, begin: int, stop: int) -> np.ndarray:
        dtype = np.dtype(_COLUMNS[name])
        offset = int(begin) * dtype.itemsize
        return np.fromfile(self._folder / name, dtype, count=int(stop - begin), offset=offset)


class _Cursor:
    """A position in every run at once, moved along the key space.

    Attributes:
        begins, stops: (num_runs,) int64, the rows of each run that the range covers.
    """

    def __init__(
        self, keys: np.ndarray, ends: np.ndarray, slices: np.ndarray, token_bytes: int
    ) -> None:
        self._keys = keys
        self._ends = ends
        self._slices = slices
        self._token_bytes = token_bytes
        self.begins = slices[:, 0].copy()
        self.stops = slices[:, 0].copy()

    def start_at(self, key: int) -> None:
        """Let the range begin with the first key >= `key`."""
        self.begins = self._rows_below(key, self._slices[:, 0], self._slices[:, 1])

    def reach(self, range_bytes: int) -> int | None:
        """Let the range end where it would outgrow `range_bytes`, at one document at the least.

        Returns:
            The key that the next range starts with; None where there is nothing left.
        """
        lower, upper = self.begins, self._slices[:, 1]
        if (lower >= upper).all():
            return None
        first = min(int(self._keys[row]) for row in lower[lower < upper])
        fits, too_far = first + 1, _LAST_KEY + 2  # the range [begins, fits) always has a document
        self.stops = lower = self._rows_below(fits, lower, upper)
        while too_far - fits > 1:
            middle = (fits + too_far) // 2
            rows = self._rows_below(middle, lower, upper)
            if self._bytes_until(rows) <= range_bytes:
                fits, lower = middle, rows
            else:
                too_far, upper = middle, rows
            if (lower == upper).all():
                break
        self.stops = lower
        return fits

    def _rows_below(self, key: int, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """In each run, the first row in [lower, upper] whose key is not below `key`."""
        if key > _LAST_KEY:
            return upper.copy()
        wanted = np.uint64(key)
        return np.array(
            [
                begin + np.searchsorted(self._keys[begin:stop], wanted)
                for begin, stop in zip(lower, upper, strict=True)
            ],
            np.int64,
        )

    def _bytes_until(self, stops: np.ndarray) -> int:
        tokens = sum(
            int(self._ends[stop - 1]) - (int(self._ends[begin - 1]) if begin else 0)
            for begin, stop in zip(self.begins, stops, strict=True)
            if stop > begin
        )
        # What a document costs in memory besides its tokens: the four columns, twice for sorting.
        return tokens * self._token_bytes + 64 * int((stops - self.begins).sum())


def _split_slices(runs: Sequence[RunEntry], *, val: bool) -> np.ndarray:
    """(num_runs, 2) rows of the spill that hold one split of each run."""
    slices = []
    row = 0
    for run in runs:
        middle, end = row + run.num_val, row + run.num_documents
        slices.append((row, middle) if val else (middle, end))
        row = end
    return np.array(slices, np.int64).reshape(-1, 2)


def _gather(
    tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, first: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Concatenate the named pieces of `tokens`, about `_GATHER_TOKENS` at a time."""
    portions = np.flatnonzero(np.diff(np.cumsum(lengths) // _GATHER_TOKENS, prepend=0)) + 1
    borders = np.unique(np.concatenate(([0], portions, [len(lengths)])))
    for begin, stop in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        pieces = [
            tokens[start : start + length]
            for start, length in zip(
                starts[begin:stop].tolist(), lengths[begin:stop].tolist(), strict=True
            )
        ]
        yield first + begin, first + stop, np.concatenate(pieces)


def _read_into(file: FileIO, values: np.ndarray) -> None:
    buffer = values.view(np.uint8).data
    while len(buffer):
        count = file.readinto(buffer)
        assert count, "the spill is shorter than its index says"
        buffer = buffer[count:]
