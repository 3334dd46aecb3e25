"""The best set of layers, with a proof: which set covers the most within budgets, or covers enough at the least cost.

A model has L layers, 0 at the input. A set S of layers covers `f(S) = Σ_j w_j max_{i ∈ S} C_ji` (facility location). It costs
`c(S) = fixed + Σ_{j ≥ min S} through_j + Σ_{i ∈ S} own_i` (`layercard.cost.model.Linear`): backward runs through every layer from the
lowest adapted one up. Once the lowest layer m is fixed, every cost is linear in the layers taken, so each m is a problem of its own:

1. Greedy choice and exchange give a good set (within 1 − 1/e of the best coverage of k layers: Nemhauser, Wolsey and Fisher 1978).
2. A Lagrangian bound says how much the sets of lowest layer m can cover at most. Most m fall here (`coverage_bound`).
3. HiGHS solves the others as mixed-integer programmes, on the layers that the bound leaves open (`_solve_lowest`).

One programme with m as a variable is simpler but too slow: it closes a budget on 30 layers in 0.2 s and leaves 12 % open after 30 s on 128.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from layercard.cost.model import Linear

SECONDS = 2.0
"""Time after which the best set so far is returned, with its gap."""
FIRST_TRY = 0.3
"""Seconds of the first try of one lowest layer; each further try gets four times as many."""
STARTS = 4
"""How many greedy sets are improved by exchange."""
SLACK = 1e-9
"""Share of a limit by which rounding may exceed it."""


def resolution(num_layers: int) -> float:
    """Relative difference in coverage or cost that does not count; what is measured is coarser by far."""
    return 1e-4 if num_layers <= 48 else 1e-3


@dataclass(frozen=True)
class Budget:
    """An upper limit on a cost, in the unit of the cost; `name` is for messages."""

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
    def num_layers(self) -> int:
        """L."""
        return len(self.weights)

    @property
    def largest(self) -> int:
        """The most layers that any set may have."""
        return self.num_layers if self.most is None else min(self.most, self.num_layers)

    def coverage(self, layers: Sequence[int]) -> float:
        """`f(S)`, 0 for no layer."""
        return float(self.weights @ self.similar[:, list(layers)].max(axis=1)) if len(layers) else 0.0

    def allows(self, layers: Sequence[int]) -> bool:
        """Whether a set keeps the number of layers, every budget and the coverage."""
        return (
            self.least <= len(layers) <= self.largest
            and all(budget.allows(layers) for budget in self.budgets)
            and self.coverage(layers) >= self.needed * (1 - SLACK)
        )

    @cached_property
    def worth(self) -> np.ndarray:
        """`w_j C_ji: [L, L]`."""
        return self.weights[:, None] * self.similar

    @cached_property
    def adapter_costs(self) -> np.ndarray:
        """What the adapters of each layer cost in each budget, `[budgets, L]`."""
        return np.array([budget.form.own for budget in self.budgets], dtype=float).reshape(-1, self.num_layers)

    @cached_property
    def room(self) -> np.ndarray:
        """What each budget leaves for adapters when layer m is the lowest, `[budgets, L]`; below 0 where backward alone is too dear."""
        rows = [budget.limit + SLACK * abs(budget.limit) - _base_cost(budget.form) for budget in self.budgets]
        return np.array(rows, dtype=float).reshape(-1, self.num_layers)

    @cached_property
    def caps(self) -> np.ndarray:
        """The most layers that fit when layer m is the lowest, `[L]`; 0 where fewer than `least` do."""
        caps = np.minimum(self.largest, self.num_layers - np.arange(self.num_layers))
        for m in range(self.num_layers):
            for room, costs in zip(self.room[:, m], self.adapter_costs, strict=True):
                spent = costs[m] + np.concatenate([[0.0], np.cumsum(np.sort(costs[m + 1 :]))])
                caps[m] = min(caps[m], np.searchsorted(spent, room, side="right"))
        return np.where(caps >= self.least, caps, 0)


def _base_cost(cost: Linear) -> np.ndarray:
    """What is paid with lowest layer m before any adapter, `[L]`."""
    return cost.fixed + np.cumsum(np.asarray(cost.through)[::-1])[::-1]


@dataclass(frozen=True)
class Solution:
    """A set of layers with how good it is known to be.

    `value` is its coverage, `cost` the cost that was minimised, if one was. `status` is "optimal", or "time limit" where it is not proven
    in time; `gap` is the relative distance to a proven bound of what was optimised.
    """

    layers: tuple[int, ...]
    value: float
    status: str
    gap: float
    cost: float | None = None

    def notes(self) -> dict[str, Any]:
        """Status and gap, as files keep them."""
        return {"status": self.status, "gap": float(f"{self.gap:.3g}")}


# ---- greedy choice


def greedy(problem: Problem, cost: Linear | None = None) -> tuple[int, ...] | None:
    """A good allowed set, fast: of large coverage, or of small `cost` where one is given; `None` where greedy choice meets none.

    For every lowest layer it adds the layer that raises coverage most, until the budgets are spent or, with a cost, the needed coverage
    is reached. The best sets are improved by exchange.
    """
    starts: list[tuple[float, list[int]]] = []
    least = np.full(problem.num_layers, -np.inf) if cost is None else _base_cost(cost) + np.asarray(cost.own)
    # From the cheapest lowest layer down: a set is not begun that costs more by its lowest layer alone than the best so far.
    for m in np.flatnonzero(problem.caps)[:: 1 if cost is None else -1].tolist():
        if cost is not None and starts and least[m] >= -max(score for score, _ in starts):
            continue
        layers = greedy_chain(problem, m, np.inf if cost is None else problem.needed)[0]
        for out in sorted(layers, key=lambda i: (-cost.own[i], i)) if cost is not None else ():
            fewer = [i for i in layers if i != out]  # perhaps the coverage is reached without this layer too
            if len(fewer) >= problem.least and problem.coverage(fewer) >= problem.needed:
                layers = fewer
        if problem.allows(layers):
            starts.append((problem.coverage(layers) if cost is None else -cost.of(layers), layers))
    starts.sort(key=lambda start: -start[0])
    improved = [_exchanged(problem, layers, score, cost) for score, layers in starts[: STARTS if cost is None else 1]]
    return tuple(sorted(max(improved, key=lambda start: start[0])[1])) if improved else None


def greedy_chain(problem: Problem, m: int, enough: float = np.inf) -> tuple[list[int], np.ndarray]:
    """Lowest layer m and those above it in the order in which greedy choice takes them, and the coverage after each.

    It ends where the budgets are spent or, with `least` layers or more, where the coverage is `enough`. Without budgets the greedy set
    for any needed coverage is the beginning of one chain, so many problems that differ in it share the chains of all m.
    """
    layers, best, room = [m], problem.similar[:, m], problem.room[:, m] - problem.adapter_costs[:, m]
    coverages, free = [float(problem.weights @ best)], np.arange(problem.num_layers) > m
    while len(layers) < problem.caps[m] and not (len(layers) >= problem.least and coverages[-1] >= enough):
        fits = free & (problem.adapter_costs <= room[:, None]).all(axis=0)
        if not fits.any():
            break
        added = int(np.where(fits, problem.weights @ np.maximum(problem.similar, best[:, None]), -np.inf).argmax())
        layers.append(added)
        free[added] = False
        room, best = room - problem.adapter_costs[:, added], np.maximum(best, problem.similar[:, added])
        coverages.append(float(problem.weights @ best))
    return layers, np.array(coverages)


def _from_chains(problem: Problem, cost: Linear, chains: Sequence[tuple[list[int], np.ndarray]], deadline: float) -> tuple[int, ...] | None:
    """The cheapest beginning of a chain that reaches the needed coverage, improved by exchange."""
    starts = []
    for layers, coverages in chains:
        count = max(problem.least, 1 + int(np.searchsorted(coverages, problem.needed * (1 - SLACK))))
        if count <= len(layers):
            starts.append((-cost.of(layers[:count]), layers[:count]))
    if not starts:
        return None
    score, layers = max(starts, key=lambda start: start[0])
    return tuple(sorted(_exchanged(problem, layers, score, cost, deadline)[1]))


def _exchanged(
    problem: Problem, layers: list[int], score: float, cost: Linear | None, deadline: float = float("inf")
) -> tuple[float, list[int]]:
    """Swap one layer for another as long as the score (coverage, or minus the cost) rises and all limits hold, until the deadline."""
    index = np.arange(problem.num_layers)
    improved = True
    while improved and time.monotonic() < deadline:
        improved = False
        for out in layers:
            rest = [i for i in layers if i != out]
            covered = problem.similar[:, rest].max(axis=1) if rest else np.zeros(problem.num_layers)
            values = problem.weights @ np.maximum(problem.similar, covered[:, None])
            lowest = np.minimum(index, min(rest, default=problem.num_layers))
            fits = (problem.adapter_costs[:, rest].sum(axis=1)[:, None] + problem.adapter_costs <= problem.room[:, lowest]).all(axis=0)
            fits &= values >= problem.needed
            fits[layers] = False
            scores = values
            if cost is not None:
                own = np.asarray(cost.own)
                scores = -(_base_cost(cost)[lowest] + own[rest].sum() + own)
            added = int(np.where(fits, scores, -np.inf).argmax())
            if fits[added] and scores[added] > score + 1e-12 * abs(score):
                layers, score, improved = [*rest, added], float(scores[added]), True
                break
    return score, layers


# ---- bounds


@dataclass(frozen=True)
class CoverageBound:
    """An upper bound on the coverage of sets whose lowest layer is m.

    Attributes:
        value: The bound.
        prices: `λ: [L]`.
        rewards: `r: [L]`.
        margin: `[L]`, what the bound loses at least when a layer is taken (0 for the likely ones); infinite below m.
        taken: `[L]` from 0 to 1, the fractional set behind the bound.
    """

    value: float
    prices: np.ndarray
    rewards: np.ndarray
    margin: np.ndarray
    taken: np.ndarray

    def fewest(self, m: int, needed: float) -> int:
        """The fewest layers with which sets of lowest layer m can reach a coverage, as far as prices tell."""
        reach = self.prices.sum() + self.rewards[m] + np.append(0.0, np.cumsum(np.sort(self.rewards[m + 1 :])[::-1]))
        return 1 + int(np.searchsorted(reach, needed * (1 - SLACK)))


def coverage_bound(problem: Problem, m: int, prices: np.ndarray, rewards: np.ndarray | None = None) -> CoverageBound:
    """The bound of the Lagrangian dual for lowest layer m; any prices give a valid one.

    With a price `λ_j` on serving layer j, a set S of lowest layer m covers at most

        Σ_j λ_j + max { Σ_{i ∈ S} r_i },   r_i = Σ_j max(0, w_j C_ji − λ_j),

    where the maximum is over the sets that keep the number of layers and the budgets. It is bounded by its fractional relaxation with
    one of these limits at a time. Source: Cornuejols, Fisher and Nemhauser 1977. `rewards` is r, where the caller has it already.
    """
    if rewards is None:
        rewards = np.clip(problem.worth - prices[:, None], 0.0, None).sum(axis=0)
    above = rewards[m + 1 :]
    limits = [(np.ones(len(above)), float(problem.caps[m] - 1))]
    limits += [(costs[m + 1 :], float(room[m] - costs[m])) for costs, room in zip(problem.adapter_costs, problem.room, strict=True)]
    best, margin_above, taken_above = np.inf, above, above
    for price, limit in limits:
        # The fractional knapsack: take the layers of most reward for their price, the last one in part.
        order = np.argsort(np.where(price <= 0, -np.inf, -above / np.where(price <= 0, 1.0, price)), kind="stable")
        spent = np.cumsum(price[order])
        full = int(np.searchsorted(spent, limit, side="right"))
        taken, rate = np.zeros(len(above)), 0.0
        taken[order[:full]] = 1.0
        if full < len(order):
            last = order[full]
            taken[last] = max(0.0, (limit - (spent[full - 1] if full else 0.0)) / price[last])
            rate = above[last] / price[last]
        if above @ taken < best:
            best, margin_above, taken_above = float(above @ taken), np.clip(rate * price - above, 0.0, None), taken
    margin = np.concatenate([np.full(m, np.inf), [0.0], margin_above])
    return CoverageBound(
        float(prices.sum() + rewards[m] + best), prices, rewards, margin, np.concatenate([np.zeros(m), [1.0], taken_above])
    )


def coverage_bounds(problem: Problem, prices: np.ndarray) -> np.ndarray:
    """The bounds for all lowest layers with the same prices, `[L]`; −∞ where no set is allowed."""
    rewards = np.clip(problem.worth - prices[:, None], 0.0, None).sum(axis=0)
    return np.array([coverage_bound(problem, m, prices, rewards).value if cap else -np.inf for m, cap in enumerate(problem.caps)])


def tightened_bound(problem: Problem, m: int, prices: np.ndarray, goal: float, steps: int = 120) -> CoverageBound:
    """The lowest bound that subgradient steps from `prices` reach (Held and Karp 1971); they stop once it falls below `goal`."""
    best = coverage_bound(problem, m, prices)
    length, failures = 1.0, 0
    for _ in range(steps):
        if best.value < goal or length < 1e-3:
            break
        bound = coverage_bound(problem, m, prices)
        failures += 1
        if bound.value < best.value - 1e-12 * abs(best.value):
            best, failures = bound, 0
        elif failures >= 6:  # back to the best prices, with smaller steps
            bound, length, failures = best, length / 2, 0
        slope = 1.0 - (problem.worth > bound.prices[:, None]) @ bound.taken
        if not slope.any():
            break
        prices = bound.prices - length * max(bound.value - goal, 1e-9 * abs(goal)) / float(slope @ slope) * slope
    return best


# ---- exact search


def most_coverage(problem: Problem, *, tolerance: float | None = None, seconds: float = SECONDS) -> Solution | None:
    """The set of largest coverage within the number of layers and the budgets; `None` where no set keeps them.

    Args:
        problem: The choice; `needed` is not looked at.
        tolerance: Relative difference in coverage that does not count; `resolution` unless given.
        seconds: Time limit; the solution says whether it was reached, and its gap.
    """
    return _search(replace(problem, needed=0.0), None, tolerance, seconds)


def least_cost(
    problem: Problem,
    cost: Linear,
    *,
    tolerance: float | None = None,
    seconds: float = SECONDS,
    chains: Sequence[tuple[list[int], np.ndarray]] | None = None,
) -> Solution | None:
    """The cheapest set that reaches the needed coverage within the number of layers and the budgets; `None` where no set does.

    A set is cheaper than the best one so far when it keeps one more budget: this cost, a little below that of the best. Where even the
    largest coverage under that budget falls short, for every lowest layer, the best so far is the cheapest.

    `tolerance` and `seconds` are as in `most_coverage`; the tolerance is of the cost. `chains` are those of `greedy_chain` for every
    lowest layer of a problem without budgets, where the caller has them.
    """
    return _search(problem, cost, tolerance, seconds, chains)


def _search(
    problem: Problem,
    cost: Linear | None,
    tolerance: float | None,
    seconds: float,
    chains: Sequence[tuple[list[int], np.ndarray]] | None = None,
) -> Solution | None:
    """The set of largest coverage (`cost` is `None`) or of least cost, over all lowest layers."""
    deadline = time.monotonic() + seconds
    tolerance = resolution(problem.num_layers) if tolerance is None else tolerance
    layers = greedy(problem, cost) if chains is None or cost is None else _from_chains(problem, cost, chains, deadline)

    def target() -> tuple[Problem, float, float]:
        """The problem of finding a better set, the coverage that such a set has at least, and the bound from which on there may be one."""
        if cost is not None:
            dearest = () if layers is None else (Budget("cost", cost, cost.of(layers) * (1 - tolerance)),)
            return replace(problem, budgets=problem.budgets + dearest), problem.needed, problem.needed * (1 - SLACK)
        value = 0.0 if layers is None else problem.coverage(layers)
        return problem, value, -1.0 if layers is None else value * (1 + tolerance)

    # Step 1: bounds for every lowest layer, at prices between what the best and the second best layer of the greedy set are worth.
    better, needed, goal = target()
    served = np.sort(problem.worth[:, list(layers or range(problem.num_layers))], axis=1)
    prices = (served[:, -1] + (served[:, -2] if served.shape[1] > 1 else 0.5 * served[:, -1])) / 2
    bounds = coverage_bounds(better, prices)

    # Step 2: settle one lowest layer after another: the most promising first, among those with the fewest tries.
    sharp: dict[int, np.ndarray] = {}
    floors: dict[int, float] = {}  # what sets of each lowest layer that was tried cost at least
    tries: Counter[int] = Counter()
    solved: set[int] = set()
    while undecided := [m for m in range(problem.num_layers) if bounds[m] > goal and m not in solved]:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        m = min(undecided, key=lambda layer: (tries[layer], -bounds[layer]))
        if m not in sharp:  # the bound first; its prices may settle others too
            m = max((layer for layer in undecided if layer not in sharp), key=lambda layer: bounds[layer])
            sharp[m] = prices = tightened_bound(better, m, prices, goal).prices
            bounds = np.minimum(bounds, coverage_bounds(better, prices))
            continue
        bound = coverage_bound(better, m, sharp[m])
        chosen, dual, proven = _solve_lowest(better, m, bound, needed, cost, tolerance, min(FIRST_TRY * 4.0 ** tries[m], left))
        tries[m] += 1
        if cost is not None:
            floors[m] = np.inf if dual is None or (proven and chosen is None) else dual
        if proven:
            solved.add(m)
            if cost is None:
                bounds[m] = min(bounds[m], max(needed * (1 + tolerance / 2), -np.inf if dual is None or chosen is None else dual))
        if chosen is None or not problem.allows(chosen):
            continue
        if layers is None or (problem.coverage(chosen) > needed if cost is None else cost.of(chosen) < cost.of(layers)):
            layers = chosen
            better, needed, goal = target()
            for earlier in sharp.values() if cost is not None else ():  # under the tighter budget the same prices say more
                bounds = np.minimum(bounds, coverage_bounds(better, earlier))
    if layers is None:
        return None

    # Step 3: how far the set may be from the best, by the bounds of what is undecided.
    value = problem.coverage(layers)
    if cost is None:
        gap = max(0.0, float(bounds.max()) / value - 1) if value > 0 else 0.0
        return Solution(layers, value, "time limit" if undecided else "optimal", gap)
    price, base = cost.of(layers), _base_cost(cost)
    lowest = min([price * (1 - tolerance), *(floors.get(m, base[m] + cost.own[m]) for m in solved.union(undecided))])
    return Solution(layers, value, "time limit" if undecided else "optimal", 1 - lowest / price if price > 0 else 0.0, price)


def _solve_lowest(
    problem: Problem, m: int, bound: CoverageBound, needed: float, cost: Linear | None, tolerance: float, seconds: float
) -> tuple[tuple[int, ...] | None, float | None, bool]:
    """Solve lowest layer m with HiGHS, for sets that cover more than `needed` (or at least that, with a cost).

    The programme is in radius form. For each layer j of the model let `i_1, i_2, …` be the layers that cover it better than m does, best
    first, and `c_1 ≥ c_2 ≥ … ≥ c_0 = C_jm` how well. With y_i = layer i is taken and v_jt = one of the first t is taken,

        coverage = Σ_j w_j (c_0 + Σ_t (c_t − c_{t+1}) v_jt),   v_jt ≤ v_j,t−1 + y_{i_t},   0 ≤ v ≤ 1.

    Only y need be integer, and its relaxation is as tight as the assignment form's. Source: Cornuejols, Nemhauser and Wolsey 1980.

    Returns:
        The best layers found (`None` for none), a bound on the objective, and whether this is certain.
    """
    # Step 1: leave out the layers that cost the bound more than it is above `needed`: no better set holds one of them.
    excess = max(bound.value - needed, 0.0) * (1 + SLACK) + SLACK * abs(needed)
    candidates = np.flatnonzero((bound.margin <= excess) & (np.arange(problem.num_layers) > m))
    fewest = max(problem.least, bound.fewest(m, needed))
    n = len(candidates)

    # Step 2: for each layer j the chain of its variables v; `sure` is the coverage that every set has. In the same way no better set
    # serves j worse than `floor`: where m does, one of the layers that serve it well enough must be taken.
    with np.errstate(divide="ignore", invalid="ignore"):
        floor = np.where(problem.weights > 0, (bound.prices - excess) / problem.weights, 0.0)
    sure, width, gains = 0.0, n, [np.zeros(n)]
    chains: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # in each row v_jt, then v_j,t−1 or y_{i_1}, then y_{i_t}
    musts: list[np.ndarray] = []
    for j in np.flatnonzero(problem.weights > 0):
        base, covers = problem.similar[j, m], problem.similar[j, candidates]
        must = floor[j] > base
        order = np.flatnonzero(covers >= floor[j] if must else covers > base)
        order = order[np.argsort(-covers[order], kind="stable")]
        if must:
            musts.append(order)
            base = covers[order[-1]] if len(order) else base
            order = order[:-1]
        sure += problem.weights[j] * base
        if len(order):
            steps = problem.weights[j] * (covers[order] - np.append(covers[order[1:]], base))
            gains[0][order[0]] += steps[0]
            gains.append(steps[1:])
            variables = width + np.arange(len(order) - 1)
            chains.append((variables, np.append(order[:1], variables)[:-1], order[1:]))
            width += len(variables)

    # Step 3: without candidates m stands alone, or nothing does.
    offset = sure if cost is None else float(_base_cost(cost)[m] + cost.own[m])
    if not n:
        alone = fewest <= 1 and not musts and (cost is None or sure >= needed * (1 - SLACK))
        return (m,) if alone else None, offset, True

    # Step 4: constraints on the number of layers, the budgets, the layers that must be served and the coverage; then the chains.
    target = needed * (1 + tolerance / 2) if cost is None else needed * (1 - SLACK)
    limits: list[tuple[np.ndarray, float, float]] = [(np.ones(n), fewest - 1, problem.largest - 1)]
    limits += [(costs[candidates], -np.inf, room[m] - costs[m]) for costs, room in zip(problem.adapter_costs, problem.room, strict=True)]
    limits += [(np.isin(np.arange(n), must), 1, np.inf) for must in musts]
    table = np.zeros((len(limits) + 1, width))
    table[:-1, :n] = [row for row, _, _ in limits]
    table[-1] = np.concatenate(gains)
    constraints = [LinearConstraint(table, [*(low for _, low, _ in limits), target - sure], [*(high for _, _, high in limits), np.inf])]
    if width > n:
        columns = np.concatenate([np.concatenate(part) for part in zip(*chains, strict=True)])
        rows = np.tile(np.arange(width - n), 3)
        signs = np.repeat([1.0, -1.0, -1.0], width - n)
        constraints.append(LinearConstraint(coo_array((signs, (rows, columns)), shape=(width - n, width)).tocsr(), -np.inf, 0.0))

    # Step 5: HiGHS. Its gap is relative to its own objective, which is without the offset.
    if cost is None:
        objective, sign = -table[-1], -1.0
        gap = 0.9 * tolerance * needed / max(bound.value - sure, tolerance * needed) if needed > 0 else tolerance
    else:
        objective, sign = np.append(np.asarray(cost.own)[candidates], np.zeros(width - n)), 1.0
        gap = max(0.9 * tolerance * offset / (float(objective.sum()) or 1.0), 1e-9)
    result = milp(
        objective,
        integrality=np.repeat([1, 0], [n, width - n]),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": max(seconds, 0.01), "mip_rel_gap": min(gap, 0.5)},
    )
    dual = None if result.mip_dual_bound is None else offset + sign * float(result.mip_dual_bound)
    chosen = None if result.x is None else (m, *candidates[result.x[:n] > 0.5].tolist())
    return chosen, dual, result.status == 0 or (chosen is None and result.status == 2)
