"""Sources to shuffled, tokenised shards, in bounded memory and at the mercy of no interruption.

Two passes. *Scatter* reads the sources in order, encodes them and spills runs of documents sorted
by a hash of (seed, document number). *Merge* walks the hashes from below and writes the shards.
After each run and each shard a small state file is replaced; a killed process goes on from there.
The order of the documents depends on the hashes alone, so the bytes of the result depend on the
sources, the tokenizer and the configuration, never on memory, batches or interruptions.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError

from strata.config import FrozenConfig
from strata.data.encode import (
    EncodedBatch,
    Position,
    TextEncoder,
    encode_batches,
    load_encoder,
    read_batches,
)
from strata.data.manifest import (
    MANIFEST_NAME,
    PreparedFrom,
    ShardEntry,
    SplitEntry,
    TokenManifest,
    read_manifest,
    write_json,
)
from strata.data.order import hash_indices
from strata.data.progress import ProgressBar
from strata.data.readers import MAX_DOCUMENT_BYTES, ReadOptions
from strata.data.shards import SplitWriter
from strata.data.sources import Source, find_sources
from strata.data.spill import Documents, RunEntry, SortedDocuments, Spill
from strata.errors import DataError, StorageError

_WORK_NAME = ".prepare"
_LEAST_FREE_BYTES = 128_000_000
_SPILL_EVERY_S = 15.0  # what a killed process repeats at the most
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)

Split = Literal["train", "val"]


class PrepareConfig(FrozenConfig):
    """How documents become shards.

    Attributes:
        memory_gb: how much memory the process may use, in 1e9 bytes, the 0.4 GB of the libraries
            included; it does not change the result. At least 0.13 GB are used beside those.
        seed: of the shuffle and of the validation split.
        shuffle: put all documents of all sources in one random order; else keep theirs.
        text_field: the field or column that holds a text; rows without it may hold `prompt` and
            `completion`, whose prompt carries no loss.
        txt_documents: a txt file is one document (`file`), or every block of lines between blank
            lines is one (`paragraph`).
        val_fraction: the share of documents kept for the `val` split. A document is chosen by a
            hash of its content, so equal documents are never on both sides.
        shard_tokens: the most tokens of a shard, but for a single longer document.
        append_eos: end every document with the tokenizer's end-of-text token.
        prepend_bos: begin every document with its begin-of-text token.
        parse_special_tokens: let "<eos>" in a text become that token; else it stays text.
    """

    memory_gb: Annotated[float, Field(ge=0.4, allow_inf_nan=False)] = 8.0
    seed: int = 42
    shuffle: bool = True
    text_field: Annotated[str, Field(min_length=1)] = "text"
    txt_documents: Literal["file", "paragraph"] = "file"
    val_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    shard_tokens: Annotated[int, Field(ge=1)] = 2**27
    append_eos: bool = True
    prepend_bos: bool = False
    parse_special_tokens: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """How `memory_gb` is shared out.

    Attributes:
        batch_bytes: text encoded in one go; two batches are in flight.
        max_document_bytes: the longest document that can be encoded within the memory.
        run_bytes: tokens sorted in memory before they are spilled.
        range_bytes: tokens merged in memory.
    """

    batch_bytes: int
    max_document_bytes: int
    run_bytes: int
    range_bytes: int


def plan_memory(memory_gb: float) -> MemoryPlan:
    """Share out what `memory_gb` leaves beside the interpreter and its libraries.

    Encoding takes 60 times the bytes of a batch and up to 110 times those of one long document;
    a run is held twice while it is sorted. Runs stay below 128 MB however much memory there is;
    longer ones would not make the merge faster.
    """
    free_bytes = max(_LEAST_FREE_BYTES, int(memory_gb * 1e9) - _used_bytes())
    return MemoryPlan(
        batch_bytes=min(2**21, free_bytes // 256),
        max_document_bytes=min(MAX_DOCUMENT_BYTES, max(2**20, free_bytes // 128)),
        run_bytes=min(2**27, free_bytes // 8),
        range_bytes=min(2**31, free_bytes // 4),
    )


def _used_bytes() -> int:
    """The most memory that this process has held so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class _SplitState(FrozenConfig):
    """How far the merge of one split has come: whole shards, and the key that follows them."""

    shards: tuple[ShardEntry, ...] = ()
    next_key: int = 0
    done: bool = False


class _State(FrozenConfig):
    """Everything a new process needs to go on."""

    prepared_from: PreparedFrom
    position_source: int = 0
    position_record: int = 0
    num_empty: int = 0
    runs: tuple[RunEntry, ...] = ()
    scattered: bool = False
    train: _SplitState = _SplitState()
    val: _SplitState = _SplitState()


def prepare(
    sources: Sequence[Path],
    *,
    out: Path,
    tokenizer: Path,
    config: PrepareConfig,
    progress: bool = False,
) -> TokenManifest:
    """Tokenise, shuffle and shard documents into a folder that `TokenDataset.open` reads.

    A call that was interrupted goes on where it was, by the same call; a finished folder is left
    as it is. Besides `out` itself it needs, until it is done, as much disk again.

    Args:
        sources: files or folders of parquet, jsonl, jsonl.gz, jsonl.zst and txt.
        out: the folder to make.
        tokenizer: a folder with a tokenizer.json.
        config: how.
        progress: show a progress bar on stderr.

    Returns:
        The manifest of the finished folder.

    Raises:
        DataError: a source, the tokenizer or an existing `out` cannot be used.
        StorageError: the disk is full or `out` cannot be written; what was done so far is kept.
    """
    out, tokenizer = Path(out), Path(tokenizer)
    files = find_sources([Path(source) for source in sources])
    _refuse_out_inside(sources, out)
    encoder = load_encoder(
        tokenizer,
        append_eos=config.append_eos,
        prepend_bos=config.prepend_bos,
        parse_special_tokens=config.parse_special_tokens,
        val_fraction=config.val_fraction,
        seed=config.seed,
    )
    prepared_from = PreparedFrom(
        sources=tuple(file.entry for file in files),
        tokenizer_sha256=encoder.sha256,
        **config.model_dump(exclude={"memory_gb"}),
    )
    with _storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if (out / MANIFEST_NAME).exists():
            manifest = read_manifest(out)
            _refuse_other(out, manifest.prepared_from, prepared_from)
            shutil.rmtree(out / _WORK_NAME, ignore_errors=True)
            return manifest
        with _locked_work_folder(out) as work:
            return _Preparation(work, out, files, encoder, config, prepared_from, progress).run(
                tokenizer
            )


class _Preparation:
    """One run of `prepare` on a locked folder."""

    def __init__(
        self,
        work: Path,
        out: Path,
        files: list[Source],
        encoder: TextEncoder,
        config: PrepareConfig,
        prepared_from: PreparedFrom,
        progress: bool,
    ) -> None:
        self._work = work
        self._out = out
        self._files = files
        self._encoder = encoder
        self._config = config
        self._plan = plan_memory(config.memory_gb)
        self._progress = progress
        self._spill = Spill(work, dtype=encoder.dtype)
        self._state = _load_state(work / "state.json", out, prepared_from)

    def run(self, tokenizer: Path) -> TokenManifest:
        """Do whatever is left to do."""
        if not self._state.scattered:
            self._spill.cut_to(self._state.runs)
            self._scatter()
        for split in self._splits():
            self._merge(split)
        manifest = self._manifest()
        _copy_tokenizer(tokenizer, self._out / "tokenizer")
        write_json(self._out / MANIFEST_NAME, manifest)
        shutil.rmtree(self._work)
        return manifest

    def _splits(self) -> list[Split]:
        return ["train", "val"] if self._config.val_fraction > 0 else ["train"]

    def _commit(self, **changes: object) -> None:
        self._state = self._state.model_copy(update=changes)
        write_json(self._work / "state.json", self._state)

    # First pass

    def _scatter(self) -> None:
        options = ReadOptions(
            text_field=self._config.text_field,
            txt_documents=self._config.txt_documents,
            max_document_bytes=self._plan.max_document_bytes,
        )
        batches = read_batches(
            self._files,
            options=options,
            start=Position(self._state.position_source, self._state.position_record),
            batch_bytes=self._plan.batch_bytes,
        )
        total_bytes = sum(file.entry.num_bytes for file in self._files)
        num_tokens = sum(run.num_tokens for run in self._state.runs)
        waiting: list[EncodedBatch] = []
        waiting_bytes, spilled_s = 0, time.monotonic()
        with ProgressBar("tokenising", total=total_bytes, enabled=self._progress) as bar:
            for batch in encode_batches(self._encoder, batches):
                waiting.append(batch)
                num_tokens += len(batch.documents.tokens)
                waiting_bytes += batch.documents.tokens.nbytes + 48 * len(batch.documents.lengths)
                is_due = time.monotonic() - spilled_s >= _SPILL_EVERY_S
                if is_due or waiting_bytes >= self._plan.run_bytes:
                    self._spill_run(waiting)
                    waiting, waiting_bytes, spilled_s = [], 0, time.monotonic()
                bar.update(batch.bytes_read, note=f"{num_tokens / 1e6:.1f}M tokens")
        if not self._state.runs and not any(len(batch.documents.lengths) for batch in waiting):
            raise DataError(
                f"no text in {self._files[0].path}"
                + (f" and {len(self._files) - 1} more" if len(self._files) > 1 else "")
                + ": every record is empty, or there are none"
            )
        self._spill_run(waiting, is_last=True)

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
            num_before = sum(run.num_tokens for run in runs)
            runs = (*runs, self._spill.append_run(documents, keys, num_before=num_before))
        self._commit(
            runs=runs,
            position_source=batches[-1].end.source,
            position_record=batches[-1].end.record,
            num_empty=self._state.num_empty + sum(batch.num_empty for batch in batches),
            scattered=is_last,
        )

    # Second pass

    def _merge(self, split: Split) -> None:
        state: _SplitState = getattr(self._state, split)
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
        state: _SplitState = getattr(self._state, split)
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
            splits=splits,
            prepared_from=self._state.prepared_from,
        )


def _load_state(path: Path, out: Path, prepared_from: PreparedFrom) -> _State:
    if not path.exists():
        return _State(prepared_from=prepared_from)
    try:
        state = _State.model_validate_json(path.read_bytes())
    except ValidationError:
        raise DataError(f"{path} is damaged or of another version: delete {out}") from None
    _refuse_other(out, state.prepared_from, prepared_from)
    return state


def _refuse_other(out: Path, there: PreparedFrom, given: PreparedFrom) -> None:
    """Refuse to touch a folder that was made from other arguments or sources."""
    differing = []
    for name in PreparedFrom.model_fields:
        old, new = getattr(there, name), getattr(given, name)
        if old != new:
            if name == "sources":
                differing.append("the sources are others or have changed")
            elif name == "tokenizer_sha256":
                differing.append("the tokenizer is another")
            else:
                differing.append(f"{name} was {old!r}, now {new!r}")
    if differing:
        raise DataError(
            f"{out} was prepared with other arguments ({'; '.join(differing)}): "
            "give another --out or delete it"
        )


def _refuse_out_inside(sources: Sequence[Path], out: Path) -> None:
    for source in sources:
        if Path(source).resolve() in (out.resolve(), *out.resolve().parents):
            raise DataError(f"{out} lies inside the source {source}: give an --out outside of it")


@contextmanager
def _locked_work_folder(out: Path) -> Iterator[Path]:
    """The folder of the work in progress, held by this process alone."""
    work = out / _WORK_NAME
    if not work.is_dir():
        if any(out.iterdir()):
            raise DataError(f"{out} exists and holds other files: give an empty or new --out")
        work.mkdir()
    descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DataError(f"another process is preparing {out}: wait for it or stop it") from None
    try:
        yield work
    finally:
        os.close(descriptor)


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@contextmanager
def _storage_errors(out: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into one line; readers turn their own errors before."""
    try:
        yield
    except OSError as error:
        where = error.filename or out
        if error.errno == errno.ENOSPC:
            raise StorageError(
                f"disk full while writing {where}: free some space and run the same command "
                "again, what was done so far is kept"
            ) from None
        raise StorageError(f"cannot write {where}: {error.strerror}") from None
