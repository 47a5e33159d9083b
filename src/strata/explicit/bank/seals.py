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

import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strata.errors import BankError
from strata.explicit.bank.settings import DATASET, SEALS, parse_sealed, sync_folder, write_sealed

_MAX_SEAL_BYTES = 512 * 2**20
_FOOTER_BYTES = 40
_MARGIN_BYTES = 64 * 2**10
_STEP_BYTES = 2**20


@dataclass(frozen=True)
class SealedFile:
    """One file: its size, the sha256 of all of it, and of its last `tail_bytes`."""

    num_bytes: int
    sha256: str
    tail_bytes: int
    tail_sha256: str

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


def versions(folder: Path) -> list[int]:
    """Versions that have a seal, ascending."""
    try:
        names = os.listdir(folder / SEALS)
    except OSError:
        raise BankError(f"bank {folder} is damaged: {SEALS} is missing") from None
    stems = [name[:-5] for name in names if name.endswith(".json")]
    return sorted(int(stem) for stem in stems if stem.isdigit() and len(stem) <= 20)


def read(folder: Path, version: int) -> Seal:
    """The seal of a version.

    Raises:
        BankError: there is none, or it is damaged.
    """
    path = _path(folder, version)
    try:
        if path.stat().st_size > _MAX_SEAL_BYTES:
            raise BankError(f"{path} is larger than {_MAX_SEAL_BYTES // 2**20} MiB: not a seal")
        tree = parse_sealed(path, path.read_bytes())
    except FileNotFoundError:
        raise BankError(
            f"bank {folder} has no version {version}: it has {_listed(versions(folder))}"
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


def write(
    folder: Path, *, version: int, rows: int, what: str, files: Iterable[str], before: Seal | None
) -> Seal:
    """Seal a version, after its files are on the disk; hashes only what the seal before has not."""
    known = before.files if before is not None else {}
    entries, fresh = {}, set()
    for name in sorted(set(files)):
        entry = known.get(name)
        if entry is None:
            path = folder / DATASET / name
            entry = seal_file(path)
            fresh.add(path.parent)
        entries[name] = entry
    for parent in fresh:
        sync_folder(parent)
    seal = Seal(version, rows, time.time(), what, entries)
    tree: dict[str, Any] = {
        "format": "strata-seal",
        "version": version,
        "rows": rows,
        "at_s": seal.at_s,
        "what": what,
        "files": {
            name: [e.num_bytes, e.sha256, e.tail_bytes, e.tail_sha256]
            for name, e in entries.items()
        },
    }
    (folder / SEALS).mkdir(exist_ok=True)
    write_sealed(_path(folder, version), tree)
    return seal


def remove(folder: Path, version: int) -> None:
    """Forget a version; its files may go after this."""
    _path(folder, version).unlink(missing_ok=True)


def check_for_opening(folder: Path, seal: Seal) -> None:
    """Check what Lance trusts when it opens a version.

    Raises:
        BankError: a file is missing, of another size, or changed.
    """
    for name, entry in seal.files.items():
        path = folder / DATASET / name
        _check_size(path, entry)
        if name.startswith("_indices/"):
            continue
        if _hash(path, start=entry.num_bytes - entry.tail_bytes) != entry.tail_sha256:
            raise _changed(path)


def check_indexes(folder: Path, seal: Seal) -> None:
    """Check all index files.

    Raises:
        BankError: one is missing or changed.
    """
    for name, entry in seal.files.items():
        if name.startswith("_indices/"):
            check_file(folder / DATASET / name, entry)


def check_file(path: Path, entry: SealedFile) -> None:
    """Check the whole of one file.

    Raises:
        BankError: it is missing or changed.
    """
    _check_size(path, entry)
    if _hash(path) != entry.sha256:
        raise _changed(path)


def _path(folder: Path, version: int) -> Path:
    return folder / SEALS / f"{version:012d}.json"


def seal_file(path: Path) -> SealedFile:
    """Hash a file that is on the disk, after making sure that it is."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    num_bytes = path.stat().st_size
    tail_bytes = num_bytes
    if path.parent.name == "data":
        # The footer begins with the place of the first column's description; what lies before
        # it is pages of data, but for the schema just before it.
        with open(path, "rb") as file:
            file.seek(max(0, num_bytes - _FOOTER_BYTES))
            described = num_bytes - int.from_bytes(file.read(8), "little")
        tail_bytes = min(num_bytes, max(described, 0) + _MARGIN_BYTES)
    tail_sha256 = _hash(path, start=num_bytes - tail_bytes)
    whole = tail_sha256 if tail_bytes == num_bytes else _hash(path)
    return SealedFile(num_bytes, whole, tail_bytes, tail_sha256)


def _hash(path: Path, *, start: int = 0) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            file.seek(start)
            while step := file.read(_STEP_BYTES):
                digest.update(step)
    except OSError as error:
        raise BankError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _check_size(path: Path, entry: SealedFile) -> None:
    try:
        num_bytes = path.stat().st_size
    except OSError:
        raise BankError(
            f"{path} is missing: restore it from a copy, or open an older version of the bank"
        ) from None
    if num_bytes != entry.num_bytes:
        raise BankError(
            f"{path} has {num_bytes:,} bytes, {entry.num_bytes:,} were written: restore it from a "
            "copy, or open an older version of the bank"
        )


def _changed(path: Path) -> BankError:
    return BankError(
        f"{path} is damaged, not what was written: restore it from a copy, or open an older "
        "version of the bank"
    )


def _listed(numbers: list[int]) -> str:
    if len(numbers) <= 6:
        return ", ".join(map(str, numbers)) or "none"
    return f"{numbers[0]} to {numbers[-1]} ({len(numbers)} of them)"
