"""From a Layer Card to a placement."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from layercard.card import LayerCard, cost_of
from layercard.cost import CostModel
from layercard.errors import SelectionError
from layercard.indices import listed
from layercard.selection.budgets import Budgets
from layercard.selection.calibration import performance_kept
from layercard.selection.models import coverage_of, layer_weights, set_similarity
from layercard.selection.objectives import LAYERS, answer, question
from layercard.selection.placement import Placement, check_layers
from layercard.selection.ranks import shared_ranks
from layercard.selection.solver import SECONDS
from layercard.selection.strategies import strategy_layers
from layercard.statistics.coverage import covered_by, similarity

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
