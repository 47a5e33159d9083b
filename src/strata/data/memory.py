"""How the memory that `prepare` may use is shared out."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from strata.data.readers import MAX_DOCUMENT_BYTES
from strata.errors import ConfigError

_LEAST_FREE_BYTES = 128_000_000


@dataclass(frozen=True)
class MemoryPlan:
    """How `memory_gb` is shared out.

    Attributes:
        batch_bytes: text encoded in one go.
        max_document_bytes: the longest document that can be encoded within the memory.
        run_bytes: tokens sorted in memory before they are spilled.
        range_bytes: tokens merged in memory.
    """

    batch_bytes: int
    max_document_bytes: int
    run_bytes: int
    range_bytes: int


def plan_memory(memory_gb: float, *, workers: int = 0, workers_bytes: int = 0) -> MemoryPlan:
    """Share out what `memory_gb` leaves beside the interpreter and its libraries.

    Encoding takes 60 times the bytes of a batch and up to 110 times those of one long document;
    a run is held twice while it is sorted. Runs stay below 128 MB however much memory there is;
    longer ones would not make the merge faster.

    Args:
        memory_gb: for this process and the workers, in 1e9 bytes.
        workers: processes that encode.
        workers_bytes: what they hold before they do.

    Raises:
        ConfigError: the workers leave too little.
    """
    free_bytes = int(memory_gb * 1e9) - held_bytes() - workers_bytes
    if workers and free_bytes < _LEAST_FREE_BYTES:
        needed_gb = (int(memory_gb * 1e9) - free_bytes + _LEAST_FREE_BYTES) / 1e9
        raise ConfigError(
            f"memory_gb is {memory_gb:g}: {workers} workers need {needed_gb:.1f} (each holds "
            f"{workers_bytes / workers / 1e9:.2f}): give more, or fewer workers"
        )
    free_bytes = max(_LEAST_FREE_BYTES, free_bytes)
    return MemoryPlan(
        batch_bytes=min(2**21, free_bytes // (128 * (workers + 2))),
        max_document_bytes=min(MAX_DOCUMENT_BYTES, max(2**20, free_bytes // 128)),
        run_bytes=min(2**27, free_bytes // 8),
        range_bytes=min(2**31, free_bytes // 4),
    )


def held_bytes() -> int:
    """The memory that this process holds now.

    Not the most it ever held: Linux lets a process inherit that from the one which started it.
    """
    return psutil.Process().memory_info().rss
