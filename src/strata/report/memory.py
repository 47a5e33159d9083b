"""What `strata eval memory` found: every format in one table, and answers with their sources."""

from __future__ import annotations

from functools import partial

from strata.errors import DataError
from strata.report import pictures
from strata.report.parts import Cell, Picture, Section, Table, count, number, share, words
from strata.report.source import Node

_COLUMNS = (
    "format", "answered exactly", "contains", "nats/answer", "hallucinated", "first token, ms",
    "tokens/s", "KiB/reference", "questions",
)  # fmt: skip


def memory_section(tree: Node, *, name: str, title: str, answers: int) -> Section:
    """One evaluation.

    Args:
        tree: what `strata eval memory --out` writes, or one part of an exam.
        name: of its picture.
        title: of the section.
        answers: questions whose answers are shown.

    Raises:
        DataError: it is something else.
    """
    scores = list(tree["scores"])
    if not scores or any(score["accuracy"].number is None for score in scores):
        raise DataError(f"{tree.place} has no scores: is it of strata eval memory --out?")
    rows = [
        (
            words(score["format"]), share(score["accuracy"]), share(score["contains"]),
            number(score["nats_per_answer"], "{:.2f}"), share(score["hallucinated"]),
            number(score["ttft_ms"], "{:,.1f}"), number(score["tokens_per_s"], "{:,.1f}"),
            number(score["kib_per_reference"], "{:,.1f}"), count(score["num_questions"]),
        )
        for score in scores
    ]  # fmt: skip
    found = share(tree["found"]).text
    parts: list[Table | Picture] = [
        Table(
            "Formats",
            _COLUMNS,
            rows,
            f"An accepted answer stands in the references given for {found} of the questions.",
        ),
        _picture(scores, name),
    ]
    records = list(tree["records"])
    if records and answers:
        parts.append(_answers(records, answers))
    return Section(title, "", parts)


def _picture(scores: list[Node], name: str) -> Picture:
    groups = {
        str(score["format"].value): {"answered exactly": score["accuracy"].number or 0.0}
        for score in scores
    }
    says = ", ".join(f"{form} {by['answered exactly']:.1%}" for form, by in groups.items())
    return Picture(
        f"{name}-accuracy",
        "Answered exactly, by format",
        partial(pictures.bars, groups, y="share of questions"),
        [score["accuracy"].place for score in scores],
        f"Answered exactly: {says}.",
    )


def _answers(records: list[Node], most: int) -> Table:
    """A row an answer, the formats of a question one below the other."""
    shown = list(dict.fromkeys(record["id"].value for record in records))
    kept = set(shown[:most])
    rows, before = [], None
    for record in records:
        name = record["id"].value
        if name not in kept:
            continue
        first, before = name != before, name
        asked = record["prompt"] if record["prompt"].value else record["id"]
        right = record["exact"].value is True
        rows.append((
            words(asked) if first else Cell(""),
            words(record["answers"]) if first else Cell(""),
            words(record["format"]),
            words(record["text"], right=right),
            number(record["nats"], "{:.2f}"),
            words(record["sources"]),
        ))  # fmt: skip
    about = f"The first {len(kept):,} of {len(shown):,} questions, in order, not chosen. "
    return Table(
        "Answers and their sources",
        ("question", "accepted", "format", "written", "nats", "given to read"),
        rows,
        about + "Sources are those of the references given: document, first to last character.",
        folded=True,
    )
