"""Values as HTML for the page. Everything is escaped, braces and dollars too, since the page puts HTML through a template of its own."""

import base64
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from layercard.card.numbers import Json, listed, short
from layercard.report.app import trainer
from layercard.report.app.choice import SHARES, Choice, rows
from layercard.report.app.jobs import CANCELLED, DONE, FAILED, Progress
from layercard.report.app.library import Entry
from layercard.report.app.money import page_words
from layercard.report.frames import MEASURES
from layercard.report.roadmap import Found, Roadmap, roadmap as make_roadmap
from layercard.report.roi import SHOWN, Range, Roi

INTRO = (
    "Three phases lead from a model to adapters that are trained only where they matter. Choose a card above, or make the first one: "
    "with the command, or on the tab Profile."
)
_WORDS = {"done": "done", "next": "next", "open": "to come"}
_MARKS = {"done": "✓", "next": "→", "open": "○"}
_VERDICTS = {"reuse the card": "good", "profile again": "bad"}


@cache
def _parts() -> Any:
    environment = Environment(
        loader=PackageLoader("layercard.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("app.html.j2", globals={"words": _WORDS, "marks": _MARKS}).module


def _safe(html: str) -> str:
    """Without what the page's own template language would read."""
    return str(html).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("@", "&#64;")


def note(text: str, kind: str = "info") -> str:
    """A line of text; kind `info`, `good` or `bad`."""
    return _safe(_parts().note(text, kind))


def roadmap(entries: Sequence[Entry], card: Entry | None) -> str:
    """Where the model of a card stands."""
    return _safe(_parts().roadmap(roadmap_of(entries, card), INTRO))


def roadmap_of(entries: Sequence[Entry], card: Entry | None) -> Roadmap:
    """The road of the model of a card, from the files that can be read."""
    found = [Found(entry.place, entry.kind, entry.value) for entry in entries if entry.problem is None]
    return make_roadmap(found, None if card is None else Found(card.place, "card", card.value))


def tiles(choice: Choice, seconds: float | None = None) -> str:
    """What is predicted of a placement and how long the search took, or why there is none."""
    if choice.placement is None:
        return note(choice.problem or "no placement", "bad")
    value = choice.placement.to_json()
    predicted = value["predicted"]
    cells = []
    for name, text in rows(value).items():
        share = predicted[SHARES[name]]["share"] if name in SHARES else None
        cells.append((name, text, None if share is None else round(100 * min(max(share, 0.0), 1.0), 1)))
    return _safe(_parts().tiles(cells, f"Layers {listed(choice.layers)}", _notes(predicted, seconds)))


def take_away(choice: Choice, command: str = "") -> str:
    """Downloads, the command that makes the same placement, and the reasons; nothing where there is no placement."""
    if choice.placement is None:
        return ""
    value = choice.placement.to_json()
    files = [
        _file("placement.json", "Placement", json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"),
        _file(trainer.LORA_FILE, "PEFT LoraConfig", trainer.lora_json(value)),
        _file("train_trl.py", "TRL script", trainer.trl_script(value), "text/x-python"),
    ]
    return _safe(_parts().take_away(list(value["reasons"].items()), command, files))


def change_table(found: Sequence[tuple[str, str, str, str]]) -> str:
    """What changes from the chosen placement to the one picked by hand."""
    return _safe(
        _parts().table(("Predicted", "Chosen", "By hand", "Difference"), found, "In % of all layers, with the interval in brackets")
    )


def verdict(transfer: Json) -> str:
    """Two cards compared: the verdict with its reason, and the agreement of every measure."""
    pair = transfer["pairs"][0]
    word = pair["verdict"]["word"]
    measures = [
        (
            MEASURES[key].title if key in MEASURES else key,
            f"{found['value']:.2f}",
            f"{found['low']:.2f} to {found['high']:.2f}",
            f"{found['p']:.3f}",
        )
        for key, found in pair["measures"].items()
    ]
    details = [
        f"Layers of {swap['source']} ({listed(swap['layers'])}) keep {swap['kept']:.1f} % on {swap['target']}, whose own "
        f"({listed(swap['own'])}) keep {swap['kept_own']:.1f} %: {swap['lost']['value']:.1f} points lost "
        f"({swap['lost']['low']:.1f} to {swap['lost']['high']:.1f})."
        for swap in pair["swaps"]
    ]
    top = pair["top"]
    details.append(f"Of the best {top['k']} layers {top['shared']} are shared; by chance it would be {top['expected']:.1f}.")
    columns = ("Measure", "Spearman", "95 % interval", "p")
    caption = "Rank correlation of the layer profiles"
    return _safe(_parts().verdict(word, _VERDICTS.get(word, "open"), pair["verdict"]["reason"], caption, columns, measures, details))


def files(entries: Sequence[Entry]) -> str:
    """All files, the broken ones with what is wrong with them."""
    cells = [(entry.name, entry.kind, entry.problem or _about(entry)) for entry in entries]
    if not cells:
        return note("there is no file of layercard here yet; make a card on the tab Profile, or upload one")
    return _safe(_parts().table(("File", "Kind", "What it says"), cells, f"{len(cells)} files"))


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
    return _safe(_parts().job(progress, f"Running: {progress.phase}{count}"))


def roi(found: Roi) -> str:
    """What a placement saves: each result from measured ratios, beside it the one with assumptions, then what is assumed."""
    currency, assuming = found.inputs.currency, found.with_assumptions
    columns = ["Result", "From what was measured", *(["With assumptions"] if assuming is not None else []), "Unit"]
    shown = []
    for formula in SHOWN:
        ranges = [found.results[formula.name], *([assuming[formula.name]] if assuming is not None else [])]
        empty = "not known: a figure above is empty" if formula.needs else "never"
        shown.append([formula.title, *(_range(one, empty) for one in ranges), formula.unit.replace("money", currency)])
    caption = f"Against adapters in all layers, for {found.ratios.placement}; value with lower and upper end."
    table = _parts().table(columns, shown, caption)
    return _safe(f"{table}{_parts().lines('Not measured, or an example', [page_words(line) for line in found.assumptions])}")


def roi_headline(found: Roi) -> str:
    """The few results that people ask for first."""
    units = {formula.name: (formula.title, formula.unit.replace("money", found.inputs.currency)) for formula in SHOWN}
    names = ("saved_month", "saved_year", "payback_months", "hours_saved")
    cells = []
    for name in names:
        title, unit = units[name]
        known = found.results[name].mid is not None
        cells.append((title, f"{_range(found.results[name], 'never')}{f' {unit}'.partition(' /')[0] if known else ''}", None))
    more = "" if found.with_assumptions is None else "; with what is only estimated it may be more, see the table below"
    return _safe(
        _parts().tiles(cells, f"For {found.ratios.placement}, against adapters in all layers", [f"From measured ratios alone{more}."])
    )


def _range(found: Range, empty: str) -> str:
    if found.mid is None:
        return empty
    ends = "" if found.low == found.high else f" ({_amount(found.low)} to {_amount(found.high)})"
    return f"{_amount(found.mid)}{ends}"


def _amount(value: float | None) -> str:
    if value is None:
        return "no end"
    return f"{value:,.0f}".replace("-", "−") if abs(value) >= 1000 else short(value)


def _notes(predicted: Json, seconds: float | None) -> list[str]:
    """Remarks of the selection, in the order of their weight."""
    notes = ["Predicted from the card, in % of all layers.", predicted.get("remark"), (predicted.get("baseline") or {}).get("note")]
    if predicted.get("cost_source") == "shapes":
        notes.append("Costs are estimated from shapes alone; profile again with --cost to measure them.")
    solver = predicted.get("solver")
    if solver:
        gap = solver.get("gap")
        proven = "Proven best" if solver["status"] == "optimal" else "Best found so far"
        took = "" if seconds is None else f", in {seconds:.2f} s"
        notes.append(f"{proven}{'' if gap is None else f', at most {100 * gap:.2g} % from the bound'}{took}.")
    return [str(text) for text in notes if text]


def _about(entry: Entry) -> str:
    model = entry.value.get("model")
    name = str(model.get("name", "")) if isinstance(model, dict) else ""
    if entry.card is not None:
        return f"{name}, {entry.card.model.layers} layers, {entry.card.data.records:,} records of {entry.card.data.source}"
    if entry.kind == "placement":
        return f"{name}, layers {listed(sorted(entry.value['layers']))}"
    return name


def _file(name: str, title: str, text: str, kind: str = "application/json") -> dict[str, str]:
    data = base64.b64encode(text.encode("utf-8")).decode("ascii")
    return {"id": f"get-{name.partition('.')[0].replace('_', '-')}", "name": name, "title": title, "type": kind, "data": data}
