"""One decoder, the same references in every format: what it answers, and how soon.

    none              the question alone
    text              references before the question: RAG
    cached            the same, their keys and values computed beforehand, in this very order: the
                      most that any prefix cache can save
    dense             keys and values of all their tokens, heads and layers
    explicit          the bank's memories
    explicit:CODEC    the same memories in another code, trained on references of the bank
    other names       what further banks store of the same references

All formats get the same references, found once with the whole question (or, by an oracle, those of
the question's own source that hold an answer). Questions are asked one by one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from transformers import (
    Cache,
    DynamicCache,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from strata.errors import ConfigError, DataError
from strata.evals.bank_reading import Given, Load
from strata.evals.questions import Question, contains_answer, exact_match
from strata.evals.scoring import (
    Completion,
    Progress,
    RefuseNaN,
    context_limit,
    encode_completion,
    encode_prompt,
    evaluation_mode,
    score_completions,
)
from strata.explicit.attach import attach
from strata.explicit.bank import Bank
from strata.explicit.codec import Codec, make_codec
from strata.explicit.encode import Encoder
from strata.explicit.hits import Hit
from strata.explicit.host import Host
from strata.explicit.retrieve import Retriever
from strata.explicit.settings import ExplicitMemoryConfig

FORMATS = ("none", "text", "cached", "dense", "explicit")
REFUSALS = ("unknown", "I do not know", "I don't know", "not known")
_TRAINING_MEMORIES = 512


@dataclass(frozen=True)
class Asked:
    """One question in one format.

    Attributes:
        id, prompt, answers: of the question.
        format: see the module.
        text: what the model wrote, its first line.
        exact, contains: it equals, or holds, an accepted answer, after normalisation.
        nats: negative log-likelihood of the likeliest accepted answer; None where not asked for.
        found: an accepted answer stands in a reference that was given.
        ttft_ms: to the first token; searching counts, but for none, and filling a cache does not.
        tokens_per_s: after the first token; None for a single one.
        sources: of the references given, best first.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    format: str
    text: str
    exact: bool
    contains: bool
    nats: float | None
    found: bool
    ttft_ms: float
    tokens_per_s: float | None
    sources: tuple[str, ...]


@dataclass(frozen=True)
class FormatScore:
    """One format over all questions.

    Attributes:
        format: see the module.
        retrieval: "search", "oracle", or "none".
        num_questions: with an answer in the bank.
        accuracy, contains: shares of answers that equal, or hold, an accepted one.
        nats_per_answer: mean negative log-likelihood of the likeliest accepted answer; None where
            not asked for.
        hallucinated: share of the questions that the bank cannot answer to which something else
            than a refusal was written; None where there were none.
        ttft_ms, tokens_per_s: medians.
        kib_per_reference: what is stored of one.
    """

    format: str
    retrieval: str
    num_questions: int
    accuracy: float
    contains: float
    nats_per_answer: float | None
    hallucinated: float | None
    ttft_ms: float
    tokens_per_s: float | None
    kib_per_reference: float


@dataclass(frozen=True)
class MemoryEvaluation:
    """All formats.

    Attributes:
        found: share of questions with an accepted answer in a reference given.
        scores: by format, in the order asked for.
        records: every answer.
    """

    found: float
    scores: tuple[FormatScore, ...]
    records: tuple[Asked, ...]


class _FirstLine(StoppingCriteria):
    """Ends an answer with its first line, and notes when each token came."""

    def __init__(self, tokenizer: Any, prompt_tokens: int) -> None:
        self._tokenizer, self._prompt_tokens = tokenizer, prompt_tokens
        self.at_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        self.at_s.append(time.perf_counter())
        new = input_ids[0, self._prompt_tokens :]
        text = self._tokenizer.decode(new, skip_special_tokens=True)
        ended = "\n" in text.lstrip()
        return torch.full((len(input_ids),), ended, device=input_ids.device)


@dataclass(frozen=True)
class _Way:
    """How a format gives references to the model.

    Attributes:
        name: of the format.
        config: settings of its memories; None for none, text and cached.
        ready: makes what `load` reads, not timed.
        load: ids to memories.
        kib: stored of a reference.
    """

    name: str
    config: ExplicitMemoryConfig | None
    ready: Callable[[Sequence[Hit]], Load] | None
    kib: float


def eval_memory(
    model: PreTrainedModel,
    tokenizer: Any,
    bank: Bank,
    questions: Sequence[Question],
    *,
    retriever: Retriever | None,
    absent: Sequence[Question] = (),
    formats: Sequence[str] = FORMATS,
    codecs: Sequence[str] = (),
    banks: Mapping[str, Bank] | None = None,
    refusals: Sequence[str] = REFUSALS,
    top_k: int = 5,
    max_new_tokens: int = 32,
    nats: bool = True,
    progress: Progress | None = None,
) -> MemoryEvaluation:
    """Ask every question in every format.

    Args:
        model, tokenizer: those that the bank belongs to.
        bank: with all memories written.
        questions: at least one, with an answer in the bank.
        retriever: finds references; None for the oracle, which needs every question's source.
        absent: questions that the bank cannot answer, searched for in the same way.
        formats: of `FORMATS`.
        codecs: for explicit:CODEC.
        banks: by the name of their format, this model's banks of the same references in another
            code: their memories are read from files, as those of `bank`.
        refusals: what a model may write that does not know; compared after normalisation.
        top_k: references a question.
        max_new_tokens: longest answer.
        nats: score the accepted answers too, at the price of a forward pass for each.
        progress: told of the questions done.

    Raises:
        BankError: another model's bank, or cold references.
        ConfigError: no question, or an unknown format.
        DataError: a question with its references does not fit the model's context, or the oracle
            finds nothing for one.
    """
    if not questions:
        raise ConfigError("no questions: give at least one")
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(f"no format {name!r}: give some of {', '.join(FORMATS)}")
    if top_k < 1 or max_new_tokens < 1:
        raise ConfigError("top_k and max_new_tokens must be 1 or more")
    if retriever is None and absent:
        raise ConfigError("an oracle knows no references for what the bank cannot answer")
    for name in banks or {}:
        if name in FORMATS:
            raise ConfigError(f"{name!r} is the name of a format: give another to a further bank")
    bank.use(model, tokenizer)
    ways = [_way(name, model, tokenizer, bank) for name in formats]
    ways += [_coded(codec, bank) for codec in codecs]
    ways += [_stored(name, more.use(model, tokenizer)) for name, more in (banks or {}).items()]
    everything = [*questions, *absent]
    records: list[Asked] = []
    refused: dict[str, list[bool]] = {way.name: [] for way in ways}
    with evaluation_mode(model), _greedy(model):
        for number, question in enumerate(everything):
            hits, search_ms = _references(bank, question, retriever, top_k)
            for way in ways:
                one = _ask(
                    way, question, hits, search_ms, model, tokenizer, top_k, max_new_tokens, nats
                )
                if number < len(questions):
                    records.append(one)
                else:
                    refused[way.name].append(exact_match(one.text, tuple(refusals)))
            if progress is not None:
                progress(number + 1, len(everything))
    by = "oracle" if retriever is None else "search"
    scores = tuple(_score(way, records, refused[way.name], by) for way in ways)
    first = [record.found for record in records if record.format == ways[0].name]
    return MemoryEvaluation(sum(first) / len(first), scores, tuple(records))


def _references(
    bank: Bank, question: Question, retriever: Retriever | None, top_k: int
) -> tuple[list[Hit], float]:
    begin_s = time.perf_counter()
    if retriever is not None:
        hits = retriever.search([question.prompt], top_k)[0]
        return hits, (time.perf_counter() - begin_s) * 1e3
    if question.source is None:
        raise DataError(f"question {question.id} names no source, which the oracle needs")
    held = [h for h in bank.of_source(question.source) if contains_answer(h.text, question.answers)]
    if not held:
        raise DataError(
            f"question {question.id}: no reference of {question.source!r} in the bank holds an "
            "accepted answer"
        )
    return held[:top_k], 0.0


def _way(name: str, model: PreTrainedModel, tokenizer: Any, bank: Bank) -> _Way:
    if name in ("none", "text"):
        stats = bank.stats()
        kib = stats.characters / max(1, stats.references) / 1024 if name == "text" else 0.0
        return _Way(name, None, None, kib)
    if name == "explicit":
        return _stored(name, bank)
    host = Host(model)
    whole = ExplicitMemoryConfig(
        layers=tuple(n for n in range(host.num_layers) if not host.is_sliding(n)),
        selector="all",
        reference_tokens=bank.settings.config.reference_tokens,
        marker=bank.settings.config.marker,
        positions=bank.settings.config.positions,
    )
    encoder = Encoder(host, tokenizer, whole)
    kib = make_codec(whole.codec, encoder.shape).bytes_per_memory / 1024
    if name == "cached":
        return _Way(name, None, None, kib)

    def ready(hits: Sequence[Hit]) -> Load:
        memories = encoder.encode([hit.text for hit in hits])
        places = {hit.id: number for number, hit in enumerate(hits)}
        return lambda ids: memories[[places[name] for name in ids]]

    return _Way(name, whole, ready, kib)


def _stored(name: str, bank: Bank) -> _Way:
    """A bank's own memories, as it stores them."""
    assert bank.codec is not None
    kib = bank.codec.bytes_per_memory / 1024
    return _Way(name, bank.settings.config, lambda hits: bank.load, kib)


def _coded(codec_name: str, bank: Bank) -> _Way:
    """The bank's memories, encoded anew and stored by another codec."""
    encoder = bank.encoder
    codec: Codec = make_codec(codec_name, encoder.shape)
    if not codec.trained:
        texts = bank.sample_texts(_TRAINING_MEMORIES)
        codec.train(encoder.encode(texts).to("cpu"))

    def ready(hits: Sequence[Hit]) -> Load:
        made = codec.encode(encoder.encode([hit.text for hit in hits]).to("cpu"))
        blobs = {hit.id: blob for hit, blob in zip(hits, made, strict=True)}
        return lambda ids: codec.decode([blobs[name] for name in ids])

    config = bank.settings.config
    return _Way(f"explicit:{codec_name}", config, ready, codec.bytes_per_memory / 1024)


def _ask(
    way: _Way,
    question: Question,
    hits: Sequence[Hit],
    search_ms: float,
    model: PreTrainedModel,
    tokenizer: Any,
    top_k: int,
    max_new_tokens: int,
    nats: bool,
) -> Asked:
    texts = [hit.text for hit in hits] if way.name in ("text", "cached") else []
    prompt = encode_prompt(tokenizer, "\n\n".join([*texts, question.prompt]))
    limit = context_limit(model)
    if limit is not None and len(prompt) + max_new_tokens > limit:
        raise DataError(
            f"question {question.id} in the format {way.name!r}: {len(prompt)} tokens and "
            f"{max_new_tokens} new ones do not fit the model's context of {limit}: lower --top-k "
            "or --max-new-tokens"
        )
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError("the tokenizer has no eos token: nothing would end an answer")
    cache = None
    if way.name == "cached" and texts:
        cache = _cached(model, prompt, encode_prompt(tokenizer, "\n\n".join([*texts, ""])))
    with _reading(way, hits, model, tokenizer, top_k):
        begin_s = time.perf_counter()
        clock = _FirstLine(tokenizer, len(prompt))
        ids = torch.tensor([prompt], device=model.device)
        written = model.generate(  # type: ignore[operator]
            ids,
            past_key_values=cache,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
            stopping_criteria=StoppingCriteriaList([clock]),
            logits_processor=[RefuseNaN()],
        )
        scores = [
            score_completions(
                model,
                [Completion(prompt, encode_completion(tokenizer, answer), question.id)],
                terminators=[end],
            )[0]
            for answer in (question.completions if nats else ())
        ]
    text = tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)
    line = text.strip().partition("\n")[0].strip()
    later_s = clock.at_s[-1] - clock.at_s[0]
    return Asked(
        id=question.id,
        prompt=question.prompt,
        answers=question.answers,
        format=way.name,
        text=line,
        exact=exact_match(line, question.answers),
        contains=contains_answer(line, question.answers),
        nats=min((score.nats for score in scores), default=None),
        found=any(contains_answer(hit.text, question.answers) for hit in hits),
        ttft_ms=(clock.at_s[0] - begin_s) * 1e3 + (0.0 if way.name == "none" else search_ms),
        tokens_per_s=(len(clock.at_s) - 1) / later_s if later_s > 0 else None,
        sources=tuple(f"{h.source}:{h.start}-{h.end}" for h in hits if way.name != "none"),
    )


def _cached(model: PreTrainedModel, prompt: Sequence[int], beginning: Sequence[int]) -> Cache:
    """Keys and values of the tokens that a prompt and its beginning have in common."""
    pairs = zip(prompt, beginning, strict=False)
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([prompt[:alike]], device=model.device), past_key_values=cache)
    return cache


@contextmanager
def _reading(
    way: _Way, hits: Sequence[Hit], model: PreTrainedModel, tokenizer: Any, top_k: int
) -> Iterator[None]:
    if way.ready is None or not hits:
        yield
        return
    source = Given(hits, way.ready(hits))
    with attach(model, source, tokenizer=tokenizer, config=way.config, top_k=top_k):
        yield


@contextmanager
def _greedy(model: PreTrainedModel) -> Iterator[None]:
    """Greedy means greedy: a model's own generation config may say otherwise."""
    config = model.generation_config
    assert config is not None
    kept = config.repetition_penalty, config.no_repeat_ngram_size
    config.repetition_penalty, config.no_repeat_ngram_size = 1.0, 0
    try:
        yield
    finally:
        config.repetition_penalty, config.no_repeat_ngram_size = kept


def _score(
    way: _Way, records: Sequence[Asked], refused: Sequence[bool], retrieval: str
) -> FormatScore:
    mine = [record for record in records if record.format == way.name]
    rates = [record.tokens_per_s for record in mine if record.tokens_per_s is not None]
    nats = [record.nats for record in mine if record.nats is not None]
    return FormatScore(
        format=way.name,
        retrieval="none" if way.name == "none" else retrieval,
        num_questions=len(mine),
        accuracy=sum(record.exact for record in mine) / len(mine),
        contains=sum(record.contains for record in mine) / len(mine),
        nats_per_answer=sum(nats) / len(nats) if nats else None,
        hallucinated=1 - sum(refused) / len(refused) if refused else None,
        ttft_ms=statistics.median(record.ttft_ms for record in mine),
        tokens_per_s=statistics.median(rates) if rates else None,
        kib_per_reference=way.kib,
    )
