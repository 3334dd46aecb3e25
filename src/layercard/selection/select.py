"""From coverage to performance kept: a monotone curve fitted to trained sets of layers, with an interval.

Performance kept is the loss reduction of a placement as a share of the reduction of all layers; coverage enters as a share of what all
layers cover. The knots lie in `calibration.json`, in per cent of performance; between them the curve is straight.

Set models: what a card says a set of layers will gain. Coverage is what `select` uses; the others stand beside it for comparison.

Each takes a card and gives a function of a set of layers, whose order is what counts. Notation as in `docs/maths.md`: s step probe,
ρ coupling, b descent, K curvature.

The three objectives as problems for the solver, and what to say where nothing meets them.

From a Layer Card to a placement.
"""

import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from layercard.card.card import LayerCard, cost_of
from layercard.card.numbers import listed
from layercard.cost.model import CostModel, Linear
from layercard.errors import SelectionError
from layercard.selection.budgets import Budgets, amount, kind, label, option
from layercard.selection.placement import Placement, check_layers
from layercard.selection.solver import SECONDS, Problem, Solution, least_cost, most_coverage, resolution
from layercard.selection.strategies import check_k, shared_ranks, strategy_layers
from layercard.statistics.coverage import coverage, covered_by, demand, shrunk, similarity

# ---- selection.calibration

CEILING = 1.05
"""Performance at which the interval would close: a little over that of all layers, which some placements surpass."""


@cache
def _curve() -> tuple[np.ndarray, np.ndarray, float]:
    found = json.loads(Path(__file__).with_name("calibration.json").read_text(encoding="utf-8"))
    knots = np.array(found["knots"], dtype=float)
    return knots[:, 0], np.maximum.accumulate(knots[:, 1]) / 100, float(found["spread"])


def performance_kept(share: float) -> tuple[float, float, float]:
    """Value, low and high of the performance kept, from 0 to 1, for a share of the coverage of all layers.

    >>> performance_kept(1.0)[0], performance_kept(0.0)[0]
    (1.0, 0.0)
    """
    shares, kept, spread = _curve()
    value = float(np.interp(share, shares, kept))
    half = spread * (CEILING - value)
    return value, max(0.0, value - half) if share < 1 else value, min(max(1.0, value), value + half)


def coverage_share(kept: float) -> float:
    """The least share of coverage whose performance kept is `kept`, from 0 to 1; the inverse of `performance_kept`.

    >>> round(performance_kept(coverage_share(0.95))[0], 9)
    0.95
    """
    shares, values, _ = _curve()
    if kept >= values[-1]:
        return float(shares[int(np.argmax(values >= values[-1]))]) if kept == values[-1] else float("inf")
    at = int(np.searchsorted(values, kept, side="left"))
    if at == 0:
        return float(shares[0])
    low, high = values[at - 1], values[at]
    return float(shares[at - 1] + (kept - low) / (high - low) * (shares[at] - shares[at - 1]))


# ---- selection.models

SetGain = Callable[[Sequence[int]], float]
RIDGE = 0.05
"""Added to the diagonal of ρ, so that layers that are nearly alike do not blow up the inverse."""


def probe_measure(card: LayerCard) -> str:
    """Name of the measure that `probe_of` gives."""
    return "step_probe" if card.layers[0].step_probe is not None else "predicted_gain"


def probe_of(card: LayerCard) -> list[float]:
    """The gain of each layer's own step: the step probe or, where it was not run, the quadratic model's."""
    return card.values(probe_measure(card))


def layer_weights(card: LayerCard) -> np.ndarray:
    """Weight `w_j` of each layer in the coverage, from `probe_of`."""
    return demand(probe_of(card))


def set_similarity(card: LayerCard) -> np.ndarray:
    """How far layer i stands in for layer j, `[L, L]`: the coupling with its noise reduced (`shrunk`)."""
    return shrunk(similarity(card.coupling))


def coverage_of(card: LayerCard, power: float = 1.0, weighted: bool = True, noisy: bool = False) -> SetGain:
    """`Σ_j w_j max_{i ∈ S} C_ji^p`, with `w = √s` smoothed over depth or 1, and `C = set_similarity` or, if `noisy`, `|ρ|` itself."""
    similar = (similarity(card.coupling) if noisy else set_similarity(card)) ** power
    weights = layer_weights(card) if weighted else np.ones(card.model.layers)
    return lambda layers: coverage(similar, weights, list(layers))


def probe_quadratic(card: LayerCard) -> SetGain:
    """`½ u_Sᵀ (ρ_SS + 0.05 I)⁻¹ u_S` with `u = √(2 s)`: what measured gains of single layers leave when they overlap as ρ says."""
    rho = np.asarray(card.coupling, dtype=float) + RIDGE * np.eye(card.model.layers)
    u = np.sqrt(2 * np.clip(probe_of(card), 0.0, None))
    return lambda layers: _quadratic(rho, u, list(layers))


def quadratic(card: LayerCard) -> SetGain:
    """`½ b_Sᵀ K_SS⁻¹ b_S`: the decrease in the local quadratic model."""
    scale = np.sqrt(np.clip(card.curvature, 0.0, None))
    curvature = np.asarray(card.coupling, dtype=float) * np.outer(scale, scale)
    b = np.asarray(card.descent, dtype=float)
    return lambda layers: _quadratic(curvature, b, list(layers))


def additive(card: LayerCard, measure: str | None = None) -> SetGain:
    """The sum of a measure of single layers; of the step probe unless told."""
    gains = np.asarray(probe_of(card) if measure is None else card.values(measure))
    return lambda layers: float(gains[list(layers)].sum())


def _quadratic(matrix: np.ndarray, vector: np.ndarray, layers: list[int]) -> float:
    part = vector[layers]
    return float(0.5 * part @ np.linalg.lstsq(matrix[np.ix_(layers, layers)], part, rcond=None)[0])


SET_MODELS: dict[str, Callable[[LayerCard], SetGain]] = {
    "coverage": coverage_of,
    "coverage, coupling as measured": lambda card: coverage_of(card, noisy=True),
    "coverage, squared coupling": lambda card: coverage_of(card, power=2.0),
    "coverage, equal weights": lambda card: coverage_of(card, weighted=False),
    "coverage, equal weights, squared coupling": lambda card: coverage_of(card, power=2.0, weighted=False),
    "quadratic from step probes": probe_quadratic,
    "quadratic": quadratic,
    "sum of step probes": additive,
    "sum of quadratic gains": lambda card: additive(card, "predicted_gain"),
}
"""Set models by name."""


# ---- selection.objectives

LAYERS = 5
"""Number of layers where neither a number nor a budget says how many."""
KEPT = 0.95
"""Performance that `balanced` keeps unless told."""


@dataclass(frozen=True)
class Question:
    """What is asked of a card.

    Attributes:
        objective: `performance`, `cost` or `balanced`.
        problem: The number of layers, the budgets and the least coverage.
        cost: The card's cost model.
        time: Step time as a linear form.
        whole: Coverage of all layers.
        kept: The performance asked for, from 0 to 1; `None` without.
        insists: Whether the user asked for that performance, or it is the default of `balanced`.
    """

    objective: str
    problem: Problem
    cost: CostModel
    time: Linear
    whole: float
    kept: float | None
    insists: bool

    def performance(self, coverage: float) -> float:
        """Performance kept in per cent."""
        return 100 * performance_kept(coverage / self.whole)[0]


def question(card: LayerCard, objective: str, k: int | None, budgets: Budgets) -> Question:
    """The problem behind an objective.

    Raises:
        SelectionError: k is outside 1 to the number of layers, or a budget cannot be read.
    """
    depth, cost = card.model.layers, cost_of(card)
    insists = budgets.min_performance is not None
    kept = budgets.kept() if insists else KEPT if objective == "balanced" else None
    limits = budgets.resolve(cost)
    if k is None and (objective == "cost" or (objective == "performance" and not limits)) and not (objective == "cost" and insists):
        k = min(LAYERS, depth)
    if k is not None:
        check_k(k, depth)
    similar, weights = set_similarity(card), layer_weights(card)
    problem = Problem(similar, weights, 1 if k is None else k, k, limits)
    whole = problem.coverage(range(depth))
    needed = 0.0 if kept is None else coverage_share(kept) * whole
    return Question(objective, replace(problem, needed=needed), cost, cost.linear("time"), whole, kept, insists)


def answer(asked: Question, seconds: float = SECONDS) -> tuple[Solution, str | None]:
    """The best placement, and a remark where it is not quite what was asked for.

    Args:
        asked: What is asked.
        seconds: Time limit of each search; the solution says whether it was reached, and its gap.

    Raises:
        SelectionError: Nothing meets the budgets; the message names what comes nearest.
    """
    if asked.objective == "performance":
        return _best(asked, seconds), None
    found = least_cost(asked.problem, asked.time, seconds=seconds)
    if found is not None:
        return found, None
    best = most_coverage(asked.problem, seconds=seconds)
    if best is not None and not asked.insists and not asked.problem.budgets:
        share = 0.01 * round(100 * KEPT)
        nearest = least_cost(replace(asked.problem, needed=share * best.value), asked.time, seconds=seconds)
        if nearest is not None:
            count = asked.problem.least
            return nearest, (
                f"{count} {'layer keeps' if count == 1 else 'layers keep'} {asked.performance(best.value):.0f}% at most, less than "
                f"{100 * KEPT:g}%; chosen is the cheapest placement with {100 * share:g}% of the best coverage of {count}"
            )
    raise SelectionError(_why_not(asked, best, seconds))


def _best(asked: Question, seconds: float) -> Solution:
    """The largest coverage and, of all that reach it, the cheapest."""
    best = most_coverage(asked.problem, seconds=seconds)
    if best is None or best.value < asked.problem.needed * (1 - 1e-9):
        raise SelectionError(_why_not(asked, best, seconds))
    tolerance = min(resolution(asked.problem.num_layers), 1e-4)
    level = max(best.value * (1 - tolerance), asked.problem.needed)
    cheaper = least_cost(replace(asked.problem, needed=level), asked.time, seconds=min(0.5, seconds))
    if cheaper is None or cheaper.cost is None or cheaper.cost >= asked.time.of(best.layers) * (1 - 1e-9):
        return best
    highest = best.value * (1 + best.gap)
    return replace(cheaper, status=best.status, gap=max(0.0, highest / cheaper.value - 1), cost=None)


def _why_not(asked: Question, best: Solution | None, seconds: float) -> str:
    """Why nothing meets the budgets, with the nearest that does."""
    problem = asked.problem
    count = "" if problem.most is None else f" of {problem.most} layer{'s' if problem.most != 1 else ''}"
    limits = " and ".join(f"{option(b.name)} {amount(kind(b.name), b.limit, asked.cost)}" for b in problem.budgets)
    if best is None:
        return f"no placement{count} keeps {limits}; {_nearest(asked, replace(problem, needed=0.0), seconds) or 'allow more'}"
    wanted = f"{100 * (asked.kept or 0):g}% of the performance of all layers"
    within = f" within {limits}" if limits else ""
    ways = [f"the best keeps {asked.performance(best.value):.1f}% (layers {listed(best.layers)})"]
    if nearest := _nearest(asked, problem, seconds):
        ways.append(nearest)
    elif problem.most is not None and problem.most < problem.num_layers:
        free = least_cost(replace(problem, least=1, most=None), asked.time, seconds=seconds)
        if free is not None:
            ways.append(f"{len(free.layers)} layers would reach it")
    return f"no placement{count}{within} keeps {wanted}; {'; '.join(ways)}; lower --min-performance or allow more"


def _nearest(asked: Question, problem: Problem, seconds: float) -> str | None:
    """The least excess over one budget with which all the rest is met, in words."""
    found: list[tuple[float, str]] = []
    for budget in problem.budgets:
        others = tuple(other for other in problem.budgets if other is not budget)
        cheapest = least_cost(replace(problem, budgets=others), budget.form, seconds=seconds)
        if cheapest is not None and cheapest.cost is not None:
            words = f"the least {label(budget.name)} that would do is {amount(kind(budget.name), cheapest.cost, asked.cost)}"
            found.append((cheapest.cost / budget.limit, f"{words}, with layers {listed(cheapest.layers)}"))
    return min(found)[1] if found else None


# ---- selection.select

OBJECTIVES = ("performance", "cost", "balanced")
WHY = {
    "performance": "best coverage",
    "cost": "cheapest to train",
    "balanced": "cheapest placement that keeps the wanted performance",
    "given": "named by hand",
}
"""What each objective takes a layer for."""
BASELINES = ("last", "middle", "uniform")
"""Plain placements that a choice is compared with."""


def select(
    card: LayerCard,
    *,
    k: int | None = None,
    objective: str = "balanced",
    strategy: str | None = None,
    budgets: Budgets | None = None,
    seed: int = 0,
    seconds: float = SECONDS,
) -> Placement:
    """Choose layers.

    Args:
        card: The Layer Card.
        k: How many layers. When not given: as many as the budgets and the objective make best, and 5 where nothing else decides
            (`performance` without budgets, `cost`, and a strategy).
        objective: `performance`: the best predicted performance within the budgets. `cost`: the least step time. `balanced`: the least
            step time among the placements whose predicted performance kept reaches `budgets.min_performance`, 95 % unless given; where k is
            given and cannot reach these 95 %, those that reach 95 % of the coverage of the best k.
        strategy: A plain placement instead (`strategy_layers`); objective and budgets are not used then.
        budgets: Limits on step time, memory, adapter weights and latency, and the least performance.
        seed: Of the random strategy.
        seconds: Time limit of each search; where it is reached, the solver's status says so, with the gap to the proven bound.

    Returns:
        The placement. `predicted` has `performance_kept` (value, low, high; 1 is all layers), `step_time`, `peak_memory`, `parameters`
        and `latency` with their `share` of all layers (times in seconds only where the card's cost is measured), the `solver`'s status
        and gap, and `baseline`: a plain placement that is as good within the interval and not dearer, if there is one.

    Raises:
        SelectionError: Unknown objective or strategy, k outside 1 to the number of layers, a budget that cannot be read, or budgets that
            no placement meets; the message names what comes nearest.
    """
    depth = card.model.layers
    if strategy is not None:
        layers = strategy_layers(strategy, depth, min(LAYERS, depth) if k is None else k, seed)
        return _placement(card, layers, strategy, {}, {"k": k, **({"seed": seed} if strategy == "random" else {})})
    if objective not in OBJECTIVES:
        near = difflib.get_close_matches(objective, OBJECTIVES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(OBJECTIVES)}"
        raise SelectionError(f"objective {objective!r} is unknown; {hint}")
    budgets = budgets or Budgets()
    solution, remark = answer(question(card, objective, k, budgets), seconds)
    gap = None if solution.gap is None else float(f"{solution.gap:.3g}")
    notes: dict[str, Any] = {"solver": {"status": solution.status, "gap": gap}}
    if remark is not None:
        notes["remark"] = remark
    placement = _placement(card, solution.layers, objective, notes, {"k": k, **budgets.given()})
    return replace(placement, predicted={**placement.predicted, "baseline": as_good(card, placement)})


def given(card: LayerCard, layers: Iterable[Any]) -> Placement:
    """The placement of the layers that are named, with what the card predicts of them.

    Raises:
        PlacementError: Empty, repeated, or not in the model.
    """
    return _placement(card, check_layers(layers, card.model.layers), "given", {}, {})


def predict(card: LayerCard, layers: Sequence[int]) -> dict[str, Any]:
    """What the card says of a set of layers: performance kept, step time, memory, parameters and latency, each with its share of all."""
    depth, gain, cost = card.model.layers, coverage_of(card), cost_of(card)
    share = gain(layers) / gain(range(depth))
    kept, low, high = performance_kept(share)
    return {
        "coverage": share,
        "layers_in_backward": f"{depth - min(layers)}/{depth}",
        "performance_kept": {"value": kept, "low": low, "high": high},
        **_costs(cost, layers),
    }


def as_good(card: LayerCard, placement: Placement) -> dict[str, Any] | None:
    """A plain placement of as many layers that is as good within the interval and not dearer; the best such, or `None`.

    A placement that is one of them itself has none to be compared with.
    """
    chosen, found = placement.predicted, []
    for name in BASELINES:
        layers = strategy_layers(name, card.model.layers, len(placement.layers))
        if tuple(layers) == placement.layers:
            return None
        plain = predict(card, layers)
        as_performing = plain["performance_kept"]["value"] >= chosen["performance_kept"]["low"]
        if as_performing and plain["step_time"]["share"] <= chosen["step_time"]["share"] * (1 + 1e-9):
            found.append((plain["performance_kept"]["value"], -plain["step_time"]["share"], name, layers, plain))
    if not found:
        return None
    kept, _, name, layers, plain = max(found, key=lambda entry: entry[:2])
    time = plain["step_time"]["share"]
    note = (
        f"{name}-{len(layers)} (layers {listed(layers)}) needs no card and is predicted as good within the interval: "
        f"{100 * kept:.0f}% of the performance at {100 * time:.0f}% of the step time"
    )
    return {
        "strategy": name,
        "layers": layers,
        "performance_kept": plain["performance_kept"],
        "step_time": plain["step_time"],
        "note": note,
    }


def allocate_ranks(card: LayerCard, placement: Placement, rank: int = 8, alpha: float = 16.0) -> Placement:
    """The placement with its total rank shared out by what each layer covers (`shared_ranks`), and alpha / rank the same everywhere."""
    ranks = shared_ranks(set_similarity(card), layer_weights(card), placement.layers, rank)
    pattern = {module.path: ranks[layer] for layer in placement.layers for module in card.layers[layer].modules}
    scale = alpha / rank
    return replace(
        placement,
        asked={**placement.asked, "rank": rank, "alpha": alpha},
        rank_pattern=pattern,
        alpha_pattern={path: scale * found for path, found in pattern.items()},
    )


def _costs(cost: CostModel, layers: Sequence[int]) -> dict[str, Any]:
    every = range(len(cost.layers))

    def part(of: float, whole: float, absolute: bool, unit: str) -> dict[str, Any]:
        return {unit: of if absolute else None, "share": of / whole if whole > 0 else 0.0}

    memory, params = cost.peak_memory(layers), cost.linear("params")
    return {
        "step_time": part(cost.step_time(layers), cost.step_time(every), cost.absolute, "seconds"),
        "peak_memory": part(memory, cost.peak_memory(every), True, "bytes"),
        "parameters": part(round(params.of(layers)), params.of(every), True, "count"),
        "latency": part(cost.inference_latency(layers), cost.inference_latency(every), cost.absolute, "seconds"),
        "cost_source": cost.source,
    }


def _placement(card: LayerCard, layers: Sequence[int], objective: str, notes: dict[str, Any], asked: dict[str, Any]) -> Placement:
    layers = tuple(layers)
    return Placement(
        model=card.model.model_dump(),
        layers=layers,
        paths=tuple(module.path for layer in layers for module in card.layers[layer].modules if module.experts is None),
        parameters=tuple(module.path for layer in layers for module in card.layers[layer].modules if module.experts is not None),
        objective=objective,
        predicted={**predict(card, layers), **notes},
        reasons=_reasons(card, layers, WHY.get(objective, f"strategy {objective}")),
        asked=asked,
    )


def _reasons(card: LayerCard, layers: tuple[int, ...], why: str) -> dict[str, str]:
    gains, similar = np.array(card.values("gain_estimate")), similarity(card.coupling)
    ranks = gains.size - gains.argsort().argsort()
    covering = covered_by(set_similarity(card), layers)
    reasons = {}
    for layer in layers:
        stands_for = [j for j in np.flatnonzero(covering == layer).tolist() if j != layer]
        mean = float(similar[stands_for, layer].mean()) if stands_for else 0.0
        covers = f"stands in for layers {listed(stands_for)} (mean coupling {mean:.2f})" if stands_for else "stands in for no other layer"
        reasons[str(layer)] = f"{why}: {covers}; gain estimate {gains[layer]:.2f}, rank {ranks[layer]} of {gains.size}"
    return reasons
