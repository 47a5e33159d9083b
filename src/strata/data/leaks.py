"""Which references give a training text away: the leak filter of explicit memory.

Of a reference r and a text, the overlap is the longest common subsequence whose matched part of
the text spans at most 2 |r| tokens, over |r|. A reference that overlaps by more than a threshold
is a copy, near or exact, of what is to be learned.

Source: "Memory3" (arXiv 2407.01178), section 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

_BLOCK = 2048  # beginnings of windows bounded at once: 2 bytes each for every distinct token of r


def leaks(reference: Sequence[int], text: np.ndarray, *, threshold: float) -> bool:
    """Whether more than `threshold` of a reference stands in a text, in order and close together.

    Args:
        reference: token ids, at least one.
        text: (n,) token ids of the whole text.
        threshold: 0..1; 1 drops nothing.
    """
    size = len(reference)
    least = math.floor(threshold * size + 1e-9) + 1  # the fewest matches that are too many
    if least > size:
        return False
    known, codes, counts = np.unique(
        np.asarray(reference, np.int64), return_inverse=True, return_counts=True
    )
    place = np.minimum(np.searchsorted(known, text), len(known) - 1)
    there = np.flatnonzero(known[place] == text)  # nothing else can match
    kinds = place[there]
    bits = [0] * len(known)
    for number, kind in enumerate(codes.tolist()):
        bits[kind] |= 1 << number
    return any(
        common(bits, size, kinds[begin:end].tolist()) >= least
        for begin, end in _windows(there, kinds, counts, 2 * size, least)
    )


def _windows(
    there: np.ndarray, kinds: np.ndarray, counts: np.ndarray, span: int, least: int
) -> Iterator[tuple[int, int]]:
    """Ranges of `there` within `span` that hold `least` tokens of the reference, most first.

    A token counts at most as often as it stands in the reference: an upper bound of any common
    subsequence, which nearly all texts fail.
    """
    ends = np.searchsorted(there, there + span)
    begins = np.flatnonzero(ends - np.arange(len(there)) >= least)
    for block in range(0, len(begins), _BLOCK):
        begin = begins[block : block + _BLOCK]
        end = ends[begin]
        base, stop = int(begin[0]), int(end.max())
        seen = np.zeros((stop - base + 1, len(counts)), np.int32)
        seen[np.arange(1, stop - base + 1), kinds[base:stop]] = 1
        np.cumsum(seen, axis=0, out=seen)
        bound = np.minimum(seen[end - base] - seen[begin - base], counts).sum(1)
        for number in np.argsort(-bound, kind="stable"):
            if bound[number] < least:
                break
            yield int(begin[number]), int(end[number])


def common(bits: Sequence[int], size: int, kinds: Sequence[int]) -> int:
    """Length of the longest common subsequence, all of a column of the table in one integer.

    Args:
        bits: for each kind of token, at which places of the reference it stands, as bits.
        size: tokens of the reference.
        kinds: the text, each at least 0 and below len(bits).

    Source: Hyyrö, "Bit-parallel LCS-length computation revisited", AWOCA 2004.
    """
    full = (1 << size) - 1
    row = full
    for kind in kinds:
        met = row & bits[kind]
        row = ((row + met) | (row - met)) & full
    return size - row.bit_count()
