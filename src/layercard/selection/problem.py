"""The choice as arrays: what a set of layers covers, what it costs, and what may not be exceeded.

Everything is about one model of L layers, 0 at the input. Coverage is `f(S) = Σ_j w_j max_{i ∈ S} C_ji`; a cost is a linear form
`c(S) = fixed + Σ_{j ≥ min S} through_j + Σ_{i ∈ S} own_i` (`layercard.cost.Linear`): backward runs through every layer from the lowest
adapted one up, and each adapter has a price of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layercard.cost import Linear

SLACK = 1e-9
"""Share of a limit by which rounding may exceed it."""


@dataclass(frozen=True)
class Budget:
    """An upper limit on a cost.

    Attributes:
        name: What is limited, for messages.
        form: The cost.
        limit: In the unit of the cost.
    """

    name: str
    form: Linear
    limit: float

    def allows(self, layers: Sequence[int]) -> bool:
        """Whether a set of layers keeps the limit."""
        return self.form.of(layers) <= self.limit + SLACK * abs(self.limit)


@dataclass(frozen=True)
class Problem:
    """What may be chosen.

    Attributes:
        similar: `C: [L, L]`, at least 0: how far column i covers row j.
        weights: `w: [L]`, at least 0.
        least: The fewest layers, at least 1.
        most: The most layers; L when not given.
        budgets: Limits on costs.
        needed: The least coverage.
    """

    similar: np.ndarray
    weights: np.ndarray
    least: int = 1
    most: int | None = None
    budgets: tuple[Budget, ...] = ()
    needed: float = 0.0

    @property
    def depth(self) -> int:
        """L."""
        return len(self.weights)

    @property
    def largest(self) -> int:
        """The most layers that any set may have."""
        return self.depth if self.most is None else min(self.most, self.depth)

    def coverage(self, layers: Sequence[int]) -> float:
        """`f(S)`, 0 for no layer."""
        return float(self.weights @ self.similar[:, list(layers)].max(axis=1)) if len(layers) else 0.0

    def allows(self, layers: Sequence[int]) -> bool:
        """Whether a set keeps the number, every budget and the coverage."""
        return (
            self.least <= len(layers) <= self.largest
            and all(budget.allows(layers) for budget in self.budgets)
            and self.coverage(layers) >= self.needed * (1 - SLACK)
        )

    def room(self) -> np.ndarray:
        """What each budget leaves for adapters when layer m is the lowest, `[budgets, L]`; below 0 where backward alone is too dear."""
        left = np.empty((len(self.budgets), self.depth))
        for row, budget in zip(left, self.budgets, strict=True):
            backward = np.cumsum(np.asarray(budget.form.through)[::-1])[::-1]
            row[:] = budget.limit + SLACK * abs(budget.limit) - budget.form.fixed - backward
        return left

    def prices(self) -> np.ndarray:
        """What the adapters of each layer cost in each budget, `[budgets, L]`."""
        return np.array([budget.form.own for budget in self.budgets], dtype=float).reshape(len(self.budgets), self.depth)

    def caps(self) -> np.ndarray:
        """The most layers that fit when layer m is the lowest, `[L]`; 0 where fewer than `least` do."""
        room, prices = self.room(), self.prices()
        found = np.zeros(self.depth, dtype=int)
        for m in range(self.depth):
            most = min(self.largest, self.depth - m)
            for left, price in zip(room[:, m], prices, strict=True):
                spent = price[m] + np.concatenate([[0.0], np.cumsum(np.sort(price[m + 1 :]))])
                most = min(most, int(np.searchsorted(spent, left, side="right")))
            found[m] = most if most >= self.least else 0
        return found


@dataclass(frozen=True)
class Solution:
    """A set of layers with how good it is known to be.

    Attributes:
        layers: Ascending.
        value: Its coverage.
        status: "optimal", "time limit" (not proven in time), or "greedy" (never proven).
        gap: Relative distance to a proven bound of what was optimised; `None` where nothing is proven.
        cost: Of the cost that was minimised, if one was.
    """

    layers: tuple[int, ...]
    value: float
    status: str
    gap: float | None
    cost: float | None = None
