"""Paragraphs of SQuAD with a question each, and how often a retriever finds a question's own.

Shared by the benchmarks that plant such paragraphs among other references.
"""

from __future__ import annotations

import gzip
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strata.explicit.retrieve import Retriever

COLUMNS = (
    "| retriever | its paragraph | with an answer | first hit | ms a query |\n"
    "|---|---:|---:|---:|---:|"
)


@dataclass(frozen=True)
class Question:
    """A question, the source of the paragraph it was asked about, and the answers accepted."""

    text: str
    source: str
    answers: tuple[str, ...]


def paragraphs(path: Path, rng: random.Random) -> Iterator[tuple[str, Question]]:
    """All paragraphs of a file of SQuAD (id, question, answers, context), shuffled.

    Each comes with one of its questions, drawn when it is asked for, and is called "squad#0", ...
    """
    by_context: dict[str, list[dict[str, Any]]] = {}
    for question in lines(path):
        by_context.setdefault(question["context"], []).append(question)
    contexts = list(by_context)
    rng.shuffle(contexts)
    for number, context in enumerate(contexts):
        asked = rng.choice(by_context[context])
        yield context, Question(asked["question"], f"squad#{number}", tuple(asked["answers"]))


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def recall_row(name: str, retriever: Retriever, questions: Sequence[Question], top_k: int) -> str:
    """One line below `COLUMNS`; queries one by one, as a session asks them.

    Counted is whether the first `top_k` hits hold a piece of the question's own paragraph, whether
    they hold one with an accepted answer in it, and whether the first hit is a piece of it.
    """
    retriever.search([questions[0].text], top_k)
    started_s = time.perf_counter()
    found = [retriever.search([question.text], top_k)[0] for question in questions]
    query_ms = (time.perf_counter() - started_s) * 1e3 / len(questions)
    pairs = list(zip(questions, found, strict=True))
    own = [any(hit.source == q.source for hit in hits) for q, hits in pairs]
    told = [
        any(hit.source == q.source and any(a in hit.text for a in q.answers) for hit in hits)
        for q, hits in pairs
    ]
    first = [bool(hits) and hits[0].source == q.source for q, hits in pairs]
    shares = [f"{100 * sum(good) / len(good):.1f}%" for good in (own, told, first)]
    return f"| {name} | {' | '.join(shares)} | {query_ms:.1f} |"
