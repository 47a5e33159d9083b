"""Choose one of m options for each of n things, as cheaply as budgets allow.

A multiple-choice knapsack: minimise sum_i cost[i, choice_i], where for each budget d
sum_i need[i, choice_i, d] <= limit_d. One option of each thing, the base, needs nothing, so a
solution always exists.

Where the cheapest options of all things fit, they are the optimum: nothing couples the things.
Otherwise the problem is NP-hard, and this is Lagrangian relaxation. For prices p >= 0 of budgets

    bound(p) = sum_i min_m (cost[i, m] + p . need[i, m]) - p . limit

is at most the cost of any solution: a solution pays at most p . limit for its needs. The largest
bound (that of the linear relaxation) is found by bisection for one budget, by the ellipsoid method
for more. The options that attain the minimum at these prices, put right greedily, are the solution,
and its distance from the bound is its certificate.

With one budget the distance is at most the largest gain of a single change. Just above the best
price all cheapest options fit; the changes that pay at the best price itself all gain exactly price
times need, and are made until one no longer fits. What is left of the budget is then less than that
one needs, and cost - bound = price * what is left < price * its need = its gain. Further changes
only lower the cost.

Legend: n things, m options, d budgets.

Source: P. Sinha and A. Zoltners, "The multiple-choice knapsack problem", Operations Research 27
(1979); M. Fisher, "The Lagrangian relaxation method for solving integer programming problems",
Management Science 27 (1981).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strata.errors import ConfigError
from strata.theory.cost import Floats

Choice = NDArray[np.intp]

_PRECISION = 1e-12  # of prices and bounds, by the most that can be gained
_PASSES = 4
_FULL = 1 + 1e-12  # a budget may be met exactly


@dataclass(frozen=True)
class Placement:
    """A solution.

    Attributes:
        choice_n: option of each thing.
        cost: sum of their costs.
        lower_bound: no solution costs less.
        exact: whether this one is known to be optimal.
        used_d: of each budget.
    """

    choice_n: Choice
    cost: float
    lower_bound: float
    exact: bool
    used_d: Floats

    @property
    def gap(self) -> float:
        """How much more than the optimum this may cost at most."""
        return max(0.0, self.cost - self.lower_bound)


def place(
    cost_nm: Floats, need_dnm: Floats, limit_d: Sequence[float | None], *, base: int
) -> Placement:
    """Choose options.

    Args:
        cost_nm: (n, m), finite.
        need_dnm: (d, n, m), at least 0.
        limit_d: of each budget, at least 0; None for no limit.
        base: the option that needs nothing of any budget.

    Raises:
        ConfigError: a limit below 0.
    """
    for limit in limit_d:
        if limit is not None and not limit >= 0:
            raise ConfigError(f"a budget of {limit}: give 0 or more")
    assert not need_dnm[:, :, base].any() and (need_dnm >= 0).all()
    problem = _Problem(cost_nm, need_dnm, limit_d, base)
    free = problem.cheapest(np.zeros(problem.num_budgets))
    if problem.fits(free):
        cost = problem.cost(free)
        return Placement(free, cost, cost, True, _used(need_dnm, free))
    prices, bound = problem.best_prices()
    found = problem.fill(problem.repair(problem.cheapest(prices), prices), prices)
    greedy = problem.fill(np.full(len(cost_nm), base), prices)
    best = min((found, greedy), key=problem.cost)
    cost = problem.cost(best)
    exact = cost <= bound + _PRECISION * abs(bound)
    return Placement(best, cost, min(bound, cost), exact, _used(need_dnm, best))


def _used(need_dnm: Floats, choice_n: Choice) -> Floats:
    used: Floats = need_dnm[:, np.arange(len(choice_n)), choice_n].sum(axis=1)
    return used


class _Problem:
    """The budgets that can bind, in shares of their limit; what exceeds one alone is forbidden."""

    def __init__(
        self, cost_nm: Floats, need_dnm: Floats, limit_d: Sequence[float | None], base: int
    ) -> None:
        self.base, self.rows = base, np.arange(len(cost_nm))
        self.cost_nm = cost_nm.astype(np.float64)
        shares = []
        for need_nm, limit in zip(need_dnm, limit_d, strict=True):
            if limit is None:
                continue
            self.cost_nm = np.where(need_nm > limit * _FULL, np.inf, self.cost_nm)
            if limit > 0:
                shares.append(np.minimum(need_nm, 2 * limit) / limit)
        self.share_dnm = np.stack(shares) if shares else np.zeros((0, *cost_nm.shape))
        self.num_budgets = len(self.share_dnm)

    def cheapest(self, prices: Floats) -> Choice:
        """Of each thing at these prices; at a tie the one that needs least."""
        paid_nm = self._paid(prices)
        least_n1 = paid_nm.min(axis=1, keepdims=True)
        need_nm = np.where(paid_nm <= least_n1, self.share_dnm.sum(axis=0), np.inf)
        return need_nm.argmin(axis=1)

    def cost(self, choice_n: Choice) -> float:
        return float(self.cost_nm[self.rows, choice_n].sum())

    def used(self, choice_n: Choice) -> Floats:
        used: Floats = self.share_dnm[:, self.rows, choice_n].sum(axis=1)
        return used

    def fits(self, choice_n: Choice) -> bool:
        return bool((self.used(choice_n) <= _FULL).all())

    def best_prices(self) -> tuple[Floats, float]:
        """Prices at the largest bound, and the bound.

        They sum to at most what the cheapest options save over the base, which is bound(p) <= cost
        of the base, with needs of 0 there.
        """
        most = float((self.cost_nm[:, self.base] - self.cost_nm.min(axis=1)).sum())
        return self._bisect(most) if self.num_budgets == 1 else self._ellipsoid(most)

    def _paid(self, prices: Floats) -> Floats:
        paid: Floats = self.cost_nm + np.tensordot(prices, self.share_dnm, axes=1)
        return paid

    def _bound(self, prices: Floats) -> tuple[float, Floats]:
        """bound(prices), and how it grows with each price."""
        paid_nm = self._paid(prices)
        choice_n = paid_nm.argmin(axis=1)
        bound = float(paid_nm[self.rows, choice_n].sum() - prices.sum())
        return bound, self.used(choice_n) - 1

    def _bisect(self, most: float) -> tuple[Floats, float]:
        low, high = 0.0, most
        while high - low > _PRECISION * most:
            middle = (low + high) / 2
            if self.used(self.cheapest(np.array([middle])))[0] > _FULL:
                low = middle
            else:
                high = middle
        prices = np.array([high])
        return prices, max(self._bound(prices)[0], self._bound(np.array([low]))[0])

    def _ellipsoid(self, most: float) -> tuple[Floats, float]:
        d = self.num_budgets
        centre = np.full(d, most / (d + 1))
        # Holds all p >= 0 whose sum is at most `most`.
        matrix = np.eye(d) * (2 * most) ** 2
        best, best_prices = -np.inf, np.zeros(d)
        for _ in range(80 * d * (d + 1)):
            down = centre < 0
            if down.any():
                gradient, bound = down.astype(np.float64), None
            else:
                bound, gradient = self._bound(centre)
                if bound > best:
                    best, best_prices = bound, centre.copy()
            reach = float(np.sqrt(max(0.0, float(gradient @ matrix @ gradient))))
            if reach <= _PRECISION * most:
                break
            step = matrix @ gradient / reach
            centre = centre + step / (d + 1)
            matrix = d * d / (d * d - 1) * (matrix - 2 / (d + 1) * np.outer(step, step))
        return best_prices, best

    def repair(self, choice_n: Choice, prices: Floats) -> Choice:
        """Give up what gains least for what it needs until all fits."""
        choice_n = choice_n.copy()
        used = self.used(choice_n)
        if (used <= _FULL).all():
            return choice_n
        gain_n = self.cost_nm[:, self.base] - self.cost_nm[self.rows, choice_n]
        need_dn = self.share_dnm[:, self.rows, choice_n]
        worth_n = gain_n / np.maximum(_weight(prices) @ need_dn, 1e-300)
        for row in np.argsort(worth_n, kind="stable"):
            over = used > _FULL
            if not over.any():
                break
            if need_dn[over, row].any():
                used = used - need_dn[:, row]
                choice_n[row] = self.base
        return choice_n

    def fill(self, choice_n: Choice, prices: Floats) -> Choice:
        """Make the changes that gain most for what they need, as long as they fit."""
        choice_n = choice_n.copy()
        for _ in range(_PASSES):
            used = self.used(choice_n)
            now_n = self.cost_nm[self.rows, choice_n]
            gain_nm = now_n[:, None] - self.cost_nm
            more_dnm = self.share_dnm - self.share_dnm[:, self.rows, choice_n][:, :, None]
            alone_nm = (used[:, None, None] + more_dnm <= _FULL).all(axis=0)
            rows, options = np.nonzero((gain_nm > 0) & alone_nm)
            need = np.tensordot(_weight(prices), more_dnm[:, rows, options], axes=1)
            worth = gain_nm[rows, options] / np.maximum(need, 1e-300)
            changed = np.zeros(len(self.rows), bool)
            for at in np.argsort(-worth, kind="stable"):
                row, option = rows[at], options[at]
                after = used + more_dnm[:, row, option]
                if not changed[row] and (after <= _FULL).all():
                    choice_n[row], used, changed[row] = option, after, True
            if not changed.any():
                break
        return choice_n


def _weight(prices: Floats) -> Floats:
    """Prices, with a little for budgets that cost nothing."""
    return np.asarray(prices + 1e-9 * max(1e-300, float(prices.max(initial=0.0))))
