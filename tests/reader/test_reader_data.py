"""The reader's texts: every answer can be read where it is asked for, and nothing is given away."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reader_texts import (
    SENTENCES,
    SMALL,
    lines_of,
    reading_folders,
    rows_of,
    settings,
    states,
    training_texts,
)
from tokenizers import Tokenizer

from strata.config import apply_override, validate
from strata.data.dataset import TokenDataset
from strata.data.facts.entities import EntitySplits, question_files
from strata.data.facts.entity_wordings import WORDINGS
from strata.data.loader import Loader, LoaderConfig
from strata.data.references import ChunkReferences
from strata.errors import ConfigError, DataError
from strata.evals.questions import contains_answer, read_questions
from strata.explicit.documents import read_documents
from strata.reader.data import ORIGIN_NAME, DataReport, make_data
from strata.reader.draw import Draw
from strata.reader.settings import ReaderData
from strata.reader.writing import UNKNOWN

SPLITS = ("train", "val")
Made = tuple[Path, DataReport]


# What is held out


def test_no_training_text_names_what_is_asked_later(made: Made, splits: EntitySplits) -> None:
    out, _ = made
    told = "\n".join(training_texts(out))
    assert len(told) > 50_000
    held = {fact.subject for fact in (*splits.val, *splits.test)}
    assert len(held) > 1_000
    # Every name whose letters occur is looked for as whole words.
    near = [name for name in held if name in told]
    assert near, "the test would not see a name"
    for name in near:
        assert not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", told), name


def test_evaluation_asks_about_held_subjects_only(made: Made, splits: EntitySplits) -> None:
    out, _ = made
    trained = {(fact.subject.casefold(), fact.relation) for fact in splits.train}
    subjects = {subject for subject, _ in trained}
    for split in ("val", "test"):
        facts = {fact.question(0): fact for fact in getattr(splits, split)}
        for row in map(json.loads, (out / "eval" / split / "questions.jsonl").open()):
            fact = facts[row["question"]]
            assert row["relation"] == fact.relation and set(row["answers"]) == set(fact.answers)
            assert fact.subject.casefold() not in subjects


def test_prose_that_names_them_is_left_out_of_training_alone(made: Made) -> None:
    out, _ = made
    texts = "\n".join(training_texts(out))
    assert "was seen there at times" not in texts and SENTENCES[0] in texts
    held = [row for folder in reading_folders(out) for row in rows_of(folder, "val")]
    assert any("was seen there at times" in row["text"] for row in held if row["kind"] == "prose")


# References as text


def test_answers_stand_in_front_of_their_questions(made: Made) -> None:
    out, _ = made
    asked = unknown = 0
    for folder in reading_folders(out):
        for row in rows_of(folder, "train"):
            if row["kind"] != "text":
                continue
            for line, question, said in lines_of(row["text"]):
                before = row["text"][: row["text"].index(line)]
                assert states(before, question, said) == (said != UNKNOWN), row
                asked, unknown = asked + 1, unknown + (said == UNKNOWN)
    assert asked > 150 and 5 < unknown < 0.2 * asked


def test_the_first_levels_answer_everything_and_tell_of_no_country(made: Made) -> None:
    """They have no such share, and their bytes are those of data made before there were any."""
    out, _ = made
    for folder in (out / "text" / "level1", out / "memory" / "level1"):
        rows = rows_of(folder, "train")
        assert {row["kind"] for row in rows} <= {"text", "memory", "prose"}
        assert not any(f"Answer: {UNKNOWN}" in row["text"] for row in rows)


def test_levels_have_the_references_and_facts_they_say(made: Made) -> None:
    out, _ = made
    counts: dict[str, Counter[int]] = {}
    for name in ("level1", "level4"):
        counts[name] = Counter()
        for row in rows_of(out / "text" / name, "train"):
            if row["kind"] == "text":
                head = re.split(r"\n\n(?:Question|Recall): ", row["text"])[0]
                counts[name][len(head.split("\n\n"))] += 1
    assert set(counts["level1"]) == {1} and set(counts["level4"]) > {1, 2, 3}


def test_some_statements_are_swapped_and_evaluation_is_true(
    made: Made, splits: EntitySplits
) -> None:
    out, _ = made
    answers = {(f.question(n), a) for f in splits.train for n in range(3) for a in f.answers}
    pairs = [
        (asked, said)
        for folder in reading_folders(out)
        for row in rows_of(folder, "train")
        for _, asked, said in lines_of(row["text"])
        if asked and said != UNKNOWN and not row["kind"].startswith("country")
    ]
    share = sum(pair in answers for pair in pairs) / len(pairs)
    assert 0.45 < share < 0.65  # half are drawn, some of them again the true one


def test_true_texts_where_nothing_is_swapped(tmp_path: Path, splits: EntitySplits) -> None:
    config = settings(
        "swapped=0", "memory.level1.tokens=0", "memory.level3.tokens=0", "know.tokens=0",
        "text.level4.countries=0", "text.level4.unanswerable=0",
    )  # fmt: skip
    make_data(None, (), out=tmp_path / "out", config=config)
    answers = {(f.question(n), a) for f in splits.train for n in range(3) for a in f.answers}
    for row in rows_of(tmp_path / "out" / "text" / "level4", "train"):
        assert row["kind"] == "text"  # no prose was given
        for _, asked, said in lines_of(row["text"]):
            assert not asked or (asked, said) in answers


# References as memories


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["level1", "level3"])
def test_every_token_of_a_line_may_read_what_answers_it(made: Made, name: str, split: str) -> None:
    out, _ = made
    folder, config = out / "memory" / name, settings()
    tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    dataset = TokenDataset.open(folder / "tokens", split=split, verify=True)
    references = ChunkReferences.open(folder / "references", tokens=folder / "tokens", split=split)
    size, chunk, asked, several = config.chunk_tokens, 0, 0, 0
    for number, row in enumerate(rows_of(folder, split)):
        ids = dataset.document(number)
        encoded = tokenizer.encode(row["text"], add_special_tokens=False)
        assert encoded.ids == ids[1:-1].tolist()
        assert (ids[0], ids[-1]) == (1, 2)
        own = references.numbers(np.arange(chunk, chunk := chunk - (-len(ids) // size)))
        if row["kind"] != "memory":
            assert row["kind"] == "country_memory" or (own < 0).all()
            continue
        assert len(ids) > config.memory[name].row_tokens / 2  # one of them fills a row
        starts = np.array([start for start, _ in encoded.offsets])
        first_of: dict[int, int] = {}
        for line, question, said in sorted(
            lines_of(row["text"]), key=lambda x: row["text"].index(x[0])
        ):
            begin = row["text"].index(line)
            tokens = 1 + np.arange(*np.searchsorted(starts, [begin, begin + len(line)]))
            chunks = np.unique(tokens // size).tolist()
            readable = set.intersection(*({*own[max(0, c - 4) : c + 1].tolist()} for c in chunks))
            if said == UNKNOWN:
                assert not any(states(references[n].text, question, said) for n in {*own} - {-1})
                assert own[chunks[0]] >= 0  # there is something to read, and it does not help
                first_of.setdefault(chunks[0], -1)
                continue
            holding = [n for n in readable - {-1} if states(references[n].text, question, said)]
            assert len(holding) == 1, (line, chunks)
            if chunks[0] not in first_of:
                first_of[chunks[0]] = holding[0]
                assert own[chunks[0]] == holding[0]
            asked, several = asked + 1, several + (len(readable) > 1)
    assert asked > 30 and several > 10


def test_a_row_of_a_batch_holds_one_of_them(made: Made) -> None:
    """What training sees: chunks counted from a row's first column are those of the document."""
    out, _ = made
    tokens = out / "memory" / "level3" / "tokens"
    row_tokens = settings().memory["level3"].row_tokens
    config = LoaderConfig(
        batch_size=2, sequence_tokens=row_tokens, packing="document", chunk_tokens=64
    )
    loader = Loader(TokenDataset.open(tokens), config)
    assert loader.num_rows == TokenDataset.open(tokens).num_documents
    for _ in range(3):
        chunks = next(loader)["chunks"]
        for row in chunks:
            row = row[row >= 0]
            assert (row - row[0] == np.arange(len(row)) // 64).all()


def test_references_fit_and_begin_with_no_name(made: Made) -> None:
    out, _ = made
    tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    told = [
        (row["kind"], own["text"])
        for folder in (out / "memory" / "level1", out / "memory" / "level3", out / "know")
        for row in rows_of(folder, "train")
        for own in row["own"]
        if own
    ]
    texts = [text for _, text in told]
    texts += [json.loads(row)["text"] for row in (out / "eval/test/bank/references.jsonl").open()]
    lengths = [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    assert max(lengths) <= settings().reference_tokens and len(texts) > 300
    openings = tuple(s.split("{")[0] for w in WORDINGS.values() for s in w.opens)
    assert all(text.startswith(openings) for kind, text in told if kind == "memory")


def test_rows_fit_and_their_folders_hold_what_was_asked_for(made: Made) -> None:
    out, report = made
    config = settings()
    for name, folder in report.folders.items():
        stage, _, level = name.partition("/")
        given = getattr(config, stage)[level] if level else config.know
        lengths = TokenDataset.open(out / name / "tokens").document_lengths()
        assert lengths.max() <= given.row_tokens
        assert given.tokens <= folder.tokens < given.tokens + given.row_tokens
        assert folder.tokens == lengths.sum() and sum(folder.rows.values()) == len(lengths)
        assert (folder.references > 0) == (stage != "text")
        assert TokenDataset.open(out / name / "tokens", split="val").num_documents == 12
    levels = ("text/level1", "text/level4", "memory/level1", "memory/level3")
    assert set(report.folders) == {*levels, "know"}
    kinds = report.folders["memory/level3"].rows
    assert {"memory", "country_memory", "prose"} <= set(kinds)
    assert set(kinds) <= {"memory", "country_memory", "prose", "text", "country_text"}
    reading = kinds["memory"] + kinds["country_memory"]
    assert reading > sum(kinds.values()) / 2 and kinds["country_memory"] < reading / 2


# Evaluation


@pytest.mark.parametrize(("split", "share"), [("val", 0.25), ("test", 1.0)])
def test_a_bank_answers_its_questions_once(made: Made, split: str, share: float) -> None:
    out, report = made
    folder = out / "eval" / split
    documents = list(read_documents([folder / "bank"], id_field="id"))
    texts = {document.source: document.text for document in documents}
    questions = read_questions(folder / "questions.jsonl")
    assert report.banks[split] == (len(texts), len(questions)) == (80 * share, 60 * share)
    assert len({question.source for question in questions}) == len(questions)
    everything = "\n".join(texts.values())
    for question in questions:
        assert question.source is not None
        assert contains_answer(texts[question.source], question.answers)
        asked = question.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        assert states(texts[question.source], asked, question.answers[0])
        subject = re.escape(max(re.split(r"^\w+ \w+ |\?$", asked), key=len))
        assert len(re.findall(rf"(?<!\w){subject}(?!\w)", everything)) <= 1


# Runs


def folder_bytes(out: Path) -> dict[str, bytes]:
    paths = sorted(path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def test_the_same_settings_make_the_same_bytes(made: Made, prose: Path, tmp_path: Path) -> None:
    out, report = made
    again = tmp_path / "again"
    assert make_data(None, [prose], out=again, config=settings()) == report
    assert folder_bytes(again) == folder_bytes(out)


def test_a_run_that_was_cut_off_goes_on(made: Made, prose: Path, tmp_path: Path) -> None:
    out, report = made
    broken = tmp_path / "broken"
    shutil.copytree(out, broken)
    shutil.rmtree(broken / "memory" / "level1" / "references")
    shutil.rmtree(broken / "memory" / "level3")
    shutil.rmtree(broken / "eval")
    (broken / "memory" / "level3" / "rows").mkdir(parents=True)
    (broken / "memory" / "level3" / "rows" / "train.jsonl.tmp").write_text("half")
    (broken / "report.json").unlink()
    assert make_data(None, [prose], out=broken, config=settings()) == report
    assert folder_bytes(broken) == folder_bytes(out)


def test_another_seed_makes_other_texts(prose: Path, made: Made, tmp_path: Path) -> None:
    out, _ = made
    config = settings("seed=1", "memory.level1.tokens=0", "memory.level3.tokens=0", "know.tokens=0")
    make_data(None, [prose], out=tmp_path / "other", config=config)
    name = "text/level1/rows/train.jsonl"
    assert (tmp_path / "other" / name).read_bytes() != (out / name).read_bytes()


def test_another_origin_is_refused(made: Made, prose: Path, tmp_path: Path) -> None:
    out, _ = made
    with pytest.raises(ConfigError, match=f"from other settings .*{ORIGIN_NAME}"):
        make_data(None, [prose], out=out, config=settings("seed=5"))
    with pytest.raises(ConfigError, match="from other prose "):
        make_data(None, (), out=out, config=settings())
    questions = tmp_path / "questions"
    questions.mkdir()
    for file in question_files():
        rows = gzip.decompress(file.path.read_bytes()).splitlines(keepends=True)
        (questions / file.path.name).write_bytes(gzip.compress(b"".join(rows[1:])))
    with pytest.raises(ConfigError, match="from other questions "):
        make_data(questions, [prose], out=out, config=settings())
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        make_data(None, (), out=tmp_path, config=settings())


def test_a_given_tokenizer_counts_and_writes_them(made: Made, prose: Path, tmp_path: Path) -> None:
    """Other texts for a model that is there: of the same facts, with the same questions."""
    out, _ = made
    config = settings(
        "chunk_tokens=32", "reach=3", "text.level1.tokens=0", "memory.level3.tokens=0"
    )
    given, other = out / "tokenizer", tmp_path / "other"
    for _ in range(2):  # finished folders are kept
        make_data(None, [prose], out=other, config=config, tokenizer=given)
    same = [
        "tokenizer/tokenizer.json",
        "eval/val/questions.jsonl",
        "eval/val/bank/references.jsonl",
    ]
    for name in (*same, "text/level4/rows/train.jsonl"):
        assert (other / name).read_bytes() == (out / name).read_bytes()
    tokens = other / "memory" / "level1" / "tokens"
    assert ChunkReferences.open(
        other / "memory" / "level1" / "references", tokens=tokens
    ).chunk_tokens == 32  # fmt: skip
    with pytest.raises(ConfigError, match="from other tokenizer "):
        make_data(None, [prose], out=other, config=config)
    with pytest.raises(DataError, match=r"no tokenizer.json in .*/nowhere: give"):
        make_data(None, [prose], out=tmp_path / "x", config=config, tokenizer=tmp_path / "nowhere")


def test_too_few_facts_are_said(tmp_path: Path) -> None:
    config = settings("bank_references=90000")
    with pytest.raises(DataError, match="lower bank_references"):
        make_data(None, (), out=tmp_path / "bank", config=config)
    config = settings("know.facts=3000")
    with pytest.raises(DataError, match=r"know\.facts is 3,000, the banks leave .*: lower it"):
        make_data(None, (), out=tmp_path / "known", config=config)
    for level, said in (
        ("{tokens: 1, row_tokens: 60000, facts: [32, 32]}", "facts on different subjects"),
        ("{tokens: 1, row_tokens: 60000, facts: [1, 1], countries: 1}", "than the 163 countries"),
    ):
        config = settings(f"memory.level3={level}", "as_text=0", "know.tokens=0")
        with pytest.raises(DataError, match=said):
            make_data(None, (), out=tmp_path / said, config=config)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("text.level1.facts=[3, 2]", "smaller number first"),
        ("text.level1.row_tokens=20", "row_tokens"),
        ("questions=81", "at most one question a reference"),
        ("plain=0.95", "at most 1 together"),
        ("max_name_bytes=100", "max_name_bytes"),
        ("text.level1.smell=1", "smell"),
        ("text.level1.countries=2", "countries"),
        ("know.reading=1", "know.reading"),
        ("memory={}", "know.reading takes rows of the last memory level"),
    ],
)
def test_settings_that_cannot_be_are_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(override)


def test_settings_survive_their_file() -> None:
    tree: dict[str, Any] = json.loads(settings().model_dump_json())
    apply_override(tree, "seed=3")
    assert validate(ReaderData, tree, origin="here") == settings("seed=3")


def test_draws_are_fair_and_named() -> None:
    draws = [Draw(0, "a", n) for n in range(4000)]
    assert abs(Counter(d.below(4) for d in draws)[3] / 4000 - 0.25) < 0.03
    assert Counter(Draw(0, n).between(2, 3) for n in range(100)).keys() == {2, 3}
    orders = Counter(tuple(Draw(1, n).order("abc")) for n in range(6000))
    assert len(orders) == 6 and max(orders.values()) < 1.2 * min(orders.values())
    assert Draw(0, "a").pick(range(10**6)) != Draw(0, "b").pick(range(10**6))


# The command


def test_the_command_makes_the_same(
    run: Callable[..., tuple[int, str, str]], made: Made, prose: Path
) -> None:
    out, report = made
    code, printed, err = run("reader", "data", *SMALL, "--out", out, "--prose", prose)
    assert code == 0, err
    assert f"eval/test: {report.banks['test'][0]} references" in printed
    code, printed, err = run("reader", "data", *SMALL, "--out", out, "--prose", prose, "--json")
    assert code == 0 and json.loads(printed)["banks"]["test"] == list(report.banks["test"]), err


def test_wrong_input_is_one_line(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    for arguments, expected in (
        (("--questions", tmp_path / "no"), "give the folder of EntityQuestions"),
        (("--prose", tmp_path / "no"), "no source at"),
        (("seed",), "not of the form"),
        (("sed=1",), "sed"),
    ):
        code, printed, err = run("reader", "data", "--out", tmp_path / "out", *arguments)
        assert code == 2 and not printed
        assert expected in err and err.count("\n") == 1, err
