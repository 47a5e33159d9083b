"""Values of JSON files that know where they stand: "runs/a/metrics.jsonl#L12/loss"."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strata.errors import DataError

MAX_FILE_BYTES = 2**30


@dataclass(frozen=True)
class Node:
    """A value in a file.

    Attributes:
        value: what json gives; None where the file has no such key.
        place: FILE#/key/0/key as a JSON pointer (RFC 6901), in a file of lines FILE#L12/key.
    """

    value: Any
    place: str

    def __getitem__(self, key: str) -> Node:
        """What stands under a key; a value of None where there is no such key."""
        below = self.value.get(key) if isinstance(self.value, dict) else None
        return Node(below, f"{self.place}/{key.replace('~', '~0').replace('/', '~1')}")

    def items(self) -> Iterator[tuple[str, Node]]:
        """Keys and what stands under them; nothing where this is no mapping."""
        keys = list(self.value) if isinstance(self.value, dict) else []
        return ((key, self[key]) for key in keys)

    def __iter__(self) -> Iterator[Node]:
        """Entries of a list; nothing where this is none."""
        entries = self.value if isinstance(self.value, list) else []
        return (Node(one, f"{self.place}/{n}") for n, one in enumerate(entries))

    @property
    def number(self) -> float | None:
        """A number, or None where the file has none.

        Raises:
            DataError: something else stands there.
        """
        if self.value is None:
            return None
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise DataError(f"{self.place} holds {type(self.value).__name__}, not a number")
        return self.value


@dataclass(frozen=True)
class Run:
    """A folder, or a file, that a page tells of.

    Attributes:
        path: of the folder.
        label: its name on the page; no other run has it.
    """

    path: Path
    label: str

    def below(self, name: str) -> Run:
        """A folder in it."""
        return Run(self.path / name, f"{self.label}/{name}")

    def json(self, name: str) -> Node:
        """A file in it.

        Raises:
            DataError: it is not JSON.
        """
        path = self.path / name
        try:
            return Node(json.loads(_read(path)), f"{self.label}/{name}#")
        except (ValueError, RecursionError):
            raise DataError(f"{path} is not JSON: it was changed, or not written whole") from None

    def lines(self, name: str) -> list[Node]:
        """The objects of a file of JSON lines; the last one may be cut off by a kill.

        Raises:
            DataError: another line is not JSON.
        """
        path = self.path / name
        if not path.exists():
            return []
        found, lines = [], _read(path).split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                if number == len(lines):  # no line break behind it: a kill cut it off
                    break
                raise DataError(f"{path}, line {number} is not JSON: mend or delete it") from None
            if isinstance(row, dict):
                found.append(Node(row, f"{self.label}/{name}#L{number}"))
        return found


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path} is larger than {MAX_FILE_BYTES / 2**30:.0f} GiB: not read")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text: it was changed, or not written whole") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
