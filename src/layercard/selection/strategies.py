"""Plain placements that need no card: the baselines every choice is measured against."""

import random
from collections.abc import Callable, Sequence

from layercard.errors import SelectionError, suggestion
from layercard.files import shown

STRATEGIES: dict[str, Callable[[int, int], list[int]]] = {
    "first": lambda num_layers, k: list(range(k)),
    "middle": lambda num_layers, k: list(range((num_layers - k + 1) // 2, (num_layers - k + 1) // 2 + k)),
    "last": lambda num_layers, k: list(range(num_layers - k, num_layers)),
    "uniform": lambda num_layers, k: [(2 * part + 1) * num_layers // (2 * k) for part in range(k)],
    "all": lambda num_layers, k: list(range(num_layers)),
}
"""Strategies by name: from the number of layers and k to the layers.

`first` are the k layers next to the input: the dearest, since backward runs through every block. `last` are those next to the output:
the cheapest, since backward stops after k blocks. `uniform` are the middles of k equal parts of the depth.
"""
ALIASES = {"top": "first", "bottom": "last"}
"""The paper's words: its Bottom is the output side (cheapest to train), its Top the input side."""


def strategy_layers(name: str, num_layers: int, k: int, seed: int = 0) -> list[int]:
    """Layers of a named strategy.

    >>> strategy_layers("uniform", 30, 5), strategy_layers("bottom", 30, 3)
    ([3, 9, 15, 21, 27], [27, 28, 29])

    Args:
        name: first, middle, last, uniform, random, all, or the aliases top (= first) and bottom (= last).
        num_layers: Number of layers of the model.
        k: How many to take; `all` takes every one.
        seed: Of `random`.

    Raises:
        SelectionError: Unknown name, or k outside 1 to the number of layers.
    """
    names = [*STRATEGIES, "random", *ALIASES]
    if name not in names:
        raise SelectionError(f"strategy {name!r} is unknown; {suggestion(name, names)}")
    name = ALIASES.get(name, name)
    check_k(num_layers if name == "all" else k, num_layers)
    if name == "random":
        return sorted(random.Random(seed).sample(range(num_layers), k))
    return STRATEGIES[name](num_layers, k)


def top_layers(scores: Sequence[float], k: int) -> list[int]:
    """The k layers of largest score, as most tools choose them; of equal scores the lower layer.

    >>> top_layers([1.0, 3.0, 2.0, 3.0], 2)
    [1, 3]

    Raises:
        SelectionError: k is outside 1 to the number of scores.
    """
    check_k(k, len(scores))
    return sorted(sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))[:k])


def check_k(k: int, num_layers: int) -> None:
    """Raise `SelectionError` unless 1 ≤ k ≤ the number of layers."""
    if not 1 <= k <= num_layers:
        raise SelectionError(f"k = {shown(k)} layers cannot be chosen; the model has {num_layers}, so give a number from 1 to {num_layers}")
