"""Which set model predicts how much a *set* of layers gains?

Trains LoRA in random sets of 1 to 10 layers (resumable, one JSON a run, as `layercard bench placements` makes them), and prints for
every set model Spearman's rank correlation of its value, from the card alone, with the measured loss reduction, mean over all seeds
whose runs are there. The interval is a bootstrap over sets. The last row says what a perfect model would reach against measurements as
noisy as these: with r the mean rank correlation between two of n seeds, `√(n r / (1 + (n − 1) r))` (Spearman and Brown).

    python benchmarks/set_gain.py --tasks gsm8k --seeds 0 1 2    train what is missing
    python benchmarks/set_gain.py                                the table of both tasks
"""

import argparse
import random
from collections.abc import Iterable
from itertools import combinations

import numpy as np

from common import RESULTS, data_folder, report, rounded
from layercard.card.card import LayerCard
from layercard.selection.select import SET_MODELS
from layercard.statistics.intervals import spearman
from layercard.trials.choices import Chooser
from layercard.trials.placements import keep_settings, prepare
from layercard.trials.rates import find_rate
from layercard.trials.runs import BenchSettings, Item, run_items, run_name
from layercard.trials.storage import Storage

STORAGE = Storage.at(RESULTS / "placements")
SIZES = range(1, 11)
EACH = 2
"""Random sets of each size."""
REPEATS = 2000
SEEDS = 16
"""Seeds that are looked for."""


def random_sets(depth: int) -> list[tuple[int, ...]]:
    """The sets that are trained: the same for every task."""
    draw = random.Random(2602)
    return [tuple(sorted(draw.sample(range(depth), size))) for size in SIZES for _ in range(EACH)]


def items(task: str, seed: int, depth: int, settings: BenchSettings) -> list[Item]:
    """The runs of a task and seed; the learning rate of each number of layers is searched where it is not known yet."""
    found = []
    for layers in random_sets(depth):
        rate = find_rate(settings, STORAGE, task, len(layers), settings.rank)
        found.append(Item(task, layers, seed, settings.rank, rate))
    return found


def reductions(runs: list[Item]) -> np.ndarray:
    """Measured loss reduction of each run, nats per labelled token."""
    records = [STORAGE.read(run_name(item), "run") for item in runs]
    return np.array([record["train_info"]["metrics"]["loss_reduction"] for record in records])


def complete(task: str, depth: int, settings: BenchSettings, seeds: Iterable[int]) -> dict[int, list[Item]]:
    """By seed the runs of those seeds that were trained on all sets."""
    runs = {seed: items(task, seed, depth, settings) for seed in seeds}
    return {seed: group for seed, group in runs.items() if all(STORAGE.exists(run_name(item)) for item in group)}


def attainable(measured: np.ndarray) -> float | None:
    """What a perfect model would reach; `measured` is `[seeds, sets]`."""
    count = len(measured)
    if count == 1:
        return None
    between = np.mean([spearman(one, other) for one, other in combinations(measured, 2)])
    return float(np.sqrt(count * between / (1 + (count - 1) * between)))


def agreement(card: LayerCard, sets: list[tuple[int, ...]], measured: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """For every set model its rank correlation with the measured reductions, and the interval."""
    found = {}
    draw = np.random.default_rng(0)
    rows = [draw.integers(len(sets), size=len(sets)) for _ in range(REPEATS)]
    for name, make in SET_MODELS.items():
        value = make(card)
        predicted = np.array([value(layers) for layers in sets])
        low, high = np.quantile([spearman(predicted[row], measured[row]) for row in rows], [0.025, 0.975])
        found[name] = (spearman(predicted, measured), float(low), float(high))
    return found


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=["e2e", "gsm8k"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Seeds to train where they are missing.")
    options = parser.parse_args()
    settings = BenchSettings(options.model, data_folder())
    keep_settings(settings, STORAGE)
    columns: dict[str, dict[str, tuple[float, float, float]]] = {}
    heads: dict[str, str] = {}
    best: dict[str, float | None] = {}
    for task in options.tasks:
        prepare(settings, STORAGE, task)
        card = Chooser(STORAGE, task, settings.rank).card
        depth = card.model.layers
        for seed in options.seeds:
            run_items(settings, STORAGE, items(task, seed, depth, settings))
        trained = complete(task, depth, settings, range(SEEDS))
        measured = np.array([reductions(group) for group in trained.values()])
        heads[task], best[task] = f"{task}, {len(trained)} seed(s)", attainable(measured)
        columns[task] = agreement(card, random_sets(depth), measured.mean(axis=0))
    rows: list[list[object]] = [[name, *(rounded(*columns[task][name]) for task in options.tasks)] for name in SET_MODELS]
    rows.append(["a perfect model, with this noise", *("–" if (value := best[task]) is None else f"{value:.2f}" for task in options.tasks)])
    count = len(SIZES) * EACH
    title = f"Spearman's rank correlation of predicted and measured loss reduction, {count} random sets of {SIZES[0]} to {SIZES[-1]} layers"
    report("set_gain", title, ["set model", *heads.values()], rows, steps=settings.steps)


if __name__ == "__main__":
    main()
