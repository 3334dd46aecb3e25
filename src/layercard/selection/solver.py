"""The best set of layers, proven: bounds for every lowest layer, and the mixed-integer programme where bounds do not decide.

Backward stops at the lowest layer m, so once m is fixed every budget is linear in the layers taken. For each m the Lagrangian bound
(`bounds`) says how much could be covered; most m fall to a greedy set (`greedy`) that covers more. The others are solved by HiGHS
(`programme`), the most promising first and with short time slices first, on the layers and assignments that the bound leaves open.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from layercard.cost import Linear
from layercard.selection.bounds import Bound, Relaxation
from layercard.selection.greedy import greedy_cost, greedy_coverage
from layercard.selection.problem import Budget, Problem, Solution
from layercard.selection.programme import Found, Programme

SECONDS = 2.0
"""Time after which the best set so far is given, with its gap."""
FIRST_SLICE = 0.3
"""Seconds of the first try of one lowest layer; each further try gets four times as many."""
SHALLOW = 48
"""Up to so many layers, sets count as equal when they differ by 0.01 %, in deeper models by 0.1 %."""


def resolution(depth: int) -> float:
    """Relative difference in coverage or cost that does not count; what is measured is coarser by far."""
    return 1e-4 if depth <= SHALLOW else 1e-3


def most_coverage(problem: Problem, *, tolerance: float | None = None, seconds: float = SECONDS) -> Solution | None:
    """The set of largest coverage within the number of layers and the budgets.

    Args:
        problem: The choice; `needed` is not looked at.
        tolerance: Relative difference in coverage that does not count; `resolution` unless given.
        seconds: Time limit; the solution says whether it was reached, and its gap.

    Returns:
        The set, or `None` where no set keeps the budgets.
    """
    deadline = time.monotonic() + seconds
    tolerance = resolution(problem.depth) if tolerance is None else tolerance
    problem = replace(problem, needed=0.0)
    start = greedy_coverage(problem)
    layers = start.layers if start is not None else _allowed(problem, seconds)
    if layers is None:
        return None
    value = problem.coverage(layers)
    search = _Search(problem, layers, value * (1 + tolerance))
    while (m := search.next()) is not None and (left := deadline - time.monotonic()) > 0:
        programme = Programme(problem, m, search.bound(m), value)
        found = programme.most_coverage(tolerance, min(search.slice(m), left))
        if found.layers is not None and problem.allows(found.layers) and (reached := problem.coverage(found.layers)) > value:
            layers, value = found.layers, reached
            search.goal = value * (1 + tolerance)
        search.settle(m, found, value * (1 + tolerance))
    highest = float(search.bounds.max())
    status = "optimal" if highest <= value * (1 + tolerance) * (1 + 1e-12) else "time limit"
    return Solution(tuple(sorted(layers)), value, status, max(0.0, highest / value - 1) if value > 0 else 0.0)


def least_cost(problem: Problem, cost: Linear, *, tolerance: float | None = None, seconds: float = SECONDS) -> Solution | None:
    """The cheapest set that reaches the needed coverage within the number of layers and the budgets.

    A set is cheaper than a known one when it keeps one more budget: this cost, a little below the known one's. Where even the largest
    coverage under that budget falls short, for every lowest layer, the known one is the cheapest.

    Args:
        problem: The choice, with `needed`.
        cost: What is minimised.
        tolerance: Relative difference in cost that does not count; `resolution` unless given.
        seconds: Time limit; the solution says whether it was reached, and its gap.

    Returns:
        The set, or `None` where no set keeps the budgets and reaches the coverage.
    """
    deadline = time.monotonic() + seconds
    tolerance = resolution(problem.depth) if tolerance is None else tolerance
    layers = _reaching(problem, cost, seconds)
    if layers is None:
        return None
    price, own = cost.of(layers), np.asarray(cost.own)
    backward = cost.fixed + np.cumsum(np.asarray(cost.through)[::-1])[::-1]
    floors = np.full(problem.depth, np.inf)
    search = _Search(_cheaper(problem, cost, price * (1 - tolerance)), layers, problem.needed)
    while (m := search.next()) is not None and (left := deadline - time.monotonic()) > 0:
        programme = Programme(search.problem, m, search.bound(m), problem.needed)
        found = programme.least_price(own, 0.9 * tolerance * price, min(search.slice(m), left))
        if found.bound is not None:
            floors[m] = backward[m] + found.bound
        if found.layers is not None and problem.allows(found.layers) and (reached := cost.of(found.layers)) < price:
            layers, price = found.layers, reached
            search.tighten(_cheaper(problem, cost, price * (1 - tolerance)))
        search.settle(m, found, -np.inf)
        if found.proven and found.layers is None:
            floors[m] = np.inf
    for m in search.open():
        floors[m] = max(backward[m] + search.relaxation.least_own(m, search.prices, problem.needed, own), _known(floors[m]))
    lowest = min(float(floors.min()), price * (1 - tolerance))
    status = "optimal" if lowest >= price * (1 - tolerance) * (1 - 1e-9) else "time limit"
    return Solution(tuple(sorted(layers)), problem.coverage(layers), status, max(0.0, 1 - lowest / price) if price > 0 else 0.0, price)


def _allowed(problem: Problem, seconds: float) -> tuple[int, ...] | None:
    """Any set that keeps the number and the budgets, where greedy choice found none."""
    relaxation = Relaxation(problem)
    for m in np.flatnonzero(relaxation.caps).tolist():
        found = Programme(problem, m, relaxation.at(m, np.zeros(problem.depth)), 0.0).most_coverage(0.1, seconds)
        if found.layers is not None and problem.allows(found.layers):
            return found.layers
    return None


def _known(floor: float) -> float:
    return floor if np.isfinite(floor) else -np.inf


def _reaching(problem: Problem, cost: Linear, seconds: float) -> tuple[int, ...] | None:
    """A cheap set that reaches the needed coverage, or at least one that does."""
    found = greedy_cost(problem, cost) or most_coverage(problem, tolerance=1e-9, seconds=seconds)
    return found.layers if found is not None and problem.allows(found.layers) else None


def _cheaper(problem: Problem, cost: Linear, limit: float) -> Problem:
    """The same problem for sets that cost at most `limit`."""
    return replace(problem, budgets=(*problem.budgets, Budget("cost", cost, limit)))


class _Search:
    """Which lowest layers may still hold a set that covers `goal`.

    Attributes:
        bounds: `[L]`, the most that sets of each lowest layer cover, as far as is known.
        prices: `[L]`, the prices that were found last.
    """

    def __init__(self, problem: Problem, layers: Sequence[int], goal: float) -> None:
        self.problem, self.goal = problem, goal
        self.relaxation = Relaxation(problem)
        served = np.sort(problem.similar[:, list(layers)], axis=1)
        second = served[:, -2] if len(layers) > 1 else 0.5 * served[:, -1]
        self.prices = problem.weights * (served[:, -1] + second) / 2
        self.bounds = self.relaxation.every(self.prices)
        self.sharpened: dict[int, np.ndarray] = {}
        self.tries: dict[int, int] = {}
        self.finished: set[int] = set()

    def open(self) -> list[int]:
        """Lowest layers that are not decided, fewest tries first, then the largest bound."""
        left = [m for m in range(len(self.bounds)) if m not in self.finished and self.bounds[m] >= self.goal]
        return sorted(left, key=lambda m: (self.tries.get(m, 0), -self.bounds[m]))

    def next(self) -> int | None:
        """The lowest layer to solve next; `None` when all are decided."""
        while left := self.open():
            if left[0] in self.sharpened:
                return left[0]
            self._sharpen(max(left, key=lambda m: (m not in self.sharpened, self.bounds[m])))
        return None

    def _sharpen(self, m: int) -> None:
        """Look for good prices at m, and see what they say about the others."""
        found = self.relaxation.improved(m, self.prices, self.goal)
        self.sharpened[m] = self.prices = found.prices
        self.bounds = np.minimum(self.bounds, self.relaxation.every(found.prices))

    def bound(self, m: int) -> Bound:
        """The sharpened bound of lowest layer m."""
        return self.relaxation.at(m, self.sharpened[m])

    def slice(self, m: int) -> float:
        """Seconds for the next try of m."""
        return FIRST_SLICE * 4.0 ** self.tries.get(m, 0)

    def settle(self, m: int, found: Found, ceiling: float) -> None:
        """Keep what a try of m showed; `ceiling` bounds what a programme without a solution leaves out."""
        self.tries[m] = self.tries.get(m, 0) + 1
        if found.proven:
            self.finished.add(m)
            self.bounds[m] = min(self.bounds[m], ceiling if found.bound is None or found.layers is None else max(found.bound, ceiling))

    def tighten(self, problem: Problem) -> None:
        """Go on with a tighter problem: bounds and decisions hold, and prices may say more."""
        self.problem, self.relaxation = problem, Relaxation(problem)
        self.bounds = np.minimum(self.bounds, self.relaxation.every(self.prices))
        for m, prices in self.sharpened.items():
            self.bounds[m] = min(self.bounds[m], self.relaxation.at(m, prices).value if self.relaxation.caps[m] else -np.inf)
