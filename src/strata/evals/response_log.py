"""What a model answered so far, on disk, so that an interrupted evaluation goes on.

A file of JSON lines, one for each part of a task's requests: what was asked (a hash), the answers,
and what the questions were given. A line cut short by a kill is not there for the next run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from strata.evals.question_references import Tally

MAX_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class Part:
    """Some requests that were answered.

    Attributes:
        asked: hash of the requests.
        answers: one each, as JSON keeps it.
        tally: what their questions were given.
    """

    asked: str
    answers: tuple[Any, ...]
    tally: Tally


class ResponseLog:
    """Answers of one task under one setting, part by part.

    Args:
        path: of the file; made with the first part. None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._kept = {} if path is None else {part.asked: part for part in _read(path)}

    def find(self, asked: str) -> Part | None:
        """The part with these requests, if it was answered."""
        return self._kept.get(asked)

    def add(self, part: Part) -> None:
        """Keep a part; it is on the disk when this returns."""
        if self._path is None:
            return
        line = json.dumps(asdict(part), separators=(",", ":")).encode() + b"\n"
        with open(self._path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._kept[part.asked] = part


def hash_of(kind: str, requests: Sequence[Sequence[Any]]) -> str:
    """A hash of requests: their kind and arguments, in order."""
    text = json.dumps([kind, *map(list, requests)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path) -> list[Part]:
    """The whole lines of a file; what stands behind the first broken one is cut off."""
    if not path.exists():
        return []
    parts: list[Part] = []
    end = 0
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            part = _parse(line)
            if part is None:
                break
            parts.append(part)
            end += len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)
    return parts


def _parse(line: bytes) -> Part | None:
    if not line.endswith(b"\n"):
        return None
    try:
        tree = json.loads(line)
        tally = Tally.read(tree["tally"])
        asked, answers = tree["asked"], tree["answers"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(asked, str) or not isinstance(answers, list):
        return None
    return Part(asked, tuple(answers), tally)
