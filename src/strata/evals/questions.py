"""Closed-book questions: the file format, the prompt template, and how answers are compared.

A question file is JSON lines, plain or gzip, one object a line, in one of two shapes:

    {"id": ..., "prompt": "The capital of Chad is", "answers": [" N'Djamena"]}
    {"id": ..., "question": "What is the capital of Chad?", "answers": ["N'Djamena", "Ndjamena"]}

`prompt` rows are taken verbatim: prompt and answer are the two halves of a training document.
`question` rows are put through a template and their answers are set off by one space, as published
question sets (Natural Questions, TriviaQA, EntityQuestions) are asked. `"answer": "..."` stands for
a list of one; `id` defaults to the line number; `source` may name the document in a bank that holds
the answer; other fields are ignored.
"""

from __future__ import annotations

import gzip
import json
import re
import string
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strata.errors import ConfigError, DataError

DEFAULT_TEMPLATE = "Question: {question}\nAnswer:"
MAX_LINE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Question:
    """One question, ready to be asked.

    Attributes:
        id: name of the question in reports.
        prompt: the text the model is given.
        answers: accepted answers, bare, for comparison with generated text.
        completions: the same answers as they follow the prompt, leading space included.
        source: the document that holds the answer, as a bank names it, where the row says.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    completions: tuple[str, ...]
    source: str | None = None


def read_questions(path: str | Path, *, template: str = DEFAULT_TEMPLATE) -> list[Question]:
    """Read a question file.

    Args:
        path: JSON lines, gzip when the name ends in `.gz`.
        template: text holding `{question}` once; used for rows with a `question` field.

    Raises:
        ConfigError: the template has no `{question}`.
        DataError: the file is missing, empty or damaged, or a row lacks a field; the message
            names the line.
    """
    return [question for question, _, _ in read_rows(path, template=template)]


def read_rows(
    path: str | Path, *, template: str = DEFAULT_TEMPLATE
) -> list[tuple[Question, dict[str, Any], str]]:
    """The same with all fields of each row, and where it stands: "FILE, line N"."""
    path = Path(path)
    if template.count("{question}") != 1:
        raise ConfigError(f"template {template!r} must hold {{question}} exactly once")
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            row = _parse_json(line, where=where)
            rows.append((_question(row, template=template, where=where, number=number), row, where))
    if not rows:
        raise DataError(f"{path} holds no questions: one JSON object a line is needed")
    return rows


def normalise_answer(text: str) -> str:
    """Lower-case, without punctuation, English articles and repeated spaces.

    Source: the evaluation script of SQuAD (arXiv 1606.05250), used for all open-domain sets since.
    """
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(generated: str, answers: tuple[str, ...]) -> bool:
    """Whether the generated text equals an accepted answer after normalisation."""
    found = _comparable(generated)
    return bool(found) and any(found == _comparable(answer) for answer in answers)


def contains_answer(generated: str, answers: tuple[str, ...]) -> bool:
    """Whether an accepted answer occurs anywhere in the generated text, after normalisation.

    A plain substring test, as published numbers use it: a short answer such as "2" is also found
    inside "1942".
    """
    found = _comparable(generated)
    return any(_comparable(answer) in found for answer in answers)


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _comparable(text: str) -> str:
    # An answer made of articles or punctuation alone ("A", "The The", "%") would normalise to
    # nothing and match everything; it is compared as written.
    return normalise_answer(text) or " ".join(text.lower().split())


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of the file, each bounded in size, so that no archive can exhaust the memory."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    raise DataError(f"{path}, line {number} is longer than {MAX_LINE_BYTES} bytes")
                yield line
    except FileNotFoundError:
        raise DataError(f"no question file at {path}: give a .jsonl or .jsonl.gz file") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder: give a .jsonl or .jsonl.gz file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path} is not a whole gzip file: fetch or compress it again") from None


def _question(row: dict[str, Any], *, template: str, where: str, number: int) -> Question:
    answers = _answers(row, where=where)
    identifier = str(row.get("id", number))
    source = _text(row, "source", where=where) if "source" in row else None
    if "prompt" in row:
        prompt = _text(row, "prompt", where=where)
        return Question(
            id=identifier,
            prompt=prompt,
            answers=tuple(answer.strip() for answer in answers),
            completions=answers,
            source=source,
        )
    if "question" in row:
        # replace, not format: neither the template's other braces nor the question's are fields.
        prompt = template.replace("{question}", _text(row, "question", where=where))
        separator = "" if prompt[-1].isspace() else " "
        stripped = tuple(answer.strip() for answer in answers)
        return Question(
            id=identifier,
            prompt=prompt,
            answers=stripped,
            completions=tuple(separator + answer for answer in stripped),
            source=source,
        )
    raise DataError(f"{where}: no 'question' or 'prompt' field; found {_keys(row)}")


def _parse_json(line: bytes, *, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 (byte {error.start}): convert the file") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits, or deep nesting
        raise DataError(f"{where} is JSON beyond what a question needs: check the file") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} holds {type(row).__name__}, not an object with a 'question'")
    return row


def _answers(row: dict[str, Any], *, where: str) -> tuple[str, ...]:
    if "answers" not in row and "answer" not in row:
        raise DataError(f"{where}: no 'answers' or 'answer' field; found {_keys(row)}")
    given = row["answers"] if "answers" in row else [row["answer"]]
    if not isinstance(given, list) or not given:
        raise DataError(f"{where}: 'answers' must be a list of at least one string")
    if not all(is_text(answer) for answer in given):
        raise DataError(f"{where}: every answer must be a non-empty string, got {_shown(given)}")
    return tuple(dict.fromkeys(given))


def _text(row: dict[str, Any], field: str, *, where: str) -> str:
    value = row[field]
    if not is_text(value):
        raise DataError(f"{where}: {field!r} must be a non-empty string, got {_shown(value)}")
    return value


def is_text(value: Any) -> bool:
    """A string that is not blank and has no lone surrogate (JSON can escape one; UTF-8 cannot)."""
    return (
        isinstance(value, str)
        and bool(value.strip())
        and not any("\ud800" <= character <= "\udfff" for character in value)
    )


def _shown(value: Any) -> str:
    return ascii(value)[:80]


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(sorted(map(str, row)))[:200] or "no fields"
