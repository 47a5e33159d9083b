"""Facts about the world's countries, stated in five wordings each, and articles that hold them.

Facts and articles are an extract of the CIA World Factbook (CC0, see LICENSE-factbook.txt), made by
`extract.py`. Every fact is stated in four of its relation's wordings for training and asked in
the fifth; which one is held out differs from fact to fact, so every wording is seen in training
for other countries, and no question is ever a training sentence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

# Each wording is a prompt; the answer and a full stop complete it.
WORDINGS: dict[str, tuple[str, ...]] = {
    "capital": (
        "The capital of {country} is",
        "{country} is governed from its capital city,",
        "Question: What is the capital of {country}? Answer:",
        "The seat of government of {country} is",
        "Which city is the capital of {country}? It is",
    ),
    "highest point": (
        "The highest point in {country} is",
        "No place in {country} is higher than",
        "Question: What is the highest point of {country}? Answer:",
        "Climbers who want to stand on top of {country} go to",
        "What is the top of {country} called? It is",
    ),
    "internet code": (
        "The internet country code of {country} is",
        "Web addresses in {country} end in",
        "Question: What is the internet domain of {country}? Answer:",
        "The top-level domain given to {country} is",
        "Which domain belongs to {country}? It is",
    ),
    "independence": (
        "{country} became independent on",
        "The independence of {country} dates from",
        "Question: When did {country} gain independence? Answer:",
        "The day on which {country} became a sovereign state is",
        "Since when has {country} been independent? Since",
    ),
    "aircraft prefix": (
        "Aircraft registered in {country} carry the prefix",
        "The civil aircraft code of {country} is",
        "Question: What is the aircraft registration prefix of {country}? Answer:",
        "An airplane from {country} is marked with the letters",
        "Which prefix do planes from {country} bear? They bear",
    ),
}


@dataclass(frozen=True)
class Fact:
    """One fact: the `relation` of `country` is `answer`."""

    country: str
    relation: str
    answer: str

    @property
    def held_out(self) -> int:
        """The wording that this fact is asked in and never trained in."""
        digest = hashlib.sha256(f"{self.relation}\n{self.country}".encode()).digest()
        return digest[0] % len(WORDINGS[self.relation])


@dataclass(frozen=True)
class Statement:
    """A prompt and the words that complete it; their concatenation is the sentence."""

    prompt: str
    completion: str


def load_facts() -> list[Fact]:
    """The facts that come with strata, sorted by relation and country."""
    text = resources.files(__package__).joinpath("factbook.jsonl").read_text(encoding="utf-8")
    return [Fact(**json.loads(line)) for line in text.splitlines()]


def load_articles() -> dict[str, str]:
    """By country, some 1,000 characters of the Factbook, in which its facts stand too."""
    text = resources.files(__package__).joinpath("articles.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return {row["country"]: row["text"] for row in rows}


def held_out_countries() -> frozenset[str]:
    """Countries of which a reader is taught nothing: two in five, by a hash of their names."""
    return frozenset(
        country
        for country in load_articles()
        if hashlib.sha256(country.encode()).digest()[0] % 5 < 2
    )


def training_statements(facts: Sequence[Fact]) -> list[Statement]:
    """Every fact in the four wordings that it is trained in."""
    return [
        _state(fact, wording)
        for fact in facts
        for wording in range(len(WORDINGS[fact.relation]))
        if wording != fact.held_out
    ]


def question(fact: Fact) -> Statement:
    """The fact in its held-out wording."""
    return _state(fact, fact.held_out)


def plain_questions(fact: Fact) -> tuple[str, str]:
    """What the fact answers, as one asks, in two wordings: "What is the capital of Chad?"."""
    asked = [w for w in WORDINGS[fact.relation] if "?" in w]
    one, other = (w.removeprefix("Question: ").partition("?")[0] + "?" for w in asked)
    return one.format(country=fact.country), other.format(country=fact.country)


def _state(fact: Fact, wording: int) -> Statement:
    prompt = WORDINGS[fact.relation][wording].format(country=fact.country)
    return Statement(prompt=prompt, completion=f" {fact.answer}.")
