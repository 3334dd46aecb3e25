"""From coverage to performance kept: fit the curve that `select` uses to the trained placements in `results/placements/`.

Every run of a set of layers gives a point: its share of the coverage, from the task's card, and the performance that it kept, in % of
all layers with the same seed. Tasks count alike. The curve is the isotonic regression through these points, thinned to a few knots
(`selection/calibration.json`); its interval, wider where less is kept, holds 95 % of the points. As a check, the curve is fitted without
one task and predicts it.

    python benchmarks/calibration.py            print, and write the curve
    python benchmarks/calibration.py --check    print only
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import isotonic_regression

from common import RESULTS, report
from layercard.card.card import LayerCard
from layercard.files import write_json
from layercard.selection.select import CEILING, coverage_of
from layercard.statistics.ranks import spearman
from layercard.trials.trial import read_trials

FOLDER = RESULTS / "placements"
CURVE = Path(__file__).parents[1] / "src" / "layercard" / "selection" / "calibration.json"
KNOTS = 10
RANK = 8


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


def points_of(task: str) -> Points:
    """The points of a task, from its card and the runs that have all layers of the same seed to compare with.

    Of two runs of one set and seed the one counts that has the learning rate of its own number of layers.
    """
    card = LayerCard.load(FOLDER / "cards" / f"{task}.json")
    coverage, depth = coverage_of(card), card.model.layers
    gains: dict[tuple[int, ...], dict[int, float]] = {}
    rates = searched(task)
    trials = [trial for trial in read_trials(FOLDER).values() if (trial.task, trial.split, trial.settings["rank"]) == (task, "test", RANK)]
    for trial in sorted(trials, key=lambda trial: trial.settings["learning_rate"] == rates.get(len(trial.layers))):
        assert trial.loss_reduction is not None
        gains.setdefault(trial.layers, {})[trial.settings["seed"]] = trial.loss_reduction.value
    whole = gains.pop(tuple(range(depth)), {})
    total = coverage(range(depth))
    pairs = [
        (coverage(layers) / total, 100 * reduction / whole[seed])
        for layers, seeds in gains.items()
        for seed, reduction in seeds.items()
        if seed in whole
    ]
    share, kept = np.array(sorted(pairs)).T
    return Points(task, share, kept)


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


def main() -> None:
    """Fit, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["e2e", "webnlg", "gsm8k"])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    tasks = [points_of(task) for task in options.tasks]
    knots = fitted(tasks)
    rows: list[list[object]] = []
    for points in tasks:
        inside, outside = errors(knots, points), errors(fitted([other for other in tasks if other is not points]), points)
        rank = f"{spearman(points.share, points.kept):.2f}"
        rows.append(
            [points.task, len(points.share), rank, *(f"{np.median(np.abs(e)):.1f}" for e in (inside, outside)), f"{outside.mean():+.1f}"]
        )
    relative = [np.abs(errors(knots, points)) / (100 * CEILING - points.kept + errors(knots, points)) for points in tasks]
    spread = float(np.quantile(np.concatenate(relative), 0.95))
    columns = ["task", "placements", "Spearman", "error, points", "error without the task", "bias without the task"]
    report("calibration", "Performance kept, predicted from coverage and measured; median absolute errors", columns, rows, spread=spread)
    if not options.check:
        about = "Performance kept (% of the loss reduction of all layers) by share of coverage, and the spread of its 95 % interval"
        value = {"about": about, "knots": [[round(float(x), 4) for x in knot] for knot in knots], "spread": round(spread, 3)}
        write_json(CURVE, value, force=True)
        print(f"wrote {CURVE.name}: {value['knots']}, spread {spread:.3f}")


if __name__ == "__main__":
    main()
