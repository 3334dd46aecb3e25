"""The choice as arrays: what a set of layers covers, what it costs, and what may not be exceeded.

Everything is about one model of L layers, 0 at the input. Coverage is `f(S) = Σ_j w_j max_{i ∈ S} C_ji`; a cost is a linear form
`c(S) = fixed + Σ_{j ≥ min S} through_j + Σ_{i ∈ S} own_i` (`layercard.cost.Linear`): backward runs through every layer from the lowest
adapted one up, and each adapter has a price of its own.

Good sets quickly: greedy choice, then exchange. It is where the exact solver starts from, and the check on it.

Greedy maximisation of a monotone submodular function under a number of layers reaches 1 − 1/e of the best (Nemhauser, Wolsey and
Fisher 1978); under budgets it is tried for every lowest layer, and exchange mends what it missed.

How much any set can cover, from the Lagrangian dual of the p-median programme, without a solver.

With a price `λ_j` on serving layer j, a set S of lowest layer m covers at most

    B_m(λ) = Σ_j λ_j + max { Σ_{i ∈ S} r_i },   r_i = Σ_j max(0, w_j C_ji − λ_j),

where the maximum runs over the sets of lowest layer m that keep the number of layers and the budgets; it is bounded by its fractional
relaxation with one of them at a time. Any λ gives a valid bound; subgradient steps find a good one. What a layer or an assignment
would lose against the bound also says which of them cannot be in a set better than a known one.
Source: Cornuejols, Fisher and Nemhauser 1977 (bound and fixing), Held and Karp 1971 (subgradient).

The mixed-integer programme of one lowest layer, in its radius form, solved by HiGHS.

Layer m is taken and none below it. For each layer j of the model let `i_1, i_2, …` be the layers that cover it better than m does,
best first, and `c_1 ≥ c_2 ≥ … ≥ c_0 = C_jm` how well. With y_i = layer i is taken and v_jt = one of the first t is taken,

    coverage = Σ_j w_j (c_0 + Σ_t (c_t − c_{t+1}) v_jt),   v_jt ≤ v_j,t−1 + y_{i_t},   0 ≤ v ≤ 1.

Only y need be integer, and its relaxation is as tight as the assignment form's. Everything else is linear in y since the lowest layer
is fixed. Layers and assignments that a bound rules out are left out beforehand. Source: Cornuejols, Nemhauser and Wolsey 1980.

The best set of layers, proven: bounds for every lowest layer, and the mixed-integer programme where bounds do not decide.

Backward stops at the lowest layer m, so once m is fixed every budget is linear in the layers taken. For each m the Lagrangian bound
(`bounds`) says how much could be covered; most m fall to a greedy set (`greedy`) that covers more. The others are solved by HiGHS
(`programme`), the most promising first and with short time slices first, on the layers and assignments that the bound leaves open.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from layercard.cost.model import Linear

# ---- selection.problem

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


# ---- selection.greedy

STARTS = 4
"""How many lowest layers are mended by exchange."""


def greedy_coverage(problem: Problem) -> Solution | None:
    """A set of large coverage within the budgets; `None` where no set keeps them. `needed` is not looked at."""
    caps, room, prices = problem.caps(), problem.room(), problem.prices()
    found = [_grown(problem, m, int(caps[m]), room[:, m], prices) for m in np.flatnonzero(caps).tolist()]
    usable = [layers for layers in found if len(layers) >= problem.least]
    if not usable:
        return None
    usable.sort(key=problem.coverage, reverse=True)
    best = max((_exchanged(problem, layers, room, prices) for layers in usable[:STARTS]), key=problem.coverage)
    return Solution(tuple(sorted(best)), problem.coverage(best), "greedy", None)


def greedy_cost(problem: Problem, cost: Linear) -> Solution | None:
    """A cheap set that reaches the needed coverage within the budgets; `None` where greedy finds none (there may be one)."""
    caps, room, prices = problem.caps(), problem.room(), problem.prices()
    own = np.asarray(cost.own)
    best: list[int] = []
    for m in np.flatnonzero(caps).tolist():
        layers = _grown(problem, m, int(caps[m]), room[:, m], prices, stop=problem.needed)
        layers = _thinned(problem, layers, own)
        if problem.allows(layers) and (not best or cost.of(layers) < cost.of(best)):
            best = layers
    if not best:
        return None
    best = _cheapened(problem, best, cost)
    return Solution(tuple(sorted(best)), problem.coverage(best), "greedy", None, float(cost.of(best)))


def greedy_set(value: Callable[[Sequence[int]], float], allows: Callable[[Sequence[int]], bool], depth: int, k: int) -> tuple[int, ...]:
    """Greedy and exchange for any set function: k layers, or fewer where no further one is allowed.

    Args:
        value: The set function.
        allows: Whether a set keeps the budgets; smaller sets of the same lowest layer must keep them too.
        depth: Number of layers L.
        k: How many layers.
    """
    chosen: list[int] = []
    while len(chosen) < k:
        free = [i for i in range(depth) if i not in chosen and allows([*chosen, i])]
        if not free:
            break
        chosen.append(max(free, key=lambda i: value([*chosen, i])))
    best, improved = value(chosen), True
    while improved:
        improved = False
        for out in list(chosen):
            kept = [i for i in chosen if i != out]
            options = [[*kept, i] for i in range(depth) if i not in chosen and allows([*kept, i])]
            swapped = max(options, key=value, default=chosen)
            if value(swapped) > best + 1e-12 * abs(best):
                chosen, best, improved = swapped, value(swapped), True
                break
    return tuple(sorted(chosen))


def _grown(problem: Problem, m: int, cap: int, room: np.ndarray, prices: np.ndarray, stop: float = np.inf) -> list[int]:
    """Layers from m up, m among them: the largest increase of coverage each time, until `cap`, the budgets or `stop` end it."""
    similar, weights = problem.similar, problem.weights
    layers, best = [m], similar[:, m].copy()
    left = room - prices[:, m]
    free = np.arange(problem.depth) > m
    while len(layers) < cap and (len(layers) < problem.least or weights @ best < stop):
        fits = free & (prices <= left[:, None]).all(axis=0)
        if not fits.any():
            break
        gains = np.where(fits, weights @ np.maximum(similar, best[:, None]), -np.inf)
        taken = int(gains.argmax())
        layers.append(taken)
        free[taken] = False
        left = left - prices[:, taken]
        best = np.maximum(best, similar[:, taken])
    return layers


def _exchanged(problem: Problem, layers: list[int], room: np.ndarray, prices: np.ndarray) -> list[int]:
    """Swap one layer for another as long as coverage rises and the budgets hold."""
    similar, weights = problem.similar, problem.weights
    layers, value = list(layers), problem.coverage(layers)
    improved = True
    while improved:
        improved = False
        for out in layers:
            kept = [i for i in layers if i != out]
            rest = similar[:, kept].max(axis=1) if kept else np.zeros(problem.depth)
            values = weights @ np.maximum(similar, rest[:, None])
            lowest = np.minimum(np.arange(problem.depth), min(kept, default=problem.depth))
            fits = (prices[:, kept].sum(axis=1)[:, None] + prices <= room[:, lowest]).all(axis=0)
            fits[layers] = False
            values = np.where(fits, values, -np.inf)
            taken = int(values.argmax())
            if values[taken] > value * (1 + 1e-12):
                layers, value, improved = [*kept, taken], float(values[taken]), True
                break
    return layers


def _thinned(problem: Problem, layers: list[int], own: np.ndarray) -> list[int]:
    """Without the layers, dearest first, that the needed coverage can do without."""
    for out in sorted(layers, key=lambda i: (-own[i], i)):
        fewer = [i for i in layers if i != out]
        if len(fewer) >= problem.least and problem.coverage(fewer) >= problem.needed:
            layers = fewer
    return layers


def _cheapened(problem: Problem, layers: list[int], cost: Linear) -> list[int]:
    """Swap one layer for a cheaper one as long as all that is asked for holds."""
    own = np.asarray(cost.own)
    backward = np.cumsum(np.asarray(cost.through)[::-1])[::-1]
    price, improved = cost.of(layers), True
    while improved:
        improved = False
        for out in layers:
            kept = [i for i in layers if i != out]
            rest = problem.similar[:, kept].max(axis=1) if kept else np.zeros(problem.depth)
            reached = problem.weights @ np.maximum(problem.similar, rest[:, None])
            lowest = np.minimum(np.arange(problem.depth), min(kept, default=problem.depth))
            prices = cost.fixed + backward[lowest] + own[kept].sum() + own
            prices[layers] = np.inf
            for taken in np.argsort(prices, kind="stable").tolist():
                if prices[taken] >= price * (1 - 1e-12):
                    break
                if reached[taken] >= problem.needed and problem.allows([*kept, taken]):
                    layers, price, improved = [*kept, taken], float(prices[taken]), True
                    break
            if improved:
                break
    return layers


# ---- selection.bounds


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


# ---- selection.programme


@dataclass(frozen=True)
class Found:
    """What HiGHS says: the best layers that it has (`None` for none), and whether it is certain."""

    layers: tuple[int, ...] | None
    bound: float | None
    proven: bool


class Programme:
    """All sets of lowest layer m that cover more than `known`, and some others.

    Args:
        problem: The choice.
        m: Lowest layer.
        bound: An upper bound on their coverage.
        known: A coverage that sets of interest reach at least.
    """

    def __init__(self, problem: Problem, m: int, bound: Bound, known: float) -> None:
        self.problem, self.m, self.known, self.bound = problem, m, known, bound.value
        self.fewest = max(problem.least, Relaxation(problem).fewest(m, bound.prices, known))
        spare = max(bound.value - known, 0.0) * (1 + SLACK) + SLACK * abs(known)
        self.candidates = np.flatnonzero(bound.margin <= spare)
        self.candidates = self.candidates[(self.candidates > m) & self._affordable()[self.candidates]]
        with np.errstate(divide="ignore", invalid="ignore"):
            floor = (bound.prices - spare) / problem.weights
        self.floor = np.where(problem.weights > 0, floor, 0.0)
        self._levels()

    def _affordable(self) -> np.ndarray:
        """`[L]`, whether each budget pays for a layer beside m and the cheapest others, as many as there must be at least."""
        others = min(max(self.fewest - 2, 0), self.problem.depth - self.m - 2)
        fits = np.ones(self.problem.depth, dtype=bool)
        if others < 0:
            return fits
        for own, room in zip(self.problem.prices(), self.problem.room()[:, self.m], strict=True):
            above = own[self.m + 1 :]
            spent = np.concatenate([[0.0], np.cumsum(np.sort(above))])
            rank = np.empty(len(above), dtype=int)
            rank[np.argsort(above, kind="stable")] = np.arange(len(above))
            total = np.where(rank < others, spent[others + 1], spent[others] + above)
            fits[self.m + 1 :] &= own[self.m] + total <= room + SLACK * abs(room)
        return fits

    def _levels(self) -> None:
        """Rows of the constraints on v, the coverage that is sure, and the gain of each variable."""
        similar, weights, m = self.problem.similar, self.problem.weights, self.m
        n = len(self.candidates)
        rows: list[np.ndarray] = []
        cols: list[np.ndarray] = []
        vals: list[np.ndarray] = []
        gains = [np.zeros(n)]
        self.sure, self.must = 0.0, []
        row, width = 0, n
        for j in np.flatnonzero(weights > 0):
            own = similar[j, m]
            worth = similar[j, self.candidates]
            order = np.flatnonzero(worth > own)
            order = order[np.argsort(-worth[order], kind="stable")]
            base = own
            if self.floor[j] > own:
                order = order[worth[order] >= self.floor[j]]
                if not len(order):
                    self.must.append(order)
                    continue
                base = worth[order[-1]]
                self.must.append(order)
            self.sure += weights[j] * base
            steps = weights[j] * (worth[order] - np.append(worth[order[1:]], base))
            last = len(steps) - (1 if self.floor[j] > own else 0)
            if last <= 0:
                continue
            gains[0][order[0]] += steps[0]
            count = last - 1
            variables = width + np.arange(count)
            at = row + np.arange(count)
            before = np.concatenate([[order[0]], variables[:-1]]) if count else variables
            rows += [at, at, at]
            cols += [variables, before, order[1:last]]
            vals += [np.ones(count), -np.ones(count), -np.ones(count)]
            gains.append(steps[1:last])
            row, width = row + count, width + count
        self.gains = np.concatenate(gains)
        flat = (np.concatenate(vals), (np.concatenate(rows), np.concatenate(cols))) if rows else ([], ([], []))
        self.chain = coo_array(flat, shape=(row, width)).tocsr()

    def _constraints(self) -> list[LinearConstraint]:
        n, width = len(self.candidates), len(self.gains)
        problem = self.problem
        table, low, high = [], [], []

        def add(on_y: np.ndarray, least: float, most: float) -> None:
            table.append(np.concatenate([on_y, np.zeros(width - n)]))
            low.append(least)
            high.append(most)

        add(np.ones(n), self.fewest - 1, problem.largest - 1)
        for own, room in zip(problem.prices(), problem.room(), strict=True):
            add(own[self.candidates], -np.inf, room[self.m] - own[self.m])
        for order in self.must:
            row = np.zeros(n)
            row[order] = 1.0
            add(row, 1.0, np.inf)
        constraints = [LinearConstraint(np.array(table), np.array(low), np.array(high))]
        if self.chain.shape[0]:
            constraints.append(LinearConstraint(self.chain, -np.inf, 0.0))
        return constraints

    def most_coverage(self, tolerance: float, seconds: float) -> Found:
        """The set of largest coverage, to a relative `tolerance` of coverage."""
        relative = 0.9 * tolerance * self.known / max(self.bound - self.sure, tolerance * self.known, 1e-300)
        better = LinearConstraint(self.gains[None, :], self.known * (1 + tolerance / 2) - self.sure, np.inf)
        return self._solve(-self.gains, [better], min(relative, 0.5), seconds, -1.0, self.sure)

    def least_price(self, own: np.ndarray, tolerance: float, seconds: float) -> Found:
        """The set of least Σ own that reaches the needed coverage, to an absolute `tolerance` of that sum; the bound is of the sum."""
        if not len(self.gains) and self.sure < self.problem.needed * (1 - SLACK):
            return Found(None, None, True)  # m alone does not reach it
        row = LinearConstraint(self.gains[None, :], self.problem.needed * (1 - SLACK) - self.sure, np.inf)
        objective = np.concatenate([own[self.candidates], np.zeros(len(self.gains) - len(self.candidates))])
        largest = float(own[self.candidates].sum()) or 1.0
        return self._solve(objective, [row], min(max(tolerance / largest, 1e-9), 0.5), seconds, 1.0, float(own[self.m]))

    def _solve(self, objective: np.ndarray, more: list[LinearConstraint], gap: float, seconds: float, sign: float, base: float) -> Found:
        if not len(self.gains):
            return self._alone(sign, base)
        result = milp(
            objective,
            integrality=np.concatenate([np.ones(len(self.candidates)), np.zeros(len(self.gains) - len(self.candidates))]),
            bounds=Bounds(0, 1),
            constraints=[*self._constraints(), *more],
            options={"time_limit": max(seconds, 0.01), "mip_rel_gap": gap},
        )
        bound = None if result.mip_dual_bound is None else base + sign * float(result.mip_dual_bound)
        if result.x is None:
            return Found(None, bound, result.status == 2)
        chosen = self.candidates[result.x[: len(self.candidates)] > 0.5]
        return Found((self.m, *map(int, chosen)), bound, result.status == 0)

    def _alone(self, sign: float, base: float) -> Found:
        """No candidate is left: m alone, or nothing."""
        layers = (self.m,) if self.problem.least <= 1 and not self.must else None
        return Found(layers, base, True)


# ---- selection.solver

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
