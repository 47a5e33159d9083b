"""How the process gets memory from the operating system."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> bool:
    """Let the C library keep large buffers that are freed, for the next ones of the process.

    By default glibc asks for each buffer of some megabytes anew and gives it back when it is
    freed, and the kernel clears every page of it again: a third of a training step on a CPU
    (docs/log.md). What the process holds stays at its peak.

    Returns:
        Whether it was asked for: no where the library is not glibc, or where the environment
        speaks of malloc itself (MALLOC_*, GLIBC_TUNABLES, LD_PRELOAD).
    """
    spoken = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if any(name.startswith(spoken) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    # -1 is "never": the top of the heap is not given back.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
