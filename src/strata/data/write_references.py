"""Folders of references whose chunks are known: no search, written in one go."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from strata.data.dataset import TokenDataset
from strata.data.manifest import (
    MANIFEST_NAME,
    FileEntry,
    read_manifest,
    write_json,
)
from strata.data.references import (
    NONE,
    Origin,
    PartEntry,
    ReferencesConfig,
    ReferencesManifest,
    data_identity,
    named,
    read_references,
    refuse_other_origin,
)
from strata.data.shards import NpyWriter
from strata.errors import DataError
from strata.files import replacing, sha256_of, storage_errors, sync


class Reference(Protocol):
    """A reference, wherever it comes from."""

    @property
    def id(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def source(self) -> str: ...


OwnReferences = Sequence["Reference | None"]  # of a document's chunks, in order


def write_references(
    tokens: Path,
    *,
    out: Path,
    own: Mapping[str, Iterable[OwnReferences]],
    origin: dict[str, str],
    config: ReferencesConfig,
) -> ReferencesManifest:
    """Write the references of a prepared folder's chunks, given document by document.

    A finished folder of the same origin is left as it is; an unfinished one is written anew.

    Args:
        tokens: a folder made by `strata data prepare`, in the order of `own`.
        out: the folder to make.
        own: by split, for each of its documents the reference of each chunk, or None; equal ids
            mean equal references.
        origin: says what the references come from; another origin is refused.
        config: `chunk_tokens` and `part_chunks` count, nothing is searched or left out.

    Raises:
        DataError: the tokens or an existing `out` cannot be used, or `own` has other documents or
            chunks than the tokens.
        StorageError: the disk is full or `out` cannot be written.
    """
    tokens, out = Path(tokens), Path(out)
    made_from = Origin(data=data_identity(read_manifest(tokens)), searched=origin, config=config)
    if set(own) != set(made_from.data):
        raise DataError(
            f"references for {', '.join(sorted(own))} given, {tokens} has "
            f"{', '.join(sorted(made_from.data))}: give those"
        )
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if (out / MANIFEST_NAME).exists():
            there = read_references(out)
            refuse_other_origin(out, there.origin, made_from)
            return there
        splits = {
            name: tuple(_write_split(tokens, out, name, iter(documents), config))
            for name, documents in own.items()
        }
        manifest = ReferencesManifest(origin=made_from, splits=splits)
        write_json(out / MANIFEST_NAME, manifest)
        return manifest


def _write_split(
    tokens: Path, out: Path, name: str, documents: Iterator[OwnReferences], config: ReferencesConfig
) -> Iterator[PartEntry]:
    lengths = TokenDataset.open(tokens, split=name).document_lengths().astype(np.int64)
    counts = -(-lengths // config.chunk_tokens)
    (out / name).mkdir(exist_ok=True)
    begin = 0
    for number, end in enumerate(part_ends(counts, config.part_chunks)):
        part = list(islice(documents, end - begin))
        given = [len(chunks) for chunks in part]
        if given != counts[begin:end].tolist():
            raise DataError(
                f"the references given for {name} are not those of {tokens}: {sum(given)} chunks "
                f"of {len(given)} documents, there {int(counts[begin:end].sum())} of {end - begin}"
            )
        numbers: dict[str, int] = {}
        found: list[Reference] = []
        chosen = []
        for own in (one for chunks in part for one in chunks):
            if own is None:
                chosen.append(NONE)
                continue
            chosen.append(numbers.setdefault(own.id, len(found)))
            if chosen[-1] == len(found):
                found.append(own)
        base = out / name / f"{number:05d}"
        yield write_part(base, chosen, found, num_documents=end - begin, num_leaks=0)
        begin = end
    if next(documents, None) is not None:
        raise DataError(f"references for more documents of {name} given than {tokens} has")


def part_ends(chunk_counts: np.ndarray, part_chunks: int) -> Iterator[int]:
    """Cut documents into parts of at most `part_chunks` chunks, or one longer document.

    Args:
        chunk_counts: (n,) of each document.

    Yields:
        The number of documents up to each part's end.
    """
    ends = np.cumsum(chunk_counts)
    first = 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        first = max(first + 1, int(np.searchsorted(ends, before + part_chunks, side="right")))
        yield first


def write_part(
    base: Path,
    chosen: Sequence[int],
    found: Sequence[Reference],
    *,
    num_documents: int,
    num_leaks: int,
) -> PartEntry:
    """Write the files of one part.

    Args:
        base: folder and number of the part.
        chosen: for each chunk, which of `found`, or -1.
        found: the references, each once.
        num_documents: that the chunks are of.
        num_leaks: how many references were left out.
    """
    chunks = _write_array(base, "chunks", np.array(chosen, np.int32))
    lines, references = _write_lines(base, found)
    sync(base.parent)
    return PartEntry(
        num_documents=num_documents,
        num_chunks=len(chosen),
        num_found=sum(choice != NONE for choice in chosen),
        num_leaks=num_leaks,
        num_references=len(found),
        chunks=chunks,
        lines=lines,
        references=references,
    )


def _write_array(base: Path, kind: str, values: np.ndarray) -> FileEntry:
    writer = NpyWriter(named(base, f"{kind}.npy"), values.dtype)
    writer.append(values)
    return writer.finish()


def _write_lines(base: Path, found: Sequence[Reference]) -> tuple[FileEntry, FileEntry]:
    path = named(base, "references.jsonl")
    starts = [0]
    with replacing(path) as file:
        for one in found:
            row = {"id": one.id, "source": one.source, "text": one.text}
            starts.append(starts[-1] + file.write(json.dumps(row).encode() + b"\n"))
    entry = FileEntry(num_bytes=path.stat().st_size, sha256=sha256_of(path))
    return _write_array(base, "lines", np.array(starts, np.int64)), entry
