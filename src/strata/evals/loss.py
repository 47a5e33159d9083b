"""Loss of a model on text or on prepared tokens: nats a token, perplexity, bits a byte.

Documents stand one after the other, each closed by its end token, as in training with
`packing: concat`; the stream is cut into windows that overlap by one token, so every token but the
first is predicted exactly once. With `isolate` every document is read alone.

Shapes: b windows of a batch, t tokens of a window, v vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strata.data.manifest import MANIFEST_NAME, read_manifest
from strata.data.readers import ReadOptions
from strata.data.sources import find_sources
from strata.errors import ConfigError, DataError, ModelError
from strata.evals.documents import (
    ScoredDocument,
    end_ids,
    open_vocabulary,
    shard_documents,
    text_documents,
    token_bytes,
)
from strata.evals.report import Measure
from strata.evals.scoring import (
    Progress,
    check_batch_size,
    check_tokens,
    context_limit,
    encode_prompt,
    evaluation_mode,
)

DEFAULT_SEQUENCE_TOKENS = 2048
_MAX_LOGITS = 2**27  # 0.5 GB in fp32; a large vocabulary then takes fewer windows at once
_SORTED_BATCHES = 16


@dataclass(frozen=True)
class LossResult:
    """Loss over all tokens that carry one.

    Attributes:
        nats: sum over the tokens.
        num_tokens: tokens predicted.
        num_bytes: UTF-8 bytes these tokens stand for, or None where that is not known.
        nats_per_token_stderr: standard error of the mean, windows taken as independent.
    """

    nats: float
    num_tokens: int
    num_bytes: int | None
    nats_per_token_stderr: float | None

    @property
    def nats_per_token(self) -> float:
        """Mean loss; what a training log shows."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable across tokenizers, which nats per token is not."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else None

    def measures(self, source: str) -> tuple[Measure, ...]:
        """The figures, for a report."""
        count = self.num_tokens
        found = [
            Measure(
                source,
                "loss_nats_per_token",
                self.nats_per_token,
                self.nats_per_token_stderr,
                count,
            ),
            Measure(source, "perplexity", self.perplexity, None, count),
        ]
        if self.bits_per_byte is not None:
            found.append(Measure(source, "bits_per_byte", self.bits_per_byte, None, count))
        return tuple(found)


def is_token_folder(path: Path) -> bool:
    """Whether the path is a folder of prepared tokens, as opposed to text files."""
    return path.is_dir() and ((path / MANIFEST_NAME).exists() or (path / ".prepare").is_dir())


def folder_loss(
    model: PreTrainedModel,
    folder: Path,
    *,
    split: str = "val",
    tokenizer: PreTrainedTokenizerBase | None = None,
    sequence_tokens: int | None = None,
    isolate: bool = False,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> LossResult:
    """Loss on a split of a folder written by `strata data prepare`.

    Tokens without loss in training (prompts) have none here. Bits per byte are given for
    byte-level tokenizers.

    Args:
        model: a causal language model on any device.
        folder: the prepared folder.
        split: `train` or `val`.
        tokenizer: the model's tokenizer; if given, its vocabulary must be the folder's.
        sequence_tokens: tokens of a window; the model's context, at most 2,048, when None.
        isolate: read every document alone, as training with `document_mask` does.
        batch_size: windows of one forward pass, at most.
        progress: told of the tokens done.

    Raises:
        DataError: the folder is damaged, lacks the split, or was made with another tokenizer.
        ConfigError: a size is out of range.
        ModelError: the model's logits are not numbers.
    """
    settings = _Settings.of(model, sequence_tokens, isolate=isolate, batch_size=batch_size)
    manifest = read_manifest(folder)
    entry = next((found for name, found in manifest.splits.items() if name == split), None)
    if entry is None or not entry.num_tokens:
        names = ", ".join(name for name, found in manifest.splits.items() if found.num_tokens)
        raise DataError(f"{folder} has no split {split!r}; it has {names or 'only empty ones'}")
    vocabulary = open_vocabulary(folder, manifest, model=model, tokenizer=tokenizer)
    documents = shard_documents(
        folder / split, entry, manifest=manifest, bytes_v=token_bytes(vocabulary)
    )
    return _score(
        model,
        documents,
        start=[] if manifest.eos_id is None else [manifest.eos_id],
        settings=settings,
        total=entry.num_tokens,
        progress=progress,
        name=f"{folder}, {split}",
    )


def text_loss(
    model: PreTrainedModel,
    sources: Sequence[Path],
    *,
    tokenizer: PreTrainedTokenizerBase,
    text_field: str = "text",
    sequence_tokens: int | None = None,
    isolate: bool = False,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> LossResult:
    """Loss on text files, encoded as `strata data prepare` encodes them.

    Args:
        model: a causal language model on any device.
        sources: files and folders of parquet, jsonl and txt; rows hold a text, or `prompt` and
            `completion`, whose prompt carries no loss.
        tokenizer: the model's tokenizer.
        text_field: the field or column that holds a text.
        sequence_tokens: tokens of a window; the model's context, at most 2,048, when None.
        isolate: read every document alone.
        batch_size: windows of one forward pass, at most.
        progress: told of the bytes read.

    Raises:
        DataError: a file is missing or damaged, or there is no text in them.
        ConfigError: a size is out of range.
        ModelError: the model's logits are not numbers.
    """
    settings = _Settings.of(model, sequence_tokens, isolate=isolate, batch_size=batch_size)
    found = find_sources(list(sources))
    prefix = list(encode_prompt(tokenizer, ""))
    return _score(
        model,
        text_documents(
            found, options=ReadOptions(text_field=text_field), prefix=prefix, tokenizer=tokenizer
        ),
        start=[] if prefix else end_ids(tokenizer),
        settings=settings,
        total=sum(source.entry.num_bytes for source in found),
        progress=progress,
        name=", ".join(map(str, sources)),
    )


@dataclass(frozen=True)
class _Settings:
    """How the documents are put to the model."""

    window_tokens: int
    isolate: bool
    batch_size: int

    @classmethod
    def of(
        cls, model: PreTrainedModel, sequence_tokens: int | None, *, isolate: bool, batch_size: int
    ) -> _Settings:
        """Check the sizes, and fill in what the model says about itself."""
        check_batch_size(batch_size)
        limit = context_limit(model)
        if sequence_tokens is None:
            sequence_tokens = min(limit or DEFAULT_SEQUENCE_TOKENS, DEFAULT_SEQUENCE_TOKENS)
        if sequence_tokens < 1 or (limit is not None and sequence_tokens > limit):
            raise ConfigError(
                f"sequence of {sequence_tokens} tokens is not allowed: give 1 to "
                f"{limit or 'any number'}, the model's context"
            )
        vocab_size = model.config.get_text_config().vocab_size
        most = max(1, _MAX_LOGITS // (sequence_tokens * vocab_size))
        return cls(sequence_tokens, isolate, min(batch_size, most))


class _Window(NamedTuple):
    """n + 1 tokens, and which of the last n carry loss."""

    ids_t: NDArray[np.int64]
    scored_t: NDArray[np.bool_]


def _windows(
    stream: Iterable[ScoredDocument], *, start: list[int], tokens: int
) -> Iterator[_Window]:
    """Cut one stream into windows that overlap by a token.

    `start` stands for the end of a document before the first: what its first token follows in
    training.
    """
    ids_t = np.array(start, dtype=np.int64)
    scored_t = np.zeros(len(start), dtype=bool)
    for document in stream:
        ids_t = np.concatenate([ids_t, document.ids_t])
        scored_t = np.concatenate([scored_t, document.scored_t])
        while len(ids_t) > tokens:
            yield _Window(ids_t[: tokens + 1], scored_t[1 : tokens + 1])
            ids_t, scored_t = ids_t[tokens:], scored_t[tokens:]
    if len(ids_t) > 1:
        yield _Window(ids_t, scored_t[1:])


@dataclass
class _Tally:
    """Sums over the documents and windows seen so far."""

    num_bytes: int | None = 0
    done: int = 0

    def count(self, documents: Iterable[ScoredDocument]) -> Iterator[ScoredDocument]:
        """Pass documents through, adding them up."""
        for document in documents:
            self.done = document.done
            if self.num_bytes is not None and document.num_bytes is not None:
                self.num_bytes += document.num_bytes
            else:
                self.num_bytes = None
            yield document


def _score(
    model: PreTrainedModel,
    documents: Iterable[ScoredDocument],
    *,
    start: list[int],
    settings: _Settings,
    total: int,
    progress: Progress | None,
    name: str,
) -> LossResult:
    tally = _Tally()
    counted = tally.count(documents)
    streams: Iterable[Iterable[ScoredDocument]] = [counted]
    if settings.isolate:
        streams = ([document] for document in counted)
    windows = (
        window
        for stream in streams
        for window in _windows(stream, start=start, tokens=settings.window_tokens)
        if window.scored_t.any()
    )
    nats: list[float] = []
    counts: list[int] = []
    with evaluation_mode(model):
        while chunk := list(itertools.islice(windows, settings.batch_size * _SORTED_BATCHES)):
            # Windows of like length share a batch, so that little of it is padding.
            chunk.sort(key=lambda window: len(window.ids_t))
            for first in range(0, len(chunk), settings.batch_size):
                batch = chunk[first : first + settings.batch_size]
                nats += _score_batch(model, batch, name=name)
                counts += [int(window.scored_t.sum()) for window in batch]
            if progress is not None:
                progress(tally.done, total)
    if not counts:
        raise DataError(f"{name}: no token carries loss, there is nothing to measure")
    return LossResult(math.fsum(nats), sum(counts), tally.num_bytes, _stderr(nats, counts))


def _score_batch(model: PreTrainedModel, windows: Sequence[_Window], *, name: str) -> list[float]:
    """Nats of each window."""
    longest = max(len(window.scored_t) for window in windows)
    ids_bt = torch.zeros(len(windows), longest, dtype=torch.int64)
    mask_bt = torch.zeros_like(ids_bt)
    labels_bt = torch.full_like(ids_bt, -100)
    for row, window in enumerate(windows):
        check_tokens(model, window.ids_t.tolist(), name=name)
        size = len(window.scored_t)
        ids_bt[row, :size] = torch.from_numpy(window.ids_t[:-1])
        mask_bt[row, :size] = 1
        labels_t = np.where(window.scored_t, window.ids_t[1:], -100)
        labels_bt[row, :size] = torch.from_numpy(labels_t)
    logits_btv = model(
        input_ids=ids_bt.to(model.device),
        attention_mask=mask_bt.to(model.device),
        use_cache=False,
    ).logits.float()
    nats = torch.nn.functional.cross_entropy(
        logits_btv.flatten(0, 1), labels_bt.flatten().to(model.device), reduction="none"
    )
    nats_b = nats.view(labels_bt.shape).double().sum(dim=1).tolist()
    if any(map(math.isnan, nats_b)):
        raise ModelError(f"the model's logits are not numbers on {name}: its weights are damaged")
    return nats_b


def _stderr(nats: Sequence[float], counts: Sequence[int]) -> float | None:
    """Standard error of a mean over tokens that come in windows: the ratio estimator's."""
    if len(nats) < 2:
        return None
    mean = math.fsum(nats) / sum(counts)
    spread = math.fsum((n - mean * count) ** 2 for n, count in zip(nats, counts, strict=True))
    return math.sqrt(spread * len(nats) / (len(nats) - 1)) / sum(counts)
