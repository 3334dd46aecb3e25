"""Plotly figures of a card, a placement, runs, a front and a comparison of cards.

They carry no theme: the page that shows them colours text, grid and background. Colours are mid-tones that stand on white and on black
alike and that people tell apart who see no red or green; what matters is told by shape, dash or pattern too. Names come from files and
are escaped, since plotly reads some markup in text.
"""

import html
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from layercard.card.numbers import Json, listed, percent, profile_of, short
from layercard.cost.model import CostModel
from layercard.records import Estimate
from layercard.report.trials import TrialGroup
from layercard.report.words import Measure, bar_fractions, measured, with_interval

BLUE, ORANGE, GREY, GREEN, BAND = "#3b82f6", "#e07b00", "#8a929c", "#009e73", "rgba(59,130,246,0.22)"
EDGE = {"width": 1, "color": "white"}
PLAIN = {
    "last": ("triangle-up", ORANGE),
    "middle": ("square", GREY),
    "uniform": ("circle", ORANGE),
    "first": ("triangle-down", GREY),
    "all": ("star", GREY),
}
"""Plain placements: symbol and colour."""
COSTS = {"time": ("step_time", "step time"), "memory": ("peak_memory", "peak memory")}
"""For each front the key under which a point holds its cost, and what it is called."""
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
FLAT = 0.05
"""Part of the highest value below which a spread is shown as flat: a measure that is alike in all layers shall not look rugged."""
MARGIN = {"l": 56, "r": 14, "t": 10, "b": 44}


def _diamonds(size: int) -> dict[str, Any]:
    """The mark of chosen layers."""
    return {"size": size, "color": ORANGE, "symbol": "diamond", "line": EDGE}


def _escaped(text: object) -> str:
    """Text as plotly shows it, letter for letter."""
    return html.escape(str(text), quote=False)


def depth_figure(card: Json, measure: Measure, chosen: Collection[int] = ()) -> go.Figure:
    """One measure over depth, with its interval as a band and the chosen layers as diamonds."""
    values = profile_of(card, measure.key)
    points = [(layer, value) for layer, value in enumerate(values) if value is not None]
    figure = go.Figure()
    # The band's outline runs along the upper ends and back along the lower ones; a logarithmic axis has no place for ends below 0.
    band = [(layer, p.low, p.high) for layer, p in points if p.low is not None and p.high is not None and not (measure.wide and p.low <= 0)]
    if band:
        layers = [layer for layer, _, _ in band]
        outline = [high for _, _, high in band] + [low for _, low, _ in reversed(band)]
        edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        figure.add_scatter(x=layers + layers[::-1], y=outline, fill="toself", fillcolor=BAND, **edge)

    def drawn(some: Sequence[tuple[int, Estimate]]) -> dict[str, Any]:
        text = [f"layer {layer}: {with_interval(p)}" for layer, p in some]
        return {"x": [layer for layer, _ in some], "y": [p.value for _, p in some], "hovertext": text, "hoverinfo": "text"}

    figure.add_scatter(**drawn(points), mode="lines+markers", line={"color": BLUE, "width": 2}, marker={"size": 5, "color": BLUE})
    picked = [(layer, value) for layer, value in points if layer in chosen]
    if picked:
        figure.add_scatter(**drawn(picked), mode="markers", marker=_diamonds(11))
    axis: dict[str, Any] = {"type": "linear", "nticks": 6}
    positive = [value.value for _, value in points if value.value > 0]
    if measure.wide and positive:
        # A tick at each power of ten, and at 2 and 5 times these where there are few.
        steps = (1,) if max(positive) > 100 * min(positive) else (1, 2, 5)
        powers = range(math.floor(math.log10(min(positive))) - 1, math.floor(math.log10(max(positive))) + 2)
        ticks = [step * 10.0**power for power in powers for step in steps]
        axis = {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,.6g}" for tick in ticks]}
    figure.update_layout(showlegend=False, margin=MARGIN, hovermode="closest")
    figure.update_xaxes(title="layer, input to output", range=[-0.6, len(values) - 0.4], zeroline=False)
    figure.update_yaxes(**axis, zeroline=False)
    return figure


def heat_figure(card: Json, chosen: Sequence[int] = ()) -> go.Figure:
    """The card as a heat map, measures × layers: each measure on its own scale, exact values on hover, chosen layers marked above."""
    measures, depth = measured(card), len(card["layers"])
    shades, texts = [], []
    for measure in measures:
        values = profile_of(card, measure.key)
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
    figure = go.Figure()
    scale = {"colorscale": "Cividis", "zmin": 0, "zmax": 1, "xgap": 1, "ygap": 1}
    bar = {"thickness": 12, "tickvals": [0, 1], "ticktext": ["lowest", "highest"]}
    rows = list(range(len(measures)))
    figure.add_heatmap(z=shades, x=list(range(depth)), y=rows, hovertext=texts, hoverinfo="text", colorbar=bar, **scale)
    names = {row: measure.title for row, measure in enumerate(measures)}
    if chosen:
        names = {-1: "chosen", **names}
        labels = [f"layer {layer}, chosen" for layer in chosen]
        figure.add_scatter(x=list(chosen), y=[-1] * len(chosen), mode="markers", marker=_diamonds(10), hovertext=labels, hoverinfo="text")
    figure.update_layout(showlegend=False, margin={"l": 130, "r": 10, "t": 10, "b": 44})
    figure.update_xaxes(title="layer, input to output", showgrid=False, zeroline=False, range=[-0.6, depth - 0.4])
    ticks = {"tickvals": list(names), "ticktext": list(names.values())}
    figure.update_yaxes(**ticks, range=[len(measures) - 0.5, min(names, default=0) - 0.5], showgrid=False, zeroline=False)
    return figure


def coupling_figure(card: Json, chosen: Sequence[int] = ()) -> go.Figure:
    """The coupling matrix as a heat map; chosen layers are marked on the diagonal."""
    matrix = card["coupling"]
    scale: dict[str, Any] = {"colorscale": "Cividis", "zmin": 0, "zmax": 1}
    if any(value is not None and value < -0.05 for row in matrix for value in row):
        scale = {"colorscale": "RdBu", "zmin": -1, "zmax": 1, "reversescale": True}
    figure = go.Figure()
    figure.add_heatmap(z=matrix, **scale, hovertemplate="layers %{y} and %{x}: %{z:.3f}<extra></extra>", colorbar={"thickness": 12})
    if chosen:
        figure.add_scatter(x=list(chosen), y=list(chosen), mode="markers", marker=_diamonds(9), hoverinfo="skip", showlegend=False)
    return _square(figure, "layer", {"l": 56, "r": 10, "t": 10, "b": 44})


def transfer_figure(result: Json) -> go.Figure:
    """Rank correlation of every pair of cards, with the number in each cell."""
    names = [_escaped(card["name"]) for card in result["cards"]]
    figure = go.Figure()
    texts = {"texttemplate": "%{z:.2f}", "hovertemplate": "%{y} and %{x}: %{z:.3f}<extra></extra>"}
    scale = {"colorscale": "Cividis", "zmin": 0, "zmax": 1, "xgap": 2, "ygap": 2, "colorbar": {"thickness": 12}}
    figure.add_heatmap(z=result["matrix"], x=names, y=names, **scale, **texts)
    return _square(figure, "", {"l": 90, "r": 10, "t": 10, "b": 50})


def _square(figure: go.Figure, title: str, margin: dict[str, int]) -> go.Figure:
    figure.update_layout(margin=margin)
    plain = {"title": title, "constrain": "domain", "showgrid": False, "zeroline": False}
    figure.update_xaxes(**plain)
    figure.update_yaxes(**plain, scaleanchor="x", autorange="reversed")
    return figure


def cost_time_figure(cost: CostModel, chosen: Collection[int] = ()) -> go.Figure:
    """Time of each layer in one step: forward, backward and adapter, stacked."""
    scale, unit = (1e3, "ms") if cost.absolute else (100.0, "% of a step of all layers")
    names = {"forward": ("forward_seconds", GREY, ""), "backward": ("backward_seconds", BLUE, "/")}
    return _stacked(cost, names | {"adapter": ("adapter_seconds", ORANGE, "x")}, scale, f"time, {unit}", chosen)


def cost_memory_figure(cost: CostModel, chosen: Collection[int] = ()) -> go.Figure:
    """What each layer keeps from forward to backward, stacked: for the block itself and for its adapters."""
    parts = {"block": ("saved_bytes", BLUE, ""), "adapter": ("adapter_saved_bytes", ORANGE, "x")}
    return _stacked(cost, parts, 2**-20, "kept for backward, MiB", chosen)


def _stacked(cost: CostModel, parts: Mapping[str, tuple[str, str, str]], scale: float, title: str, chosen: Collection[int]) -> go.Figure:
    """Bars of each layer; for each part its key in the cost of a layer, its colour and its pattern."""
    figure, layers = go.Figure(), list(range(len(cost.layers)))
    for name, (key, colour, shape) in parts.items():
        values = [scale * getattr(layer, key) for layer in cost.layers]
        pattern = {"shape": shape, "fgcolor": "rgba(255,255,255,0.75)", "size": 5, "solidity": 0.25, "fillmode": "overlay"}
        hover = [f"layer {layer}, {name}: {short(value)}" for layer, value in zip(layers, values, strict=True)]
        figure.add_bar(x=layers, y=values, name=name, marker={"color": colour, "pattern": pattern}, hovertext=hover, hoverinfo="text")
    if chosen:
        tops = [scale * sum(getattr(cost.layers[layer], key) for key, _, _ in parts.values()) for layer in chosen]
        figure.add_scatter(x=list(chosen), y=tops, mode="markers", name="chosen", marker=_diamonds(9), hoverinfo="skip")
    figure.update_layout(barmode="stack", bargap=0.15, margin=MARGIN, legend=LEGEND)
    figure.update_xaxes(title="layer, input to output", zeroline=False)
    figure.update_yaxes(title=title, zeroline=False, rangemode="tozero")
    return figure


def reach_figure(cost: CostModel) -> go.Figure:
    """Step time and peak memory with one adapted layer, in % of all layers: what it costs that backward reaches so far down."""
    figure, every = go.Figure(), range(len(cost.layers))
    lines = (("step time", cost.step_time, BLUE, "solid", "circle"), ("peak memory", cost.peak_memory, ORANGE, "dash", "square"))
    for name, of, colour, dash, symbol in lines:
        values = [100 * of([layer]) / of(every) for layer in every]
        hover = [f"only layer {layer}: {value:.1f} % of the {name} of all layers" for layer, value in zip(every, values, strict=True)]
        style = {"mode": "lines+markers", "line": {"color": colour, "dash": dash, "width": 2}, "marker": {"size": 5, "symbol": symbol}}
        figure.add_scatter(x=list(every), y=values, name=name, hovertext=hover, hoverinfo="text", **style)
    figure.update_layout(margin=MARGIN, legend=LEGEND)
    figure.update_xaxes(title="the one adapted layer", zeroline=False)
    figure.update_yaxes(title="% of all layers", zeroline=False, rangemode="tozero")
    return figure


def front_figure(front: Json, name: str, placements: Mapping[str, Json] | None = None) -> go.Figure:
    """Performance kept against one cost, both predicted: the front as a line, plain placements and the reader's own as points."""
    key, title = COSTS[name]
    figure = go.Figure()

    def add(points: Sequence[tuple[str, Json]], name: str, style: dict[str, Any], *, errors: bool = False) -> None:
        pairs = [(label, point, Estimate.read(point.get("performance_kept"))) for label, point in points]
        drawn = [(label, point, performance) for label, point, performance in pairs if performance is not None and point.get(key)]
        if drawn or errors:
            x = [100 * point[key]["share"] for _, point, _ in drawn]
            hover = [f"{label}: {percent(performance)}" for label, _, performance in drawn]
            bars = {"error_y": _error([performance for _, _, performance in drawn], 100)} if errors else {}
            y = [100 * performance.value for _, _, performance in drawn]
            figure.add_scatter(x=x, y=y, name=name, hovertext=hover, hoverinfo="text", **style, **bars)

    line = {"mode": "lines+markers", "line": {"color": BLUE, "width": 2}, "marker": {"size": 7, "color": BLUE}}
    add([(f"layers {listed(point['layers'], ' ')}", point) for point in front["fronts"][name]], "least cost", line, errors=True)
    given = [(_escaped(label), placement["predicted"]) for label, placement in (placements or {}).items() if placement.get("predicted")]
    plain = [(str(point["name"]), point) for point in front["baselines"]]
    groups = [
        (strategy, [(_escaped(label), point) for label, point in plain if label.partition("-")[0] == strategy], *style, 9)
        for strategy, style in PLAIN.items()
    ]
    for group, points, symbol, colour, size in [*groups, ("given", given, "diamond", GREEN, 14)]:
        add(points, group, {"mode": "markers", "marker": {"size": size, "color": colour, "symbol": symbol, "line": EDGE}})
    return _performance(figure, f"{title}, % of all layers")


def trade_off_figure(groups: Sequence[TrialGroup], named: Collection[str]) -> go.Figure:
    """Performance kept against training time, both measured: one point a placement; those of `named` are marked."""
    figure = go.Figure()
    points = [(group, group.time_share, group.performance_kept) for group in groups]
    drawn = [(group, time, performance) for group, time, performance in points if time is not None and performance is not None]

    def kind(group: TrialGroup) -> str:
        plain = group.name.partition(" ")[0].partition("-")[0].partition(":")[0]
        return plain if plain in PLAIN else "given" if group.name in named else "others"

    styles = {"given": ("diamond", GREEN, 14), **{name: (*style, 11) for name, style in PLAIN.items()}, "others": ("circle-open", BLUE, 8)}
    for name, (symbol, colour, size) in styles.items():
        members = [(group.name, time, performance) for group, time, performance in drawn if kind(group) == name]
        if members:
            figure.add_scatter(
                x=[time.value for _, time, _ in members],
                y=[performance.value for _, _, performance in members],
                error_y=_error([performance for _, _, performance in members]) | {"color": colour},
                name=name,
                mode="markers",
                marker={"size": size, "color": colour, "symbol": symbol, "line": EDGE},
                text=[label for label, _, _ in members],
                hovertext=[f"{_escaped(label)}: {short(performance.value)} % kept" for label, _, performance in members],
                hoverinfo="text",
            )
    figure.add_hline(y=100, line={"dash": "dot", "color": GREY, "width": 1})
    return _performance(figure, "training time, % of all layers")


def _error(estimates: Sequence[Estimate], scale: float = 1.0) -> dict[str, Any]:
    above = [scale * (estimate.high - estimate.value) if estimate.high is not None else 0 for estimate in estimates]
    below = [scale * (estimate.value - estimate.low) if estimate.low is not None else 0 for estimate in estimates]
    return {"array": above, "arrayminus": below, "thickness": 1, "width": 3}


def _performance(figure: go.Figure, cost: str) -> go.Figure:
    figure.update_layout(margin=MARGIN, hovermode="closest", legend=LEGEND)
    figure.update_xaxes(title=cost, zeroline=False)
    figure.update_yaxes(title="performance kept, %", zeroline=False)
    return figure
