"""What a bank gives each question of a benchmark, without what would give the answer away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from strata.data.leaks import leaks
from strata.errors import ConfigError
from strata.explicit.hits import Hit
from strata.explicit.retrieve import Retriever

LEAK_THRESHOLD = 2 / 3  # of "Memory3" in evaluation
_KEPT_TEXTS = 1 << 16  # tokenised references kept


@dataclass(frozen=True)
class QuestionText:
    """One question of a task.

    Attributes:
        query: what is searched with; holds no answer that the prompt does not hold.
        whole: the prompt, without worked examples, and all answers: what no reference may repeat.
    """

    query: str
    whole: str


@dataclass(frozen=True)
class Tally:
    """What questions were given; tallies add up.

    Attributes:
        questions: asked.
        references: given to them, a reference to two questions counted twice.
        empty_handed: questions that were given none.
        leaks: references left out because they repeat the question or its answers.
        no_room: references left out because they did not fit the context as text.
    """

    questions: int = 0
    references: int = 0
    empty_handed: int = 0
    leaks: int = 0
    no_room: int = 0

    def __add__(self, other: Tally) -> Tally:
        ours, theirs = asdict(self), asdict(other)
        return Tally(**{name: ours[name] + theirs[name] for name in ours})

    @classmethod
    def read(cls, tree: Mapping[str, Any]) -> Tally:
        """From what `asdict` gave; KeyError where a number is missing."""
        return cls(**{field.name: int(tree[field.name]) for field in fields(cls)})


class QuestionReferences:
    """Searches a bank with questions and leaves out leaks, as "Memory3" evaluates.

    Twice as many references as are wanted are looked at, so that a leak makes room for the next.

    Args:
        retriever: over the bank.
        encode: the model's token ids of a text, without special tokens.
        top_k: references a question, at most.
        leak_threshold: leave out a reference of which more than this share stands in the
            question's prompt and answers, in order and close together; 1 leaves out none.

    Raises:
        ConfigError: top_k or leak_threshold is out of its range.

    Source: "Memory3" (arXiv 2407.01178), section 5 (threshold 2/3 in evaluation).
    """

    def __init__(
        self,
        retriever: Retriever,
        encode: Callable[[str], Sequence[int]],
        *,
        top_k: int = 5,
        leak_threshold: float = LEAK_THRESHOLD,
    ) -> None:
        if top_k < 1:
            raise ConfigError(f"top_k {top_k} is not allowed: give 1 or more references")
        if not 0 <= leak_threshold <= 1:
            raise ConfigError(f"leak threshold {leak_threshold} is not allowed: give 0 to 1")
        self._retriever, self._encode = retriever, encode
        self._top_k, self._threshold = top_k, leak_threshold
        self._ids = lru_cache(_KEPT_TEXTS)(lambda text: tuple(encode(text)))

    def find(self, questions: Sequence[QuestionText]) -> list[tuple[list[Hit], int]]:
        """Each question's references, best first, and how many leaks stood before them."""
        candidates = self._top_k if self._threshold == 1 else 2 * self._top_k
        found = self._retriever.search([one.query for one in questions], candidates)
        return [self._pick(one, hits) for one, hits in zip(questions, found, strict=True)]

    def _pick(self, question: QuestionText, hits: Sequence[Hit]) -> tuple[list[Hit], int]:
        text = np.asarray(self._encode(question.whole), np.int64)
        kept: list[Hit] = []
        num_leaks = 0
        for hit in hits:
            if len(kept) == self._top_k:
                break
            ids = self._ids(hit.text)
            if not ids:
                continue  # what has no token can be read by nobody
            if leaks(ids, text, threshold=self._threshold):
                num_leaks += 1
            else:
                kept.append(hit)
        return kept, num_leaks


def question_of(task: Any, row: Mapping[str, Any]) -> QuestionText:
    """A row of a task of the harness, as it is searched with and guarded.

    The query is the field that the task names for decontamination, else its prompt. (A template
    for decontamination is not used: that of LAMBADA holds the answer.)

    Args:
        task: of lm-eval-harness.
        row: of its data.
    """
    config = task.config
    prompt = task.doc_to_text(row)
    choices = task.doc_to_choice(row) if config.doc_to_choice is not None else []
    target = task.doc_to_target(row)
    if isinstance(prompt, str):
        answers = choices or (target if isinstance(target, list) else [target])
    else:  # each choice is a prompt, and the target goes on after any of them
        prompt, answers = choices[0], [target, *choices[1:]]
    named = config.doc_to_decontamination_query if config.should_decontaminate else None
    query = row.get(named) if isinstance(named, str) else None
    whole = "\n".join([prompt, *map(str, answers)])
    return QuestionText(query if isinstance(query, str) else prompt, whole)
