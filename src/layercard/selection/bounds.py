"""How much any set can cover, from the Lagrangian dual of the p-median programme, without a solver.

With a price `λ_j` on serving layer j, a set S of lowest layer m covers at most

    B_m(λ) = Σ_j λ_j + max { Σ_{i ∈ S} r_i },   r_i = Σ_j max(0, w_j C_ji − λ_j),

where the maximum runs over the sets of lowest layer m that keep the number of layers and the budgets; it is bounded by its fractional
relaxation with one of them at a time. Any λ gives a valid bound; subgradient steps find a good one. What a layer or an assignment
would lose against the bound also says which of them cannot be in a set better than a known one.
Source: Cornuejols, Fisher and Nemhauser 1977 (bound and fixing), Held and Karp 1971 (subgradient).
"""

from dataclasses import dataclass

import numpy as np

from layercard.selection.problem import SLACK, Problem


@dataclass(frozen=True)
class Bound:
    """An upper bound on the coverage of sets whose lowest layer is m.

    Attributes:
        value: The bound.
        prices: `λ: [L]`.
        margin: `[L]`, what the bound loses at least when a layer is taken (0 for the likely ones); infinite below m.
        taken: `[L]` from 0 to 1, the fractional set behind the bound.
    """

    value: float
    prices: np.ndarray
    margin: np.ndarray
    taken: np.ndarray


class Relaxation:
    """Bounds for one problem; `caps`, `room` and `own` as `Problem.caps`, `Problem.room` and `Problem.prices` give them."""

    def __init__(self, problem: Problem) -> None:
        self.worth = problem.weights[:, None] * problem.similar
        self.caps, self.room, self.own = problem.caps(), problem.room(), problem.prices()

    def at(self, m: int, prices: np.ndarray) -> Bound:
        """The bound for lowest layer m with given prices."""
        rewards = np.clip(self.worth - prices[:, None], 0.0, None).sum(axis=0)
        return self._bound(m, prices, rewards)

    def every(self, prices: np.ndarray) -> np.ndarray:
        """The bounds for all lowest layers with the same prices, `[L]`; −∞ where no set is allowed."""
        rewards = np.clip(self.worth - prices[:, None], 0.0, None).sum(axis=0)
        return np.array([self._bound(m, prices, rewards).value if self.caps[m] else -np.inf for m in range(len(prices))])

    def fewest(self, m: int, prices: np.ndarray, needed: float) -> int:
        """The fewest layers with which sets of lowest layer m can reach a coverage, as far as prices tell; L + 1 where none can."""
        rewards = np.clip(self.worth - prices[:, None], 0.0, None).sum(axis=0)
        reach = prices.sum() + rewards[m] + np.concatenate([[0.0], np.cumsum(np.sort(rewards[m + 1 :])[::-1])])
        enough = np.flatnonzero(reach >= needed * (1 - SLACK))
        return int(enough[0]) + 1 if len(enough) else len(prices) + 1

    def least_own(self, m: int, prices: np.ndarray, needed: float, own: np.ndarray) -> float:
        """The least Σ own of so many layers, m among them."""
        count = self.fewest(m, prices, needed) - 1
        return float(own[m] + np.sort(own[m + 1 :])[:count].sum())

    def _bound(self, m: int, prices: np.ndarray, rewards: np.ndarray) -> Bound:
        above = rewards[m + 1 :]
        limits = [(np.ones(len(above)), float(self.caps[m] - 1))]
        limits += [(own[m + 1 :], float(room[m] - own[m])) for own, room in zip(self.own, self.room, strict=True)]
        value, rate, taken = min((_fractional(above, price, limit) for price, limit in limits), key=lambda found: found[0])
        full_taken = np.concatenate([np.zeros(m), [1.0], taken])
        margin = np.concatenate([np.full(m, np.inf), [0.0], np.clip(-rate, 0.0, None)])
        return Bound(float(prices.sum() + rewards[m] + value), prices, margin, full_taken)

    def improved(self, m: int, start: np.ndarray, goal: float, steps: int = 120) -> Bound:
        """The lowest bound that subgradient steps from `start` reach for lowest layer m; they stop once it falls below `goal`."""
        best = self.at(m, start)
        prices, length, since = start, 1.0, 0
        for _ in range(steps):
            if best.value < goal or length < 1e-3:
                break
            found = self.at(m, prices)
            if found.value < best.value - 1e-12 * abs(best.value):
                best, since = found, 0
            else:
                since += 1
                if since >= 6:
                    length, since, prices = length / 2, 0, best.prices
                    found = best
            slope = 1.0 - (self.worth > prices[:, None]) @ found.taken
            norm = float(slope @ slope)
            if norm == 0.0:
                break
            prices = prices - length * max(found.value - goal, 1e-9 * abs(goal)) / norm * slope
        return best


def _fractional(rewards: np.ndarray, price: np.ndarray, limit: float) -> tuple[float, np.ndarray, np.ndarray]:
    """The fractional knapsack: its value, what each item gains at the break item's rate, and the part of each that is taken."""
    free = price <= 0
    order = np.argsort(np.where(free, -np.inf, -rewards / np.where(free, 1.0, price)), kind="stable")
    spent = np.cumsum(price[order])
    full = int(np.searchsorted(spent, limit, side="right"))
    taken = np.zeros(len(rewards))
    taken[order[:full]] = 1.0
    rate = 0.0
    if full < len(order):
        at = order[full]
        taken[at] = max(0.0, (limit - (spent[full - 1] if full else 0.0)) / price[at])
        rate = rewards[at] / price[at]
    return float(rewards @ taken), rewards - rate * price, taken
