"""A prepared folder, opened: one split as a stream of tokens and a list of documents."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from strata.data.manifest import SplitEntry, TokenManifest, read_manifest
from strata.data.shards import Shard, check_documents, check_hashes, open_shard
from strata.errors import DataError

_OPEN_SHARDS = 64  # three file descriptors each; the usual limit of a process is 1024


class TokenDataset:
    """One split of a folder made by `strata data prepare`, memory-mapped.

    Make one with `TokenDataset.open`. The split is a stream of tokens, `[0, num_tokens)`, in which
    whole documents follow one another; shards are invisible.

    Attributes:
        folder: where it is.
        manifest: what the folder says about itself.
        num_tokens, num_documents: of this split.
        has_prompts: whether any document starts with tokens that carry no loss.
    """

    def __init__(self, folder: Path, manifest: TokenManifest, split: SplitEntry, name: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self._split = split
        self._shard_folder = folder / name
        self._open: OrderedDict[int, Shard] = OrderedDict()
        # Where each shard starts in the stream and in the list of documents, and the two ends.
        self._token_starts = _starts([shard.num_tokens for shard in split.shards])
        self._document_starts = _starts([shard.num_documents for shard in split.shards])
        self.num_tokens = int(self._token_starts[-1])
        self.num_documents = int(self._document_starts[-1])
        self.has_prompts = False

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        split: str = "train",
        vocab_size: int | None = None,
        verify: bool = False,
    ) -> TokenDataset:
        """Open a split after checking its manifest, the size and header of every file, and every
        document offset.

        Args:
            folder: what `strata data prepare` made.
            split: "train" or "val".
            vocab_size: of the model that will read it; ids must be smaller.
            verify: also compare the sha256 of every file, which reads them whole.

        Raises:
            DataError: the folder is missing, unfinished, damaged, of another version, without
                this split, or made with more tokens than `vocab_size`.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        entry = manifest.splits.get(split)  # type: ignore[call-overload]
        if entry is None:
            raise DataError(
                f"{folder} has no split {split!r}, only {', '.join(manifest.splits)}: "
                "prepare it with --val-fraction to have a val"
            )
        if not entry.shards:
            raise DataError(f"split {split!r} of {folder} is empty: no document fell into it")
        if vocab_size is not None and manifest.vocab_size > vocab_size:
            raise DataError(
                f"{folder} was made with a tokenizer of {manifest.vocab_size} tokens, the model "
                f"has {vocab_size}: give the model at least as many"
            )
        dataset = cls(folder, manifest, entry, split)
        dataset._check(verify=verify)
        return dataset

    def _check(self, *, verify: bool) -> None:
        declared = (self._split.num_tokens, self._split.num_documents)
        if declared != (self.num_tokens, self.num_documents):
            raise DataError(f"{self.folder}/manifest.json is damaged: its counts do not add up")
        for entry in self._split.shards:
            shard = open_shard(self._shard_folder, entry, dtype=self.manifest.dtype)
            check_documents(shard)
            self.has_prompts = self.has_prompts or bool(shard.loss_from.any())
            if verify:
                check_hashes(self._shard_folder, entry)

    def segments(self, start: int, stop: int) -> Iterator[tuple[Shard, int, int]]:
        """The pieces of the stream's tokens [start, stop): a shard and a range in its tokens."""
        number = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        while start < stop:
            base, end = (int(x) for x in self._token_starts[number : number + 2])
            yield self._shard(number), start - base, min(stop, end) - base
            start = end
            number += 1

    def locate(self, document: int) -> tuple[Shard, int, int]:
        """The shard of a document and the range of its tokens there."""
        number = int(np.searchsorted(self._document_starts, document, side="right")) - 1
        shard = self._shard(number)
        local = document - int(self._document_starts[number])
        start = int(shard.documents[local])
        is_last = local + 1 == len(shard.documents)
        stop = len(shard.tokens) if is_last else int(shard.documents[local + 1])
        return shard, start, stop

    def document(self, index: int) -> np.ndarray:
        """The token ids of one document.

        Args:
            index: 0 <= index < num_documents, in the order of the shards.

        Returns:
            (num_tokens,) int64.

        Raises:
            DataError: there is no such document, or an id is not below the vocabulary's size.
        """
        if not 0 <= index < self.num_documents:
            raise DataError(f"no document {index}: {self.folder} has {self.num_documents}")
        shard, start, stop = self.locate(index)
        tokens = shard.tokens[start:stop].astype(np.int64)
        self.check_ids(tokens, shard)
        return tokens

    def document_lengths(self) -> np.ndarray:
        """(num_documents,) int32, the tokens of each document, as a new array."""
        lengths = np.empty(self.num_documents, np.int32)
        for number, begin in enumerate(self._document_starts[:-1].tolist()):
            shard = self._shard(number)
            ends = np.append(shard.documents[1:], len(shard.tokens))
            lengths[begin : begin + len(ends)] = ends - shard.documents
        return lengths

    def check_ids(self, tokens: np.ndarray, shard: Shard) -> None:
        """Refuse token ids that the vocabulary does not have.

        Raises:
            DataError: one is too great.
        """
        if tokens.size and int(tokens.max()) >= self.manifest.vocab_size:
            raise DataError(
                f"{shard.path} is damaged: token id {int(tokens.max())} with a vocabulary of "
                f"{self.manifest.vocab_size}: prepare the data again"
            )

    def _shard(self, number: int) -> Shard:
        shard = self._open.pop(number, None)
        if shard is None:
            entry = self._split.shards[number]
            shard = open_shard(self._shard_folder, entry, dtype=self.manifest.dtype)
            shard = replace(shard, first_document=int(self._document_starts[number]))
            if len(self._open) >= _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open[number] = shard
        return shard


def _starts(counts: list[int]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(np.array(counts, np.int64)))).astype(np.int64)
