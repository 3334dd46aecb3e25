"""How good is the rule for the learning rate (`layercard.selection.learning_rate`), against the best of a ladder of rates?

A ladder is three rates or more with everything else equal, among the trials in `results/*/runs/`, measured on validation records. Its
best rate is the lowest point of a parabola through the best and its neighbours (loss against the logarithm of the rate); a ladder whose
best is at an edge is left out of the fit and counts with that edge. The loss at the rule's rate is read off the same parabola. *Refitted*
is the rule with base and shifts fitted to the ladders of the other tasks only. All ladders are of one model so far: how the rate falls
with the width is not tested here.

    python benchmarks/learning_rate.py
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common import RESULTS, report
from layercard.selection.learning_rate import RANK, Length, moved, usual_rate

WIDTHS = {"smollm2-135m": 576}
FACTOR, EXCESS = 2.0, 0.02
"""A rate within this factor of the best, and a loss within this share of the lowest, count as hit."""
COLUMNS = ["rule", "left out", "ladders", "steps", "rate within 2x %", "loss within 2 % %", "median factor", "worst loss %"]
Rule = Callable[["Ladder"], float]


@dataclass(frozen=True)
class Ladder:
    """Losses by rate, with everything else equal."""

    task: str
    model: str
    share: float
    rank: int
    steps: int
    losses: dict[float, float]

    @property
    def rates(self) -> list[float]:
        """From the lowest up."""
        return sorted(self.losses)

    @property
    def best(self) -> float:
        """The rate of the lowest loss that was measured."""
        return min(self.losses, key=lambda rate: self.losses[rate])

    @property
    def inside(self) -> bool:
        """Whether there is a higher loss on both sides of the best."""
        return self.best not in (self.rates[0], self.rates[-1])

    def parabola(self, rate: float) -> np.ndarray:
        """Coefficients of the loss against log2 of the rate, through the three measured rates nearest to `rate`."""
        nearest = sorted(self.rates, key=lambda each: abs(math.log(each / rate)))[:3]
        return np.polyfit([math.log2(each) for each in nearest], [self.losses[each] for each in nearest], 2)

    @property
    def optimum(self) -> float:
        """The best rate, between those that were measured."""
        if not self.inside:
            return self.best
        square, linear, _ = self.parabola(self.best)
        return float(2 ** (-linear / (2 * square)))

    def loss_at(self, rate: float) -> float:
        """The loss at a rate, by the parabola through the three nearest."""
        return float(np.polyval(self.parabola(rate), math.log2(rate)))

    @property
    def lowest(self) -> float:
        """The loss at the optimum."""
        return min(self.loss_at(self.optimum), min(self.losses.values()))


def ladders() -> list[Ladder]:
    """All ladders in the result folders."""
    groups: dict[tuple[Any, ...], dict[float, float]] = defaultdict(dict)
    for path in sorted(RESULTS.glob("*/runs/*.json")):
        run = json.loads(path.read_text())
        if run.get("schema") != "layercard-trial/1" or run["split"] != "valid" or run["settings"].get("steps") is None:
            continue
        how = run["settings"]
        key = (run["task"], run["model"]["name"], tuple(run["layers"]), run["model"]["layers"], run.get("modules", "all"))
        key += (how["rank"], how["steps"], how["batch_size"], how["seed"], run["valid"].get("records"))
        groups[key][how["learning_rate"]] = math.inf if run["loss_after"] is None else run["loss_after"]
    found = []
    for (task, model, layers, depth, _, rank, steps, *_), losses in groups.items():
        finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
        if len(finite) >= 3:
            found.append(Ladder(task, model, len(layers) / depth, rank, steps, finite))
    return found


def shipped(ladder: Ladder) -> float:
    """The rule as it is in the package."""
    return usual_rate(WIDTHS[ladder.model], Length(ladder.steps), ladder.share, ladder.rank)


def fitted(known: Sequence[Ladder]) -> tuple[Rule, dict[str, float]]:
    """The rule with base, shift of layers and, where ranks differ, shift of rank fitted to some ladders by least squares."""
    inside = [ladder for ladder in known if ladder.inside]
    ranks = len({ladder.rank for ladder in inside}) > 1
    target = [math.log(ladder.optimum * WIDTHS[ladder.model] / moved(1.0, Length(500), Length(ladder.steps))) for ladder in inside]
    rows = [[1.0, -math.log(ladder.share), *([-math.log(ladder.rank / RANK)] if ranks else [])] for ladder in inside]
    base, layers, *rank = (float(value) for value in np.linalg.lstsq(np.array(rows), np.array(target), rcond=None)[0])
    rank_shift = rank[0] if rank else 0.5

    def rule(ladder: Ladder) -> float:
        rate = moved(math.exp(base) / WIDTHS[ladder.model], Length(500), Length(ladder.steps))
        return rate * ladder.share**-layers * float(ladder.rank / RANK) ** -rank_shift

    return rule, {"base": math.exp(base), "layers_shift": layers, "rank_shift": rank_shift, "ladders": len(inside)}


def row(name: str, left_out: str, judged: Sequence[Ladder], rule: Rule) -> list[Any]:
    """How often a rule hits, and how far it is off."""
    factors = [max(rule(each) / each.optimum, each.optimum / rule(each)) for each in judged]
    excess = [each.loss_at(rule(each)) / each.lowest - 1 for each in judged]
    steps = sorted({each.steps for each in judged})
    return [
        name,
        left_out,
        len(judged),
        " ".join(map(str, steps)),
        100 * sum(factor <= FACTOR for factor in factors) / len(judged),
        100 * sum(loss <= EXCESS for loss in excess) / len(judged),
        float(np.median(factors)),
        100 * max(excess),
    ]


def main() -> None:
    """Judge the rule, the refitted one task by task, and fixed rates."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    known = ladders()
    tasks = sorted({ladder.task for ladder in known})
    table, fits = [], {}
    for task in tasks:
        rule, fits[task] = fitted([ladder for ladder in known if ladder.task != task])
        table.append(row("refitted", task, [ladder for ladder in known if ladder.task == task], rule))
    table.append(row("as shipped", "none", known, shipped))
    _, fits["all"] = fitted(known)
    table += [row(f"{rate:g} always", "none", known, lambda _, rate=rate: rate) for rate in (0.001, 0.002, 0.004, 0.008)]
    title = (
        f"Learning rates: the rule against the best of {len(known)} ladders (SmolLM2-135M, one seed each, validation records); refitted to "
        f"all of them: base {fits['all']['base']:.2f}, layers {fits['all']['layers_shift']:.2f}, rank {fits['all']['rank_shift']:.2f}"
    )
    report("learning_rate", title, COLUMNS, table, fits=fits)


if __name__ == "__main__":
    main()
