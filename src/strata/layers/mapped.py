"""Value tables that stay on disk: rows are read when picked, and hot ones kept in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from strata.errors import ConfigError, ModelError
from strata.layers.row_file import RowFile, RowPlace
from strata.layers.stored import ReadOnlyTable, training_error
from strata.ops import row_dots, weighted_bag
from strata.ops.row_cache import CacheCounts, RowCache
from strata.ops.rows import check_rows

_Read = Callable[[Tensor, Tensor], Tensor]


class MappedTable(ReadOnlyTable):
    """A table larger than memory, read out of a saved model's safetensors file.

    Picks become slots of a cache of hot rows; rows that are not there are asked of the kernel all
    at once, copied into slots, and then the bag runs over the cache as over any table. Calls whose
    picks might not fit are done a few bags at a time. Sums run on the CPU, whatever the device of
    the model: rows and weights go there, results come back.

    The table is no part of the model's state: nothing is saved, moved or cast. Several threads may
    read; they take turns.

    Args:
        place: where the rows lie: float32, bfloat16 or float64, or the codes of int8 or fp8.
        scales_r: (r,) fp32 for codes, None for floats; kept in memory.
        cache_bytes: memory for hot rows; four bytes a row of the whole table come on top.
        picks_per_token: rows that one token reads: the least that the cache must hold.

    Raises:
        ConfigError: the cache is smaller than the rows of one token.
        ModelError: the file cannot be read or ends too early.
    """

    storage = "mapped"

    def __init__(
        self,
        place: RowPlace,
        scales_r: Tensor | None,
        *,
        cache_bytes: int,
        picks_per_token: int = 1,
    ) -> None:
        super().__init__()
        num_slots = min(place.num_rows, cache_bytes // max(1, place.row_bytes))
        least = min(place.num_rows, picks_per_token)
        if num_slots < least:
            raise ConfigError(
                f"a cache of {cache_bytes:,} bytes a table holds {num_slots} rows of "
                f"{place.row_bytes:,} bytes, one token reads {picks_per_token}: give at least "
                f"{least * place.row_bytes:,}"
            )
        self.place, self.scales_r = place, scales_r
        self.cache_bytes, self.picks_per_token = cache_bytes, picks_per_token
        self._file = RowFile(place)
        self._cache = RowCache(place.num_rows, num_slots, row_bytes=place.row_bytes)
        # Not zeroed: memory is taken as slots fill.
        # On the CPU whatever the default device: from_pretrained builds on "meta".
        self._slots_sv = torch.empty(num_slots, place.width, dtype=place.dtype, device="cpu")
        self._lock = threading.Lock()

    @property
    def num_rows(self) -> int:
        """r."""
        return self.place.num_rows

    @property
    def width(self) -> int:
        """v."""
        return self.place.width

    @property
    def counts(self) -> CacheCounts:
        """Hits, misses, evictions and bytes read since the table was opened."""
        return self._cache.counts

    def bag(self, rows_np: Tensor, weights_np: Tensor) -> Tensor:
        self.refuse_training()
        return self._call(self._bag, rows_np, weights_np)

    def dots(self, rows_np: Tensor, vectors_nv: Tensor) -> Tensor:
        self.refuse_training()
        return self._call(self._dots, rows_np, vectors_nv)

    def blocks(self, rows_per_block: int) -> Iterator[Tensor]:
        """All rows in order, as stored, past the cache."""
        if self.scales_r is not None:
            raise ModelError("the value tables are stored as codes already")
        return self._file.blocks(rows_per_block)

    def forget(self) -> None:
        """Empty the cache, and tell the system that the file's pages are not needed soon."""
        with self._lock:
            self._cache.forget()
            self._file.forget()

    @torch.compiler.disable
    def _call(self, read: _Read, rows_np: Tensor, other: Tensor) -> Tensor:
        if torch.is_grad_enabled() and other.requires_grad:
            return _NoBackward.apply(read, rows_np, other)
        return read(rows_np, other)

    def _bag(self, rows_np: Tensor, weights_np: Tensor) -> Tensor:
        rows, weights = self._on_cpu(rows_np, weights_np)
        if self.scales_r is not None:
            weights = weights * self.scales_r[rows]
        return self._over_cache(weighted_bag, rows, weights).to(rows_np.device)

    def _dots(self, rows_np: Tensor, vectors_nv: Tensor) -> Tensor:
        rows, vectors = self._on_cpu(rows_np, vectors_nv)
        out_np = self._over_cache(row_dots, rows, vectors)
        if self.scales_r is not None:
            out_np = out_np * self.scales_r[rows]
        return out_np.to(rows_np.device)

    def _on_cpu(self, rows_np: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        rows_np = rows_np.to("cpu").contiguous()
        check_rows(self.num_rows, rows_np)
        return rows_np, other.to("cpu")

    def _over_cache(
        self, operation: Callable[..., Tensor], rows_np: Tensor, other: Tensor
    ) -> Tensor:
        """Run a bag operation with slots for rows, in pieces whose rows are sure to fit."""
        n, p = rows_np.shape
        num_slots = self._cache.num_slots
        step = num_slots // max(1, p)
        if num_slots == self.num_rows or n * p <= num_slots:
            step = max(1, n)
        elif step == 0:
            raise ValueError(f"a bag of {p} rows does not fit in a cache of {num_slots} rows")
        parts = []
        with self._lock:
            for start in range(0, max(1, n), step):
                part = slice(start, start + step)
                slots = self._fetch(rows_np[part])
                parts.append(operation(self._slots_sv, slots, other[part]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _fetch(self, rows_np: Tensor) -> Tensor:
        """The slots of rows, all of them filled."""
        try:
            slots, missing = self._cache.admit(rows_np.numpy().reshape(-1))
            if len(missing.rows):
                self._file.read(missing, self._slots_sv)
        except BaseException:  # an interrupted read leaves slots that hold other rows
            self._cache.forget()
            raise
        return torch.from_numpy(slots).view(rows_np.shape)

    def __reduce__(self) -> tuple[Callable[..., MappedTable], tuple[Any, ...]]:
        """A copy maps the same file and has a cache of its own."""
        sizes = (self.cache_bytes, self.picks_per_token)
        return _reopen, (self.place, self.scales_r, *sizes, self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, cache_rows={self._cache.num_slots}"


class _NoBackward(torch.autograd.Function):
    """Reads without a graph; whoever then asks for gradients hears why there are none."""

    @staticmethod
    def forward(ctx: Any, read: _Read, rows_np: Tensor, other: Tensor) -> Tensor:
        return read(rows_np, other)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise training_error(MappedTable.storage)


def _reopen(
    place: RowPlace, scales_r: Tensor | None, cache_bytes: int, picks: int, training: bool
) -> MappedTable:
    table = MappedTable(place, scales_r, cache_bytes=cache_bytes, picks_per_token=picks)
    return table.train(training)


def cache_counts(model: nn.Module) -> dict[str, CacheCounts]:
    """What the cache of each mapped table did, by the table's name."""
    return {n: m.counts for n, m in model.named_modules() if isinstance(m, MappedTable)}
