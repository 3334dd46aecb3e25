"""Values as HTML and figures for the page.

HTML is escaped, braces and dollars too, since the page puts it through a template of its own. Figures are those of the report, as plotly's
JSON values without a theme: the parts that stay are drawn once, and what moves with a slider is put on top of them.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined

from layercard.adapters.lora_config import lora_arguments
from layercard.card.numbers import Json, listed, short
from layercard.report.app.jobs import CANCELLED, DONE, FAILED, Progress
from layercard.report.app.library import COSTS, Choice, Entry, rows, with_labels
from layercard.report.figures import COSTS as AXES, depth_figure, front_figure
from layercard.report.roadmap import ModelFile, roadmap as make_roadmap
from layercard.report.roi import SHOWN, Range, Roi
from layercard.report.words import MEASURES
from layercard.selection.placement import Placement
from layercard.settings import TrainSettings

# ---- HTML

INTRO = (
    "Three phases lead from a model to adapters that are trained only where they matter. Choose a card above, or make the first one: "
    "with the command, or on the tab Profile."
)
_GLOBALS = {
    "words": {"done": "done", "next": "next", "open": "to come"},
    "marks": {"done": "✓", "next": "→", "open": "○"},
}
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


@cache
def _template() -> Any:
    loader = PackageLoader("layercard.report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("app.html.j2", globals=_GLOBALS).module


def _html(part: str, *values: Any) -> str:
    """A part of the template, without what the page's own template language would read."""
    html = str(getattr(_template(), part)(*values))
    return html.replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("@", "&#64;")


def note(text: str, kind: str = "info") -> str:
    """A line of text; kind `info`, `good` or `bad`."""
    return _html("note", text, kind)


def roadmap(entries: Sequence[Entry], card: Entry | None) -> str:
    """Where the model of a card stands, from the files that can be read."""
    readable = [ModelFile(entry.place, entry.kind, entry.value) for entry in entries if entry.problem is None]
    return _html("roadmap", make_roadmap(readable, None if card is None else ModelFile(card.place, "card", card.value)), INTRO)


def tiles(choice: Choice, seconds: float | None = None) -> str:
    """What is predicted of a placement and how long the search took, or why there is none."""
    if choice.placement is None:
        return note(choice.problem or "no placement", "bad")
    value = choice.placement.to_json()
    predicted = value["predicted"]
    cells = []
    for name, text in rows(value).items():
        share = predicted[COSTS[name][0]]["share"] if name in COSTS else None
        cells.append((name, text, None if share is None else round(100 * min(max(share, 0.0), 1.0), 1)))
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
    value = choice.placement.to_json()
    files = []
    for name, title, text, kind in (
        ("placement.json", "Placement", json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "application/json"),
        (LORA_FILE, "PEFT LoraConfig", lora_json(value), "application/json"),
        ("train_trl.py", "TRL script", trl_script(value), "text/x-python"),
    ):
        data = base64.b64encode(text.encode("utf-8")).decode("ascii")
        files.append({"id": f"get-{name.partition('.')[0].replace('_', '-')}", "name": name, "title": title, "type": kind, "data": data})
    return _html("take_away", list(value["reasons"].items()), command, files)


def lora_json(placement: Json) -> str:
    """Keyword arguments of `peft.LoraConfig` that put adapters exactly where a placement says, as the text of a file."""
    usual = TrainSettings()
    arguments = lora_arguments(Placement.from_json(dict(placement)), r=usual.rank, lora_alpha=usual.alpha, lora_dropout=usual.dropout)
    return json.dumps(arguments, indent=1, ensure_ascii=False) + "\n"


def trl_script(placement: Json) -> str:
    """A script that trains with TRL; whatever the placement says of the model is a quoted string in it."""
    name, usual = str(placement["model"].get("name", "model")), TrainSettings()
    return _SCRIPT.format(
        model=ascii(name),
        # In the docstring only letters, digits and the usual marks of model names may stand.
        model_words="".join(letter if letter.isalnum() or letter in "-_./ " else "?" for letter in name)[:80],
        layers_words=", ".join(str(int(layer)) for layer in placement["layers"]),
        file=LORA_FILE,
        learning_rate=f"{usual.learning_rate:g}",
        batch_size=usual.batch_size,
    )


def change_table(changes: Sequence[tuple[str, str, str, str]]) -> str:
    """What changes from the chosen placement to the one picked by hand."""
    columns = ("Predicted", "Chosen", "By hand", "Difference")
    return _html("table", columns, changes, "In % of all layers, with the interval in brackets")


def verdict(transfer: Json) -> str:
    """Two cards compared: the verdict with its reason, and the agreement of every measure."""
    pair = transfer["pairs"][0]
    word, top = pair["verdict"]["word"], pair["top"]
    measures = []
    for key, rank in pair["measures"].items():
        title = MEASURES[key].title if key in MEASURES else key
        measures.append((title, f"{rank['value']:.2f}", f"{rank['low']:.2f} to {rank['high']:.2f}", f"{rank['p']:.3f}"))
    details = [
        f"Layers of {swap['source']} ({listed(swap['layers'])}) keep {swap['kept']:.1f} % on {swap['target']}, whose own "
        f"({listed(swap['own'])}) keep {swap['kept_own']:.1f} %: {swap['lost']['value']:.1f} points lost "
        f"({swap['lost']['low']:.1f} to {swap['lost']['high']:.1f})."
        for swap in pair["swaps"]
    ]
    details.append(f"Of the best {top['k']} layers {top['shared']} are shared; by chance it would be {top['expected']:.1f}.")
    kind = {"reuse the card": "good", "profile again": "bad"}.get(word, "open")
    columns = ("Measure", "Spearman", "95 % interval", "p")
    return _html("verdict", word, kind, pair["verdict"]["reason"], "Rank correlation of the layer profiles", columns, measures, details)


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
    if progress.state == FAILED:
        return note(f"failed: {progress.message}", "bad")
    if progress.state == CANCELLED:
        return note(progress.message)
    if progress.state == DONE:
        return note(f"done: the card is {progress.message}", "good")
    count = f", {progress.done} of {progress.total}" if progress.total else ""
    return _html("job", progress, f"Running: {progress.phase}{count}")


def roi(result: Roi) -> str:
    """What a placement saves: each result from measured ratios, beside it the one with assumptions, then what is assumed."""
    sides = [("From what was measured", result.results)]
    if result.with_assumptions is not None:
        sides.append(("With assumptions", result.with_assumptions))
    cells = []
    for formula in SHOWN:
        empty = "not known: a figure above is empty" if formula.needs else "never"
        amounts = [_range(values[formula.name], empty) for _, values in sides]
        cells.append([formula.title, *amounts, formula.unit.replace("money", result.inputs.currency)])
    caption = f"Against adapters in all layers, for {result.ratios.placement}; value with lower and upper end."
    table = _html("table", ["Result", *(title for title, _ in sides), "Unit"], cells, caption)
    return table + _html("lines", "Not measured, or an example", [with_labels(line) for line in result.assumptions])


def roi_headline(result: Roi) -> str:
    """The few results that people ask for first."""
    formulas = {formula.name: formula for formula in SHOWN}
    cells = []
    for name in ("saved_month", "saved_year", "payback_months", "hours_saved"):
        unit = formulas[name].unit.replace("money", result.inputs.currency).partition(" /")[0]
        amount = _range(result.results[name], "never")
        cells.append((formulas[name].title, f"{amount} {unit}" if result.results[name].mid is not None else amount, None))
    more = "" if result.with_assumptions is None else "; with what is only estimated it may be more, see the table below"
    lead = f"For {result.ratios.placement}, against adapters in all layers"
    return _html("tiles", cells, lead, [f"From measured ratios alone{more}."])


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


def front(value: Json | None, name: str) -> Figure:
    """A front without any choice on it; without a value (it is being made) an empty one with the same axes."""
    figure = front_figure({"fronts": {name: []}, "baselines": []} if value is None else value, name)
    if value is None:
        figure.update_xaxes(range=[0, 105])
        figure.update_yaxes(range=[0, 105])
    figure.update_layout(margin={"b": 110}, legend={"y": -0.32})
    return _without_theme(figure, 420)


def depth(card: Json, measure: str) -> Figure:
    """A measure over depth, without any choice on it."""
    figure = depth_figure(card, MEASURES[measure])
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


def with_choice(
    base: Figure,
    name: str,
    choice: Choice,
    hand: Choice | None = None,
    limits: Mapping[str, float] | None = None,
    min_performance: float | None = None,
) -> Figure:
    """A front (`time` or `memory`) with the chosen placement, the one picked by hand, and the budgets (% of all layers) as lines."""
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
    limit = (limits or {}).get(LIMIT_OF[name])
    if limit is not None:
        shapes.append(dashed | {"x0": limit, "x1": limit, "yref": "paper", "y0": 0, "y1": 1})
        notes.append(plain | {"text": f"{title} at most {limit:g} %", "x": limit, "yref": "paper", "y": 0.02, "xanchor": "right"})
    if min_performance is not None:
        shapes.append(dashed | {"y0": min_performance, "y1": min_performance, "xref": "paper", "x0": 0, "x1": 1})
        place = {"y": min_performance, "xref": "paper", "x": 0.01, "xanchor": "left", "yanchor": "bottom"}
        notes.append(plain | {"text": f"at least {min_performance:g} % kept", **place})
    return {"data": [*base["data"], *traces], "layout": {**base["layout"], "shapes": shapes, "annotations": notes}}


def with_layers(base: Figure, layers: Sequence[int]) -> Figure:
    """A measure over depth with the chosen layers as diamonds."""
    line = next(trace for trace in reversed(base["data"]) if "markers" in str(trace.get("mode")))
    chosen = [row for row, layer in enumerate(line["x"]) if layer in set(layers)]
    marker = {"size": 11, "color": CHOSEN, "symbol": "diamond", "line": {"width": 1, "color": "white"}}
    picked = {name: [line[name][row] for row in chosen] for name in ("x", "y", "hovertext")}
    trace = {"type": "scatter", "mode": "markers", "hoverinfo": "text", "marker": marker, **picked}
    return {"data": [*base["data"], trace], "layout": base["layout"]}
