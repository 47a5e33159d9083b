"""Which tokens stand in which sequence: two ways to cut an epoch of a split into rows.

A plan knows the rows of one epoch. Row `i` is a list of ranges of tokens; the rest of the row is
padding. Both plans are pure functions of (dataset, sequence_tokens, seed, epoch).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from strata.data.dataset import TokenDataset
from strata.data.order import hash_indices, permutation
from strata.data.shards import Shard
from strata.errors import DataError


class Plan(Protocol):
    """The rows of one epoch."""

    num_rows: int

    def row(self, index: int) -> Iterator[tuple[Shard, int, int]]:
        """The ranges of tokens that fill a row, in order."""
        ...


class ConcatPlan:
    """Windows of `sequence_tokens` over the stream of documents, in shuffled order.

    The stream is a ring, cut from another offset in every epoch: otherwise the same tokens would
    stand at the head of a window, where nothing predicts them, in every epoch. Each epoch leaves
    out less than one window.

    A plan takes 16 bytes of memory per window while it is made and 8 afterwards.
    """

    def __init__(
        self, dataset: TokenDataset, *, sequence_tokens: int, seed: int, epoch: int
    ) -> None:
        self._dataset = dataset
        self._sequence_tokens = sequence_tokens
        self.num_rows = dataset.num_tokens // sequence_tokens
        if self.num_rows == 0:
            raise DataError(
                f"{dataset.folder} holds {dataset.num_tokens} tokens, less than one sequence of "
                f"{sequence_tokens}: lower sequence_tokens, prepare more text, or pack by document"
            )
        self._order = permutation(self.num_rows, seed=seed, purpose=f"windows of epoch {epoch}")
        hashed = hash_indices(np.array([epoch]), seed=seed, purpose="offset of the windows")
        self._offset = int(hashed[0]) % sequence_tokens

    def row(self, index: int) -> Iterator[tuple[Shard, int, int]]:
        """The ranges of tokens that fill a row, in order."""
        total = self._dataset.num_tokens
        start = (self._offset + int(self._order[index]) * self._sequence_tokens) % total
        stop = start + self._sequence_tokens
        yield from self._dataset.segments(start, min(stop, total))
        if stop > total:
            yield from self._dataset.segments(0, stop - total)


class DocumentPlan:
    """Whole documents in shuffled order, as many to a row as fit.

    Every row starts at a document border. A document longer than a row is cut off at the row's
    end, with one warning that says how much is lost.

    A plan takes about 40 bytes of memory per document while it is made and 16 afterwards.
    """

    def __init__(
        self, dataset: TokenDataset, *, sequence_tokens: int, seed: int, epoch: int
    ) -> None:
        self._dataset = dataset
        self._sequence_tokens = sequence_tokens
        lengths = dataset.document_lengths()
        if epoch == 0:  # every loader makes this one first
            _warn_of_cut(lengths, sequence_tokens)
        self._order = permutation(
            dataset.num_documents, seed=seed, purpose=f"documents of epoch {epoch}"
        )
        np.minimum(lengths, sequence_tokens, out=lengths)
        self._row_starts = _pack(lengths[self._order], sequence_tokens)
        self.num_rows = len(self._row_starts) - 1

    def row(self, index: int) -> Iterator[tuple[Shard, int, int]]:
        """The ranges of tokens that fill a row, in order."""
        begin, stop = self._row_starts[index : index + 2].tolist()
        for document in self._order[begin:stop].tolist():
            shard, first, last = self._dataset.locate(document)
            yield shard, first, min(last, first + self._sequence_tokens)


def _pack(lengths: np.ndarray, sequence_tokens: int) -> np.ndarray:
    """Where each row starts when documents are taken in order while they fit, and the end."""
    ends = np.cumsum(lengths, dtype=np.int64)
    # The row that starts with document i ends before document following[i].
    limits = ends - lengths + sequence_tokens
    following = np.searchsorted(ends, limits, side="right").tolist()
    starts = [0]
    while starts[-1] < len(following):
        starts.append(following[starts[-1]])
    return np.array(starts, np.int64)


def _warn_of_cut(lengths: np.ndarray, sequence_tokens: int) -> None:
    lost = int(np.maximum(lengths - sequence_tokens, 0).sum(dtype=np.int64))
    if lost:
        share = lost / int(lengths.sum(dtype=np.int64))
        too_long = float((lengths > sequence_tokens).mean())
        warnings.warn(
            f"{too_long:.1%} of the documents are longer than {sequence_tokens} tokens and are cut "
            f"off: {share:.1%} of all tokens are not read; packing='concat' reads them all",
            stacklevel=4,
        )
