"""From a Layer Card to a placement."""

import difflib
from typing import Any

import numpy as np

from layercard.card import LayerCard
from layercard.errors import SelectionError
from layercard.selection.placement import Placement
from layercard.selection.solver import Solution, solve
from layercard.selection.strategies import check_k, strategy_layers
from layercard.statistics.coverage import coverage, covered_by, demand, similarity

OBJECTIVES = ("performance", "cost", "balanced")
WHY = {
    "performance": "best coverage",
    "cost": "cheapest to train",
    "balanced": "near the best coverage and as near to the output as may be",
}
"""What each objective takes a layer for."""
SHARE = 0.95
"""Share of the best coverage that `balanced` keeps."""


def select(card: LayerCard, *, k: int = 5, objective: str = "balanced", strategy: str | None = None, seed: int = 0) -> Placement:
    """Choose k layers.

    Args:
        card: The Layer Card.
        k: How many layers.
        objective: `performance`: the k layers that cover most of what all layers can correct. `cost`: the k layers that are
            cheapest to train, next to the output. `balanced`: the k layers that lie as near to the output as possible while
            covering at least 95 % of what the best k cover, since backward stops below the lowest of them.
        strategy: A plain placement instead (`strategy_layers`); `objective` is not used then.
        seed: Of the random strategy.

    Raises:
        SelectionError: Unknown objective or strategy, or k outside 1 to the number of layers.
    """
    depth = card.model.layers
    if strategy is not None:
        return _placement(card, strategy_layers(strategy, depth, k, seed), strategy, None)
    if objective not in OBJECTIVES:
        near = difflib.get_close_matches(objective, OBJECTIVES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(OBJECTIVES)}"
        raise SelectionError(f"objective {objective!r} is unknown; {hint}")
    check_k(k, depth)
    if objective == "cost":
        return _placement(card, strategy_layers("last", depth, k), objective, None)
    solution = best_cover(card, k) if objective == "performance" else _balanced(card, k)
    return _placement(card, solution.layers, objective, solution)


def layer_weights(card: LayerCard) -> np.ndarray:
    """Weight `w_j` of each layer in the coverage, from the step probe or, where it was not run, from the quadratic gains."""
    probed = card.layers[0].step_probe is not None
    return demand(card.values("step_probe" if probed else "predicted_gain"))


def best_cover(card: LayerCard, k: int, lowest: int = 0) -> Solution:
    """The k layers of greatest coverage, none below `lowest`."""
    return solve(similarity(card.coupling), layer_weights(card), k, lowest)


def _balanced(card: LayerCard, k: int) -> Solution:
    """Raise the lowest layer as long as the best set above it keeps `SHARE` of the coverage."""
    best = found = best_cover(card, k)
    for lowest in range(found.layers[0] + 1, card.model.layers - k + 1):
        tried = best_cover(card, k, lowest)
        if tried.value < SHARE * best.value:
            break
        found = tried
    return found


def _placement(card: LayerCard, layers: Any, objective: str, solution: Solution | None) -> Placement:
    layers = tuple(layers)
    depth = card.model.layers
    similar, weights = similarity(card.coupling), layer_weights(card)
    predicted: dict[str, Any] = {
        "coverage": coverage(similar, weights, layers) / float(weights.sum()),
        "layers_in_backward": f"{depth - min(layers)}/{depth}",
        "performance_kept": None,
        "step_time": None,
        "peak_memory": None,
    }
    if solution is not None:
        predicted["solver"] = {"status": solution.status, "gap": solution.gap}
    return Placement(
        model=card.model.model_dump(),
        layers=layers,
        paths=tuple(module.path for layer in layers for module in card.layers[layer].modules),
        objective=objective,
        predicted=predicted,
        reasons=_reasons(card, layers, similar, WHY.get(objective, f"strategy {objective}")),
    )


def _reasons(card: LayerCard, layers: tuple[int, ...], similar: np.ndarray, why: str) -> dict[str, str]:
    gains = np.array(card.values("gain_estimate"))
    ranks = gains.size - gains.argsort().argsort()
    covering = covered_by(similar, layers)
    reasons = {}
    for layer in layers:
        stands_for = [j for j in np.flatnonzero(covering == layer).tolist() if j != layer]
        mean = float(similar[stands_for, layer].mean()) if stands_for else 0.0
        covers = f"stands in for layers {ranges(stands_for)} (mean coupling {mean:.2f})" if stands_for else "stands in for no other layer"
        reasons[str(layer)] = f"{why}: {covers}; gain estimate {gains[layer]:.2f}, rank {ranks[layer]} of {gains.size}"
    return reasons


def ranges(layers: list[int]) -> str:
    """Ascending indices in short form.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
