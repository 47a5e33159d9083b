"""The leak filter beside the plain table of a longest common subsequence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from strata.data import leaks as module
from strata.data.leaks import leaks


def plain(reference: list[int], text: list[int]) -> int:
    """The most matches within any 2 |r| tokens of the text, by the table of every such window."""
    best = 0
    for start in range(len(text)):
        window = text[start : start + 2 * len(reference)]
        table = [[0] * (len(window) + 1) for _ in range(len(reference) + 1)]
        for i, a in enumerate(reference, 1):
            for j, b in enumerate(window, 1):
                table[i][j] = (
                    table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
                )
        best = max(best, table[-1][-1])
    return best


tokens = st.integers(0, 5)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(tokens, min_size=1, max_size=9),
    st.lists(tokens, max_size=40),
    st.sampled_from([0.0, 1 / 3, 0.5, 2 / 3, 0.75, 0.9, 1.0]),
)
@example([1, 2, 3], [1, 2, 0, 3], 2 / 3)  # two of three is not more than two thirds
@example([1, 2], [1, 0, 0, 0, 2], 0.5)  # the second stands too far away
def test_it_is_the_rule(reference: list[int], text: list[int], threshold: float) -> None:
    expected = plain(reference, text) > threshold * len(reference) + 1e-9
    assert leaks(reference, np.array(text, np.int64), threshold=threshold) == expected


@pytest.mark.parametrize("block", [1, 7])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(60):
        text = rng.integers(0, 4, 30)
        reference = rng.integers(0, 4, 6).tolist()
        expected = plain(reference, text.tolist()) == 6
        assert leaks(reference, text, threshold=5.5 / 6) == expected
        found.append(expected)
    assert any(found) and not all(found)


def test_a_copy_in_a_long_text_with_a_tenth_of_it_changed() -> None:
    rng = np.random.default_rng(1)
    text = rng.integers(0, 2000, 20_000)
    reference = text[15_000:15_128].copy()
    assert leaks(reference.tolist(), text, threshold=0.9)
    changed = reference.copy()
    changed[::10] = 5000  # 13 of 128
    assert not leaks(changed.tolist(), text, threshold=0.9)
    assert leaks(changed.tolist(), text, threshold=2 / 3)
    assert not leaks(rng.permutation(reference).tolist(), text, threshold=2 / 3)
    spread = np.full(600, 5000)
    spread[::4][:128] = reference  # in order, but over four times its length
    assert not leaks(reference.tolist(), spread, threshold=0.9)
    close = np.full(256, 5000)
    close[::2] = reference
    assert leaks(reference.tolist(), close, threshold=0.9)
