"""Which files a user means by SOURCE, in a fixed order, and how to tell that they changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from strata.config import FrozenConfig
from strata.errors import DataError

SUFFIXES = (
    ".parquet",
    ".jsonl",
    ".jsonl.gz",
    ".jsonl.zst",
    ".txt",
    ".txt.gz",
    ".txt.zst",
)
_FINGERPRINT_BYTES = 64 * 1024


class SourceEntry(FrozenConfig):
    """One source file as a manifest records it: no machine's folders in it."""

    name: str
    num_bytes: int
    fingerprint: str


@dataclass(frozen=True)
class Source:
    """One file to read.

    Attributes:
        path: where it is.
        suffix: which of `SUFFIXES` it has.
        entry: its name inside the SOURCE given, its size and a hash of its head and tail.
    """

    path: Path
    suffix: str
    entry: SourceEntry


def find_sources(sources: Sequence[Path]) -> list[Source]:
    """List the files behind files and folders, folders walked in sorted order.

    Inside a folder only files with one of `SUFFIXES` count; hidden ones do not.

    Raises:
        DataError: a source is missing or of another kind, a file is named twice, or nothing
            matched.
    """
    if not sources:
        raise DataError("no source given: name files or folders of " + ", ".join(SUFFIXES))
    found: list[Source] = []
    seen: set[Path] = set()
    for given in sources:
        for path, name in _files_behind(given):
            resolved = path.resolve()
            if resolved in seen:
                raise DataError(f"{path} is given twice: name each source once")
            seen.add(resolved)
            found.append(_describe(path, name))
    return found


def _files_behind(given: Path) -> list[tuple[Path, str]]:
    if given.is_dir():
        files = _walk(given)
        if not files:
            raise DataError(f"nothing to read in {given}: expected {', '.join(SUFFIXES)}")
        return files
    if given.is_file():
        if _suffix_of(given.name) is None:
            raise DataError(f"{given} is of no known kind: expected {', '.join(SUFFIXES)}")
        return [(given, given.name)]
    if given.exists():
        raise DataError(f"{given} is neither a file nor a folder")
    raise DataError(f"no source at {given}: give the path of a file or a folder")


def _walk(folder: Path) -> list[tuple[Path, str]]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and _suffix_of(name) is not None and path.is_file():
                files.append((path, path.relative_to(folder).as_posix()))
    return sorted(files, key=lambda item: item[1])


def _suffix_of(name: str) -> str | None:
    lowered = name.lower()
    return next((suffix for suffix in SUFFIXES if lowered.endswith(suffix)), None)


def _describe(path: Path, name: str) -> Source:
    suffix = _suffix_of(name)
    assert suffix is not None
    try:
        with open(path, "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(file.read(_FINGERPRINT_BYTES))
            file.seek(max(0, num_bytes - _FINGERPRINT_BYTES))
            digest.update(file.read(_FINGERPRINT_BYTES))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    entry = SourceEntry(name=name, num_bytes=num_bytes, fingerprint=digest.hexdigest()[:32])
    return Source(path=path, suffix=suffix, entry=entry)
