"""Closed-book recall: does the model know the answer, with nothing to read it from.

Two ways to ask. `recall` scores the accepted answers themselves under teacher forcing: exact, fast,
with the negative log-likelihood that still moves where no answer is right yet; use it for facts the
model was trained on. `open_recall` lets the model write and compares the text with the accepted
answers; use it for published question sets and models not trained on their wording.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from strata.errors import ConfigError, DataError
from strata.evals.questions import Question, contains_answer, exact_match
from strata.evals.report import Measure, mean_and_stderr
from strata.evals.scoring import (
    Completion,
    CompletionScore,
    Progress,
    RefuseNaN,
    check_batch_size,
    check_tokens,
    context_limit,
    encode_completion,
    encode_prompt,
    evaluation_mode,
    score_completions,
)


@dataclass(frozen=True)
class QuestionScore:
    """The score of one question.

    Attributes:
        id: name of the question.
        exact: greedy decoding gives one of the accepted answers, then the end of the answer.
        answer: the accepted answer the model finds likeliest.
        nats: negative log-likelihood of that answer, in nats.
        num_tokens: tokens of that answer.
    """

    id: str
    exact: bool
    answer: str
    nats: float
    num_tokens: int


@dataclass(frozen=True)
class RecallResult:
    """Scores of a question set, with one record a question."""

    questions: tuple[QuestionScore, ...]

    @property
    def exact(self) -> float:
        """Share of questions answered exactly, 0..1."""
        return sum(question.exact for question in self.questions) / len(self.questions)

    @property
    def nats_per_answer(self) -> float:
        """Mean negative log-likelihood of the likeliest accepted answer, in nats."""
        return sum(question.nats for question in self.questions) / len(self.questions)

    @property
    def nats_per_token(self) -> float:
        """The same, a token of those answers."""
        num_tokens = sum(question.num_tokens for question in self.questions)
        return sum(question.nats for question in self.questions) / num_tokens

    def measures(self, source: str) -> tuple[Measure, ...]:
        """The figures of the whole set, for a report."""
        count = len(self.questions)
        exact, exact_stderr = mean_and_stderr(
            [float(question.exact) for question in self.questions]
        )
        nats, nats_stderr = mean_and_stderr([score.nats for score in self.questions])
        return (
            Measure(source, "exact", exact, exact_stderr, count),
            Measure(source, "nats_per_answer", nats, nats_stderr, count),
            Measure(source, "nats_per_token", self.nats_per_token, None, count),
        )


@dataclass(frozen=True)
class WrittenAnswer:
    """What the model wrote for one question.

    Attributes:
        id: name of the question.
        text: the generated answer, cut at the first line break.
        exact: it equals an accepted answer after normalisation.
        contains: an accepted answer occurs in it after normalisation.
    """

    id: str
    text: str
    exact: bool
    contains: bool


@dataclass(frozen=True)
class OpenRecallResult:
    """Scores of a question set whose answers the model wrote."""

    answers: tuple[WrittenAnswer, ...]

    @property
    def exact(self) -> float:
        """Share of answers equal to an accepted one, 0..1."""
        return sum(answer.exact for answer in self.answers) / len(self.answers)

    @property
    def contains(self) -> float:
        """Share of answers that hold an accepted one, 0..1."""
        return sum(answer.contains for answer in self.answers) / len(self.answers)

    def measures(self, source: str) -> tuple[Measure, ...]:
        """The figures of the whole set, for a report."""
        count = len(self.answers)
        exact, exact_stderr = mean_and_stderr([float(answer.exact) for answer in self.answers])
        held, held_stderr = mean_and_stderr([float(answer.contains) for answer in self.answers])
        return (
            Measure(source, "written_exact_match", exact, exact_stderr, count),
            Measure(source, "written_contains", held, held_stderr, count),
        )


def recall(
    model: PreTrainedModel,
    questions: Sequence[Question],
    *,
    tokenizer: PreTrainedTokenizerBase,
    terminators: Sequence[int] | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> RecallResult:
    """Score the accepted answers of each question under teacher forcing.

    Prompt and answer are encoded apart and joined as token ids, then the end of the answer: this
    is how `strata data prepare` lays out {"prompt", "completion"} rows, so the tokens asked for
    are the tokens trained on. See `score_completions` for why teacher forcing shows what greedy
    decoding would give.

    Args:
        model: a causal language model on any device.
        questions: at least one.
        tokenizer: the model's tokenizer.
        terminators: token ids that end an answer; the tokenizer's eos when None.
        batch_size: sequences of one forward pass.
        progress: told of the answers done.

    Returns:
        A question with several accepted answers is exact if any of them is, and carries the
        negative log-likelihood of the likeliest.

    Raises:
        ConfigError: no question, no terminator, or a batch size below one.
        DataError: a question does not fit the model's context or has no tokens.
    """
    if not questions:
        raise ConfigError("no questions: give at least one")
    completions = [
        Completion(
            prompt=encode_prompt(tokenizer, question.prompt),
            tokens=encode_completion(tokenizer, completion),
            name=f"question {question.id}",
        )
        for question in questions
        for completion in question.completions
    ]
    scores = iter(
        score_completions(
            model,
            completions,
            terminators=_terminators(tokenizer) if terminators is None else terminators,
            batch_size=batch_size,
            progress=progress,
        )
    )
    return RecallResult(
        tuple(
            _question_score(question, [next(scores) for _ in question.completions])
            for question in questions
        )
    )


def open_recall(
    model: PreTrainedModel,
    questions: Sequence[Question],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> OpenRecallResult:
    """Let the model write greedily, and compare the first line with the accepted answers.

    Args:
        model: a causal language model on any device.
        questions: at least one.
        tokenizer: the model's tokenizer.
        max_new_tokens: longest answer, in tokens.
        batch_size: sequences of one forward pass.
        progress: told of the questions done.

    Raises:
        ConfigError: no question, or a batch size or answer length below one.
        DataError: a prompt with its answer does not fit the model's context, or has no tokens.
    """
    check_batch_size(batch_size)
    if not questions:
        raise ConfigError("no questions: give at least one")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens {max_new_tokens} is not allowed: give 1 or more")
    prompts = [encode_prompt(tokenizer, question.prompt) for question in questions]
    _check_prompts(model, questions, prompts, max_new_tokens=max_new_tokens)
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
    answers: dict[int, WrittenAnswer] = {}
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            texts = _write(
                model,
                [prompts[i] for i in chosen],
                tokenizer=tokenizer,
                max_new_tokens=max_new_tokens,
            )
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = _written_answer(questions[i], text)
            if progress is not None:
                progress(len(answers), len(order))
    return OpenRecallResult(tuple(answers[i] for i in range(len(questions))))


def _question_score(question: Question, scores: Sequence[CompletionScore]) -> QuestionScore:
    best = min(range(len(scores)), key=lambda i: scores[i].nats)
    return QuestionScore(
        id=question.id,
        exact=any(score.greedy for score in scores),
        answer=question.answers[best],
        nats=scores[best].nats,
        num_tokens=scores[best].num_tokens,
    )


def _written_answer(question: Question, text: str) -> WrittenAnswer:
    # A base model goes on with the next question after a line break; the answer ends there.
    first_line = text.strip().partition("\n")[0].strip()
    return WrittenAnswer(
        id=question.id,
        text=first_line,
        exact=exact_match(first_line, question.answers),
        contains=contains_answer(first_line, question.answers),
    )


def _write(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
) -> list[str]:
    """Greedy continuations of several prompts, as text."""
    longest = max(map(len, prompts))
    ids_bt = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask_bt = torch.zeros_like(ids_bt)
    # Padding stands on the left, so that every prompt ends where the new tokens begin.
    for row, prompt in enumerate(prompts):
        ids_bt[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_bt[row, longest - len(prompt) :] = 1
    (end,) = _terminators(tokenizer)
    generate: Any = model.generate
    written_bt = generate(
        ids_bt.to(model.device),
        attention_mask=mask_bt.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        # Greedy means greedy: a model's own generation config may say otherwise.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=end,
        pad_token_id=end,
        logits_processor=LogitsProcessorList([RefuseNaN()]),
    )
    return tokenizer.batch_decode(written_bt[:, longest:], skip_special_tokens=True)


def _terminators(tokenizer: PreTrainedTokenizerBase) -> tuple[int]:
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no eos token: name the tokens that end an answer")
    return (tokenizer.eos_token_id,)


def _check_prompts(
    model: PreTrainedModel,
    questions: Sequence[Question],
    prompts: Sequence[tuple[int, ...]],
    *,
    max_new_tokens: int,
) -> None:
    limit = context_limit(model)
    for question, prompt in zip(questions, prompts, strict=True):
        check_tokens(model, prompt, name=f"question {question.id}, prompt")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise DataError(
                f"question {question.id}: prompt of {len(prompt)} tokens and {max_new_tokens} new "
                f"ones do not fit the model's context of {limit}: ask for fewer new tokens"
            )
