"""References, and the lines that ask for what stands in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from tokenizers import Tokenizer

from strata.data.facts.entities import EntityFact, state
from strata.data.facts.entity_wordings import WORDINGS
from strata.data.facts.factbook import WORDINGS as COUNTRY_WORDINGS
from strata.data.facts.factbook import Fact, plain_questions, sentence
from strata.errors import DataError
from strata.reader.draw import Draw
from strata.reader.settings import Level, ReaderData

Count = Callable[[Sequence[str]], list[int]]
"""Tokens of each text, without special ones."""

BREAK = "\n\n"  # between references, and before the first question
UNKNOWN = "unknown"  # the answer to what no reference says
_MOST_TRIES = 50
# Relations that any person may have, so that a person with one of them can be asked for another.
_OF_PERSONS = (
    "place of birth", "place of death", "spouse", "child", "education", "occupation",
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    """A fact as a reference states it: with this answer, in this sentence.

    Attributes:
        sentence: empty where it is too long to be repeated.
    """

    fact: EntityFact | Fact
    answer: str
    sentence: str


@dataclass(frozen=True)
class Told:
    """A reference and what it states, in its order."""

    text: str
    said: tuple[Said, ...]


def count_with(tokenizer: Tokenizer) -> Count:
    """Count with a tokenizer; "<eos>" in a name stays text."""
    tokenizer.encode_special_tokens = True
    return partial(_count, tokenizer)


def _count(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [len(one.ids) for one in encoded]


class ToldBy(Protocol):
    """What rows are made with: references, and questions that these do not answer."""

    @property
    def config(self) -> ReaderData: ...

    @property
    def count(self) -> Count: ...

    def references(
        self, draw: Draw, count: int, level: Level, *, most_tokens: int | None = None
    ) -> list[Told]: ...

    def missing(self, draw: Draw, told: Sequence[Told]) -> str | None: ...


class Writer:
    """Draws facts and tells them.

    Args:
        facts: to draw from.
        fillers: sentences of prose.
        config: how.
        count: how texts are counted.
        true: state no swapped objects.
    """

    def __init__(
        self,
        facts: Sequence[EntityFact],
        *,
        fillers: Sequence[str],
        config: ReaderData,
        count: Count,
        true: bool = False,
    ) -> None:
        self.config = config
        self.count = count
        self._facts = facts
        self._num_subjects = len({fact.subject.casefold() for fact in facts})
        self._fillers = fillers
        self._swapped = 0.0 if true else config.swapped
        self._of: dict[str, list[EntityFact]] = defaultdict(list)
        answers: dict[str, dict[str, None]] = defaultdict(dict)
        for fact in facts:
            self._of[fact.relation].append(fact)
            answers[fact.relation].update(dict.fromkeys(fact.answers))
        self._answers = {relation: list(found) for relation, found in answers.items()}

    def references(
        self, draw: Draw, count: int, level: Level, *, most_tokens: int | None = None
    ) -> list[Told]:
        """References on different subjects, each of at most so many tokens.

        Raises:
            DataError: there are not so many subjects.
        """
        sizes = [draw.between(*level.facts) for _ in range(count)]
        facts = iter(self._draw_facts(draw, sum(sizes)))
        drawn = [[next(facts) for _ in range(size)] for size in sizes]
        return self.tell(draw, drawn, filler=level.filler, most_tokens=most_tokens)

    def missing(self, draw: Draw, told: Sequence[Told]) -> str | None:
        """A line that asks for what these references do not say; None where none was found.

        Half of these ask for something else of a person whom they name, the others for a subject
        that they do not name.
        """
        texts = "\n".join(one.text for one in told)
        fact = draw.pick([said.fact for one in told for said in one.said])
        assert isinstance(fact, EntityFact)
        others = [name for name in _OF_PERSONS if name != fact.relation]
        # Once: in a second place a name may be somebody's spouse, and have one thereby.
        if draw.chance(0.5) and len(others) < len(_OF_PERSONS) and texts.count(fact.subject) == 1:
            return ask(draw, EntityFact(fact.subject, draw.pick(others), ()), UNKNOWN)
        for _ in range(_MOST_TRIES):
            other = draw.pick(self._of[fact.relation])
            if other.subject not in texts:
                return ask(draw, other, UNKNOWN)
        return None

    def tell(
        self,
        draw: Draw,
        groups: Sequence[Sequence[EntityFact]],
        *,
        filler: float,
        most_tokens: int | None = None,
    ) -> list[Told]:
        """A reference for each group of facts; what does not fit its tokens is left out.

        Args:
            groups: on different subjects.
            filler: share of references with prose.
            most_tokens: of a reference, where that is less than `reference_tokens`; one statement
                is always made.
        """
        most = min(self.config.reference_tokens, most_tokens or self.config.reference_tokens)
        told = [self._tell(draw, facts, filler) for facts in groups]
        while True:
            counts = self.count([_joined(parts) for parts in told])
            long = [n for n, size in enumerate(counts) if size > most and len(told[n]) > 1]
            if not long:
                break
            for number in long:
                told[number].pop()
        return [Told(_joined(ps), tuple(p for p in ps if isinstance(p, Said))) for ps in told]

    def _draw_facts(self, draw: Draw, count: int) -> list[EntityFact]:
        """Facts on different subjects; of one or two relations in a share of cases."""
        if count > self._num_subjects:
            raise DataError(
                f"a row states {count} facts on different subjects, there are "
                f"{self._num_subjects}: give more questions, a larger val_share, or a level fewer "
                "references or facts"
            )
        pools: list[Sequence[EntityFact]] = [self._facts]
        if draw.chance(self.config.alike):
            relations = [draw.pick(self._facts).relation for _ in range(draw.between(1, 2))]
            pools = [self._of[relation] for relation in relations]
        chosen: dict[str, EntityFact] = {}
        tries = 0
        while len(chosen) < count:
            tries += 1
            # A relation of few subjects must not hold up a row that needs many.
            pool = draw.pick(pools) if tries < count + _MOST_TRIES else self._facts
            fact = draw.pick(pool)
            chosen.setdefault(fact.subject.casefold(), fact)
        return list(chosen.values())

    def _tell(self, draw: Draw, facts: Sequence[EntityFact], filler: float) -> list[Said | str]:
        parts: list[EntityFact | str] = list(facts)
        if self._fillers and draw.chance(filler):
            for _ in range(draw.between(1, 2)):
                # Never first: a reference that is too long loses its end, and must state something.
                parts.insert(draw.between(1, len(parts)), draw.pick(self._fillers))
        return [
            part if isinstance(part, str) else self._say(draw, part, first=place == 0)
            for place, part in enumerate(parts)
        ]

    def _say(self, draw: Draw, fact: EntityFact, *, first: bool) -> Said:
        wordings = WORDINGS[fact.relation]
        wording = draw.pick(wordings.opens if first else wordings.statements)
        answer = draw.pick(fact.answers)
        if draw.chance(self._swapped):
            other = draw.pick(self._answers[fact.relation])
            one, two = fact.subject.casefold(), other.casefold()
            if one not in two and two not in one:
                answer = other
        return Said(fact, answer, state(wording, fact.subject, answer))


def _joined(parts: Sequence[Said | str]) -> str:
    return " ".join(part if isinstance(part, str) else part.sentence for part in parts)


def line(draw: Draw, said: Said, level: Level) -> str:
    """A line that asks for a fact and answers, or repeats its statement."""
    if said.sentence and draw.chance(level.repeats):
        return f"Recall: {said.sentence}"
    return ask(draw, said.fact, said.answer)


def ask(draw: Draw, fact: EntityFact | Fact, answer: str) -> str:
    """A line that asks for a fact in one of its wordings, and this answer."""
    if isinstance(fact, EntityFact):
        wording = draw.below(len(WORDINGS[fact.relation].questions))
        return question_line(fact.question(wording), answer)
    if draw.chance(0.5):
        return question_line(draw.pick(plain_questions(fact)), answer)
    return sentence(fact, answer, draw.below(len(COUNTRY_WORDINGS[fact.relation])))


def question_line(question: str, answer: str) -> str:
    """A question and its answer, as `strata eval memory` asks."""
    return f"Question: {question}\nAnswer: {answer}"
