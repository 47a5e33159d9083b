"""Facts about named things, out of EntityQuestions, split so that no subject is on two sides.

A row of EntityQuestions is a question in one wording a relation, and the answers accepted; with the
wording known, its subject is too. Rows that ask the same are one fact with all their answers.

Source: Sciavolino et al., "Simple Entity-Centric Questions Challenge Dense Retrievers" (arXiv
2109.08535); the questions are MIT-licensed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from strata.data.facts.entity_wordings import RELATION_OF, WORDINGS, article
from strata.data.order import content_fraction
from strata.data.sources import Source, find_sources
from strata.errors import DataError

FILES = ("entity_questions_train.jsonl.gz", "entity_questions_dev.jsonl.gz")
MAX_LINE_BYTES = 2**20
MAX_ROWS = 10_000_000

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class EntityFact:
    """The `relation` of `subject` is any one of `answers`.

    Attributes:
        subject: a name.
        relation: a key of `WORDINGS`.
        answers: all that are accepted, in the order of the file; a text states one of them.
    """

    subject: str
    relation: str
    answers: tuple[str, ...]

    def question(self, wording: int) -> str:
        """One of the relation's questions; 0 is the source's own."""
        return WORDINGS[self.relation].questions[wording].replace("{s}", self.subject)

    @property
    def held_out(self) -> int:
        """The question that is kept for asking where the fact itself is trained."""
        digest = hashlib.sha256(f"{self.relation}\n{self.subject}".encode()).digest()
        return digest[0] % len(WORDINGS[self.relation].questions)


def state(wording: str, subject: str, answer: str) -> str:
    """A statement: names are put in as they are, also where they hold braces.

    After a name that ends in a full stop there is no second one.
    """
    places = {"s": subject, "o": answer, "a": article(answer)}
    sentence = re.sub(r"\{([soa])\}", lambda match: places[match[1]], wording)
    return sentence[:-1] if sentence.endswith("..") else sentence


def asked_fact(question: str, relation: str, answers: Iterable[str]) -> EntityFact | None:
    """The fact that a question in one of its relation's wordings asks for, or None."""
    wordings = WORDINGS.get(relation)
    for template in () if wordings is None else wordings.questions:
        before, after = template.split("{s}")
        if question.startswith(before) and question.endswith(after):
            subject = question[len(before) : len(question) - len(after)].strip()
            if subject:
                return EntityFact(subject, relation, tuple(answers))
    return None


def load_facts(
    folder: Path | None = None, *, max_bytes: int
) -> tuple[list[EntityFact], list[EntityFact], int]:
    """The facts of the train and the dev file, and how many were left out.

    Args:
        folder: with both files; None takes the extract that comes with strata.
        max_bytes: see `read_facts`.

    Raises:
        DataError: a file is missing or none of EntityQuestions.
    """
    (train, less), (dev, lesser) = (
        read_facts(file.path, max_bytes=max_bytes) for file in question_files(folder)
    )
    return train, dev, less + lesser


def question_files(folder: Path | None = None) -> list[Source]:
    """The train and the dev file of a folder, or of the extract.

    Raises:
        DataError: one is missing.
    """
    if folder is None:
        folder = Path(str(resources.files(__package__) / "entity_questions"))
    for name in FILES:
        if not (folder / name).is_file():
            raise DataError(f"no {name} in {folder}: give the folder of EntityQuestions")
    return find_sources([folder / name for name in FILES])


def read_facts(path: Path, *, max_bytes: int) -> tuple[list[EntityFact], int]:
    """Read a file of EntityQuestions.

    Args:
        path: JSON lines, plain or gzip: `question`, `answers`, `relation`.
        max_bytes: of a name in UTF-8. Longer ones are left out, as are names without a letter and
            answers that stand in the subject's name or hold it: the question gives them away.

    Returns:
        The facts, in the order of their first rows, and how many had no usable answer or subject.

    Raises:
        DataError: the file is missing or damaged, or a row is none of EntityQuestions.
    """
    found: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for where, row in _rows(path):
        subject, relation, answers = _parse(row, where)
        found[subject, relation].update(dict.fromkeys(answers))
    facts = []
    for (subject, relation), accepted in found.items():
        fitting = tuple(answer for answer in accepted if _fits(subject, answer, max_bytes))
        if fitting and _is_name(subject, max_bytes):
            facts.append(EntityFact(subject, relation, fitting))
    return facts, len(found) - len(facts)


def _parse(row: dict[str, Any], where: str) -> tuple[str, str, list[str]]:
    code, question, answers = row.get("relation"), row.get("question"), row.get("answers")
    relation = RELATION_OF.get(code) if isinstance(code, str) else None
    if relation is None:
        raise DataError(
            f"{where}: relation {str(code)[:40]!r} is none of {', '.join(RELATION_OF)}: give a "
            "file of EntityQuestions"
        )
    if not isinstance(answers, list) or not answers or not all(map(_is_text, answers)):
        raise DataError(f"{where}: answers must be a list of at least one text")
    template = WORDINGS[relation].questions[0]
    before, after = template.split("{s}")
    subject = ""
    if isinstance(question, str) and question.startswith(before) and question.endswith(after):
        subject = question[len(before) : len(question) - len(after)].strip()
    if not subject:
        raise DataError(
            f"{where}: {str(question)[:80]!r} is not of the form {template!r}, in which "
            f"EntityQuestions asks {code}"
        )
    return subject, relation, [answer.strip() for answer in answers]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_name(text: str, max_bytes: int) -> bool:
    return len(text.encode()) <= max_bytes and text.isprintable() and any(map(str.isalpha, text))


def _fits(subject: str, answer: str, max_bytes: int) -> bool:
    if not _is_name(answer, max_bytes):
        return False
    one, other = subject.casefold(), answer.casefold()
    return one not in other and other not in one


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                where = f"{path}, line {number}"
                if len(line) > MAX_LINE_BYTES or number > MAX_ROWS:
                    raise DataError(f"{where}: too long for a file of EntityQuestions")
                if line.strip():
                    yield where, _object(line, where)
    except FileNotFoundError:
        raise DataError(f"no file at {path}: give the folder of EntityQuestions") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{path} is not a whole gzip file: fetch it again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{where} is not JSON") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} holds {type(row).__name__}, not an object")
    return row


class Names:
    """Names to look for in texts, as whole words, capitals as they are."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_first: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        for name in names:
            words = tuple(_WORD.findall(name))
            self._by_first[words[0]].add(words)

    def found_in(self, text: str) -> set[tuple[str, ...]]:
        """The names that a text mentions, each as its words."""
        words = _WORD.findall(text)
        return {
            name
            for at, word in enumerate(words)
            for name in self._by_first.get(word, ())
            if tuple(words[at : at + len(name)]) == name
        }


@dataclass(frozen=True)
class EntitySplits:
    """Facts to train on, and facts whose subjects no training text names.

    Attributes:
        train, val: of the train file, by a hash of the subject.
        test: of the dev file.
        in_train: subjects of the dev file that are subjects in the train file too, left out.
        named_in_train: further subjects of val and test, left out because a training fact names
            them: as the answer, or within a longer name.
    """

    train: list[EntityFact]
    val: list[EntityFact]
    test: list[EntityFact]
    in_train: int
    named_in_train: int


def split_facts(
    train: Iterable[EntityFact], dev: Iterable[EntityFact], *, val_share: float, seed: int
) -> EntitySplits:
    """Split facts by subject.

    Args:
        train, dev: of the two files.
        val_share: of the train file's subjects that are held out.
        seed: of that choice.
    """
    kept: list[EntityFact] = []
    held: list[EntityFact] = []
    subjects: set[str] = set()
    for fact in train:
        subjects.add(fact.subject.casefold())
        name = fact.subject.casefold().encode()
        is_held = content_fraction(name, seed=seed, purpose="val subjects") < val_share
        (held if is_held else kept).append(fact)
    dev = list(dev)
    fresh = [fact for fact in dev if fact.subject.casefold() not in subjects]
    named = _named(kept, Names({fact.subject for fact in (*held, *fresh)}))
    val, test = ([f for f in part if _words(f.subject) not in named] for part in (held, fresh))
    return EntitySplits(
        train=kept,
        val=val,
        test=test,
        in_train=_num_subjects(dev) - _num_subjects(fresh),
        named_in_train=_num_subjects([*held, *fresh]) - _num_subjects([*val, *test]),
    )


def _named(facts: Iterable[EntityFact], names: Names) -> set[tuple[str, ...]]:
    told = {name for fact in facts for name in (fact.subject, *fact.answers)}
    return {name for text in told for name in names.found_in(text)}


def _words(name: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(name))


def _num_subjects(facts: Iterable[EntityFact]) -> int:
    return len({fact.subject for fact in facts})
