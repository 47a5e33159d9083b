"""How often each reference is used: counted in a log of queries, or assumed to follow Zipf's law.

A log is JSON lines. A row says what was read in one of these ways, the first that it has:

    {"used": [{"source": ..., "start": ..., "end": ...}]}   as `strata ask --json` prints
    {"source": ..., "start": ..., "end": ...}               one place
    {"source": ..., "answers": [...]}                       of its references the first that
                                                            holds an answer
    {"source": ...}                                         all of its references, in equal shares
    {"question": ...}                                       searched for, `prompt` or `query` too

`uses` gives a row a weight other than 1. Other fields are ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from strata.errors import ConfigError, DataError
from strata.theory.cost import Floats

Find = Callable[[Sequence[str]], Sequence[Sequence[int]]]

_MAX_LINE_BYTES = 16 * 2**20
_QUERIES = ("question", "query", "prompt")


class Placeable(Protocol):
    """A reference, as far as a log can name it."""

    @property
    def text(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...


@dataclass(frozen=True)
class Uses:
    """What a log says.

    Attributes:
        uses_n: of each reference.
        rows: in the log.
        lost: rows that name nothing of the corpus, or for which nothing was found.
    """

    uses_n: Floats
    rows: int
    lost: int


def zipf_uses(count: int, *, exponent: float, total: float) -> Floats:
    """Uses in proportion to 1 / rank ** exponent, summing to `total`; the first has rank 1.

    Raises:
        ConfigError: a negative exponent or total.
    """
    for name, number in (("exponent", exponent), ("number of uses", total)):
        if not (number >= 0 and math.isfinite(number)):
            raise ConfigError(f"a Zipf {name} of {number}: give 0 or more")
    shares = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    uses: Floats = total * shares / shares.sum()
    return uses


def count_uses(path: Path, references: Sequence[Placeable], *, find: Find | None = None) -> Uses:
    """Count a log's uses of references.

    Args:
        path: the log.
        references: of the corpus.
        find: from queries to the references that each finds, as positions; None refuses rows that
            have to be searched for.

    Raises:
        DataError: the file is missing, empty or damaged, a row says nothing that was read, or no
            row names anything of the corpus.
    """
    places: dict[str, list[int]] = {}
    for number, reference in enumerate(references):
        places.setdefault(reference.source, []).append(number)
    uses_n = np.zeros(len(references))
    searched: list[tuple[str, float]] = []
    rows = lost = 0
    for where, row in _rows(path):
        rows += 1
        weight = _weight(row, where)
        used = row.get("used")
        if isinstance(used, list):
            named = [_named(one, references, places, where) for one in used]
        elif "source" in row:
            named = [_named(row, references, places, where)]
        else:
            query = next((row[name] for name in _QUERIES if isinstance(row.get(name), str)), None)
            if query is None or not query.strip():
                raise DataError(
                    f"{where}: says nothing that was read: a row needs used, source or question"
                )
            if find is None:
                raise DataError(
                    f"{where}: names no source: such queries have to be searched for, which needs "
                    "a way to search"
                )
            searched.append((query, weight))
            continue
        lost += not any(named)
        for numbers in named:
            for number in numbers:
                uses_n[number] += weight / len(numbers)
    if searched and find is not None:
        hits = find([query for query, _ in searched])
        for (_, weight), numbers in zip(searched, hits, strict=True):
            lost += not numbers
            for number in numbers:
                uses_n[number] += weight
    if not rows:
        raise DataError(f"{path} holds no queries: one JSON object a line is needed")
    if lost == rows:
        raise DataError(
            f"{path}: no row names anything of the corpus: sources are those that `strata bank ls` "
            "shows"
        )
    return Uses(uses_n, rows, lost)


def _named(
    row: Any, references: Sequence[Placeable], places: Mapping[str, Sequence[int]], where: str
) -> Sequence[int]:
    """References that a row names; each has an equal share of its use."""
    if not isinstance(row, dict) or not isinstance(row.get("source"), str):
        raise DataError(f"{where}: source must be a string")
    inside = places.get(row["source"], [])
    start, end = row.get("start"), row.get("end")
    if isinstance(start, int) and isinstance(end, int):
        return [n for n in inside if references[n].start < end and start < references[n].end]
    answers = row.get("answers", [row["answer"]] if "answer" in row else [])
    if isinstance(answers, list) and answers:
        words = [str(answer).casefold().strip() for answer in answers]
        holding = [n for n in inside if any(w in references[n].text.casefold() for w in words)]
        inside = holding[:1] or inside
    return inside


def _weight(row: Mapping[str, Any], where: str) -> float:
    weight = row.get("uses", 1)
    right = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not right or not (weight >= 0 and math.isfinite(weight)):
        raise DataError(f"{where}: uses must be a number of 0 or more, given {str(weight)[:40]!r}")
    return float(weight)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                where = f"{path}, line {number}"
                if len(line) > _MAX_LINE_BYTES:
                    raise DataError(f"{where} is longer than {_MAX_LINE_BYTES} bytes")
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    raise DataError(f"{where} is not JSON: one object a line is needed") from None
                if not isinstance(row, dict):
                    raise DataError(f"{where} holds {type(row).__name__}, not an object")
                yield where, row
    except FileNotFoundError:
        raise DataError(f"no query log at {path}: give a .jsonl file") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder: give a .jsonl file") from None
