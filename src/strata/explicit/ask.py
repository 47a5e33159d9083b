"""Answering from a bank, in each of the ways that knowledge can reach a model.

none       the question alone
text       the references found, as text before the question
dense      all their tokens as keys and values, in every layer (encoded when they are found)
explicit   the bank's memories
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from strata.errors import ConfigError
from strata.explicit.attach import Preset, attach, presets
from strata.explicit.hits import Hit
from strata.explicit.source import BankSource

Format = Literal["none", "text", "dense", "explicit"]
FORMATS: tuple[Format, ...] = ("none", "text", "dense", "explicit")


@dataclass(frozen=True)
class SourceUsed:
    """A reference that the model was given.

    Attributes:
        start, end: characters in the document.
        score: in the units of the retriever.
        tokens: which tokens of the prompt and the answer could read it, counted from the prompt's
            first; all for text.
    """

    id: str
    source: str
    start: int
    end: int
    score: float
    text: str
    tokens: tuple[int, int]


@dataclass(frozen=True)
class Answer:
    """What a model said, what it was given, and how long it took.

    Attributes:
        text: the answer.
        prompt_tokens, new_tokens: read and written.
        used: what was given, in the order of its use; empty for the format none.
        injected: memories put before pieces of the text, over all pieces; for text, references.
        ms: search, load and inject (within the following two), first_token and total.
    """

    text: str
    format: Format
    prompt_tokens: int
    new_tokens: int
    used: tuple[SourceUsed, ...] = ()
    injected: int = 0
    ms: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Of the tokens after the first."""
        return 1e3 * (self.new_tokens - 1) / max(self.ms["total"] - self.ms["first_token"], 1e-6)


@torch.inference_mode()
def ask(
    question: str,
    *,
    model: PreTrainedModel,
    tokenizer: Any,
    format: Format = "explicit",
    source: BankSource | None = None,
    preset: Preset = presets.PAPER,
    top_k: int = 5,
    min_score: float | None = None,
    max_new_tokens: int = 64,
    history: Sequence[dict[str, str]] = (),
    on_text: Callable[[str], None] | None = None,
    **sampling: Any,
) -> Answer:
    """Answer one question.

    Args:
        question: some text; a chat model gets it through its template.
        model, tokenizer: of the bank, for the format explicit; any, for text.
        format: see the module.
        source: finds references and loads memories; with the encoder of the format. None for the
            format none.
        preset: how memories are read.
        top_k: references, for the formats that use memory: for each 64 tokens.
        min_score: leave out what scores less.
        max_new_tokens: longest answer; greedy unless `sampling` says otherwise.
        history: earlier turns, for a chat template.
        on_text: called with each piece of the answer as it comes.
        sampling: given on to `generate`.

    Raises:
        ConfigError: no such format, an empty question, or one that does not fit the context.
    """
    if format not in FORMATS:
        raise ConfigError(f"no format {format!r}: give one of {', '.join(FORMATS)}")
    if source is None and format != "none":
        raise ConfigError(f"the format {format!r} needs a bank; without one there is 'none'")
    if not question.strip():
        raise ConfigError("the question is empty: give some text")
    begin = time.perf_counter()
    ms = {"search": 0.0, "load": 0.0, "inject": 0.0}
    hits: list[Hit] = []
    if format == "text":
        assert source is not None
        found = source.find([question], top_k)[0]
        hits = [hit for hit in found if min_score is None or hit.score >= min_score]
        ms["search"] = (time.perf_counter() - begin) * 1e3
    ids = prompt_ids(tokenizer, question, references=hits, history=history)
    _check_room(model, len(ids), max_new_tokens)
    watch = _Watch(tokenizer, on_text)
    prompt = torch.tensor([ids], device=model.device)
    with ExitStack() as stack:
        session = None
        if format in ("dense", "explicit"):
            assert source is not None
            session = stack.enter_context(
                attach(
                    model,
                    source,
                    tokenizer=tokenizer,
                    preset=preset,
                    top_k=top_k,
                    min_score=min_score,
                )
            )
        written = model.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            pad_token_id=_padding(model, tokenizer),
            streamer=watch,
            **({"do_sample": False} | sampling),
        )
    ms["total"] = (time.perf_counter() - begin) * 1e3
    ms["first_token"] = (watch.first_at_s - begin) * 1e3
    new = written[0, len(ids) :].tolist()
    used = tuple(
        SourceUsed(h.id, h.source, h.start, h.end, h.score, h.text, (0, len(ids) + len(new)))
        for h in hits
    )
    injected = len(hits)
    if session is not None:
        stats = session.stats
        ms |= {"search": stats.search_ms, "load": stats.load_ms, "inject": stats.inject_ms}
        used = tuple(
            SourceUsed(m.id, m.source, m.start, m.end, m.score, m.text, (piece.start, piece.stop))
            for piece in session.used
            for m in piece.memories
        )
        injected = sum(piece.injected for piece in session.used)
    return Answer(
        text=str(tokenizer.decode(new, skip_special_tokens=True)).strip(),
        format=format,
        prompt_tokens=len(ids),
        new_tokens=len(new),
        used=used,
        injected=injected,
        ms=ms,
    )


def prompt_ids(
    tokenizer: Any,
    question: str,
    *,
    references: Sequence[Hit] = (),
    history: Sequence[dict[str, str]] = (),
) -> list[int]:
    """Tokens of a question, behind the text of references if there are any.

    A tokenizer with a chat template gets turns; another gets the texts, an empty line between them.
    """
    parts = [*(hit.text for hit in references), question]
    text = "\n\n".join(parts)
    if getattr(tokenizer, "chat_template", None):
        turns = [*history, {"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])
    before = [turn["content"] for turn in history]
    ids = list(tokenizer("\n\n".join([*before, text]), verbose=False)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()  # some tokenizers end every text
    return ids


def _check_room(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and prompt_tokens + new_tokens > limit:
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens and {new_tokens} new ones were asked for, more "
            f"than the model's context of {limit}: shorten the question, take fewer references "
            "(top_k) or fewer new tokens"
        )


def _padding(model: PreTrainedModel, tokenizer: Any) -> int | None:
    ends = model.generation_config.eos_token_id if model.generation_config else None
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return ends[0] if isinstance(ends, list) else ends


class _Watch(BaseStreamer):
    """Notes when the first token came, and hands text on where it can be no longer changed."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] = []
        self._told = ""
        self._has_prompt = False
        self.first_at_s = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if not self._has_prompt:  # generate puts the prompt first
            self._has_prompt = True
            return
        if not self._ids:
            self.first_at_s = time.perf_counter()
        self._ids += value.reshape(-1).tolist()
        self._tell(final=False)

    def end(self) -> None:
        self._tell(final=True)

    def _tell(self, *, final: bool) -> None:
        if self._on_text is None:
            return
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        whole = text if final else text.rstrip("�")  # half a character, so far
        if whole.startswith(self._told) and len(whole) > len(self._told):
            self._on_text(whole[len(self._told) :])
            self._told = whole
