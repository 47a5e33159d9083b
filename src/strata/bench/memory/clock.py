"""What an answer's time goes to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import StoppingCriteria

from strata.bench.timing import wait_for
from strata.explicit.bank import Bank
from strata.explicit.embed import Embedder
from strata.explicit.hits import Hit
from strata.explicit.memories import Memories
from strata.explicit.retrieve import Retriever
from strata.explicit.source import BankSource

STAGES = ("embed", "search", "load", "inject", "prefill", "decode")


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


class TimedEmbedder:
    """An embedder whose queries are on the clock."""

    def __init__(self, embedder: Embedder, clock: Clock) -> None:
        self._embedder, self._clock = embedder, clock
        self.name, self.width = embedder.name, embedder.width

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._embedder.embed_documents(texts)

    def embed_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        with self._clock.timed("embed"):
            return self._embedder.embed_queries(texts)


class TimedSource(BankSource):
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


class Watch(StoppingCriteria):
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
