"""Facts with texts that state them.

A file of facts is a question file (see `questions`) whose rows also say how the fact is stated:

    {"id": ..., "question": "What is the capital of Chad?", "answers": ["N'Djamena"],
     "texts": ["N'Djamena is the capital of Chad.", "Chad is governed from N'Djamena."]}

`texts` is a list, or an object of texts by the names that reports call them. The first answer is
the one that the texts state. Rows without `texts`, such as those of `strata reader data`, take the
text of their `source` from a file of documents, and wordings of their `relation` from strata.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strata.data.facts.entities import asked_fact, state
from strata.data.facts.entity_wordings import WORDINGS
from strata.errors import DataError
from strata.evals.questions import DEFAULT_TEMPLATE, Question, is_text, read_rows

MAX_TEXTS = 100
SOURCE = "source"  # what reports call the text of a row's source


@dataclass(frozen=True)
class Fact:
    """A fact, ready to be asked and stated.

    Attributes:
        id: names it in reports; no other fact has it.
        prompt: what asks for it.
        answer: as it follows the prompt, leading space included.
        texts: each states it, by the name of its wording.
    """

    id: str
    prompt: str
    answer: str
    texts: Mapping[str, str]


def read_facts(
    path: Path,
    *,
    template: str = DEFAULT_TEMPLATE,
    documents: Mapping[str, str] | None = None,
    wordings: bool = False,
) -> list[Fact]:
    """Read a file of facts.

    Args:
        path: JSON lines, gzip when the name ends in `.gz`.
        template: as in `read_questions`.
        documents: texts by source, for rows that name theirs.
        wordings: also state rows whose `relation` is one of EntityQuestions', asked in a wording
            of strata, in each of that relation's statements.

    Raises:
        DataError: the file is missing or damaged, a row has no text that states it or texts that
            are none, or two rows have one id.
    """
    facts: dict[str, Fact] = {}
    for question, row, where in read_rows(path, template=template):
        texts = _given(row, where)
        if documents is not None and question.source is not None:
            if question.source not in documents:
                raise DataError(
                    f"{where}: source {question.source!r} is none of the {len(documents):,} "
                    "documents: give those that the questions were made with"
                )
            texts[SOURCE] = documents[question.source]
        if wordings:
            texts |= _worded(question, row)
        if not texts:
            raise DataError(
                f"{where}: nothing states it: give 'texts', or documents that hold its 'source'"
            )
        if question.id in facts:
            raise DataError(f"{where}: a second row has the id {question.id!r}: rename one")
        facts[question.id] = Fact(question.id, question.prompt, question.completions[0], texts)
    return list(facts.values())


def _given(row: Mapping[str, Any], where: str) -> dict[str, str]:
    given = row.get("texts", [])
    if isinstance(given, list):
        given = {f"text {number}": text for number, text in enumerate(given, start=1)}
    few = isinstance(given, dict) and len(given) <= MAX_TEXTS
    if not few or not all(map(is_text, given.values())):
        raise DataError(
            f"{where}: 'texts' must be a list of at most {MAX_TEXTS} texts, or an object of texts "
            "by name, none of them blank"
        )
    return dict(given)


def _worded(question: Question, row: Mapping[str, Any]) -> dict[str, str]:
    relation, asked = row.get("relation"), row.get("question")
    if not isinstance(relation, str) or not isinstance(asked, str):
        return {}
    fact = asked_fact(asked, relation, question.answers)
    if fact is None:
        return {}
    return {
        f"statement {number}": state(wording, fact.subject, question.answers[0])
        for number, wording in enumerate(WORDINGS[relation].statements, start=1)
    }
