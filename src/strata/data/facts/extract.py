"""How `factbook.jsonl` and `articles.jsonl` were made of the CIA World Factbook.

Run as `python -m strata.data.facts.extract FACTBOOK.parquet FOLDER`, with (country, field, text)
rows. Of facts, only answers that a person would give in a few words are kept: at most `MAX_WORDS`
words, no digits where a name is asked for. And only relations whose answers belong to one country
each (95% distinct or more): a currency or an anthem is shared by many, so a model can answer it
without knowing the country. Articles hold the fields that facts were taken from and some others,
cut short; every paragraph names its country, for a reference may begin with any of them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow.parquet as pq

MAX_WORDS = 6
MAX_FIELD_CHARS = 300
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


def articles(rows: Iterable[dict[str, str]], countries: Iterable[str]) -> list[dict[str, str]]:
    """An article {country, text} for each country, sorted, a paragraph a field.

    Args:
        rows: mappings with `country`, `field` and `text`.
        countries: those that get one.
    """
    said: dict[str, dict[str, str]] = {country: {} for country in countries}
    for row in rows:
        fields = said.get(row["country"])
        if fields is not None and row["field"] in _TOLD:
            fields.setdefault(row["field"], _shortened(row["text"]))
    return [
        {
            "country": country,
            "text": "\n\n".join(
                f"{country}, {title}: {fields[field]}"
                for field, title in _TOLD.items()
                if fields.get(field)
            ),
        }
        for country, fields in sorted(said.items())
    ]


def _shortened(text: str) -> str:
    """The first lines, up to the first note, in at most `MAX_FIELD_CHARS` characters."""
    lines = []
    for line in text.split("\n"):
        if re.match(_ASIDE, line):
            break
        lines.append(line.strip())
    joined = "; ".join(filter(None, lines)).removeprefix("name: ")
    if len(joined) <= MAX_FIELD_CHARS:
        return joined
    for end in (". ", "; ", ", ", " "):
        kept, found, _ = joined[:MAX_FIELD_CHARS].rpartition(end)
        if found:
            return kept + end.strip(";, ")
    return joined[:MAX_FIELD_CHARS]


# Fields of an article, in order, and how they are called in it.
_TOLD = {
    "Location": "location",
    "Area - comparative": "area",
    "Climate": "climate",
    "Terrain": "terrain",
    "Elevation": "elevation",
    "Natural resources": "natural resources",
    "Capital": "capital",
    "Government type": "government",
    "Independence": "independence",
    "National holiday": "national holiday",
    "Industries": "industries",
    "Internet country code": "internet country code",
    "Civil aircraft registration country code prefix": "aircraft registration prefix",
}
_ASIDE = r"(note|time difference|daylight saving|time zone|etymology|geographic coordinates)\b"


def main(parquet: str, folder: str) -> None:
    """Write facts and articles of a Factbook parquet file as JSON lines."""
    rows = pq.read_table(parquet, columns=["country", "field", "text"]).to_pylist()
    facts = extract(rows)
    told = articles(rows, {fact["country"] for fact in facts})
    for name, found in (("factbook.jsonl", facts), ("articles.jsonl", told)):
        with (Path(folder) / name).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        print(f"{len(found)} rows written to {folder}/{name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
