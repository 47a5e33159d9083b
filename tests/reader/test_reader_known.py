"""What the reader shall know: true, named nowhere else, and asked in a wording not trained."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from reader_texts import rows_of, settings, training_texts

from strata.data.dataset import TokenDataset
from strata.data.facts.entities import EntityFact, EntitySplits, Names
from strata.data.facts.entity_wordings import WORDINGS
from strata.data.references import ChunkReferences
from strata.errors import DataError
from strata.evals.questions import read_questions
from strata.reader.data import DataReport
from strata.reader.knowing import choose_known

Made = tuple[Path, DataReport]


def known_facts(out: Path, splits: EntitySplits) -> list[EntityFact]:
    """By their questions."""
    facts = {fact.question(fact.held_out): fact for fact in splits.test}
    rows = map(json.loads, (out / "eval" / "know" / "questions.jsonl").open(encoding="utf-8"))
    return [facts[row["question"]] for row in rows]


def test_questions_ask_for_each_known_fact_once(made: Made, splits: EntitySplits) -> None:
    out, report = made
    facts = known_facts(out, splits)
    assert len({fact.subject for fact in facts}) == len(facts) == report.facts["known"] == 60
    questions = read_questions(out / "eval" / "know" / "questions.jsonl")
    for question, fact in zip(questions, facts, strict=True):
        assert question.answers == fact.answers and question.source is None
    assert len({fact.held_out for fact in facts}) == 3


def test_reading_texts_and_banks_name_none_of_them(made: Made, splits: EntitySplits) -> None:
    out, _ = made
    told = "\n".join(training_texts(out))
    told += "".join(p.read_text() for p in out.glob("eval/*/bank/references.jsonl"))
    told += "".join(text for row in rows_of(out / "know", "train") for text in own_texts(row))
    for fact in known_facts(out, splits):
        assert not re.search(rf"(?<!\w){re.escape(fact.subject)}(?!\w)", told), fact


def test_it_names_nothing_that_the_banks_ask(made: Made, splits: EntitySplits) -> None:
    out, _ = made
    told = "\n".join(row["text"] for row in rows_of(out / "know", "train"))
    facts = {fact.question(0): fact for fact in (*splits.val, *splits.test)}
    rows = [json.loads(row) for p in out.glob("eval/[vt]*/questions.jsonl") for row in p.open()]
    assert len(rows) == 75
    for subject in {facts[row["question"]].subject for row in rows}:
        assert not re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", told), subject


def test_a_fact_that_names_what_is_asked_is_not_chosen() -> None:
    config = settings("know.facts=1")
    left = [EntityFact("Ada", "spouse", ("Bob Ray",)), EntityFact("Cy", "spouse", ("Dot",))]
    for name, subject in (("Bob Ray", "Cy"), ("Ada", "Cy"), ("Dot", "Ada"), ("Cy", "Ada")):
        (chosen,) = choose_known(left, config, asked=Names({name}))
        assert chosen.subject == subject
    with pytest.raises(DataError, match="leave 0: lower it"):
        choose_known([EntityFact("Peru", "capital", ("Lima",))], config, asked=Names(()))


def own_texts(row: dict[str, object]) -> list[str]:
    own = row["own"]
    assert isinstance(own, list)
    return [one["text"] for one in own if one]


def test_each_is_told_and_asked_in_every_other_wording(made: Made, splits: EntitySplits) -> None:
    out, _ = made
    rows = [row["text"] for row in rows_of(out / "know", "train") if row["kind"] == "known"]
    told = "\n".join(rows)
    times: Counter[str] = Counter()
    for fact in known_facts(out, splits):
        assert fact.question(fact.held_out) not in told
        others = [n for n in range(len(WORDINGS[fact.relation].questions)) if n != fact.held_out]
        asked = sum(
            told.count(f"Question: {fact.question(n)}\nAnswer: {fact.answers[0]}") for n in others
        )
        assert asked == sum(told.count(fact.question(n)) for n in others)
        times["asked"] += asked > 0
        times["told"] += told.count(fact.subject) > asked
    assert times["asked"] > 50 and times["told"] > 50


def test_a_row_does_not_answer_itself(made: Made, splits: EntitySplits) -> None:
    out, _ = made
    facts = known_facts(out, splits)
    for row in rows_of(out / "know", "train"):
        if row["kind"] == "known":
            assert all(row["text"].count(fact.subject) <= 1 for fact in facts)
            assert not any(row["own"])


def test_validation_asks_in_the_wording_kept(made: Made, splits: EntitySplits) -> None:
    out, _ = made
    kept = {fact.question(fact.held_out) for fact in known_facts(out, splits)}
    rows = [row for row in rows_of(out / "know", "val") if row["kind"] == "known"]
    asked = [q for row in rows for q in re.findall(r"Question: (.+)\n", row["text"])]
    assert asked and set(asked) <= kept
    assert all(row["text"].count("\n") == 2 * row["text"].count("Question: ") - 1 for row in rows)


def test_reading_has_its_share(made: Made) -> None:
    out, report = made
    kinds = report.folders["know"].rows
    assert {"known", "memory"} <= set(kinds)
    lengths = TokenDataset.open(out / "know" / "tokens").document_lengths()
    known = [row["kind"] == "known" for row in rows_of(out / "know", "train")]
    share = 1 - lengths[known].sum() / lengths.sum()
    assert abs(share - settings().know.reading) < 0.05
    assert (lengths > settings().know.row_tokens / 2).all()  # one of them fills a row of a batch
    references = ChunkReferences.open(
        out / "know" / "references", tokens=out / "know" / "tokens", split="train"
    )
    assert references.num_references == report.folders["know"].references - val_references(out)
    others, mine = (
        {row["text"] for row in rows_of(folder, "train") if row["kind"] != "prose"}
        for folder in (out / "memory" / "level3", out / "know")
    )
    assert not others & mine


def val_references(out: Path) -> int:
    return sum(one is not None for row in rows_of(out / "know", "val") for one in row["own"])
