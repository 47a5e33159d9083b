"""One decoder that is given references in every way there is: how soon it speaks, and how fast.

    none               the prompt alone
    text               references found, as text before the prompt: RAG
    text_prefix_cached the same, and the keys and values of just that text are kept in memory
    dense              keys and values of all tokens, heads and layers, from a bank
    explicit           those of a few tokens a head in the memory layers, from a bank
    explicit_vq        the same, vector-quantized

All search the same references with the same retriever, and all write as many tokens, greedily.
Text is searched for once, with the whole prompt; memories for every piece of prompt and answer. The
cached prefix is the best case of its kind: references in an order that was seen before, all in
memory, nothing copied. Memories are read from files in every answer, and none is kept from one
answer to the next.
"""

from __future__ import annotations

import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from strata.bench.timing import race, wait_for
from strata.data.facts.factbook import load_facts, training_statements
from strata.errors import ConfigError
from strata.explicit.attach import Session, attach
from strata.explicit.bank import Bank
from strata.explicit.cut import cut
from strata.explicit.documents import Document
from strata.explicit.embed import Embedder
from strata.explicit.hits import Hit
from strata.explicit.host import Host
from strata.explicit.memories import Memories
from strata.explicit.retrieve import Retriever, make_retriever
from strata.explicit.settings import ExplicitMemoryConfig
from strata.explicit.source import BankSource
from strata.models import ModelConfig, build

FORMATS = ("none", "text", "text_prefix_cached", "dense", "explicit", "explicit_vq")
_PROMPTS = 100
STAGES = ("embed", "search", "load", "inject", "prefill", "decode")


@dataclass(frozen=True)
class MemorySize:
    """A decoder with random weights, and what it reads and writes.

    Attributes:
        width, num_layers, num_heads, num_kv_heads, mlp_width: of the decoder, a Llama.
        references: in the bank.
        reference_tokens, prompt_tokens, new_tokens: lengths.
        top_k: references for a prompt, or for each of its pieces.
        chunk_tokens: of a piece.
        batches: prompts answered at once.
        codec: of explicit_vq.
    """

    width: int = 768
    num_layers: int = 10
    num_heads: int = 12
    num_kv_heads: int = 4
    mlp_width: int = 2048
    references: int = 200
    reference_tokens: int = 128
    prompt_tokens: int = 128
    new_tokens: int = 128
    top_k: int = 5
    chunk_tokens: int = 64
    batches: tuple[int, ...] = (1, 8)
    codec: str = "faiss"

    def config(self, name: str, host: Host) -> ExplicitMemoryConfig:
        """How the bank of a format is written."""
        if name == "dense":
            return ExplicitMemoryConfig(
                layers=tuple(n for n in range(host.num_layers) if not host.is_sliding(n)),
                selector="all",
                reference_tokens=self.reference_tokens,
            )
        return ExplicitMemoryConfig(
            codec=self.codec if name == "explicit_vq" else "bf16",
            reference_tokens=self.reference_tokens,
        )


SIZES = {
    "small": MemorySize(
        width=64, num_layers=4, num_heads=4, num_kv_heads=2, mlp_width=128, references=24,
        reference_tokens=32, prompt_tokens=32, new_tokens=20, chunk_tokens=16, batches=(1, 2),
        codec="int4",
    ),
    "full": MemorySize(),
}  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Milliseconds: the median, and what one time in twenty is above."""

    p50_ms: float
    p95_ms: float


@dataclass(frozen=True)
class MemoryResult:
    """One format at one batch.

    Attributes:
        format: see the module.
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
        tokenizer = _words()
        model = _decoder(size, len(tokenizer))
    model = torch.nn.Module.to(model, device).eval()
    _check_room(model, size)
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), _unending(model):
        bench = _Bench(size, model, tokenizer, embedder, clock, Path(folder), say)
        results = []
        for batch in size.batches:
            say(f"answering, {batch} prompts at once")
            results += _race(bench, batch, rounds=rounds)
    return results


class Clock:
    """Times of stages since the last `start`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start()

    def start(self) -> None:
        """Forget all and begin."""
        self.times_ms: dict[str, list[float]] = {name: [] for name in STAGES}
        self.began_s = time.perf_counter()

    def now_ms(self) -> float:
        """Since `start`, with all that the device was asked to do."""
        wait_for(self.device)
        return (time.perf_counter() - self.began_s) * 1e3

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """One time of a stage; stages within it count for themselves."""
        before, begin_ms = self._spent_ms(), self.now_ms()
        yield
        inner_ms = self._spent_ms() - before
        self.times_ms[name].append(self.now_ms() - begin_ms - inner_ms)

    def _spent_ms(self) -> float:
        return sum(map(sum, self.times_ms.values()))


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


class _TimedEmbedder:
    """An embedder whose queries are on the clock."""

    def __init__(self, embedder: Embedder, clock: Clock) -> None:
        self._embedder, self._clock = embedder, clock
        self.name, self.width = embedder.name, embedder.width

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._embedder.embed_documents(texts)

    def embed_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        with self._clock.timed("embed"):
            return self._embedder.embed_queries(texts)


class _TimedSource(BankSource):
    """A bank's memories, searched for and loaded on the clock."""

    def __init__(self, bank: Bank, retriever: Retriever, clock: Clock) -> None:
        super().__init__(bank, retriever)
        self._clock = clock

    def find(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        with self._clock.timed("search"):
            return super().find(queries, top_k)

    def load(self, ids: Sequence[str]) -> Memories:
        with self._clock.timed("load"):
            return super().load(ids)

    def cold(self, ids: Sequence[str]) -> list[str]:
        with self._clock.timed("load"):
            return super().cold(ids)


class _Bench:
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
        documents, self._prompts = _texts(size, tokenizer)
        self.banks: dict[str, Bank] = {}
        for name in ("explicit", "explicit_vq", "dense"):
            say(f"writing {size.references} references ({name})")
            # Vectors are the same in all: one bank holds them and is searched for all.
            its = embedder if name == "explicit" else None
            self.banks[name] = _write(folder / name, name, size, model, tokenizer, documents, its)
        kind: Any = "text" if embedder is None else "hybrid"
        timed = None if embedder is None else _TimedEmbedder(embedder, clock)
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
        source = _TimedSource(bank, self.retriever, self.clock)
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
        watch = _Watch(clock, lambda: 0.0 if injected is None else injected.inject_ms)
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


class _Watch(StoppingCriteria):
    """Stops nothing; notes when each token came, and what was spent on memory before the first."""

    def __init__(self, clock: Clock, inject_ms: Callable[[], float]) -> None:
        self._clock, self._inject_ms = clock, inject_ms
        self.at_ms: list[float] = []
        self.before_first_ms = 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        self.at_ms.append(self._clock.now_ms())
        if len(self.at_ms) == 1:
            self.before_first_ms = sum(map(sum, self._clock.times_ms.values())) + self._inject_ms()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _race(bench: _Bench, batch: int, *, rounds: int) -> list[MemoryResult]:
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


def _texts(size: MemorySize, tokenizer: Any) -> tuple[list[Document], list[list[int]]]:
    """References as long as they may be, and prompts, of facts in ever another order."""
    sentences, shuffle = _sentences(), random.Random(0).shuffle

    def text(tokens: int) -> str:
        parts: list[str] = []
        while sum(map(len, parts)) < 8 * tokens:  # characters: more than any tokenizer's tokens
            shuffle(sentences)
            parts += sentences
        return " ".join(parts)

    config = ExplicitMemoryConfig(reference_tokens=size.reference_tokens)
    whole = Document(text(size.references * size.reference_tokens), "facts")
    references = cut(whole, tokenizer, config)[: size.references]
    documents = [Document(r.text, f"facts/{n}") for n, r in enumerate(references)]
    ids = tokenizer.encode(text(_PROMPTS * size.prompt_tokens), add_special_tokens=False)
    starts = range(0, _PROMPTS * size.prompt_tokens, size.prompt_tokens)
    return documents, [ids[start : start + size.prompt_tokens] for start in starts]


def _sentences() -> list[str]:
    """The quickstart's facts in their wordings, without what would end a reference early."""
    stated = [f"{s.prompt}{s.completion}" for s in training_statements(load_facts())]
    return ["".join(c for c in text if c.isalnum() or c == " ") for text in stated]


def _words() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, so that lengths in tokens are exact."""
    words = sorted({word for text in _sentences() for word in text.split()})
    names = ["<pad>", "<s>", "<unk>", "Reference:", *words]
    vocabulary = {word: number for number, word in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", pad_token="<pad>"
    )


def _decoder(size: MemorySize, vocab_size: int) -> PreTrainedModel:
    torch.manual_seed(0)
    host: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": size.width,
        "intermediate_size": size.mlp_width,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "vocab_size": vocab_size,
    }
    return build(ModelConfig(host=host), None)


def _check_room(model: PreTrainedModel, size: MemorySize) -> None:
    need = size.top_k * size.reference_tokens + size.prompt_tokens + size.new_tokens
    has = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if has is not None and has < need:
        raise ConfigError(
            f"{size.top_k} references as text, prompt and answer are {need} tokens and the model's "
            f"context is {has}: give a model with a longer one"
        )


@contextmanager
def _unending(model: PreTrainedModel) -> Iterator[None]:
    """Let no token end an answer, so that all are of one length."""
    config = model.generation_config
    assert config is not None
    before = config.eos_token_id
    config.eos_token_id = None
    try:
        yield
    finally:
        config.eos_token_id = before


def _shared(kept: DynamicCache) -> DynamicCache:
    """A cache that goes on from another one's tensors and leaves those alone."""
    cache = copy.copy(kept)
    cache.layers = [copy.copy(layer) for layer in kept.layers]
    return cache


def _ids(hits: list[list[Hit]]) -> list[list[str]]:
    return [[hit.id for hit in row] for row in hits]
