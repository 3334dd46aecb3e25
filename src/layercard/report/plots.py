"""The figures of the report, for notebooks.

```python
from layercard import LayerCard, plots, select

card = LayerCard.load("card.json")
plots.depth_profile(card, chosen=select(card, k=5))
```

Each function gives a plotly figure that equals the one in `layercard report`; show it, restyle it or write it as with any other. They take
objects of the library and the JSON values of their files alike, and check them as the commands do. plotly is loaded by the first call.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

from layercard.card.card import LayerCard
from layercard.cost.model import CostModel
from layercard.errors import CardError, PlacementError, ReportError
from layercard.files import shown
from layercard.selection.pareto import Front
from layercard.selection.placement import Placement, check_layers
from layercard.selection.transfer import Transfer, transfer

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Card = LayerCard | Mapping[str, Any]
"""A card, or the JSON value of its file."""
Chosen = Placement | Mapping[str, Any] | Iterable[int]
"""Layers to mark: a placement, the JSON value of its file, or block indices."""
CostKind = Literal["time", "memory", "reach"]
FrontCost = Literal["time", "memory"]

__all__ = ["cost_by_depth", "coupling", "depth_profile", "front", "heat_map", "trade_off", "transfer_matrix"]


def depth_profile(card: Card, measure: str = "gain_estimate", chosen: Chosen = ()) -> "Figure":
    """One measure over depth, with its 95 % interval as a band and the chosen layers as diamonds.

    Args:
        card: The card.
        measure: A measure that the card has (`docs/card.md`); values are in the unit that the card gives for it.
        chosen: Layers to mark.

    Raises:
        CardError: The card is not whole, lacks the measure, or is of another model than the placement.
        PlacementError: Layers that the model does not have.
    """
    from layercard.report import figures, frames

    found = _card(card)
    value = found.to_json()
    known = {one.key: one for one in frames.measured(value)}
    if measure not in known:
        raise CardError(f"the card has no measure {measure!r}{_meant(measure, known)}; it has {', '.join(known)}")
    return figures.depth_figure(value, known[measure], _layers(found, chosen))


def heat_map(card: Card, chosen: Chosen = ()) -> "Figure":
    """All measures of a card, one row each on its own scale, over the layers; exact values on hover, chosen layers marked above.

    Raises:
        CardError: The card is not whole, or is of another model than the placement.
        PlacementError: Layers that the model does not have.
    """
    from layercard.report import figures

    found = _card(card)
    return figures.heat_figure(found.to_json(), _layers(found, chosen))


def coupling(card: Card, chosen: Chosen = ()) -> "Figure":
    """The coupling matrix `ρ: [L, L]`, a correlation without unit; chosen layers are marked on the diagonal.

    Raises:
        CardError: The card is not whole, or is of another model than the placement.
        PlacementError: Layers that the model does not have.
    """
    from layercard.report import figures

    found = _card(card)
    return figures.coupling_figure(found.to_json(), _layers(found, chosen))


def cost_by_depth(card: Card, kind: CostKind = "time", chosen: Chosen = ()) -> "Figure":
    """What each layer costs in one training step.

    Args:
        card: A card with a cost; `card.with_cost(cost_of(card))` gives one that is estimated from shapes.
        kind: `time`: forward, backward and adapter of each layer, in ms, or in % of a step of all layers where only shapes are known.
            `memory`: what each layer keeps for backward, in MiB. `reach`: step time and peak memory when one layer alone is adapted,
            in % of all layers.
        chosen: Layers to mark; `reach` marks none.

    Raises:
        CardError: The card is not whole, has no cost, or is of another model than the placement.
        PlacementError: Layers that the model does not have.
        ReportError: Another kind.
    """
    from layercard.report import figures

    found = _card(card)
    layers = _layers(found, chosen)
    _one_of("kind", kind, get_args(CostKind))
    if found.cost is None:
        raise CardError("the card has no cost; profile again with --cost, or estimate it: card.with_cost(cost_of(card))")
    cost = CostModel.from_json(found.to_json()["cost"], "the card's cost")
    if kind == "reach":
        return figures.reach_figure(cost)
    return figures.cost_time_figure(cost, layers) if kind == "time" else figures.cost_memory_figure(cost, layers)


def front(
    front: Front | Mapping[str, Any], cost: FrontCost = "time", placements: Mapping[str, Placement | Mapping[str, Any]] | None = None
) -> "Figure":
    """Performance kept against one cost, both predicted and in % of all layers: least cost as a line, plain placements as points.

    Args:
        front: What `layercard.selection.pareto.pareto(card)` gives, or the JSON value of `layercard pareto -o front.json`.
        cost: `time` of a step or peak `memory`.
        placements: Placements to mark, by the names to show on hover.

    Raises:
        ReportError: The value is no front, or has not this cost.
        PlacementError: A placement that is not whole, or is of another model than the front.
    """
    from layercard.report import figures

    value = front.to_json() if isinstance(front, Front) else front
    named = {name: _placement(placement).to_json() for name, placement in (placements or {}).items()}
    with _whole(value, Front.schema_name(), "layercard pareto"):
        _one_of("cost", cost, value["fronts"])
        for name, placement in named.items():
            if placement["model"].get("fingerprint") != value["model"]["fingerprint"]:
                raise PlacementError(f"placement {name} is of {placement['model'].get('name')}, the front of {value['model']['name']}")
        return figures.front_figure(value, cost, named)


def transfer_matrix(cards: Transfer | Mapping[str, Any]) -> "Figure":
    """Spearman's rank correlation of the layers of every two cards, with the number in each cell.

    Args:
        cards: Several cards of one model by name, which are compared as `layercard transfer` does; or a comparison of these or the
            JSON value of `layercard transfer -o`, which are shown as they are.

    Raises:
        CardError: Fewer than two cards, cards of several models, or one that is not whole.
        ReportError: A JSON value that is no comparison of cards.
    """
    from layercard.report import figures

    if isinstance(cards, Transfer):
        return figures.transfer_figure(cards.to_json())
    if isinstance(cards.get("schema"), str):
        with _whole(cards, Transfer.schema_name(), "layercard transfer"):
            return figures.transfer_figure(cards)
    return figures.transfer_figure(transfer([(str(name), _card(card)) for name, card in cards.items()]).to_json())


def trade_off(comparison: Mapping[str, Any], placements: Mapping[str, Placement | Mapping[str, Any]] | None = None) -> "Figure":
    """Performance kept against training time, both measured and in % of all layers: one point a placement that was trained.

    Args:
        comparison: JSON value of `layercard compare` (`compare.json`) with a run of all layers.
        placements: Placements to mark and to name beside their points.

    Raises:
        ReportError: The value is no comparison, or not a whole one.
        PlacementError: A placement that is not whole.
    """
    from layercard.report import figures, parts
    from layercard.report.frames import COMPARISON
    from layercard.report.trials import compared, of_comparison, rows_of

    given = {name: _placement(placement).to_json() for name, placement in (placements or {}).items()}
    names = {tuple(value["layers"]): parts.called(name, value) for name, value in given.items()}
    with _whole(comparison, COMPARISON, "layercard compare"):
        return figures.trade_off_figure(rows_of(compared(of_comparison(comparison)), names), list(names.values()))


def _card(card: Card) -> LayerCard:
    return card if isinstance(card, LayerCard) else LayerCard.from_json(dict(card))


def _placement(placement: Placement | Mapping[str, Any]) -> Placement:
    return placement if isinstance(placement, Placement) else Placement.from_json(dict(placement))


def _layers(card: LayerCard, chosen: Chosen) -> list[int]:
    """Layers to mark, checked against the card."""
    if isinstance(chosen, Placement | Mapping):
        placement = _placement(chosen)
        card.check_model(placement.model)
        return list(placement.layers)
    layers = list(chosen)
    return list(check_layers(layers, card.model.layers)) if layers else []


@contextmanager
def _whole(value: Mapping[str, Any], schema: str, command: str) -> Iterator[None]:
    """Refuse a value of another schema, and one that turns out not to be whole."""
    if value.get("schema") != schema:
        raise ReportError(f"schema {shown(value.get('schema'))} is not {schema!r}; make the value with `{command}`")
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise ReportError(f"not a whole {schema} ({type(problem).__name__}: {problem}); make it again with `{command}`") from None


def _one_of(name: str, value: str, known: Iterable[str]) -> None:
    if value not in (names := list(known)):
        raise ReportError(f"{name} {value!r} is none of {', '.join(names)}{_meant(value, names)}")


def _meant(value: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(value), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
