"""Where the backward pass leaves what it owes to a value table, until the optimizer steps.

One table serves several layers, so its rows must not change while other layers' backward still
reads them, and clipping and accumulation need all gradients of a step at once. Each layer
therefore queues (rows, weights, grad_out), and the optimizer makes one pass over all of them.

torch's custom operators take tensors and numbers only, so a queue is named by a number; the map
from number to queue is weak and each table owns its queue alone.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_numbers = itertools.count()
_queues: weakref.WeakValueDictionary[int, UseQueue] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Use:
    """One layer's use of a table in one backward pass: grad[rows] += weights * grad_out."""

    rows_np: Tensor  # (n, p) int64
    weights_np: Tensor  # (n, p) fp32
    grad_out_nv: Tensor  # (n, v) fp32


class UseQueue:
    """The uses of one value table since its last update."""

    def __init__(self) -> None:
        self.number = next(_numbers)
        self.uses: list[Use] = []
        _queues[self.number] = self

    def take(self) -> list[Use]:
        """Empty the queue and return what it held, oldest first."""
        uses, self.uses = self.uses, []
        return uses

    def clear(self) -> None:
        """Forget everything queued."""
        self.uses = []

    def __len__(self) -> int:
        return len(self.uses)

    # A copied model gets queues of its own; a queue is never shared by two tables.
    def __deepcopy__(self, memo: dict[int, Any]) -> UseQueue:
        return UseQueue()

    def __reduce__(self) -> tuple[type[UseQueue], tuple[()]]:
        return UseQueue, ()


def queue_of(number: int) -> UseQueue:
    """The live queue with this number."""
    queue = _queues.get(number)
    assert queue is not None, f"value table queue {number} is gone: its table was deleted"
    return queue
