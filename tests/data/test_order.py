"""Orders are permutations, look random, and never change."""

from __future__ import annotations

import numpy as np
import pytest

from strata.data.order import content_fraction, hash_indices, permutation


@pytest.mark.parametrize("count", [0, 1, 2, 5, 1000, 2**20 + 3])
def test_permutation_has_every_index_once(count: int) -> None:
    order = permutation(count, seed=3, purpose="test")
    assert np.array_equal(np.sort(order), np.arange(count))


def test_hashes_are_these_for_ever() -> None:
    # A change of these numbers would reorder every prepared folder and every resumed run.
    hashes = hash_indices(np.arange(3), seed=42, purpose="document order")
    assert hashes.tolist() == [
        17585578356026770039,
        3224838109234612821,
        7292722249401626628,
    ]
    assert permutation(8, seed=42, purpose="test").tolist() == [7, 5, 6, 2, 0, 3, 1, 4]
    assert content_fraction(b"abc", seed=42, purpose="val") == 0.4476132361034614


def test_seed_and_purpose_change_the_order() -> None:
    orders = {
        permutation(100, seed=seed, purpose=purpose).tobytes()
        for seed in (-1, 0, 1, 2**70)
        for purpose in ("a", "b")
    }
    assert len(orders) == 8


def test_every_place_is_equally_likely() -> None:
    # Where element 0 of 6 lands over 6,000 seeds: 1,000 each, standard deviation 29.
    places = [permutation(6, seed=seed, purpose="test").tolist().index(0) for seed in range(6000)]
    counts = np.bincount(places, minlength=6)
    assert counts.min() > 870 and counts.max() < 1130


def test_content_fractions_are_uniform() -> None:
    fractions = [content_fraction(b"%d" % n, seed=1, purpose="val") for n in range(4000)]
    assert min(fractions) >= 0.0 and max(fractions) < 1.0
    # Standard deviation of the share below 0.1: 0.0047.
    assert abs(np.mean(np.array(fractions) < 0.1) - 0.1) < 0.02
