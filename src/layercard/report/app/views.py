"""Values as HTML and figures for the page.

HTML is escaped, braces and dollars too, since the page puts it through a template of its own. Figures are those of the report, with the
placement and what was asked for on top.
"""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercard.card.card import LayerCard
from layercard.card.numbers import listed, percent, reasons_apart, stability_words
from layercard.export.export import exported
from layercard.export.trainers import LoraSettings, trainer_named
from layercard.files import json_text
from layercard.records import Estimate
from layercard.report import plots, tables
from layercard.report.app.jobs import CANCELLED, CANCELLING, DONE, FAILED, Progress
from layercard.report.app.library import COSTS, Choice, Entry, Wishes, rows
from layercard.report.headline import headline
from layercard.report.roadmap import ModelFile, roadmap as make_roadmap
from layercard.report.roi import SHOWN, Range, Roi, RoiInputs, ratios_of, roi, with_labels
from layercard.report.sources import Sources, read_sources
from layercard.report.words import MEASURES, amount, size, template, title_of
from layercard.selection.pareto import Front
from layercard.selection.placement import Placement
from layercard.selection.transfer import AGAIN, REUSE, Transfer
from layercard.settings import TrainSettings
from layercard.training.records import Run

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# ---- HTML

_PARTS: Any = template("app.html.j2").module


def _html(part: str, *values: Any) -> str:
    """A part of the template, without what the page's own template language would read."""
    return str(getattr(_PARTS, part)(*values)).translate({ord(mark): f"&#{ord(mark)};" for mark in "{}$@"})


def note(text: str, kind: str = "info") -> str:
    """A line of text; kind `info`, `good` or `bad`."""
    return _html("note", text, kind)


def roadmap(entries: Sequence[Entry], card: Entry | None) -> str:
    """Where the model of a card stands, from the files that can be read."""
    files = {entry.key: ModelFile(entry.place, entry.kind, entry.value) for entry in entries if entry.problem is None}
    return _html("roadmap", make_roadmap(list(files.values()), files[card.key] if card else None))


def tiles(choice: Choice, seconds: float | None = None) -> str:
    """What is predicted of a placement and how long the search took, or why there is none."""
    if choice.placement is None:
        return note(choice.problem, "bad")
    predicted, cells = choice.placement.predicted, []
    for name, (text, number) in rows(choice.placement).items():
        cells.append((name, text, round(min(max(number, 0.0), 100.0), 1) if name in COSTS else None))
    # Remarks of the selection, in the order of their weight.
    notes = ["Predicted from the card, in % of all layers.", predicted.get("remark"), (predicted.get("baseline") or {}).get("note")]
    if predicted.get("cost_source") == "shapes":
        notes.append("Costs are estimated from shapes alone; profile again with --cost to measure them.")
    if solver := predicted.get("solver"):
        proven = "No other choice is better" if solver["status"] == "optimal" else "Best found so far"
        gap = "" if solver.get("gap") is None else f" by more than {100 * solver['gap']:.2g} %" if solver["status"] == "optimal" else ""
        notes.append(f"{proven}{gap}{'' if seconds is None else f', in {seconds:.2f} s'}.")
    return _html("tiles", cells, f"Layers {listed(choice.layers)}", [str(text) for text in notes if text])


def card(entry: Entry) -> str:
    """What a card is of, how far its ranking can be trusted, and what to read with care."""
    assert entry.card is not None
    of = entry.card
    best = ", ".join(map(str, sorted(of.best_layers())))
    notes = [f"Best single layers: {best}. Its ranking is {stability_words(of.stability)}.", *of.warnings]
    lead = f"{of.model.name}: {of.model.layers} layers, measured on {of.data.records:,} records of {of.data.source}"
    return _html("tiles", [], lead, notes)


def card_table(of: LayerCard, layers: Sequence[int]) -> str:
    """Every layer with every measure."""
    table = tables.card_table(of, layers)
    rows = [(f"{line.head} {line.mark}".strip(), *(cell.text for cell in line.cells)) for line in table.rows]
    return _html("table", table.columns, rows, table.caption)


def outcome(kind: str, target: Path) -> str:
    """What a finished job gave: its sentence and numbers."""
    if kind == "profile":
        return note(f"Done. The card is {target.name}; choose it above.", "good")
    paths = [path for path in (target / name for name in ("result.json", "race.json", "card.json", "placement.json")) if path.exists()]
    if kind == "run":
        sources = read_sources([*paths, target / "adapter"])
        ratios = ratios_of(*_chosen(sources), sources.own_result)
        sentence, cells = headline(sources, [], ratios, roi(RoiInputs(), ratios))
        rows = [(tile.name, tile.value, None) for tile in cells if not tile.result]
        notes = [f"{tile.name}: {tile.note}" for tile in cells if tile.note and not tile.result]
        return _html("tiles", rows, sentence.rstrip(".") + ".", [*notes, f"The whole report is {target / 'report.html'}."])
    run = Run.load(target / "run.json")
    rows = [("Layers", str(len(run.placement["layers"])), None), ("Time", f"{run.train_seconds:.0f} s", None)]
    rows.append(("Memory above the model", size(run.peak_memory_bytes), None))
    if run.loss_before is not None and run.loss_after is not None:
        lead = f"The held-out loss went from {run.loss_before:.3f} to {run.loss_after:.3f} nats per token."
    else:
        lead = f"The training loss went from {run.losses[0]:.3f} to {run.losses[-1]:.3f}; nothing was held out to measure on."
    return _html("tiles", rows, lead, [f"The adapter is {target}."])


def _chosen(sources: Sources) -> tuple[Sequence[int], LayerCard | None, Sequence[Any], str]:
    layers, modules = sources.chosen or ((), "all")
    return layers, sources.card, (), modules


def take_away(choice: Choice, command: str = "") -> str:
    """Downloads, the command that makes the same placement, and the reasons; nothing where there is no placement."""
    if choice.placement is None:
        return ""
    links = []
    for name, title, text in (
        ("placement.json", "Placement", json_text(choice.placement.to_json())),
        ("lora_config.json", "PEFT LoraConfig", exported(choice.placement, trainer_named("peft"), LoraSettings()).text),
        ("train_trl.py", "TRL script", trl_script(choice.placement)),
    ):
        links.append((f"get-{name.partition('.')[0].replace('_', '-')}", name, title, base64.b64encode(text.encode()).decode()))
    common, special = reasons_apart(choice.placement.reasons)
    return _html("take_away", common, list(special.items()), command, links)


def trl_script(placement: Placement) -> str:
    """The script of `layercard export --to trl`, with a learning rate: TRL's own is that of training without adapters."""
    rate = placement.learning_rate or TrainSettings().rate
    return exported(placement, trainer_named("trl"), LoraSettings(learning_rate=rate)).text


def change_table(changes: Sequence[tuple[str, str, str, str]]) -> str:
    """What changes from the placement that the sliders come to, to the one picked by hand."""
    return _html("table", ("Predicted", "Sliders", "By hand", "Difference"), changes, "In % of all layers, with the interval in brackets")


def verdict(transfer: Transfer) -> str:
    """Two cards compared: the verdict with its reason, and the agreement of every measure."""
    (pair,) = transfer.pairs
    return _html("verdict", pair, {REUSE: "good", AGAIN: "bad"}.get(pair.verdict.word, "open"), title_of, listed)


def files(entries: Sequence[Entry]) -> str:
    """All files, the broken ones with what is wrong with them."""
    if not entries:
        return note("there is no file of layercard here yet; make a card on the tab Run, or upload one")
    rows = [(entry.name, entry.kind, entry.problem or entry.says) for entry in entries]
    return _html("table", ("File", "Kind", "What it says"), rows, f"{len(rows)} files")


def job(progress: Progress | None, kind: str = "profile") -> str:
    """How far a job is, and what it gave when it is done."""
    if progress is None:
        return note("nothing is running")
    if progress.state == DONE:
        return outcome(kind, Path(progress.message))
    if progress.state in (FAILED, CANCELLED):
        return note(("failed: " if progress.state == FAILED else "") + progress.message, "bad" if progress.state == FAILED else "info")
    left = progress.seconds * (1 / progress.share - 1) if progress.share > 0.1 else None
    clock = f"{duration(progress.seconds)} so far" + ("" if left is None else f", about {duration(left)} more")
    doing = "Cancelling" if progress.state == CANCELLING else progress.doing[:1].upper() + progress.doing[1:]
    return _html("job", doing, round(100 * progress.share), clock, progress.said)


def duration(seconds: float) -> str:
    """Seconds as a clock shows them.

    >>> duration(7), duration(130)
    ('0:07', '2:10')
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def savings(result: Roi) -> tuple[str, str]:
    """What a placement saves: the few results that people ask for first, and all of them.

    Each result is from measured ratios, beside it the one with assumptions, then what is assumed.
    """
    units = {formula.name: formula.unit.replace("money", result.inputs.currency) for formula in SHOWN}
    first = []
    for formula in SHOWN:
        if formula.name in ("saved_month", "saved_year", "payback_months", "hours_saved"):
            unit = "" if result.results[formula.name].mid is None else f" {units[formula.name].partition(' /')[0]}"
            first.append((formula.title, f"{_range(result.results[formula.name], 'never')}{unit}", None))
    more = "" if result.with_assumptions is None else "; with what is only estimated it may be more, see the table below"
    lead = f"For {result.ratios.placement}, against adapters in all layers"
    sides = {"From what was measured": result.results, "With assumptions": result.with_assumptions or {}}
    columns = [title for title, results in sides.items() if results]
    cells = []
    for formula in SHOWN:
        empty = "not known: a figure above is empty" if formula.needs else "never"
        cells.append([formula.title, *(_range(sides[title][formula.name], empty) for title in columns), units[formula.name]])
    table = _html("table", ["Result", *columns, "Unit"], cells, f"{lead}; value with lower and upper end.")
    assumed = _html("lines", "Not measured, or an example", [with_labels(line) for line in result.assumptions])
    return _html("tiles", first, lead, [f"From measured ratios alone{more}."]), table + assumed


def _range(of: Range, empty: str) -> str:
    if of.mid is None or of.low == of.high:
        return empty if of.mid is None else amount(of.mid)
    return f"{amount(of.mid)} ({amount(of.low)} to {'no end' if of.high is None else amount(of.high)})"


# ---- figures

LIMIT_OF = {"time": "max_time", "memory": "max_training_memory"}
"""The budget that each front's cost has."""
CHOSEN, HAND, LINE = "#c2410c", "#7c3aed", "#6b7280"


def front(of: Front | None, cost: Any, choice: Choice, hand: Choice | None, asked: Wishes) -> "Figure":
    """A front with the chosen placement, the one picked by hand, and what was asked for as lines; without its points while it is made."""
    figure = plots.front(of or Front(model={}, cost_source="", fronts={cost: ()}, baselines=()), cost)
    for each, name, symbol, colour in ((choice, "chosen", "star", CHOSEN), (hand, "by hand", "x", HAND)):
        if each is not None and each.placement is not None:
            performance = Estimate(**each.placement.predicted["performance_kept"])
            figure.add_scatter(
                x=[100 * each.placement.predicted[plots.COSTS[cost][0]]["share"]],
                y=[100 * performance.value],
                name=name,
                mode="markers",
                marker={"size": 15, "color": colour, "symbol": symbol, "line": {"width": 2, "color": "white"}},
                hovertext=[f"{name}: layers {listed(each.layers, ' ')}, {percent(performance)}"],
                hoverinfo="text",
            )
    limits, dash = asked.budgets.given(), {"line": {"dash": "dash", "color": LINE, "width": 1.5}}
    if least := limits.get("min_performance"):
        figure.add_hline(float(least.strip("%")), annotation_text=f"at least {least} kept", annotation_position="top left", **dash)
    if most := limits.get(LIMIT_OF[cost]):
        text = f"{plots.COSTS[cost][1]} at most {most}"
        figure.add_vline(float(most.strip("%")), annotation_text=text, annotation_position="bottom left", **dash)
    if of is None:
        figure.update_xaxes(range=[0, 105])
        figure.update_yaxes(range=[0, 105])
    # Below the axis title there is room for four lines of names, which a telephone needs.
    return _clear(figure, height=460, margin={"b": 140}, legend={"yref": "container", "y": 0, "yanchor": "bottom"})


def heat_map(of: LayerCard, layers: Sequence[int]) -> "Figure":
    """All measures of all layers, chosen layers marked."""
    return _clear(plots.heat_map(of, layers), height=420)


def coupling(of: LayerCard, layers: Sequence[int]) -> "Figure":
    """How far layers do the same work."""
    return _clear(plots.coupling(of, layers), height=420)


def depth(card: LayerCard, measure: str, layers: Sequence[int]) -> "Figure":
    """A measure over depth with the chosen layers as stars."""
    figure = plots.depth_profile(card, measure, layers)
    figure.update_yaxes(title=MEASURES[measure].title.lower())
    return _clear(figure, height=320)


def _clear(figure: "Figure", **layout: Any) -> "Figure":
    """Without a theme: the page colours text, grid and background."""
    clear, font = "rgba(0,0,0,0)", {"family": "system-ui, sans-serif", "size": 13}
    figure.update_layout(paper_bgcolor=clear, plot_bgcolor=clear, template=None, font=font, **layout)
    return figure
