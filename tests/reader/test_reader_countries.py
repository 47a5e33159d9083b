"""Texts on countries: articles as a bank cuts them, none of a country that is asked about later."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reader_texts import reading_folders, rows_of, settings, texts_of
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from strata.data.dataset import TokenDataset
from strata.data.facts.factbook import (
    PARAGRAPHS,
    STATEMENTS,
    WORDINGS,
    Fact,
    held_out_countries,
    load_articles,
    load_facts,
    plain_questions,
    question,
    sentence,
)
from strata.data.references import ChunkReferences
from strata.explicit.cut import cut
from strata.explicit.documents import Document
from strata.explicit.settings import ExplicitMemoryConfig
from strata.reader.countries import CountryWriter, read_articles
from strata.reader.data import DataReport
from strata.reader.draw import Draw
from strata.reader.settings import Level
from strata.reader.writing import UNKNOWN, Told, ask, count_with

Made = tuple[Path, DataReport]
Asked = tuple[str, str, str]  # country, relation, answer
COUNTRIES = sorted(load_articles(), key=len, reverse=True)


def country_rows(out: Path, split: str) -> list[dict[str, Any]]:
    folders = [*reading_folders(out), out / "know"]
    return [r for f in folders for r in rows_of(f, split) if r["kind"].startswith("country")]


def parse(line: str) -> Asked | None:
    """A line that asks for a fact, in whatever wording; None for one that does not."""
    for relation, wordings in WORDINGS.items():
        asked = [
            f"Question: {q}\nAnswer:" for q in plain_questions(Fact("{country}", relation, ""))
        ]
        for wording in (*wordings, *asked):
            before, after = wording.split("{country}")
            ending = "" if wording in asked else r"\."
            found = re.fullmatch(rf"{re.escape(before)}(.+?){re.escape(after)} (.+?){ending}", line)
            if found and found[1] in COUNTRIES:
                return found[1], relation, found[2]
    return None


def blocks_of(text: str) -> list[tuple[int, str]]:
    """Where each begins and what it is; those of several lines ask, the others are read."""
    begins = [0, *(match.end() for match in re.finditer("\n\n", text))]
    return [(begin, text[begin:].split("\n\n")[0]) for begin in begins]


def lines_of(text: str) -> list[tuple[int, int, Asked]]:
    """Where each line that asks begins and ends, and what it asks."""
    found = []
    for begin, block in blocks_of(text):
        for match in re.finditer(r"Question: .+\nAnswer: .+|.+", block if "\n" in block else ""):
            asked = parse(match[0])
            if asked:
                found.append((begin + match.start(), begin + match.end(), asked))
    return found


def says(text: str, country: str, relation: str) -> set[str]:
    """What a text says that the relation of the country is: begins of paragraphs, sentences."""
    begins = [f"{country}, {PARAGRAPHS[relation]}: "]
    begins += [f"{WORDINGS[relation][n].format(country=country)} " for n in STATEMENTS]
    found = (re.finditer(rf"(?:^|\n|(?<=[.] )){re.escape(begin)}", text) for begin in begins)
    return {text[match.end() :].split("\n")[0] for matches in found for match in matches}


def answers(said: set[str], answer: str) -> bool:
    return any(one.removeprefix("highest point: ").startswith(answer) for one in said)


# What is held out


def test_no_training_text_tells_of_them(made: Made) -> None:
    out, _ = made
    held = sorted(held_out_countries())
    rows = [r for f in [*reading_folders(out), out / "know"] for r in rows_of(f, "train")]
    told = "\n".join(text for row in rows for text in texts_of(row))
    told += (out / "tokenizer-rows.jsonl").read_text(encoding="utf-8")
    assert any(country in told for country in held), "the test would not see a name"
    for country in held:
        name = re.escape(country)
        assert not re.search(rf"(?:^|\n){name}, [a-z ]+: ", told), country
        for relation, wordings in WORDINGS.items():
            for wording in (*wordings, *plain_questions(Fact("{country}", relation, ""))):
                begin = re.escape(wording).replace(r"\{country\}", name)
                assert not re.search(rf"(?<!\w){begin}", told), (country, wording)
    for paragraph in (p for c in held for p in load_articles()[c].split("\n\n")):
        assert paragraph not in told


def test_no_answer_of_theirs_is_trained(made: Made) -> None:
    out, _ = made
    held = {(f.relation, f.answer) for f in load_facts() if f.country in held_out_countries()}
    trained = [asked for row in country_rows(out, "train") for _, _, asked in lines_of(row["text"])]
    assert len(trained) > 200 and len({country for country, _, _ in trained}) > 50
    assert not {(relation, answer) for _, relation, answer in trained} & held
    asked = [asked for row in country_rows(out, "val") for _, _, asked in lines_of(row["text"])]
    assert asked and {country for country, _, _ in asked} <= held_out_countries()


# What is read


@pytest.mark.parametrize("split", ["train", "val"])
def test_text_answers_and_nothing_is_said_twice(made: Made, split: str) -> None:
    out, _ = made
    asked = unknown = 0
    for row in country_rows(out, split):
        if row["kind"] != "country_text":
            continue
        for begin, _, (country, relation, answer) in lines_of(row["text"]):
            read = [block for _, block in blocks_of(row["text"][:begin]) if "\n" not in block]
            said = says("\n\n".join(read), country, relation)
            if answer == UNKNOWN:
                unknown += 1
                assert not said, (row["text"], country, relation)
            else:
                asked += 1
                assert answers(said, answer), (row["text"], country, relation)
    assert split == "val" or (asked > 40 and unknown)


def test_every_token_of_a_line_may_read_what_answers_it(made: Made) -> None:
    out, _ = made
    folder, size = out / "memory" / "level3", settings().chunk_tokens
    tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    dataset = TokenDataset.open(folder / "tokens", split="train")
    references = ChunkReferences.open(
        folder / "references", tokens=folder / "tokens", split="train"
    )
    chunk, asked, unknown, passages = 0, 0, 0, 0
    for number, row in enumerate(rows_of(folder, "train")):
        ids = dataset.document(number)
        own = references.numbers(np.arange(chunk, chunk := chunk - (-len(ids) // size)))
        if row["kind"] != "country_memory":
            continue
        assert len(ids) > settings().memory["level3"].row_tokens / 2
        starts = [
            begin for begin, _ in tokenizer.encode(row["text"], add_special_tokens=False).offsets
        ]
        for begin, end, (country, relation, answer) in lines_of(row["text"]):
            tokens = 1 + np.arange(*np.searchsorted(starts, [begin, end]))
            chunks = np.unique(tokens // size).tolist()
            readable = set.intersection(*({*own[max(0, c - 4) : c + 1].tolist()} for c in chunks))
            if answer == UNKNOWN:
                unknown += 1
                everything = "\n\n".join(references[n].text for n in {*own} - {-1})
                assert not says(everything, country, relation)
                continue
            holding = [
                n for n in readable - {-1}
                if answers(says(references[n].text, country, relation), answer)
            ]  # fmt: skip
            assert len(holding) == 1, (row["text"][begin:end], chunks)
            asked, passages = asked + 1, passages + ("\n\n" in references[holding[0]].text)
    assert asked > 100 and unknown > 3 and passages > 30


def test_about_half_of_what_is_said_is_not_true(made: Made) -> None:
    out, _ = made
    true = {(fact.country, fact.relation, fact.answer) for fact in load_facts()}
    asked = [
        asked
        for row in country_rows(out, "train")
        for _, _, asked in lines_of(row["text"])
        if asked[2] != UNKNOWN
    ]
    assert 0.4 < sum(one in true for one in asked) / len(asked) < 0.65
    by_wording = Counter(relation for _, relation, _ in asked)
    assert set(by_wording) == set(WORDINGS)


def test_every_prompt_of_the_quickstart_is_read() -> None:
    """The wordings in which it asks, each completed as it is there, and as plain questions."""
    for fact in load_facts()[::50]:
        lines = {ask(Draw(0, n), fact, fact.answer) for n in range(200)}
        completed = {sentence(fact, fact.answer, wording) for wording in range(5)}
        asked = question(fact)
        assert asked.prompt + asked.completion in completed
        plain = {f"Question: {q}\nAnswer: {fact.answer}" for q in plain_questions(fact)}
        assert lines == completed | plain


# One by one


@pytest.fixture(scope="module")
def writer(made: Made) -> CountryWriter:
    return make_writer(made[0], 0.5)


def make_writer(out: Path, swapped: float) -> CountryWriter:
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    count = count_with(Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json")))
    articles = read_articles("train", tokenizer, reference_tokens=128)
    return CountryWriter(articles, config=settings(f"swapped={swapped}"), count=count)


def told_of(writer: CountryWriter, number: int) -> list[Told]:
    level = Level(tokens=1, row_tokens=512, facts=(1, 5))
    return [one for n in range(number) for one in writer.references(Draw(0, n), 4, level)]


def test_true_passages_are_what_a_bank_cuts(made: Made) -> None:
    out, _ = made
    writer = make_writer(out, 0.0)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    config = ExplicitMemoryConfig(reference_tokens=128)
    cuts = {
        one.text
        for country, text in load_articles().items()
        for one in cut(Document(text, country), tokenizer, config)
    }
    passages = [one.text for one in told_of(writer, 60) if not one.said[0].sentence]
    # Where a country shares a fact with one that is held out, its paragraph is left out.
    kept = [text in cuts for text in passages]
    assert len(kept) > 80 and sum(kept) > 0.95 * len(kept)


def test_a_passage_with_other_answers_does_not_give_the_true_ones(writer: CountryWriter) -> None:
    true = {(fact.country, fact.relation): fact.answer for fact in load_facts()}
    other = 0
    for told in told_of(writer, 80):
        for said in told.said:
            fact = said.fact
            assert isinstance(fact, Fact)
            assert answers(says(told.text, fact.country, fact.relation), said.answer)
            answer = true[fact.country, fact.relation]
            if said.answer == answer or said.sentence:
                continue
            other += 1
            if fact.relation == "independence":
                own = f"{fact.country}, independence: "
                others = [p for p in told.text.split("\n\n") if not p.startswith(own)]
                assert not any("ndependence" in paragraph for paragraph in others)
            elif len(answer) > 3:
                rest = told.text.replace(said.answer, "").replace(fact.country, "")
                assert answer not in rest, told.text
    assert other > 50


def test_a_row_tells_nothing_of_a_country_twice(writer: CountryWriter) -> None:
    level = Level(tokens=1, row_tokens=512, facts=(1, 5))
    for number in range(80):
        facts = [
            said.fact for told in writer.references(Draw(1, number), 5, level) for said in told.said
        ]
        asked = [(f.country, f.relation) for f in facts if isinstance(f, Fact)]
        assert len(set(asked)) == len(facts)
