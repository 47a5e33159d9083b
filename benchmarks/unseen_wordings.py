"""Facts stated as no training text states them, for `strata knowledge probe`.

The statements that `strata reader data` trains with are those of `data/facts/entity_wordings`, so
a probe that uses them asks about new facts in known words. This writes the same facts in words that
the reader never saw: another sentence, a card of a catalogue, a line of a table, reported speech,
and the question with its answer.

    python benchmarks/unseen_wordings.py DATA/eval/test/questions.jsonl facts.jsonl
    strata knowledge probe facts.jsonl --model READER --out runs/unseen
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from strata.data.facts.entities import EntityFact, asked_fact

WORDINGS = {
    "sentence": "According to the records, the {r} of {s} is {o}.",
    "card": "Catalogue entry. Name: {s}. {R}: {o}.",
    "table": "name | {r}\n{s} | {o}",
    "speech": 'When somebody wanted to know the {r} of {s}, the old clerk said: "That is {o}."',
    "question and answer": "Question: {q}\nAnswer: {o}",
}


def unseen(fact: EntityFact, answer: str) -> dict[str, str]:
    """The fact in each of these words; the question in another wording than the one asked."""
    relation = fact.relation
    places = {
        "{s}": fact.subject,
        "{r}": relation,
        "{R}": relation[0].upper() + relation[1:],
        "{o}": answer,
        "{q}": fact.question(1),
    }
    texts = {}
    for name, wording in WORDINGS.items():
        parts = wording
        for place, text in places.items():
            parts = parts.replace(place, text)
        texts[name] = parts
    return texts


def main(questions: Path, out: Path) -> None:
    with questions.open(encoding="utf-8") as rows, out.open("w", encoding="utf-8") as written:
        for line in rows:
            row = json.loads(line)
            fact = asked_fact(row["question"], row["relation"], row["answers"])
            assert fact is not None, row
            row["texts"] = unseen(fact, row["answers"][0])
            written.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
