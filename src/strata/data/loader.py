"""Batches of token sequences in an order that is a pure function of (seed, epoch, row)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from strata.config import FrozenConfig
from strata.data.dataset import TokenDataset
from strata.data.packing import ConcatPlan, DocumentPlan, Plan
from strata.data.shards import Shard
from strata.errors import CheckpointError, DataError

__all__ = ["IGNORE", "Loader", "LoaderConfig", "TokenDataset"]

IGNORE = -100  # the label that Hugging Face's losses leave out


class LoaderConfig(FrozenConfig):
    """What a batch looks like.

    Attributes:
        batch_size: sequences per rank and batch.
        sequence_tokens: the length of a sequence.
        seed: of the order.
        packing: `concat` cuts the stream of documents into windows; `document` packs whole
            documents, so that every sequence starts at a document border, and pads.
        document_mask: keep packed documents from attending to one another, by `position_ids`.
        chunk_tokens: also say of each token which chunk of its document it belongs to; None does
            not.
    """

    batch_size: Annotated[int, Field(ge=1)]
    sequence_tokens: Annotated[int, Field(ge=2, le=2**24)]
    seed: int = 42
    packing: Literal["concat", "document"] = "concat"
    document_mask: bool = False
    chunk_tokens: Annotated[int, Field(ge=1)] | None = None


class Loader:
    """An endless iterator of batches.

    Each batch is a dict of (batch_size, sequence_tokens) int64 tensors:

    - `input_ids`;
    - `labels`: the same ids in the same places, as Hugging Face models expect (they shift by
      themselves); -100 where there is no loss: padding, prompts, and with `document_mask` the
      first token of each document, which nothing in its own document predicts;
    - `position_ids`, with `document_mask` only: counting from 0 anew in each document (and in
      the padding);
    - `chunks` and `documents`, with `chunk_tokens` only, and not for a model: the number of each
      token's chunk and document in the split, -1 in the padding. Chunks are counted document by
      document, each from its first token on, as in `strata.data.references`.

    **Call the model with `use_cache=False` where batches have `position_ids`**:
    `model(**batch, use_cache=False)`. transformers 5 isolates the documents of a row only if it
    finds restarting positions, no attention mask and no cache; with the default `use_cache=True` it
    makes an empty cache, takes the positions for rotations only, and documents silently attend to
    one another. This holds for `attn_implementation` "sdpa", "eager" and "flex_attention" at any
    batch size; "flash_attention_2" isolates them at batch size 1 only.

    Padding needs no attention mask: it stands behind all documents, where causal attention never
    looks, and has no loss.

    Order: all epochs' rows form one endless sequence, each epoch in an order of its own, and
    batches are cut from it across the border of epochs. Rank r of w with batch size b takes the
    rows [r * b, (r + 1) * b) of each w * b, so that all ranks together read what one process with
    batch size w * b reads. Resuming with another w or b goes on at the same row.

    A plan of an epoch takes 8 bytes of memory per window (`concat`) or 16 per document
    (`document`), about twice that while it is made: 1e8 windows are 1.6 GB and some ten seconds.

    Args:
        dataset: what to read.
        config: what a batch looks like.
        rank: which part of each batch this process takes.
        world_size: how many processes share a batch.

    Raises:
        DataError: the dataset is shorter than one sequence, or rank is not below world_size.
    """

    def __init__(
        self, dataset: TokenDataset, config: LoaderConfig, *, rank: int = 0, world_size: int = 1
    ) -> None:
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} of {world_size}: give 0 <= rank < world_size")
        self._dataset = dataset
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._epoch = 0
        self._row = 0
        self._plan = self._make_plan(0)
        manifest = dataset.manifest
        padding = manifest.pad_id if manifest.pad_id is not None else manifest.eos_id
        self._pad_id = padding if padding is not None else 0
        self._chunk_starts: np.ndarray | None = None
        if config.chunk_tokens is not None:
            counts = -(-dataset.document_lengths().astype(np.int64) // config.chunk_tokens)
            self._chunk_starts = np.cumsum(counts) - counts

    @property
    def epoch(self) -> int:
        """The epoch of the next batch's first row, from 0."""
        return self._epoch

    @property
    def num_rows(self) -> int:
        """Rows (sequences) of that epoch, over all ranks."""
        return self._plan.num_rows

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        size = self._config.batch_size
        shape = (size, self._config.sequence_tokens)
        batch = _Batch(
            shape,
            pad_id=self._pad_id,
            document_mask=self._config.document_mask,
            chunks=self._chunk_starts is not None,
        )
        self._advance(self._rank * size)
        for index in range(size):
            self._advance(0)
            self._fill(batch, index)
            self._row += 1
        self._advance((self._world_size - 1 - self._rank) * size)
        return batch.tensors()

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts, the same on every rank; small and JSON-able."""
        return {"epoch": self._epoch, "row": self._row, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            CheckpointError: the state is not one, or its dataset or order is another.
        """
        epoch, row = state.get("epoch"), state.get("row")
        if not (isinstance(epoch, int) and isinstance(row, int) and epoch >= 0 and row >= 0):
            raise CheckpointError(f"not the state of a loader: epoch {epoch!r}, row {row!r}")
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise CheckpointError(
                    f"the loader's {name} was {state.get(name)!r} when the state was saved, now it "
                    f"is {value!r}: give the same data and settings, or start over"
                )
        plan = self._make_plan(epoch)
        if row > plan.num_rows:
            raise CheckpointError(f"row {row} of an epoch of {plan.num_rows} rows: start over")
        self._epoch, self._row, self._plan = epoch, row, plan

    def _identity(self) -> dict[str, Any]:
        """What must not change under a state."""
        return {
            "num_tokens": self._dataset.num_tokens,
            "num_documents": self._dataset.num_documents,
            "sequence_tokens": self._config.sequence_tokens,
            "seed": self._config.seed,
            "packing": self._config.packing,
        }

    def _make_plan(self, epoch: int) -> Plan:
        make = ConcatPlan if self._config.packing == "concat" else DocumentPlan
        return make(
            self._dataset,
            sequence_tokens=self._config.sequence_tokens,
            seed=self._config.seed,
            epoch=epoch,
        )

    def _advance(self, rows: int) -> None:
        """Skip rows, and stand at a row that exists."""
        self._row += rows
        while self._row >= self._plan.num_rows:
            self._row -= self._plan.num_rows
            self._epoch += 1
            self._plan = self._make_plan(self._epoch)

    def _fill(self, batch: _Batch, index: int) -> None:
        filled = 0
        for shard, start, stop in self._plan.row(self._row):
            tokens = shard.tokens[start:stop]
            self._dataset.check_ids(tokens, shard)
            batch.put(index, filled, tokens)
            if self._config.document_mask or self._dataset.has_prompts:
                batch.mark_documents(index, filled, shard, start, stop)
            if self._chunk_starts is not None and self._config.chunk_tokens is not None:
                batch.mark_chunks(
                    index, filled, shard, start, stop, self._chunk_starts, self._config.chunk_tokens
                )
            filled += stop - start
        batch.pad(index, filled)


class _Batch:
    """The arrays of a batch while they are filled."""

    def __init__(
        self, shape: tuple[int, int], *, pad_id: int, document_mask: bool, chunks: bool
    ) -> None:
        self._input_ids = np.full(shape, pad_id, np.int64)
        self._labels = np.full(shape, IGNORE, np.int64)
        self._positions = np.empty(shape, np.int64) if document_mask else None
        self._chunks = np.full((2, *shape), -1, np.int64) if chunks else None

    def put(self, index: int, at: int, tokens: np.ndarray) -> None:
        """Put tokens into a row."""
        self._input_ids[index, at : at + len(tokens)] = tokens
        self._labels[index, at : at + len(tokens)] = tokens

    def mark_documents(self, index: int, at: int, shard: Shard, start: int, stop: int) -> None:
        """Take the loss off prompts, and restart positions where documents start."""
        first = int(np.searchsorted(shard.documents, start, side="right")) - 1
        last = int(np.searchsorted(shard.documents, stop, side="left"))
        starts = shard.documents[first:last]
        borders = np.append(np.maximum(starts, start), stop)
        counts = np.diff(borders)
        offsets = np.arange(start, stop)
        window = slice(at, at + stop - start)
        labels = self._labels[index, window]
        loss_starts = np.repeat(starts + shard.loss_from[first:last], counts)
        labels[offsets < loss_starts] = IGNORE
        if self._positions is not None:
            self._positions[index, window] = offsets - np.repeat(borders[:-1], counts)
            labels[borders[:-1] - start] = IGNORE

    def mark_chunks(
        self,
        index: int,
        at: int,
        shard: Shard,
        start: int,
        stop: int,
        chunk_starts: np.ndarray,
        chunk_tokens: int,
    ) -> None:
        """Number the chunks and documents that tokens belong to."""
        assert self._chunks is not None
        offsets = np.arange(start, stop)
        local = np.searchsorted(shard.documents, offsets, side="right") - 1
        document = local + shard.first_document
        chunk = chunk_starts[document] + (offsets - shard.documents[local]) // chunk_tokens
        self._chunks[:, index, at : at + stop - start] = chunk, document

    def pad(self, index: int, at: int) -> None:
        """Count positions in the padding behind the filled part of a row."""
        if self._positions is not None:
            self._positions[index, at:] = np.arange(self._positions.shape[1] - at)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The batch."""
        tensors = {
            "input_ids": torch.from_numpy(self._input_ids),
            "labels": torch.from_numpy(self._labels),
        }
        if self._positions is not None:
            tensors["position_ids"] = torch.from_numpy(self._positions)
        if self._chunks is not None:
            tensors["chunks"], tensors["documents"] = torch.from_numpy(self._chunks)
        return tensors
