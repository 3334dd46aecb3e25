"""Figures of the app: those of the report, with the choice of the moment marked, as plotly's JSON values.

The parts that stay (a card's front, a measure over depth) are drawn once; what moves with a slider is put on top of them. They carry no
theme; the page colours them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from layercard.card.numbers import Json, listed
from layercard.report.app.choice import Choice
from layercard.report.figures import COSTS, depth_figure, front_figure
from layercard.report.frames import MEASURES

FRONTS = tuple(COSTS)
"""Names of the fronts."""
LIMIT_OF = {"time": "max_time", "memory": "max_memory"}
"""The budget that each front's cost has."""
CHOSEN, HAND, LINE = "#c2410c", "#7c3aed", "#6b7280"

Figure = dict[str, Any]


def front(value: Json | None, name: str) -> Figure:
    """A front without any choice on it; without a value (it is being made) an empty one with the same axes."""
    figure = front_figure({"fronts": {name: []}, "baselines": []} if value is None else value, name)
    if value is None:
        figure.update_xaxes(range=[0, 105])
        figure.update_yaxes(range=[0, 105])
    figure.update_layout(margin={"b": 110}, legend={"y": -0.32})
    return _bare(figure, 420)


def depth(card: Json, measure: str) -> Figure:
    """A measure over depth, without any choice on it."""
    figure = depth_figure(card, MEASURES[measure])
    figure.update_yaxes(title=MEASURES[measure].title.lower())
    return _bare(figure, 320)


def with_choice(
    base: Figure,
    name: str,
    choice: Choice,
    hand: Choice | None = None,
    limits: Mapping[str, float] | None = None,
    kept: float | None = None,
) -> Figure:
    """A front with the chosen placement, the one picked by hand, and the budgets as lines.

    Args:
        base: The front (`front`).
        name: `time` or `memory`.
        choice: The chosen placement.
        hand: The one picked by hand.
        limits: Budgets, % of all layers (`choice.LIMITS`).
        kept: Least performance kept, %.
    """
    key, title = COSTS[name]
    marks = [(choice, "diamond", CHOSEN, "chosen"), (hand, "x", HAND, "by hand")]
    traces = [_mark(found, key, symbol, colour, words) for found, symbol, colour, words in marks if found is not None and found.placement]
    shapes, notes = [], []
    limit = (limits or {}).get(LIMIT_OF[name])
    if limit is not None:
        shapes.append(_line({"x0": limit, "x1": limit, "yref": "paper", "y0": 0, "y1": 1}))
        notes.append(_text(f"{title} at most {limit:g} %", {"x": limit, "yref": "paper", "y": 0.02, "xanchor": "right"}))
    if kept is not None:
        shapes.append(_line({"y0": kept, "y1": kept, "xref": "paper", "x0": 0, "x1": 1}))
        notes.append(_text(f"at least {kept:g} % kept", {"y": kept, "xref": "paper", "x": 0.01, "xanchor": "left", "yanchor": "bottom"}))
    layout = {**base["layout"], "shapes": shapes, "annotations": notes}
    return {"data": [*base["data"], *traces], "layout": layout}


def with_layers(base: Figure, layers: Sequence[int]) -> Figure:
    """A measure over depth with the chosen layers as diamonds."""
    line = next(trace for trace in reversed(base["data"]) if "markers" in str(trace.get("mode")))
    at = [row for row, layer in enumerate(line["x"]) if layer in set(layers)]
    marker = {"size": 11, "color": CHOSEN, "symbol": "diamond", "line": {"width": 1, "color": "white"}}
    picked = {name: [line[name][row] for row in at] for name in ("x", "y", "hovertext")}
    return {
        "data": [*base["data"], {"type": "scatter", "mode": "markers", "hoverinfo": "text", "marker": marker, **picked}],
        "layout": base["layout"],
    }


def _mark(found: Choice, key: str, symbol: str, colour: str, words: str) -> Figure:
    assert found.placement is not None
    predicted = found.placement.predicted
    kept = predicted["performance_kept"]
    between = f"{100 * kept['value']:.0f} % ({100 * kept['low']:.0f}–{100 * kept['high']:.0f})"
    return {
        "type": "scatter",
        "mode": "markers",
        "name": words,
        "x": [100 * predicted[key]["share"]],
        "y": [100 * kept["value"]],
        "marker": {"size": 15, "color": colour, "symbol": symbol, "line": {"width": 2, "color": "white"}},
        "hovertext": [f"{words}: layers {listed(found.layers, ' ')}, {between}"],
        "hoverinfo": "text",
    }


def _line(place: Figure) -> Figure:
    return {"type": "line", "line": {"dash": "dash", "color": LINE, "width": 1.5}, **place}


def _text(words: str, place: Figure) -> Figure:
    return {"text": words, "showarrow": False, "font": {"size": 12}, **place}


def _bare(figure: go.Figure, height: int) -> Figure:
    """As a JSON value without backgrounds and template, at a height."""
    transparent = "rgba(0,0,0,0)"
    figure.update_layout(height=height, paper_bgcolor=transparent, plot_bgcolor=transparent, template="none")
    figure.update_layout(font={"family": "system-ui, sans-serif", "size": 13})
    value: Figure = figure.to_plotly_json()
    value["layout"].pop("template", None)
    return value
