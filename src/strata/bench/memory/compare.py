"""Every format at every batch, in turns."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from strata.bench.memory.answers import FORMATS, Answered, Bench, unending
from strata.bench.memory.clock import STAGES, Clock
from strata.bench.memory.made import make_decoder, make_tokenizer
from strata.bench.memory.sizes import MemorySize
from strata.bench.timing import race
from strata.errors import ConfigError
from strata.explicit.embed import Embedder


@dataclass(frozen=True)
class Spread:
    """Milliseconds: the median, and what one time in twenty is above."""

    p50_ms: float
    p95_ms: float


@dataclass(frozen=True)
class MemoryResult:
    """One format at one batch.

    Attributes:
        format: see `strata.bench.memory`.
        batch: prompts answered at once.
        ttft_ms: median time from the prompts to their first tokens, searching included.
        tokens_per_s: of all rows together, after the first token, searching included; median.
        kib_per_reference: what is kept of a reference; of the text, in text's format.
        stages: embed (the queries), search, load (from files, and decode), inject (turn to
            positions), each per time that it happens; prefill, and decode: one step of all rows.
    """

    format: str
    batch: int
    ttft_ms: float
    tokens_per_s: float
    kib_per_reference: float
    stages: dict[str, Spread]


def bench_memory(
    size: MemorySize,
    *,
    device: torch.device,
    rounds: int = 5,
    embedder: Embedder | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    on_progress: Callable[[str], None] | None = None,
) -> list[MemoryResult]:
    """Time every format at every batch, in turns.

    Args:
        size: the decoder, and lengths.
        device: of the decoder.
        rounds: answers of each format that count.
        embedder: search by vectors and words; None for words alone.
        model, tokenizer: a decoder to take instead of the one with random weights; both or none.
        on_progress: told what is done.

    Raises:
        ConfigError: a model whose context is too short for all references as text.
        HostError: a model that cannot have memory.
    """
    say = on_progress or (lambda text: None)
    say("making the decoder")
    if model is None:
        tokenizer = make_tokenizer()
        model = make_decoder(size, len(tokenizer))
    model = torch.nn.Module.to(model, device).eval()
    _check_room(model, size)
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), unending(model):
        bench = Bench(size, model, tokenizer, embedder, clock, Path(folder), say)
        results = []
        for batch in size.batches:
            say(f"answering, {batch} prompts at once")
            results += _race(bench, batch, rounds=rounds)
    return results


def _check_room(model: PreTrainedModel, size: MemorySize) -> None:
    need = size.top_k * size.reference_tokens + size.prompt_tokens + size.new_tokens
    has = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if has is not None and has < need:
        raise ConfigError(
            f"{size.top_k} references as text, prompt and answer are {need} tokens and the model's "
            f"context is {has}: give a model with a longer one"
        )


def _race(bench: Bench, batch: int, *, rounds: int) -> list[MemoryResult]:
    answers: dict[str, list[Answered]] = {name: [] for name in FORMATS}
    contestants = {name: bench.contestant(name, batch, into) for name, into in answers.items()}
    race(contestants, rounds=rounds, device=bench.clock.device)
    return [
        _result(name, batch, answers[name][-rounds:], bench.size, bench.kib_per_reference(name))
        for name in FORMATS
    ]


def _result(
    name: str, batch: int, answers: Sequence[Answered], size: MemorySize, kib: float
) -> MemoryResult:
    after = batch * (size.new_tokens - 1)
    stages = {}
    for stage in STAGES:
        times = [ms for answer in answers for ms in answer.stages_ms[stage]]
        if times:
            p50, p95 = np.percentile(times, [50, 95]).tolist()
            stages[stage] = Spread(p50, p95)
    return MemoryResult(
        format=name,
        batch=batch,
        ttft_ms=statistics.median(answer.ttft_ms for answer in answers),
        tokens_per_s=statistics.median(1e3 * after / (a.total_ms - a.ttft_ms) for a in answers),
        kib_per_reference=kib,
        stages=stages,
    )
