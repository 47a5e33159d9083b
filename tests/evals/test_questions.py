"""Reading question files, and comparing answers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from strata.errors import ConfigError, DataError
from strata.evals.questions import contains_answer, exact_match, normalise_answer, read_questions


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_question_rows_go_through_the_template(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl", {"id": "a", "question": "Who {x}?", "answers": [" Al ", "B"]}
    )
    (question,) = read_questions(path, template="Q: {question} {y}\nA:")
    assert question.id == "a"
    assert question.prompt == "Q: Who {x}? {y}\nA:"
    assert question.answers == ("Al", "B")
    assert question.completions == (" Al", " B")


def test_template_ending_in_space_adds_none(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {"question": "Who?", "answer": "Al"})
    (question,) = read_questions(path, template="{question}\n")
    assert question.id == "1"
    assert question.completions == ("Al",)


def test_prompt_rows_are_verbatim(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {"prompt": "The capital is", "answers": ["  Rome"]})
    (question,) = read_questions(path)
    assert question.prompt == "The capital is"
    assert question.completions == ("  Rome",)
    assert question.answers == ("Rome",)


def test_gzip_and_blank_lines_and_line_separators(tmp_path: Path) -> None:
    rows = [{"question": "a\u2028b", "answer": "c"}, {"question": "d", "answer": "e"}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path = tmp_path / "q.jsonl.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert [question.id for question in read_questions(path)] == ["1", "3"]


def test_repeated_answers_are_asked_once(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {"prompt": "p", "answers": ["a", "b", "a"]})
    assert read_questions(path)[0].completions == ("a", "b")


@pytest.mark.parametrize("template", ["", "Q:", "{question} {question}"])
def test_template_needs_the_question_once(tmp_path: Path, template: str) -> None:
    path = write(tmp_path / "q.jsonl", {"question": "a", "answer": "b"})
    with pytest.raises(ConfigError, match="exactly once"):
        read_questions(path, template=template)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"answers": ["a"]}', "line 2: no 'question' or 'prompt' field; found answers"),
        (b'{"question": "a"}', "line 2: no 'answers' or 'answer' field; found question"),
        (b'{"question": "a", "answers": []}', "line 2: 'answers' must be a list"),
        (b'{"question": "a", "answers": "b"}', "line 2: 'answers' must be a list"),
        (b'{"question": "a", "answers": [3]}', "line 2: every answer must be"),
        (b'{"question": "a", "answer": 2}', "line 2: every answer must be"),
        (b'{"question": "a", "answers": [" "]}', "line 2: every answer must be"),
        (b'{"question": "a", "answer": "\\ud800"}', "line 2: every answer must be"),
        (b'{"question": " ", "answer": "b"}', "line 2: 'question' must be a non-empty string"),
        (b'{"prompt": 5, "answer": "b"}', "line 2: 'prompt' must be a non-empty string"),
        (b'{"question": ', "line 2 is not JSON"),
        (b"[1]", "line 2 holds list"),
        (b'{"question": "\xff"}', "line 2 is not UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 2 is JSON beyond"),
        (b"[" * 100_000, "line 2 "),
    ],
)
def test_faulty_row_is_named_by_its_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"question": "a", "answer": "b"}\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_faulty_files(tmp_path: Path) -> None:
    for name, content, message in [
        ("empty.jsonl", b"", "holds no questions"),
        ("blank.jsonl", b"\n \n", "holds no questions"),
        ("not.jsonl.gz", b'{"question": "a", "answer": "b"}', "not a whole gzip file"),
        ("cut.jsonl.gz", gzip.compress(b'{"question": 1}' * 99)[:-9], "not a whole gzip file"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_questions(tmp_path / name)
    with pytest.raises(DataError, match="no question file"):
        read_questions(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_questions(tmp_path)


def test_line_longer_than_the_bound_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strata.evals.questions.MAX_LINE_BYTES", 64)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * 1_000_000))
    with pytest.raises(DataError, match="line 1 is longer than 64 bytes"):
        read_questions(path)


def test_normalised_comparison() -> None:
    assert normalise_answer("The  Beatles!") == "beatles"
    assert normalise_answer("Theatre, a") == "theatre"
    assert exact_match("the N'Djamena.", ("Ndjamena",))
    assert not exact_match("Paris, France", ("Paris",))
    assert contains_answer("It is Paris, France", ("paris",))
    assert not contains_answer("Rome", ("Paris", "Lyon"))


def test_answer_of_nothing_but_articles_does_not_match_everything() -> None:
    assert exact_match("A", ("A",))
    assert not exact_match("B", ("A",))
    assert not exact_match("", ("A", "b"))
    assert not contains_answer("xyz", ("The",))
    assert not contains_answer("", ("a",))
