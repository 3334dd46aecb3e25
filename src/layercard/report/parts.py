"""The parts of a report, each from the sources it needs; where these are missing, a word on how to get them."""

from collections.abc import Sequence
from typing import Any

from layercard.card.numbers import Json, best_layers, interval, listed, predicted_rows, profile_of, short
from layercard.cost.model import CostModel
from layercard.records import Estimate
from layercard.report import figures
from layercard.report.costs import seconds, size, where
from layercard.report.frames import MEASURES, Measure, bar_fractions, measured, unit_of
from layercard.report.sources import Sources
from layercard.report.story import Cell, Line, Missing, Part, Plot, Table, cell, plot
from layercard.report.trials import Row

THEORY: tuple[str, ...] = ("resnorm", "resnorm_rank", "residual_fraction", "gradient_norm", "activation_energy", "effective_rank")
THEORY += ("condition", "noise_amplification", "predicted_gain")
FINDINGS = ("gain_estimate", "step_probe", "training_probe", "centrality")
SHOWN_ROWS = 16
"""Placements in a table before the rest goes behind a fold."""


def depth_part(card: Json, keys: Sequence[str], chosen: Sequence[int], *, key: str, title: str, lead: str) -> Part:
    """Depth profiles of some measures, the first of them wide."""
    known = [measure for measure in measured(card) if measure.key in keys]
    known.sort(key=lambda measure: keys.index(measure.key))
    plots = [_depth_plot(card, measure, chosen, wide=measure.key == "gain_estimate") for measure in known]
    return Part(key, title, lead, plots)


def _depth_plot(card: Json, measure: Measure, chosen: Sequence[int], *, wide: bool) -> Plot:
    figure = figures.depth_figure(card, measure, chosen)
    return plot(measure.key, measure.title, measure.reading, figure, unit=unit_of(card, measure.key), size="wide" if wide else "small")


def coupling_part(card: Json, chosen: Sequence[int]) -> Part:
    """The coupling matrix, with its numbers behind it."""
    title = "Layer coupling"
    if not card.get("coupling"):
        return Part("coupling", title, missing=Missing("This card has no coupling.", "layercard profile … --label-samples 4"))
    reading = (
        "Each cell says how far the best steps of two layers do the same work: at 1 either can stand in for the other, at 0 they add up. "
        "A bright block is a group of neighbours of which one or two are enough; chosen layers (diamonds) should lie in different blocks."
    )
    matrix = card["coupling"]
    numbers = Table(
        "Coupling of every two layers",
        ("layer", *map(str, range(len(matrix)))),
        [Line(str(at), [Cell("–" if value is None else f"{value:.2f}", "", value) for value in row]) for at, row in enumerate(matrix)],
        folded=True,
    )
    figure = figures.coupling_figure(card, chosen)
    plots = [plot("coupling", title, reading, figure, unit="correlation of layer steps, −1 to 1", size="square", table=numbers)]
    return Part("coupling-part", title, plots=plots)


def card_part(card: Json, chosen: Sequence[int]) -> Part:
    """The card as a heat map, and the table behind it."""
    reading = (
        "Each row is a measure on its own scale, from its lowest value (dark) to its highest (bright); diamonds are the chosen layers. "
        "Read down a column to see one layer whole: a layer is worth adapting where gain estimate and step probe are bright together."
    )
    figure = figures.heat_figure(card, chosen)
    lead = "Every layer with every measure. The numbers lie behind the picture, as a table."
    return Part(
        "card", "The Layer Card", lead, [plot("card", "Layers and measures", reading, figure, size="tall", table=card_table(card, chosen))]
    )


def card_table(card: Json, chosen: Sequence[int]) -> Table:
    """Layers × measures; ★ marks the best single layers, ◆ the chosen ones."""
    columns = measured(card)
    cells = [_column(card, measure) for measure in columns]
    best = best_layers(card)
    rows = [
        Line(
            str(layer),
            [column[layer] for column in cells],
            " ".join(mark for mark, among in (("★", best), ("◆", chosen)) if layer in among),
        )
        for layer in range(len(card["layers"]))
    ]
    titles = [f"{measure.title}{f', {unit}' if (unit := unit_of(card, measure.key)) else ''}" for measure in columns]
    return Table("Every layer: ★ best single layers by gain estimate, ◆ chosen", ("Layer", *titles), rows, folded=True, heat=True)


def _column(card: Json, measure: Measure) -> list[Cell]:
    values = profile_of(card, measure.key)
    shades = bar_fractions(values, wide=measure.wide)
    lightest = min((shade for shade in shades if shade is not None), default=0.0)
    return [
        Cell("–")
        if found is None or shade is None
        else Cell(short(found.value), interval(found), found.value, (shade - lightest) / (1 - lightest) if lightest < 1 else 0.0)
        for found, shade in zip(values, shades, strict=True)
    ]


def trained_part(rows: Sequence[Row]) -> Part:
    """Loss reduction of every placement on every task, as in the paper's first table."""
    title = "Placements, trained and measured"
    if not rows:
        why = "No training run was given. Train placements side by side and name the folder:"
        return Part(
            "trained", title, missing=Missing(why, "layercard compare MODEL --data … --valid … --placements placement.json,all -o runs")
        )
    tasks = list(dict.fromkeys(task for row in rows for task in row.reduction))
    lines = [
        Line(
            row.name,
            [
                Cell(str(len(row.trials)), "", len(row.trials)),
                *(cell(row.reduction.get(task), digits=3) for task in tasks),
                cell(row.kept, digits=1),
            ],
        )
        for row in rows
    ]
    lead = (
        "Loss reduction on held-out records against the frozen base, in nats per labelled token: more is better. "
        "Where there are several runs, the interval is a 95 % t interval over them; of one run it is over its held-out records."
    )
    columns = ("Placement", "Runs", *tasks, "% kept of all layers")
    return Part("trained", title, lead, tables=[_folded("Loss reduction by placement and task", columns, lines)])


def _folded(caption: str, columns: Sequence[str], lines: Sequence[Line]) -> Table:
    return Table(caption, columns, lines[:SHOWN_ROWS], lines[SHOWN_ROWS:])


def table_part(tables: Sequence[Json], key: str, title: str) -> Part | None:
    """Tables of a benchmark, as they are."""
    made = [
        Table(
            str(table["title"]),
            [str(column) for column in table["columns"]],
            [Line(_plain(row[0]).text, [_plain(value) for value in row[1:]]) for row in table["rows"]],
        )
        for table in tables
        if table["columns"]
    ]
    return Part(key, title, tables=made) if made else None


def _plain(value: Any) -> Cell:
    found = Estimate.read(value)
    if value is None:
        return Cell("–")
    return (
        Cell(str(value), words=not str(value)[:1].isdigit())
        if found is None
        else Cell(f"{value:,}" if isinstance(value, int) else f"{value:.4g}", "", found.value)
    )


def transfer_part(sources: Sources) -> Part:
    """Whether cards of several data sets agree."""
    title, result = "Transfer between data sets", sources.transfer
    if result is None:
        why = "Only one card was given. Profile the same model on other data and name both cards:"
        return Part("transfer", title, missing=Missing(why, "layercard profile MODEL --data other.jsonl -o other.json"))
    measure = MEASURES[result["measure"]].title.lower() if result["measure"] in MEASURES else str(result["measure"])
    reading = (
        f"Each cell is Spearman's rank correlation of the {measure} of two cards: at 1 both rank their layers alike. "
        "A card can stand in for another where the cell is bright and few points are lost by using its layers."
    )
    names = [str(card["name"]) for card in result["cards"]]
    matrix = _matrix("Spearman's rank correlation", names, result["matrix"], 2)
    lost = _matrix("Points of performance lost with the layers of the row's card on the column's data", names, result["lost"], 1)
    shown = plot("transfer-plot", "Agreement of layer rankings", reading, figures.transfer_figure(result), size="square", table=matrix)
    notes = [(f"{pair['a']} and {pair['b']}: {pair['verdict']['word']}", str(pair["verdict"]["reason"])) for pair in result["pairs"]]
    return Part("transfer", title, plots=[shown], tables=[lost], notes=notes)


def _matrix(caption: str, names: Sequence[str], values: Sequence[Sequence[float]], digits: int) -> Table:
    rows = [Line(name, [Cell(f"{value:.{digits}f}", "", value) for value in row]) for name, row in zip(names, values, strict=True)]
    return Table(caption, ("Card", *names), rows)


def cost_part(card: Json, chosen: Sequence[int]) -> Part:
    """What each layer costs, and what backward's reach costs."""
    title = "Cost by depth"
    if not card.get("cost"):
        why = "This card has no cost. Measure it with the profile, or by itself:"
        return Part("cost", title, missing=Missing(why, "layercard profile … --cost"))
    cost = CostModel.from_json(dict(card["cost"]), "the card's cost")
    time = (
        "Each bar is one layer in one training step: forward is always paid, backward from the lowest adapted layer up, adapter "
        "where adapted. Layers cost much the same; what differs is how many of them backward must go through."
    )
    memory = (
        "Each bar is what a layer keeps from forward to backward; only layers from the lowest adapted one up keep it. "
        "So the lowest layer of a placement decides about memory, as it does about time."
    )
    reach = (
        "Each point is a placement of one layer alone: the deeper it lies, the less of the network backward goes through. "
        "The height at the lowest layer of a placement is the price of its reach, before any further adapter."
    )
    plots = [
        plot("cost-time", "Time of each layer", time, figures.cost_time_figure(cost, chosen)),
        plot("cost-memory", "Memory of each layer", memory, figures.cost_memory_figure(cost, chosen)),
        plot("cost-reach", "What reach costs", reach, figures.reach_figure(cost)),
    ]
    source = {"measured": "Measured", "rates": "Estimated from FLOPs and bytes", "shapes": "Relative, from shapes alone"}[cost.source]
    device = f" on {where(cost)}" if cost.device else ""
    lead = f"{source}{device}: {cost.batch_size} records of {cost.tokens} tokens in a step, rank {cost.rank}, {cost.dtype}."
    return Part("cost", title, lead, plots, [_cost_table(cost)])


def _cost_table(cost: CostModel) -> Table:
    rows = [
        Line(
            str(at),
            [
                *(
                    Cell(seconds(value, cost), "", value)
                    for value in (layer.forward_seconds, layer.backward_seconds, layer.adapter_seconds)
                ),
                *(Cell(size(value), "", value) for value in (layer.saved_bytes, layer.adapter_saved_bytes)),
            ],
        )
        for at, layer in enumerate(cost.layers)
    ]
    return Table("Cost of every layer", ("Layer", "Forward", "Backward", "Adapter", "Kept", "Kept for adapter"), rows, folded=True)


def front_part(front: Json | None, placements: dict[str, Json]) -> Part:
    """Performance against cost, predicted: the front, plain placements and the reader's own."""
    title = "Cost and performance, predicted"
    if front is None:
        return Part("front", title, missing=Missing("No front was given.", "layercard pareto card.json -o front.json"))
    reading = (
        "The line is the cheapest placement for each performance; points are plain placements{own}. "
        "Where a point lies on the line or within its interval, the plain placement will do."
    ).format(own=", large diamonds those given" if placements else "")
    plots = [
        plot(
            f"front-{name}",
            f"Performance kept against {figures.COSTS[name][1]}",
            reading,
            figures.front_figure(front, name, placements),
            size="wide",
            table=_points_table(f"Least {figures.COSTS[name][1]} for each performance kept", points),
        )
        for name, points in front["fronts"].items()
    ]
    named = {str(point["name"]): point for point in front["baselines"]}
    table = Table(
        "Plain placements", ("Placement", *POINT_COLUMNS), [Line(name, _point_cells(point)) for name, point in named.items()], folded=True
    )
    source = {"shapes": "estimated from shapes alone", "measured": "modelled from what was measured"}.get(front["cost_source"], "modelled")
    lead = f"In % of all layers. Performance is predicted from the card, with its interval; costs are {source}."
    return Part("front", title, lead, plots, [table])


POINT_COLUMNS = ("Keeps %", "Time %", "Memory %", "Adapters %", "Layers", "Which")


def _points_table(caption: str, points: Sequence[Json]) -> Table:
    return Table(
        caption, ("Point", *POINT_COLUMNS), [Line(str(at + 1), _point_cells(point)) for at, point in enumerate(points)], folded=True
    )


def _point_cells(point: Json, layers: Sequence[int] | None = None) -> list[Cell]:
    kept = Estimate.read(point.get("performance_kept"))
    share = [Estimate.read((point.get(key) or {}).get("share")) for key in ("step_time", "peak_memory", "parameters")]
    which = list(point["layers"] if layers is None else layers)
    return [
        cell(kept, 0.01, 0),
        *(cell(found, 0.01, 0) for found in share),
        Cell(str(len(which)), "", len(which)),
        Cell(listed(which, " "), words=True),
    ]


def placement_part(sources: Sources, front: Json | None) -> Part:
    """The placements given, what is predicted of them, and why each layer was taken."""
    title = "The placement"
    if not sources.placements:
        why = "No placement was given. Choose layers from the card, then name the file:"
        return Part("placement", title, missing=Missing(why, "layercard select card.json -o placement.json"))
    given = [
        Line(called(name, placement), _point_cells(placement.get("predicted") or {}, placement["layers"]), "◆")
        for name, placement in sources.placements.items()
    ]
    size_of = len(next(iter(sources.placements.values()))["layers"])
    plain = [
        Line(str(point["name"]), _point_cells(point))
        for point in (front["baselines"] if front else ())
        if len(point["layers"]) == size_of or point["name"] == "all"
    ]
    table = Table("Placements given, and plain ones of as many layers: predicted", ("Placement", *POINT_COLUMNS), [*given, *plain])
    placement = next(iter(sources.placements.values()))
    notes = list(predicted_rows(placement.get("predicted") or {}).items())
    reasons = placement.get("reasons") or {}
    why_table = Table(
        "Why each layer",
        ("Layer", "Reason"),
        [Line(str(layer), [Cell(str(reasons[str(layer)]), words=True)]) for layer in placement["layers"] if str(layer) in reasons],
    )
    return Part("placement", title, tables=[table, *([why_table] if why_table.rows else [])], notes=notes)


def trade_off_part(rows: Sequence[Row], given: Sequence[str]) -> Part:
    """Time saved against performance lost, measured, as in the paper's second table."""
    title = "Trade-off, measured"
    known = [row for row in rows if row.kept is not None and (row.time_share is not None or row.memory is not None)]
    if not known:
        why = "No run of all layers to compare with was given. Train the placement beside all layers:"
        command = "layercard compare MODEL --data … --valid … --placements placement.json,all -o runs"
        return Part("trade-off-part", title, missing=Missing(why, command))
    reading = (
        "Each point is a placement that was really trained: left is faster, up keeps more of the loss reduction of all layers. "
        "A placement is worth taking when nothing lies above and to the left of it; with overlapping intervals, the cheaper one will do."
    )
    columns = ("Placement", "Layers", "Time %", "Speed-up %", "Kept %", "Drop %", "Speed-up / drop", "Peak MiB", "Adapter MiB")
    table = _folded("Cost and performance", columns, [Line(row.name, _trade_off(row), "◆" if row.name in given else "") for row in known])
    timed = any(row.time_share is not None for row in known)
    name, words = "trade-off", "Performance kept against training time"
    plots = [plot(name, words, reading, figures.trade_off_figure(known, given), size="wide")] if timed else []
    return Part("trade-off-part", title, "Speed-up is the training time saved, in % of all layers'.", plots, [table])


def _trade_off(row: Row) -> list[Cell]:
    saved = _turned(row.time_share)
    drop = _turned(row.kept)
    ratio = saved.value / drop.value if saved and drop and drop.value >= 0.05 else None
    return [
        Cell(str(len(row.layers)), "", len(row.layers)),
        cell(row.time_share, digits=1),
        cell(saved, digits=1),
        cell(row.kept, digits=1),
        cell(drop, digits=1),
        cell(None if ratio is None else Estimate(value=ratio), digits=1),
        cell(row.memory, 2**20, 0),
        cell(row.adapter_bytes, 2**20, 2),
    ]


def _turned(found: Estimate | None) -> Estimate | None:
    """100 less a number."""
    if found is None:
        return None
    low, high = (None if end is None else 100 - end for end in (found.high, found.low))
    return Estimate(value=100 - found.value, low=low, high=high)


def called(name: str, placement: Json) -> str:
    """What a placement is called: its file and what it was chosen for."""
    objective = str(placement["objective"])
    return name if name == objective else f"{name} ({objective})"
