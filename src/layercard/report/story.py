"""What a page shows, as plain values: topics of parts, parts of plots and tables. The templates know nothing but these.

A part whose input is missing keeps its heading and says in `missing` how to get it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from plotly.graph_objects import Figure

from layercard.card.numbers import interval, short
from layercard.records import Estimate


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it shows.
        interval: `low–high`, shown small below.
        exact: The number itself, for whoever reads the page by machine; `None` for text.
        tint: Depth of its colour, 0 to 1.
        words: Whether it is text, which starts at the left.
    """

    text: str
    interval: str = ""
    exact: float | None = None
    tint: float | None = None
    words: bool = False


@dataclass(frozen=True)
class Line:
    """A row of a table; `mark` is ◆ for the reader's own placement and for chosen layers, ★ for the best single layers."""

    head: str
    cells: Sequence[Cell]
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table. `more` rows are behind a fold below the others; `folded` puts all of it behind one."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Line]
    more: Sequence[Line] = ()
    folded: bool = False
    heat: bool = False


@dataclass(frozen=True)
class Plot:
    """A figure: `name` is its id, `figure` plotly's JSON value, `size` one of `small`, `wide`, `tall` and `square`."""

    name: str
    title: str
    unit: str
    reading: str
    figure: dict[str, Any]
    size: str = "small"
    table: Table | None = None


@dataclass(frozen=True)
class Missing:
    """Why a part is left out, and the command that gets it."""

    why: str
    command: str = ""


@dataclass(frozen=True)
class Part:
    """A heading with plots and tables, or with a word on how to get them."""

    key: str
    title: str
    lead: str = ""
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[tuple[str, str]] = ()
    missing: Missing | None = None


@dataclass(frozen=True)
class Topic:
    """One of the page's chapters."""

    key: str
    title: str
    lead: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Step:
    """A step of the way from the frozen base to the adapter: `done`, or `next` or `later` with the command that does it."""

    phase: str
    title: str
    state: str
    detail: str
    command: str = ""


@dataclass(frozen=True)
class Tile:
    """A headline number: its name, value and interval, where it comes from, and whether it was measured."""

    name: str
    value: str
    between: str = ""
    note: str = ""
    measured: bool | None = None


@dataclass(frozen=True)
class Story:
    """A whole page."""

    title: str
    lead: str
    topics: Sequence[Topic]
    steps: Sequence[Step] = ()
    tiles: Sequence[Tile] = ()
    warnings: Sequence[str] = ()
    calculator: dict[str, Any] | None = None
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)
    commands: Sequence[str] = ()


def plot(name: str, title: str, reading: str, figure: Figure, *, unit: str = "", size: str = "small", table: Table | None = None) -> Plot:
    """A figure as the page takes it, without plotly's own theme."""
    value = figure.to_plotly_json()
    value["layout"].pop("template", None)
    return Plot(name, title, unit, reading, value, size, table)


def cell(found: Estimate | None, scale: float = 1.0, digits: int | None = None) -> Cell:
    """A number as a cell, a dash where there is none."""
    if found is None:
        return Cell("–")
    scaled = found.divided_by(scale)
    if scaled.low == scaled.high:
        scaled = Estimate(value=scaled.value)
    if digits is None:
        return Cell(short(scaled.value), interval(scaled), found.value)
    text = [None if end is None else f"{end:,.{digits}f}".replace("-", "−") for end in (scaled.value, scaled.low, scaled.high)]
    between = "" if text[1] is None or text[2] is None else f"{text[1]}{' to ' if text[1].startswith('−') else '–'}{text[2]}"
    return Cell(str(text[0]), between, found.value)
