"""Which files make up a version of the dataset, so that a damaged one is refused before it is read.

Lance writes no checksums. A flipped byte in a manifest or a deletion file can bring back rows that
were removed, or hand its decoders sizes that were never written. So after each commit a seal lists
the version's files with size and sha256; a version exists for readers once its seal does. All
files but the seals are written once and never changed.

Opening checks every size, the whole of manifests and deletion files, and of data files the end,
where Lance keeps what says how to read the rest. Index files are hashed before the first search.
The rest of the data files is covered by the checksums of the rows; `verify` hashes all of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from strata.errors import BankError
from strata.explicit.bank.files import Files
from strata.explicit.bank.settings import DATASET, SEALS, parse_sealed, sealed

_MAX_SEAL_BYTES = 512 * 2**20
_FOOTER_BYTES = 40
_MARGIN_BYTES = 64 * 2**10


@dataclass(frozen=True)
class SealedFile:
    """One file: its size, the sha256 of all of it, and of its last `tail_bytes`."""

    num_bytes: int
    sha256: str
    tail_bytes: int
    tail_sha256: str

    def as_list(self) -> list[int | str]:
        """What `SealedFile(*...)` makes again."""
        return [self.num_bytes, self.sha256, self.tail_bytes, self.tail_sha256]

    def __post_init__(self) -> None:
        if not 0 <= self.tail_bytes <= self.num_bytes:
            raise TypeError("a tail longer than its file")


@dataclass(frozen=True)
class Seal:
    """One version.

    Attributes:
        version: Lance's number of it.
        rows: in this version.
        at_s: when it was committed, seconds since 1970.
        what: what the commit did, for people.
        files: path below the dataset -> file.
    """

    version: int
    rows: int
    at_s: float
    what: str
    files: dict[str, SealedFile] = field(repr=False)


def versions(files: Files) -> list[int]:
    """Versions that have a seal, ascending."""
    names = files.names(SEALS)
    if not names:
        raise BankError(f"bank {files} is damaged: {SEALS} is missing")
    stems = [name[len(SEALS) + 1 : -5] for name in names if name.endswith(".json")]
    return sorted(int(stem) for stem in stems if stem.isdigit() and len(stem) <= 20)


def read(files: Files, version: int) -> Seal:
    """The seal of a version.

    Raises:
        BankError: there is none, or it is damaged.
    """
    name = _name(version)
    path = files.where(name)
    try:
        if files.sizes([name]).get(name, 0) > _MAX_SEAL_BYTES:
            raise BankError(f"{path} is larger than {_MAX_SEAL_BYTES // 2**20} MiB: not a seal")
        tree = parse_sealed(path, files.read(name))
    except FileNotFoundError:
        raise BankError(
            f"bank {files} has no version {version}: it has {_listed(versions(files))}"
        ) from None
    except OSError as error:
        raise BankError(f"{path} cannot be read: {error.strerror}") from None
    try:
        seal = Seal(
            version=tree["version"],
            rows=tree["rows"],
            at_s=tree["at_s"],
            what=tree["what"],
            files={name: SealedFile(*entry) for name, entry in tree["files"].items()},
        )
    except (KeyError, TypeError, AttributeError):
        raise BankError(f"{path} is not a seal of this version of strata") from None
    if seal.version != version or any(name.startswith("/") or ".." in name for name in seal.files):
        raise BankError(f"{path} is the seal of another version or bank")
    return seal


def hashed(files: Files, names: Sequence[str]) -> dict[str, SealedFile]:
    """Hash files of the dataset, after making sure that they are safe."""
    paths = [_below(name) for name in names]
    files.settle(paths)
    return dict(zip(names, seal_files(files, paths), strict=True))


def write(
    files: Files,
    *,
    version: int,
    rows: int,
    what: str,
    tracked: Iterable[str],
    known: Mapping[str, SealedFile],
) -> Seal:
    """Seal a version, after its files are on the disk; hashes only what is not known."""
    names = sorted(set(tracked))
    fresh = hashed(files, [name for name in names if name not in known])
    entries = {name: fresh.get(name) or known[name] for name in names}
    seal = Seal(version, rows, time.time(), what, entries)
    tree: dict[str, Any] = {
        "format": "strata-seal",
        "version": version,
        "rows": rows,
        "at_s": seal.at_s,
        "what": what,
        "files": {name: entry.as_list() for name, entry in entries.items()},
    }
    files.put(_name(version), sealed(tree))
    return seal


def remove(files: Files, version: int) -> None:
    """Forget a version; its files may go after this."""
    files.delete(_name(version))


def check_for_opening(files: Files, seal: Seal) -> None:
    """Check what Lance trusts when it opens a version.

    Raises:
        BankError: a file is missing, of another size, or changed.
    """
    entries = {_below(name): entry for name, entry in seal.files.items()}
    _check_sizes(files, entries)
    ends = {path: e for path, e in entries.items() if not path.startswith(_below("_indices/"))}
    parts = [(path, entry.num_bytes - entry.tail_bytes) for path, entry in ends.items()]
    for (path, entry), found in zip(ends.items(), _hashes(files, parts), strict=True):
        if found != entry.tail_sha256:
            raise _changed(files.where(path))


def check_indexes(files: Files, seal: Seal) -> None:
    """Check all index files.

    Raises:
        BankError: one is missing or changed.
    """
    check_files(
        files,
        {_below(name): e for name, e in seal.files.items() if name.startswith("_indices/")},
    )


def check_dataset_file(files: Files, name: str, entry: SealedFile) -> None:
    """Check the whole of one file of the dataset.

    Raises:
        BankError: it is missing or changed.
    """
    check_files(files, {_below(name): entry})


def check_files(files: Files, entries: Mapping[str, SealedFile]) -> None:
    """Check the whole of files, by their names below the bank.

    Raises:
        BankError: one is missing or changed.
    """
    _check_sizes(files, entries)
    found = _hashes(files, [(path, 0) for path in entries])
    for (path, entry), sha256 in zip(entries.items(), found, strict=True):
        if sha256 != entry.sha256:
            raise _changed(files.where(path))


def seal_files(files: Files, paths: Sequence[str]) -> list[SealedFile]:
    """Hash files by their names below the bank."""
    sizes = files.sizes(paths)
    starts = [sizes[path] - _tail_bytes(files, path, sizes[path]) for path in paths]
    tails = files.hashes(list(zip(paths, starts, strict=True)))
    wholes = iter(files.hashes([(p, 0) for p, start in zip(paths, starts, strict=True) if start]))
    return [
        SealedFile(sizes[path], next(wholes) if start else tail, sizes[path] - start, tail)
        for path, start, tail in zip(paths, starts, tails, strict=True)
    ]


def _name(version: int) -> str:
    return f"{SEALS}/{version:012d}.json"


def _below(name: str) -> str:
    return f"{DATASET}/{name}"


def _tail_bytes(files: Files, path: str, num_bytes: int) -> int:
    """How much of a file's end is checked when a bank is opened."""
    if not path.startswith(_below("data/")):
        return num_bytes
    # The footer begins with the place of the first column's description; what lies before it is
    # pages of data, but for the schema just before it.
    footer = files.read_range(path, max(0, num_bytes - _FOOTER_BYTES), min(8, num_bytes))
    described = num_bytes - int.from_bytes(footer, "little")
    return min(num_bytes, max(described, 0) + _MARGIN_BYTES)


def _hashes(files: Files, parts: Sequence[tuple[str, int]]) -> list[str]:
    try:
        return files.hashes(parts)
    except OSError as error:
        name = error.filename or files
        raise BankError(f"{name} cannot be read: {error.strerror}") from None


def _check_sizes(files: Files, entries: Mapping[str, SealedFile]) -> None:
    sizes = files.sizes(list(entries))
    for path, entry in entries.items():
        num_bytes = sizes.get(path)
        if num_bytes is None:
            raise BankError(
                f"{files.where(path)} is missing: restore it from a copy, or open an older version "
                "of the bank"
            )
        if num_bytes != entry.num_bytes:
            raise BankError(
                f"{files.where(path)} has {num_bytes:,} bytes, {entry.num_bytes:,} were written: "
                "restore it from a copy, or open an older version of the bank"
            )


def _changed(path: str) -> BankError:
    return BankError(
        f"{path} is damaged, not what was written: restore it from a copy, or open an older "
        "version of the bank"
    )


def _listed(numbers: list[int]) -> str:
    if len(numbers) <= 6:
        return ", ".join(map(str, numbers)) or "none"
    return f"{numbers[0]} to {numbers[-1]} ({len(numbers)} of them)"
