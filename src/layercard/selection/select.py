"""From a Layer Card to a placement: objectives and budgets become a problem for the solver, its answer a placement with reasons.

Coverage (`layercard.statistics.coverage`) says what a set of layers will gain. A monotone curve fitted to trained sets turns it into
*performance kept*: the loss reduction of a placement as a share of the reduction of all layers, with a 90 % interval. The knots of the
curve lie in `calibration.json`, in per cent of performance; between them it is straight. The interval is as wide as trained sets of tasks
that had no part in the curve lie from it. A performance that is asked for must be reached by its lower end.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from layercard.card.card import LayerCard, training_cost
from layercard.card.numbers import listed
from layercard.cost.model import CostModel, Linear
from layercard.errors import PlacementError, SelectionError, suggestion
from layercard.models.module_sets import MODULE_SETS, module_set
from layercard.selection.budgets import LIMITS, Budgets, amount, option_of
from layercard.selection.learning_rate import STEPS, Length, usual_rate
from layercard.selection.placement import Placement, check_layers
from layercard.selection.solver import SECONDS, Problem, Solution, least_cost, most_coverage, resolution
from layercard.selection.strategies import check_k, strategy_layers
from layercard.statistics.coverage import blended, coverage, covered_by, demand, similarity

OBJECTIVES = {
    "performance": "best coverage",
    "cost": "cheapest to train",
    "balanced": "cheapest placement that keeps the wanted performance",
}
"""Objectives, and what each takes a layer for."""
LAYERS = 5
"""Number of layers where neither a number nor a budget says how many."""
KEPT = 0.95
"""Performance that `balanced` keeps unless told."""
LOWER_END, UPPER_END = 1.02, 1.1
"""Performance at which the lower and the upper part of the interval would close: over that of all layers, which some placements surpass."""

AUTO = "auto"
"""The set of modules that is left to the choice."""
MODULES_KEEP = {"all": 1.0, "mlp": 0.984, "attention": 0.95, "out": 0.968, "down": 0.955}
"""What a set of modules keeps of the performance of all modules in the same layers: single runs of one model and task (13 layers, 48
steps), taken to hold for others; that of attention is assumed (docs/choosing.md)."""

# ---- what a card says of a set of layers


@cache
def _curve() -> tuple[np.ndarray, np.ndarray, float, float]:
    """Shares of coverage, performance kept at them, and how far sets of other tasks lie below and above it, in units of what is left to
    `LOWER_END` and `UPPER_END`."""
    fitted = json.loads(Path(__file__).with_name("calibration.json").read_text(encoding="utf-8"))
    knots = np.array(fitted["knots"], dtype=float)
    return knots[:, 0], np.maximum.accumulate(knots[:, 1]) / 100, float(fitted["below"]), float(fitted["above"])


def performance_kept(share: float) -> tuple[float, float, float]:
    """Value, low and high of the performance kept, from 0 to about 1, for a share of the coverage of all layers.

    All layers keep 1, by definition.

    >>> performance_kept(1.0), performance_kept(0.0)[0]
    ((1.0, 1.0, 1.0), 0.0)
    """
    shares, performance, below, above = _curve()
    value = float(np.interp(share, shares, performance))
    if share >= 1:
        return value, value, value
    return value, max(0.0, value - below * (LOWER_END - value)), value + above * (UPPER_END - value)


def coverage_share(kept: float) -> float:
    """The least share of coverage whose performance kept is `kept`, from 0 to 1; the inverse of `performance_kept`.

    >>> round(performance_kept(coverage_share(0.95))[0], 9)
    0.95
    """
    shares, performance, _, _ = _curve()
    if kept > performance[-1]:
        return float("inf")
    right = int(np.searchsorted(performance, kept, side="left"))
    if right == 0 or performance[right] == kept:
        return float(shares[right])
    low, high = performance[right - 1], performance[right]
    return float(shares[right - 1] + (kept - low) / (high - low) * (shares[right] - shares[right - 1]))


def sure_share(kept: float) -> float:
    """The least share of coverage at which the lower end of the interval is `kept`, from 0 to 1; 1, all layers, where no other is sure.

    >>> performance_kept(sure_share(0.9))[1] >= 0.9 - 1e-9
    True
    """
    below = _curve()[2]
    return min(coverage_share((kept + below * LOWER_END) / (1 + below)), 1.0)


def probe_measure(card: LayerCard) -> str:
    """The measure of what a step in one layer alone gains: the step probe or, where it was not run, the quadratic model's."""
    return "step_probe" if card.layers[0].step_probe is not None else "predicted_gain"


def layer_weights(card: LayerCard) -> np.ndarray:
    """Weight `w_j` of each layer in the coverage, from `probe_measure`."""
    return demand(card.values(probe_measure(card)))


def set_similarity(card: LayerCard) -> np.ndarray:
    """How far layer i stands in for layer j, `[L, L]`."""
    return blended(card.coupling)


def coverage_of(card: LayerCard) -> Callable[[Sequence[int]], float]:
    """The coverage of any set of layers."""
    similar, weights = set_similarity(card), layer_weights(card)
    return lambda layers: coverage(similar, weights, list(layers))


def predictor(card: LayerCard, cost: CostModel | None = None, modules: str = "all") -> Callable[[Sequence[int]], dict[str, Any]]:
    """`predict` for one card, any number of sets of layers, and one set of modules in them; coverage and cost are set up once.

    `cost` is that of all modules, and shares are of all layers with all modules.
    """
    every, cover, whole = range(card.model.layers), coverage_of(card), cost or training_cost(card)
    cost = whole.with_modules(modules)

    def predicted(layers: Sequence[int]) -> dict[str, Any]:
        share = cover(layers) / cover(every)
        value, low, high = (MODULES_KEEP[modules] * kept for kept in performance_kept(share))

        def part(unit: str, of: Callable[[CostModel, Iterable[int]], float], absolute: bool = True) -> dict[str, Any]:
            value, total = of(cost, layers), of(whole, every)
            return {unit: value if absolute else None, "share": value / total if total > 0 else 0.0}

        return {
            "coverage": share,
            "layers_in_backward": f"{len(every) - min(layers)}/{len(every)}",
            "performance_kept": {"value": value, "low": low, "high": high},
            "step_time": part("seconds", CostModel.step_time, cost.absolute),
            "peak_memory": part("bytes", CostModel.peak_memory),
            "process_memory": part("bytes", CostModel.process_memory, cost.absolute),
            "streamed_memory": part("bytes", partial(CostModel.process_memory, stream=min(layers) > 0), cost.absolute),
            "parameters": part("count", lambda cost, chosen: round(cost.linear("params").of(chosen))),
            "latency": part("seconds", CostModel.inference_latency, cost.absolute),
            "cost_source": cost.source,
            "training": "fast" if cost.fast else "stock",
        }

    return predicted


def predict(card: LayerCard, layers: Sequence[int], cost: CostModel | None = None) -> dict[str, Any]:
    """What the card says of a set of layers: performance kept, step time, memory, parameters and latency, each with its share of all.

    `cost` prices it as it will be trained; fast and for one epoch when not given (`card.training_cost`).
    """
    return predictor(card, cost)(layers)


# ---- what is asked of the solver


@dataclass(frozen=True)
class Question:
    """What is asked of a card: `objective`, and the solver's `problem`, with the card's `cost` and its step `time` as a linear form.

    `full_coverage` is that of all layers. `kept` is the performance asked for, from 0 to 1 (`None` without); `insists` says whether the
    user asked for it, or it is the default of `balanced`.
    """

    objective: str
    problem: Problem
    cost: CostModel
    time: Linear
    full_coverage: float
    kept: float | None
    insists: bool

    def surely(self, coverage: float) -> float:
        """Lower end of the interval of the performance kept, in per cent."""
        return 100 * performance_kept(coverage / self.full_coverage)[1]


def question(
    card: LayerCard, objective: str, k: int | None, budgets: Budgets, cost: CostModel | None = None, modules: str = "all"
) -> Question:
    """The problem behind an objective, priced as `predict` does; of the performance a set of modules keeps its part (`MODULES_KEEP`).

    Raises:
        SelectionError: k is outside 1 to the number of layers, or a budget cannot be read.
    """
    cost, num_layers = cost or training_cost(card), card.model.layers
    insists = budgets.min_performance is not None
    kept = budgets.kept() if insists else KEPT if objective == "balanced" else None
    limits = budgets.resolve(cost)
    if k is None and ((objective == "cost" and not insists) or (objective == "performance" and not limits)):
        k = min(LAYERS, num_layers)
    if k is not None:
        check_k(k, num_layers)
    problem = Problem(set_similarity(card), layer_weights(card), 1 if k is None else k, k, limits)
    full_coverage = problem.coverage(range(num_layers))
    needed = 0.0 if kept is None else sure_share(kept / MODULES_KEEP[modules]) * full_coverage
    return Question(objective, replace(problem, needed=needed), cost, cost.linear("time"), full_coverage, kept, insists)


def answer(asked: Question, seconds: float = SECONDS) -> tuple[Solution, str | None]:
    """The best placement, and a remark where it is not quite what was asked for; each search takes at most `seconds`.

    Raises:
        SelectionError: Nothing meets the budgets; the message names what comes nearest.
    """
    problem = asked.problem
    if asked.objective == "performance":
        best = most_coverage(problem, seconds=seconds)
        if best is None or best.value < problem.needed * (1 - 1e-9):
            raise SelectionError(_why_not(asked, best, seconds))
        # Of all sets that cover as much, the cheapest; it must reach the needed performance all the same.
        tolerance = min(resolution(problem.num_layers), 1e-4)
        level = max(best.value * (1 - tolerance), problem.needed)
        cheaper = least_cost(replace(problem, needed=level), asked.time, seconds=min(0.5, seconds))
        if cheaper is None or cheaper.cost is None or cheaper.cost >= asked.time.of(best.layers) * (1 - 1e-9):
            return best, None
        highest = best.value * (1 + best.gap)
        return replace(cheaper, status=best.status, gap=max(0.0, highest / cheaper.value - 1), cost=None), None
    cheapest = least_cost(problem, asked.time, seconds=seconds)
    if cheapest is not None:
        return cheapest, None
    # The default of `balanced` gives way to the number of layers and to budgets; what the user insists on does not.
    best = most_coverage(problem, seconds=seconds)
    if best is not None and not asked.insists:
        nearest = least_cost(replace(problem, needed=KEPT * best.value), asked.time, seconds=seconds)
        if nearest is not None:
            count = problem.most
            what = "what the budgets allow keeps" if count is None else "1 layer keeps" if count == 1 else f"{count} layers keep"
            return nearest, (
                f"{what} at most {asked.surely(best.value):.0f}% for sure, less than {100 * KEPT:g}%; chosen is the cheapest with "
                f"{100 * KEPT:g}% of the best coverage of these"
            )
    raise SelectionError(_why_not(asked, best, seconds))


def _why_not(asked: Question, best: Solution | None, seconds: float) -> str:
    """Why nothing meets the budgets, with the nearest that does."""
    problem = asked.problem
    count = "" if problem.most is None else f" of {problem.most} layer{'s' if problem.most != 1 else ''}"
    limits = " and ".join(f"{option_of(b.name)} {amount(LIMITS[b.name].what, b.limit, asked.cost)}" for b in problem.budgets)

    # The least excess over one budget with which all the rest is met.
    excesses: list[tuple[float, str]] = []
    for budget in problem.budgets:
        others = tuple(other for other in problem.budgets if other is not budget)
        relaxed = replace(problem, budgets=others, needed=0.0 if best is None else problem.needed)
        cheapest = least_cost(relaxed, budget.form, seconds=seconds)
        if cheapest is not None and cheapest.cost is not None:
            what, _, label, _ = LIMITS[budget.name]
            fitting = [layer for layer in range(problem.num_layers) if budget.form.of([layer]) <= budget.limit]
            deepest = f"layers from {fitting[0]} on would fit, " if what == "process" and fitting else ""
            least = f"{amount(what, cheapest.cost, asked.cost)}, with layers {listed(cheapest.layers)}"
            words = f"{deepest}the least {label} that would do is {least}"
            excesses.append((cheapest.cost / budget.limit, words))
    if best is None:
        return f"no placement{count} keeps {limits}; {min(excesses)[1] if excesses else 'allow more'}"

    ways = [f"the best keeps {asked.surely(best.value):.1f}% for sure (layers {listed(best.layers)})"]
    if excesses:
        ways.append(min(excesses)[1])
    elif problem.most is not None and problem.most < problem.num_layers:
        free = least_cost(replace(problem, least=1, most=None), asked.time, seconds=seconds)
        if free is not None:
            ways.append(f"{len(free.layers)} layers would reach it")
    needed = f"{100 * (asked.kept or 0):g}% of the performance of all layers for sure"
    within = f" within {limits}" if limits else ""
    return f"no placement{count}{within} keeps {needed}; {'; '.join(ways)}; lower --min-performance or allow more"


# ---- placements


def select(
    card: LayerCard,
    *,
    k: int | None = None,
    objective: str = "balanced",
    strategy: str | None = None,
    budgets: Budgets | None = None,
    modules: str = "all",
    fast: bool = True,
    epochs: float = 1.0,
    seed: int = 0,
    seconds: float = SECONDS,
) -> Placement:
    """Choose layers, and modules in them.

    Args:
        card: The Layer Card.
        k: How many layers. When not given: as many as the budgets and the objective make best, and 5 where nothing else decides
            (`performance` without budgets, `cost`, and a strategy).
        objective: `performance`: the best predicted performance within the budgets. `cost`: the least step time. `balanced`: the least
            step time among the placements whose predicted performance kept surely reaches `budgets.min_performance`, 95 % unless given:
            the lower end of its 90 % interval does. Where k or budgets cannot reach these 95 %, those that reach 95 % of the best coverage
            that they can.
        strategy: A plain placement instead (`strategy_layers`); objective and budgets are not used then.
        budgets: Limits on step time, memory, adapter weights and latency, and the least performance.
        modules: The set of modules in these layers (`MODULE_SETS`), or `auto`: the set that serves the objective best.
        fast: Price steps with the fast parts, as `train` runs them; else stock ones.
        epochs: Passes over the data that steps are priced for: in later ones the frozen blocks do not run.
        seed: Of the random strategy.
        seconds: Time limit of each search; where it is reached, the solver's status says so, with the gap to the proven bound.

    Returns:
        The placement. `predicted` has `performance_kept` (value, low, high; 1 is all layers), `step_time`, `peak_memory`, `process_memory`,
        `streamed_memory`, `parameters` and `latency` with their `share` of all layers (times in seconds only where the card's cost is
        measured), the `solver`'s status and gap, and `baseline`: a plain placement that is as good within the interval and not dearer, if
        there is one. Its learning rate is that of the rule (`selection.learning_rate`).

    Raises:
        SelectionError: Unknown objective, strategy or set of modules, k outside 1 to the number of layers, a budget that cannot be read,
            or budgets that no placement meets; the message names what comes nearest.
    """
    if modules not in (AUTO, *MODULE_SETS):
        raise SelectionError(f"set of modules {modules!r} is unknown; {suggestion(modules, (AUTO, *MODULE_SETS))}")
    whole = training_cost(card, fast=fast, epochs=epochs)
    about: dict[str, Any] = {"modules": modules} if modules != "all" else {}
    about |= ({} if fast else {"stock": True}) | ({"epochs": epochs} if epochs != 1 else {})
    if strategy is not None:
        if modules == AUTO:
            raise SelectionError(f"--modules auto needs an objective, but --strategy {strategy} is a fixed rule; name the set of modules")
        layers = strategy_layers(strategy, card.model.layers, min(LAYERS, card.model.layers) if k is None else k, seed)
        asked = {"k": k, **({"seed": seed} if strategy == "random" else {}), **about}
        predicted = predictor(card, whole, modules)(layers)
        return _placement(card, layers, strategy, f"strategy {strategy}", predicted, asked, modules)
    if objective not in OBJECTIVES:
        raise SelectionError(f"objective {objective!r} is unknown; {suggestion(objective, OBJECTIVES)}")
    budgets = budgets or Budgets()

    # Each set of modules is a problem of its own; the one that serves the objective best is taken, of equal ones the larger set.
    answers: list[tuple[float, float, str, Solution, str | None]] = []
    refusals: list[SelectionError] = []
    for name in MODULE_SETS if modules == AUTO else [modules]:
        try:
            asked_of = question(card, objective, k, budgets, whole.with_modules(name), name)
            solution, remark = answer(asked_of, seconds)
        except SelectionError as error:
            refusals.append(error)
            continue
        except PlacementError:
            if modules != AUTO:
                raise
            continue
        kept = MODULES_KEEP[name] * performance_kept(solution.value / asked_of.full_coverage)[0]
        time = asked_of.time.of(solution.layers)
        answers.append((-kept, time, name, solution, remark) if objective == "performance" else (time, -kept, name, solution, remark))
    if not answers:
        raise refusals[0]
    *_, name, solution, remark = min(answers, key=lambda each: (round(each[0], 6), round(each[1], 6)))
    notes: dict[str, Any] = {"solver": solution.notes(), **({} if remark is None else {"remark": remark})}
    predict_set = predictor(card, whole, name)
    predicted = predict_set(solution.layers)
    notes["baseline"] = _as_good(card.model.layers, solution.layers, predicted, predict_set)
    asked = {"k": k, **budgets.given(), **about}
    return _placement(card, solution.layers, objective, OBJECTIVES[objective], {**predicted, **notes}, asked, name)


def given(card: LayerCard, layers: Iterable[Any]) -> Placement:
    """The placement of the layers that are named, with what the card predicts of them.

    Raises:
        PlacementError: Empty, repeated, or not in the model.
    """
    chosen = check_layers(layers, card.model.layers)
    return _placement(card, chosen, "given", "named by hand", predict(card, chosen), {})


def allocate_ranks(card: LayerCard, placement: Placement, rank: int = 8, alpha: float = 16.0) -> Placement:
    """The placement with `rank` times its number of layers shared out, at least 1 a layer; alpha / rank is the same everywhere.

    Layer i covers `a_i = Σ_j w_j C_ji` over the layers j that it covers best, itself among them; its rank is proportional to `√a_i`.

    Raises:
        SelectionError: The rank is below 1.
    """
    ranks = shared_ranks(set_similarity(card), layer_weights(card), placement.layers, rank)
    name = placement.modules or "all"
    pattern = {module.path: ranks[layer] for layer in placement.layers for module in module_set(card.layers[layer].modules, name)}
    return placement.changed(
        asked={**placement.asked, "rank": rank, "alpha": alpha},
        rank_pattern=pattern,
        alpha_pattern={path: alpha / rank * share for path, share in pattern.items()},
    )


def shared_ranks(similar: np.ndarray, weights: np.ndarray, layers: Sequence[int], rank: int) -> dict[int, int]:
    """The ranks of `allocate_ranks`, from `C: [L, L]` and `w: [L]`.

    What rounding leaves goes to the largest remainders, of equal ones to the lower layer.

    Raises:
        SelectionError: The rank is below 1.
    """
    if rank < 1:
        raise SelectionError(f"rank = {rank} cannot be shared out; give a whole number of at least 1")
    chosen = sorted(layers)
    covering = covered_by(similar, chosen)
    roots = np.sqrt([float(weights[covering == i] @ similar[covering == i, i]) for i in chosen])
    parts = roots / roots.sum() if roots.sum() > 0 else np.full(len(chosen), 1 / len(chosen))
    exact = (rank - 1) * len(chosen) * parts
    ranks = 1 + np.floor(exact).astype(int)
    remainders = np.argsort(-(exact - np.floor(exact)), kind="stable")
    ranks[remainders[: rank * len(chosen) - int(ranks.sum())]] += 1
    return dict(zip(chosen, ranks.tolist(), strict=True))


def _as_good(
    num_layers: int, layers: tuple[int, ...], chosen: dict[str, Any], predict_set: Callable[[Sequence[int]], dict[str, Any]]
) -> dict[str, Any] | None:
    """A plain placement of as many layers that is as good within the interval and not dearer; the best such, or `None`.

    A placement that is one of them itself has none to be compared with.
    """
    as_good: list[dict[str, Any]] = []
    for name in ("last", "middle", "uniform"):
        plain = strategy_layers(name, num_layers, len(layers))
        if tuple(plain) == layers:
            return None
        predicted = predict_set(plain)
        performance, time = predicted["performance_kept"], predicted["step_time"]
        if performance["value"] >= chosen["performance_kept"]["low"] and time["share"] <= chosen["step_time"]["share"] * (1 + 1e-9):
            note = (
                f"{name}-{len(plain)} (layers {listed(plain)}) needs no card and is predicted as good within the interval: "
                f"{100 * performance['value']:.0f}% of the performance at {100 * time['share']:.0f}% of the step time"
            )
            as_good.append({"strategy": name, "layers": plain, "performance_kept": performance, "step_time": time, "note": note})
    return max(as_good, key=lambda plain: (plain["performance_kept"]["value"], -plain["step_time"]["share"]), default=None)


def _placement(
    card: LayerCard,
    layers: Sequence[int],
    objective: str,
    why: str,
    predicted: dict[str, Any],
    asked: dict[str, Any],
    chosen_set: str = "all",
) -> Placement:
    """The placement of layers, each with the reason why it was taken, and with the learning rate of the rule."""
    gains, similar = np.array(card.values("gain_estimate")), similarity(card.coupling)
    ranks = gains.size - gains.argsort().argsort()
    covering = covered_by(set_similarity(card), layers)
    reasons = {}
    for layer in layers:
        others = [j for j in np.flatnonzero(covering == layer).tolist() if j != layer]
        covers = "stands in for no other layer"
        if others:
            covers = f"stands in for layers {listed(others)} (mean coupling {float(similar[others, layer].mean()):.2f})"
        reasons[str(layer)] = f"{why}: {covers}; gain estimate {gains[layer]:.2f}, rank {ranks[layer]} of {gains.size}"
    modules = [module for layer in layers for module in module_set(card.layers[layer].modules, chosen_set)]
    width = card.layers[0].modules[0].in_features if card.layers[0].modules else 0  # the first module of a block reads the hidden state
    rate = float(f"{usual_rate(width, Length(STEPS), len(layers) / card.model.layers):.3g}") if width else None
    return Placement(
        model=card.model.model_dump(),
        layers=tuple(layers),
        paths=tuple(module.path for module in modules if module.experts is None),
        parameters=tuple(module.path for module in modules if module.experts is not None),
        objective=objective,
        predicted=predicted,
        reasons=reasons,
        asked=asked,
        modules="" if chosen_set == "all" else chosen_set,
        learning_rate=rate,
        learning_rate_steps=STEPS if rate else None,
        learning_rate_source="rule" if rate else "",
    )
