"""Facts out of EntityQuestions: parsed, worded, and split so that no subject is on two sides."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from strata.data.facts.entities import (
    EntityFact,
    Names,
    load_facts,
    read_facts,
    split_facts,
    state,
)
from strata.data.facts.entity_wordings import RELATION_OF, WORDINGS, article
from strata.errors import DataError


def rows(*given: tuple[str, str, list[str]]) -> str:
    return "".join(
        json.dumps({"id": f"r{n}", "relation": code, "question": asked, "answers": answers}) + "\n"
        for n, (code, asked, answers) in enumerate(given)
    )


def read(tmp_path: Path, text: str, *, max_bytes: int = 40) -> tuple[list[EntityFact], int]:
    path = tmp_path / "questions.jsonl"
    path.write_text(text, encoding="utf-8")
    return read_facts(path, max_bytes=max_bytes)


# Wordings


def test_every_wording_names_what_it_needs_once() -> None:
    assert len(RELATION_OF) == 24
    for wordings in WORDINGS.values():
        assert len(wordings.questions) >= 3 and len(wordings.statements) >= 4
        for question in wordings.questions:
            assert re.findall(r"\{.\}", question) == ["{s}"] and question.endswith("?")
        for statement in wordings.statements:
            assert Counter(re.findall(r"\{[so]\}", statement)) == {"{s}": 1, "{o}": 1}
            assert statement.endswith(".")
        assert len(wordings.opens) >= 2


def test_one_statement_names_the_object_first() -> None:
    for wordings in WORDINGS.values():
        first = [s.index("{o}") < s.index("{s}") for s in wordings.statements]
        assert first == [False] * (len(first) - 1) + [True]


def test_no_two_relations_are_asked_or_told_alike() -> None:
    told = [text for w in WORDINGS.values() for text in (*w.questions, *w.statements)]
    assert len(set(told)) == len(told)


def test_names_are_put_in_as_they_are() -> None:
    assert state("{s} was born in {o}.", "{o}", "a{s}b") == "{o} was born in a{s}b."
    assert state("{s} is owned by {o}.", "Ada", "Acme Inc.") == "Ada is owned by Acme Inc."
    assert state("{s} is {a} {o}.", "Ada", "actor") == "Ada is an actor."
    assert article("poet") == "a"


def test_one_question_of_three_is_kept_for_asking() -> None:
    facts = [EntityFact(f"Ada {n}", "place of birth", ("London",)) for n in range(300)]
    kept = Counter(fact.held_out for fact in facts)
    assert set(kept) == {0, 1, 2} and min(kept.values()) > 60
    assert facts[0].held_out == EntityFact("Ada 0", "place of birth", ("Rome",)).held_out


# Reading


def test_a_question_gives_its_subject(tmp_path: Path) -> None:
    facts, left_out = read(
        tmp_path,
        rows(
            ("P19", "Where was Ada Lovelace born?", ["London"]),
            ("P40", "Who is James T. Kirk's child?", ["David Marcus"]),
            ("P159", "Where is the headquarter of Who Is It?", ["Bonn"]),
        ),
    )
    assert facts == [
        EntityFact("Ada Lovelace", "place of birth", ("London",)),
        EntityFact("James T. Kirk", "child", ("David Marcus",)),
        EntityFact("Who Is It", "headquarters", ("Bonn",)),
    ]
    assert left_out == 0


def test_rows_that_ask_the_same_are_one_fact(tmp_path: Path) -> None:
    asked = "Where is Kent located?"
    facts, _ = read(
        tmp_path,
        rows(("P131", asked, ["England", "Ohio"]), ("P276", asked, ["Ohio", "Kansas"])),
    )
    assert facts == [EntityFact("Kent", "location", ("England", "Ohio", "Kansas"))]


def test_names_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    facts, left_out = read(
        tmp_path,
        rows(
            ("P36", "What is the capital of Pskov Oblast?", ["Pskov"]),
            ("P36", "What is the capital of Oz?", ["The City of Oz", "x" * 41, "Emerald"]),
            ("P19", f"Where was {'y' * 41} born?", ["Rome"]),
            ("P19", "Where was 1984 born?", ["Rome"]),
            ("P19", f"Where was {'é' * 21} born?", ["Rome"]),
            ("P19", "Where was A\nB born?", ["Rome"]),
        ),
    )
    assert facts == [EntityFact("Oz", "capital", ("Emerald",))]
    assert left_out == 5


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 holds list"),
        ('"\\ud800"', "line 1 holds str"),
        (rows(("P9", "Where was A born?", ["b"])), "relation 'P9' is none of P17"),
        (rows(("P19", "Where did A die?", ["b"])), "not of the form 'Where was {s} born?'"),
        (rows(("P19", "Where was  born?", ["b"])), "not of the form"),
        (rows(("P19", "Where was A born?", [])), "answers must be a list"),
        (rows(("P19", "Where was A born?", ["  "])), "answers must be a list"),
        ('{"relation": "P19", "question": 3, "answers": ["b"]}', "'3' is not of the form"),
        ('{"relation": ["P19"], "question": "", "answers": ["b"]}', "is none of P17"),
        (rows(("P19", "Where was A born?", ["b" * 2**20])), "too long"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(DataError) as error:
        read(tmp_path, line)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_missing_and_cut_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file at"):
        read_facts(tmp_path / "none.jsonl.gz", max_bytes=40)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(DataError, match="not a whole gzip file"):
        read_facts(cut, max_bytes=40)
    (tmp_path / "text.gz").write_text("no gzip")
    with pytest.raises(DataError, match="not a whole gzip file"):
        read_facts(tmp_path / "text.gz", max_bytes=40)
    with pytest.raises(DataError, match="cannot be read"):
        read_facts(tmp_path, max_bytes=40)


# Splitting


def test_names_are_found_as_whole_words() -> None:
    names = Names(["Kent", "New York", "New York City", "St. Ives"])
    assert names.found_in("Kentucky, kent, NewYork and New\nYorks") == set()
    assert names.found_in("in (Kent)") == {("Kent",)}
    assert names.found_in("New York City!") == {("New", "York"), ("New", "York", "City")}
    assert names.found_in("St Ives") == {("St", "Ives")}


def test_no_training_fact_names_a_held_subject() -> None:
    train = [
        EntityFact("Kent Opera", "founder", ("Norman Platt",)),
        EntityFact("Dover", "country", ("England",)),
        EntityFact("Ada", "place of birth", ("London",)),
    ]
    dev = [
        EntityFact("dover", "location", ("Kent",)),  # a subject there, but for a capital
        EntityFact("Kent", "country", ("England",)),  # within a longer name
        EntityFact("London", "country", ("England",)),  # an answer
        EntityFact("Rye", "country", ("England",)),
    ]
    splits = split_facts(train, dev, val_share=0.0, seed=0)
    assert splits.train == train and splits.val == [] and splits.test == dev[3:]
    assert (splits.in_train, splits.named_in_train) == (1, 2)


def test_the_extract_is_split_by_subject() -> None:
    train, dev, left_out = load_facts(max_bytes=40)
    assert len(train) > 8_000 and len(dev) > 3_000 and left_out > 0
    assert {fact.relation for fact in train} == {fact.relation for fact in dev} == set(WORDINGS)
    splits = split_facts(train, dev, val_share=0.05, seed=1)
    assert splits == split_facts(train, dev, val_share=0.05, seed=1)
    assert splits != split_facts(train, dev, val_share=0.05, seed=2)
    assert 0.03 * len(train) < len(train) - len(splits.train) < 0.07 * len(train)
    sides = [{f.subject.casefold() for f in part} for part in (splits.train, splits.val)]
    sides.append({f.subject.casefold() for f in splits.test})
    assert all(sides) and sum(map(len, sides)) == len(set.union(*sides))
    # Another way to look for whole words than the splitter's own.
    told = " | ".join(name for f in splits.train for name in (f.subject, *f.answers))
    for fact in (*splits.val, *splits.test):
        at = told.find(fact.subject)
        while at >= 0:
            around = told[at - 1 : at] + told[at + len(fact.subject) :][:1]
            assert any(c.isalnum() or c == "_" for c in around), fact
            at = told.find(fact.subject, at + 1)
