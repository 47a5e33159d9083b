"""Made-up people, any number of them, whose facts are drawn so that their bits are known exactly.

Each person has a name of two or three words and six facts. Every part of a fact is drawn uniformly
and independently of everything else, so a person holds 47.6 bits and nothing can be guessed. Names
and values are our own, put together from syllables; each is one word, and `save_word_tokenizer`
makes each word one token.

A person is a pure function of (seed, number): the first thousand of a million are those of a
thousand. A fact is told in all but one of its wordings and asked in the one that was left out;
which one that is differs from fact to fact, so every wording is told of other people.

Source: bioS of "Physics of Language Models: Part 3.3" (arXiv 2404.05405), section 2: its kinds of
facts and how many values each has.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from strata.data.facts.factbook import Statement
from strata.data.order import hash_indices
from strata.data.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS
from strata.data.tokenizer_folder import begin_with, refuse_existing, save_tokenizer
from strata.errors import DataError

UNKNOWN = "<unk>"
FIRST_YEAR = 1900
NAME_WORDS = (400, 400, 1000)  # first, middle and last names

_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip

# By fact: its parts, in the order in which they are told. `VALUES` has the words of each part.
FACTS: dict[str, tuple[str, ...]] = {
    "birth date": ("birth day", "birth month", "birth year"),
    "birth city": ("birth city",),
    "university": ("university",),
    "major": ("major",),
    "employer": ("employer",),
    "gender": ("gender",),
}
PARTS = tuple(itertools.chain.from_iterable(FACTS.values()))

# Each wording is a prompt; the value completes it.
WORDINGS: dict[str, tuple[str, ...]] = {
    "birth date": (
        "{name} was born",
        "Birthday of {name}:",
        "{name} lives since",
        "When was {name} born?",
        "Birth of {name} on",
        "{name} first breathed",
    ),
    "birth city": (
        "{name} comes from",
        "Birthplace of {name}:",
        "{name} hails from",
        "Whence comes {name}?",
        "Home of {name}:",
        "{name} grew up near",
    ),
    "university": (
        "{name} studied at",
        "University of {name}:",
        "{name} graduated from",
        "Where studied {name}?",
        "Teachers of {name}:",
        "{name} enrolled at",
    ),
    "major": (
        "{name} majored in",
        "Subject of {name}:",
        "{name} learned",
        "What studied {name}?",
        "Field of {name}:",
        "{name} wrote about",
    ),
    "employer": (
        "{name} works for",
        "Employer of {name}:",
        "{name} serves",
        "Who employs {name}?",
        "Salary of {name}:",
        "{name} earns at",
    ),
    "gender": (
        "{name} is a",
        "Passport of {name}:",
        "{name} became a",
        "What is {name}?",
        "Sex of {name}:",
        "{name} remains a",
    ),
}

_ONSETS = (
    "b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr",
    "gr", "kr", "pl", "sh", "st", "tr",
)  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "io")
_CODAS = ("l", "m", "n", "r", "s", "th", "x")


@dataclass(frozen=True)
class Biographies:
    """So many people.

    Args:
        num_people: 1 to half of the names that there are.
        seed: of names, facts, held-out wordings and the order within a biography.
        name_words: how many first, middle and last names there are, or first and last; fewer make
            a smaller vocabulary.

    Raises:
        DataError: more people than half of the names, a number below 1, or names of other than
            two or three words.
    """

    num_people: int
    seed: int = 0
    name_words: tuple[int, ...] = NAME_WORDS

    def __post_init__(self) -> None:
        if len(self.name_words) not in _NAMES:
            raise DataError(f"names of {len(self.name_words)} words: give 2 or 3")
        most = math.prod(self.name_words) // 2
        if min(self.name_words) < 1 or not 1 <= self.num_people <= most:
            raise DataError(
                f"{self.num_people} people with {' x '.join(map(str, self.name_words))} names: "
                f"give 1 to {most}, half of the names, or more names"
            )

    @property
    def bits_per_person(self) -> float:
        """Entropy of a person's facts, the name given."""
        return sum(math.log2(len(values)) for values in VALUES.values())

    @cached_property
    def names(self) -> list[str]:
        """All different, by person."""
        words = _name_words(self.name_words)
        numbers = np.unravel_index(self._name_numbers(), self.name_words)
        columns = [[words[k][n] for n in column.tolist()] for k, column in enumerate(numbers)]
        return [" ".join(name) for name in zip(*columns, strict=True)]

    @cached_property
    def values(self) -> np.ndarray:
        """(person, part) int64: the number of each part's value, in the order of `PARTS`."""
        columns = [self._draw(f"value of {part}", len(VALUES[part])) for part in PARTS]
        return np.stack(columns, axis=1)

    @cached_property
    def held_out(self) -> np.ndarray:
        """(person, fact) int64: the wording that a fact is asked in and never told in."""
        columns = [self._draw(f"wording of {fact}", len(WORDINGS[fact])) for fact in FACTS]
        return np.stack(columns, axis=1)

    def answer(self, person: int, part: str) -> str:
        """The word for a part of a fact."""
        return VALUES[part][int(self.values[person, PARTS.index(part)])]

    def tell(self, person: int, fact: str, wording: int) -> Statement:
        """A fact in one of its wordings; no full stop, so that every word of the answer counts."""
        prompt = WORDINGS[fact][wording].format(name=self.names[person])
        words = " ".join(self.answer(person, part) for part in FACTS[fact])
        return Statement(prompt=prompt, completion=f" {words}")

    def told(self, person: int) -> Iterator[tuple[str, int]]:
        """The facts and wordings that a person is told in."""
        for number, (fact, wordings) in enumerate(WORDINGS.items()):
            for wording in range(len(wordings)):
                if wording != self.held_out[person, number]:
                    yield fact, wording

    def statements(self) -> Iterator[Statement]:
        """Every fact in every wording that it is told in, person by person.

        Each comes `NUM_TOLD` times, so that reading all of them is that many exposures.
        """
        for person in range(self.num_people):
            for fact, wording in self.told(person):
                yield self.tell(person, fact, wording)

    def biographies(self) -> Iterator[str]:
        """`NUM_TOLD` texts for each person, in each of them every fact in another wording.

        The facts of a text stand in an order of its own, and every sentence has the whole name.
        """
        for person in range(self.num_people):
            told: dict[str, list[int]] = {fact: [] for fact in FACTS}
            for fact, wording in self.told(person):
                told[fact].append(wording)
            for copy in range(NUM_TOLD):
                keys = hash_indices(
                    np.arange(len(FACTS)) + len(FACTS) * (person * NUM_TOLD + copy),
                    seed=self.seed,
                    purpose="order of facts",
                )
                order = [list(FACTS)[i] for i in np.argsort(keys)]
                sentences = (self.tell(person, fact, told[fact][copy]) for fact in order)
                yield " ".join(f"{said.prompt}{said.completion}." for said in sentences)

    def questions(self, people: Sequence[int]) -> Iterator[tuple[str, Statement]]:
        """Each part of each fact of some people, asked in the wording that was held out.

        A part that others are told before is asked behind them. The completion is one word.

        Yields:
            The part's name, and the question with its answer.
        """
        for person in people:
            for number, (fact, parts) in enumerate(FACTS.items()):
                wording = WORDINGS[fact][int(self.held_out[person, number])]
                prompt = wording.format(name=self.names[person])
                for part in parts:
                    word = f" {self.answer(person, part)}"
                    yield part, Statement(prompt=prompt, completion=word)
                    prompt += word

    def _draw(self, purpose: str, count: int) -> np.ndarray:
        hashed = hash_indices(np.arange(self.num_people), seed=self.seed, purpose=purpose)
        return (hashed % np.uint64(count)).astype(np.int64)

    def _name_numbers(self) -> np.ndarray:
        """(person,) int64: numbers of names, none twice."""
        found = np.empty(0, np.int64)
        num_drawn = 0
        while len(found) < self.num_people:
            indices = np.arange(num_drawn, num_drawn + max(1024, self.num_people))
            num_drawn = int(indices[-1]) + 1
            hashed = hash_indices(indices, seed=self.seed, purpose="name")
            drawn = (hashed % np.uint64(math.prod(self.name_words))).astype(np.int64)
            together = np.concatenate([found, drawn])
            first = np.unique(together, return_index=True)[1]
            found = together[np.sort(first)]
        return found[: self.num_people]


def vocabulary(name_words: tuple[int, ...] = NAME_WORDS) -> list[str]:
    """Every word and sign that a text about these people can hold, each once."""
    texts = [wording.replace("{name}", "") for told in WORDINGS.values() for wording in told]
    words = re.sub(r"[?:]", r" \g<0>", " ".join(texts)).split()
    names = _name_words(name_words)
    return list(dict.fromkeys([".", *words, *itertools.chain(*VALUES.values(), *names)]))


def save_word_tokenizer(out: Path, *, name_words: tuple[int, ...] = NAME_WORDS) -> int:
    """Save a tokenizer that has a token for each word, for `AutoTokenizer.from_pretrained(out)`.

    Encoding begins with `<bos>`. A word that no text holds is `<unk>`.

    Args:
        out: the folder to make.
        name_words: those of the people.

    Returns:
        The size of the vocabulary.

    Raises:
        DataError: `out` exists.
        StorageError: `out` cannot be written.
    """
    refuse_existing(out)
    words = [*SPECIAL_TOKENS, UNKNOWN, *vocabulary(name_words)]
    model = models.WordLevel({word: number for number, word in enumerate(words)}, UNKNOWN)
    tokenizer = Tokenizer(model)
    signs = [pre_tokenizers.Split(sign, "isolated") for sign in ".?:"]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), *signs])
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, UNKNOWN])
    begin_with(tokenizer, BOS)
    special = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN}
    save_tokenizer(tokenizer, out, special)
    return len(words)


_NAMES = {  # by how many words they have
    2: ("first name", "last name"),
    3: ("first name", "middle name", "last name"),
}

# What a kind of word ends in, by which no two kinds have a word in common.
_ENDINGS: Mapping[str, tuple[str, ...]] = {
    "first name": ("a", "o"),
    "middle name": ("in", "el"),
    "last name": ("sen", "mann", "ov"),
    "birth city": ("ville", "burg", "mouth"),
    "university": ("-College", "-Academy"),
    "major": ("ology", "istics"),
    "employer": ("-Works", "-Bank", "-Foods"),
}


def _name_words(counts: tuple[int, ...]) -> list[tuple[str, ...]]:
    kinds = _NAMES[len(counts)]
    return [_words(kind, count) for kind, count in zip(kinds, counts, strict=True)]


@cache
def _words(kind: str, count: int) -> tuple[str, ...]:
    """So many words of a kind: one or two syllables and an ending, all different."""
    one = ["".join(x) for x in itertools.product(_ONSETS, _VOWELS, _CODAS)]
    endings = _ENDINGS[kind]
    if count > len(one) * len(endings):
        raise DataError(f"{count} words for {kind}: give at most {len(one) * len(endings)}")
    order = np.argsort(hash_indices(np.arange(len(one)), seed=0, purpose=f"words for {kind}"))
    stems = [one[i] for i in order.tolist()]
    return tuple(f"{stem.capitalize()}{end}" for end in endings for stem in stems)[:count]


VALUES: dict[str, tuple[str, ...]] = {
    "birth day": tuple(str(day) for day in range(1, 29)),
    "birth month": tuple(_MONTHS),
    "birth year": tuple(str(FIRST_YEAR + year) for year in range(200)),
    "birth city": _words("birth city", 200),
    "university": _words("university", 300),
    "major": _words("major", 100),
    "employer": _words("employer", 263),
    "gender": ("woman", "man"),
}
NUM_TOLD = len(WORDINGS["gender"]) - 1  # wordings that each fact is told in
