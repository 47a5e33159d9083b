"""The two passes of `prepare`, and the state that survives a kill between any two writes."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from strata.data.bands import BYTES_A_BAND, Bands
from strata.data.batches import Position, read_batches
from strata.data.encode import EncodedBatch, TextEncoder
from strata.data.inputs import Inputs
from strata.data.manifest import (
    PreparedFrom,
    ShardEntry,
    SplitEntry,
    TokenManifest,
    write_json,
)
from strata.data.memory import MemoryPlan
from strata.data.order import hash_indices
from strata.data.progress import ProgressBar
from strata.data.shards import SplitWriter
from strata.data.spill import Documents, SortedDocuments, Spill, run_order
from strata.data.state import SplitState, State, load_state, state_path
from strata.data.workers import Encoding, encode_batches
from strata.errors import DataError

if TYPE_CHECKING:
    from strata.data.prepare import PrepareConfig

_SPILL_EVERY_S = 15.0  # what a killed process repeats at the most

Split = Literal["train", "val"]


class Passes:
    """The work of one `prepare` on a folder that it holds alone.

    Args:
        work: where the state and the spill are.
        out: where the splits go.
        inputs: what to read.
        encoder: the tokenizer.
        encoding: what encodes with it.
        config: the user's configuration.
        plan: how much memory goes where.
        prepared_from: what a state must agree with to be gone on from.
        progress: show progress bars.

    Raises:
        DataError: the state belongs to other arguments, or is damaged.
    """

    def __init__(
        self,
        work: Path,
        *,
        out: Path,
        inputs: Inputs,
        encoder: TextEncoder,
        encoding: Encoding,
        config: PrepareConfig,
        plan: MemoryPlan,
        prepared_from: PreparedFrom,
        progress: bool,
    ) -> None:
        self._work = work
        self._out = out
        self._files = inputs.files
        self._num_train = inputs.num_train
        self._encoder = encoder
        self._encoding = encoding
        self._config = config
        self._plan = plan
        self._progress = progress
        self._spill = Spill(work, dtype=encoder.dtype)
        self._bands: Bands | None = None
        if encoder.hasher is not None:
            self._bands = Bands(work, num_bands=encoder.hasher.settings.bands)
        self._dropped = work / "dropped"
        self._state = State(prepared_from=prepared_from)
        state = load_state(work, out, prepared_from)
        if state is None:
            self._commit()  # from here on the commits of data sets stand
        else:
            self._state = state

    def run(self) -> TokenManifest:
        """Do whatever is left to do, and describe the result."""
        if not self._state.scattered:
            self._spill.cut_to(self._state.runs)
            if self._bands is not None:
                self._bands.cut_to(self._state.runs)
            self._scatter()
        if self._bands is not None and not self._state.matched:
            self._match(self._bands)
        for split in self._splits():
            self._merge(split)
        return self._manifest()

    def _splits(self) -> list[Split]:
        has_val = self._config.val_fraction > 0 or self._num_train < len(self._files)
        return ["train", "val"] if has_val else ["train"]

    def _commit(self, **changes: object) -> None:
        self._state = self._state.model_copy(update=changes)
        write_json(state_path(self._work), self._state)

    # First pass

    def _scatter(self) -> None:
        batches = read_batches(
            self._files,
            options=self._config.read_options(self._plan.max_document_bytes),
            start=Position(self._state.position_source, self._state.position_record),
            batch_bytes=self._plan.batch_bytes,
            num_train=self._num_train,
        )
        total_bytes = sum(file.entry.num_bytes for file in self._files)
        num_tokens = sum(run.num_tokens for run in self._state.runs)
        waiting: list[EncodedBatch] = []
        waiting_bytes, spilled_s = 0, time.monotonic()
        most_bytes = self._plan.batch_bytes * (self._encoding.at_once + self._encoding.ahead)
        with (
            ProgressBar("tokenising", total=total_bytes, enabled=self._progress) as bar,
            closing(encode_batches(self._encoding, batches, most_bytes=most_bytes)) as encoded,
        ):
            for batch in encoded:
                waiting.append(batch)
                num_tokens += len(batch.documents.tokens)
                waiting_bytes += batch.documents.tokens.nbytes
                waiting_bytes += self._document_bytes() * len(batch.documents.lengths)
                is_due = time.monotonic() - spilled_s >= _SPILL_EVERY_S
                if is_due or waiting_bytes >= self._plan.run_bytes:
                    self._spill_run(waiting)
                    waiting, waiting_bytes, spilled_s = [], 0, time.monotonic()
                bar.update(batch.bytes_read, note=f"{num_tokens / 1e6:.1f}M tokens")
        if not self._state.runs and not any(len(batch.documents.lengths) for batch in waiting):
            raise self._nothing(waiting)
        self._spill_run(waiting, is_last=True)

    def _document_bytes(self) -> int:
        """What a document costs in memory besides its tokens until its run is spilled."""
        num_bands = self._encoder.hasher.settings.bands if self._encoder.hasher else 0
        return 48 + BYTES_A_BAND * num_bands

    def _nothing(self, waiting: list[EncodedBatch]) -> DataError:
        more = f" and {len(self._files) - 1} more" if len(self._files) > 1 else ""
        dropped = self._counted(waiting)
        if dropped:
            counts = ", ".join(f"{count:,} by {name}" for name, count in dropped.items())
            return DataError(
                f"no document of {self._files[0].path}{more} is left: the filters dropped {counts}"
            )
        return DataError(
            f"no text in {self._files[0].path}{more}: every record is empty, or there are none"
        )

    def _counted(self, batches: list[EncodedBatch]) -> dict[str, int]:
        """How many documents each filter has dropped, those of `batches` included."""
        counts = Counter(self._state.num_dropped)
        for batch in batches:
            counts.update(batch.dropped)
        return dict(sorted(counts.items()))

    def _spill_run(self, batches: list[EncodedBatch], *, is_last: bool = False) -> None:
        """Write waiting batches as one run and remember how far reading has come."""
        if not batches:  # only at the end, where everything went into earlier runs
            self._commit(scattered=is_last)
            return
        runs = self._state.runs
        documents = Documents.concatenate([batch.documents for batch in batches])
        if len(documents.lengths):
            first = sum(run.num_documents for run in runs)
            keys = np.arange(first, first + len(documents.lengths), dtype=np.uint64)
            if self._config.shuffle:
                keys = hash_indices(keys, seed=self._config.seed, purpose="document order")
            if self._bands is not None:
                hashes = [batch.bands for batch in batches if batch.bands is not None]
                self._bands.append_run(np.concatenate(hashes), run_order(documents, keys))
            num_before = sum(run.num_tokens for run in runs)
            runs = (*runs, self._spill.append_run(documents, keys, num_before=num_before))
        self._commit(
            runs=runs,
            position_source=batches[-1].end.source,
            position_record=batches[-1].end.record,
            num_empty=self._state.num_empty + sum(batch.num_empty for batch in batches),
            num_dropped=self._counted(batches),
            scattered=is_last,
        )

    # Between them

    def _match(self, bands: Bands) -> None:
        """Find the near duplicates; killed, it begins anew."""
        count = bands.match(
            self._state.runs,
            self._dropped,
            range_bytes=self._plan.range_bytes,
            progress=self._progress,
        )
        counts = {**self._state.num_dropped, "near_duplicates": count}
        self._commit(matched=True, num_dropped=counts)

    # Second pass

    def _merge(self, split: Split) -> None:
        state: SplitState = getattr(self._state, split)
        if state.done:
            return
        writer = SplitWriter(
            self._out / split,
            dtype=self._encoder.dtype,
            shard_tokens=self._config.shard_tokens,
            num_done=len(state.shards),
        )
        ranges = self._spill.sorted_ranges(
            self._state.runs,
            val=split == "val",
            from_key=state.next_key,
            range_bytes=self._plan.range_bytes,
            dropped=self._dropped if self._bands is not None else None,
        )
        total = sum(
            run.num_val_tokens if split == "val" else run.num_tokens - run.num_val_tokens
            for run in self._state.runs
        )
        written = sum(shard.num_tokens for shard in state.shards)
        with ProgressBar(f"writing {split}", total=total, enabled=self._progress) as bar:
            try:
                for documents in ranges:
                    self._write_range(split, writer, documents)
                    written += len(documents.tokens)
                    bar.update(written)
                if not writer.is_empty:
                    self._commit_shard(split, writer, next_key=2**64)
            finally:
                writer.close()
        self._commit(**{split: getattr(self._state, split).model_copy(update={"done": True})})

    def _write_range(self, split: Split, writer: SplitWriter, documents: SortedDocuments) -> None:
        ends = np.cumsum(documents.lengths)
        begin, count = 0, len(ends)
        while begin < count:
            written = int(ends[begin - 1]) if begin else 0
            stop = int(np.searchsorted(ends, written + writer.room(), side="right"))
            if stop == begin and writer.is_empty:
                stop = begin + 1  # longer than a shard: one of its own
            for first, last, tokens in documents.gather(begin, stop):
                writer.append(
                    tokens, documents.lengths[first:last], documents.loss_from[first:last]
                )
            if stop < count:
                self._commit_shard(split, writer, next_key=int(documents.keys[stop]))
            begin = stop

    def _commit_shard(self, split: Split, writer: SplitWriter, *, next_key: int) -> None:
        state: SplitState = getattr(self._state, split)
        shards = (*state.shards, writer.finish_shard())
        self._commit(**{split: state.model_copy(update={"shards": shards, "next_key": next_key})})

    def _manifest(self) -> TokenManifest:
        splits = {}
        for split in self._splits():
            shards: tuple[ShardEntry, ...] = getattr(self._state, split).shards
            splits[split] = SplitEntry(
                num_tokens=sum(shard.num_tokens for shard in shards),
                num_documents=sum(shard.num_documents for shard in shards),
                shards=shards,
            )
        return TokenManifest(
            dtype="uint16" if self._encoder.dtype.itemsize == 2 else "uint32",
            vocab_size=self._encoder.vocab_size,
            eos_id=self._encoder.eos_id,
            bos_id=self._encoder.bos_id,
            pad_id=self._encoder.pad_id,
            num_tokens=sum(split.num_tokens for split in splits.values()),
            num_documents=sum(split.num_documents for split in splits.values()),
            num_empty=self._state.num_empty,
            num_dropped=self._state.num_dropped,
            splits=splits,
            prepared_from=self._state.prepared_from,
        )
