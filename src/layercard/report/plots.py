"""The figures of the report, for notebooks.

```python
from layercard import LayerCard, plots, select

card = LayerCard.load("card.json")
plots.depth_profile(card, chosen=select(card, k=5))
```

Each function gives a plotly figure that equals the one in `layercard report`; show it, restyle it or write it as with any other. They take
objects of the library and the JSON values of their files alike, and check them as the commands do: what is not whole, or of another
model, raises the error of its kind (`CardError`, `PlacementError`, `SelectionError`); a name that there is not raises `ReportError`, and
`chosen` layers outside the model `PlacementError`. plotly is loaded by the first call.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from layercard.card.card import LayerCard
from layercard.errors import CardError, PlacementError, ReportError, suggestion
from layercard.records import Record
from layercard.selection.pareto import Front
from layercard.selection.placement import Placement, check_layers
from layercard.selection.transfer import Transfer, transfer

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Card = LayerCard | Mapping[str, Any]
"""A card, or the JSON value of its file."""
Chosen = Placement | Mapping[str, Any] | Iterable[int]
"""Layers to mark: a placement, the JSON value of its file, or block indices."""
Placements = Mapping[str, Placement | Mapping[str, Any]]
"""Placements, or the JSON values of their files, by the names to show."""
CostKind = Literal["time", "memory", "reach"]
FrontCost = Literal["time", "memory"]

__all__ = ["cost_by_depth", "coupling", "depth_profile", "front", "heat_map", "trade_off", "transfer_matrix"]
_R = TypeVar("_R", bound=Record)


def depth_profile(card: Card, measure: str = "gain_estimate", chosen: Chosen = ()) -> "Figure":
    """One measure over depth (`docs/card.md` lists them), with its 95 % interval as a band and the chosen layers as diamonds.

    Values are in the unit that the card gives for the measure.

    Raises:
        CardError: The card does not have the measure.
    """
    from layercard.report import figures, words

    checked = _record(LayerCard, card)
    value = checked.to_json()
    measures = {entry.key: entry for entry in words.measured(value)}
    if measure not in measures:
        raise CardError(f"the card has no measure {measure!r}; it has {', '.join(measures)}; {suggestion(measure, measures)}")
    return figures.depth_figure(value, measures[measure], _layers(checked, chosen))


def heat_map(card: Card, chosen: Chosen = ()) -> "Figure":
    """All measures of a card, one row each on its own scale, over the layers; exact values on hover, chosen layers marked above."""
    from layercard.report import figures

    checked = _record(LayerCard, card)
    return figures.heat_figure(checked.to_json(), _layers(checked, chosen))


def coupling(card: Card, chosen: Chosen = ()) -> "Figure":
    """The coupling matrix `ρ: [L, L]`, a correlation without unit; chosen layers are marked on the diagonal."""
    from layercard.report import figures

    checked = _record(LayerCard, card)
    return figures.coupling_figure(checked.to_json(), _layers(checked, chosen))


def cost_by_depth(card: Card, kind: CostKind = "time", chosen: Chosen = ()) -> "Figure":
    """What each layer costs in one training step.

    Args:
        card: A card with a cost; `card.with_cost(cost_of(card))` gives one that is estimated from shapes.
        kind: `time`: forward, backward and adapter of each layer, in ms, or in % of a step of all layers where only shapes are known.
            `memory`: what each layer keeps for backward, in MiB. `reach`: step time and peak memory when one layer alone is adapted,
            in % of all layers.
        chosen: Layers to mark; `reach` marks none.

    Raises:
        CardError: The card has no cost.
    """
    from layercard.report import figures

    checked = _record(LayerCard, card)
    layers = _layers(checked, chosen)
    _check_name("kind", kind, get_args(CostKind))
    if checked.cost is None:
        raise CardError("the card has no cost; profile again with --cost, or estimate it: card.with_cost(cost_of(card))")
    if kind == "reach":
        return figures.reach_figure(checked.cost)
    return figures.cost_time_figure(checked.cost, layers) if kind == "time" else figures.cost_memory_figure(checked.cost, layers)


def front(front: Front | Mapping[str, Any], cost: FrontCost = "time", placements: Placements | None = None) -> "Figure":
    """Performance kept against one cost, both predicted and in % of all layers: least cost as a line, plain placements as points.

    Args:
        front: What `layercard.selection.pareto.pareto(card)` gives, or the JSON value of `layercard pareto -o front.json`.
        cost: `time` of a step or peak `memory`.
        placements: Placements to mark, by the names to show on hover.
    """
    from layercard.report import figures

    checked = _record(Front, front)
    _check_name("cost", cost, checked.fronts)
    named = {name: _record(Placement, placement) for name, placement in (placements or {}).items()}
    for name, placement in named.items():
        if placement.model.get("fingerprint") != checked.model.get("fingerprint"):
            raise PlacementError(f"placement {name} is of {placement.model.get('name')}, the front of {checked.model.get('name')}")
    return figures.front_figure(checked.to_json(), cost, {name: placement.to_json() for name, placement in named.items()})


def transfer_matrix(cards: Transfer | Mapping[str, Any]) -> "Figure":
    """Spearman's rank correlation of the layers of every two cards, with the number in each cell.

    Args:
        cards: Several cards of one model by name, which are compared as `layercard transfer` does; or a comparison of these or the
            JSON value of `layercard transfer -o`, which are shown as they are.

    Raises:
        CardError: Fewer than two cards, or cards of several models.
    """
    from layercard.report import figures

    if isinstance(cards, Transfer) or isinstance(cards.get("schema"), str):
        return figures.transfer_figure(_record(Transfer, cards).to_json())
    return figures.transfer_figure(transfer([(str(name), _record(LayerCard, card)) for name, card in cards.items()]).to_json())


def trade_off(comparison: Mapping[str, Any], placements: Placements | None = None) -> "Figure":
    """Performance kept against training time, both measured and in % of all layers: one point a placement that was trained.

    Args:
        comparison: JSON value of `layercard compare` (`compare.json`) with a run of all layers.
        placements: Placements to mark and to name beside their points.

    Raises:
        ReportError: The value is not a whole comparison.
    """
    from layercard.report import figures
    from layercard.report.sources import read_runs
    from layercard.report.tables import called
    from layercard.report.trials import compared, grouped

    given = {name: _record(Placement, placement).to_json() for name, placement in (placements or {}).items()}
    names = {tuple(value["layers"]): called(name, value) for name, value in given.items()}
    runs = read_runs("comparison", comparison, "comparison")
    return figures.trade_off_figure(grouped(compared(runs), names), list(names.values()))


def _record(record: type[_R], value: Any) -> _R:
    return value if isinstance(value, record) else record.from_json(dict(value))


def _layers(card: LayerCard, chosen: Chosen) -> list[int]:
    """Layers to mark, checked against the card."""
    if isinstance(chosen, Placement | Mapping):
        placement = _record(Placement, chosen)
        card.check_model(placement.model)
        return list(placement.layers)
    layers = list(chosen)
    return list(check_layers(layers, card.model.layers)) if layers else []


def _check_name(what: str, name: str, names: Iterable[str]) -> None:
    names = list(names)
    if name not in names:
        raise ReportError(f"{what} {name!r} is not one of {', '.join(names)}; {suggestion(name, names)}")
