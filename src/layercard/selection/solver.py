"""Best sets of k layers: exactly by mixed-integer programming, and by greedy with exchange."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix, eye_array, hstack, kron, vstack

from layercard.errors import SelectionError
from layercard.statistics.coverage import coverage


@dataclass(frozen=True)
class Solution:
    """A set of layers with how good it is known to be.

    Attributes:
        layers: Ascending.
        value: Its coverage.
        status: "optimal", or "greedy" where the exact solver gave up.
        gap: Relative distance to a proven upper bound, 0 if optimal; nothing is known for "greedy".
    """

    layers: tuple[int, ...]
    value: float
    status: str
    gap: float | None


def solve(similar: np.ndarray, weights: np.ndarray, k: int, lowest: int = 0) -> Solution:
    """The k layers, none below `lowest`, of greatest coverage.

    The programme (p-median): y_i = layer i is taken, x_ji = share of layer j that i covers; maximise Σ w_j C_ji x_ji subject to
    Σ_i x_ji = 1, x_ji ≤ y_i, Σ y_i = k. Only y need be integer.

    Args:
        similar: `C: [L, L]`, at least 0.
        weights: `w: [L]`, at least 0.
        k: How many layers.
        lowest: First layer that may be taken.

    Raises:
        SelectionError: Fewer than k layers may be taken.
    """
    allowed = list(range(lowest, len(weights)))
    if k > len(allowed):
        raise SelectionError(f"k = {k} layers do not fit above layer {lowest - 1}; take {len(allowed)} or fewer")
    gains = (weights[:, None] * similar[:, allowed]).ravel()
    n, m = len(weights), len(allowed)
    result = milp(
        -np.concatenate([gains, np.zeros(m)]),
        integrality=np.concatenate([np.zeros(n * m), np.ones(m)]),
        bounds=Bounds(0, 1),
        constraints=_constraints(n, m, k),
        options={"time_limit": 20.0},
    )
    greedy = greedy_exchange(similar, weights, k, lowest)
    if result.x is None:
        return greedy
    chosen = tuple(allowed[at] for at in np.flatnonzero(result.x[n * m :] > 0.5))
    value = coverage(similar, weights, chosen)
    if len(chosen) != k or value < greedy.value:
        return greedy
    return Solution(chosen, value, "optimal" if result.status == 0 else "time limit", float(result.mip_gap or 0.0))


def _constraints(n: int, m: int, k: int) -> list[LinearConstraint]:
    served = hstack([kron(eye_array(n), np.ones((1, m))), csr_matrix((n, m))])
    open_first = hstack([eye_array(n * m), -kron(np.ones((n, 1)), eye_array(m))])
    count = hstack([csr_matrix((1, n * m)), csr_matrix(np.ones((1, m)))])
    equal = LinearConstraint(vstack([served, count]).tocsr(), np.append(np.ones(n), k), np.append(np.ones(n), k))
    return [equal, LinearConstraint(open_first.tocsr(), -np.inf, 0.0)]


def greedy_exchange(similar: np.ndarray, weights: np.ndarray, k: int, lowest: int = 0) -> Solution:
    """Take the best layer k times, then swap while a swap helps."""
    allowed = range(lowest, len(weights))
    chosen: list[int] = []
    while len(chosen) < k:
        chosen.append(max((i for i in allowed if i not in chosen), key=lambda i: coverage(similar, weights, [*chosen, i])))
    value, improved = coverage(similar, weights, chosen), True
    while improved:
        improved = False
        for out in chosen:
            kept = [i for i in chosen if i != out]
            best = max((i for i in allowed if i not in kept), key=lambda i: coverage(similar, weights, [*kept, i]))
            found = coverage(similar, weights, [*kept, best])
            if found > value * (1 + 1e-12):
                chosen, value, improved = [*kept, best], found, True
                break
    return Solution(tuple(sorted(chosen)), value, "greedy", None)
