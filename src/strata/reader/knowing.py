"""Facts that the reader shall know with nothing to read, and the questions that ask for them.

They are true, and of subjects that no other text of the training names. Each is told in its
relation's statements and asked in all of its questions but one, which is what is asked later.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

from strata.data.facts.entities import EntityFact, Names, state
from strata.data.facts.entity_wordings import WORDINGS
from strata.data.facts.factbook import load_articles
from strata.errors import DataError
from strata.reader.draw import Draw
from strata.reader.rows import Lines, Row
from strata.reader.settings import ReaderData
from strata.reader.writing import ToldBy, question_line

_ASKED = 0.5  # share of rows that ask; the others tell


def choose_known(
    left: Sequence[EntityFact], config: ReaderData, *, asked: Names
) -> list[EntityFact]:
    """The facts to know, a fact a subject, countries left to the articles.

    Args:
        left: facts on subjects that no training text names and no bank tells of.
        config: how many.
        asked: subjects of the banks; a fact that names one of these is left out.

    Raises:
        DataError: there are not so many.
    """
    countries = {name.casefold() for name in load_articles()}
    chosen: dict[str, EntityFact] = {}
    for fact in Draw(config.seed, "known").order(left):
        if fact.subject.casefold() in countries:
            continue
        if not any(asked.found_in(name) for name in (fact.subject, fact.answers[0])):
            chosen.setdefault(fact.subject.casefold(), fact)
    if len(chosen) < config.know.facts:
        raise DataError(
            f"know.facts is {config.know.facts:,}, the banks leave {len(chosen):,}: lower it, or "
            "bank_references"
        )
    return list(chosen.values())[: config.know.facts]


def known_row(writer: ToldBy, draw: Draw, facts: Sequence[EntityFact], *, held_out: bool) -> Row:
    """Facts told, or asked with nothing that answers, each once while there are others.

    A row that tells asks for nothing: behind statements, questions that none of them answers would
    teach the reader not to read.

    Args:
        writer: counts.
        draw: the facts' order and wordings.
        facts: to know.
        held_out: ask all of them in the question that is kept from training.
    """
    lines = Lines(writer, writer.config.know.row_tokens)
    asks = held_out or draw.chance(_ASKED)
    for fact in cycle(draw.order(facts)):
        if asks:
            text = question_line(fact.question(_question(draw, fact, held_out)), fact.answers[0])
        else:
            wordings = WORDINGS[fact.relation]
            wording = draw.pick(wordings.statements if lines.parts else wordings.opens)
            text = state(wording, fact.subject, fact.answers[0])
        before = ("\n" if asks else " ") if lines.parts else ""
        if not lines.add(before + text):
            break
    return lines.row("known")


def _question(draw: Draw, fact: EntityFact, held_out: bool) -> int:
    count = len(WORDINGS[fact.relation].questions)
    if held_out:
        return fact.held_out
    return (fact.held_out + 1 + draw.below(count - 1)) % count


def write_known(path: Path, facts: Sequence[EntityFact]) -> int:
    """Write a question for each fact, in the wording that it is not trained in; how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in _questions(facts))
    return len(facts)


def _questions(facts: Sequence[EntityFact]) -> Iterator[dict[str, object]]:
    for number, fact in enumerate(facts):
        yield {
            "id": f"known-{number:05d}",
            "question": fact.question(fact.held_out),
            "answers": list(fact.answers),
            "relation": fact.relation,
        }
