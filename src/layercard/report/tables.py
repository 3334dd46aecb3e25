"""The tables of a report as plain values, from records or from runs; `templates/parts.html.j2` shows them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from layercard.card.card import LayerCard
from layercard.card.numbers import Json, interval, listed, reasons_apart, short
from layercard.cost.model import CostModel
from layercard.records import Estimate
from layercard.report.sources import called
from layercard.report.trials import Regime, TrialGroup
from layercard.report.words import bar_fractions, measured, seconds, size
from layercard.selection.pareto import Front
from layercard.selection.placement import Placement
from layercard.trials.records import Race

SHOWN_ROWS = 16
"""Placements in a table before the rest goes behind a fold."""
MOST_COUPLED = 64
"""Layers of a coupling matrix whose numbers are written out; those of a deeper model fill a page with what its card holds already."""
POINT_COLUMNS = ("Keeps %", "Time %", "Memory %", "Adapters %", "Layers", "Which")


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    interval: str = ""  # `low–high`, shown small below
    exact: float | None = None  # the number itself, for whoever reads the page by machine; `None` for text
    tint: float | None = None  # depth of its colour, 0 to 1
    words: bool = False  # whether it is text, which starts at the left


class Line(NamedTuple):
    """A row of a table; `mark` is ★ for the reader's own placement and for chosen layers, ▲ for the best single layers."""

    head: str
    cells: Sequence[Cell]
    mark: str = ""


class Table(NamedTuple):
    """A table. `more` rows are behind a fold below the others; `folded` puts all of it behind one; `heat` colours its cells."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Line]
    more: Sequence[Line] = ()
    folded: bool = False
    heat: bool = False


def number_cell(estimate: Estimate | None, scale: float = 1.0, digits: int = 0) -> Cell:
    """A number with its interval as a cell, in units of `scale`; a dash where there is none."""
    if estimate is None:
        return Cell("–")
    scaled = estimate.divided_by(scale)
    text, low, high = (None if end is None else f"{end:,.{digits}f}".replace("-", "−") for end in (scaled.value, scaled.low, scaled.high))
    if low is None or high is None or scaled.low == scaled.high:
        return Cell(str(text), "", estimate.value)
    return Cell(str(text), f"{low}{' to ' if low.startswith('−') else '–'}{high}", estimate.value)


def card_table(card: LayerCard, chosen: Sequence[int]) -> Table:
    """One row a layer, one column a measure, cells coloured by where they lie in their column."""
    best, columns, titles = card.best_layers(), [], ["Layer"]
    for measure in measured(card):
        unit = card.units.get(measure.key, "")
        titles.append(f"{measure.title}, {unit}" if unit else measure.title)
        values = card.profile(measure.key)
        fractions = bar_fractions(values, wide=measure.wide)
        lightest = min((shade for shade in fractions if shade is not None), default=0.0)
        column = []
        for value, shade in zip(values, fractions, strict=True):
            tint = 0.0 if shade is None or lightest == 1 else (shade - lightest) / (1 - lightest)
            column.append(Cell("–") if value is None else Cell(short(value.value), interval(value), value.value, tint))
        columns.append(column)
    rows = []
    for layer in range(card.model.layers):
        marks = ["★"] * (layer in chosen) + ["▲"] * (layer in best)
        rows.append(Line(str(layer), [column[layer] for column in columns], " ".join(marks)))
    return Table("Every layer: ★ chosen, ▲ best single layers by gain estimate", titles, rows, folded=True, heat=True)


def coupling_table(card: LayerCard) -> Table | None:
    """The numbers of the coupling matrix; `None` where they are too many to be read."""
    if card.model.layers > MOST_COUPLED:
        return None
    return matrix_table("Coupling of every two layers", "layer", range(card.model.layers), card.coupling, 2, folded=True)


def matrix_table(
    caption: str, corner: str, names: Iterable[Any], matrix: Sequence[Sequence[float]], digits: int, *, folded: bool = False
) -> Table:
    """A square of numbers with the same names on both sides."""
    heads = [str(name) for name in names]
    rows = [Line(head, [Cell(f"{value:.{digits}f}", "", value) for value in row]) for head, row in zip(heads, matrix, strict=True)]
    return Table(caption, (corner, *heads), rows, folded=folded)


def trained_table(regime: Regime, groups: Sequence[TrialGroup], named: Sequence[str], *, folded: bool) -> Table:
    """Loss reduction of the placements that were trained in one regime, as in the paper's first table; ★ marks those of `named`."""
    rows = []
    for group in groups:
        runs = Cell(str(len(group.trials)), "", len(group.trials))
        cells = [runs, number_cell(group.loss_reduction, digits=3), number_cell(group.performance_kept, digits=1)]
        rows.append(Line(group.name, cells, "★" if group.name in named else ""))
    columns = ("Placement", "Runs", "Loss reduction", "% kept of all layers")
    return Table(f"Loss reduction on {regime.words}", columns, rows[:SHOWN_ROWS], rows[SHOWN_ROWS:], folded=folded)


def trade_off_table(regime: Regime, groups: Sequence[TrialGroup], named: Sequence[str]) -> Table:
    """Time saved against performance lost, measured, as in the paper's second table; ★ marks the placements of `named`."""

    def from_100(estimate: Estimate | None) -> Estimate | None:
        if estimate is None:
            return None
        low, high = (None if end is None else 100 - end for end in (estimate.high, estimate.low))
        return Estimate(value=100 - estimate.value, low=low, high=high)

    columns = ("Placement", "Layers", "Time %", "Speed-up %", "Kept %", "Drop %", "Speed-up / drop", "Peak MiB", "Adapter MiB")
    rows = []
    for group in groups:
        saved, drop = from_100(group.time_share), from_100(group.performance_kept)
        ratio = Estimate(value=saved.value / drop.value) if saved and drop and drop.value >= 0.05 else None
        percents = [number_cell(value, digits=1) for value in (group.time_share, saved, group.performance_kept, drop, ratio)]
        sizes = [number_cell(group.memory, 2**20), number_cell(group.adapter_bytes, 2**20, 2)]
        cells = [Cell(str(len(group.layers)), "", len(group.layers)), *percents, *sizes]
        rows.append(Line(group.name, cells, "★" if group.name in named else ""))
    caption = f"Cost and performance on {regime.words}, against all layers trained alike"
    return Table(caption, columns, rows[:SHOWN_ROWS], rows[SHOWN_ROWS:])


def race_tables(race: Race) -> list[Table]:
    """The heats of a race, those of one length in one table; ★ marks the chosen candidate."""
    tables = []
    for steps in dict.fromkeys(heat.steps for heat in race.heats):
        rows = []
        for heat in race.heats:
            if heat.steps == steps:
                cells = [
                    Cell(heat.entrant.modules, words=True),
                    Cell(str(len(heat.entrant.layers)), "", len(heat.entrant.layers)),
                    Cell(f"{heat.learning_rate:.3g}", "", heat.learning_rate),
                    Cell("diverged", words=True) if heat.loss is None else Cell(f"{heat.loss:.4f}", "", heat.loss),
                    Cell(f"{heat.step_seconds:.3g}", "", heat.step_seconds),
                    Cell(f"{heat.peak_memory_bytes / 2**20:,.0f}", "", heat.peak_memory_bytes),
                ]
                rows.append(Line(heat.entrant.name, cells, "★" if heat.entrant.name == race.chosen.name else ""))
        columns = ("Candidate", "Modules", "Layers", "Learning rate", "Loss after", "Seconds a step", "Memory, MiB")
        caption = f"Candidates after {steps} steps: loss on {race.held_out_records} held-out records, {race.loss_before:.4f} before"
        tables.append(Table(caption, columns, rows))
    return tables


def result_table(table: Json) -> Table:
    """A result file of a benchmark, as it is."""

    def cell(value: Any) -> Cell:
        number = Estimate.read(value)
        if value is None:
            return Cell("–")
        if number is None:
            return Cell(str(value), words=not str(value)[:1].isdigit())
        return Cell(f"{value:,}" if isinstance(value, int) else f"{value:.4g}", "", number.value)

    rows = [Line(cell(first).text, [cell(value) for value in others]) for first, *others in table["rows"]]
    return Table(str(table["title"]), [str(column) for column in table["columns"]], rows, folded=True)


def cost_table(cost: CostModel) -> Table:
    """Times and bytes of every layer."""
    rows = []
    for index, layer in enumerate(cost.layers):
        times = [Cell(seconds(value, cost), "", value) for value in (layer.forward_seconds, layer.backward_seconds, layer.adapter_seconds)]
        sizes = [Cell(size(value), "", value) for value in (layer.saved_bytes, layer.adapter_saved_bytes)]
        rows.append(Line(str(index), times + sizes))
    return Table("Cost of every layer", ("Layer", "Forward", "Backward", "Adapter", "Kept", "Kept for adapter"), rows, folded=True)


def points_table(caption: str, head: str, points: Mapping[str, Json]) -> Table:
    """Placements with what is predicted of them."""
    rows = [Line(name, point_cells(point, point["layers"])) for name, point in points.items()]
    return Table(caption, (head, *POINT_COLUMNS), rows, folded=True)


def point_cells(predicted: Json, layers: Sequence[int]) -> list[Cell]:
    """What is predicted of one placement, under `POINT_COLUMNS`."""
    shares = [(predicted.get(key) or {}).get("share") for key in ("step_time", "peak_memory", "parameters")]
    numbers = [number_cell(Estimate.read(value), 0.01) for value in (predicted.get("performance_kept"), *shares)]
    return [*numbers, Cell(str(len(layers)), "", len(layers)), Cell(listed(layers, " "), words=True)]


def placement_tables(placements: Mapping[str, Placement], front: Front | None) -> list[Table]:
    """The placements given with plain ones of as many layers, and why each layer of the first was taken."""
    first = next(iter(placements.values()))
    rows = [Line(called(name, each), point_cells(each.predicted, each.layers), "★") for name, each in placements.items()]
    plain = front.baselines if front else ()
    alike = [point for point in plain if len(point["layers"]) == len(first.layers) or point["name"] == "all"]
    rows += [Line(str(point["name"]), point_cells(point, point["layers"])) for point in alike]
    tables = [Table("Placements given, and plain ones of as many layers: predicted", ("Placement", *POINT_COLUMNS), rows)]
    _, special = reasons_apart(first.reasons)
    why = [Line(layer, [Cell(reason, words=True)], "★") for layer, reason in special.items()]
    return [*tables, Table("Why each layer", ("Layer", "What is special about it"), why)] if why else tables
