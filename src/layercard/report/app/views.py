"""Values as HTML and figures for the page.

HTML is escaped, braces and dollars too, since the page puts it through a template of its own. Figures are those of the report, as plotly's
JSON values without a theme: the parts that stay are drawn once, and what moves with a slider is put on top of them.
"""

import base64
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from layercard.adapters.lora_config import lora_arguments
from layercard.card.card import LayerCard
from layercard.card.numbers import listed, short
from layercard.errors import visible
from layercard.files import json_text
from layercard.report import plots
from layercard.report.app.jobs import CANCELLED, DONE, FAILED, Progress
from layercard.report.app.library import COSTS, Choice, Entry, Wishes, rows, with_labels
from layercard.report.plots import COSTS as AXES
from layercard.report.roadmap import ModelFile, roadmap as make_roadmap
from layercard.report.roi import SHOWN, Range, Roi
from layercard.report.words import MEASURES, template, title_of
from layercard.selection.pareto import Front
from layercard.selection.placement import Placement
from layercard.selection.transfer import AGAIN, REUSE, Transfer
from layercard.settings import TrainSettings

# ---- HTML

INTRO = (
    "Three phases lead from a model to adapters that are trained only where they matter. Choose a card above, or make the first one: "
    "with the command, or on the tab Profile."
)
_PARTS: Any = template("app.html.j2").module
_SCRIPT = '''"""Fine-tunes {model_words} in layers {layers_words} only. Put {file} beside this script; needs trl, peft and datasets."""

import json
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

MODEL = {model}
DATA = "train.jsonl"  # records with prompt and completion, messages or text

trainer = SFTTrainer(
    model=MODEL,
    train_dataset=load_dataset("json", data_files=DATA, split="train"),
    args=SFTConfig(output_dir="adapter", learning_rate={learning_rate}, per_device_train_batch_size={batch_size}, num_train_epochs=1),
    peft_config=LoraConfig(**json.loads(Path({file!r}).read_text(encoding="utf-8"))),
)
trainer.train()
trainer.save_model()
'''
LORA_FILE = "lora_config.json"


def _html(part: str, *values: Any) -> str:
    """A part of the template, without what cannot be seen and what the page's own template language would read."""
    html = visible(str(getattr(_PARTS, part)(*values)))
    return html.replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("@", "&#64;")


def note(text: str, kind: str = "info") -> str:
    """A line of text; kind `info`, `good` or `bad`."""
    return _html("note", text, kind)


def roadmap(entries: Sequence[Entry], card: Entry | None) -> str:
    """Where the model of a card stands, from the files that can be read."""
    files = {entry.key: ModelFile(entry.place, entry.kind, entry.value) for entry in entries if entry.problem is None}
    return _html("roadmap", make_roadmap(list(files.values()), files[card.key] if card else None), INTRO)


def tiles(choice: Choice, seconds: float | None = None) -> str:
    """What is predicted of a placement and how long the search took, or why there is none."""
    if choice.placement is None:
        return note(choice.problem or "no placement", "bad")
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
    files = []
    for name, title, text, kind in (
        ("placement.json", "Placement", json_text(choice.placement.to_json()), "application/json"),
        (LORA_FILE, "PEFT LoraConfig", lora_json(choice.placement), "application/json"),
        ("train_trl.py", "TRL script", trl_script(choice.placement), "text/x-python"),
    ):
        data = base64.b64encode(text.encode("utf-8")).decode("ascii")
        files.append({"id": f"get-{name.partition('.')[0].replace('_', '-')}", "name": name, "title": title, "type": kind, "data": data})
    return _html("take_away", list(choice.placement.reasons.items()), command, files)


def lora_json(placement: Placement) -> str:
    """Keyword arguments of `peft.LoraConfig` that put adapters exactly where a placement says, as the text of a file."""
    usual = TrainSettings()
    return json_text(lora_arguments(placement, r=usual.rank, lora_alpha=usual.alpha, lora_dropout=usual.dropout))


def trl_script(placement: Placement) -> str:
    """A script that trains with TRL; whatever the placement says of the model is a quoted string in it."""
    name, usual = str(placement.model.get("name", "model")), TrainSettings()
    return _SCRIPT.format(
        model=ascii(name),
        # In the docstring only letters, digits and the usual marks of model names may stand.
        model_words="".join(letter if letter.isalnum() or letter in "-_./ " else "?" for letter in name)[:80],
        layers_words=", ".join(map(str, placement.layers)),
        file=LORA_FILE,
        learning_rate=f"{placement.learning_rate or usual.rate:g}",
        batch_size=usual.batch_size,
    )


def change_table(changes: Sequence[tuple[str, str, str, str]]) -> str:
    """What changes from the chosen placement to the one picked by hand."""
    return _html("table", ("Predicted", "Chosen", "By hand", "Difference"), changes, "In % of all layers, with the interval in brackets")


def verdict(transfer: Transfer) -> str:
    """Two cards compared: the verdict with its reason, and the agreement of every measure."""
    (pair,) = transfer.pairs
    word, measures = pair.verdict.word, []
    for key, rank in pair.measures.items():
        measures.append((title_of(key), f"{rank.value:.2f}", f"{rank.low:.2f} to {rank.high:.2f}", f"{rank.p:.3f}"))
    details = [
        f"Layers of {swap.source} ({listed(swap.layers)}) keep {swap.kept:.1f} % on {swap.target}, whose own ({listed(swap.own)}) keep "
        f"{swap.kept_own:.1f} %: {swap.lost.value:.1f} points lost ({swap.lost.low:.1f} to {swap.lost.high:.1f})."
        for swap in pair.swaps
    ]
    details.append(f"Of the best {pair.top.k} layers {pair.top.shared} are shared; by chance it would be {pair.top.expected:.1f}.")
    kind = {REUSE: "good", AGAIN: "bad"}.get(word, "open")
    columns = ("Measure", "Spearman", "95 % interval", "p")
    return _html("verdict", word, kind, pair.verdict.reason, "Rank correlation of the layer profiles", columns, measures, details)


def files(entries: Sequence[Entry]) -> str:
    """All files, the broken ones with what is wrong with them."""
    if not entries:
        return note("there is no file of layercard here yet; make a card on the tab Profile, or upload one")
    cells = []
    for entry in entries:
        model = entry.value.get("model")
        says = str(model.get("name", "")) if isinstance(model, dict) else ""
        if entry.card is not None:
            says += f", {entry.card.model.layers} layers, {entry.card.data.records:,} records of {entry.card.data.source}"
        elif entry.kind == "placement":
            says += f", layers {listed(sorted(entry.value['layers']))}"
        cells.append((entry.name, entry.kind, entry.problem or says))
    return _html("table", ("File", "Kind", "What it says"), cells, f"{len(cells)} files")


def job(progress: Progress | None) -> str:
    """How far a profile is."""
    if progress is None:
        return note("nothing is running")
    ended = {FAILED: ("failed: ", "bad"), CANCELLED: ("", "info"), DONE: ("done: the card is ", "good")}
    if progress.state in ended:
        before, kind = ended[progress.state]
        return note(before + progress.message, kind)
    count = f", {progress.done} of {progress.total}" if progress.total else ""
    return _html("job", progress, f"Running: {progress.phase}{count}")


def savings(result: Roi) -> tuple[str, str]:
    """What a placement saves: the few results that people ask for first, and all of them.

    Each result is from measured ratios, beside it the one with assumptions, then what is assumed.
    """
    money = {formula.name: formula.unit.replace("money", result.inputs.currency) for formula in SHOWN}
    titles = {formula.name: formula.title for formula in SHOWN}
    first = []
    for name in ("saved_month", "saved_year", "payback_months", "hours_saved"):
        unit = "" if result.results[name].mid is None else f" {money[name].partition(' /')[0]}"
        first.append((titles[name], f"{_range(result.results[name], 'never')}{unit}", None))
    more = "" if result.with_assumptions is None else "; with what is only estimated it may be more, see the table below"
    lead = f"For {result.ratios.placement}, against adapters in all layers"
    headline = _html("tiles", first, lead, [f"From measured ratios alone{more}."])

    sides = {"From what was measured": result.results, "With assumptions": result.with_assumptions}
    shown = {title: values for title, values in sides.items() if values is not None}
    cells = []
    for formula in SHOWN:
        empty = "not known: a figure above is empty" if formula.needs else "never"
        cells.append([formula.title, *(_range(values[formula.name], empty) for values in shown.values()), money[formula.name]])
    caption = f"Against adapters in all layers, for {result.ratios.placement}; value with lower and upper end."
    table = _html("table", ["Result", *shown, "Unit"], cells, caption)
    return headline, table + _html("lines", "Not measured, or an example", [with_labels(line) for line in result.assumptions])


def _range(amounts: Range, empty: str) -> str:
    def text(value: float | None) -> str:
        if value is None:
            return "no end"
        return f"{value:,.0f}".replace("-", "−") if abs(value) >= 1000 else short(value)

    if amounts.mid is None:
        return empty
    ends = "" if amounts.low == amounts.high else f" ({text(amounts.low)} to {text(amounts.high)})"
    return f"{text(amounts.mid)}{ends}"


# ---- figures

FRONTS = tuple(AXES)
"""Names of the fronts."""
LIMIT_OF = {"time": "max_time", "memory": "max_memory"}
"""The budget that each front's cost has."""
CHOSEN, HAND, LINE = "#c2410c", "#7c3aed", "#6b7280"

Figure = dict[str, Any]


def front(value: Front | None, name: str) -> Figure:
    """A front without any choice on it; without a value (it is being made) an empty one with the same axes."""
    figure = plots.front(value or Front(model={}, cost_source="", fronts={name: ()}, baselines=()), name)  # type: ignore[arg-type]
    if value is None:
        figure.update_xaxes(range=[0, 105])
        figure.update_yaxes(range=[0, 105])
    figure.update_layout(margin={"b": 110}, legend={"y": -0.32})
    return _without_theme(figure, 420)


def depth(card: LayerCard, measure: str) -> Figure:
    """A measure over depth, without any choice on it."""
    figure = plots.depth_profile(card, measure)
    figure.update_yaxes(title=MEASURES[measure].title.lower())
    return _without_theme(figure, 320)


def _without_theme(figure: go.Figure, height: int) -> Figure:
    """As a JSON value without backgrounds and template, at a height."""
    clear = "rgba(0,0,0,0)"
    font = {"family": "system-ui, sans-serif", "size": 13}
    figure.update_layout(height=height, paper_bgcolor=clear, plot_bgcolor=clear, template="none", font=font)
    value: Figure = figure.to_plotly_json()
    value["layout"].pop("template", None)
    return value


def with_choice(base: Figure, name: str, choice: Choice, hand: Choice | None, asked: Wishes) -> Figure:
    """A front (`time` or `memory`) with the chosen placement, the one picked by hand, and what was asked as lines."""
    key, title = AXES[name]
    traces: list[Figure] = []
    for each, symbol, colour, words in ((choice, "diamond", CHOSEN, "chosen"), (hand, "x", HAND, "by hand")):
        if each is None or each.placement is None:
            continue
        predicted = each.placement.predicted
        kept = {end: 100 * predicted["performance_kept"][end] for end in ("value", "low", "high")}
        between = f"{kept['value']:.0f} % ({kept['low']:.0f}–{kept['high']:.0f})"
        marker = {"size": 15, "color": colour, "symbol": symbol, "line": {"width": 2, "color": "white"}}
        hover = {"hovertext": [f"{words}: layers {listed(each.layers, ' ')}, {between}"], "hoverinfo": "text"}
        point = {"x": [100 * predicted[key]["share"]], "y": [kept["value"]]}
        traces.append({"type": "scatter", "mode": "markers", "name": words, "marker": marker, **point, **hover})
    dashed = {"type": "line", "line": {"dash": "dash", "color": LINE, "width": 1.5}}
    plain = {"showarrow": False, "font": {"size": 12}}
    shapes, notes = [], []
    limit, least = asked.limits.get(LIMIT_OF[name]), asked.min_performance
    if limit is not None:
        shapes.append(dashed | {"x0": limit, "x1": limit, "yref": "paper", "y0": 0, "y1": 1})
        notes.append(plain | {"text": f"{title} at most {limit:g} %", "x": limit, "yref": "paper", "y": 0.02, "xanchor": "right"})
    if least is not None:
        shapes.append(dashed | {"y0": least, "y1": least, "xref": "paper", "x0": 0, "x1": 1})
        place = {"y": least, "xref": "paper", "x": 0.01, "xanchor": "left", "yanchor": "bottom"}
        notes.append(plain | {"text": f"at least {least:g} % kept", **place})
    return {"data": [*base["data"], *traces], "layout": {**base["layout"], "shapes": shapes, "annotations": notes}}


def with_layers(base: Figure, layers: Sequence[int]) -> Figure:
    """A measure over depth with the chosen layers as diamonds."""
    line = next(trace for trace in reversed(base["data"]) if "markers" in str(trace.get("mode")))
    chosen = [row for row, layer in enumerate(line["x"]) if layer in set(layers)]
    marker = {"size": 11, "color": CHOSEN, "symbol": "diamond", "line": {"width": 1, "color": "white"}}
    picked = {name: [line[name][row] for row in chosen] for name in ("x", "y", "hovertext")}
    trace = {"type": "scatter", "mode": "markers", "hoverinfo": "text", "marker": marker, **picked}
    return {"data": [*base["data"], trace], "layout": base["layout"]}
