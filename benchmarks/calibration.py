"""Which set model `select` uses, and from coverage to performance kept: judged on tasks that had no part in the choice.

Every run of a set of layers in `results/placements/` gives a point: the set, and the performance that it kept, in % of all layers with the
same seed. Tasks count alike.

1. *Set models.* Each task is left out in turn. What a model has to choose (the length of the depth kernel, how far coupling is drawn
   towards it) is chosen on the other tasks; on the one left out it is judged by Spearman's rank correlation with the measured mean of each
   set, and by the error of the level that a curve fitted to the other tasks predicts.
2. *The curve.* Isotonic regression through the points of all tasks for the model that `select` uses, thinned to a few knots.
3. *The interval.* Nominal 90 %. For each task a curve is fitted to the others; 5 % of the task's points may lie below the interval and
   5 % above. The widest of the tasks counts. As a check, all of that is done once more without each task, and applied to it.

    python benchmarks/calibration.py            print, and write the curve (`selection/calibration.json`)
    python benchmarks/calibration.py --check    print only
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.optimize import isotonic_regression

from common import RESULTS, report
from layercard.card.card import LayerCard
from layercard.files import write_json
from layercard.selection.select import LOWER_END, UPPER_END, coverage_of, layer_weights
from layercard.statistics.coverage import blended, coverage, shrunk
from layercard.statistics.ranks import spearman
from layercard.trials.trial import read_trials

FOLDER = RESULTS / "placements"
CURVE = Path(__file__).parents[1] / "src" / "layercard" / "selection" / "calibration.json"
TASKS = ("e2e", "webnlg", "gsm8k")
KNOTS = 10
RANK = 8
TAIL = 0.05
"""Share of the points that may lie below the interval, and above it."""
LENGTHS = (2, 3, 4, 6, 8, 12, 16)
"""Lengths of the depth kernel `exp(−|i − j| / length)` that are tried, in layers."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How far the coupling is drawn towards the depth kernel of `select`."""

SetModel = Callable[[LayerCard, LayerCard], Callable[[Sequence[int]], float]]
"""From the card of a task and the card of another one to what each set covers."""


def covering(similar: np.ndarray, weights: np.ndarray) -> Callable[[Sequence[int]], float]:
    """`Σ_j w_j max_{i ∈ S} C_ji`."""
    return lambda layers: coverage(similar, weights, list(layers))


def kernel(depth: int, length: float) -> np.ndarray:
    """`exp(−|i − j| / length)`."""
    index = np.arange(depth)
    return np.exp(-np.abs(index[:, None] - index) / length)


def by_depth(length: float) -> SetModel:
    """`Σ_j max_{i ∈ S} exp(−|i − j| / length)`: no card needed."""
    return lambda card, _: covering(kernel(card.model.layers, length), np.ones(card.model.layers))


def by_blend(share: float) -> SetModel:
    """Coverage with the coupling drawn by a share towards the depth kernel."""
    return lambda card, _: covering(blended(card.coupling, share), layer_weights(card))


def near_the_middle(card: LayerCard, _: LayerCard) -> Callable[[Sequence[int]], float]:
    """The sum over layers of how near they are to the middle of the depth."""
    depth = card.model.layers
    return lambda layers: float(sum(depth / 2 - abs(layer - (depth - 1) / 2) for layer in layers))


CANDIDATES: dict[str, list[tuple[str, SetModel]]] = {
    "coverage from the card": [("", by_blend(0.0))],
    "depth kernel": [(f"length {length}", by_depth(length)) for length in LENGTHS],
    "coverage drawn towards the depth kernel": [(f"share {share:g}", by_blend(share)) for share in SHARES],
    "coverage as `select` uses it": [("", lambda card, _: coverage_of(card))],
    "the same from another task's card": [("", lambda _, other: coverage_of(other))],
    "coupling by distance alone, equal weights": [("", lambda card, _: covering(shrunk(card.coupling, 1.0), np.ones(card.model.layers)))],
    "number of layers": [("", lambda card, _: lambda layers: float(len(layers)))],
    "nearness to the middle": [("", near_the_middle)],
}
"""Set models by name, each with what has to be chosen."""


@dataclass(frozen=True)
class Runs:
    """Trained placements of one task: its card, the sets, and by set the performance kept in % of all layers, one number a seed."""

    task: str
    card: LayerCard
    kept: dict[tuple[int, ...], list[float]]

    def points(self, cover: Callable[[Sequence[int]], float]) -> "Points":
        """Share of the coverage of all layers and performance kept of each run."""
        total = cover(range(self.card.model.layers))
        pairs = [(cover(layers) / total, kept) for layers, seeds in self.kept.items() for kept in seeds]
        share, kept = np.array(sorted(pairs)).T
        return Points(self.task, share, kept)

    def rank(self, cover: Callable[[Sequence[int]], float]) -> float:
        """Spearman of what sets cover with the mean of what they kept."""
        return spearman(np.array([cover(layers) for layers in self.kept]), np.array([np.mean(seeds) for seeds in self.kept.values()]))


@dataclass(frozen=True)
class Points:
    """Trained placements of one task: share of coverage and performance kept, % of all layers, `[n]` each."""

    task: str
    share: np.ndarray
    kept: np.ndarray


def searched(task: str) -> dict[int, float]:
    """The learning rate that was searched for each number of layers."""
    found = [json.loads(path.read_text()) for path in (FOLDER / "rates").glob(f"{task}-r{RANK}-*.json")]
    return {len(one["layers"]): one["learning_rate"] for one in found}


@cache
def runs_of(task: str) -> Runs:
    """The runs of a task that have all layers of the same seed to compare with.

    Of two runs of one set and seed the one counts that has the learning rate of its own number of layers.
    """
    card = LayerCard.load(FOLDER / "cards" / f"{task}.json")
    gains: dict[tuple[int, ...], dict[int, float]] = {}
    rates = searched(task)
    trials = [trial for trial in read_trials(FOLDER).values() if (trial.task, trial.split, trial.settings["rank"]) == (task, "test", RANK)]
    for trial in sorted(trials, key=lambda trial: trial.settings["learning_rate"] == rates.get(len(trial.layers))):
        assert trial.loss_reduction is not None
        gains.setdefault(trial.layers, {})[trial.settings["seed"]] = trial.loss_reduction.value
    whole = gains.pop(tuple(range(card.model.layers)), {})
    kept = {layers: [100 * gain / whole[seed] for seed, gain in seeds.items() if seed in whole] for layers, seeds in gains.items()}
    return Runs(task, card, {layers: seeds for layers, seeds in kept.items() if seeds})


def points_of(task: str) -> Points:
    """The points of a task with the coverage that `select` uses."""
    runs = runs_of(task)
    return runs.points(coverage_of(runs.card))


def fitted(tasks: list[Points]) -> np.ndarray:
    """Knots `[KNOTS + 2, 2]`: share of coverage and performance kept, from (0, 0) to (1, 100)."""
    share = np.concatenate([points.share for points in tasks])
    kept = np.concatenate([points.kept for points in tasks])
    weights = np.concatenate([np.full(len(points.share), 1 / len(points.share)) for points in tasks])
    order = np.argsort(share)
    share, kept, weights = share[order], kept[order], weights[order]
    smooth = isotonic_regression(kept, weights=weights).x
    parts = np.array_split(np.arange(len(share)), KNOTS)
    knots = [
        (float(np.average(share[part], weights=weights[part])), float(np.average(smooth[part], weights=weights[part]))) for part in parts
    ]
    return np.array([(0.0, 0.0), *((at, min(value, 100.0)) for at, value in knots), (1.0, 100.0)])


def errors(knots: np.ndarray, points: Points) -> np.ndarray:
    """Measured less predicted performance kept, points of per cent."""
    return points.kept - np.interp(points.share, knots[:, 0], knots[:, 1])


def relative_errors(knots: np.ndarray, points: Points) -> np.ndarray:
    """Errors in units of what is left from the prediction to `LOWER_END` where they are below 0, else to `UPPER_END`."""
    error = errors(knots, points)
    return error / (100 * np.where(error < 0, LOWER_END, UPPER_END) - points.kept + error)


def spreads(tasks: list[Points]) -> tuple[float, float]:
    """How far below and above the curve the interval must reach to hold the points of a task that had no part in it: the most of the
    tasks, each predicted from the others."""
    left_out = [relative_errors(fitted([other for other in tasks if other is not points]), points) for points in tasks]
    return max(-float(np.quantile(each, TAIL)) for each in left_out), max(float(np.quantile(each, 1 - TAIL)) for each in left_out)


def left_out_coverage(tasks: Sequence[str] = TASKS) -> dict[str, tuple[float, int, float]]:
    """For each task the share of its runs that the interval holds where neither curve nor interval has seen the task, their number, and the
    mean width in points."""
    points = [points_of(task) for task in tasks]
    found = {}
    for each in points:
        others = [other for other in points if other is not each]
        below, above = spreads(others)
        relative = relative_errors(fitted(others), each)
        predicted = each.kept - errors(fitted(others), each)
        width = below * (100 * LOWER_END - predicted) + above * (100 * UPPER_END - predicted)
        found[each.task] = (float(((relative >= -below) & (relative <= above)).mean()), len(each.kept), float(width.mean()))
    return found


def compared(tasks: Sequence[str]) -> list[list[object]]:
    """A row for each set model: for each task that is left out what was chosen on the others, its rank correlation and its error there."""
    runs = [runs_of(task) for task in tasks]
    rows: list[list[object]] = []
    for name, candidates in CANDIDATES.items():
        row: list[object] = [name]
        ranks, levels = [], []
        for number, left_out in enumerate(runs):
            others = [(each, runs[(place + 1) % len(runs)]) for place, each in enumerate(runs) if each is not left_out]
            choice, model = max(candidates, key=lambda each: np.mean([run.rank(each[1](run.card, other.card)) for run, other in others]))
            cover = model(left_out.card, runs[(number + 1) % len(runs)].card)
            curve = fitted([run.points(model(run.card, other.card)) for run, other in others])
            ranks.append(left_out.rank(cover))
            levels.append(float(np.sqrt(np.square(errors(curve, left_out.points(cover))).mean())))
            row.append(f"{ranks[-1]:.2f}, {levels[-1]:.1f}{f' ({choice})' if len(candidates) > 1 else ''}")
        rows.append([*row, f"{np.mean(ranks):.3f}", f"{np.mean(levels):.1f}"])
    return rows


def main() -> None:
    """Compare, fit, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    report(
        "set_models",
        "Set models on the task of the column, which had no part in choosing or fitting them: Spearman with what trained sets kept, and "
        "root mean square error of the predicted performance kept, in points",
        ["set model", *(f"{task}, {len(runs_of(task).kept)} sets" for task in options.tasks), "mean Spearman", "mean error"],
        compared(options.tasks),
    )
    points = [points_of(task) for task in options.tasks]
    knots, (below, above) = fitted(points), spreads(points)
    held = left_out_coverage(options.tasks)
    rows: list[list[object]] = []
    for each in points:
        inside, outside = errors(knots, each), errors(fitted([other for other in points if other is not each]), each)
        share, count, width = held[each.task]
        numbers = [f"{np.median(np.abs(e)):.1f}" for e in (inside, outside)]
        rows.append(
            [each.task, count, f"{spearman(each.share, each.kept):.2f}", *numbers, f"{outside.mean():+.1f}", f"{share:.2f}", f"{width:.0f}"]
        )
    columns = [
        "task",
        "runs",
        "Spearman",
        "error, points",
        "error without the task",
        "bias without the task",
        "held by 90 %, without the task",
        "width",
    ]
    report(
        "calibration",
        "Performance kept, predicted from coverage and measured; median absolute errors",
        columns,
        rows,
        below=below,
        above=above,
        runs={each.task: len(each.kept) for each in points},
    )
    if not options.check:
        about = (
            "Performance kept (% of the loss reduction of all layers) by share of coverage, and how far its 90 % interval reaches below "
            "and above, in units of what is left to 102 % and 110 %; fitted to trained placements of SmolLM2-135M on three tasks, widths "
            "from tasks left out"
        )
        value = {
            "about": about,
            "knots": [[round(float(x), 4) for x in knot] for knot in knots],
            "below": round(below, 3),
            "above": round(above, 3),
        }
        write_json(CURVE, value, force=True)
        print(f"wrote {CURVE.name}: {value}")


if __name__ == "__main__":
    main()
