"""Placement beside brute force over all choices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from strata.errors import ConfigError
from strata.theory.place import place


def brute_force(cost_nm: np.ndarray, need_dnm: np.ndarray, limit_d: list[float | None]) -> float:
    n, m = cost_nm.shape
    rows = np.arange(n)
    best = np.inf
    for choice in itertools.product(range(m), repeat=n):
        used = need_dnm[:, rows, list(choice)].sum(axis=1)
        fits = all(
            limit is None or use <= limit * (1 + 1e-12)
            for use, limit in zip(used, limit_d, strict=True)
        )
        if fits:
            best = min(best, cost_nm[rows, list(choice)].sum())
    return best


def random_case(
    rng: np.random.Generator, n: int, d: int
) -> tuple[np.ndarray, np.ndarray, list[float | None]]:
    """Costs fall with need, as those of formats do, now and then with ties and useless options."""
    cost_nm = np.sort(rng.integers(0, 12, (n, 3)).astype(float), axis=1)[:, ::-1].copy()
    need_dnm = rng.integers(0, 9, (d, n, 3)).astype(float)
    need_dnm[:, :, 0] = 0
    limit_d: list[float | None] = [float(rng.integers(0, 5 * n)) for _ in range(d)]
    if d > 1 and rng.random() < 0.2:
        limit_d[0] = None
    return cost_nm, need_dnm, limit_d


@pytest.mark.parametrize("d", [1, 2, 3])
def test_beside_brute_force(d: int) -> None:
    """Feasible, never below its own bound, and with one budget within one change of the optimum."""
    rng = np.random.default_rng(d)
    optimal = cases = 0
    for _ in range(60):
        cost_nm, need_dnm, limit_d = random_case(rng, int(rng.integers(1, 6)), d)
        found = place(cost_nm, need_dnm, limit_d, base=0)
        best = brute_force(cost_nm, need_dnm, limit_d)
        rows = np.arange(len(cost_nm))
        assert found.cost == pytest.approx(cost_nm[rows, found.choice_n].sum())
        np.testing.assert_allclose(found.used_d, need_dnm[:, rows, found.choice_n].sum(axis=1))
        for used, limit in zip(found.used_d, limit_d, strict=True):
            assert limit is None or used <= limit * (1 + 1e-9)
        assert found.lower_bound <= best + 1e-7 and best <= found.cost + 1e-9
        if found.exact:
            assert found.cost == pytest.approx(best, abs=1e-7)
        if d == 1:
            largest = (cost_nm.max(axis=1) - cost_nm.min(axis=1)).max()
            assert found.cost - found.lower_bound <= largest + 1e-7
        cases += 1
        optimal += found.cost <= best + 1e-7
    assert optimal >= 0.75 * cases  # not promised, but a greedy that is worse has a fault


def test_without_limits_the_cheapest_is_taken_and_known_to_be_best() -> None:
    rng = np.random.default_rng(0)
    cost_nm = rng.random((1000, 3))
    need_dnm = np.ones((2, 1000, 3))
    need_dnm[:, :, 0] = 0
    found = place(cost_nm, need_dnm, [None, 1000.0], base=0)
    assert found.exact and found.gap == 0
    np.testing.assert_array_equal(found.choice_n, cost_nm.argmin(axis=1))


@pytest.mark.parametrize("limits", [[50.0], [50.0, 30.0], [50.0, 30.0, 40.0]])
def test_many_things_come_close_to_the_bound(limits: list[float]) -> None:
    """With d budgets the linear relaxation has d fractional things; of 3,000 they are nothing."""
    rng = np.random.default_rng(1)
    gain_n = 1 / np.arange(1, 3001)  # Zipf
    cost_nm = np.stack([gain_n, 0.1 * gain_n, 0 * gain_n], axis=1)
    need_dnm = rng.uniform(0.1, 1, (len(limits), 3000, 3))
    need_dnm[:, :, 0] = 0
    found = place(cost_nm, need_dnm, limits, base=0)
    assert not found.exact and found.gap < 0.002 * found.lower_bound
    assert (found.used_d <= np.array(limits)).all()


def test_equal_things_fill_the_budget() -> None:
    """All tie at one price: none may be left out because of that."""
    cost_nm = np.tile([2.0, 1.0, 5.0], (100, 1))
    need_dnm = np.tile([0.0, 3.0, 3.0], (1, 100, 1))
    found = place(cost_nm, need_dnm, [100.0], base=0)
    assert (found.choice_n == 1).sum() == 33


def test_a_budget_of_nothing_forbids() -> None:
    cost_nm = np.array([[3.0, 2.0, 1.0]] * 4)
    need_dnm = np.array([[[0.0, 0.0, 1.0]] * 4, [[0.0, 1.0, 0.0]] * 4])
    found = place(cost_nm, need_dnm, [0.0, 2.0], base=0)
    assert sorted(found.choice_n) == [0, 0, 1, 1] and found.exact
    with pytest.raises(ConfigError, match=r"a budget of -1\.0: give 0 or more"):
        place(cost_nm, need_dnm, [-1.0, None], base=0)
