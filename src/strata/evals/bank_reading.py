"""A decoder reads memories that were found beforehand: one set for each row, whatever it says.

`attach` searches with every 64 tokens of a text; here the question has been searched with as a
whole, and all tokens of its prompt and answer read what it found.

Shapes: b rows, c chunks of a row (one: all tokens read the same), r references of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from strata.explicit.attach import attach
from strata.explicit.hits import Hit
from strata.explicit.memories import Memories
from strata.explicit.reading import Reading
from strata.explicit.source import BankSource

Load = Callable[[Sequence[str]], Memories]


class Given:
    """A source that finds the references that it was given, whatever is searched for."""

    def __init__(self, hits: Sequence[Hit], load: Load) -> None:
        self._hits, self.load = list(hits), load

    def find(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """The best `top_k` of them, for each query."""
        return [self._hits[:top_k] for _ in queries]


class BankReading:
    """Lets a decoder read a bank's memories, row by row.

    Args:
        model, tokenizer: those that the bank belongs to.
        source: the bank; cold references are encoded when they are first given, and kept.

    Raises:
        HostError: the model cannot have memory, or not as the bank's settings ask.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, source: BankSource) -> None:
        self._model, self._tokenizer, self._source = model, tokenizer, source
        self._reading = Reading(model, tokenizer, source.config)

    @contextmanager
    def rows(self, hits_b: Sequence[Sequence[Hit]]) -> Iterator[None]:
        """Rows of a direct call without a cache read these meanwhile; padding on the right."""
        ids = list(dict.fromkeys(hit.id for hits in hits_b for hit in hits))
        if not ids:
            yield
            return
        places = {identifier: place for place, identifier in enumerate(ids)}
        index_bcr = torch.full((len(hits_b), 1, max(map(len, hits_b))), -1)
        for row, hits in enumerate(hits_b):
            for rank, hit in enumerate(hits):
                index_bcr[row, 0, rank] = places[hit.id]
        memories = self._load(ids).to(self._model.device)
        with torch.no_grad(), self._reading.of_chunks(memories, index_bcr):
            yield

    @contextmanager
    def prompt(self, hits: Sequence[Hit]) -> Iterator[None]:
        """`generate` with one prompt reads these meanwhile, to its last token."""
        if not hits:
            yield
            return
        given = Given(hits, self._load)
        config = self._source.config
        with attach(self._model, given, tokenizer=self._tokenizer, config=config, top_k=len(hits)):
            yield

    def _load(self, ids: Sequence[str]) -> Memories:
        cold = self._source.cold(ids)
        if cold:
            self._source.warm(cold)
        return self._source.load(ids)
