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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
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
    """The uses of one value table since its last update.

    Uses are copied into tensors that stay from step to step, one after the other, so that those
    of all layers are one tensor when the optimizer comes: joining them again, in fresh memory,
    costs as much as sorting them. What does not fit (the first step, another shape) stands alone.
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        self.uses: list[Use] = []
        self._room: Use | None = None  # for as many bags as were taken at once so far
        self._filled = 0  # bags of it in use
        _queues[self.number] = self

    def put(
        self, rows_np: Tensor, weights_np: Tensor, grad_out_nv: Tensor, *, dtype: torch.dtype
    ) -> None:
        """Queue a copy of a use; weights and grad_out become `dtype`."""
        start, stop = self._filled, self._filled + len(rows_np)
        room, given = self._room, (rows_np, weights_np, grad_out_nv)
        if room is None or stop > len(room.rows_np) or not _same_form(room, given, dtype):
            weights_np, grad_out_nv = (x.to(dtype, copy=True) for x in given[1:])
            use = Use(rows_np.clone(), weights_np, grad_out_nv)
        else:
            use = Use(
                *(to[start:stop].copy_(x) for to, x in zip(_tensors(room), given, strict=True))
            )
            self._filled = stop
        self.uses.append(use)

    def take(self) -> list[Use]:
        """Empty the queue and return what it held, oldest first; valid until the next `put`."""
        uses, room = self.uses, self._room
        self.clear()
        if uses:
            first, num_bags = _tensors(uses[0]), sum(len(use.rows_np) for use in uses)
            fits = room is not None and _same_form(room, first, uses[0].weights_np.dtype)
            if room is None or not fits or num_bags > len(room.rows_np):
                self._room = Use(*(x.new_empty(num_bags, *x.shape[1:]) for x in first))
        return uses

    def clear(self) -> None:
        """Forget everything queued."""
        self.uses, self._filled = [], 0

    def __len__(self) -> int:
        return len(self.uses)

    # A copied model gets queues of its own; a queue is never shared by two tables.
    def __deepcopy__(self, memo: dict[int, Any]) -> UseQueue:
        return UseQueue()

    def __reduce__(self) -> tuple[type[UseQueue], tuple[()]]:
        return UseQueue, ()


def joined(parts: Sequence[Tensor]) -> Tensor:
    """All parts in one tensor, contiguous; copied only where they do not follow each other."""
    first = parts[0].contiguous()
    if len(parts) == 1:
        return first
    end_bytes, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == storage and part.data_ptr() == end_bytes
        if not same or not part.is_contiguous():
            return torch.cat(list(parts))
        end_bytes += part.numel() * part.element_size()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _tensors(use: Use) -> tuple[Tensor, Tensor, Tensor]:
    return use.rows_np, use.weights_np, use.grad_out_nv


def _same_form(room: Use, given: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether tensors differ from the room in no more than the number of bags, and dtypes fit."""
    return room.weights_np.dtype == dtype and all(
        to.shape[1:] == x.shape[1:] and to.device == x.device
        for to, x in zip(_tensors(room), given, strict=True)
    )


def queue_of(number: int) -> UseQueue:
    """The live queue with this number."""
    queue = _queues.get(number)
    assert queue is not None, f"value table queue {number} is gone: its table was deleted"
    return queue
