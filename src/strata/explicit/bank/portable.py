"""A bank as a folder of plain files: parquet, JSON, safetensors, and the sha256 of each."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from strata.errors import BankError
from strata.explicit.bank import records, seals, search
from strata.explicit.bank.files import LocalFiles
from strata.explicit.bank.settings import (
    CODEC,
    SETTINGS,
    BankSettings,
    parse_sealed,
    read_settings,
    write_sealed,
)
from strata.explicit.bank.store import Store
from strata.explicit.memories import Reference
from strata.files import sync

FORMAT: Final = "strata-bank-export"
RECORDS = "records.parquet"
LISTING = "export.json"

_GROUP_BYTES = 32 * 2**20
_MAX_LISTING_BYTES = 2**20


def export(store: Store, out: Path) -> int:
    """Write a version of a bank to a new folder; it has that name only once it is whole.

    Returns:
        Records written.
    """
    import pyarrow.parquet as pq

    if out.exists():
        raise BankError(f"{out} exists: give the name of a new folder")
    temporary = out.with_name(out.name + ".partial")
    if temporary.exists():
        shutil.rmtree(temporary)
    try:
        temporary.mkdir(parents=True)
        names = [SETTINGS, RECORDS]
        made = LocalFiles(temporary)
        made.put(SETTINGS, store.files.read(SETTINGS))
        if store.files.sizes([CODEC]):
            made.put(CODEC, store.files.read(CODEC))
            names.append(CODEC)
        count = 0
        with pq.ParquetWriter(temporary / RECORDS, store.columns, compression="zstd") as writer:
            for table in _groups(store):
                for row in table.to_pylist():
                    records.checked_record(row)
                writer.write_table(table)
                count += len(table)
        made.settle(names)
        entries = seals.seal_files(made, names)
        sealed = {name: [e.num_bytes, e.sha256] for name, e in zip(names, entries, strict=True)}
        listing = {"format": FORMAT, "format_version": 1, "records": count, "files": sealed}
        write_sealed(temporary / LISTING, listing)
        os.replace(temporary, out)
        sync(out.parent)
    except OSError as error:
        raise BankError(f"{out} cannot be written: {error.strerror or error}") from None
    return count


def check_export(source: Path) -> BankSettings:
    """Check an export, every byte of it, and read its settings.

    Raises:
        BankError: it is not an export, or damaged.
    """
    path = source / LISTING
    try:
        if path.stat().st_size > _MAX_LISTING_BYTES:
            raise BankError(f"{path} is larger than {_MAX_LISTING_BYTES // 2**20} MiB")
        listing = parse_sealed(path, path.read_bytes())
    except OSError as error:
        raise BankError(f"{source} is not an exported bank: {error.strerror}") from None
    if listing.get("format") != FORMAT or listing.get("format_version") != 1:
        raise BankError(f"{path} is {listing.get('format')!r}, not {FORMAT} version 1")
    files = listing.get("files")
    if not isinstance(files, dict) or not {SETTINGS, RECORDS} <= files.keys() <= {
        SETTINGS, RECORDS, CODEC,
    }:  # fmt: skip
        raise BankError(f"{path} lists other files than an export has")
    for name, (num_bytes, sha256) in files.items():
        entry = seals.SealedFile(num_bytes, sha256, 0, "")
        seals.check_files(LocalFiles(source), {name: entry})
    return read_settings(LocalFiles(source))


def read_into(store: Store, source: Path, given: BankSettings) -> None:
    """Put the content of a checked export into an empty bank.

    Raises:
        BankError: the records do not fit the settings, or one is not what was written.
    """
    if given.codec_sha256 is not None:
        store.files.put(CODEC, (source / CODEC).read_bytes())
    fragments: list[Any] = []
    for table in _tables(source, store.columns):
        fragments += store.write(table)
    store.commit(fragments, None, f"import {source.name}")
    search.keep_indexed(store, index_rows=search.INDEX_ROWS)


def _tables(source: Path, columns: pa.Schema) -> Iterator[pa.Table]:
    """The records of a checked export, in bounded tables; what is derived is derived again."""
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source / RECORDS) as file:
            if file.schema_arrow.names != columns.names:
                raise BankError(f"{source / RECORDS} has other columns than its bank.json says")
            for batch in file.iter_batches(batch_size=256):
                rows = [_checked(row) for row in batch.to_pylist()]
                yield records.table_of(rows, columns)
    except pa.ArrowException as error:
        raise BankError(f"{source / RECORDS} cannot be read: {error}") from None


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    records.checked_record(row)
    metadata = json.loads(row["metadata"])
    reference = Reference(row["text"], row["source"], row["start"], row["end"], metadata)
    if records.record_id(reference) != row["id"]:
        raise records.damaged(row)
    return {
        **row,
        "source_id": records.source_digest(row["source"]),
        "tags": records.tags(metadata),
    }


def _groups(store: Store) -> Iterator[pa.Table]:
    """All rows, some 32 MiB at a time."""
    batches: list[pa.RecordBatch] = []
    size = 0
    for batch in store.scan(store.columns.names, rows_at_once=64):
        batches.append(batch)
        size += batch.nbytes
        if size >= _GROUP_BYTES:
            yield pa.Table.from_batches(batches, store.columns)
            batches, size = [], 0
    if batches:
        yield pa.Table.from_batches(batches, store.columns)
