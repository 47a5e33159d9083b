"""Facts about the world's countries, stated in five wordings each, and articles that hold them.

Facts and articles are an extract of the CIA World Factbook (CC0, see LICENSE-factbook.txt), made by
`extract.py`. Every fact is stated in four of its relation's wordings for training and asked in
the fifth; which one is held out differs from fact to fact, so every wording is seen in training
for other countries, and no question is ever a training sentence.

For what is taught to be read instead of known, it is the countries that are split: no text of the
reader's has a fact, or a part of the article, of those in `held_out_countries()`.
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

# By relation: the wordings that are statements once they are completed, and what the paragraph of
# an article is called in which the fact stands.
STATEMENTS = (0, 1, 3)
PARAGRAPHS = {
    "capital": "capital",
    "highest point": "elevation",
    "internet code": "internet country code",
    "independence": "independence",
    "aircraft prefix": "aircraft registration prefix",
}

# About a third of the countries: those of which the train file of EntityQuestions asks nothing, by
# this or another name. A hash would be the plainer rule, but a reader learns from those questions
# too, and would have met half of what it held out.
_HELD_OUT = """
Akrotiri (Sovereign Base)|American Samoa|Andorra|Anguilla|Antigua and Barbuda|Armenia
Ashmore and Cartier Islands|Azerbaijan|Belgium|Bolivia|Bouvet Island
British Indian Ocean Territory|Burma|Cambodia|Cameroon|Clipperton Island
Cocos (Keeling) Islands|Costa Rica|Croatia|Cuba|Cyprus|Dhekelia (Sovereign Base)|Djibouti
Dominican Republic|Ecuador|Equatorial Guinea|Falkland Islands|Faroe Islands|Fiji
French Southern and Antarctic Lands|Ghana|Gibraltar|Greece|Grenada|Guam|Guatemala|Guernsey
Guinea-Bissau|Heard Island and McDonald Islands|Honduras|Hong Kong|Hungary|Isle of Man
Jan Mayen|Jersey|Kosovo|Kyrgyzstan|Latvia|Macau|Malaysia|Maldives|Mali|Mexico|Moldova|Mongolia
Morocco|Mozambique|Niger|Norfolk Island|Norway|Oman|Pakistan|Panama|Paraguay|Peru
Pitcairn Islands|Saint Barthelemy|Saint Helena|Saint Martin|Saint Pierre and Miquelon
Saint Vincent and the Grenadines|San Marino|Sao Tome and Principe|Seychelles|Sierra Leone
Singapore|The Bahamas|Tokelau|Tonga|Tunisia|Turkey|US Pacific Island Wildlife Refuges
US Virgin Islands|United Arab Emirates|Vanuatu|Vatican City (Holy See)|West Bank|Western Sahara
"""


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


def held_out_countries() -> frozenset[str]:
    """The countries that no reader is taught with: it is asked about them."""
    return frozenset(_HELD_OUT.strip().replace("\n", "|").split("|"))


def load_articles() -> dict[str, str]:
    """By country, some 1,000 characters of the Factbook, in which its facts stand too."""
    text = resources.files(__package__).joinpath("articles.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return {row["country"]: row["text"] for row in rows}


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


def sentence(fact: Fact, answer: str, wording: int) -> str:
    """A wording completed with this answer, whether it is the fact's own or another."""
    return f"{WORDINGS[fact.relation][wording].format(country=fact.country)} {answer}."


def plain_questions(fact: Fact) -> tuple[str, str]:
    """The questions in two of the wordings, without what introduces question and answer."""
    asked = (WORDINGS[fact.relation][wording].format(country=fact.country) for wording in (2, 4))
    one, other = (text.removeprefix("Question: ").partition("?")[0] + "?" for text in asked)
    return one, other


def _state(fact: Fact, wording: int) -> Statement:
    prompt = WORDINGS[fact.relation][wording].format(country=fact.country)
    return Statement(prompt=prompt, completion=f" {fact.answer}.")
