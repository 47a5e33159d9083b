"""The facts that come with strata, and how they were extracted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from strata.data.facts.entities import load_facts as load_entity_facts
from strata.data.facts.extract import MAX_FIELD_CHARS, articles, extract, main
from strata.data.facts.factbook import (
    PARAGRAPHS,
    WORDINGS,
    Fact,
    held_out_countries,
    load_articles,
    load_facts,
    plain_questions,
    question,
    sentence,
    training_statements,
)


def test_there_are_over_a_thousand_distinct_facts() -> None:
    facts = load_facts()
    assert len(facts) >= 1_000
    assert len({(fact.country, fact.relation) for fact in facts}) == len(facts)
    assert {fact.relation for fact in facts} == set(WORDINGS)


def test_answers_belong_to_one_country_each() -> None:
    for relation in WORDINGS:
        answers = [fact.answer for fact in load_facts() if fact.relation == relation]
        assert len(set(answers)) >= 0.95 * len(answers), relation


def test_no_question_is_a_training_sentence_or_its_prompt() -> None:
    facts = load_facts()
    told = training_statements(facts)
    prompts = {statement.prompt for statement in told}
    sentences = {statement.prompt + statement.completion for statement in told}
    for fact in facts:
        asked = question(fact)
        assert asked.prompt not in prompts
        assert asked.prompt + asked.completion not in sentences


def test_every_fact_is_told_in_four_wordings_and_asked_in_the_fifth() -> None:
    facts = load_facts()
    told = training_statements(facts)
    assert len(told) == 4 * len(facts)
    for fact in facts[::97]:
        mine = {w.format(country=fact.country) for w in WORDINGS[fact.relation]}
        seen = {s.prompt for s in told if s.prompt in mine}
        assert mine - seen == {question(fact).prompt}


def test_every_wording_is_trained_for_some_country_and_held_out_for_another() -> None:
    held_out = {(fact.relation, fact.held_out) for fact in load_facts()}
    assert held_out == {(relation, w) for relation in WORDINGS for w in range(5)}


@pytest.mark.parametrize(
    ("field", "text", "relation", "answer"),
    [
        ("Capital", "name: N'Djamena\netymology: of Arabic origin", "capital", "N'Djamena"),
        ("Capital", "name: Pristina (Prishtine, Prishtina)", "capital", "Pristina"),
        (
            "Elevation",
            "highest point: Tahat 2,908 m\nlowest point: x -40 m",
            "highest point",
            "Tahat",
        ),
        ("Internet country code", ".xk\nnote: temporary", "internet code", ".xk"),
        ("Independence", "5 July 1962 (from France)", "independence", "5 July 1962"),
        ("Civil aircraft registration country code prefix", "7T", "aircraft prefix", "7T"),
    ],
)
def test_extraction_reads_each_field(field: str, text: str, relation: str, answer: str) -> None:
    facts = extract([{"country": "X", "field": field, "text": text}])
    assert facts == [{"country": "X", "relation": relation, "answer": answer}]


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("Capital", "name: none"),
        ("Elevation", "highest point: unnamed location 3 m"),
        ("Internet country code", "metropolitan France - .fr; Guadeloupe - .gp"),
        ("Independence", "no official date of independence: 486"),
        ("Terrain", "mostly high plateau"),
    ],
)
def test_extraction_leaves_out_what_has_no_short_answer(field: str, text: str) -> None:
    assert extract([{"country": "X", "field": field, "text": text}]) == []


def test_the_extraction_command_writes_sorted_json_lines(tmp_path: Path) -> None:
    rows = [
        {"country": "B", "field": "Capital", "text": "name: Bee"},
        {"country": "A", "field": "Capital", "text": "name: Ay"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    main(str(tmp_path / "in.parquet"), str(tmp_path))
    facts, told = (
        [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        for name in ("factbook.jsonl", "articles.jsonl")
    )
    assert [fact["answer"] for fact in facts] == ["Ay", "Bee"]
    assert told == [
        {"country": "A", "text": "A, capital: Ay"},
        {"country": "B", "text": "B, capital: Bee"},
    ]


def test_every_fact_stands_in_its_countrys_article() -> None:
    told = load_articles()
    for fact in load_facts():
        assert fact.answer in told[fact.country], fact
    for country, text in told.items():
        paragraphs = text.split("\n\n")
        assert all(part.startswith(f"{country}, ") for part in paragraphs)
        assert all(len(part) < MAX_FIELD_CHARS + len(country) + 40 for part in paragraphs)


def test_every_fact_stands_in_the_paragraph_of_its_relation() -> None:
    told = load_articles()
    for fact in load_facts():
        opening = f"{fact.country}, {PARAGRAPHS[fact.relation]}: "
        found = [part for part in told[fact.country].split("\n\n") if part.startswith(opening)]
        assert len(found) == 1 and fact.answer in found[0], fact


def test_about_a_third_of_the_countries_are_held_out() -> None:
    held, countries = held_out_countries(), set(load_articles())
    assert held < countries and 0.33 < len(held) / len(countries) < 0.45
    counts = Counter((fact.relation, fact.country in held) for fact in load_facts())
    assert all(counts[relation, True] >= 50 for relation in WORDINGS)


def test_no_question_of_the_train_file_asks_about_them() -> None:
    """As far as the extract shows; the rule is of the whole file."""
    held = {name.casefold() for name in held_out_countries()}
    train, _, _ = load_entity_facts(max_bytes=48)
    assert not [fact for fact in train if fact.subject.casefold() in held]


def test_wordings_are_completed_and_asked_plainly() -> None:
    peru = Fact("Peru", "capital", "Lima")
    assert sentence(peru, "Quito", 3) == "The seat of government of Peru is Quito."
    assert plain_questions(peru) == (
        "What is the capital of Peru?", "Which city is the capital of Peru?",
    )  # fmt: skip
    for relation in WORDINGS:
        asked = plain_questions(Fact("Peru", relation, ""))
        assert len(set(asked)) == 2
        assert all(q.endswith("?") and "Peru" in q and "Question" not in q for q in asked)


def test_articles_hold_whole_clauses_and_no_notes() -> None:
    rows = [
        {"country": "A", "field": "Climate", "text": "dry" + "; very dry" * 40},
        {"country": "A", "field": "Capital", "text": "name: Ay\netymology: of old"},
        {"country": "A", "field": "Terrain", "text": "flat\nhilly in the west\nnote: mostly"},
        {"country": "A", "field": "Flag", "text": "left out"},
        {"country": "C", "field": "Climate", "text": "no fact of this one"},
    ]
    (one,) = articles(rows, ["A"])
    climate, terrain, capital = one["text"].split("\n\n")
    assert climate.endswith("; very dry") and len(climate) <= MAX_FIELD_CHARS + len("A, climate: ")
    assert terrain == "A, terrain: flat; hilly in the west"
    assert capital == "A, capital: Ay"
