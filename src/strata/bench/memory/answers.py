"""One decoder, its banks, and an answer in each format."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StoppingCriteriaList

from strata.bench.memory.clock import Clock, TimedEmbedder, TimedSource, Watch
from strata.bench.memory.made import make_texts
from strata.bench.memory.sizes import MemorySize
from strata.explicit.attach import Session, attach
from strata.explicit.bank import Bank
from strata.explicit.documents import Document
from strata.explicit.embed import Embedder
from strata.explicit.hits import Hit
from strata.explicit.host import Host
from strata.explicit.retrieve import make_retriever

FORMATS = ("none", "text", "text_prefix_cached", "dense", "explicit", "explicit_vq")


@dataclass
class Answered:
    """One answer's times.

    Attributes:
        ttft_ms, total_ms: from the prompts on.
        stages_ms: every time of every stage.
        written: the new tokens of each row.
        used: references that were found, by row and search, as they were used.
    """

    ttft_ms: float
    total_ms: float
    stages_ms: dict[str, list[float]]
    written: list[list[int]]
    used: list[list[str]]


class Bench:
    """The decoder, its banks, and an answer in each format."""

    def __init__(
        self,
        size: MemorySize,
        model: PreTrainedModel,
        tokenizer: Any,
        embedder: Embedder | None,
        clock: Clock,
        folder: Path,
        say: Callable[[str], None],
    ) -> None:
        self.size, self.model, self.tokenizer, self.clock = size, model, tokenizer, clock
        self._silent = list(tokenizer.all_special_ids) or None
        documents, self._prompts = make_texts(size, tokenizer)
        self.banks: dict[str, Bank] = {}
        for name in ("explicit", "explicit_vq", "dense"):
            say(f"writing {size.references} references ({name})")
            # Vectors are the same in all: one bank holds them and is searched for all.
            its = embedder if name == "explicit" else None
            self.banks[name] = _write(folder / name, name, size, model, tokenizer, documents, its)
        kind: Any = "text" if embedder is None else "hybrid"
        timed = None if embedder is None else TimedEmbedder(embedder, clock)
        self.retriever = make_retriever(kind, self.banks["explicit"], timed)

    def prompts(self, batch: int, turn: int) -> Tensor:
        """Prompts of `prompt_tokens`, others every turn: (batch, tokens)."""
        rows = [self._prompts[(turn * batch + n) % len(self._prompts)] for n in range(batch)]
        return torch.tensor(rows)

    def contestant(self, name: str, batch: int, into: list[Answered]) -> Callable[[], None]:
        """One answer in a format, its times put `into` a list."""
        turn = iter(range(10**9))

        def answer() -> None:
            prompts_bt = self.prompts(batch, next(turn))
            if name == "none":
                into.append(self._plain(prompts_bt, references=False))
            elif name == "text":
                into.append(self._plain(prompts_bt, references=True))
            elif name == "text_prefix_cached":
                into.append(self._cached(prompts_bt))
            else:
                into.append(self._reading(name, prompts_bt))

        return answer

    def kib_per_reference(self, name: str) -> float:
        """What is kept of one reference."""
        if name in self.banks:
            codec = self.banks[name].codec
            assert codec is not None
            return codec.bytes_per_memory / 1024
        if name == "none":
            return 0.0
        stats = self.banks["explicit"].stats()
        if name == "text":
            return stats.characters / stats.references / 1024
        host = Host(self.model)
        shape = host.memory_shape(self.size.config("dense", host))
        vectors = 2 * len(shape.heads) * self.size.reference_tokens
        return vectors * shape.head_dim * self.model.dtype.itemsize / 1024

    def _plain(self, prompts_bt: Tensor, *, references: bool) -> Answered:
        self.clock.start()
        hits = self._found(prompts_bt) if references else []
        ids_bt, mask_bt = self._joined(hits, prompts_bt)
        return self._generate(ids_bt, mask_bt, used=_ids(hits))

    def _cached(self, prompts_bt: Tensor) -> Answered:
        self.clock.start()
        hits = self._found(prompts_bt)  # as it was found when the prefix was read, not timed
        prefix_bt, prefix_mask_bt = self._joined(hits, prompts_bt[:, :0])
        kept = DynamicCache(config=self.model.config)
        self.model(prefix_bt, attention_mask=prefix_mask_bt, past_key_values=kept, logits_to_keep=1)
        self.clock.start()
        hits = self._found(prompts_bt)
        with self.clock.timed("load"):
            cache = _shared(kept)
        ids_bt, mask_bt = self._joined(hits, prompts_bt)
        return self._generate(ids_bt, mask_bt, used=_ids(hits), past_key_values=cache)

    def _reading(self, name: str, prompts_bt: Tensor) -> Answered:
        bank = self.banks[name]
        source = TimedSource(bank, self.retriever, self.clock)
        with attach(
            self.model,
            source,
            tokenizer=self.tokenizer,
            config=bank.settings.config,
            top_k=self.size.top_k,
            chunk_tokens=self.size.chunk_tokens,
        ) as session:
            self.clock.start()
            ids_bt, mask_bt = self._joined([], prompts_bt)
            answered = self._generate(ids_bt, mask_bt, session=session)
        answered.used = [[m.id for m in piece.memories] for piece in session.used]
        stats = session.stats
        answered.stages_ms["inject"] = [stats.inject_ms / max(1, stats.refreshes)]
        return answered

    def _found(self, prompts_bt: Tensor) -> list[list[Hit]]:
        with self.clock.timed("search"):
            texts = [self.tokenizer.decode(row) for row in prompts_bt.tolist()]
            return self.retriever.search(texts, self.size.top_k)

    def _joined(self, hits: list[list[Hit]], prompts_bt: Tensor) -> tuple[Tensor, Tensor]:
        """References before prompts, padded on the left; ids and mask, (batch, tokens)."""
        rows = []
        for number, prompt in enumerate(prompts_bt.tolist()):
            texts = [hit.text for hit in hits[number]] if hits else []
            before = [self._tokens(text) for text in texts]
            rows.append([token for part in [*before, prompt] for token in part])
        longest = max(map(len, rows))
        ids_bt = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_bt = torch.zeros_like(ids_bt)
        for number, row in enumerate(rows):
            ids_bt[number, longest - len(row) :] = torch.tensor(row, dtype=torch.long)
            mask_bt[number, longest - len(row) :] = 1
        return ids_bt.to(self.model.device), mask_bt.to(self.model.device)

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _generate(
        self,
        ids_bt: Tensor,
        mask_bt: Tensor,
        *,
        used: list[list[str]] | None = None,
        session: Session | None = None,
        **options: Any,
    ) -> Answered:
        clock, injected = self.clock, session.stats if session is not None else None
        watch = Watch(clock, lambda: 0.0 if injected is None else injected.inject_ms)
        whole_bt = self.model.generate(  # type: ignore[operator]
            ids_bt,
            attention_mask=mask_bt,
            max_new_tokens=self.size.new_tokens,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=self._silent,  # an answer of these alone would search for nothing
            stopping_criteria=StoppingCriteriaList([watch]),
            **options,
        )
        at_ms = watch.at_ms
        assert len(at_ms) == self.size.new_tokens, "an answer ended early"
        stages = dict(clock.times_ms)
        stages["prefill"] = [at_ms[0] - watch.before_first_ms]
        stages["decode"] = [b - a for a, b in pairwise(at_ms)]
        written = whole_bt[:, ids_bt.shape[1] :].tolist()
        return Answered(at_ms[0], at_ms[-1], stages, written, used or [])


@contextmanager
def unending(model: PreTrainedModel) -> Iterator[None]:
    """Let no token end an answer, so that all are of one length."""
    config = model.generation_config
    assert config is not None
    before = config.eos_token_id
    config.eos_token_id = None
    try:
        yield
    finally:
        config.eos_token_id = before


def _write(
    path: Path,
    name: str,
    size: MemorySize,
    model: PreTrainedModel,
    tokenizer: Any,
    documents: Sequence[Document],
    embedder: Embedder | None,
) -> Bank:
    """The references in one format."""
    bank = Bank.create(
        path,
        model=model,
        tokenizer=tokenizer,
        config=size.config(name, Host(model)),
        embedder=embedder,
    )
    bank.add(documents)
    return bank


def _shared(kept: DynamicCache) -> DynamicCache:
    """A cache that goes on from another one's tensors and leaves those alone."""
    cache = copy.copy(kept)
    cache.layers = [copy.copy(layer) for layer in kept.layers]
    return cache


def _ids(hits: list[list[Hit]]) -> list[list[str]]:
    return [[hit.id for hit in row] for row in hits]
