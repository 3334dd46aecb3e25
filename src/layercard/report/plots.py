"""The figures of the report, for notebooks too.

```python
from layercard import LayerCard, plots, select

card = LayerCard.load("card.json")
plots.depth_profile(card, chosen=select(card, k=5))
```

Each function gives a plotly figure; show it, restyle it or write it as with any other. They take objects of the library and the JSON values
of their files alike, and check them as the commands do: a broken one, or one of another model, raises the error of its kind (`CardError`,
`PlacementError`, `SelectionError`); an unknown name raises `ReportError`, and `chosen` layers outside the model `PlacementError`. plotly is
loaded by the first call.

Figures carry no theme: the page that shows them colours text, grid and background. Colours are mid-tones that stand on white and on black
alike and that people tell apart who see no red or green; what matters is told by shape, dash or pattern too. Names come from files and are
escaped, since plotly reads some markup in text.
"""

import html
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from layercard.card.card import LayerCard
from layercard.card.numbers import listed, percent, short, with_interval
from layercard.errors import CardError, PlacementError, ReportError, suggestion, visible
from layercard.records import Estimate, Record
from layercard.report.sources import called
from layercard.report.trials import TrialGroup, compared, grouped, of_comparison
from layercard.report.words import bar_fractions, measured
from layercard.selection.pareto import Front
from layercard.selection.placement import Placement, check_layers
from layercard.selection.transfer import Transfer, transfer
from layercard.trials.records import Comparison

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Card = LayerCard | Mapping[str, Any]
"""A card, or the JSON value of its file."""
Chosen = Placement | Mapping[str, Any] | Iterable[int]
"""Layers to mark: a placement, the JSON value of its file, or block indices."""
Placements = Mapping[str, Placement] | Mapping[str, Mapping[str, Any]]
"""Placements, or the JSON values of their files, by the names to show."""
CostKind = Literal["time", "memory", "reach"]
FrontCost = Literal["time", "memory"]

__all__ = ["cost_by_depth", "coupling", "depth_profile", "front", "heat_map", "trade_off", "transfer_matrix"]
_R = TypeVar("_R", bound=Record)

BLUE, ORANGE, GREY, GREEN, BAND = "#3b82f6", "#e07b00", "#8a929c", "#009e73", "rgba(59,130,246,0.22)"
EDGE = {"width": 1, "color": "white"}
PLAIN = {
    "last": ("triangle-up", ORANGE),
    "middle": ("square", GREY),
    "uniform": ("circle", ORANGE),
    "first": ("triangle-down", GREY),
    "all": ("hexagon", GREY),
}
"""Plain placements: symbol and colour."""
COSTS = {"time": ("step_time", "step time"), "memory": ("peak_memory", "peak memory")}
"""For each front the key under which a point holds its cost, and what it is called."""
STACKED = {
    "time": {
        "forward": ("forward_seconds", GREY, ""),
        "backward": ("backward_seconds", BLUE, "/"),
        "adapter": ("adapter_seconds", ORANGE, "x"),
    },
    "memory": {"block": ("saved_bytes", BLUE, ""), "adapter": ("adapter_saved_bytes", ORANGE, "x")},
}
"""The parts of a layer's cost that are stacked: key in the cost of a layer, colour and pattern."""
FLAT = 0.05
"""Part of the highest value below which a spread is shown as flat: a measure that is alike in all layers shall not look rugged."""


def depth_profile(card: Card, measure: str = "gain_estimate", chosen: Chosen = ()) -> "Figure":
    """One measure over depth (`docs/card.md` lists them), with its 95 % interval as a band and the chosen layers as stars.

    Values are in the unit that the card gives for the measure.

    Raises:
        CardError: The card does not have the measure.
    """
    card = _record(LayerCard, card)
    layers, measures = _layers(card, chosen), {entry.key: entry for entry in measured(card)}
    if measure not in measures:
        raise CardError(f"the card has no measure {measure!r}; it has {', '.join(measures)}; {suggestion(measure, measures)}")
    logarithmic = measures[measure].wide
    points = [(layer, value) for layer, value in enumerate(card.profile(measure)) if value is not None]
    positive = [value.value for _, value in points if value.value > 0]
    axis: dict[str, Any] = {"type": "linear", "nticks": 6}
    if logarithmic and positive:
        # A tick at each power of ten, and at 2 and 5 times these where there are few.
        steps = (1,) if max(positive) > 100 * min(positive) else (1, 2, 5)
        powers = range(math.floor(math.log10(min(positive))) - 1, math.floor(math.log10(max(positive))) + 2)
        ticks = [step * 10.0**power for power in powers for step in steps]
        axis = {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,.6g}" for tick in ticks]}
    x_axis = {"title": "layer, input to output", "range": [-0.6, card.model.layers - 0.4]}
    figure = _figure(x_axis, axis, showlegend=False, hovermode="closest")
    # The band's outline runs along the upper ends and back along the lower ones; a logarithmic axis has no place for ends below 0.
    band = [(layer, p.low, p.high) for layer, p in points if p.low is not None and p.high is not None and not (logarithmic and p.low <= 0)]
    if band:
        outline = [high for _, _, high in band] + [low for _, low, _ in reversed(band)]
        along = [layer for layer, _, _ in band]
        edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        figure.add_scatter(x=along + along[::-1], y=outline, fill="toself", fillcolor=BAND, **edge)

    line = {"mode": "lines+markers", "line": {"color": BLUE, "width": 2}, "marker": {"size": 5, "color": BLUE}}
    for part, style in ((points, line), ([point for point in points if point[0] in layers], {"mode": "markers", "marker": _star(13)})):
        if part:
            hover = [f"layer {layer}: {with_interval(value)}" for layer, value in part]
            xy = {"x": [layer for layer, _ in part], "y": [value.value for _, value in part]}
            figure.add_scatter(**xy, **style, hovertext=hover, hoverinfo="text")
    return figure


def heat_map(card: Card, chosen: Chosen = ()) -> "Figure":
    """All measures of a card, one row each on its own scale, over the layers; exact values on hover, chosen layers marked above."""
    card = _record(LayerCard, card)
    layers, measures, depth = _layers(card, chosen), measured(card), card.model.layers
    shades, texts = [], []
    for measure in measures:
        values = card.profile(measure.key)
        fractions = bar_fractions(values, wide=measure.wide)
        lowest = min((shade for shade in fractions if shade is not None), default=0.0)
        span = max(1 - lowest, FLAT)
        shades.append([None if shade is None else round((shade - lowest) / span, 4) for shade in fractions])
        words = []
        for layer, value in enumerate(values):
            text = "not measured" if value is None else f"{value.value:.6g}"
            if value is not None and value.low is not None and value.high is not None:
                text += f"<br>{value.low:.6g} to {value.high:.6g}"
            words.append(f"layer {layer}, {measure.title.lower()}: {text}")
        texts.append(words)
    names = ({-1: "chosen"} if layers else {}) | {row: measure.title for row, measure in enumerate(measures)}
    figure = _figure(
        {"title": "layer, input to output", "showgrid": False, "range": [-0.6, depth - 0.4]},
        {"tickvals": list(names), "ticktext": list(names.values()), "range": [len(measures) - 0.5, min(names) - 0.5], "showgrid": False},
        margin={"l": 146, "r": 10, "t": 10, "b": 44},
        showlegend=False,
    )
    scale = {"colorscale": "Cividis", "zmin": 0, "zmax": 1, "xgap": 1, "ygap": 1, "showscale": False}
    rows = list(range(len(measures)))
    figure.add_heatmap(z=shades, x=list(range(depth)), y=rows, hovertext=texts, hoverinfo="text", **scale)
    if layers:
        hover = [f"layer {layer}, chosen" for layer in layers]
        figure.add_scatter(x=layers, y=[-1] * len(layers), mode="markers", marker=_star(12), hovertext=hover, hoverinfo="text")
    return figure


def coupling(card: Card, chosen: Chosen = ()) -> "Figure":
    """The coupling matrix `ρ: [L, L]`, a correlation without unit; chosen layers are marked on the diagonal."""
    card = _record(LayerCard, card)
    layers, scale = _layers(card, chosen), {"colorscale": "Cividis", "zmin": 0, "zmax": 1}
    if min(map(min, card.coupling)) < -0.05:
        scale = {"colorscale": "RdBu", "zmin": -1, "zmax": 1, "reversescale": True}
    # Four digits are more than a colour or a hover shows, and make a page of a deep model three times smaller.
    values = [[round(value, 4) for value in row] for row in card.coupling]
    figure = _square("layer", 56, 44)
    figure.add_heatmap(z=values, **scale, hovertemplate="layers %{y} and %{x}: %{z:.3f}<extra></extra>", colorbar={"thickness": 12})
    if layers:
        figure.add_scatter(x=layers, y=layers, mode="markers", marker=_star(11), hoverinfo="skip", showlegend=False)
    return figure


def transfer_matrix(cards: Transfer | Mapping[str, Any]) -> "Figure":
    """Spearman's rank correlation of the layers of every two cards, with the number in each cell.

    Args:
        cards: Several cards of one model by name, which are compared as `layercard transfer` does; or a comparison of these or the
            JSON value of `layercard transfer -o`, which are shown as they are.

    Raises:
        CardError: Fewer than two cards, or cards of several models.
    """
    if isinstance(cards, Transfer) or isinstance(cards.get("schema"), str):
        result = _record(Transfer, cards)
    else:
        result = transfer([(str(name), _record(LayerCard, card)) for name, card in cards.items()])
    names = [_escaped(card["name"]) for card in result.cards]
    figure = _square("", 90, 50)
    texts = {"texttemplate": "%{z:.2f}", "hovertemplate": "%{y} and %{x}: %{z:.3f}<extra></extra>"}
    scale = {"colorscale": "Cividis", "zmin": 0, "zmax": 1, "xgap": 2, "ygap": 2, "colorbar": {"thickness": 12}}
    figure.add_heatmap(z=result.matrix, x=names, y=names, **scale, **texts)
    return figure


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
    card = _record(LayerCard, card)
    layers, cost = _layers(card, chosen), card.cost
    _check_name("kind", kind, get_args(CostKind))
    if cost is None:
        raise CardError("the card has no cost; profile again with --cost, or estimate it: card.with_cost(cost_of(card))")
    every = list(range(len(cost.layers)))
    if kind == "reach":
        figure = _figure({"title": "the one adapted layer"}, {"title": "% of all layers", "rangemode": "tozero"}, legend=True)
        lines = (("step time", cost.step_time, BLUE, "solid", "circle"), ("peak memory", cost.peak_memory, ORANGE, "dash", "square"))
        for name, of, colour, dash, symbol in lines:
            values = [100 * of([layer]) / of(every) for layer in every]
            hover = [f"only layer {layer}: {value:.1f} % of the {name} of all layers" for layer, value in zip(every, values, strict=True)]
            style = {"mode": "lines+markers", "line": {"color": colour, "dash": dash, "width": 2}, "marker": {"size": 5, "symbol": symbol}}
            figure.add_scatter(x=every, y=values, name=name, hovertext=hover, hoverinfo="text", **style)
        return figure
    scale, title = (2.0**-20, "kept for backward, MiB") if kind == "memory" else (1e3, "time, ms")
    if kind == "time" and not cost.absolute:
        scale, title = 100.0, "time, % of a step of all layers"
    y_axis = {"title": title, "rangemode": "tozero"}
    figure = _figure({"title": "layer, input to output"}, y_axis, legend=True, barmode="stack", bargap=0.15)
    for name, (key, colour, shape) in STACKED[kind].items():
        values = [scale * getattr(layer, key) for layer in cost.layers]
        pattern = {"shape": shape, "fgcolor": "rgba(255,255,255,0.75)", "size": 5, "solidity": 0.25, "fillmode": "overlay"}
        hover = [f"layer {layer}, {name}: {short(value)}" for layer, value in zip(every, values, strict=True)]
        figure.add_bar(x=every, y=values, name=name, marker={"color": colour, "pattern": pattern}, hovertext=hover, hoverinfo="text")
    if layers:
        tops = [scale * sum(getattr(cost.layers[layer], key) for key, _, _ in STACKED[kind].values()) for layer in layers]
        figure.add_scatter(x=layers, y=tops, mode="markers", name="chosen", marker=_star(11), hoverinfo="skip")
    return figure


def front(front: Front | Mapping[str, Any], cost: FrontCost = "time", placements: Placements | None = None) -> "Figure":
    """Performance kept against one cost, both predicted and in % of all layers: least cost as a line, plain placements as points.

    Args:
        front: What `layercard.selection.pareto.pareto(card)` gives, or the JSON value of `layercard pareto -o front.json`.
        cost: `time` of a step or peak `memory`.
        placements: Placements to mark, by the names to show on hover.
    """
    front = _record(Front, front)
    _check_name("cost", cost, front.fronts)
    named = {name: _record(Placement, placement) for name, placement in (placements or {}).items()}
    for name, placement in named.items():
        if placement.model.get("fingerprint") != front.model.get("fingerprint"):
            raise PlacementError(f"placement {name} is of {placement.model.get('name')}, the front of {front.model.get('name')}")
    key, title = COSTS[cost]
    least = [(f"layers {listed(point['layers'], ' ')}", point) for point in front.fronts[cost]]
    plain = {name: [(str(each["name"]), each) for each in front.baselines if _kind(str(each["name"])) == name] for name in PLAIN}
    given = [(name, placement.predicted) for name, placement in named.items()]
    figure = _figure({"title": f"{title}, % of all layers"}, {"title": "performance kept, %"}, legend=True, hovermode="closest")
    for name, points in {"least cost": least, **plain, "given": given}.items():
        estimates = [(label, point, Estimate.read(point.get("performance_kept"))) for label, point in points]
        drawn = [
            (label, 100 * point[key]["share"], performance.divided_by(0.01))
            for label, point, performance in estimates
            if performance and point.get(key)
        ]
        if name == "least cost":
            _add_points(figure, name, drawn, "circle", BLUE, 7, mode="lines+markers", line={"color": BLUE, "width": 2})
        elif drawn:
            symbol, colour = PLAIN.get(name, ("star", GREEN))
            _add_points(figure, name, drawn, symbol, colour, 9 if name in PLAIN else 14, error_y=None)
    return figure


def trade_off(comparison: Comparison | Mapping[str, Any], placements: Placements | None = None) -> "Figure":
    """Performance kept against training time, both measured and in % of all layers: one point a placement that was trained.

    Args:
        comparison: What `layercard compare` gives, or the JSON value of its `compare.json`, with a run of all layers.
        placements: Placements to mark and to name beside their points.

    Raises:
        TrainingError: The value is not a whole comparison.
    """
    given = {name: _record(Placement, placement) for name, placement in (placements or {}).items()}
    names = {placement.layers: called(name, placement) for name, placement in given.items()}
    return trade_off_of(grouped(compared(of_comparison(_record(Comparison, comparison))), names), list(names.values()))


def trade_off_of(groups: Sequence[TrialGroup], named: Collection[str]) -> "Figure":
    """The figure of `trade_off` from trained placements; those of `named` are marked."""
    figure = _figure({"title": "training time, % of all layers"}, {"title": "performance kept, %"}, legend=True, hovermode="closest")
    styles = {"given": ("star", GREEN, 15), **{name: (*style, 11) for name, style in PLAIN.items()}, "others": ("circle-open", BLUE, 8)}
    drawn: dict[str, list[tuple[str, float, Estimate]]] = {name: [] for name in styles}
    for group in groups:
        if group.time_share and group.performance_kept:
            kind = _kind(group.name)
            kind = kind if kind in PLAIN else "given" if group.name in named else "others"
            drawn[kind].append((group.name, group.time_share.value, group.performance_kept))
    for name, points in drawn.items():
        if points:
            _add_points(figure, name, points, *styles[name])
    figure.add_hline(y=100, line={"dash": "dot", "color": GREY, "width": 1})
    return figure


def loss_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], all_layers: tuple[float, Estimate] | None = None
) -> "Figure":
    """Loss against training time: for each name seconds within steps, and losses in nats per labelled token.

    `all_layers` is where training all layers is estimated to end.
    """
    figure = _figure({"title": "training time, s"}, {"title": "loss, nats per token"}, legend=True, hovermode="closest")
    styles = zip((GREEN, GREY, ORANGE, BLUE, GREEN, GREY), ("solid", "dash", "dot", "dashdot", "longdash", "solid"), strict=True)
    for (name, (seconds, losses)), (colour, dash) in zip(curves.items(), styles, strict=False):
        line = {"color": colour, "dash": dash, "width": 2}
        figure.add_scatter(x=list(seconds), y=list(losses), name=_escaped(name), mode="lines", line=line)
    if all_layers is not None:
        end, loss = all_layers
        bars = {"array": [(loss.high or loss.value) - loss.value], "arrayminus": [loss.value - (loss.low or loss.value)], "color": GREY}
        marker = {"symbol": "hexagon", "size": 11, "color": GREY}
        figure.add_scatter(x=[end], y=[loss.value], name="all layers, estimated", mode="markers", marker=marker, error_y=bars)
    return figure


def _figure(x_axis: dict[str, Any], y_axis: dict[str, Any], *, legend: bool = False, **layout: Any) -> "Figure":
    """An empty figure; with `legend` names stand above it."""
    from plotly.graph_objects import Figure

    figure = Figure()
    figure.update_layout(**{"margin": {"l": 56, "r": 14, "t": 10, "b": 44}, **layout})
    if legend:
        figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    figure.update_xaxes(zeroline=False, **x_axis)
    figure.update_yaxes(zeroline=False, **y_axis)
    return figure


def _square(title: str, left: int, bottom: int) -> "Figure":
    axis = {"title": title, "constrain": "domain", "showgrid": False}
    margin = {"l": left, "r": 10, "t": 10, "b": bottom}
    return _figure(axis, axis | {"scaleanchor": "x", "autorange": "reversed"}, margin=margin)


def _kind(name: str) -> str:
    """The strategy in the name of a placement: `last` of `last-5`, `last 5` and `last: …`."""
    return name.partition(" ")[0].partition("-")[0].partition(":")[0]


def _add_points(
    figure: "Figure", name: str, points: Sequence[tuple[str, float, Estimate]], symbol: str, colour: str, size: int, **style: Any
) -> None:
    """Placements as points of one colour, each with its label, its cost and what it keeps, both in %."""
    performance = [estimate for _, _, estimate in points]
    above = [estimate.high - estimate.value if estimate.high is not None else 0 for estimate in performance]
    below = [estimate.value - estimate.low if estimate.low is not None else 0 for estimate in performance]
    options = {
        "mode": "markers",
        "marker": {"size": size, "color": colour, "symbol": symbol, "line": EDGE},
        "error_y": {"array": above, "arrayminus": below, "thickness": 1, "width": 3, "color": colour},
    }
    figure.add_scatter(
        x=[cost for _, cost, _ in points],
        y=[estimate.value for estimate in performance],
        name=name,
        text=[_escaped(label) for label, _, _ in points],
        hovertext=[f"{_escaped(label)}: {percent(estimate.divided_by(100))} kept" for label, _, estimate in points],
        hoverinfo="text",
        **options | style,
    )


def _star(size: int) -> dict[str, Any]:
    """The mark of chosen layers."""
    return {"size": size, "color": ORANGE, "symbol": "star", "line": EDGE}


def _escaped(text: object) -> str:
    """Text as plotly shows it, letter for letter."""
    return html.escape(visible(str(text)), quote=False)


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
