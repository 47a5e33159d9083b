"""How `factbook.jsonl` was made from the CIA World Factbook's (country, field, text) rows.

Run as `python -m strata.data.facts.extract FACTBOOK.parquet OUT.jsonl`. Only answers that a person
would give in a few words are kept: at most `MAX_WORDS` words, no digits where a name is asked for.
And only relations whose answers belong to one country each (95% distinct or more): a currency or
an anthem is shared by many, so a model can answer it without knowing the country.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow.parquet as pq

MAX_WORDS = 6
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = re.compile(rf"^(\d{{1,2}} (?:{_MONTHS}) \d{{4}})\b")


def extract(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Turn Factbook rows into facts {country, relation, answer}, sorted, at most one a pair.

    Args:
        rows: mappings with `country`, `field` and `text`.
    """
    facts: dict[tuple[str, str], str] = {}
    for row in rows:
        relation, read = _FIELDS.get(row["field"], (None, None))
        if relation is None or read is None:
            continue
        answer = read(row["text"])
        if answer and 1 <= len(answer.split()) <= MAX_WORDS:
            facts.setdefault((relation, row["country"]), answer)
    return [
        {"country": country, "relation": relation, "answer": answer}
        for (relation, country), answer in sorted(facts.items())
    ]


def _labelled(label: str, text: str) -> str | None:
    for line in text.split("\n"):
        if line.startswith(label + ":"):
            return line[len(label) + 1 :].strip()
    return None


def _capital(text: str) -> str | None:
    return _name(_labelled("name", text))


def _highest_point(text: str) -> str | None:
    found = re.match(
        r"(.+?) (?:more than )?-?[\d,.]+(?: m\b|$)", _labelled("highest point", text) or ""
    )
    return _name(found.group(1)) if found else None


def _internet_code(text: str) -> str | None:
    found = re.match(r"^(\.[a-z]{2,3})(?:$|[\s;,(])", text)
    return found.group(1) if found else None


def _independence(text: str) -> str | None:
    found = _DATE.match(text)
    return found.group(1) if found else None


def _aircraft_prefix(text: str) -> str | None:
    found = re.match(r"^([A-Z0-9]{1,3})(?:$|[\s;,(])", text)
    return found.group(1) if found else None


def _name(text: str | None) -> str | None:
    if text is None:
        return None
    text = re.split(r"[;(\n/,]| - ", text)[0].strip(' ."“”')
    return None if not text or re.search(r"\d|\bnone\b|\bnote\b|unnamed", text) else text


_FIELDS: dict[str, tuple[str, Callable[[str], str | None]]] = {
    "Capital": ("capital", _capital),
    "Elevation": ("highest point", _highest_point),
    "Internet country code": ("internet code", _internet_code),
    "Independence": ("independence", _independence),
    "Civil aircraft registration country code prefix": ("aircraft prefix", _aircraft_prefix),
}


def main(parquet: str, out: str) -> None:
    """Write the facts of a Factbook parquet file as JSON lines."""
    facts = extract(pq.read_table(parquet, columns=["country", "field", "text"]).to_pylist())
    with Path(out).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(fact, ensure_ascii=False) + "\n" for fact in facts)
    print(f"{len(facts)} facts written to {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
