"""The learning rate for a number of adapted layers: a small search on validation records, the same for every placement."""

import math
from collections.abc import Sequence
from typing import Any

from layercard.models.load import Progress
from layercard.selection.strategies import strategy_layers
from layercard.trials.runs import BenchSettings, Item, base_model, run_items, run_name
from layercard.trials.storage import Storage

MOST = 6
"""Learning rates tried at most."""
RATE_COUNTS = (1, 3, 5, 8, 13, 21)
"""Numbers of layers for which a learning rate is searched, besides all layers; others take that of the nearest."""


def rate_name(task: str, count: int, rank: int) -> str:
    """Where the result of a search lies."""
    return f"rates/{task}-r{rank}-n{count:02d}.json"


def find_rate(settings: BenchSettings, storage: Storage, task: str, count: int, rank: int, progress: Progress | None = None) -> float:
    """The best learning rate for the `count` middle layers, seed 0: doubled from the start while that helps, else halved.

    One placement stands for all of as many layers, so none is favoured; the middle ones are neither the dearest nor the cheapest.

    Searches for other numbers of layers are not consulted, so the result does not depend on the order of searches.
    """
    name = rate_name(task, count, rank)
    if storage.exists(name):
        return known_rate(storage, task, count, rank)
    layers = tuple(strategy_layers("middle", len(base_model(settings).blocks), count))
    tried: dict[float, float] = {}

    def loss(rate: float) -> float:
        if rate not in tried:
            item = Item(task, layers, 0, rank, rate, "valid")
            run_items(settings, storage, [item], progress)
            value = storage.read(run_name(item), "run")["train_info"]["metrics"]["loss_after"]
            tried[rate] = value if value == value else float("inf")
        return tried[rate]

    best = climb(loss, settings.learning_rate)
    rows = [{"learning_rate": rate, "loss": value} for rate, value in sorted(tried.items())]
    storage.write(name, {"task": task, "layers": list(layers), "rank": rank, "learning_rate": best, "split": "valid", "tried": rows})
    return best


def climb(loss: Any, start: float) -> float:
    """The rate of smallest loss among `start · 2^i`, followed upwards, then downwards, as long as it improves.

    >>> climb(lambda rate: abs(rate - 8), 2)
    8
    >>> climb(lambda rate: abs(rate - 0.5), 2)
    0.5
    """
    best, left = start, MOST - 1
    for factor in (2, 0.5):
        while left > 0 and (loss(best * factor) < loss(best) or (factor < 1 and math.isinf(loss(best)))):
            best, left = best * factor, left - 1
        if best != start:
            break
    return best


def known_rate(storage: Storage, task: str, count: int, rank: int) -> float:
    """The result of a search that was made."""
    return float(storage.read(rate_name(task, count, rank), "learning rate")["learning_rate"])


def nearest_count(count: int, counts: Sequence[int]) -> int:
    """The searched number of layers that is nearest to `count` in ratio.

    >>> nearest_count(4, [1, 2, 5, 30])
    5
    """
    return min(counts, key=lambda other: max(other, count) / min(other, count))
