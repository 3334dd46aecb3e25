"""What the committed trainings say of the constants of the race (`layercard/trials/race.py`).

- `LAYERS_SHIFT`: the ladders of `results/placements/rates/` (32 steps, 1 to 30 layers, three tasks). The best rate of each is the lowest
  point of a parabola through its best loss and the two beside it; regressed on the share of the layers, with a level for each task.
- `HEAT_NOISE`: the trainings of `results/placements/runs/` that were made with three seeds or more, of placements that keep at least 90 %
  of the best (others are not close in a race). Two of them trained on the same records from the same seed differ by so much of what
  training takes away; the standard deviation of that difference over seeds.
- `PASSES_SHIFT`: the best rate of all layers in those ladders (32 steps, one pass) and in those of `results/time_to_quality/` (several
  passes), with `SHIFT`, for which there is no ladder of one pass and another length, as it is.

    python benchmarks/race_constants.py
"""

import itertools
import json
import math
from collections import defaultdict
from typing import Any

import numpy as np

from common import RESULTS, report, rounded
from layercard.selection.learning_rate import LAYERS_SHIFT, PASSES_SHIFT, SHIFT, Length, usual_rate
from layercard.trials.race import HEAT_NOISE

GOOD = 0.9
"""Share of the best placement's mean gain above which a placement's noise counts."""
DEPTH, WIDTH = 30, 576
"""Layers and width of SmolLM2-135M, which all these trainings are of."""


def lowest(tried: list[tuple[float, float]]) -> float | None:
    """The learning rate of least loss on a ladder of rates and losses, between its rungs; `None` where it lies at an end.

    >>> lowest([(0.001, 2.0), (0.002, 1.0), (0.004, 2.0)])
    0.002
    """
    ladder = sorted(tried)
    best = min(range(len(ladder)), key=lambda rung: ladder[rung][1])
    if not 0 < best < len(ladder) - 1:
        return None
    rates, losses = zip(*ladder[best - 1 : best + 2], strict=True)
    bend, slope, _ = np.polyfit(np.log2(np.array(rates) / rates[1]), losses, 2)
    return float(rates[1] * 2 ** (-slope / (2 * bend)))


def short_ladders() -> list[tuple[str, int, float]]:
    """Task, number of layers and best rate of the ladders of 32 steps at rank 8."""
    found = []
    for path in sorted((RESULTS / "placements" / "rates").glob("*-r8-*-n32.json")):
        ladder = json.loads(path.read_text())
        best = lowest([(each["learning_rate"], each["loss"]) for each in ladder["tried"]])
        if best is not None:
            found.append((ladder["task"], len(ladder["layers"]), best))
    return found


def layers_shift(ladders: list[tuple[str, int, float]]) -> tuple[float, float]:
    """Minus the slope of log rate on log share of the layers, and its standard error; each task has a level of its own."""
    tasks = sorted({task for task, _, _ in ladders})
    design = np.array([[math.log(count / DEPTH), *(float(task == each) for each in tasks)] for task, count, _ in ladders])
    rates = np.log([rate for _, _, rate in ladders])
    solution, *_ = np.linalg.lstsq(design, rates, rcond=None)
    residuals = rates - design @ solution
    variance = residuals @ residuals / (len(rates) - design.shape[1])
    return -float(solution[0]), float(np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0]))


def heat_noise() -> tuple[float, float, float, int]:
    """The noise, the least and the most of one task, and how many pairs of placements it comes from."""
    gains: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for path in sorted((RESULTS / "placements" / "runs").glob("*-r8-*.json")):
        trial = json.loads(path.read_text())
        if trial["loss_reduction"] is not None:
            how = trial["settings"]
            key = f"{trial['layers']} {how['learning_rate']} {how['steps']}"
            gains[trial["task"], key][how["seed"]] = trial["loss_reduction"]["value"]
    means = {key: float(np.mean(list(by_seed.values()))) for key, by_seed in gains.items() if len(by_seed) >= 3}
    best = {task: max(mean for (other, _), mean in means.items() if other == task) for task, _ in means}
    good = [key for key, mean in means.items() if mean >= GOOD * best[key[0]]]
    by_task: dict[str, list[float]] = defaultdict(list)
    for one, other in itertools.combinations(good, 2):
        seeds = sorted(gains[one].keys() & gains[other].keys())
        if one[0] == other[0] and len(seeds) >= 3:
            pairs = np.array([(gains[one][seed], gains[other][seed]) for seed in seeds])
            by_task[one[0]].append(float(np.var(pairs[:, 0] - pairs[:, 1], ddof=1) / pairs.mean() ** 2))
    each = [math.sqrt(np.mean(values)) for values in by_task.values()]
    every = [value for values in by_task.values() for value in values]
    return math.sqrt(np.mean(every)), min(each), max(each), len(every)


def long_ladders() -> list[tuple[str, Length, float | None, list[float]]]:
    """Regime, its length, best rate and rates tried of all layers and modules, where at least three rates were tried in one trainer."""
    found = []
    for folder in sorted((RESULTS / "time_to_quality").glob("smollm2-135m-*")):
        for trainer in ("peft", "fast"):
            runs = [json.loads(path.read_text()) for path in folder.glob(f"{trainer}-*-s0.json")]
            tried = [(run["learning_rate"], run["loss"]) for run in runs]
            if len(tried) >= 3:
                name = folder.name.removeprefix("smollm2-135m-")
                length = Length(runs[0]["steps"], float(name.rpartition("x")[2]))
                found.append((name, length, lowest(tried), sorted(rate for rate, _ in tried)))
    return found


def main() -> None:
    """Fit, and print beside what is in use."""
    ladders = short_ladders()
    shift, error = layers_shift(ladders)
    noise, least, most, pairs = heat_noise()
    rows: list[list[Any]] = [
        ["LAYERS_SHIFT", LAYERS_SHIFT, rounded(shift, shift - 1.96 * error, shift + 1.96 * error), f"{len(ladders)} ladders of 32 steps"],
        ["HEAT_NOISE", HEAT_NOISE, f"{noise:.3f} [{least:.3f}, {most:.3f} by task]", f"{pairs} pairs of placements, 32 steps"],
    ]
    short = {task: rate for task, count, rate in ladders if count == DEPTH}
    for task, rate in short.items():
        rows.append([f"rate of all layers, {task}, 32 steps", usual_rate(WIDTH, Length(32)), f"{rate:.4f}", "a ladder of three rates"])
    for name, length, best, tried in long_ladders():
        said = "at an end of the ladder" if best is None else f"{best:.4f}"
        rows.append([f"rate of all layers, {name}", usual_rate(WIDTH, length), said, f"rates {', '.join(f'{rate:g}' for rate in tried)}"])
        task = name.split("-")[0]
        if best is not None and task in short and length.passes > 1:
            # What is left of the fall from the short ladder's rate once the length is taken account of.
            fall = math.log(short[task] / best) - SHIFT * math.log(length.steps / 32)
            rows.append(["PASSES_SHIFT", PASSES_SHIFT, f"{fall / math.log(length.passes):.2f}", f"{name} against 32 steps"])
    report("race_constants", "Constants of the race: in use, and fitted to trainings of SmolLM2-135M", COLUMNS, rows)


COLUMNS = ["constant", "in use", "fitted", "from"]


if __name__ == "__main__":
    main()
