"""Compaction: few large files instead of many small ones, and old versions given up."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from strata.explicit.bank import seals, search
from strata.explicit.bank.files import Files
from strata.explicit.bank.settings import DATASET
from strata.explicit.bank.store import Store

_BATCH_BYTES = 8 * 2**20
_ROWS_PER_FILE = 2**20
_FILE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class CompactReport:
    """What a compaction did.

    Attributes:
        files_before, files_after: data files of the newest version.
        bytes_before, bytes_after: of the dataset's folder, old versions included.
        versions_removed: old versions that can no longer be opened.
    """

    files_before: int
    files_after: int
    bytes_before: int
    bytes_after: int
    versions_removed: int


def compact(
    store: Store, *, keep_s: float, index_rows: int, bytes_per_row: int, purge: bool
) -> CompactReport:
    """Merge files, index everything, drop old versions; the writer's lock is held.

    Seals of old versions go before their files, so that no reader opens a version half there.
    """
    before, bytes_before = len(store.dataset.get_fragments()), total_bytes(store.files, DATASET)
    options: dict[str, Any] = {
        "target_rows_per_fragment": _ROWS_PER_FILE,
        "max_bytes_per_file": _FILE_BYTES,
        # Lance reads so many rows at a time, a few batches ahead: its default is 8192, whatever
        # their size.
        "batch_size": max(1, min(8192, _BATCH_BYTES // max(1, bytes_per_row))),
        "num_threads": 1,
        "materialize_deletions_threshold": 0.0 if purge else 0.1,
    }
    store.change(lambda dataset: dataset.optimize.compact_files(**options), "compact")
    search.keep_indexed(store, index_rows=index_rows, all_rows=True)

    now = time.time()
    old = [
        version
        for version in seals.versions(store.files)
        if version != store.version and now - _superseded_at_s(store, version) >= keep_s
    ]
    for version in old:
        seals.remove(store.files, version)
    kept = set(seals.versions(store.files))

    def clean(dataset: Any) -> None:
        unsealed = [v["version"] for v in dataset.versions() if v["version"] not in kept]
        if unsealed:
            dataset.cleanup_old_versions(versions=unsealed, delete_unverified=True)

    store.change(clean, "clean")
    remove_strays(store)
    return CompactReport(
        files_before=before,
        files_after=len(store.dataset.get_fragments()),
        bytes_before=bytes_before,
        bytes_after=total_bytes(store.files, DATASET),
        versions_removed=len(old),
    )


def remove_strays(store: Store) -> None:
    """Delete data files that no sealed version has: those of writers that were killed."""
    known: set[str] = set()
    for version in seals.versions(store.files):
        known |= seals.read(store.files, version).files.keys()
    for kind in ("data", "_deletions", "_indices"):
        for name in store.files.names(f"{DATASET}/{kind}"):
            if name.removeprefix(f"{DATASET}/") not in known:
                store.files.delete(name)


def total_bytes(files: Files, below: str) -> int:
    """Bytes of all files below a name; "" for the whole bank."""
    return sum(files.sizes(files.names(below)).values())


def _superseded_at_s(store: Store, version: int) -> float:
    """When the next version came: until then, this one was what readers opened."""
    later = [v for v in seals.versions(store.files) if v > version]
    return seals.read(store.files, later[0]).at_s if later else float("inf")
