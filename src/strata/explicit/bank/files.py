"""Where the files of a bank lie: in a folder of this machine, or below a URL of an object store.

Names are those below the bank, with slashes: "seals/000000000001.json".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Protocol

from strata.errors import BankError
from strata.files import replacing, sync

SCHEMES: Final = ("s3", "gs", "az")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_STEP_BYTES = 2**20


class Files(Protocol):
    """The files of one bank; what is missing is a FileNotFoundError, all else an OSError.

    Attributes:
        place: what `files_at` makes it from, in another process too.
        storage_options: what Lance is given to open a dataset there.
    """

    @property
    def place(self) -> str | Path: ...

    @property
    def storage_options(self) -> dict[str, str] | None: ...

    def where(self, name: str) -> str:
        """A file for people, and a dataset for Lance."""
        ...

    def prepare(self) -> list[str]:
        """Make room for a new bank; the first parts of the names that are there."""
        ...

    def names(self, below: str) -> list[str]:
        """Of all files below a name, in order."""
        ...

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of those that are there."""
        ...

    def read(self, name: str) -> bytes:
        """All of a file."""
        ...

    def read_range(self, name: str, start: int, count: int) -> bytes:
        """Some of a file."""
        ...

    def hashes(self, parts: Sequence[tuple[str, int]]) -> list[str]:
        """The sha256 of files, each from a byte on."""
        ...

    def settle(self, names: Iterable[str]) -> None:
        """Wait until files that others wrote are safe, with their names."""
        ...

    def put(self, name: str, content: bytes) -> None:
        """Write a file so that it is either the old one or the whole new one, and safe."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file if it is there, and folders that it leaves empty."""
        ...

    def writing(self) -> AbstractContextManager[None]:
        """Be the only writer meanwhile.

        Raises:
            BankError: somebody else writes, or nobody can.
        """
        ...

    def check_writing(self) -> None:
        """Make sure that this is still the only writer, before a commit.

        Raises:
            BankError: somebody else has taken over.
        """
        ...


def files_at(place: str | Path) -> Files:
    """The files of the bank at a folder or URL.

    Raises:
        BankError: a URL of no store that is known.
        MissingPackageError: a URL, and obstore is not installed.
    """
    if not isinstance(place, str) or _URL.match(place) is None:
        return LocalFiles(Path(place))
    if place.partition("://")[0] not in SCHEMES:
        raise BankError(f"bank {place}: give a folder, or a URL of {', '.join(SCHEMES)}")
    from strata.explicit.bank.object_files import ObjectFiles

    return ObjectFiles(place)


def path_of(place: str | Path) -> str | Path:
    """A folder as a path, a URL as it is."""
    return place if isinstance(place, str) and _URL.match(place) else Path(place)


class LocalFiles:
    """A folder of this machine, or of a file system that all machines see."""

    storage_options = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def place(self) -> str | Path:
        """See `Files`."""
        return self.folder.resolve()

    def __str__(self) -> str:
        return str(self.folder)

    def where(self, name: str) -> str:
        """See `Files`."""
        return str(self.folder / name)

    def prepare(self) -> list[str]:
        """See `Files`."""
        if self.folder.is_file():
            raise BankError(f"{self.folder} is a file: give the name of a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        return [entry.name for entry in self.folder.iterdir()]

    def names(self, below: str) -> list[str]:
        """See `Files`."""
        top = self.folder / below
        found = [path for path in top.rglob("*") if path.is_file()]
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """See `Files`."""
        found = {}
        for name in names:
            try:
                found[name] = (self.folder / name).stat().st_size
            except OSError:
                continue
        return found

    def read(self, name: str) -> bytes:
        """See `Files`."""
        return (self.folder / name).read_bytes()

    def read_range(self, name: str, start: int, count: int) -> bytes:
        """See `Files`."""
        with open(self.folder / name, "rb") as file:
            file.seek(start)
            return file.read(count)

    def hashes(self, parts: Sequence[tuple[str, int]]) -> list[str]:
        """See `Files`."""
        found = []
        for name, start in parts:
            digest = hashlib.sha256()
            with open(self.folder / name, "rb") as file:
                file.seek(start)
                while step := file.read(_STEP_BYTES):
                    digest.update(step)
            found.append(digest.hexdigest())
        return found

    def settle(self, names: Iterable[str]) -> None:
        """See `Files`."""
        parents = set()
        for name in names:
            sync(self.folder / name)
            parents.add((self.folder / name).parent)
        for parent in parents:
            sync(parent)

    def put(self, name: str, content: bytes) -> None:
        """See `Files`."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            file.write(content)

    def delete(self, name: str) -> None:
        """See `Files`."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == self.folder or not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()

    def writing(self) -> AbstractContextManager[None]:
        """See `Files`."""
        from strata.explicit.bank.lock import writing

        return writing(self.folder)

    def check_writing(self) -> None:
        """See `Files`; the kernel's lock cannot be lost."""
