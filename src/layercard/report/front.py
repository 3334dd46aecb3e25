"""A front as a table for the terminal, from its JSON value alone."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from layercard.card.numbers import Json, listed, percent
from layercard.records import Estimate

TITLES = {"time": "step time", "memory": "peak memory"}
"""What the cost of each front is called."""
COLUMNS = ("Keeps", "Time", "Memory", "Layers", "Which")


def front_view(front: Json) -> RenderableType:
    """Each front and the plain placements, one row a placement."""
    parts: list[RenderableType] = []
    for name, points in front["fronts"].items():
        parts.append(_table(f"Least {TITLES[name]} for each performance kept", points))
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
    kept = Estimate.read(point["performance_kept"])
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
