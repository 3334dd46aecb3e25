"""A report as one self-contained HTML page: plots, tables, the calculator and provenance, without network, from files only.

`templates/sections.html.j2` holds the prose of the page and says where each figure and table stands; this module makes them.
"""

import gzip
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from layercard.card.numbers import PREDICTED, Json, interval, listed, predicted_rows, stability_words
from layercard.records import Estimate
from layercard.report import plots, tables
from layercard.report.roadmap import ModelFile, Roadmap, roadmap
from layercard.report.roi import GROUPS, RATIOS, SHOWN, Ratios, Roi, RoiInputs, bound, javascript, ratios_of, roi
from layercard.report.sources import Sources, called
from layercard.report.trials import TrialGroup, grouped, mean, plain_name, task_word
from layercard.report.words import MEASURES, amount, counted, device_of, measured, size, template, title_of
from layercard.selection.pareto import Front
from layercard.selection.placement import Placement
from layercard.training.records import Run
from layercard.trials.result import Result

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SIGNALS: tuple[str, ...] = ("resnorm", "resnorm_rank", "residual_fraction", "gradient_norm", "activation_energy", "effective_rank")
SIGNALS += ("condition", "noise_amplification", "predicted_gain")
PERFORMANCE = ("gain_estimate", "step_probe", "training_probe", "centrality")
LEADING = ("saved_month", "saved_year", "hours_saved", "payback_months")
"""Results of the calculator that are shown large."""


class Tile(NamedTuple):
    """A headline number: name, value and interval, where it comes from, and whether it was measured; `result`: the calculator's."""

    name: str
    value: str
    between: str = ""
    note: str = ""
    basis: str = ""
    result: str = ""


def report_page(sources: Sources, *, inputs: RoiInputs | None = None, commands: Sequence[str] = ()) -> str:
    """The whole report; it needs no network, and whatever the files say is text in it.

    Args:
        sources: What was read; its first card and placement are what the report is about.
        inputs: Figures that the calculator starts with.
        commands: Command lines that made all this.
    """
    card, placement, cost, transfer = sources.card, sources.placement, sources.card.cost, sources.transfer
    chosen = list(placement.layers) if placement else []
    names = {each.layers: called(name, each) for name, each in sources.placements.items()}
    groups = grouped(sources.trials, names)
    ratios = ratios_of(chosen, card, groups, placement.modules or "all") if placement else None
    saved = roi(inputs or RoiInputs(), ratios) if ratios else None
    drawn: dict[str, Figure] = {}
    shown: dict[str, Any] = dict.fromkeys(("coupling", "trained", "trade_off")) | {
        "card": tables.card_table(card, chosen),
        "placements": [],
    }

    # The first screen: what was gained, in a sentence, in four numbers and as a picture where runs say the loss of each step.
    tiles = tiles_of(sources, groups, ratios, saved)
    if curves := curves_of(sources, names):
        drawn["loss"] = plots.loss_curves(curves)

    # Theory and findings: every measure by depth, the coupling, the card as a whole.
    keys = [measure.key for measure in measured(card)]
    signals, performance = ([MEASURES[key] for key in part if key in keys] for part in (SIGNALS, PERFORMANCE))
    drawn |= {measure.key: plots.depth_profile(card, measure.key, chosen) for measure in [*signals, *performance]}
    drawn["card"], drawn["coupling"] = plots.heat_map(card, chosen), plots.coupling(card, chosen)
    shown["coupling"] = tables.coupling_table(card)

    # Findings: runs, tables of results, and whether cards of several data sets agree.
    if groups:
        shown["trained"] = tables.trained_table(groups)
    shown["results"] = [tables.result_table(table) for table in sources.tables if table["columns"]]
    if transfer:
        cards = [each["name"] for each in transfer.cards]
        lost = "Points of performance lost with the layers of the row's card on the column's data"
        drawn["transfer-plot"] = plots.transfer_matrix(transfer)
        shown["transfer"] = tables.matrix_table("Spearman's rank correlation", "Card", cards, transfer.matrix, 2)
        shown["lost"] = tables.matrix_table(lost, "Card", cards, transfer.lost, 1)

    # Trade-offs: the placement, the cost of each layer, the front, and what was measured.
    if placement:
        shown["placements"] = tables.placement_tables(sources.placements, sources.front)
    if cost:
        for kind in ("time", "memory", "reach"):
            drawn[f"cost-{kind}"] = plots.cost_by_depth(card, kind, chosen)
        shown["cost"] = tables.cost_table(cost)
    trained = [group for group in groups if group.performance_kept and (group.time_share or group.memory)]
    if trained:
        shown["trade_off"] = tables.trade_off_table(trained, list(names.values()))
    if any(group.time_share for group in trained):
        drawn["trade-off"] = plots.trade_off_of(trained, list(names.values()))

    # The calculator: the form, the results, and the script that computes them again as the reader types.
    calculator = saved and {
        "groups": GROUPS,
        "fields": RoiInputs.model_json_schema()["properties"],
        "given": saved.inputs.model_dump(),
        "bound": bound(saved.inputs, saved.ratios),
        "ratios": RATIOS,
        "shown": SHOWN,
        "leading": [formula for name in LEADING for formula in SHOWN if formula.name == name],
        "saved": saved,
        "script": Markup(javascript()),
    }
    data = card.data
    return _render(
        sources.front,
        sources.placements,
        drawn,
        shown,
        title=card.model.name,
        verdict=verdict(sources, tiles),
        lead=f"{card.model.layers} layers, profiled on {data.records:,} records of {data.source} ({data.tokens:,} tokens). "
        f"The ranking of its layers is {stability_words(card.stability)}.",
        card=card,
        chosen=chosen,
        signals=signals,
        performance=performance,
        units={key: card.units.get(key, "") for key in keys},
        transfer=transfer,
        transfer_measure=title_of(transfer.measure).lower() if transfer else "",
        predicted=list(predicted_rows(placement.predicted).items()) if placement else [],
        cost=cost,
        device=device_of(cost) if cost else "",
        roadmap=roadmap_of(sources),
        tiles=tiles,
        held_out=any(len(run.curve) > 2 for run in sources.curves),
        warnings=[*card.warnings, *sources.notes],
        calculator=calculator or "missing",
        provenance=_provenance(sources),
        commands=list(commands),
    )


def result_page(result: Result, run: Run, heats: Mapping[str, Any] | None = None, commands: Sequence[str] = ()) -> str:
    """The page of a finished `layercard run`: what was chosen and why, what it gave, and what all layers would have given.

    Args:
        result: Its result.
        run: The record of the full training, for its loss curve.
        heats: The table of the race (`title`, `columns`, `rows`); `None` where there was none.
        commands: Command lines that made all this.
    """
    before, after, every = result.measured.loss_before, result.measured.loss_after, result.all_layers
    between = "" if result.measured.interval is None else "{:.3f}–{:.3f}".format(*result.measured.interval)
    said = f"{before:.3f} to {after:.3f} nats per labelled token, on {result.valid['records']:,} held-out records"
    tiles = [Tile("Loss reduction", f"{result.measured.loss_reduction:.3f}", between, said, "measured")]
    if every.source == "estimated":
        ends = every.loss_reduction
        span = "" if ends.low is None or ends.high is None else f"{ends.low:.3f}–{ends.high:.3f}"
        tiles.append(Tile("All layers", f"{ends.value:.3f}", span, "loss reduction, from the heats of the race", "predicted"))
    step = f"{result.steps} steps of {result.step_seconds:.2f} s"
    faster = f"; all layers took {every.step_seconds:.2f} s a step" if every.source != "measured" and every.step_seconds else ""
    tiles.append(Tile("Time", amount(result.seconds.total) + " s", "", f"{step}{faster}; search {result.seconds.search:.0f} s", "measured"))
    share = f"; {100 * result.peak_memory_bytes / every.peak_memory_bytes:.0f} % of all layers'" if every.peak_memory_bytes else ""
    tiles.append(Tile("Peak memory", size(result.peak_memory_bytes), "", f"above the frozen model{share}", "measured"))
    drawn, shown = {}, {}
    if len(run.curve) > 1:
        points = ([moment.seconds for moment in run.curve], [moment.loss for moment in run.curve])
        drawn["loss"] = plots.loss_curves({result.chosen.name: points})
    if heats is not None:
        shown["race"] = tables.result_table(dict(heats))
    chosen = f"{result.chosen.name}: layers {listed(result.chosen.layers)}, learning rate {result.chosen.learning_rate:.3g}. {result.why}."
    settings = {name: value for name, value in result.settings.items() if value is not None}
    parts: dict[str, Any] = dict.fromkeys(("card", "calculator", "roadmap"))
    parts |= {"provenance": {"Model": result.model, "Data": result.data, "Held out": result.valid, "Settings": settings}}
    parts |= {"tiles": tiles, "warnings": result.notes, "commands": list(commands), "held_out": True, "result": result}
    return _render(None, {}, drawn, shown, title=str(result.model["name"]), verdict=f"{result.line().capitalize()}.", lead=chosen, **parts)


def front_page(front: Front) -> str:
    """A page with nothing but a front."""
    lead = f"What placements of adapters in its {front.model['layers']} layers are predicted to keep, and what they cost."
    parts: dict[str, Any] = dict.fromkeys(("card", "calculator", "provenance", "verdict", "roadmap"))
    parts |= dict.fromkeys(("tiles", "warnings", "commands"), ())
    return _render(front, {}, {}, {}, title=str(front.model["name"]), lead=lead, **parts)


def _render(
    front: Front | None, placements: Mapping[str, Placement], drawn: dict[str, "Figure"], shown: dict[str, Any], **parts: Any
) -> str:
    """The page of all this, with the figures and tables of a front: for each cost the cheapest placements, and the plain ones."""
    for name, points in front.fronts.items() if front else ():
        drawn[f"front-{name}"] = plots.front(front or {}, name, placements)  # type: ignore[arg-type]
        caption = f"Least {plots.COSTS[name][1]} for each performance kept, predicted"
        shown[f"front-{name}"] = tables.points_table(caption, "Point", {str(row): point for row, point in enumerate(points, 1)})
    if front:
        plain = {str(point["name"]): point for point in front.baselines}
        shown["plain"] = tables.points_table("Plain placements, predicted", "Placement", plain)
    figures = {name: figure.to_plotly_json() for name, figure in drawn.items()}
    for value in figures.values():
        value["layout"].pop("template", None)  # plotly's own theme
    parts = {
        "result": None,
        **parts,
        "front": front,
        "placements": placements,
        "figures": figures,
        "tables": shown,
        "how_predicted": PREDICTED,
    }
    titles = {name: title for name, (_, title) in plots.COSTS.items()}
    return template("page.html.j2", amount=amount).render(front_titles=titles, plotly_js=Markup(plotly_js()), **parts)


@cache
def plotly_js() -> str:
    """plotly.js with the traces that the figures use."""
    packed = files("layercard.report").joinpath("vendor/plotly-cartesian.min.js.gz").read_bytes()
    return gzip.decompress(packed).decode("utf-8")


# ---- the top of the page


def tiles_of(sources: Sources, groups: Sequence[TrialGroup], ratios: Ratios | None, saved: Roi | None) -> list[Tile]:
    """Performance kept, training time, peak memory and money of the placement; without one, what the card says by itself.

    Only what has an interval shows one: a single timing has none.
    """
    card, placement = sources.card, sources.placement
    if placement is None or ratios is None or saved is None:
        best = ", ".join(map(str, sorted(card.best_layers())))
        stable = card.stability.get("gain_estimate")
        words = "unknown" if stable is None else f"{stable:.2f}"
        return [
            Tile("Layers", str(card.model.layers)),
            Tile("Best single layers", best, "", "by gain estimate"),
            Tile("Ranking stability", words, "", "Spearman, two halves of the records"),
        ]
    group = next((each for each in groups if (each.layers, each.modules) == (placement.layers, placement.modules or "all")), None)
    # The runs on the card's own data where there are any, else all.
    task = task_word(card.data.source)
    runs = [run for run in group.trials if run.task == task] or list(group.trials) if group else []

    def ends(low: float | None, high: float | None, scale: float = 1.0) -> str:
        return "" if low is None or high is None else f"{scale * low:.0f}–{scale * high:.0f} %"

    performance = Tile("Performance kept", "unknown", "", "select from the card, or train it beside all layers")
    shares = [run.performance_kept for run in runs if run.performance_kept is not None]
    predicted = Estimate.read(placement.predicted.get("performance_kept"))
    if shares:
        average = mean(shares)
        where = ", ".join(dict.fromkeys(run.task for run in runs if run.performance_kept is not None))
        of = ", interval over runs" if len(shares) > 1 else ", interval over its held-out records" if average.low is not None else ""
        note = f"of all layers' loss reduction; {counted(len(shares), 'run')} on {where}{of}"
        performance = Tile("Performance kept", f"{average.value:.0f} %", ends(average.low, average.high), note, "measured")
    elif predicted is not None:
        between = ends(predicted.low, predicted.high, 100)
        performance = Tile("Performance kept", f"{100 * predicted.value:.0f} %", between, f"of all layers, {PREDICTED}", "predicted")

    time, speed = ratios.time, Tile("Training time", "unknown", "", "profile with --cost, or train it beside all layers")
    if time.measured or time.mid != 1:
        between = ends(1 - time.high, 1 - time.low, 100) if time.low < time.high else ""
        less = "less" if time.mid <= 1 else "more"
        times = f"{1 / time.mid:.2f} times as fast; " if time.mid > 0 else ""
        speed = Tile("Training time", f"{100 * abs(1 - time.mid):.0f} % {less}", between, f"{times}{time.source}", time.basis)

    # Memory above the frozen model, as runs count it; the calculator's ratio counts the model too.
    memory, peaks = (
        Tile("Peak memory", "unknown", "", "profile with --cost"),
        [run.peak_memory_bytes for run in runs if run.peak_memory_bytes],
    )
    if peaks:
        peak = mean([Estimate(value=value) for value in peaks]).divided_by(2**20)
        of_all = [run.memory_of_all for run in runs if run.peak_memory_bytes and run.memory_of_all]
        share = f"{100 * peak.value * 2**20 * len(of_all) / sum(of_all):.0f} % of all layers'; " if of_all else ""
        note = f"{share}above the frozen model, {counted(len(peaks), 'run')}"
        memory = Tile("Peak memory", f"{peak.value:,.0f} MiB", interval(peak), note, "measured")
    elif card.cost is not None:
        peak_of = card.cost.peak_memory
        share = f"{100 * peak_of(placement.layers) / peak_of(range(card.model.layers)):.0f} % of all layers'"
        memory = Tile("Peak memory", size(peak_of(placement.layers)), "", f"{share}, above the frozen model", ratios.memory.basis)

    year = amount(saved.results["saved_year"].mid)
    note = f"{saved.inputs.currency} at the prices below, which are yours to change"
    return [performance, speed, memory, Tile("Saved a year", year, "", note, result="saved_year")]


def verdict(sources: Sources, tiles: Sequence[Tile]) -> str:
    """The result in one sentence, from the tiles."""
    placement, depth = sources.placement, sources.card.model.layers
    if placement is None:
        return f"No layers are chosen yet; of {depth}, the best single ones are {tiles[1].value}."
    performance, time, memory, _ = tiles
    parts = []
    if performance.basis:
        between = f" ({performance.between.removesuffix(' %')})" if performance.between else ""
        verb = "keep" if performance.basis == "measured" else "are predicted to keep"
        parts.append(f"{verb} {performance.value}{between} of what all layers learn")
    if time.basis:
        parts.append(f"train in {time.value} time" + (f" ({time.basis})" if time.basis != "measured" else ""))
    if memory.note.partition("%")[1]:
        share = memory.note.partition(" %")[0]
        parts.append(f"take {share} % of their memory above the model" + (f" ({memory.basis})" if memory.basis != "measured" else ""))
    said = " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:]))) or "are chosen; nothing is known yet of what they keep or cost"
    return f"{len(placement.layers)} of {depth} layers ({listed(placement.layers)}) {said}."


def curves_of(sources: Sources, names: Mapping[tuple[int, ...], str]) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    """Seconds and losses of the first run of each placement on the card's own data, the placements given and all layers first.

    Losses on held-out records and on those of training are not mixed: where any run has the former, the others are left out.
    """
    runs, curves = [run for run in sources.curves if run.task == task_word(sources.card.data.source)], {}
    held_out = any(len(run.curve) > 2 for run in runs)
    for run in runs:
        name = names.get(run.layers) or plain_name(run.layers, run.depth) or f"layers {listed(run.layers, ' ')}"
        if name not in curves and (len(run.curve) > 2) == held_out:
            curves[name] = run.curve_points
    leading = [name for name in (*names.values(), "all") if name in curves]
    return {name: curves[name] for name in dict.fromkeys([*leading, *curves])}


def roadmap_of(sources: Sources) -> Roadmap:
    """Where the model stands, as far as these files say: what was done, and what is next with its command."""
    model = sources.card.model.model_dump()
    cards = [
        ModelFile(f"{name}.json", "card", each.model_dump(include={"model", "data", "stability"})) for name, each in sources.cards.items()
    ]
    files = [*cards, *(ModelFile(f"{name}.json", "placement", each.to_json()) for name, each in sources.placements.items())]
    files += [ModelFile("compare/compare.json", "comparison", comparison.to_json()) for comparison in sources.comparisons]
    for run in sorted(sources.trials, key=lambda run: sources.placement is None or run.layers != sources.placement.layers)[:1]:
        value = {"model": model, "placement": {"model": model, "layers": list(run.layers)}, "loss_reduction": run.loss_reduction}
        files.append(ModelFile("adapter/run.json", "run record", value))
    return roadmap(files, cards[0])


def _provenance(sources: Sources) -> dict[str, Json]:
    """Where all this comes from, as names and values."""
    card = sources.card
    machine = card.cost.model_dump(include={"device", "threads", "source", "batch_size", "tokens", "rank", "dtype"}) if card.cost else {}
    runs = ", ".join(dict.fromkeys(run.machine for run in sources.trials if run.machine))
    parts = {
        "Model": card.model.model_dump(exclude={"rounded", "sketch"}),
        "Data": card.data.model_dump(exclude_none=True),
        "Settings": card.settings,
        "Versions": card.versions,
        "Machine": {key: value for key, value in machine.items() if value} | ({"runs on": runs} if runs else {}),
        "Files": {**sources.used, **({"passed over": sources.passed} if sources.passed else {})},
    }
    return {name: part for name, part in parts.items() if part}
