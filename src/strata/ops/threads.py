"""Splitting a loop over the threads that torch already has.

A pool of our own would fight torch's: OpenMP's threads spin for some milliseconds after each
parallel operation, waiting for the next, and two pools on the same cores were seen to run a kernel
1.6 times slower. So ranges are handed to the OpenMP runtime that torch has loaded, through its
public entry point. Where that is not found, Python threads do it.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Below this many bytes a thread costs more to wake than it saves.
_BYTES_WORTH_A_THREAD = 128 * 1024

_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_split(function: Callable[..., Any], bounds: Sequence[int], *arguments: Any) -> None:
    """Call `function(*arguments, start, stop)` for each range between bounds, a thread each.

    What it writes for an item may depend on that item alone; then the number of threads changes
    no bit.
    """
    ranges = [(a, b) for a, b in pairwise(bounds) if b > a]
    if len(ranges) <= 1:
        for start, stop in ranges:
            function(*arguments, start, stop)
        return
    runtime = _openmp()
    if runtime is None:
        tasks = [_pool(os.getpid()).submit(function, *arguments, a, b) for a, b in ranges[1:]]
        function(*arguments, *ranges[0])
        for task in tasks:
            task.result()
        return

    errors: list[BaseException] = []

    def region(_data: int | None) -> None:
        # The runtime may give fewer threads than asked for.
        first, team = runtime.omp_get_thread_num(), runtime.omp_get_num_threads()
        try:
            for start, stop in ranges[first::team]:
                function(*arguments, start, stop)
        except BaseException as error:  # raised below, in the thread that called
            errors.append(error)

    runtime.GOMP_parallel(_REGION(region), None, len(ranges), 0)
    if errors:
        raise errors[0]


def even_bounds(num_items: int, *, bytes_per_item: int) -> list[int]:
    """Split items evenly over torch's threads, over fewer when there is little to do."""
    worth = num_items * bytes_per_item // _BYTES_WORTH_A_THREAD
    parts = max(1, min(torch.get_num_threads(), num_items, worth))
    return [num_items * part // parts for part in range(parts + 1)]


def weighed_bounds(starts: np.ndarray, *, bytes_per_unit: int) -> list[int]:
    """Split items whose sizes differ: item i holds units starts[i]..starts[i + 1]."""
    units, num_items = int(starts[-1]), len(starts) - 1
    even = even_bounds(units, bytes_per_item=bytes_per_unit)
    inner = np.searchsorted(starts, even[1:-1]).tolist()
    return [0, *inner, num_items]


def pick_runtime(maps: str, *, torch_folder: Path) -> str | None:
    """The OpenMP runtime that torch runs on: the one in its folders; else the only one; else None.

    Other packages bring runtimes of their own (scikit-learn does), so "the only one" is not enough.

    Args:
        maps: what is loaded, as /proc/self/maps lists it.
        torch_folder: where torch is installed; wheels put libraries there or in `torch.libs`.
    """
    loaded = {Path(line.split(maxsplit=5)[-1].strip()) for line in maps.splitlines() if line}
    runtimes = [p for p in loaded if p.name.startswith(("libgomp", "libomp", "libiomp"))]
    own_folders = (torch_folder, torch_folder.with_name("torch.libs"))
    in_torch = [p for p in runtimes if any(p.is_relative_to(folder) for folder in own_folders)]
    for candidates in (in_torch, runtimes):
        if len(candidates) == 1:
            return str(candidates[0])
    return None


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime in this process that torch runs on; None if it cannot be told."""
    maps = Path("/proc/self/maps")
    if not torch.backends.openmp.is_available() or not maps.exists():
        return None
    path = pick_runtime(maps.read_text(), torch_folder=Path(torch.__file__).parent)
    if path is None:
        return None
    try:
        runtime = ctypes.CDLL(path)
        runtime.GOMP_parallel.restype = None
        runtime.GOMP_parallel.argtypes = [
            _REGION,
            ctypes.c_void_p,
            ctypes.c_uint,
            ctypes.c_uint,
        ]
        runtime.omp_get_thread_num.restype = runtime.omp_get_num_threads.restype = ctypes.c_int
    except (OSError, AttributeError):
        return None
    return runtime


@functools.cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Threads for where there is no OpenMP; a forked process gets its own."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="strata")
