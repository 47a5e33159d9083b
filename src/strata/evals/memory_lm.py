"""lm-eval-harness's own transformers model, whose questions are given references of a bank.

    none        nothing: the harness's model, as it is
    text        the references before the prompt, an empty line between them
    explicit    the bank's memories, read by every token of prompt and answer

Requests are answered in parts of whole questions, so that an interrupted task goes on. A task of
fewer than `PART` requests is one part, and then `none` gives the harness's own numbers bit for bit;
with several parts, batches hold other rows than the harness would put together, which may change
the last bit of a score.

Shapes: b sequences of a batch, t their tokens, a tokens of one answer, v vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Any, Literal

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch.nn import functional as F
from transformers import PreTrainedModel

from strata.errors import ConfigError
from strata.evals.bank_reading import BankReading
from strata.evals.lm_eval_adapter import known_warnings_off
from strata.evals.question_references import QuestionReferences, Tally, question_of
from strata.evals.response_log import Part, ResponseLog, hash_of
from strata.evals.scoring import Progress
from strata.explicit.hits import Hit

Memory = Literal["none", "text", "explicit"]
MEMORIES: tuple[Memory, ...] = ("none", "text", "explicit")
PART = {"loglikelihood": 512, "generate_until": 64}  # requests, at least

Tokens = tuple[tuple[str, str], list[int], list[int]]  # texts, prompt ids, answer ids
Question = tuple[Sequence[Instance], list[Hit]]  # its requests, and what it is given


class MemoryLM(HFLM):
    """A model of the harness that reads a bank.

    Args:
        model, tokenizer: a causal language model.
        tasks: the tasks that it will be asked, by name: they know what a row's question is.
        batch_size: sequences of one forward pass.
        references: finds what a question is given; None for the memory none.
        reading: lets the model read memories; None where it gets text or nothing.
        log: keeps the answers.
        progress: told of the requests answered.

    Attributes:
        tally: what the questions of this object's answers were given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        tasks: Mapping[str, Any],
        batch_size: int,
        references: QuestionReferences | None = None,
        reading: BankReading | None = None,
        log: ResponseLog | None = None,
        progress: Progress | None = None,
    ) -> None:
        with known_warnings_off():
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._strata_tasks = dict(tasks)
        self._references, self._memories = references, reading
        self._log = log or ResponseLog(None)
        self._progress = progress
        self._hits: list[list[Hit]] | None = None  # of the requests being scored
        self.tally = Tally()

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """As the harness asks; (log-likelihood, greedy) of each request."""
        return [(nats, greedy) for nats, greedy in self._in_parts("loglikelihood", requests)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """As the harness asks; a text for each request."""
        return self._in_parts("generate_until", requests)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """As the harness asks, without memory only.

        Raises:
            ConfigError: there is memory, and such a task has no question to search with.
        """
        if self._references is not None:
            raise ConfigError(
                f"task {requests[0].task_name} scores whole texts and asks no question that memory "
                "could be searched with: leave it out, or give --memory none"
            )
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _in_parts(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        answers: list[Any] = []
        for part in _parts(requests, PART[kind]):
            asked = hash_of(kind, [request.args for request in part])
            kept = self._log.find(asked)
            if kept is None:
                found, tally = self._answer(kind, part)
                kept = Part(asked, tuple(found), tally)
                self._log.add(kept)
            answers += kept.answers
            self.tally += kept.tally
            if self._progress is not None:
                self._progress(len(answers), len(requests))
        return answers

    def _answer(self, kind: str, requests: list[Instance]) -> tuple[list[Any], Tally]:
        base: Callable[..., list[Any]] = getattr(super(), kind)
        questions = [list(group) for _, group in groupby(requests, key=_question)]
        if self._references is None:
            return base(requests, disable_tqdm=True), Tally(questions=len(questions))
        texts = [question_of(self._strata_tasks[own[0].task_name], own[0].doc) for own in questions]
        found = self._references.find(texts)
        given = [
            (own, hits if self._memories is not None else self._that_fit(kind, own, hits))
            for own, (hits, _) in zip(questions, found, strict=True)
        ]
        num_given = sum(len(hits) for _, hits in given)
        tally = Tally(
            questions=len(questions),
            references=num_given,
            empty_handed=sum(not hits for _, hits in given),
            leaks=sum(num_leaks for _, num_leaks in found),
            no_room=sum(len(hits) for hits, _ in found) - num_given,
        )
        if self._memories is None:
            with_texts = [_after(hits, request) for own, hits in given for request in own]
            return base(with_texts, disable_tqdm=True), tally
        if kind == "generate_until":
            return self._generate(base, given), tally
        self._hits = [hits for own, hits in given for _ in own]
        try:
            return base(requests, disable_tqdm=True), tally
        finally:
            self._hits = None

    def _that_fit(self, kind: str, own: Sequence[Instance], hits: list[Hit]) -> list[Hit]:
        """As many of the best references as leave the prompts whole."""
        for count in range(len(hits), 0, -1):
            if all(self._num_tokens(kind, _after(hits[:count], r)) <= self.max_length for r in own):
                return hits[:count]
        return []

    def _num_tokens(self, kind: str, request: Instance) -> int:
        if kind == "loglikelihood":
            return len(self.tok_encode("".join(request.args)))
        room = request.args[1].get("max_gen_toks", self.max_gen_toks)
        return len(self.tok_encode(request.args[0])) + int(room)

    def _generate(self, base: Callable[..., list[Any]], given: Sequence[Question]) -> list[Any]:
        """One prompt after the other: what is read hangs on the decoder, not on a row."""
        assert self._memories is not None
        texts: list[Any] = []
        for own, hits in given:
            with self._memories.prompt(hits):
                for request in own:
                    texts += base([request], disable_tqdm=True)
        return texts

    def _loglikelihood_tokens(
        self,
        requests: list[Tokens],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        if self._hits is None or not any(self._hits):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        # The harness reuses scores of equal tokens, which here may have read other memories.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        step = int(self.batch_size)
        answers: dict[int, tuple[float, bool]] = {}
        for begin in range(0, len(order), step):
            chosen = order[begin : begin + step]
            scores = self._score([requests[i] for i in chosen], [self._hits[i] for i in chosen])
            answers.update(zip(chosen, scores, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _score(
        self, requests: Sequence[Tokens], hits: Sequence[list[Hit]]
    ) -> Iterator[tuple[float, bool]]:
        """As the harness scores a batch: cut on the left, padded on the right."""
        assert self._memories is not None
        rows = [(prompt + answer)[-(self.max_length + 1) :][:-1] for _, prompt, answer in requests]
        ids_bt = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, ids in enumerate(rows):
            ids_bt[row, : len(ids)] = torch.tensor(ids)
        with ExitStack() as stack:
            stack.enter_context(self._memories.rows(hits))
            logits_btv = self._model_call(ids_bt.to(self.device))
        for row, (texts, _, answer) in enumerate(requests):
            if not 0 < len(answer) <= len(rows[row]):
                raise ConfigError(
                    f"a task exceeds the model's context of {self.max_length}: the answer "
                    f"{texts[1][:40]!r} has {len(answer)} tokens"
                )
            logits_av = logits_btv[row, len(rows[row]) - len(answer) : len(rows[row])]
            tokens_a = torch.tensor(answer, device=logits_av.device)
            scores_av = F.log_softmax(logits_av, dim=-1, dtype=self.softmax_dtype)
            greedy = bool((scores_av.argmax(dim=-1) == tokens_a).all())
            yield float(scores_av.gather(-1, tokens_a[:, None]).sum()), greedy


def _question(request: Instance) -> tuple[Any, Any]:
    return request.task_name, request.doc_id


def _parts(requests: Sequence[Instance], least: int) -> Iterator[list[Instance]]:
    """Consecutive requests, `least` or more but for the last, no question in two parts."""
    part: list[Instance] = []
    for _, group in groupby(requests, key=_question):
        part += group
        if len(part) >= least:
            yield part
            part = []
    if part:
        yield part


def _after(hits: Sequence[Hit], request: Instance) -> Instance:
    """The same request, its prompt behind the texts of references."""
    if not hits:
        return request
    prompt, *others = request.args
    texts = [hit.text for hit in hits]
    changed = copy.copy(request)
    changed.arguments = ("\n\n".join([*texts, prompt] if prompt else texts), *others)
    return changed
