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

from layercard.card.numbers import Json, interval, listed, percent, profile_of, short
from layercard.cost.model import CostModel
from layercard.records import Estimate
from layercard.report.frames import Measure, bar_fractions, measured
from layercard.report.trials import Row

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
"""For each front where a point says its cost, and what it is called."""
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
FLAT = 0.05
"""Part of the highest value below which a spread is shown as flat: a measure that is alike in all layers shall not look rugged."""
MARGIN = {"l": 56, "r": 14, "t": 10, "b": 44}


def plain(text: object) -> str:
    """Text as plotly shows it, letter for letter."""
    return html.escape(str(text), quote=False)


def depth_figure(card: Json, measure: Measure, chosen: Collection[int] = ()) -> go.Figure:
    """One quantity over depth, with its interval as a band and the chosen layers as diamonds."""
    values = profile_of(card, measure.key)
    figure = go.Figure()
    known = [(layer, found) for layer, found in enumerate(values) if found is not None]
    band = [(layer, f.low, f.high) for layer, f in known if f.low is not None and f.high is not None and not (measure.wide and f.low <= 0)]
    if band:
        layers = [layer for layer, _, _ in band]
        outline = [high for _, _, high in band] + [low for _, low, _ in reversed(band)]
        figure.add_scatter(
            x=layers + layers[::-1], y=outline, fill="toself", fillcolor=BAND, line={"width": 0}, mode="lines", hoverinfo="skip"
        )
    figure.add_scatter(**_points(known), mode="lines+markers", line={"color": BLUE, "width": 2}, marker={"size": 5, "color": BLUE})
    picked = [(layer, found) for layer, found in known if layer in chosen]
    if picked:
        marker = {"size": 11, "color": ORANGE, "symbol": "diamond", "line": EDGE}
        figure.add_scatter(**_points(picked), mode="markers", marker=marker)
    figure.update_layout(showlegend=False, margin=MARGIN, hovermode="closest")
    figure.update_xaxes(title="layer, input to output", range=[-0.6, len(values) - 0.4], zeroline=False)
    figure.update_yaxes(**_scale(values, measure), zeroline=False)
    return figure


def _scale(values: Sequence[Estimate | None], measure: Measure) -> dict[str, Any]:
    """A linear axis, or a logarithmic one with a tick at each power of ten, and at 2 and 5 times these where there are few."""
    positive = [found.value for found in values if found is not None and found.value > 0]
    if not measure.wide or not positive:
        return {"type": "linear", "nticks": 6}
    steps = (1,) if max(positive) > 100 * min(positive) else (1, 2, 5)
    powers = range(math.floor(math.log10(min(positive))) - 1, math.floor(math.log10(max(positive))) + 2)
    ticks = [step * 10.0**power for power in powers for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,.6g}" for tick in ticks]}


def _points(known: Sequence[tuple[int, Estimate]]) -> dict[str, object]:
    text = [f"layer {layer}: {short(found.value)}{f' ({interval(found)})' if interval(found) else ''}" for layer, found in known]
    return {
        "x": [layer for layer, _ in known],
        "y": [found.value for _, found in known],
        "hovertext": text,
        "hoverinfo": "text",
    }


def heat_figure(card: Json, chosen: Sequence[int] = ()) -> go.Figure:
    """The card as a heat map, measures × layers: each measure on its own scale, exact values on hover, chosen layers marked above."""
    columns = measured(card)
    shades, texts = [], []
    for measure in columns:
        values = profile_of(card, measure.key)
        fractions = bar_fractions(values, wide=measure.wide)
        lowest = min((shade for shade in fractions if shade is not None), default=0.0)
        span = max(1 - lowest, FLAT)
        shades.append([None if shade is None else round((shade - lowest) / span, 4) for shade in fractions])
        texts.append([_cell_text(measure.title, layer, found) for layer, found in enumerate(values)])
    figure = go.Figure()
    figure.add_heatmap(
        z=shades,
        x=list(range(len(card["layers"]))),
        y=list(range(len(columns))),
        hovertext=texts,
        hoverinfo="text",
        colorscale="Cividis",
        zmin=0,
        zmax=1,
        xgap=1,
        ygap=1,
        colorbar={"thickness": 12, "tickvals": [0, 1], "ticktext": ["lowest", "highest"]},
    )
    if chosen:
        marker = {"symbol": "diamond", "size": 10, "color": ORANGE, "line": EDGE}
        words = [f"layer {layer}, chosen" for layer in chosen]
        figure.add_scatter(x=list(chosen), y=[-1] * len(chosen), mode="markers", marker=marker, hovertext=words, hoverinfo="text")
    figure.update_layout(showlegend=False, margin={"l": 130, "r": 10, "t": 10, "b": 44})
    figure.update_xaxes(title="layer, input to output", showgrid=False, zeroline=False, range=[-0.6, len(card["layers"]) - 0.4])
    names = [(-1, "chosen")] * bool(chosen) + [(at, measure.title) for at, measure in enumerate(columns)]
    rows = {"tickvals": [at for at, _ in names], "ticktext": [name for _, name in names]}
    figure.update_yaxes(**rows, range=[len(columns) - 0.5, names[0][0] - 0.5], showgrid=False, zeroline=False)
    return figure


def _cell_text(title: str, layer: int, found: Estimate | None) -> str:
    if found is None:
        return f"layer {layer}, {title.lower()}: not measured"
    between = "" if found.low is None or found.high is None else f"<br>{found.low:.6g} to {found.high:.6g}"
    return f"layer {layer}, {title.lower()}: {found.value:.6g}{between}"


def coupling_figure(card: Json, chosen: Sequence[int] = ()) -> go.Figure:
    """The coupling matrix as a heat map; chosen layers are marked on both axes."""
    matrix = card["coupling"]
    signed = any(value is not None and value < -0.05 for row in matrix for value in row)
    scale = (
        {"colorscale": "RdBu", "zmin": -1, "zmax": 1, "reversescale": True} if signed else {"colorscale": "Cividis", "zmin": 0, "zmax": 1}
    )
    figure = go.Figure()
    figure.add_heatmap(z=matrix, **scale, hovertemplate="layers %{y} and %{x}: %{z:.3f}<extra></extra>", colorbar={"thickness": 12})
    if chosen:
        marker = {"symbol": "diamond", "size": 9, "color": ORANGE, "line": EDGE}
        figure.add_scatter(x=list(chosen), y=list(chosen), mode="markers", marker=marker, hoverinfo="skip", showlegend=False)
    _square(figure, "layer", "layer")
    return figure


def _square(figure: go.Figure, across: str, down: str) -> None:
    figure.update_layout(margin={"l": 56, "r": 10, "t": 10, "b": 44})
    figure.update_xaxes(title=across, constrain="domain", showgrid=False, zeroline=False)
    figure.update_yaxes(title=down, scaleanchor="x", autorange="reversed", constrain="domain", showgrid=False, zeroline=False)


def cost_time_figure(cost: CostModel, chosen: Collection[int] = ()) -> go.Figure:
    """Time of each layer in one step: forward, backward and adapter, stacked."""
    scale, unit = (1e3, "ms") if cost.absolute else (100.0, "% of a step of all layers")
    parts = (
        ("forward", "forward_seconds", GREY, ""),
        ("backward", "backward_seconds", BLUE, "/"),
        ("adapter", "adapter_seconds", ORANGE, "x"),
    )
    return _stacked(cost, parts, scale, f"time, {unit}", chosen)


def cost_memory_figure(cost: CostModel, chosen: Collection[int] = ()) -> go.Figure:
    """What each layer keeps from forward to backward, stacked: for the block itself and for its adapters."""
    parts = (("block", "saved_bytes", BLUE, ""), ("adapter", "adapter_saved_bytes", ORANGE, "x"))
    return _stacked(cost, parts, 2**-20, "kept for backward, MiB", chosen)


def _stacked(
    cost: CostModel, parts: Sequence[tuple[str, str, str, str]], scale: float, title: str, chosen: Collection[int] = ()
) -> go.Figure:
    figure, layers = go.Figure(), list(range(len(cost.layers)))
    for name, key, colour, shape in parts:
        values = [scale * getattr(layer, key) for layer in cost.layers]
        pattern = {"shape": shape, "fgcolor": "rgba(255,255,255,0.75)", "size": 5, "solidity": 0.25, "fillmode": "overlay"}
        hover = [f"layer {layer}, {name}: {short(value)}" for layer, value in zip(layers, values, strict=True)]
        figure.add_bar(x=layers, y=values, name=name, marker={"color": colour, "pattern": pattern}, hovertext=hover, hoverinfo="text")
    if chosen:
        tops = [scale * sum(getattr(cost.layers[layer], key) for _, key, _, _ in parts) for layer in chosen]
        marker = {"symbol": "diamond", "size": 9, "color": ORANGE, "line": EDGE}
        figure.add_scatter(x=list(chosen), y=tops, mode="markers", name="chosen", marker=marker, hoverinfo="skip")
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
        figure.add_scatter(
            x=list(every),
            y=values,
            name=name,
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"size": 5, "symbol": symbol},
            hovertext=hover,
            hoverinfo="text",
        )
    figure.update_layout(margin=MARGIN, legend=LEGEND)
    figure.update_xaxes(title="the one adapted layer", zeroline=False)
    figure.update_yaxes(title="% of all layers", zeroline=False, rangemode="tozero")
    return figure


def front_figure(front: Json, name: str, placements: Mapping[str, Json] | None = None) -> go.Figure:
    """Performance kept against one cost, both predicted: the front as a line, plain placements and the reader's own as points."""
    key, title = COSTS[name]
    figure = go.Figure()
    known = [(point, found) for point in front["fronts"][name] if (found := _kept(point)) is not None]
    figure.add_scatter(
        x=[100 * point[key]["share"] for point, _ in known],
        y=[100 * found.value for _, found in known],
        error_y=_error([found for _, found in known], 100),
        name="least cost",
        mode="lines+markers",
        line={"color": BLUE, "width": 2},
        marker={"size": 7, "color": BLUE},
        hovertext=[f"layers {listed(point['layers'], ' ')}: {percent(found)}" for point, found in known],
        hoverinfo="text",
    )
    for strategy, (symbol, colour) in PLAIN.items():
        some = [point for point in front["baselines"] if str(point["name"]).partition("-")[0] == strategy]
        _mark(figure, [(str(point["name"]), point) for point in some], key, strategy, symbol, colour, 9)
    own = [(label, placement["predicted"]) for label, placement in (placements or {}).items() if placement.get("predicted")]
    _mark(figure, own, key, "given", "diamond", GREEN, 14)
    figure.update_layout(margin=MARGIN, hovermode="closest", legend=LEGEND)
    figure.update_xaxes(title=f"{title}, % of all layers", zeroline=False)
    figure.update_yaxes(title="performance kept, %", zeroline=False)
    return figure


def _kept(point: Json) -> Estimate | None:
    return Estimate.read(point.get("performance_kept"))


def _mark(figure: go.Figure, points: Sequence[tuple[str, Json]], key: str, name: str, symbol: str, colour: str, size: int) -> None:
    known = [(label, point, found) for label, point in points if (found := _kept(point)) is not None and point.get(key)]
    if not known:
        return
    figure.add_scatter(
        x=[100 * point[key]["share"] for _, point, _ in known],
        y=[100 * found.value for _, _, found in known],
        name=name,
        mode="markers",
        marker={"size": size, "color": colour, "symbol": symbol, "line": EDGE},
        hovertext=[f"{plain(label)}: {percent(found)}" for label, _, found in known],
        hoverinfo="text",
    )


def _error(found: Sequence[Estimate], scale: float = 1.0) -> dict[str, Any]:
    return {
        "array": [scale * (one.high - one.value) if one.high is not None else 0 for one in found],
        "arrayminus": [scale * (one.value - one.low) if one.low is not None else 0 for one in found],
        "thickness": 1,
        "width": 3,
    }


def trade_off_figure(rows: Sequence[Row], named: Collection[str]) -> go.Figure:
    """Performance kept against training time, both measured: one point a placement, names beside those of `named`."""
    figure = go.Figure()
    known = [row for row in rows if row.kept is not None and row.time_share is not None]
    groups = (
        ("given", [row for row in known if row.name in named and not _plain_of(row)], "diamond", GREEN, 14),
        *((name, [row for row in known if _plain_of(row) == name], *style, 11) for name, style in PLAIN.items()),
        ("others", [row for row in known if row.name not in named and not _plain_of(row)], "circle-open", BLUE, 8),
    )
    for name, some, symbol, colour, size in groups:
        if not some:
            continue
        kept = [row.kept for row in some if row.kept is not None]
        figure.add_scatter(
            x=[row.time_share.value for row in some if row.time_share is not None],
            y=[found.value for found in kept],
            error_y=_error(kept) | {"color": colour},
            name=name,
            mode="markers",
            marker={"size": size, "color": colour, "symbol": symbol, "line": EDGE},
            text=[row.name for row in some],
            hovertext=[f"{plain(row.name)}: {short(found.value)} % kept" for row, found in zip(some, kept, strict=True)],
            hoverinfo="text",
        )
    figure.add_hline(y=100, line={"dash": "dot", "color": GREY, "width": 1})
    figure.update_layout(margin=MARGIN, hovermode="closest", legend=LEGEND)
    figure.update_xaxes(title="training time, % of all layers", zeroline=False)
    figure.update_yaxes(title="performance kept, %", zeroline=False)
    return figure


def _plain_of(row: Row) -> str | None:
    first = row.name.partition(" ")[0].partition("-")[0].partition(":")[0]
    return first if first in PLAIN else None


def transfer_figure(result: Json) -> go.Figure:
    """Rank correlation of every pair of cards, with the number in each cell."""
    names = [plain(card["name"]) for card in result["cards"]]
    figure = go.Figure()
    figure.add_heatmap(
        z=result["matrix"],
        x=names,
        y=names,
        colorscale="Cividis",
        zmin=0,
        zmax=1,
        texttemplate="%{z:.2f}",
        xgap=2,
        ygap=2,
        hovertemplate="%{y} and %{x}: %{z:.3f}<extra></extra>",
        colorbar={"thickness": 12},
    )
    _square(figure, "", "")
    figure.update_layout(margin={"l": 90, "r": 10, "t": 10, "b": 50})
    return figure
