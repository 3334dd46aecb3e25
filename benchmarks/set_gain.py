"""Which set model predicts how much a *set* of layers gains?

Trains LoRA in random sets of 1 to 10 layers (resumable, one JSON a run, as `layercard bench placements` makes them), and prints for
every set model Spearman's rank correlation of its value, from the card alone, with the measured loss reduction, mean over seeds. The
interval is a bootstrap over sets.

    python benchmarks/set_gain.py --tasks e2e gsm8k --seeds 0 1
"""

import argparse
import random

import numpy as np

from common import RESULTS, data_folder, report, rounded
from layercard.benchmark.choices import Chooser
from layercard.benchmark.placements import keep_settings, prepare
from layercard.benchmark.rates import RATE_COUNTS, find_rate, nearest_count
from layercard.benchmark.runs import BenchSettings, Item, run_file, run_items
from layercard.card import LayerCard
from layercard.errors import BenchmarkError
from layercard.files import read_json
from layercard.selection.models import SET_MODELS
from layercard.statistics.intervals import spearman

FOLDER = RESULTS / "placements"
SIZES = range(1, 11)
EACH = 2
"""Random sets of each size."""
REPEATS = 2000


def random_sets(depth: int) -> list[tuple[int, ...]]:
    """The sets that are trained: the same for every task."""
    draw = random.Random(2602)
    return [tuple(sorted(draw.sample(range(depth), size))) for size in SIZES for _ in range(EACH)]


def items(task: str, seed: int, depth: int, settings: BenchSettings) -> list[Item]:
    """The runs of a task and seed; a learning rate that is not known yet is searched."""
    found = []
    for layers in random_sets(depth):
        rate = find_rate(settings, str(FOLDER), task, nearest_count(len(layers), RATE_COUNTS), settings.rank)
        found.append(Item(task, layers, seed, settings.rank, rate))
    return found


def reductions(runs: list[Item]) -> np.ndarray:
    """Measured loss reduction of each run, nats per labelled token."""
    records = [read_json(run_file(FOLDER, item), BenchmarkError, "run") for item in runs]
    return np.array([record["train_info"]["metrics"]["loss_reduction"] for record in records])


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
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    settings = BenchSettings(options.model, data_folder())
    keep_settings(settings, FOLDER)
    columns: dict[str, dict[str, tuple[float, float, float]]] = {}
    for task in options.tasks:
        prepare(settings, str(FOLDER), task)
        card = Chooser(FOLDER, task, settings.rank).card
        runs = [items(task, seed, card.model.layers, settings) for seed in options.seeds]
        for group in runs:
            run_items(settings, str(FOLDER), group)
        measured = np.mean([reductions(group) for group in runs], axis=0)
        columns[task] = agreement(card, random_sets(card.model.layers), measured)
    rows = [[name, *(rounded(*columns[task][name]) for task in options.tasks)] for name in SET_MODELS]
    count = len(SIZES) * EACH
    title = f"Spearman's rank correlation of predicted and measured loss reduction, {count} random sets of {SIZES[0]} to {SIZES[-1]} layers"
    title += f", {len(options.seeds)} seed(s)"
    report("set_gain", title, ["set model", *options.tasks], rows, steps=settings.steps)


if __name__ == "__main__":
    main()
