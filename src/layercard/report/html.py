"""A report as one self-contained HTML page: plots, tables, the calculator and provenance, without network, from files only."""

import gzip
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from layercard.card.numbers import Json, stability_words
from layercard.files import write_text
from layercard.report import parts
from layercard.report.calculator import amount, calculator
from layercard.report.headline import steps_of, tiles_of
from layercard.report.ratios import ratios_of
from layercard.report.roi import RoiInputs
from layercard.report.sources import Sources
from layercard.report.story import Story, Topic
from layercard.report.trials import Row, rows_of

THEORY = (
    "One view holds the measures together: near the frozen model the loss is a quadratic bowl, and an adapter can take away the part of "
    "the loss signal that its layer's inputs span. Three things say how much comes of that: how large this part is (resnorm), how well "
    "the inputs are conditioned (activation energy), and how far the layers do the same work (coupling)."
)
FINDINGS = (
    "Resnorm alone does not rank layers: the first ones have the largest and are the hardest to optimise. So the Layer Card puts signal, "
    "measured performance and cost of each layer side by side, each with its interval, and says how stable its own ranking is."
)
TRADE_OFFS = (
    "What training costs depends on depth: backward goes through every block above the lowest adapted layer. The last layers are "
    "the cheapest to train, spread ones keep the most; the front shows the least cost for each performance."
)


def story_of(sources: Sources, *, inputs: RoiInputs | None = None, commands: Sequence[str] = ()) -> Story:
    """The whole report.

    Args:
        sources: What was read; its first card and placement are what the report is about.
        inputs: Figures that the calculator starts with.
        commands: Command lines that made all this.
    """
    card, placement = sources.card, sources.placement
    chosen = [int(layer) for layer in placement["layers"]] if placement else []
    rows = rows_of(sources.trials, _names(sources))
    ratios = ratios_of(chosen, card, rows) if chosen else None
    data = card["data"]
    return Story(
        title=str(card["model"]["name"]),
        lead=f"{card['model']['layers']} layers, profiled on {data['records']:,} records of {data['source']} ({data['tokens']:,} tokens). "
        f"The ranking of its layers is {stability_words(card)}.",
        topics=_topics(sources, chosen, rows),
        steps=steps_of(sources),
        tiles=tiles_of(sources, rows, ratios),
        warnings=[str(warning) for warning in [*(card.get("warnings") or []), *sources.notes]],
        calculator=calculator(ratios, inputs) if ratios else {"missing": "layercard select card.json -o placement.json"},
        provenance=_provenance(sources),
        commands=list(commands),
    )


def _names(sources: Sources) -> dict[tuple[int, ...], str]:
    """Names of the placements given, by their layers."""
    return {tuple(value["layers"]): parts.called(name, value) for name, value in sources.placements.items()}


def _topics(sources: Sources, chosen: Sequence[int], rows: Sequence[Row]) -> list[Topic]:
    card = sources.card
    mark = " Diamonds are the chosen layers." if chosen else ""
    lead = f"Layer 0 is at the input. Bands are 95 % intervals over records.{mark}"
    names = list(_names(sources).values())
    costly = [table for table in sources.tables if any("speed" in str(column) or "time" in str(column) for column in table["columns"])]
    plain = [table for table in sources.tables if table not in costly]
    findings = [
        parts.depth_part(card, parts.FINDINGS, chosen, key="performance", title="Performance by depth", lead=lead),
        parts.card_part(card, chosen),
        parts.trained_part(rows),
        parts.table_part(plain, "tables-findings", "Benchmark tables: performance"),
        parts.transfer_part(sources),
    ]
    costs = [
        parts.placement_part(sources, sources.front),
        parts.cost_part(card, chosen),
        parts.front_part(sources.front, sources.placements),
        parts.trade_off_part(rows, names),
        parts.table_part(costly, "tables-costs", "Benchmark tables: cost"),
    ]
    theory = [
        parts.depth_part(card, parts.THEORY, chosen, key="signals", title="Signals by depth", lead=lead),
        parts.coupling_part(card, chosen),
    ]
    return [
        Topic("theory", "Theoretical framework", THEORY, theory),
        Topic("findings", "Empirical findings and Layer Card", FINDINGS, [part for part in findings if part]),
        Topic("trade-offs", "Cost–performance trade-offs", TRADE_OFFS, [part for part in costs if part]),
    ]


def _provenance(sources: Sources) -> dict[str, dict[str, Any]]:
    """Where all this comes from, as names and values."""
    card = sources.card
    found = {"Model": card["model"], "Data": card["data"], "Settings": card["settings"], "Versions": card.get("versions") or {}}
    cost = card.get("cost") or {}
    machine = {key: cost[key] for key in ("device", "threads", "source", "batch_size", "tokens", "rank", "dtype") if cost.get(key)}
    runs = ", ".join(dict.fromkeys(trial.machine for trial in sources.trials if trial.machine))
    found["Machine"] = machine | ({"runs on": runs} if runs else {})
    found["Files"] = {**sources.used, **({"passed over": sources.passed} if sources.passed else {})}
    return {name: dict(part) for name, part in found.items() if part}


def front_story(front: Json) -> Story:
    """A page with nothing but a front."""
    lead = f"What placements of adapters in its {front['model']['layers']} layers are predicted to keep, and what they cost."
    part = parts.front_part(front, {})
    return Story(str(front["model"]["name"]), lead, [Topic("trade-offs", "Cost–performance trade-offs", TRADE_OFFS, [part])])


def render(story: Story) -> str:
    """The page as text; it needs no network, and whatever the files say is text in it."""
    environment = Environment(
        loader=PackageLoader("layercard.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["amount"] = amount
    return environment.get_template("page.html.j2").render(story=story, plotly_js=Markup(plotly_js()))


@cache
def plotly_js() -> str:
    """plotly.js with the traces that the figures use."""
    packed = files("layercard.report").joinpath("vendor/plotly-cartesian.min.js.gz").read_bytes()
    return gzip.decompress(packed).decode("utf-8")


def write_page(path: str | Path, story: Story, *, force: bool = False) -> Path:
    """Write the page of `render` to `path`, atomically."""
    return write_text(path, render(story), force=force)
