"""A report as one self-contained HTML page: plots, tables, the calculator and provenance, without network, from files only.

`templates/sections.html.j2` holds the prose of the page and says where each figure and table stands; this module makes them.
"""

import gzip
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from layercard.card.card import LayerCard
from layercard.card.numbers import PREDICTED, Json, listed, predicted_rows, reasons_apart, stability_words
from layercard.records import Estimate
from layercard.report import plots, tables
from layercard.report.headline import headline
from layercard.report.roadmap import ModelFile, Roadmap, roadmap
from layercard.report.roi import GROUPS, RATIOS, SHOWN, RoiInputs, bound, javascript, ratios_of, roi, with_labels
from layercard.report.sources import Sources, called
from layercard.report.trials import by_regime, grouped, plain_name
from layercard.report.words import MEASURES, amount, device_of, measured, read_on, template, title_of
from layercard.selection.pareto import Front
from layercard.selection.placement import Placement
from layercard.trials.result import Result

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SIGNALS: tuple[str, ...] = ("resnorm", "resnorm_rank", "residual_fraction", "gradient_norm", "activation_energy", "effective_rank")
SIGNALS += ("condition", "noise_amplification", "predicted_gain", "step_curvature", "longest_step")
PERFORMANCE = ("gain_estimate", "step_probe", "training_probe", "centrality")
LEADING = ("saved_month", "saved_year", "hours_saved", "payback_months")
"""Results of the calculator that are shown large."""


def report_page(sources: Sources, *, inputs: RoiInputs | None = None, commands: Sequence[str] = ()) -> str:
    """The whole report; it needs no network, and whatever the files say is text in it.

    Args:
        sources: What was read; its first card and placement, or its run, are what the report is about.
        inputs: Figures that the calculator starts with.
        commands: Command lines that made all this.
    """
    card, placement, result, transfer = sources.card, sources.placement, sources.own_result, sources.transfer
    layers, modules = sources.chosen or ((), "all")
    names = {each.layers: called(name, each) for name, each in sources.placements.items()} | (
        {layers: result.chosen.name} if result else {}
    )
    regimes = by_regime(grouped(sources.trials, names), layers, modules, sources.task)
    own = next(iter(regimes.values()), [])
    ratios = ratios_of(layers, card, own, modules, result) if layers else None
    saved = roi(inputs or RoiInputs(), ratios) if ratios else None
    drawn: dict[str, Figure] = {}
    shown: dict[str, Any] = {"coupling": None, "trade_off": None, "placements": []}

    # The first screen: what was gained, in a sentence, in four numbers and as a picture where runs say the loss of each step.
    verdict, tiles = headline(sources, own, ratios, saved)
    if curves := curves_of(sources, names):
        drawn["loss"] = plots.loss_curves(curves, all_layers_of(result) if result else None)

    # Theory and findings: every measure by depth, the coupling, the card as a whole.
    keys = [measure.key for measure in measured(card)] if card else []
    signals, performance = ([read_on(card, MEASURES[key]) for key in part if card and key in keys] for part in (SIGNALS, PERFORMANCE))
    if card is not None:
        drawn |= {measure.key: plots.depth_profile(card, measure.key, layers) for measure in [*signals, *performance]}
        drawn["card"], drawn["coupling"] = plots.heat_map(card, layers), plots.coupling(card, layers)
        shown |= {"card": tables.card_table(card, layers), "coupling": tables.coupling_table(card)}

    # Findings: runs, tables of results, and whether cards of several data sets agree.
    shown["race"] = tables.race_tables(sources.race) if sources.race else []
    shown["trained"] = [
        tables.trained_table(regime, groups, list(names.values()), folded=number > 0)
        for number, (regime, groups) in enumerate(regimes.items())
    ]
    shown["results"] = [tables.result_table(table) for table in sources.tables if table["columns"]]
    if transfer:
        cards = [each["name"] for each in transfer.cards]
        lost = "Points of performance lost with the layers of the row's card on the column's data"
        drawn["transfer-plot"] = plots.transfer_matrix(transfer)
        shown["transfer"] = tables.matrix_table("Spearman's rank correlation", "Card", cards, transfer.matrix, 2)
        shown["lost"] = tables.matrix_table(lost, "Card", cards, transfer.lost, 1)

    # Trade-offs: the placement, the cost of each layer, the front, and what was measured.
    if placement and (placement.predicted or not result):  # a run chooses by trainings and predicts nothing
        shown["placements"] = tables.placement_tables(sources.placements, sources.front)
    cost = card.cost if card else None
    if card is not None and cost is not None:
        for kind in ("time", "memory", "reach"):
            drawn[f"cost-{kind}"] = plots.cost_by_depth(card, kind, layers)
        shown["cost"] = tables.cost_table(cost)
    trained = [group for group in own if group.performance_kept and (group.time_share or group.memory)]
    if len(trained) > 1:
        shown["trade_off"] = tables.trade_off_table(trained[0].regime, trained, list(names.values()))
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
        "assumptions": [with_labels(text) for text in saved.assumptions],
        "script": Markup(javascript()),
    }
    return _render(
        sources.front,
        sources.placements,
        drawn,
        shown,
        title=str(sources.model["name"]),
        verdict=verdict,
        saves=bool(saved and tiles[-1].result and (saved.results["saved_year"].mid or 0) > 0),
        lead=_lead(sources),
        card=card,
        result=result,
        chosen=layers,
        signals=signals,
        performance=performance,
        units={key: card.units.get(key, "") for key in keys} if card else {},
        transfer=transfer,
        transfer_measure=title_of(transfer.measure).lower() if transfer else "",
        predicted=_notes(placement) if placement and not result else [],
        cost=cost,
        device=device_of(cost) if cost else "",
        roadmap=roadmap_of(sources, card) if card and not result else None,
        tiles=tiles,
        held_out=any(len(run.curve) > 2 for run in sources.curves),
        warnings=[*(card.warnings if card else ()), *(result.notes if result else ()), *sources.notes],
        calculator=calculator or "missing",
        provenance=_provenance(sources),
        commands=list(commands),
    )


def _notes(placement: Placement) -> list[tuple[str, str]]:
    """What is predicted of a placement, and why its layers were taken, as far as that is the same for all of them."""
    common, _ = reasons_apart(placement.reasons)
    return [*predicted_rows(placement.predicted).items(), *([("Why", common)] if common else [])]


def _lead(sources: Sources) -> str:
    """What the numbers are of, in two or three sentences."""
    card, result = sources.card, sources.own_result
    if result is not None:
        chosen, data = result.chosen, result.data
        stopped = f" {result.stopped.capitalize()}." if result.stopped else ""
        beside = (
            " All layers were trained beside it in the race alone, so their loss is estimated."
            if result.all_layers.source == "estimated"
            else ""
        )
        return (
            f"Trained for {result.steps:,} steps on {data['records']:,} records of {data['source']}. Chosen: {chosen.name}, layers "
            f"{listed(chosen.layers)}, learning rate {chosen.learning_rate:.3g}; {result.why}.{stopped}{beside}"
        )
    assert card is not None
    which = f"Chosen are layers {listed(sources.chosen[0])}. " if sources.chosen else ""
    return (
        f"{which}{card.model.layers} layers, profiled on {card.data.records:,} records of {card.data.source} "
        f"({card.data.tokens:,} tokens). The ranking of its layers is {stability_words(card.stability)}."
    )


def front_page(front: Front) -> str:
    """A page with nothing but a front."""
    lead = f"What placements of adapters in its {front.model['layers']} layers are predicted to keep, and what they cost."
    parts: dict[str, Any] = dict.fromkeys(("card", "result", "calculator", "provenance", "verdict", "roadmap"))
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


# ---- parts of the page


def curves_of(sources: Sources, names: Mapping[tuple[int, ...], str]) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    """Seconds and losses of the first run of each placement on the card's own data, the placements given and all layers first.

    Losses on held-out records and on those of training are not mixed: where any run has the former, the others are left out.
    """
    runs, curves = [run for run in sources.curves if run.task == sources.task], {}
    held_out = any(len(run.curve) > 2 for run in runs)
    for run in runs:
        name = names.get(run.layers) or plain_name(run.layers, run.depth) or f"layers {listed(run.layers, ' ')}"
        if name not in curves and (len(run.curve) > 2) == held_out:
            curves[name] = run.curve_points
    leading = [name for name in (*names.values(), "all") if name in curves]
    return {name: curves[name] for name in dict.fromkeys([*leading, *curves])}


def all_layers_of(result: Result) -> tuple[float, Estimate] | None:
    """Seconds and held-out loss that training all layers as long would have come to; `None` where nothing says so."""
    every = result.all_layers
    if every.source != "estimated" or not every.step_seconds:
        return None
    before, reduction = result.measured.loss_before, every.loss_reduction
    low, high = (None if end is None else before - end for end in (reduction.high, reduction.low))
    return every.step_seconds * result.steps, Estimate(value=before - reduction.value, low=low, high=high)


def roadmap_of(sources: Sources, card: LayerCard) -> Roadmap:
    """Where the model stands, as far as these files say: what was done, and what is next with its command."""
    model = card.model.model_dump()
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
    card, result = sources.card, sources.own_result
    machine = (
        card.cost.model_dump(include={"device", "threads", "source", "batch_size", "tokens", "rank", "dtype"}) if card and card.cost else {}
    )
    runs = ", ".join(dict.fromkeys(run.machine for run in sources.trials if run.machine))
    parts: dict[str, Json] = {"Model": {key: value for key, value in sources.model.items() if key not in ("rounded", "sketch")}}
    if result is not None:
        settings = {name: value for name, value in result.settings.items() if value is not None}
        parts |= {"Data": result.data, "Held out": result.valid, "Settings": settings}
    if card is not None:
        of = "" if result is None else " of the card"
        parts |= {f"Data{of}": card.data.model_dump(exclude_none=True), f"Settings{of}": card.settings, "Versions": card.versions}
    parts["Machine"] = {key: value for key, value in machine.items() if value} | ({"runs on": runs} if runs else {})
    parts["Files"] = {**sources.used, **({"passed over": sources.passed} if sources.passed else {})}
    return {name: part for name, part in parts.items() if part}
