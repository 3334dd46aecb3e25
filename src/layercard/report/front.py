"""A front as a table for the terminal and as one HTML page, from its JSON value alone."""

from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
import plotly.offline
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from layercard.files import write_text
from layercard.indices import listed
from layercard.report.figures import BLUE, ORANGE
from layercard.report.frames import Json, number
from layercard.report.predictions import percent

GREY = "#8a929c"
TITLES = {"time": ("step_time", "step time"), "memory": ("peak_memory", "peak memory")}
"""For each front where a point says its cost, and what it is called."""
PLAIN = {
    "last": ("triangle-up", ORANGE),
    "middle": ("square", GREY),
    "uniform": ("circle", ORANGE),
    "first": ("triangle-down", GREY),
    "all": ("star", GREY),
}
"""Plain placements on the figure: symbol and colour."""
COLUMNS = ("Keeps", "Time", "Memory", "Layers", "Which")


def front_view(front: Json) -> RenderableType:
    """Each front and the plain placements, one row a placement."""
    parts: list[RenderableType] = []
    for name, points in front["fronts"].items():
        parts.append(_table(f"Least {TITLES[name][1]} for each performance kept", points))
    parts.append(_table("Plain placements", front["baselines"], named=True))
    parts.append(Text(_footnote(front), style="dim"))
    return Group(*parts)


def _table(title: str, points: Sequence[Json], named: bool = False) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    if named:
        table.add_column("Name")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "Which" else "right", overflow="fold")
    for point in points:
        cells = row_of(point)
        table.add_row(*(Text(cell) for cell in ([str(point["name"])] if named else []) + cells))
    return table


def row_of(point: Json) -> list[str]:
    """The cells of one placement, in the order of `COLUMNS`."""
    kept = number(point["performance_kept"])
    time, memory = point["step_time"]["share"], point["peak_memory"]["share"]
    return [
        percent(kept) if kept is not None else "–",
        f"{100 * time:.0f}%",
        f"{100 * memory:.0f}%",
        str(len(point["layers"])),
        listed(point["layers"], " "),
    ]


def _footnote(front: Json) -> str:
    source = {"shapes": "estimated from shapes alone", "measured": "modelled from what was measured"}.get(front["cost_source"], "modelled")
    return f"In % of all layers. Performance is predicted from the card, with its interval; costs are {source}."


def front_figure(front: Json, name: str) -> go.Figure:
    """Performance kept against one cost: the front as a line, plain placements as points."""
    key, title = TITLES[name]
    figure = go.Figure()
    points = front["fronts"][name]
    kept = [number(point["performance_kept"]) for point in points]
    known = [(point, found) for point, found in zip(points, kept, strict=True) if found is not None]
    figure.add_scatter(
        x=[100 * point[key]["share"] for point, _ in known],
        y=[100 * found.value for _, found in known],
        error_y={
            "array": [100 * ((found.high or found.value) - found.value) for _, found in known],
            "arrayminus": [100 * (found.value - (found.low if found.low is not None else found.value)) for _, found in known],
            "thickness": 1,
            "width": 3,
        },
        name="chosen from the card",
        mode="lines+markers",
        line={"color": BLUE, "width": 2},
        marker={"size": 7, "color": BLUE},
        hovertext=[f"layers {listed(point['layers'], ' ')}: {percent(found)}" for point, found in known],
        hoverinfo="text",
    )
    plain = [(point, number(point["performance_kept"])) for point in front["baselines"]]
    for strategy, (symbol, colour) in PLAIN.items():
        some = [(point, found) for point, found in plain if str(point["name"]).partition("-")[0] == strategy and found is not None]
        figure.add_scatter(
            x=[100 * point[key]["share"] for point, _ in some],
            y=[100 * found.value for _, found in some],
            name=strategy,
            mode="markers",
            marker={"size": 9, "color": colour, "symbol": symbol, "line": {"width": 1, "color": "white"}},
            hovertext=[f"{point['name']}: {percent(found)}" for point, found in some],
            hoverinfo="text",
        )
    figure.update_layout(margin={"l": 56, "r": 12, "t": 8, "b": 44}, hovermode="closest", legend={"orientation": "h", "y": -0.2})
    figure.update_xaxes(title=f"{title}, % of all layers", zeroline=False)
    figure.update_yaxes(title="performance kept, %", zeroline=False)
    return figure


def render_front(front: Json) -> str:
    """The page as text; it needs no network, and whatever the front says is text in it."""
    environment = Environment(
        loader=PackageLoader("layercard.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    plots = []
    for name in front["fronts"]:
        value = front_figure(front, name).to_plotly_json()
        value["layout"].pop("template", None)
        plots.append({"name": name, "title": f"Performance kept against {TITLES[name][1]}", "figure": value})
    tables = [(f"Least {TITLES[name][1]}", [["", *row_of(point)] for point in points]) for name, points in front["fronts"].items()]
    tables.append(("Plain placements", [[str(point["name"]), *row_of(point)] for point in front["baselines"]]))
    return environment.get_template("front.html.j2").render(
        model=front["model"],
        plots=plots,
        tables=tables,
        columns=COLUMNS,
        footnote=_footnote(front),
        plotly_js=Markup(plotly.offline.get_plotlyjs()),
    )


def write_front_page(path: str | Path, front: Json, *, force: bool = False) -> Path:
    """Write the page of `render_front` to `path`, atomically."""
    return write_text(path, render_front(front), force=force)
