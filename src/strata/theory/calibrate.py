"""Measure a machine: matrix products, memory, and a disk past the page cache."""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from strata.errors import ConfigError, StorageError
from strata.theory.machine import HardwareProfile

_COPY_BYTES = 256 * 2**20  # far past every cache
_SMALL, _LARGE = 4 * 2**10, 2**20  # bytes of random reads
_FILE_BYTES = 256 * 2**20
_NUM_SMALL, _NUM_LARGE = 300, 60

Say = Callable[[str], None]


@dataclass(frozen=True)
class DiskRates:
    """What was measured of a disk; see `HardwareProfile`."""

    read_latency_s: float
    read_bytes_per_s: float
    write_bytes_per_s: float
    cached: bool


def calibrate(
    folder: Path,
    *,
    device: torch.device,
    search_s: float = 0.0,
    rounds: int = 7,
    file_bytes: int = _FILE_BYTES,
    say: Say = lambda line: None,
) -> HardwareProfile:
    """Measure the machine as it is now, with torch's number of threads.

    Args:
        folder: on the disk that banks lie on; a file is written there and removed.
        device: that the decoder runs on.
        search_s: of one query, where it was measured.
        rounds: repetitions, of which the median counts.
        file_bytes: of the file; at least 2 MiB.
        say: told what is measured.

    Raises:
        ConfigError: `rounds` below 1, or a file too small.
        StorageError: the folder cannot be written, or has no room for the file.
    """
    if rounds < 1:
        raise ConfigError(f"rounds {rounds}: give 1 or more")
    if file_bytes < 2 * _LARGE:
        raise ConfigError(f"a file of {file_bytes} bytes: give at least {2 * _LARGE}")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    say("matrix products")
    matmul = matmul_flops_per_s(device, dtype=dtype, rounds=rounds)
    say("memory")
    copied = copy_bytes_per_s(device, rounds=rounds)
    say("disk")
    disk = measure_disk(folder, file_bytes=file_bytes)
    ram = psutil.virtual_memory().available
    if device.type == "cuda":
        ram = torch.cuda.mem_get_info(device)[0]
    return HardwareProfile(
        name=f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
        device=str(device),
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        matmul_flops_per_s=matmul,
        memory_bytes_per_s=copied,
        disk_read_latency_s=disk.read_latency_s,
        disk_read_bytes_per_s=disk.read_bytes_per_s,
        disk_write_bytes_per_s=disk.write_bytes_per_s,
        disk_cached=disk.cached,
        search_s=search_s,
        disk_bytes=shutil.disk_usage(folder).free,
        ram_bytes=ram,
    )


def matmul_flops_per_s(
    device: torch.device, *, dtype: torch.dtype, rounds: int = 7, width: int = 2048
) -> float:
    """Operations a second of (512, width) @ (width, width): a few references through a layer."""
    left = torch.randn(512, width, device=device, dtype=dtype)
    right = torch.randn(width, width, device=device, dtype=dtype)
    return 2 * left.numel() * width / _median_s(lambda: left @ right, device, rounds)


def copy_bytes_per_s(device: torch.device, *, rounds: int = 7) -> float:
    """Bytes read plus bytes written a second by a large copy."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _median_s(lambda: target.copy_(source), device, rounds)


def measure_disk(folder: Path, *, file_bytes: int = _FILE_BYTES) -> DiskRates:
    """Write a file, then read it at random in two sizes, past the page cache where that goes.

    A read is taken to need latency + bytes / bandwidth; the medians of two sizes give both.

    Raises:
        StorageError: the folder cannot be written, or has no room for the file.
    """
    if not folder.is_dir():
        raise StorageError(f"no folder {folder}: give one on the disk to measure")
    free = shutil.disk_usage(folder).free
    if free < 2 * file_bytes:
        raise StorageError(
            f"{folder} has {free / 2**20:,.0f} MiB free, {2 * file_bytes / 2**20:,.0f} are needed: "
            "free some space, or give another --dir"
        )
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix=".strata-calibrate-")
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            written_s = _write(file.fileno(), file_bytes)
        fd, cached = _open_uncached(name)
        try:
            small_s = _read_s(fd, file_bytes, _SMALL, _NUM_SMALL)
            large_s = _read_s(fd, file_bytes, _LARGE, _NUM_LARGE)
        finally:
            os.close(fd)
    finally:
        os.unlink(name)
    # On a noisy machine the two may come out in the wrong order; then all of it is bandwidth.
    per_byte_s = (large_s - small_s) / (_LARGE - _SMALL)
    if per_byte_s <= 0:
        per_byte_s = large_s / _LARGE
    return DiskRates(
        read_latency_s=max(0.0, small_s - _SMALL * per_byte_s),
        read_bytes_per_s=1 / per_byte_s,
        write_bytes_per_s=file_bytes / written_s,
        cached=cached,
    )


def _write(fd: int, count: int) -> float:
    block = random.Random(0).randbytes(4 * _LARGE)  # nothing that a file system could compress
    begin_s = time.perf_counter()
    left = count
    while left > 0:
        left -= os.write(fd, block[:left])
    os.fsync(fd)
    return time.perf_counter() - begin_s


def _open_uncached(name: str) -> tuple[int, bool]:
    """The file, to be read past the page cache; and whether it is read through it all the same."""
    direct = getattr(os, "O_DIRECT", None)
    if direct is not None:
        with contextlib.suppress(OSError):  # some file systems do not know it
            fd = os.open(name, os.O_RDONLY | direct)
            try:
                os.preadv(fd, [mmap.mmap(-1, _SMALL)], 0)
                return fd, False
            except OSError:
                os.close(fd)
    return os.open(name, os.O_RDONLY), True


def _read_s(fd: int, file_bytes: int, size: int, count: int) -> float:
    """Median seconds of a random read; aligned, as reading past the cache asks for."""
    buffer, draw = mmap.mmap(-1, size), random.Random(size)
    times = []
    for _ in range(count):
        offset = draw.randrange(file_bytes // size) * size
        begin_s = time.perf_counter()
        os.preadv(fd, [buffer], offset)
        times.append(time.perf_counter() - begin_s)
    return statistics.median(times)


def _median_s(act: Callable[[], object], device: torch.device, rounds: int) -> float:
    times = []
    for number in range(rounds + 1):
        begin_s = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:  # the first one warms up
            times.append(time.perf_counter() - begin_s)
    return statistics.median(times)
