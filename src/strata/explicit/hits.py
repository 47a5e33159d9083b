"""What a search finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_TOP_K = 10_000  # hits of one search of a bank


@dataclass(frozen=True)
class Hit:
    """One reference that a search found.

    Attributes:
        id: of the reference in its bank.
        score: larger is better; in the units of the retriever that found it.
        text: of the reference.
        source: where its document came from.
        start, end: characters in the document.
        metadata: of the document: flat, JSON values.
    """

    id: str
    score: float
    text: str
    source: str
    start: int
    end: int
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranking:
    """What a search found, best first, and not yet read.

    Attributes:
        version: of the bank that was searched; whatever the bank knows it by.
        rows: numbers of references in that version.
        scores: one a row.
    """

    version: Any
    rows: Sequence[int]
    scores: Sequence[float]
