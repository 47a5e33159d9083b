"""Which files a user means by SOURCE, in a fixed order, and how to tell that they changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from strata.config import FrozenConfig
from strata.errors import DataError, StrataError

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


class DatasetEntry(FrozenConfig):
    """A data set among the sources, as a manifest records it.

    Attributes:
        name: `owner/name`; of a mirror, that or the name of its folder.
        asked: the SOURCE, with configuration and revision where they were named.
        revision: the commit that was read; None where a mirror does not say.
        config, split: what of it was read.
        first: number of its first file among the sources and the sources of val.
        num_files: how many of them are its own.
        is_mirror: it was read from a folder here.
    """

    name: str
    asked: str
    revision: str | None
    config: str
    split: str
    first: int
    num_files: int
    is_mirror: bool = False


@dataclass(frozen=True)
class Source:
    """One file to read.

    Attributes:
        path: where it is; of a file elsewhere, its name in messages.
        suffix: which of `SUFFIXES` it is read as.
        entry: its name inside the SOURCE given, its size and a hash of its head and tail.
    """

    path: Path
    suffix: str
    entry: SourceEntry

    @property
    def key(self) -> object:
        """Equal for two sources that are one file."""
        return self.path.resolve()

    def fetch(self) -> Path | None:
        """Where the file lies on this machine, fetched if need be; None if it is read elsewhere."""
        return self.path

    def fetch_ahead(self) -> None:
        """Begin to fetch the file in the background, if that takes time."""

    def open(self) -> BinaryIO:
        """The bytes of the file."""
        return open(self.path, "rb")

    def peek(self) -> Source:
        """The same file, to look at its beginning."""
        return self

    def explain(self, error: Exception) -> StrataError | None:
        """What an error of opening or reading means, where this kind of source knows it."""
        return None


def find_sources(sources: Sequence[Path]) -> list[Source]:
    """List the files behind files and folders, folders walked in sorted order.

    Inside a folder only files with one of `SUFFIXES` count; hidden ones do not.

    Raises:
        DataError: a source is missing or of another kind, a file is named twice, or nothing
            matched.
    """
    if not sources:
        raise DataError("no source given: name files or folders of " + ", ".join(SUFFIXES))
    found = [describe(path, name) for given in sources for path, name in _files_behind(given)]
    refuse_repeats(found)
    return found


def refuse_repeats(sources: Sequence[Source]) -> None:
    """Refuse a file that is there twice.

    Raises:
        DataError: one is.
    """
    seen: set[object] = set()
    for source in sources:
        if source.key in seen:
            raise DataError(f"{source.path} is given twice: name each source once")
        seen.add(source.key)


def _files_behind(given: Path) -> list[tuple[Path, str]]:
    if given.is_dir():
        files = _walk(given)
        if not files:
            raise DataError(f"nothing to read in {given}: expected {', '.join(SUFFIXES)}")
        return files
    if given.is_file():
        if suffix_of(given.name) is None:
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
            if not name.startswith(".") and suffix_of(name) is not None and path.is_file():
                files.append((path, path.relative_to(folder).as_posix()))
    return sorted(files, key=lambda item: item[1])


def suffix_of(name: str) -> str | None:
    """Which of `SUFFIXES` a file name has."""
    lowered = name.lower()
    return next((suffix for suffix in SUFFIXES if lowered.endswith(suffix)), None)


def describe(path: Path, name: str, *, suffix: str | None = None) -> Source:
    """A local file as a source.

    Args:
        path: where it is.
        name: what a manifest calls it.
        suffix: what to read it as; None goes by its name.

    Raises:
        DataError: it cannot be read.
    """
    suffix = suffix or suffix_of(name)
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
