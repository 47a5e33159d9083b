"""A bank described: its sources, its versions, and all of it in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from strata.explicit.bank import records, seals, search, upkeep
from strata.explicit.bank.files import Files
from strata.explicit.bank.store import Store
from strata.explicit.bank.vectors import has_vector_index
from strata.explicit.codec import Codec


@dataclass(frozen=True)
class SourceInfo:
    """One source in a bank.

    Attributes:
        references: rows of it.
        cold: those of them without memories yet.
    """

    source: str
    references: int
    cold: int


@dataclass(frozen=True)
class VersionInfo:
    """One version that can be opened.

    Attributes:
        at_s: when it was committed, seconds since 1970.
        what: what the commit did.
    """

    version: int
    rows: int
    at_s: float
    what: str


@dataclass(frozen=True)
class Stats:
    """A bank in numbers.

    Attributes:
        references, cold: rows, and those without memories.
        sources: distinct ones.
        characters: of all texts; references may overlap.
        memory_bytes: of one memory's codes; None in a bank without a model.
        disk_bytes: of the whole folder, old versions included.
        files: data files of this version.
        unindexed: rows that searches look at one by one.
        vector_index: whether vectors are searched through an index.
    """

    version: int
    references: int
    cold: int
    sources: int
    characters: int
    memory_bytes: int | None
    disk_bytes: int
    files: int
    unindexed: int
    vector_index: bool


def sources(store: Store) -> list[SourceInfo]:
    """All sources, by name."""
    counts: dict[str, list[int]] = {}
    for batch in store.scan(["source", "checksum"], rows_at_once=8192):
        pairs = zip(batch["source"].to_pylist(), batch["checksum"].to_pylist(), strict=True)
        for source, check in pairs:
            count = counts.setdefault(source, [0, 0])
            count[0] += 1
            count[1] += records.is_cold(check)
    return [SourceInfo(source, *counts[source]) for source in sorted(counts)]


def versions(files: Files) -> list[VersionInfo]:
    """Versions that can be opened, oldest first."""
    found = [seals.read(files, version) for version in seals.versions(files)]
    return [VersionInfo(seal.version, seal.rows, seal.at_s, seal.what) for seal in found]


def stats(store: Store, codec: Codec | None) -> Stats:
    """A version in numbers; reads texts and sources once."""
    known = sources(store)
    characters = sum(
        len(text)
        for batch in store.scan(["text"], rows_at_once=8192)
        for text in batch["text"].to_pylist()
    )
    return Stats(
        version=store.version,
        references=store.seal.rows,
        cold=sum(source.cold for source in known),
        sources=len(known),
        characters=characters,
        memory_bytes=None if codec is None else codec.bytes_per_memory,
        disk_bytes=upkeep.total_bytes(store.files, ""),
        files=len(store.dataset.get_fragments()),
        unindexed=search.unindexed_rows(store),
        vector_index=has_vector_index(store),
    )
