"""The mixed-integer programme of one lowest layer, in its radius form, solved by HiGHS.

Layer m is taken and none below it. For each layer j of the model let `i_1, i_2, …` be the layers that cover it better than m does,
best first, and `c_1 ≥ c_2 ≥ … ≥ c_0 = C_jm` how well. With y_i = layer i is taken and v_jt = one of the first t is taken,

    coverage = Σ_j w_j (c_0 + Σ_t (c_t − c_{t+1}) v_jt),   v_jt ≤ v_j,t−1 + y_{i_t},   0 ≤ v ≤ 1.

Only y need be integer, and its relaxation is as tight as the assignment form's. Everything else is linear in y since the lowest layer
is fixed. Layers and assignments that a bound rules out are left out beforehand. Source: Cornuejols, Nemhauser and Wolsey 1980.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from layercard.selection.bounds import Bound, Relaxation
from layercard.selection.problem import SLACK, Problem


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
