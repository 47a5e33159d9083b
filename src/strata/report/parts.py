"""What a page is made of: sections of tables and pictures, whose cells say where they are from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from strata.report.source import Node


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what is shown.
        place: file and key of what is shown; empty for words of ours.
        right: of an answer, whether it is right; else None.
        is_number: whether it stands on the right.
    """

    text: str
    place: str = ""
    right: bool | None = None
    is_number: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of each being its name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    about: str = ""
    folded: bool = False

    @property
    def origins(self) -> dict[str, list[str]]:
        """Keys by file, numbers of lines and entries left open."""
        return origins([cell.place for row in self.rows for cell in row])


@dataclass(frozen=True)
class Picture:
    """A picture, drawn when the page is written.

    Attributes:
        name: of its PNG, without suffix.
        title: above it.
        draw: makes a matplotlib figure.
        places: of everything that it shows.
        says: the same in a sentence, for those who cannot see it.
    """

    name: str
    title: str
    draw: Callable[[], Any]
    places: Sequence[str]
    says: str

    @property
    def origins(self) -> dict[str, list[str]]:
        """As those of a table."""
        return origins(self.places)


@dataclass(frozen=True)
class Section:
    """One heading with what belongs below it."""

    title: str
    about: str = ""
    parts: Sequence[Table | Picture] = field(default_factory=list)


def origins(places: Sequence[str]) -> dict[str, list[str]]:
    """Keys by file, each once: "#L3/loss" and "#L4/loss" are "*/loss"."""
    found: dict[str, dict[str, None]] = {}
    for place in places:
        if place:
            file, _, pointer = place.partition("#")
            key = re.sub(r"(?:^L|(?<=/))\d+(?=/|$)", "*", pointer).removeprefix("/")
            found.setdefault(file, {})[key] = None
    return {file: list(keys) for file, keys in found.items()}


def share(node: Node) -> Cell:
    """A share of 1 as a percentage."""
    return _number(node, "{:.1%}")


def number(node: Node, form: str = "{:,.3f}") -> Cell:
    """A number in some form."""
    return _number(node, form)


def count(node: Node) -> Cell:
    """A whole number."""
    return _number(node, "{:,.0f}")


def words(node: Node, *, right: bool | None = None) -> Cell:
    """A text, or texts, a line each."""
    value = node.value
    if isinstance(value, list | tuple):
        return Cell("\n".join(map(str, value)), node.place, right)
    return Cell("" if value is None else str(value), "" if value is None else node.place, right)


def _number(node: Node, form: str) -> Cell:
    value = node.number
    if value is None or not math.isfinite(value):
        return Cell("-", is_number=True)
    return Cell(form.format(value), node.place, is_number=True)
