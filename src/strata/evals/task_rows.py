"""What the task files in `tasks/` do to their rows beyond a template; lm-eval finds it by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from datasets import Dataset
from lm_eval.api.samplers import ContextSampler

Row = Mapping[str, Any]

# A sentence that was begun in lower case: HellaSwag's rows hold it as it was cut from its video.
_BEGUN = re.compile(r"(?<=[.!?] )([a-z])([^.!?]*)$")
_LETTERS = "ABCDE"
_SETS = [set(chosen) for size in (1, 2, 3, 4) for chosen in combinations(range(4), size)]


def of_test(rows: Dataset) -> Dataset:
    """The rows of the test split, of a file that holds several."""
    return rows.filter(lambda row: row["split"] == "test")


def of_train(rows: Dataset) -> Dataset:
    """The rows of the training split."""
    return rows.filter(lambda row: row["split"] == "train")


def of_dev(rows: Dataset) -> Dataset:
    """The rows that worked examples are taken from."""
    return rows.filter(lambda row: row["split"] == "dev")


def of_one_answer(rows: Dataset) -> Dataset:
    """The rows with one right choice."""
    return rows.filter(lambda row: row["answer"] is not None)


def begin_sentences(rows: Dataset) -> Dataset:
    """Capital letters for sentences that the question begins and a choice ends."""

    def begin(row: dict[str, Any]) -> dict[str, Any]:
        return {"question": _BEGUN.sub(lambda m: m[1].upper() + m[2], row["question"])}

    return rows.map(begin)


def both_answers(rows: Dataset) -> Dataset:
    """Two rows of each: the right answer, and the one that is made up."""

    def each() -> Iterator[dict[str, Any]]:
        for row in rows:
            for made_up, field in enumerate(("right_answer", "hallucinated_answer")):
                yield {"question": row["question"], "shown": row[field], "made_up": made_up}

    return Dataset.from_list(list(each()))


def balanced(rows: Dataset) -> Dataset:
    """The rows whose response was labelled as hallucinated, and as many of the others, in turn."""
    kept: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        kept[bool(row["hallucination"])].append(row)
    return Dataset.from_list(
        [
            {"question": row["question"], "response": row["response"], "made_up": made_up}
            for pair in zip(*kept, strict=False)
            for made_up, row in enumerate(pair)
        ]
    )


def letters(row: Row) -> list[str]:
    """A letter for each choice."""
    return list(_LETTERS[: len(row["choices"])])


def letter_sets(row: Row) -> list[str]:
    """Every set of four choices that can be right: A, B, ... AB, AC, ... ABCD."""
    return ["".join(_LETTERS[index] for index in sorted(chosen)) for chosen in _SETS]


def letter_set(row: Row) -> int:
    """Which of `letter_sets` is right."""
    return _SETS.index(set(row["answer_set"]))


def true_share(row: Row, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """How much of the choices' probability the true ones have.

    Source: "TruthfulQA" (arXiv 2109.07958), appendix, the multiple-choice score MC2.
    """
    likeliest = max(score for score, _ in results)
    shares = [math.exp(score - likeliest) for score, _ in results]
    true = [share for share, label in zip(shares, row["mc2_labels"], strict=True) if label]
    return {"acc": math.fsum(true) / math.fsum(shares)}


class SubjectSampler(ContextSampler):
    """The first worked examples of the question's own subject, in their order."""

    def sample(
        self, n: int, eval_doc: Row | None = None, df: Any = None, **_: Any
    ) -> Sequence[dict[str, Any]]:
        """As the harness calls it; `eval_doc` is the question."""
        assert eval_doc is not None, "the harness gives the question where both splits are one"
        own = [row for row in self.df if row["subject"] == eval_doc["subject"]]
        assert n <= len(own), f"{eval_doc['subject']} has {len(own)} worked examples, asked for {n}"
        return own[:n]
