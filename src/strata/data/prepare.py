"""Sources to shuffled, tokenised shards, in bounded memory and at the mercy of no interruption.

Two passes. *Scatter* reads the sources in order, filters and encodes them and spills runs of
documents sorted by a hash of (seed, document number). *Merge* walks the hashes from below and
writes the shards, without the near duplicates that were found in between. After each run and each
shard a small state file is replaced; a killed process goes on from there. The order of the
documents depends on the hashes alone, so the bytes of the result depend on the sources, the
tokenizer and the configuration, never on memory, workers, batches or interruptions.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from strata.config import FrozenConfig
from strata.data.convert_tokenizer import tokenizer_folder
from strata.data.encode import TextEncoder
from strata.data.filters import FilterConfig
from strata.data.inputs import InputOptions, check_columns, find_inputs
from strata.data.manifest import (
    MANIFEST_NAME,
    PreparedFrom,
    TokenManifest,
    read_manifest,
    refuse_other_origin,
    write_json,
)
from strata.data.memory import MemoryPlan, plan_memory
from strata.data.near_duplicates import BandHasher, near_duplicates
from strata.data.open_tokenizer import load_encoder
from strata.data.passes import Passes
from strata.data.readers import MAX_DOCUMENT_BYTES, ReadOptions
from strata.data.state import WORK_NAME, recorded_origin
from strata.data.workers import open_encoding
from strata.errors import DataError
from strata.files import storage_errors

__all__ = ["MemoryPlan", "PrepareConfig", "plan_memory", "prepare", "storage_errors"]

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


class PrepareConfig(FrozenConfig):
    """How documents become shards.

    Attributes:
        memory_gb: how much memory the process and its workers may use, in 1e9 bytes, the 0.4 GB
            of the libraries included; it does not change the result. At least 0.13 GB are used
            beside those.
        workers: processes that filter and encode, of about 0.1 GB each; 0 does it in this one, on
            the tokenizer's own threads. They do not change the result either.
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
        prepend_bos: begin every document with the tokenizer's begin-of-text token; None does so
            where the tokenizer itself begins a text with it, as prompts then begin.
        parse_special_tokens: let "<eos>" in a text become that token; else it stays text.
        config: the configuration of data sets whose SOURCE names none.
        split: what is read of data sets among the sources.
        val_split: what is read of data sets among the sources of val.
        streaming: read files of the hub range by range, instead of fetching them whole.
        filters: which documents are left out.
        near_duplicates: leave out documents of which an earlier one is nearly a copy, from this
            share of common runs of five words on; None leaves them.
    """

    memory_gb: Annotated[float, Field(ge=0.4, allow_inf_nan=False)] = 8.0
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    seed: int = 42
    shuffle: bool = True
    text_field: Annotated[str, Field(min_length=1)] = "text"
    txt_documents: Literal["file", "paragraph"] = "file"
    val_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    shard_tokens: Annotated[int, Field(ge=1)] = 2**27
    append_eos: bool = True
    prepend_bos: bool | None = None
    parse_special_tokens: bool = False
    config: str | None = None
    split: Annotated[str, Field(min_length=1)] = "train"
    val_split: Annotated[str, Field(min_length=1)] = "validation"
    streaming: bool = False
    filters: FilterConfig = Field(default_factory=FilterConfig)
    near_duplicates: Annotated[float | None, Field(ge=0.1, le=1.0)] = None

    def read_options(self, max_document_bytes: int = MAX_DOCUMENT_BYTES) -> ReadOptions:
        """How records become documents."""
        return ReadOptions(self.text_field, self.txt_documents, max_document_bytes)


# What does not change the result, or stands in a manifest in another form.
_NOT_RECORDED = {
    *("memory_gb", "workers", "streaming", "prepend_bos", "near_duplicates"),
    *("config", "split", "val_split"),
}


def prepare(
    sources: Sequence[str | Path],
    *,
    out: Path,
    tokenizer: Path,
    config: PrepareConfig,
    val_sources: Sequence[str | Path] = (),
    progress: bool = False,
) -> TokenManifest:
    """Tokenise, shuffle and shard documents into a folder that `TokenDataset.open` reads.

    A call that was interrupted goes on where it was, by the same call; a finished folder is left
    as it is. Besides `out` itself it needs, until it is done, as much disk again.

    Args:
        sources: files or folders of parquet, jsonl, jsonl.gz, jsonl.zst and txt; data sets of the
            hub as `owner/name[:config][@revision]` or by an alias; folders that mirror one.
        out: the folder to make.
        tokenizer: a folder with a tokenizer.json, or a tiktoken or sentencepiece file.
        config: how.
        val_sources: sources of which every document goes to `val`, whatever `val_fraction` says.
        progress: show a progress bar on stderr.

    Returns:
        The manifest of the finished folder.

    Raises:
        DataError: a source, the tokenizer or an existing `out` cannot be used.
        ConfigError: an option is for data sets, and no source is one.
        HubError: a data set cannot be had from the hub; what was done so far is kept.
        WorkerError: a worker ended by itself; what was done so far is kept.
        StorageError: the disk is full or `out` cannot be written; what was done so far is kept.
    """
    out = Path(out)
    options = InputOptions(config.config, config.split, config.val_split, config.streaming)
    inputs = find_inputs(sources, val_sources, options=options, recorded=recorded_origin(out))
    _refuse_out_inside(inputs.folders, out)
    with tokenizer_folder(Path(tokenizer)) as folder:
        encoder = _open_encoder(folder, config)
        entries = tuple(file.entry for file in inputs.files)
        prepared_from = PreparedFrom(
            sources=entries[: inputs.num_train],
            val_sources=entries[inputs.num_train :],
            datasets=inputs.datasets,
            tokenizer_sha256=encoder.sha256,
            prepend_bos=bool(encoder.prefix),
            near_duplicates=encoder.hasher.settings if encoder.hasher else None,
            **{
                name: getattr(config, name)
                for name in type(config).model_fields.keys() - _NOT_RECORDED
            },
        )
        with storage_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            if (out / MANIFEST_NAME).exists():
                manifest = read_manifest(out)
                refuse_other_origin(out, manifest.prepared_from, prepared_from)
                shutil.rmtree(out / WORK_NAME, ignore_errors=True)
                return manifest
            check_columns(inputs, options=config.read_options())
            with (
                _locked_work_folder(out) as work,
                open_encoding(encoder, config.workers) as encoding,
            ):
                plan = plan_memory(
                    config.memory_gb, workers=config.workers, workers_bytes=encoding.held_bytes
                )
                passes = Passes(
                    work,
                    out=out,
                    inputs=inputs,
                    encoder=encoder,
                    encoding=encoding,
                    config=config,
                    plan=plan,
                    prepared_from=prepared_from,
                    progress=progress,
                )
                manifest = passes.run()
                _copy_tokenizer(folder, out / "tokenizer")
                write_json(out / MANIFEST_NAME, manifest)
                shutil.rmtree(work)
                return manifest


def _open_encoder(folder: Path, config: PrepareConfig) -> TextEncoder:
    encoder = load_encoder(
        folder,
        append_eos=config.append_eos,
        prepend_bos=config.prepend_bos,
        parse_special_tokens=config.parse_special_tokens,
        val_fraction=config.val_fraction,
        seed=config.seed,
    )
    if config.near_duplicates is None:
        return replace(encoder, filters=config.filters)
    hasher = BandHasher(near_duplicates(config.near_duplicates))
    return replace(encoder, filters=config.filters, hasher=hasher)


def _refuse_out_inside(sources: Sequence[Path], out: Path) -> None:
    for source in sources:
        if source.resolve() in (out.resolve(), *out.resolve().parents):
            raise DataError(f"{out} lies inside the source {source}: give an --out outside of it")


@contextmanager
def _locked_work_folder(out: Path) -> Iterator[Path]:
    """The folder of the work in progress, held by this process alone."""
    work = out / WORK_NAME
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
