"""Small reader's data and how tests take them apart again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from strata.data.facts.entity_wordings import WORDINGS
from strata.reader.data import read_settings
from strata.reader.settings import ReaderData
from strata.reader.writing import UNKNOWN

SMALL = (
    "vocab_size=700", "tokenizer_rows=30", "val_rows=12", "bank_references=80", "questions=60",
    "text.level1.tokens=2500", "text.level2.tokens=0", "text.level3.tokens=0",
    "text.level4.tokens=7000", "memory.level1.tokens=4000", "memory.level2.tokens=0",
    "memory.level3.tokens=20000", "know.tokens=12000", "know.facts=60",
    "text.level4.unanswerable=0.1", "memory.level3.unanswerable=0.1",
)  # fmt: skip
SENTENCES = (
    "The river runs to the sea under a low bridge and is slow there.",
    "Some of the stones on the hill were brought there long before.",
    "In spring the snow goes early, and the roads are dry by noon.",
    "Nobody knows for certain when the first of the houses was made.",
)


def settings(*overrides: str) -> ReaderData:
    return read_settings([*SMALL, *overrides], extract=True)


def write_prose(path: Path, names: list[str]) -> Path:
    """Articles, of which some name what no training text may name."""
    rows = []
    for number in range(200):
        sentences = [SENTENCES[(number + n) % 4] for n in range(4)]
        if number % 3 == 0:
            sentences[1] = f"They say that {names[number % len(names)]} was seen there at times."
        rows.append({"text": f"Article {number}\n{' '.join(sentences)}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (folder / "rows" / f"{split}.jsonl").open(encoding="utf-8")]


def texts_of(row: dict[str, Any]) -> Iterator[str]:
    """A row's text, and its references."""
    yield row["text"]
    yield from (own["text"] for own in row.get("own", ()) if own)


def reading_folders(out: Path) -> list[Path]:
    """The levels that teach reading."""
    return sorted([*out.glob("text/*"), *out.glob("memory/*")])


def training_texts(out: Path) -> Iterator[str]:
    """Everything that teaches reading and trains the tokenizer, references included."""
    for line in (out / "tokenizer-rows.jsonl").open(encoding="utf-8"):
        yield json.loads(line)["text"]
    for folder in reading_folders(out):
        for row in rows_of(folder, "train"):
            yield from texts_of(row)


def lines_of(text: str) -> list[tuple[str, str, str]]:
    """(whole line, what it asks or "", what it says) of each question or repetition."""
    asked = re.findall(r"Question: (.+)\nAnswer: (.+)", text)
    lines = [(f"Question: {q}\nAnswer: {a}", q, a) for q, a in asked]
    return lines + [(f"Recall: {s}", "", s) for s in re.findall(r"Recall: (.+)", text)]


def states(reference: str, asked: str, said: str) -> bool:
    """Whether a reference answers: it says both the subject asked for and the answer.

    For what is unknown, whether it says anything at all.
    """
    if not asked:
        return said in reference
    for wordings in WORDINGS.values():
        for wording in wordings.questions:
            before, after = wording.split("{s}")
            if asked.startswith(before) and asked.endswith(after):
                subject = asked[len(before) : len(asked) - len(after)]
                for told in wordings.statements:
                    sentence = re.escape(told).replace(r"\{a\}", "an?")
                    sentence = sentence.replace(r"\{s\}", re.escape(subject))
                    # A full stop that ends a name ends the sentence too.
                    answer = ".{1,40}?" if said == UNKNOWN else re.escape(said)
                    sentence = sentence.replace(r"\{o\}", answer).removesuffix(r"\.")
                    if re.search(sentence, reference):
                        return True
    return False
