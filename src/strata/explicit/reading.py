"""Reading in a training step: each chunk of a batch reads the references of its surroundings.

    reading = Reading(model, tokenizer, config)
    memories = encoder.encode(texts, with_grad=True)
    with reading(memories, own_bc):
        loss = model(**batch, use_cache=False).loss
    loss.backward()

What is computed is what `attach` computes for a prompt: one softmax over the marker, the memories
and the causal context, memories before the text. Here the memories belong to chunks counted from a
row's first column, gradients flow through all of it, and nothing is searched.

Shapes: b rows, t tokens of a row, c chunks of a row, r references that a chunk reads, n memories,
s memory heads of all layers, g memory heads of a layer, k KV heads, p tokens kept, m tokens of the
marker, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from strata.explicit.attach.fetch import AttachError
from strata.explicit.attach.pieces import Query
from strata.explicit.attach.placing import marker_states
from strata.explicit.chunk_reading import ChunkReading, filled
from strata.explicit.encode import marker_ids
from strata.explicit.host import Host
from strata.explicit.memories import Memories
from strata.explicit.settings import ExplicitMemoryConfig
from strata.ops.memory_attention import memory_attention


@dataclass(frozen=True)
class Documents:
    """Which document tokens and chunks belong to, so that none reads what another asked for.

    Attributes:
        of_tokens_bt: a number for each document of a row.
        of_chunks_bc: of the document that a chunk's own reference was found for.
    """

    of_tokens_bt: Tensor
    of_chunks_bc: Tensor


class Reading:
    """Lets a decoder read, chunk by chunk, while a block lasts; afterwards it is as it was.

    Chunk j of a row reads its own reference and those of the `reach - 1` chunks before it. Chunks
    without any attend plainly, bit for bit where the decoder's attention is sdpa. Text counts its
    positions from 0, in each document anew where it restarts; padding stands on the right.
    At sequential positions a chunk's own reference stands first, as the best hit does in `attach`.

    The backward pass may run inside the block or after it, also with activation checkpointing (not
    the reentrant kind). One object serves all steps of a run; it holds no weights.

    Args:
        model: a transformers decoder with sdpa or eager attention.
        tokenizer: the model's.
        config: the settings that the memories are encoded with.
        chunk_tokens: tokens of a chunk.
        reach: how many chunks' references a chunk reads, its own included.
        query: "previous": a chunk reads what was found with the one before it, so the references
            of the `reach` chunks before it and not its own.

    Attributes:
        host: the decoder.
        shape: of the memories that are read.
        marker_ids: tokens of the marker; may be none.

    Raises:
        AttachError: chunk_tokens or reach below 1.
        HostError: the model cannot have memory, or not as the settings ask.

    Source: "Memory3" (arXiv 2407.01178), section 3.5.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        config: ExplicitMemoryConfig,
        *,
        chunk_tokens: int = 64,
        reach: int = 5,
        query: Query = "own",
    ) -> None:
        for name, given in (("chunk_tokens", chunk_tokens), ("reach", reach)):
            if given < 1:
                raise AttachError(f"{name} must be at least 1, given {given}")
        self.host = Host(model)
        self.shape = self.host.memory_shape(config)
        self.marker_ids = marker_ids(tokenizer, config.marker)
        self.chunk_tokens = chunk_tokens
        self.reach = reach
        self.query = query
        self._config = config
        self._read: ChunkReading | None = None
        self._again = False

    @contextmanager
    def __call__(
        self, memories: Memories, own_bc: Tensor, *, documents: Documents | None = None
    ) -> Iterator[None]:
        """Read these memories meanwhile.

        Args:
            memories: n of them, on the decoder's device; with a graph where gradients are wanted.
            own_bc: int64, which memory is a chunk's own; -1 where it has none.
            documents: None where a row is one document, or documents may read each other's.

        Raises:
            AttachError: memories of another shape, no such memory, or, from the forward pass,
                another number of rows or chunks, a cache that holds tokens, attention dropout.
                Documents at sequential positions.
        """
        if documents is not None:
            b, c = own_bc.shape
            tokens = documents.of_tokens_bt.shape
            if documents.of_chunks_bc.shape != own_bc.shape or (
                tokens[0], -(-tokens[1] // self.chunk_tokens)
            ) != (b, c):  # fmt: skip
                raise AttachError(
                    f"documents of {tuple(documents.of_chunks_bc.shape)} chunks and "
                    f"{tuple(tokens)} tokens do not fit own_bc of {b} rows and {c} chunks"
                )
        index_bcr = self.within_reach(own_bc)
        if self._config.positions == "sequential":
            index_bcr = index_bcr.flip(-1)
        held_bcnr = None if documents is None else self._asked(documents, own_bc.shape[1])
        with self._of_chunks(memories, index_bcr, held_bcnr, shared=False):
            yield

    def of_chunks(
        self, memories: Memories, index_bcr: Tensor, *, held_bcnr: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Read memories named chunk by chunk meanwhile, whatever the reach.

        Args:
            memories: n of them, on the decoder's device; with a graph where gradients are wanted.
            index_bcr: int64, which memories a chunk reads, best first; -1 for none. c may be 1: all
                chunks of a row read the same, and nothing is copied for each.
            held_bcnr: bool, which of them each token of a chunk reads, each dimension 1 or of its
                size (n: chunk_tokens); None for all. Not at sequential positions, which are a
                chunk's.

        Raises:
            AttachError: memories of another shape, no such memory, or, from the forward pass,
                another number of rows or chunks, a cache that holds tokens, attention dropout.
        """
        return self._of_chunks(memories, index_bcr, held_bcnr, shared=index_bcr.shape[1] == 1)

    @contextmanager
    def _of_chunks(
        self, memories: Memories, index_bcr: Tensor, held_bcnr: Tensor | None, *, shared: bool
    ) -> Iterator[None]:
        if memories.keys_nstd.shape[1:] != (len(self.shape.heads), self.shape.tokens,
                                            self.shape.head_dim):  # fmt: skip
            raise AttachError(
                f"memories are {tuple(memories.keys_nstd.shape[1:])}, this model reads "
                f"({len(self.shape.heads)}, {self.shape.tokens}, {self.shape.head_dim}): encode "
                "them with the same settings"
            )
        if held_bcnr is not None and self._config.positions == "sequential":
            raise AttachError(
                "at sequential positions all tokens of a chunk read the same memories: let them do "
                "so, or set positions to parallel"
            )
        # The one look at numbers: without it a wrong index would end a process on a GPU.
        if index_bcr.numel():
            least, most = int(index_bcr.min()), int(index_bcr.max())
            if not -1 <= least <= most < len(memories):
                raise AttachError(
                    f"chunks name memories {least} to {most}; there are {len(memories)}, and -1 "
                    "stands for none"
                )
        read = self._prepare(memories, index_bcr.to(self.host.device), held_bcnr, shared=shared)
        with ExitStack() as stack:
            for layer in self.host.model.modules():
                func = getattr(layer, "_gradient_checkpointing_func", None)
                if func is not None and getattr(layer, "gradient_checkpointing", False):
                    stack.enter_context(self._checkpointed(layer, func, read))
            stack.enter_context(self._reads(read, again=False))
            yield

    def within_reach(self, states_bc: Tensor) -> Tensor:
        """(b, c, reach): of each chunk those of the chunks it reads from, the nearest last; -1
        where there is none."""
        late = int(self.query == "previous")
        states_bc = F.pad(states_bc.to(self.host.device), (self.reach - 1 + late, -late), value=-1)
        return states_bc.unfold(1, self.reach, 1)

    def _asked(self, documents: Documents, chunks: int) -> Tensor:
        """(b, c, n, reach): whether a token's document asked for what its chunk may read."""
        n, device = self.chunk_tokens, self.host.device
        asked_bcr = self.within_reach(documents.of_chunks_bc)
        asks_bt = documents.of_tokens_bt.to(device)
        asks_bt = F.pad(asks_bt, (0, chunks * n - asks_bt.shape[1]), value=-1)
        return asks_bt.unflatten(1, (-1, n))[..., None] == asked_bcr[:, :, None]

    def _prepare(
        self, memories: Memories, index_bcr: Tensor, held_bcnr: Tensor | None, *, shared: bool
    ) -> ChunkReading | None:
        if not len(memories) or not index_bcr.shape[2]:
            return None
        memories, index_bcr, held_bcnr = filled(memories, index_bcr, held_bcnr)
        marker = []
        if self.marker_ids:
            marker = marker_states(self.host, self.marker_ids, with_grad=torch.is_grad_enabled())
        return ChunkReading(
            self.host,
            memories,
            marker,
            index_bcr,
            held_bcnr,
            shape=self.shape,
            config=self._config,
            chunk_tokens=self.chunk_tokens,
            shared=shared,
        )

    @contextmanager
    def _reads(self, read: ChunkReading | None, *, again: bool) -> Iterator[None]:
        before = self._read, self._again
        self._read, self._again = read, again
        try:
            with self.host.intercepted(self._attend):
                yield
        finally:
            self._read, self._again = before

    @contextmanager
    def _checkpointed(
        self, layer: nn.Module, func: Callable[..., Any], read: ChunkReading | None
    ) -> Iterator[None]:
        """Let this layer read the same when the backward pass computes it again."""
        if isinstance(func, partial) and func.keywords.get("use_reentrant", False):
            raise AttachError(
                "reentrant activation checkpointing loses the gradients of what layers read: "
                "enable it with use_reentrant=False"
            )

        def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def run(*inputs: Any, **named: Any) -> Any:
                with self._reads(read, again=True):
                    return function(*inputs, **named)

            return func(run, *args, **kwargs)

        layer._gradient_checkpointing_func = checkpoint  # type: ignore[assignment]
        try:
            yield
        finally:
            layer._gradient_checkpointing_func = func  # type: ignore[assignment]

    def _attend(
        self,
        underneath: Callable[..., tuple[Tensor, Tensor | None]],
        module: Any,
        query_bhtd: Tensor,
        key_bktd: Tensor,
        value_bktd: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        read = self._read
        # Within the backward pass only our own checkpoints read. Others, such as those of the
        # references' encoding, compute again what was computed without memory.
        if read is None or not (self._again or _forward()):
            return underneath(module, query_bhtd, key_bktd, value_bktd, mask, **kwargs)
        read.check(module, query_bhtd, key_bktd, kwargs)
        layer = read.layer(int(module.layer_idx), query_bhtd, kwargs.get("position_ids"))
        if layer is None:
            return underneath(module, query_bhtd, key_bktd, value_bktd, mask, **kwargs)
        out = memory_attention(
            query_bhtd,
            key_bktd,
            value_bktd,
            layer.keys_bckmd,
            layer.values_bckmd,
            held_bcknm=layer.held_bcknm,
            chunk_tokens=self.chunk_tokens,
            mask=mask,
            scaling=kwargs.get("scaling"),
            softcap=kwargs.get("softcap"),
        )
        return out.transpose(1, 2).contiguous(), None


def _forward() -> bool:
    """Whether no backward pass is running, as torch's own checkpoints ask."""
    return torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1
