"""A bank of references and questions on it, of facts that no training text holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from strata.data.facts.entities import EntityFact
from strata.errors import DataError
from strata.reader.draw import Draw
from strata.reader.settings import ReaderData
from strata.reader.writing import Told, Writer


@dataclass(frozen=True)
class Evaluation:
    """What was written.

    Attributes:
        references, questions: how many.
        left: facts on subjects that no reference tells of.
    """

    references: int
    questions: int
    left: list[EntityFact]


def write_evaluation(
    out: Path, writer: Writer, facts: Sequence[EntityFact], *, split: str, share: float = 1.0
) -> Evaluation:
    """Write OUT/bank/references.jsonl and OUT/questions.jsonl.

    Every subject stands in one reference only, so that a question has one answer in the bank. A
    question is in the source's own words and names, as its `source`, the reference that answers:
    add the bank with `--id-field id`.

    Args:
        out: the folder to make.
        writer: tells the facts, truly.
        facts: of subjects that no training text names.
        split: names the references.
        share: of the references and questions that are asked for.

    Raises:
        DataError: too few facts for so many references.
    """
    config = writer.config
    most, asked = (int(count * share) for count in (config.bank_references, config.questions))
    draw = Draw(config.seed, "bank", split)
    told: list[Told] = []
    used: set[str] = set()
    for group in _groups(draw, facts, config):
        if len(told) == most:
            break
        told += writer.tell(draw, [group], filler=config.bank_filler)
        used |= {fact.subject.casefold() for fact in group}
    if len(told) < most:
        raise DataError(
            f"{len(facts):,} facts for {split} fill {len(told):,} references, {most:,} are asked "
            "for: lower bank_references or bank_facts"
        )
    (out / "bank").mkdir(parents=True, exist_ok=True)
    names = [f"{split}-{number:05d}" for number in range(len(told))]
    _write(
        out / "bank" / "references.jsonl",
        ({"id": name, "text": one.text} for name, one in zip(names, told, strict=True)),
    )
    chosen = sorted(draw.order(range(len(told)))[:asked])
    _write(
        out / "questions.jsonl",
        (_question(draw, names[number], told[number], number) for number in chosen),
    )
    left = [fact for fact in facts if fact.subject.casefold() not in used]
    return Evaluation(len(told), len(chosen), left)


def _groups(
    draw: Draw, facts: Sequence[EntityFact], config: ReaderData
) -> Iterator[list[EntityFact]]:
    """Facts of one reference each, a fact a subject."""
    by_subject: dict[str, EntityFact] = {}
    for fact in draw.order(facts):
        by_subject.setdefault(fact.subject.casefold(), fact)
    left = iter(by_subject.values())
    while True:
        size = draw.between(*config.bank_facts)
        group = [fact for fact, _ in zip(left, range(size), strict=False)]
        if len(group) < size:
            return
        yield group


def _question(draw: Draw, name: str, told: Told, number: int) -> dict[str, object]:
    said = draw.pick(told.said)
    assert isinstance(said.fact, EntityFact)
    return {
        "id": f"q-{name}",
        "question": said.fact.question(0),
        "answers": [said.answer, *(one for one in said.fact.answers if one != said.answer)],
        "source": name,
        "relation": said.fact.relation,
    }


def _write(path: Path, rows: Iterator[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
