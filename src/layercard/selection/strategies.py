"""Plain placements that need no card: the baselines every choice is measured against.

Ranks for the chosen layers: one total, shared in proportion to the root of what each layer covers.
"""

import difflib
import random
from collections.abc import Callable, Sequence

import numpy as np

from layercard.errors import SelectionError
from layercard.statistics.coverage import covered_by

# ---- selection.strategies

ALIASES = {"top": "first", "bottom": "last"}
"""The paper's words: its Bottom is the output side (cheapest to train), its Top the input side."""


def first(depth: int, k: int) -> list[int]:
    """The k layers next to the input (the paper's Top): the dearest, since backward runs through every block."""
    return list(range(k))


def middle(depth: int, k: int) -> list[int]:
    """The k layers in the middle."""
    start = (depth - k + 1) // 2
    return list(range(start, start + k))


def last(depth: int, k: int) -> list[int]:
    """The k layers next to the output (the paper's Bottom): the cheapest, since backward stops after k blocks."""
    return list(range(depth - k, depth))


def uniform(depth: int, k: int) -> list[int]:
    """k layers evenly spread: the middles of k equal parts of the depth.

    >>> uniform(30, 5)
    [3, 9, 15, 21, 27]
    """
    return [(2 * part + 1) * depth // (2 * k) for part in range(k)]


def every(depth: int, k: int) -> list[int]:
    """All layers, whatever k."""
    return list(range(depth))


STRATEGIES: dict[str, Callable[[int, int], list[int]]] = {
    "first": first,
    "middle": middle,
    "last": last,
    "uniform": uniform,
    "all": every,
}


def strategy_layers(name: str, depth: int, k: int, seed: int = 0) -> list[int]:
    """Layers of a named strategy in a model of `depth` layers.

    Args:
        name: first, middle, last, uniform, random, all, or the aliases top (= first) and bottom (= last).
        depth: Number of layers of the model.
        k: How many to take; `all` takes every one.
        seed: Of `random`.

    Raises:
        SelectionError: Unknown name, or k outside 1 to depth.
    """
    known = [*STRATEGIES, "random", *ALIASES]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
        raise SelectionError(f"strategy {name!r} is unknown; {hint}")
    name = ALIASES.get(name, name)
    check_k(depth if name == "all" else k, depth)
    if name == "random":
        return sorted(random.Random(seed).sample(range(depth), k))
    return STRATEGIES[name](depth, k)


def top_layers(scores: Sequence[float], k: int) -> list[int]:
    """The k layers of largest score, as most tools choose them; of equal scores the lower layer.

    >>> top_layers([1.0, 3.0, 2.0, 3.0], 2)
    [1, 3]

    Raises:
        SelectionError: k is outside 1 to the number of scores.
    """
    check_k(k, len(scores))
    return sorted(sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))[:k])


def check_k(k: int, depth: int) -> None:
    """Raise `SelectionError` unless 1 ≤ k ≤ depth."""
    if not 1 <= k <= depth:
        raise SelectionError(f"k = {k} layers cannot be chosen; the model has {depth}, so give a number from 1 to {depth}")


# ---- selection.ranks


def shared_ranks(similar: np.ndarray, weights: np.ndarray, layers: Sequence[int], rank: int) -> dict[int, int]:
    """A rank for each layer, at least 1, that sum to `rank` times the number of layers.

    Layer i covers `a_i = Σ_j w_j C_ji` over the layers j that it covers best, itself among them; its rank is proportional to `√a_i`.
    What rounding leaves goes to the largest remainders, of equal ones to the lower layer.

    Args:
        similar: `C: [L, L]`.
        weights: `w: [L]`.
        layers: The chosen layers.
        rank: Mean rank.

    Raises:
        SelectionError: The rank is below 1.
    """
    if rank < 1:
        raise SelectionError(f"rank = {rank} cannot be shared out; give a whole number of at least 1")
    chosen = sorted(layers)
    covering = covered_by(similar, chosen)
    amounts = np.array([float(weights[covering == i] @ similar[covering == i, i]) for i in chosen])
    roots = np.sqrt(amounts)
    parts = roots / roots.sum() if roots.sum() > 0 else np.full(len(chosen), 1 / len(chosen))
    spare = (rank - 1) * len(chosen)
    exact = spare * parts
    ranks = 1 + np.floor(exact).astype(int)
    left = rank * len(chosen) - int(ranks.sum())
    for at in np.argsort(-(exact - np.floor(exact)), kind="stable")[:left]:
        ranks[at] += 1
    return dict(zip(chosen, ranks.tolist(), strict=True))
