"""A card as one self-contained HTML page: plots, tables and provenance, without network, from files only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.offline
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.graph_objects import Figure

from layercard.files import write_text
from layercard.report import figures
from layercard.report.frames import (
    RUN_COLUMNS,
    Json,
    Measure,
    bar_fractions,
    best_layers,
    comparison_rows,
    interval,
    measured,
    number,
    profile_of,
    run_cells,
    short,
    stability_words,
    unit_of,
)

LEADING = "gain_estimate"


@dataclass(frozen=True)
class Plot:
    """A figure of the page: `name` is its id, `figure` plotly's JSON value."""

    name: str
    title: str
    unit: str
    reading: str
    figure: dict[str, Any]


@dataclass(frozen=True)
class Tile:
    """A headline number: its name, its value and where it comes from."""

    name: str
    value: str
    note: str = ""


def write_page(
    path: str | Path,
    card: Json,
    *,
    placement: Json | None = None,
    comparison: Json | None = None,
    commands: Sequence[str] = (),
    force: bool = False,
) -> Path:
    """Write the page of `render` to `path`, atomically."""
    return write_text(path, render(card, placement=placement, comparison=comparison, commands=commands), force=force)


def render(card: Json, *, placement: Json | None = None, comparison: Json | None = None, commands: Sequence[str] = ()) -> str:
    """The page as text.

    Args:
        card: JSON value of a card.
        placement: JSON value of a placement; its layers are marked in every plot.
        comparison: JSON value that `layercard compare` writes.
        commands: Command lines that made all this, for the last part of the page.
    """
    chosen = [int(layer) for layer in placement["layers"]] if placement else []
    rows = comparison_rows(comparison) if comparison else []
    return (
        _environment()
        .get_template("card.html.j2")
        .render(
            card=card,
            placement=placement,
            chosen=chosen,
            stability=stability_words(card),
            tiles=_tiles(card, placement, rows),
            depth=_depth_plots(card, chosen),
            coupling=_coupling_plot(card, chosen),
            trade_off=_trade_off_plot(rows),
            table=_table(card),
            best=best_layers(card),
            runs=[run_cells(row) for row in rows],
            run_columns=RUN_COLUMNS,
            provenance=_provenance(card),
            commands=list(commands),
            plotly_js=Markup(plotly.offline.get_plotlyjs()),
        )
    )


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("layercard.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _tiles(card: Json, placement: Json | None, rows: Sequence[Json]) -> list[Tile]:
    depth = card["model"]["layers"]
    tiles = [Tile("Best single layers", ", ".join(map(str, sorted(best_layers(card)))) or "not measured", "by gain estimate")]
    if placement:
        tiles.append(Tile("Layers adapted", f"{len(placement['layers'])} of {depth}", f"chosen for {placement['objective']}"))
        kept = number((placement.get("predicted") or {}).get("performance_kept"))
        if kept:
            between = f", {100 * kept.low:.0f}–{100 * kept.high:.0f} %" if kept.low is not None and kept.high is not None else ""
            tiles.append(Tile("Performance kept", f"{100 * kept.value:.0f} %", f"predicted from the card{between}"))
    partial = [row for row in rows if row["layers"] < depth and row["performance_kept"] is not None]
    if partial:
        best = max(partial, key=lambda row: row["performance_kept"].value)
        kept, share = best["performance_kept"], best["time_share"]
        note = f"{best['name']} against all layers, measured"
        between = f", {kept.low:.0f}–{kept.high:.0f} %" if kept.low is not None and kept.high is not None else ""
        tiles.append(Tile("Performance kept", f"{kept.value:.0f} %", note + between))
        if share is not None:
            tiles.append(Tile("Training time saved", f"{100 - share.value:.0f} %", note))
    stable = number((card.get("stability") or {}).get(LEADING))
    tiles.append(Tile("Ranking stability", f"{stable.value:.2f}" if stable else "unknown", "Spearman between two halves of the records"))
    return tiles


def _plot(name: str, title: str, unit: str, reading: str, figure: Figure) -> Plot:
    value = figure.to_plotly_json()
    value["layout"].pop("template", None)
    return Plot(name, title, unit, reading, value)


def _depth_plots(card: Json, chosen: Sequence[int]) -> list[Plot]:
    return [_plot(m.key, m.title, unit_of(card, m.key), m.reading, figures.depth_figure(card, m, chosen)) for m in measured(card)]


def _coupling_plot(card: Json, chosen: Sequence[int]) -> Plot | None:
    if not card.get("coupling"):
        return None
    reading = (
        "Each cell says how far the best steps of two layers do the same work: at 1 either can stand in for the other, at 0 they add up. "
        "A bright block is a group of neighbours of which one or two are enough; chosen layers (diamonds) should lie in different blocks."
    )
    return _plot("coupling", "Layer coupling", "correlation of layer steps, −1 to 1", reading, figures.coupling_figure(card, chosen))


def _trade_off_plot(rows: Sequence[Json]) -> Plot | None:
    if not rows:
        return None
    reading = (
        "Each point is a placement that was really trained: left is faster, up keeps more of the loss reduction of all layers. "
        "A placement is worth taking when nothing lies above and to the left of it; with one seed, differences under 2 % are noise."
    )
    return _plot("trade-off", "Performance kept against training time", "", reading, figures.trade_off_figure(rows))


def _table(card: Json) -> dict[str, Any]:
    """Columns and cells of the layers × measures table; a cell is its text, its interval and its tint from 0 to 1."""
    columns = measured(card)
    cells = [_column_cells(card, measure) for measure in columns]
    return {"columns": columns, "rows": [[column[index] for column in cells] for index in range(len(card["layers"]))]}


def _column_cells(card: Json, measure: Measure) -> list[dict[str, Any]]:
    values = profile_of(card, measure.key)
    shades = bar_fractions(values, wide=measure.wide)
    lightest = min((shade for shade in shades if shade is not None), default=0.0)
    cells: list[dict[str, Any]] = []
    for found, shade in zip(values, shades, strict=True):
        if found is None or shade is None:
            cells.append({"text": "–", "interval": "", "exact": None, "tint": 0.0})
        else:
            tint = (shade - lightest) / (1 - lightest) if lightest < 1 else 0.0
            cells.append({"text": short(found.value), "interval": interval(found), "exact": found.value, "tint": tint})
    return cells


def _provenance(card: Json) -> dict[str, Mapping[str, Any]]:
    """The parts of the card that say where it comes from, as names and values."""
    parts = {"Model": card["model"], "Data": card["data"], "Settings": card["settings"], "Versions": card.get("versions") or {}}
    return {name: dict(part) for name, part in parts.items() if part}
