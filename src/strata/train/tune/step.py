"""References of a batch, encoded within the step and read by the model meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from strata.explicit.encode import Encoder
from strata.explicit.host import Host
from strata.explicit.reading import Reading
from strata.train.tune.collate import Reads
from strata.train.tune.recipe import TuneReading


class StepReading:
    """Lets one model read the references of each batch.

    Args:
        model: the decoder, under adapters if there are any.
        tokenizer: its own.
        config: how references are written and read.
        with_grad: keep the graph from what is read to the weights, where gradients are computed.

    Raises:
        HostError: the model cannot have explicit memory, or not as `config.memory` asks.
        ConfigError: references longer than the decoder's positions.
    """

    def __init__(self, model: Any, tokenizer: Any, config: TuneReading, *, with_grad: bool) -> None:
        decoder: PreTrainedModel = (
            model.get_base_model() if hasattr(model, "get_base_model") else model
        )
        self._batch_size, self._with_grad = config.encode_batch, with_grad
        self._encoder = Encoder(Host(decoder), tokenizer, config.memory, in_training=True)
        self._reading = Reading(decoder, tokenizer, config.memory, chunk_tokens=config.chunk_tokens)

    @contextmanager
    def __call__(self, reads: Reads) -> Iterator[None]:
        """Encode and read meanwhile; the backward pass may come later.

        Raises:
            DataError: a reference has more tokens than the settings allow.
            AttachError: from the forward pass: the model drops out attention, or the like.
        """
        if not reads.texts:
            yield
            return
        with_grad = self._with_grad and torch.is_grad_enabled()
        with ExitStack() as stack:
            with torch.set_grad_enabled(with_grad):
                memories = self._encoder.encode(
                    reads.texts, batch_size=self._batch_size, with_grad=with_grad
                )
                stack.enter_context(
                    self._reading.of_chunks(memories, reads.index_bcr, held_bcnr=reads.held_bcnr)
                )
            yield
