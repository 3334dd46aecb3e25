"""Good sets quickly: greedy choice, then exchange. It is where the exact solver starts from, and the check on it.

Greedy maximisation of a monotone submodular function under a number of layers reaches 1 − 1/e of the best (Nemhauser, Wolsey and
Fisher 1978); under budgets it is tried for every lowest layer, and exchange mends what it missed.
"""

from collections.abc import Callable, Sequence

import numpy as np

from layercard.cost import Linear
from layercard.selection.problem import Problem, Solution

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
