"""What makes two documents nearly equal: MinHash signatures, cut into bands.

A document is the set of its runs of five words. The MinHash signature of a set (Broder, 1997) holds
128 numbers, of which two documents share as large a part, on average, as their sets do. It is cut
into bands; documents that agree in a whole band count as near duplicates (locality-sensitive
hashing: Indyk and Motwani, 1998). Only a hash of each band is kept. `bands.py` finds equal ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from strata.config import FrozenConfig
from strata.errors import DataError

_NUM_HASHES = 128
_WORDS_OF_A_RUN = 5
_SEED = 1
_FOUND = 0.9

# Scripts without spaces between words: each character is one.
_UNSPACED = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


class NearDuplicates(FrozenConfig):
    """How near duplicates are told, as a manifest records it.

    Attributes:
        threshold: the similarity (common runs of words / all runs of words of the two) from which
            on a pair is found in at least nine of ten cases. Less similar ones are found too,
            the more rarely the less similar: 0.8 finds 0.95 of the pairs as similar as that, 0.61
            of those of 0.7 and 0.06 of those of 0.5.
        bands, rows: how the signature is cut; the most rows with which that holds.
        words: of a run.
        algorithm: what computes signatures; those of another version are other numbers.
    """

    threshold: float
    bands: int
    rows: int
    words: int = _WORDS_OF_A_RUN
    algorithm: str

    def found(self, similarity: float) -> float:
        """The share of pairs so similar that is found, in expectation."""
        return 1.0 - (1.0 - similarity**self.rows) ** self.bands


def near_duplicates(threshold: float) -> NearDuplicates:
    """Choose bands for a threshold.

    Raises:
        DataError: the library that computes signatures is missing.
    """
    try:
        from rensa import RMinHash
    except ImportError:
        raise DataError(
            "near duplicates are found with the help of rensa: install it with "
            'pip install "strata-lm[dedup]"'
        ) from None
    algorithm = f"rensa R-MinHash {RMinHash.ALGORITHM_VERSION}"
    for rows in range(_NUM_HASHES, 0, -1):
        chosen = NearDuplicates(
            threshold=threshold, bands=_NUM_HASHES // rows, rows=rows, algorithm=algorithm
        )
        if chosen.found(threshold) >= _FOUND:
            break
    return chosen


@dataclass(frozen=True)
class BandHasher:
    """Computes the hashes of all bands of a text."""

    settings: NearDuplicates

    def hash(self, texts: Sequence[str]) -> np.ndarray:
        """(num_texts, bands) uint64; equal texts have equal rows, in any batch and process."""
        from rensa import RMinHash

        bands, rows = self.settings.bands, self.settings.rows
        if not texts:
            return np.empty((0, bands), np.uint64)
        signatures = RMinHash.digest_matrix_from_token_sets(
            [self._runs(text) for text in texts], num_perm=_NUM_HASHES, seed=_SEED
        ).to_rows()
        cut = np.array(signatures, np.uint64)[:, : bands * rows]
        return _mix(cut.reshape(len(texts), bands, rows))

    def _runs(self, text: str) -> list[str]:
        words = _WORD.findall(text.casefold())
        if len(words) < self.settings.words:
            return [" ".join(words) or text]
        shifted = [words[first:] for first in range(self.settings.words)]
        return [" ".join(run) for run in zip(*shifted, strict=False)]


def _mix(values: np.ndarray) -> np.ndarray:
    """Hash the last axis: (..., n) -> (...) uint64, by splitmix64's finaliser after each value."""
    state = np.full(values.shape[:-1], 0x9E3779B97F4A7C15, np.uint64)
    with np.errstate(over="ignore"):
        for index in range(values.shape[-1]):
            state = (state ^ values[..., index]) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
    return state
