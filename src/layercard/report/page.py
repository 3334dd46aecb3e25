"""A report as one self-contained HTML page: plots, tables, the calculator and provenance, without network, from files only.

`templates/sections.html.j2` holds the prose of the page and says where each figure and table stands; this module makes them.
"""

import gzip
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from markupsafe import Markup
from plotly.graph_objects import Figure

from layercard.card.numbers import Json, best_layers, interval, listed, predicted_rows, stability_words
from layercard.cost.model import CostModel
from layercard.records import Estimate
from layercard.report import figures, tables
from layercard.report.roi import GROUPS, RATIOS, SHOWN, Ratios, RoiInputs, bound, javascript, ratios_of, roi
from layercard.report.sources import Sources
from layercard.report.trials import TrialGroup, grouped, mean, task_word
from layercard.report.words import MEASURES, amount, counted, device_of, measured, seconds, size, template, title_of, unit_of

SIGNALS: tuple[str, ...] = ("resnorm", "resnorm_rank", "residual_fraction", "gradient_norm", "activation_energy", "effective_rank")
SIGNALS += ("condition", "noise_amplification", "predicted_gain")
PERFORMANCE = ("gain_estimate", "step_probe", "training_probe", "centrality")
LEADING = ("saved_month", "saved_year", "hours_saved", "payback_months")
"""Results of the calculator that are shown large."""


class Step(NamedTuple):
    """A step of the way from the frozen base to the adapter: `done`, or `next` or `later` with the command that does it."""

    phase: str
    title: str
    state: str
    detail: str
    command: str = ""


class Tile(NamedTuple):
    """A headline number: its name, value and interval, where it comes from, and whether it was measured."""

    name: str
    value: str
    between: str = ""
    note: str = ""
    measured: bool | None = None


def report_page(sources: Sources, *, inputs: RoiInputs | None = None, commands: Sequence[str] = ()) -> str:
    """The whole report; it needs no network, and whatever the files say is text in it.

    Args:
        sources: What was read; its first card and placement are what the report is about.
        inputs: Figures that the calculator starts with.
        commands: Command lines that made all this.
    """
    card, placement = sources.card, sources.placement
    chosen = [int(layer) for layer in placement["layers"]] if placement else []
    cost = CostModel.from_json(dict(card["cost"]), "the card's cost") if card.get("cost") else None
    names = {tuple(value["layers"]): tables.called(name, value) for name, value in sources.placements.items()}
    groups = grouped(sources.trials, names)
    ratios = ratios_of(chosen, card, groups) if chosen else None
    drawn: dict[str, Figure] = {}
    shown: dict[str, Any] = {"card": tables.card_table(card, chosen), "placements": []}

    # Theory and findings: every measure by depth, the coupling, the card as a whole.
    card_measures = [measure.key for measure in measured(card)]
    signals, performance = ([MEASURES[key] for key in keys if key in card_measures] for keys in (SIGNALS, PERFORMANCE))
    drawn |= {measure.key: figures.depth_figure(card, measure, chosen) for measure in [*signals, *performance]}
    drawn["card"] = figures.heat_figure(card, chosen)
    if card.get("coupling"):
        drawn["coupling"], shown["coupling"] = figures.coupling_figure(card, chosen), tables.coupling_table(card)

    # Findings: runs, tables of results, and whether cards of several data sets agree.
    if groups:
        shown["trained"] = tables.trained_table(groups)
    costly = [table for table in sources.tables if any("speed" in str(column) or "time" in str(column) for column in table["columns"])]
    with_columns = [table for table in sources.tables if table["columns"]]
    shown["results"] = tables.result_tables(table for table in with_columns if table not in costly)
    shown["costly"] = tables.result_tables(table for table in with_columns if table in costly)
    if transfer := sources.transfer:
        cards = [card["name"] for card in transfer["cards"]]
        lost = "Points of performance lost with the layers of the row's card on the column's data"
        drawn["transfer-plot"] = figures.transfer_figure(transfer)
        shown["transfer"] = tables.matrix_table("Spearman's rank correlation", "Card", cards, transfer["matrix"], 2)
        shown["lost"] = tables.matrix_table(lost, "Card", cards, transfer["lost"], 1)

    # Trade-offs: the placement, the cost of each layer, the front, and what was measured.
    if placement:
        shown["placements"] = tables.placement_tables(sources.placements, sources.front)
    if cost:
        drawn["cost-time"], drawn["cost-memory"] = figures.cost_time_figure(cost, chosen), figures.cost_memory_figure(cost, chosen)
        drawn["cost-reach"], shown["cost"] = figures.reach_figure(cost), tables.cost_table(cost)
    trained = [
        group for group in groups if group.performance_kept is not None and (group.time_share is not None or group.memory is not None)
    ]
    if trained:
        shown["trade_off"] = tables.trade_off_table(trained, list(names.values()))
    if any(group.time_share is not None for group in trained):
        drawn["trade-off"] = figures.trade_off_figure(trained, list(names.values()))
    front_figures, front_tables = _front_parts(sources.front, sources.placements)

    data = card["data"]
    return _render(
        title=str(card["model"]["name"]),
        lead=f"{card['model']['layers']} layers, profiled on {data['records']:,} records of {data['source']} ({data['tokens']:,} tokens). "
        f"The ranking of its layers is {stability_words(card)}.",
        card=card,
        chosen=chosen,
        signals=signals,
        performance=performance,
        units={key: unit_of(card, key) for key in card_measures},
        figures=_bare({**drawn, **front_figures}),
        tables={**dict.fromkeys(("coupling", "trained", "trade_off")), **shown, **front_tables},
        transfer=transfer,
        transfer_measure=title_of(transfer["measure"]).lower() if transfer else "",
        placements=sources.placements,
        predicted=list(predicted_rows(placement.get("predicted") or {}).items()) if placement else [],
        cost=cost,
        device=device_of(cost) if cost else "",
        front=sources.front,
        steps=steps_of(sources),
        tiles=tiles_of(sources, groups, ratios, cost),
        warnings=[str(warning) for warning in [*(card.get("warnings") or []), *sources.notes]],
        calculator=calculator(ratios, inputs or RoiInputs()) if ratios else "missing",
        provenance=_provenance(sources),
        commands=list(commands),
    )


def front_page(front: Json) -> str:
    """A page with nothing but a front."""
    drawn, shown = _front_parts(front, {})
    lead = f"What placements of adapters in its {front['model']['layers']} layers are predicted to keep, and what they cost."
    parts: dict[str, Any] = dict.fromkeys(("card", "calculator", "provenance", "placements"))
    parts |= dict.fromkeys(("steps", "tiles", "warnings", "commands"), ())
    return _render(title=str(front["model"]["name"]), lead=lead, front=front, figures=_bare(drawn), tables=shown, **parts)


def _front_parts(front: Json | None, placements: Mapping[str, Json]) -> tuple[dict[str, Figure], dict[str, tables.Table]]:
    """Figures and tables of a front: for each cost the cheapest placements, and the plain ones."""
    drawn, shown = {}, {}
    for name, points in front["fronts"].items() if front else ():
        caption = f"Least {figures.COSTS[name][1]} for each performance kept"
        drawn[f"front-{name}"] = figures.front_figure(front or {}, name, placements)
        shown[f"front-{name}"] = tables.points_table(caption, "Point", {str(row): point for row, point in enumerate(points, 1)})
    if front:
        plain = {str(point["name"]): point for point in front["baselines"]}
        shown["plain"] = tables.points_table("Plain placements", "Placement", plain)
    return drawn, shown


def _bare(drawn: Mapping[str, Figure]) -> dict[str, Any]:
    """Figures as JSON values without plotly's own theme."""
    values = {name: figure.to_plotly_json() for name, figure in drawn.items()}
    for value in values.values():
        value["layout"].pop("template", None)
    return values


def _render(**parts: Any) -> str:
    titles = {name: title for name, (_, title) in figures.COSTS.items()}
    return template("page.html.j2", amount=amount).render(front_titles=titles, plotly_js=Markup(plotly_js()), **parts)


@cache
def plotly_js() -> str:
    """plotly.js with the traces that the figures use."""
    packed = files("layercard.report").joinpath("vendor/plotly-cartesian.min.js.gz").read_bytes()
    return gzip.decompress(packed).decode("utf-8")


# ---- the top of the page


def steps_of(sources: Sources) -> list[Step]:
    """The five steps of the method, each with what is known of it, or with the command that does it."""
    card, placement = sources.card, sources.placement
    model, data, settings = card["model"], card["data"], card["settings"]
    fit = f"{data['fit_records']} of {data['records']}" if data.get("fit_records") else f"{data['records']}"
    samples = settings.get("label_samples", "–")
    ranking = stability_words(card).partition(" (")[0]
    steps = [
        Step("Phase 1: diagnostic profiling", "Frozen base", "done", f"{model['name']}, {model['layers']} layers, {settings.get('dtype')}"),
        Step("", "Local quadratic model", "done", f"steps from {fit} records, curvature from {samples} label samples"),
        Step("", "Layer Card", "done", f"{data['tokens']:,} tokens; its ranking is {ranking}"),
    ]
    selection, tuning = "Phase 2: objective-driven selection", "Phase 3: targeted fine-tuning"
    if placement is None:
        select = Step(selection, "Placement", "next", "choose layers", "layercard select card.json -o placement.json")
        return [*steps, select, Step(tuning, "Adapter", "later", "train it")]
    layers = tuple(placement["layers"])
    which = f"{len(layers)} of {model['layers']} layers, chosen for {placement['objective']}: {listed(layers, ' ')}"
    steps.append(Step(selection, "Placement", "done", which))
    count = sum(run.layers == layers for run in sources.trials)
    if count:
        trained = f"trained {'once' if count == 1 else f'in {count} runs'}, {len(sources.trials)} runs in all"
        return [*steps, Step(tuning, "Adapter", "done", trained)]
    command = f"layercard train {model['name']} --placement placement.json --data train.jsonl -o adapter"
    return [*steps, Step(tuning, "Adapter", "next", "train it", command)]


def tiles_of(sources: Sources, groups: Sequence[TrialGroup], ratios: Ratios | None, cost: CostModel | None) -> list[Tile]:
    """Performance kept, speed-up, peak memory, layers and latency of the placement; without one, what the card says by itself."""
    card, placement = sources.card, sources.placement
    depth = int(card["model"]["layers"])
    stable = Estimate.read((card.get("stability") or {}).get("gain_estimate"))
    stability = Tile("Ranking stability", f"{stable.value:.2f}" if stable else "unknown", "", "Spearman, two halves of the records")
    if placement is None or ratios is None:
        best = ", ".join(map(str, sorted(best_layers(card)))) or "not measured"
        return [Tile("Layers", str(depth)), Tile("Best single layers", best, "", "by gain estimate"), stability]
    layers = tuple(placement["layers"])
    group = next((group for group in groups if group.layers == layers), None)
    # The runs on the card's own data where there are any, else all.
    task = task_word(str(card["data"]["source"]))
    runs = [run for run in group.trials if run.task == task] or list(group.trials) if group else []

    def ends(low: float | None, high: float | None, scale: float = 1.0) -> str:
        return "" if low is None or high is None else f"{scale * low:.0f}–{scale * high:.0f} %"

    performance = Tile("Performance kept", "unknown", "", "select from the card, or train it beside all layers")
    measured_kept = [run.performance_kept for run in runs if run.performance_kept is not None]
    predicted = Estimate.read((placement.get("predicted") or {}).get("performance_kept"))
    if measured_kept:
        average = mean(measured_kept)
        where = ", ".join(dict.fromkeys(run.task for run in runs if run.performance_kept is not None))
        note = f"of all layers' loss reduction; {counted(len(measured_kept), 'run')} on {where}"
        performance = Tile("Performance kept", f"{average.value:.0f} %", ends(average.low, average.high), note, True)
    elif predicted is not None:
        between = ends(predicted.low, predicted.high, 100)
        performance = Tile("Performance kept", f"{100 * predicted.value:.0f} %", between, "of all layers, predicted from the card", False)

    time, speed = ratios.time, Tile("Training speed-up", "unknown", "", "profile with --cost, or train it beside all layers")
    if time.measured or time.mid != 1:
        between = ends(1 - time.high, 1 - time.low, 100) if time.low < time.high else ""
        times = f", {1 / time.mid:.2f} times as fast" if time.mid > 0 else ""
        speed = Tile("Training speed-up", f"{100 * (1 - time.mid):.0f} %", between, f"less time{times}; {time.source}", time.measured)

    # Memory above the frozen model, as runs count it; the ratio counts the model too.
    memory, peaks = Tile("Peak memory", "unknown", "", "profile with --cost"), [run.memory for run in runs if run.memory]
    if peaks:
        peak = mean([Estimate(value=value) for value in peaks])
        mib = peak.divided_by(2**20)
        of_all = [run.memory_of_all for run in runs if run.memory and run.memory_of_all]
        share = f"{100 * peak.value * len(of_all) / sum(of_all):.0f} % of all layers; " if of_all else ""
        note = f"{share}above the frozen model, {len(peaks)} runs"
        memory = Tile("Peak memory", f"{mib.value:,.0f} MiB", interval(mib), note, True)
    elif cost is not None:
        share = f"{100 * cost.peak_memory(layers) / cost.peak_memory(range(depth)):.0f} % of all layers"
        note = f"{share}; above the frozen model, {ratios.memory.source}"
        memory = Tile("Peak memory", size(cost.peak_memory(layers)), "", note, cost.source == "measured")

    latency, added = ratios.latency, Tile("Added latency", "unknown", "", "profile with --cost")
    if cost is not None and (latency.measured or latency.mid != 1):
        per_token = seconds(cost.inference_latency(layers), cost)
        note = f"of what adapters in all layers add, {per_token} a token; {latency.source}"
        added = Tile("Added latency", f"{100 * latency.mid:.0f} %", "", note, latency.measured)
    note = f"layers {listed(layers, ' ')}, chosen for {placement['objective']}"
    return [performance, speed, memory, Tile("Layers adapted", f"{len(layers)} of {depth}", "", note), added, stability]


# ---- the end of the page


def calculator(ratios: Ratios, inputs: RoiInputs) -> dict[str, Any]:
    """Values for the template: the form, the results, and the script that computes them again as the reader types."""
    return {
        "groups": GROUPS,
        "fields": RoiInputs.model_json_schema()["properties"],
        "given": inputs.model_dump(),
        "bound": bound(inputs, ratios),
        "ratios": RATIOS,
        "shown": SHOWN,
        "leading": [formula for name in LEADING for formula in SHOWN if formula.name == name],
        "saved": roi(inputs, ratios),
        "script": Markup(javascript()),
    }


def _provenance(sources: Sources) -> dict[str, dict[str, Any]]:
    """Where all this comes from, as names and values."""
    card = sources.card
    cost = card.get("cost") or {}
    machine = {key: cost[key] for key in ("device", "threads", "source", "batch_size", "tokens", "rank", "dtype") if cost.get(key)}
    runs = ", ".join(dict.fromkeys(run.machine for run in sources.trials if run.machine))
    parts = {
        "Model": card["model"],
        "Data": card["data"],
        "Settings": card["settings"],
        "Versions": card.get("versions") or {},
        "Machine": machine | ({"runs on": runs} if runs else {}),
        "Files": {**sources.used, **({"passed over": sources.passed} if sources.passed else {})},
    }
    return {name: dict(part) for name, part in parts.items() if part}
