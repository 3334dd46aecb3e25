"""Values as HTML and figures for the page.

HTML is escaped, braces and dollars too, since the page puts it through a template of its own. Figures are those of the report, with the
placement and what was asked for on top.
"""

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from layercard.card.card import LayerCard
from layercard.card.numbers import listed, percent
from layercard.export.export import exported
from layercard.export.trainers import LoraSettings, trainer_named
from layercard.files import json_text
from layercard.records import Estimate
from layercard.report import plots
from layercard.report.app.jobs import CANCELLED, DONE, FAILED, Progress
from layercard.report.app.library import COSTS, Choice, Entry, Wishes, rows, with_labels
from layercard.report.roadmap import ModelFile, roadmap as make_roadmap
from layercard.report.roi import SHOWN, Range, Roi
from layercard.report.words import MEASURES, amount, template, title_of
from layercard.selection.pareto import Front
from layercard.selection.placement import Placement
from layercard.selection.transfer import AGAIN, REUSE, Transfer
from layercard.settings import TrainSettings

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
        proven = "Proven best" if solver["status"] == "optimal" else "Best found so far"
        gap = "" if solver.get("gap") is None else f", at most {100 * solver['gap']:.2g} % from the bound"
        notes.append(f"{proven}{gap}{'' if seconds is None else f', in {seconds:.2f} s'}.")
    return _html("tiles", cells, f"Layers {listed(choice.layers)}", [str(text) for text in notes if text])


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
    return _html("take_away", list(choice.placement.reasons.items()), command, links)


def trl_script(placement: Placement) -> str:
    """The script of `layercard export --to trl`, with a learning rate: TRL's own is that of training without adapters."""
    script = exported(placement, trainer_named("trl"), LoraSettings()).text
    rate = placement.learning_rate or TrainSettings().rate
    return script.replace('output_dir="adapter"', f'output_dir="adapter", learning_rate={rate:g}', 1)


def change_table(changes: Sequence[tuple[str, str, str, str]]) -> str:
    """What changes from the chosen placement to the one picked by hand."""
    return _html("table", ("Predicted", "Chosen", "By hand", "Difference"), changes, "In % of all layers, with the interval in brackets")


def verdict(transfer: Transfer) -> str:
    """Two cards compared: the verdict with its reason, and the agreement of every measure."""
    (pair,) = transfer.pairs
    return _html("verdict", pair, {REUSE: "good", AGAIN: "bad"}.get(pair.verdict.word, "open"), title_of, listed)


def files(entries: Sequence[Entry]) -> str:
    """All files, the broken ones with what is wrong with them."""
    if not entries:
        return note("there is no file of layercard here yet; make a card on the tab Profile, or upload one")
    rows = [(entry.name, entry.kind, entry.problem or entry.says) for entry in entries]
    return _html("table", ("File", "Kind", "What it says"), rows, f"{len(rows)} files")


def job(progress: Progress | None) -> str:
    """How far a profile is."""
    if progress is None:
        return note("nothing is running")
    ended = {FAILED: ("failed: ", "bad"), CANCELLED: ("", "info"), DONE: ("done: the card is ", "good")}
    if progress.state in ended:
        before, kind = ended[progress.state]
        return note(before + progress.message, kind)
    return _html("job", progress, round(100 * min(1.0, progress.done / progress.total), 1) if progress.total else 0)


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

LIMIT_OF = {"time": "max_time", "memory": "max_memory"}
"""The budget that each front's cost has."""
CHOSEN, HAND, LINE = "#c2410c", "#7c3aed", "#6b7280"


def front(of: Front | None, cost: Any, choice: Choice, hand: Choice | None, asked: Wishes) -> "Figure":
    """A front with the chosen placement, the one picked by hand, and what was asked for as lines; without its points while it is made."""
    figure = plots.front(of or Front(model={}, cost_source="", fronts={cost: ()}, baselines=()), cost)
    for each, name, symbol, colour in ((choice, "chosen", "diamond", CHOSEN), (hand, "by hand", "x", HAND)):
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


def depth(card: LayerCard, measure: str, layers: Sequence[int]) -> "Figure":
    """A measure over depth with the chosen layers as diamonds."""
    figure = plots.depth_profile(card, measure, layers)
    figure.update_yaxes(title=MEASURES[measure].title.lower())
    return _clear(figure, height=320)


def _clear(figure: "Figure", **layout: Any) -> "Figure":
    """Without a theme: the page colours text, grid and background."""
    clear, font = "rgba(0,0,0,0)", {"family": "system-ui, sans-serif", "size": 13}
    figure.update_layout(paper_bgcolor=clear, plot_bgcolor=clear, template=None, font=font, **layout)
    return figure
