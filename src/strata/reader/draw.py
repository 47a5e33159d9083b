"""Draws that are the same under every version of Python.

`random` promises that `random()` stays the same for a seed; `choice`, `shuffle` and the like have
changed before, so they are made of it here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """A stream of draws named by a seed and a purpose; no stream depends on another."""

    def __init__(self, seed: int, *purpose: object) -> None:
        self._random = random.Random(":".join(map(str, (seed, *purpose)))).random

    def chance(self, share: float) -> bool:
        """True in this share of cases."""
        return self._random() < share

    def below(self, count: int) -> int:
        """One of 0 .. count - 1."""
        return int(self._random() * count)

    def between(self, least: int, most: int) -> int:
        """One of least .. most."""
        return least + self.below(most - least + 1)

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def order(self, items: Sequence[T]) -> list[T]:
        """The items in a random order."""
        mixed = list(items)
        for last in range(len(mixed) - 1, 0, -1):
            other = self.below(last + 1)
            mixed[last], mixed[other] = mixed[other], mixed[last]
        return mixed
