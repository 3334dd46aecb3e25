"""Plotly figures of a card and of a comparison. They carry no theme: the page that shows them colours text, grid and background.

Colours are mid-tones that stand on white and on black alike, and what matters is told by shape too (diamonds mark chosen layers).
"""

from collections.abc import Collection, Sequence

import plotly.graph_objects as go

from layercard.report.frames import Json, Measure, Number, interval, profile_of, short

BLUE, ORANGE, BAND = "#3b82f6", "#e07b00", "rgba(59,130,246,0.22)"


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
        marker = {"size": 11, "color": ORANGE, "symbol": "diamond", "line": {"width": 1, "color": "white"}}
        figure.add_scatter(**_points(picked), mode="markers", marker=marker)
    figure.update_layout(showlegend=False, margin={"l": 52, "r": 12, "t": 8, "b": 40}, hovermode="closest")
    figure.update_xaxes(title="layer, input to output", rangemode="tozero", zeroline=False)
    figure.update_yaxes(type="log" if measure.wide else "linear", zeroline=False, nticks=6)
    return figure


def _points(known: Sequence[tuple[int, Number]]) -> dict[str, object]:
    text = [f"layer {layer}: {short(found.value)}{f' ({interval(found)})' if interval(found) else ''}" for layer, found in known]
    return {
        "x": [layer for layer, _ in known],
        "y": [found.value for _, found in known],
        "hovertext": text,
        "hoverinfo": "text",
    }


def coupling_figure(card: Json, chosen: Sequence[int] = ()) -> go.Figure:
    """The coupling matrix as a heat map; chosen layers are marked on both axes."""
    matrix = card["coupling"]
    signed = any(value is not None and value < -0.05 for row in matrix for value in row)
    scale = (
        {"colorscale": "RdBu", "zmin": -1, "zmax": 1, "reversescale": True} if signed else {"colorscale": "Cividis", "zmin": 0, "zmax": 1}
    )
    figure = go.Figure()
    figure.add_heatmap(
        z=matrix, **scale, hovertemplate="layers %{y} and %{x}: %{z:.3f}<extra></extra>", colorbar={"thickness": 12, "len": 0.9}
    )
    if chosen:
        marker = {"symbol": "diamond", "size": 9, "color": ORANGE, "line": {"width": 1, "color": "white"}}
        figure.add_scatter(x=list(chosen), y=list(chosen), mode="markers", marker=marker, hoverinfo="skip", showlegend=False)
    figure.update_layout(margin={"l": 52, "r": 12, "t": 8, "b": 44})
    figure.update_xaxes(title="layer", constrain="domain", showgrid=False, zeroline=False)
    figure.update_yaxes(title="layer", scaleanchor="x", autorange="reversed", constrain="domain", showgrid=False, zeroline=False)
    return figure


def trade_off_figure(rows: Sequence[Json]) -> go.Figure:
    """Performance kept against training time, one point a placement (rows of `frames.comparison_rows`)."""
    figure = go.Figure()
    known = [row for row in rows if row["performance_kept"] is not None and row["train_seconds"] is not None]
    kept = [row["performance_kept"] for row in known]
    figure.add_scatter(
        x=[row["train_seconds"].value for row in known],
        y=[found.value for found in kept],
        error_y={
            "array": [found.high - found.value if found.high is not None else 0 for found in kept],
            "arrayminus": [found.value - found.low if found.low is not None else 0 for found in kept],
            "thickness": 1,
            "width": 4,
        },
        text=[row["name"] for row in known],
        mode="markers+text",
        textposition="middle right",
        marker={"size": 12, "color": BLUE},
        hovertemplate="%{text}: %{y:.1f} % in %{x:.1f} s<extra></extra>",
        cliponaxis=False,
    )
    figure.add_hline(y=100, line={"dash": "dot", "color": ORANGE, "width": 1})
    figure.update_layout(showlegend=False, margin={"l": 56, "r": 80, "t": 24, "b": 44})
    figure.update_xaxes(title="training time, seconds", rangemode="tozero", zeroline=False)
    figure.update_yaxes(title="performance kept, %", zeroline=False)
    return figure
