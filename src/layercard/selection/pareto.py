"""The whole front: the least step time, and the least memory, for every performance that a card predicts.

Each point is the cheapest placement that keeps a performance of a ladder (`LADDER`), solved as `select` solves it; points that another
one beats in both are left out. Plain placements stand beside them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercard.card.card import LayerCard, cost_of
from layercard.cost.model import What
from layercard.errors import SelectionError
from layercard.files import read_json, shown, write_json
from layercard.selection.budgets import Budgets
from layercard.selection.select import predict, question
from layercard.selection.solver import least_cost
from layercard.selection.strategies import strategy_layers

SCHEMA = "layercard-front/1"
LADDER = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.825, 0.85, 0.875, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0)
"""Performance kept at which the cheapest placement is looked for."""
SIZES = (1, 2, 3, 5, 8, 12, 16)
"""Numbers of layers of the plain placements."""
COSTS: dict[str, tuple[What, str]] = {"time": ("time", "step_time"), "memory": ("memory", "peak_memory")}
"""The fronts: the cost that is minimised, and where a point says it."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Front:
    """Fronts of one card.

    Attributes:
        model: Name, fingerprint and number of layers.
        cost_source: Where costs come from: `measured`, `rates` or `shapes` (then only shares are known).
        fronts: For `time` and `memory` the points from the cheapest up: `layers`, what is predicted of them (`selection.predict`), and
            the `solver`'s status and gap.
        baselines: Plain placements by name (`last-5`, `all`), with the same predictions.
    """

    model: dict[str, Any]
    cost_source: str
    fronts: dict[str, tuple[dict[str, Any], ...]]
    baselines: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of schema `layercard-front/1`."""
        return {
            "schema": SCHEMA,
            "model": dict(self.model),
            "cost_source": self.cost_source,
            "fronts": {name: list(points) for name, points in self.fronts.items()},
            "baselines": list(self.baselines),
        }

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the front to a file, atomically."""
        return write_json(path, self.to_json(), force=force)


def load_front(path: str | Path) -> dict[str, Any]:
    """Read the JSON object of a front.

    Raises:
        SelectionError: There is none, or it has another schema.
    """
    value = read_json(path, SelectionError, "front")
    if value.get("schema") != SCHEMA:
        raise SelectionError(f"{path}: schema {shown(value.get('schema'))} is not {SCHEMA!r}; make it with `layercard pareto`")
    return value


def pareto(card: LayerCard, *, progress: Progress | None = None) -> Front:
    """The fronts of a card: performance kept against step time and against peak memory.

    Args:
        card: The Layer Card.
        progress: Hears of the phase `pareto`, in placements solved.
    """
    total, done = len(COSTS) * len(LADDER), 0
    fronts: dict[str, tuple[dict[str, Any], ...]] = {}
    for name, (_, measure) in COSTS.items():
        found = []
        for kept in LADDER:
            point = _cheapest(card, name, kept)
            done += 1
            if progress is not None:
                progress("pareto", done, total)
            if point is not None:
                found.append(point)
        fronts[name] = _undominated(found, measure)
    return Front(card.model.model_dump(), cost_of(card).source, fronts, tuple(_baselines(card)))


def _cheapest(card: LayerCard, name: str, kept: float) -> dict[str, Any] | None:
    """The placement that keeps so much and costs least; `None` where none does."""
    asked = question(card, "balanced", None, Budgets(min_performance=100 * kept))
    found = least_cost(asked.problem, asked.cost.linear(COSTS[name][0]))
    if found is None:
        return None
    gap = None if found.gap is None else float(f"{found.gap:.3g}")
    return {"layers": list(found.layers), **predict(card, found.layers), "solver": {"status": found.status, "gap": gap}}


def _undominated(points: Sequence[dict[str, Any]], measure: str) -> tuple[dict[str, Any], ...]:
    """From the cheapest up, each better than all before it."""
    kept: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p[measure]["share"], -p["coverage"])):
        if not kept or point["coverage"] > kept[-1]["coverage"] * (1 + 1e-9):
            kept.append(point)
    return tuple(kept)


def _baselines(card: LayerCard) -> list[dict[str, Any]]:
    depth = card.model.layers
    named = [
        (f"{name}-{k}", strategy_layers(name, depth, k)) for name in ("last", "middle", "uniform", "first") for k in SIZES if k < depth
    ]
    return [{"name": name, "layers": layers, **predict(card, layers)} for name, layers in [*named, ("all", list(range(depth)))]]
