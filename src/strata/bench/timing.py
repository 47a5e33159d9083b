"""Fair timing on noisy machines: rivals take turns, medians count, a copy gives the floor."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

_COPY_BYTES = 256 * 2**20  # far past every cache


def race(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    on_round: Callable[[], None] | None = None,
    prepare: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, float]:
    """Median milliseconds of each contestant.

    In every round each runs once, in an order drawn anew, so that what slows the machine for a
    while slows all of them, and none always follows the one that leaves the caches worst. One round
    before the first is not counted: it compiles and warms up.

    Args:
        contestants: what to time, by name.
        rounds: rounds that count.
        device: waited for after each run.
        on_round: called after each round.
        prepare: what some contestants need right before each run, not timed.
    """
    names, shuffle = list(contestants), random.Random(0).shuffle
    times_ms: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(rounds + 1):
        shuffle(names)
        for name in names:
            if prepare is not None and name in prepare:
                prepare[name]()
            wait_for(device)
            start_s = time.perf_counter()
            contestants[name]()
            wait_for(device)
            if round_number > 0:
                times_ms[name].append((time.perf_counter() - start_s) * 1e3)
        if on_round is not None:
            on_round()
    return {name: statistics.median(times_ms[name]) for name in contestants}


def copy_bytes_per_s(device: torch.device, *, rounds: int = 7) -> float:
    """Bytes read plus bytes written a second by a large copy, median of several."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    seconds = race({"copy": lambda: target.copy_(source)}, rounds=rounds, device=device)
    return 2 * _COPY_BYTES / (seconds["copy"] * 1e-3)


def wait_for(device: torch.device) -> None:
    """Let a GPU finish what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
