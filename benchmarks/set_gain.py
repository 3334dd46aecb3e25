"""Which set model predicts how much a *set* of layers gains?

Trains LoRA in random sets of 1 to 10 layers (resumable, one JSON a run, as `layercard bench placements` makes them), and prints for
every set model Spearman's rank correlation of its value, from the card alone, with the measured loss reduction, mean over all seeds
whose runs are there. The interval is a bootstrap over sets. The last row says what a perfect model would reach against measurements as
noisy as these: with r the mean rank correlation between two of n seeds, `√(n r / (1 + (n − 1) r))` (Spearman and Brown).

Models that need no card, or the card of another task, stand beside those from the card. What `select` uses, and the length of the depth
kernel, are chosen in `calibration.py` on tasks that are left out in turn; nothing is fitted here.

    python benchmarks/set_gain.py --tasks gsm8k --seeds 0 1 2    train what is missing
    python benchmarks/set_gain.py                                the table of both tasks
"""

import argparse
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import combinations

import numpy as np

from calibration import by_depth, near_the_middle
from common import RESULTS, data_folder, report, rounded
from layercard.card.card import LayerCard
from layercard.selection.select import coverage_of, layer_weights, probe_measure, set_similarity
from layercard.settings import BenchSettings
from layercard.statistics.coverage import coverage, shrunk, similarity
from layercard.statistics.intervals import spearman
from layercard.trials.bench import Bench, Cell
from layercard.trials.storage import Storage
from layercard.trials.tasks import load_task
from layercard.trials.trial import Trial, read_trial, run_trials

STORAGE = Storage.at(RESULTS / "placements")
SIZES = range(1, 11)
EACH = 2
"""Random sets of each size."""
REPEATS = 2000
SEEDS = 16
"""Seeds that are looked for."""
RIDGE = 0.05
"""Added to the diagonal of ρ, so that layers that are nearly alike do not blow up the inverse."""

SetGain = Callable[[Sequence[int]], float]


def covering(card: LayerCard, similar: np.ndarray, weighted: bool = True) -> SetGain:
    """`Σ_j w_j max_{i ∈ S} C_ji` with another similarity than `select` uses, and with `w = √s` smoothed over depth or 1."""
    weights = layer_weights(card) if weighted else np.ones(card.model.layers)
    return lambda layers: coverage(similar, weights, list(layers))


def quadratic(matrix: np.ndarray, vector: np.ndarray) -> SetGain:
    """`½ v_Sᵀ M_SS⁻¹ v_S`: the decrease in a local quadratic model."""

    def gain(layers: Sequence[int]) -> float:
        part = vector[list(layers)]
        return float(0.5 * part @ np.linalg.lstsq(matrix[np.ix_(list(layers), list(layers))], part, rcond=None)[0])

    return gain


def probe_quadratic(card: LayerCard) -> SetGain:
    """`quadratic` of `ρ + 0.05 I` and `√(2 s)`: what measured gains of single layers leave when they overlap as ρ says."""
    gains = np.clip(card.values(probe_measure(card)), 0.0, None)
    return quadratic(np.asarray(card.coupling) + RIDGE * np.eye(card.model.layers), np.sqrt(2 * gains))


def curved(card: LayerCard) -> SetGain:
    """`quadratic` of the card's curvature K and descent b."""
    scale = np.sqrt(np.clip(card.curvature, 0.0, None))
    return quadratic(np.asarray(card.coupling) * np.outer(scale, scale), np.asarray(card.descent, dtype=float))


def additive(card: LayerCard, measure: str) -> SetGain:
    """The sum of a measure of single layers."""
    gains = np.asarray(card.values(measure))
    return lambda layers: float(gains[list(layers)].sum())


SET_MODELS: dict[str, Callable[[LayerCard], SetGain]] = {
    "coverage": coverage_of,
    "coverage, coupling as measured": lambda card: covering(card, similarity(card.coupling)),
    "coverage, squared coupling": lambda card: covering(card, set_similarity(card) ** 2),
    "coverage, equal weights": lambda card: covering(card, set_similarity(card), weighted=False),
    "coverage, equal weights, squared coupling": lambda card: covering(card, set_similarity(card) ** 2, weighted=False),
    "coverage without the depth kernel": lambda card: covering(card, shrunk(card.coupling)),
    "depth kernel, length 6": lambda card: by_depth(6)(card, card),
    "number of layers": lambda card: lambda layers: float(len(layers)),
    "nearness to the middle": lambda card: near_the_middle(card, card),
    "quadratic from step probes": probe_quadratic,
    "quadratic": curved,
    "sum of step probes": lambda card: additive(card, probe_measure(card)),
    "sum of quadratic gains": lambda card: additive(card, "predicted_gain"),
}
"""What a card says a set of layers will gain, in several ways by name; `select` uses the first."""
OTHER = "coverage from another task's card"


def random_sets(depth: int) -> list[tuple[int, ...]]:
    """The sets that are trained: the same for every task."""
    draw = random.Random(2602)
    return [tuple(sorted(draw.sample(range(depth), size))) for size in SIZES for _ in range(EACH)]


def trials_of(bench: Bench, task: str, seed: int, depth: int) -> list[Trial]:
    """The trials of a task and seed; the learning rate of each number of layers is searched where it is not known yet."""
    trials = []
    for layers in random_sets(depth):
        bench.find_rate(task, len(layers), bench.settings.rank)
        trials.append(bench.trial(Cell(task, "all", len(layers), None, seed, layers, bench.settings.rank)))
    return trials


def reductions(trials: list[Trial]) -> np.ndarray:
    """Measured loss reduction of each trial, nats per labelled token."""
    records = [read_trial(STORAGE, trial.file) for trial in trials]
    return np.array([record.loss_reduction.value for record in records if record.loss_reduction])


def complete(bench: Bench, task: str, depth: int, seeds: Iterable[int]) -> dict[int, list[Trial]]:
    """By seed the trials of those seeds that were made on all sets."""
    trials = {seed: trials_of(bench, task, seed, depth) for seed in seeds}
    return {seed: group for seed, group in trials.items() if all(STORAGE.exists(trial.file) for trial in group)}


def attainable(measured: np.ndarray) -> float | None:
    """What a perfect model would reach; `measured` is `[seeds, sets]`."""
    count = len(measured)
    if count == 1:
        return None
    between = np.mean([spearman(one, other) for one, other in combinations(measured, 2)])
    return float(np.sqrt(count * between / (1 + (count - 1) * between)))


def agreement(
    card: LayerCard, other: LayerCard, sets: list[tuple[int, ...]], measured: np.ndarray
) -> dict[str, tuple[float, float, float]]:
    """For every set model its rank correlation with the measured reductions, and the interval; `other` is another task's card."""
    found = {}
    draw = np.random.default_rng(0)
    rows = [draw.integers(len(sets), size=len(sets)) for _ in range(REPEATS)]
    for name, value in {**{name: make(card) for name, make in SET_MODELS.items()}, OTHER: coverage_of(other)}.items():
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
    bench = Bench(BenchSettings(options.model, data_folder()), STORAGE)
    bench.keep_settings()
    columns: dict[str, dict[str, tuple[float, float, float]]] = {}
    heads: dict[str, str] = {}
    best: dict[str, float | None] = {}
    for task in options.tasks:
        bench.prepare(task)
        card = bench.card(task)
        depth = card.model.layers
        for seed in options.seeds:
            run_trials(trials_of(bench, task, seed, depth), partial(load_task, bench.settings, task), STORAGE)
        trained = complete(bench, task, depth, range(SEEDS))
        measured = np.array([reductions(group) for group in trained.values()])
        heads[task], best[task] = f"{task}, {len(trained)} seed(s)", attainable(measured)
        other = bench.card(next(each for each in [*options.tasks, "e2e", "gsm8k"] if each != task))
        columns[task] = agreement(card, other, random_sets(depth), measured.mean(axis=0))
    rows: list[list[object]] = [[name, *(rounded(*columns[task][name]) for task in options.tasks)] for name in [*SET_MODELS, OTHER]]
    rows.append(["a perfect model, with this noise", *("–" if (value := best[task]) is None else f"{value:.2f}" for task in options.tasks)])
    count = len(SIZES) * EACH
    title = f"Spearman's rank correlation of predicted and measured loss reduction, {count} random sets of {SIZES[0]} to {SIZES[-1]} layers"
    report("set_gain", title, ["set model", *heads.values()], rows, steps=bench.settings.steps)


if __name__ == "__main__":
    main()
