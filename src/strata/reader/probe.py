"""What the reader has learnt so far: held-out questions, answered in five ways, and known ones.

    none              the question alone
    text_1, memory_1  given the one reference that answers, as text or as a memory
    text_5, memory_5  given that one among others, drawn once (five in all by default)
    known             what it shall know, alone, in a wording that is not trained

Other numbers of references are asked with `ways`.
Nothing is searched for: the question is whether what is given is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from strata.errors import DataError
from strata.evals.questions import Question, read_questions
from strata.evals.recall import OpenRecallResult, open_recall
from strata.evals.scoring import encode_prompt
from strata.explicit.attach import attach
from strata.explicit.encode import Encoder
from strata.explicit.hits import Hit
from strata.explicit.host import Host
from strata.explicit.memories import Memories
from strata.explicit.settings import ExplicitMemoryConfig
from strata.reader.draw import Draw
from strata.reader.stages import ProbeConfig


class Probe:
    """The validation questions with the references that each is given, the same at every look.

    Args:
        folder: with `questions.jsonl` and `bank/references.jsonl`, as `strata reader data` makes.
        config: how many of what.
        known: folder of `questions.jsonl` on what the reader shall know; where there is none, these
            are not asked.

    Raises:
        DataError: a file is missing or damaged, or a question's source is not in the bank.
    """

    def __init__(self, folder: Path, config: ProbeConfig, *, known: Path | None = None) -> None:
        self._config = config
        self._known: list[Question] = []
        if known is not None and known.is_dir():
            self._known = read_questions(known / "questions.jsonl")[: config.questions]
        self._texts = _read_references(folder / "bank" / "references.jsonl")
        asked = read_questions(folder / "questions.jsonl")
        self._questions = list({q.prompt: q for q in asked}.values())[: config.questions]
        self._sources: list[str] = []
        for question in self._questions:
            if question.source not in self._texts:
                raise DataError(
                    f"{folder / 'questions.jsonl'}: question {question.id} has the source "
                    f"{question.source!r}, which is no reference of its bank: make the data again"
                )
            self._sources.append(question.source)
        # Others are what other questions ask for: few texts to encode at each look.
        self._pool = list(dict.fromkeys(self._sources))

    @property
    def num_questions(self) -> int:
        """Asked in each way."""
        return len(self._questions)

    def ask(
        self, model: PreTrainedModel, tokenizer: Any, memory: ExplicitMemoryConfig | None
    ) -> dict[str, OpenRecallResult]:
        """Ask all questions in each of the config's ways, greedily.

        Args:
            model, tokenizer: whom.
            memory: what references become; None leaves the ways with memories out.

        Raises:
            DataError: a prompt does not fit the model's context, or a reference is too long.
            HostError: the model cannot have memory, or not as asked.
        """
        answers: dict[str, OpenRecallResult] = {}
        memories: Memories | None = None
        for way in self._config.asked:
            kind, _, number = way.partition("_")
            if kind == "none":
                answers[way] = self._answers(model, tokenizer, self._questions)
            elif kind == "known":
                if self._known:
                    answers[way] = self._answers(model, tokenizer, self._known)
            elif kind == "text":
                answers[way] = self._answers(model, tokenizer, self._prompts(int(number)))
            elif memory is not None:
                if memories is None:
                    encoder = Encoder(Host(model), tokenizer, memory)
                    memories = encoder.encode([self._texts[name] for name in self._pool])
                with self._reading(model, tokenizer, memory, memories, int(number)):
                    answers[way] = self._alike(model, tokenizer)
        return answers

    def _prompts(self, number: int) -> list[Question]:
        """The questions behind the text of their references."""
        given = [self._given(place, number) for place in range(len(self._questions))]
        return [
            replace(q, prompt="\n\n".join([*(self._texts[name] for name in names), q.prompt]))
            for q, names in zip(self._questions, given, strict=True)
        ]

    def _answers(
        self, model: PreTrainedModel, tokenizer: Any, questions: Sequence[Question]
    ) -> OpenRecallResult:
        return open_recall(
            model,
            questions,
            tokenizer=tokenizer,
            max_new_tokens=self._config.answer_tokens,
            batch_size=self._config.batch_size,
        )

    def _alike(self, model: PreTrainedModel, tokenizer: Any) -> OpenRecallResult:
        """The same with prompts of one length in a batch.

        A padded batch puts the memories of all rows in place anew for every column where one of its
        rows begins: most of the time of a look.
        """
        groups: dict[int, list[Question]] = {}
        for question in self._questions:
            length = len(encode_prompt(tokenizer, question.prompt))
            groups.setdefault(length, []).append(question)
        found = [
            answer
            for group in groups.values()
            for answer in self._answers(model, tokenizer, group).answers
        ]
        places = {question.id: place for place, question in enumerate(self._questions)}
        return OpenRecallResult(tuple(sorted(found, key=lambda answer: places[answer.id])))

    def _given(self, place: int, number: int) -> list[str]:
        """Names of the references given with a question, in the order in which they stand."""
        own = self._sources[place]
        draw = Draw(0, "probe", self._questions[place].id)
        names = draw.order([name for name in self._pool if name != own])[: number - 1]
        names.insert(draw.below(len(names) + 1), own)
        return names

    def _reading(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        memory: ExplicitMemoryConfig,
        memories: Memories,
        number: int,
    ) -> AbstractContextManager[Any]:
        """While it lasts, a question reads the memories of its references."""
        prompts = [encode_prompt(tokenizer, question.prompt) for question in self._questions]
        # As `attach` makes queries of tokens; a prompt is one piece, whatever its length.
        queries = [str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in prompts]
        hits = {
            query.strip(): [self._hit(name) for name in self._given(place, number)]
            for place, query in enumerate(queries)
        }
        source = _Given(hits, memories, {name: n for n, name in enumerate(self._pool)})
        piece = max(map(len, prompts)) + self._config.answer_tokens
        return attach(
            model, source, tokenizer=tokenizer, config=memory, top_k=number, chunk_tokens=piece
        )

    def _hit(self, name: str) -> Hit:
        text = self._texts[name]
        return Hit(id=name, score=0.0, text=text, source=name, start=0, end=len(text))


class _Given:
    """A source that finds for a question what it is given."""

    def __init__(
        self, hits: Mapping[str, Sequence[Hit]], memories: Memories, places: Mapping[str, int]
    ) -> None:
        self._hits, self._memories, self._places = hits, memories, places

    def find(self, queries: Sequence[str], top_k: int) -> list[Sequence[Hit]]:
        return [self._hits[query][:top_k] for query in queries]

    def load(self, ids: Sequence[str]) -> Memories:
        return self._memories[[self._places[name] for name in ids]]


def _read_references(path: Path) -> dict[str, str]:
    """Texts of a bank by their names."""
    return dict(_rows(path))


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                row = json.loads(line)
                try:
                    name, text = row["id"], row["text"]
                except (TypeError, KeyError):
                    raise DataError(f"{path}, line {number}: no 'id' and 'text'") from None
                yield str(name), str(text)
    except FileNotFoundError:
        raise DataError(f"no references at {path}: make them with strata reader data") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise DataError(
            f"{path} is not JSON lines: make it again with strata reader data"
        ) from None
