"""Continual training: references are found for a batch, encoded within the step, and read.

The encoding is part of the step's graph (unless `detach` is set), so the decoder learns to write
memories and to read them at once. It runs under the same precision as the forward pass, in one pass
for a micro-batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from strata.data.manifest import read_manifest
from strata.data.references import ChunkReferences, read_references
from strata.explicit.encode import Encoder
from strata.explicit.host import Host
from strata.explicit.reading import Documents, Reading
from strata.train.recipe import DataConfig, ReadingConfig

Batch = dict[str, Tensor]

# What `References.add_to` adds to a batch, and `ContinualReading` takes out again.
_OWN = ("own_references", "own_documents", "token_documents")


class References:
    """The references of a run's data, train and val as one row of numbers.

    Args:
        reading: where they are.
        data: what they were found for.

    Attributes:
        folder: where they are.
        chunk_tokens: tokens of a chunk.
        sha256: of the folder's manifest, which holds the sha256 of every file.

    Raises:
        DataError: the folder cannot be used, or belongs to other data.
    """

    def __init__(self, reading: ReadingConfig, data: DataConfig) -> None:
        self.folder = reading.references
        manifest = read_references(self.folder)
        self.chunk_tokens = manifest.origin.config.chunk_tokens
        self.sha256 = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()
        self._splits = {
            str(split): ChunkReferences.open(self.folder, tokens=data.dir, split=split)
            for split, entry in read_manifest(data.dir).splits.items()
            if entry.shards
        }
        self._first: dict[str, int] = {}
        total = 0
        for split, references in self._splits.items():
            self._first[split] = total
            total += references.num_references

    def add_to(self, batch: Batch, split: str) -> Batch:
        """Name the references of a batch.

        A row's chunks are counted from its first column; each gets the reference of that chunk of a
        document which most of its tokens belong to.

        Args:
            batch: of the loader, with `chunks` and `documents` (b, t).
            split: where it is from.

        Returns:
            The batch with, instead of these, own_references (b, c), -1 for none, own_documents
            (b, c) and token_documents (b, t), all int64.
        """
        chunks_bt, documents_bt = batch.pop("chunks"), batch.pop("documents")
        n, t = self.chunk_tokens, chunks_bt.shape[1]
        padded = torch.nn.functional.pad(chunks_bt, (0, -t % n), value=-1)
        chunks_bcn = padded.unflatten(1, (-1, n))
        alike_bcn = (chunks_bcn[..., None] == chunks_bcn[..., None, :]).sum(-1)
        at_bc1 = (alike_bcn * (chunks_bcn >= 0)).argmax(-1, keepdim=True)
        own_bc = chunks_bcn.gather(2, at_bc1)[..., 0]
        padded = torch.nn.functional.pad(documents_bt, (0, -t % n), value=-1)
        numbers = self._splits[split].numbers(own_bc.numpy())
        numbers = np.where(numbers < 0, -1, numbers + self._first[split])
        batch["own_references"] = torch.from_numpy(numbers)
        batch["own_documents"] = padded.unflatten(1, (-1, n)).gather(2, at_bc1)[..., 0]
        batch["token_documents"] = documents_bt
        return batch

    def text(self, number: int) -> str:
        """The text of a reference."""
        split = next(name for name in reversed(self._first) if number >= self._first[name])
        return self._splits[split][number - self._first[split]].text


class ContinualReading:
    """Lets a model in training read the references of each batch.

    Args:
        model: the decoder.
        tokenizer: its own.
        references: those of its data.
        config: how they are written and read.
        document_mask: documents of a row do not read each other's references.

    Attributes:
        reading: reads for the batches.

    Raises:
        HostError: the model cannot have explicit memory, or not as `config.memory` asks.
        ConfigError: references longer than the decoder's positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        references: References,
        config: ReadingConfig,
        *,
        document_mask: bool,
    ) -> None:
        self._references = references
        self._batch_size, self._detach = config.encode_batch, config.detach
        self._document_mask = document_mask
        self._encoder = Encoder(Host(model), tokenizer, config.memory, in_training=True)
        self.reading = Reading(
            model,
            tokenizer,
            config.memory,
            chunk_tokens=references.chunk_tokens,
            reach=config.reach,
            query=config.query,
        )

    @contextmanager
    def __call__(self, batch: Batch) -> Iterator[None]:
        """Encode the references of a batch and let the model read them meanwhile.

        Args:
            batch: with what `References.add_to` added; it is taken out.

        Raises:
            DataError: a reference has more tokens than the settings allow.
            AttachError: from the forward pass: the model drops out attention, or the like.
        """
        own_bc, of_chunks_bc, of_tokens_bt = (batch.pop(name).cpu() for name in _OWN)
        numbers, places = own_bc[own_bc >= 0].unique(return_inverse=True)
        if not len(numbers):
            yield
            return
        texts = [self._references.text(number) for number in numbers.tolist()]
        index_bc = torch.full_like(own_bc, -1)
        index_bc[own_bc >= 0] = places
        documents = Documents(of_tokens_bt, of_chunks_bc) if self._document_mask else None
        with_grad = torch.is_grad_enabled() and not self._detach
        with ExitStack() as stack:
            with torch.set_grad_enabled(with_grad):  # entering reads the marker, too
                memories = self._encoder.encode(
                    texts, batch_size=self._batch_size, with_grad=with_grad
                )
                stack.enter_context(self.reading(memories, index_bc, documents=documents))
            yield
