"""The whole front: the least step time, and the least memory, for every performance that a card predicts.

Each point is the cheapest placement that keeps a performance of a ladder (`LADDER`), solved as `select` solves it; points that another
one beats in both are left out. Plain placements stand beside them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from layercard.card.card import LayerCard, training_cost
from layercard.cost.model import What
from layercard.errors import SelectionError
from layercard.records import Record
from layercard.selection.budgets import Budgets
from layercard.selection.select import coverage_share, predictor, question
from layercard.selection.solver import SECONDS, greedy_chain, least_cost
from layercard.selection.strategies import strategy_layers

LADDER = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.825, 0.85, 0.875, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0)
"""Performance kept at which the cheapest placement is looked for."""
SIZES = (1, 2, 3, 5, 8, 12, 16)
"""Numbers of layers of the plain placements."""
EXACT = 48
"""Layers up to which every point of a front is solved to the end."""
FRONT_SECONDS = 2.0
"""Time that the searches for the points of a deeper model have together; their gaps to a proven bound stand in the file."""
FRONTS: dict[str, tuple[What, str]] = {"time": ("time", "step_time"), "memory": ("memory", "peak_memory")}
"""The fronts: the cost that is minimised, and the name under which a point holds it."""


class Front(Record):
    """Fronts of one card.

    Attributes:
        model: Name, fingerprint and number of layers.
        cost_source: Where costs come from: `measured`, `rates` or `shapes` (then only shares are known).
        fronts: For `time` and `memory` the points from the cheapest up: `layers`, what is predicted of them (`selection.predict`), and
            the `solver`'s status and gap.
        baselines: Plain placements by name (`last-5`, `all`), with the same predictions.
    """

    error: ClassVar = SelectionError
    noun: ClassVar = "front"
    made_by: ClassVar = "layercard pareto"
    schema_: Literal["layercard-front/1"] = Field(default="layercard-front/1", alias="schema")
    model: dict[str, Any]
    cost_source: str
    fronts: dict[str, tuple[dict[str, Any], ...]]
    baselines: tuple[dict[str, Any], ...]


def pareto(card: LayerCard, *, fast: bool = True, epochs: float = 1.0, progress: Callable[[str, int, int], None] | None = None) -> Front:
    """The fronts of a card: performance kept against step time and against peak memory, priced as `select` does.

    Args:
        card: The Layer Card.
        fast: Price steps with the fast parts; else stock ones.
        epochs: Passes over the data that steps are priced for.
        progress: Hears of the phase `pareto`, in placements solved.
    """
    cost, depth = training_cost(card, fast=fast, epochs=epochs), card.model.layers
    predict = predictor(card, cost)
    asked = question(card, "balanced", None, Budgets(min_performance=100), cost)
    # Up to `EXACT` layers each search ends by itself. Deeper, all of them share the greedy choices, and have a share of the time.
    chains = [greedy_chain(asked.problem, m) for m in range(depth)] if depth > EXACT else None
    seconds = SECONDS if depth <= EXACT else FRONT_SECONDS / (len(FRONTS) * len(LADDER))
    fronts: dict[str, tuple[dict[str, Any], ...]] = {}
    for row, (name, (what, measure)) in enumerate(FRONTS.items()):
        points = []
        for step, kept in enumerate(LADDER):
            problem = replace(asked.problem, needed=coverage_share(kept) * asked.full_coverage)
            solution = least_cost(problem, asked.cost.linear(what), seconds=seconds, chains=chains)
            if solution is not None:
                points.append({"layers": list(solution.layers), **predict(solution.layers), "solver": solution.notes()})
            if progress is not None:
                progress("pareto", row * len(LADDER) + step + 1, len(FRONTS) * len(LADDER))
        # From the cheapest up, only what is better than all before it.
        undominated: list[dict[str, Any]] = []
        for point in sorted(points, key=lambda point: (point[measure]["share"], -point["coverage"])):
            if not undominated or point["coverage"] > undominated[-1]["coverage"] * (1 + 1e-9):
                undominated.append(point)
        fronts[name] = tuple(undominated)
    plain = {f"{name}-{k}": strategy_layers(name, depth, k) for name in ("last", "middle", "uniform", "first") for k in SIZES if k < depth}
    plain["all"] = list(range(depth))
    baselines = tuple({"name": name, "layers": layers, **predict(layers)} for name, layers in plain.items())
    return Front(model=card.model.model_dump(), cost_source=cost.source, fronts=fronts, baselines=baselines)
