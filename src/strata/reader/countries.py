"""References about countries: passages of articles as a bank cuts them, and the facts as sentences.

The quickstart asks about articles of countries that training has not seen. So these texts have the
same paragraphs and wordings, of other countries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from strata.data.facts.factbook import (
    PARAGRAPHS,
    STATEMENTS,
    Fact,
    held_out_countries,
    load_articles,
    load_facts,
    sentence,
)
from strata.errors import DataError
from strata.explicit.cut import cut
from strata.explicit.documents import Document
from strata.explicit.settings import ExplicitMemoryConfig
from strata.reader.draw import Draw
from strata.reader.prose import Split
from strata.reader.settings import Level, ReaderData
from strata.reader.writing import BREAK, UNKNOWN, Count, Said, Told, ask

_PASSAGES = 0.6  # share of references that are passages; the others are sentences
_MOST_PASSAGES = 3  # of one article in a row
_TELLING = 4  # letters of an answer that no other paragraph holds by chance


@dataclass(frozen=True)
class Passage:
    """A reference as a bank cuts it out of an article.

    Attributes:
        country: whose article.
        paragraphs: in order; the first and last may be parts of one.
        facts: by place, what a paragraph states.
    """

    country: str
    paragraphs: tuple[str, ...]
    facts: dict[int, Fact]


@dataclass(frozen=True)
class Articles:
    """The facts of one side's countries, and where these stand.

    Attributes:
        facts: in the order of the file.
        passages: by country, those that state a fact.
        bodies: by relation, what other countries' paragraphs say, with its answer.
    """

    facts: tuple[Fact, ...]
    passages: dict[str, list[Passage]]
    bodies: dict[str, list[tuple[str, str]]]


def read_articles(split: Split, tokenizer: Any, *, reference_tokens: int) -> Articles:
    """Facts and passages of the countries to train with, or of those held out.

    Args:
        split: "train", or another for the countries held out. What one of these shares with a
            country to train with (a capital, a day) is left out of the training side.
        tokenizer: the reader's, a fast one of transformers.
        reference_tokens: the most of a passage.
    """
    held = held_out_countries()
    kept_back = {(fact.relation, fact.answer) for fact in load_facts() if fact.country in held}
    facts: list[Fact] = []
    left_out: list[str] = []
    for fact in load_facts():
        if (fact.country in held) == (split == "train") or fact.answer[0].islower():
            continue  # the other side's, or a description where a name should be
        if split == "train" and (fact.relation, fact.answer) in kept_back:
            left_out.append(_paragraph(fact, ""))
        else:
            facts.append(fact)
    config = ExplicitMemoryConfig(reference_tokens=reference_tokens)
    articles = load_articles()
    passages: dict[str, list[Passage]] = {}
    bodies: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for country in dict.fromkeys(fact.country for fact in facts):
        text = articles[country]
        openings = {_paragraph(fact, ""): fact for fact in facts if fact.country == country}
        found = [
            _passage(country, one.text, openings, tuple(left_out))
            for one in cut(Document(text, country), tokenizer, config)
        ]
        passages[country] = [one for one in found if one.facts]
        for opening, fact in openings.items():
            body = next(p for p in text.split(BREAK) if p.startswith(opening))[len(opening) :]
            if country not in body:
                bodies[fact.relation].append((fact.answer, body))
    return Articles(tuple(facts), passages, dict(bodies))


def _paragraph(fact: Fact, body: str) -> str:
    return f"{fact.country}, {PARAGRAPHS[fact.relation]}: {body}"


def _passage(
    country: str, text: str, openings: Mapping[str, Fact], left_out: tuple[str, ...]
) -> Passage:
    paragraphs = [part for part in text.split(BREAK) if not part.startswith(left_out)]
    facts = {
        place: fact
        for place, part in enumerate(paragraphs)
        for opening, fact in openings.items()
        if part.startswith(opening) and fact.answer in part
    }
    return Passage(country, tuple(paragraphs), facts)


class CountryWriter:
    """Draws countries, and tells of them in passages and in sentences.

    Args:
        articles: of the countries to draw from.
        config: how.
        count: how texts are counted.
    """

    def __init__(self, articles: Articles, *, config: ReaderData, count: Count) -> None:
        self.config = config
        self.count = count
        self._passages = articles.passages
        self._bodies = articles.bodies
        self._of: dict[str, list[Fact]] = defaultdict(list)
        self._answers: dict[str, list[str]] = defaultdict(list)
        for fact in articles.facts:
            self._of[fact.country].append(fact)
            self._answers[fact.relation].append(fact.answer)

    def references(
        self, draw: Draw, count: int, level: Level, *, most_tokens: int | None = None
    ) -> list[Told]:
        """References of at most so many tokens; a country stands in one, or a few of its passages.

        Raises:
            DataError: there are not so many countries.
        """
        most = min(self.config.reference_tokens, most_tokens or self.config.reference_tokens)
        names = self._names(draw)
        told: list[Told] = []
        while len(told) < count:
            size = draw.between(*level.facts)
            if draw.chance(_PASSAGES):
                passages = self._passages[next(names)]
                first = draw.below(len(passages)) if passages else 0
                for passage in passages[first : first + draw.between(1, _MOST_PASSAGES)]:
                    told.append(self._passage(draw, passage, most))
            elif draw.chance(0.5):
                told.append(self._sentences(draw, draw.order(self._of[next(names)])[:size], most))
            else:
                facts = [draw.pick(self._of[next(names)]) for _ in range(size)]
                told.append(self._sentences(draw, facts, most))
        return draw.order(told[:count])

    def missing(self, draw: Draw, told: Sequence[Told]) -> str | None:
        """A line that asks for what these references do not say; None where none was found.

        Half of these ask for something else of a country that they tell of, the others for another
        country.
        """
        texts = "\n".join(one.text for one in told)
        facts = [said.fact for one in told for said in one.said]
        fact = draw.pick(facts)
        assert isinstance(fact, Fact)
        if draw.chance(0.5):
            others = [Fact(fact.country, relation, UNKNOWN) for relation in PARAGRAPHS]
            stated = {(one.country, one.relation) for one in facts if isinstance(one, Fact)}
            others = [
                other
                for other in others
                if (other.country, other.relation) not in stated
                and _paragraph(other, "") not in texts
                and not _gives_away(other, texts)
            ]
        else:
            names = [name for name in self._of if name not in texts]
            others = [Fact(name, fact.relation, UNKNOWN) for name in names]
        return ask(draw, draw.pick(others), UNKNOWN) if others else None

    def _names(self, draw: Draw) -> Iterator[str]:
        """Each country once."""
        yield from draw.order(list(self._of))
        raise DataError(
            f"a row tells of more than the {len(self._of)} countries there are: give a level with "
            "countries fewer references or facts"
        )

    def _passage(self, draw: Draw, passage: Passage, most: int) -> Told:
        """A passage in which some facts are another country's; sentences where it does not fit."""
        swapped = {
            place: draw.pick(self._bodies[fact.relation])
            for place, fact in passage.facts.items()
            if draw.chance(self.config.swapped)
        }
        for chosen in (swapped, {}):
            told = _tell(passage, chosen)
            if self.count([told.text])[0] <= most:
                return told
        return self._sentences(draw, list(passage.facts.values()), most)

    def _sentences(self, draw: Draw, facts: Sequence[Fact], most: int) -> Told:
        """Facts as sentences, as many as fit; one is always told."""
        said = [self._say(draw, fact) for fact in facts]
        while True:
            text = " ".join(one.sentence for one in said)
            if len(said) == 1 or self.count([text])[0] <= most:
                return Told(text, tuple(said))
            said.pop()

    def _say(self, draw: Draw, fact: Fact) -> Said:
        answer = fact.answer
        if draw.chance(self.config.swapped):
            other = draw.pick(self._answers[fact.relation])
            if fact.country not in other:
                answer = other
        return Said(fact, answer, sentence(fact, answer, draw.pick(STATEMENTS)))


def _tell(passage: Passage, swapped: Mapping[int, tuple[str, str]]) -> Told:
    """A passage with other answers, and without the paragraphs that would give the true ones."""
    texts = dict(enumerate(passage.paragraphs))
    for place, (_, body) in swapped.items():
        texts[place] = _paragraph(passage.facts[place], body)
    hidden = {
        place
        for place, text in texts.items()
        if place not in swapped and any(_gives_away(passage.facts[n], text) for n in swapped)
    }
    said = [
        Said(fact, swapped[place][0] if place in swapped else fact.answer, "")
        for place, fact in passage.facts.items()
        if place not in hidden
    ]
    return Told(
        BREAK.join(text for place, text in texts.items() if place not in hidden), tuple(said)
    )


def _gives_away(fact: Fact, text: str) -> bool:
    """Whether a text that is no paragraph of a fact's own tells its answer."""
    if fact.relation == "independence":
        return "ndependence" in text  # a holiday
    # A capital may have the name of its country, which begins each paragraph.
    return len(fact.answer) >= _TELLING and fact.answer in text.replace(fact.country, "")
