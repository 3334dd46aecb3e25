"""The calculator as a page and a terminal show it: fields with labels and units, results with the numbers that Python found."""

from typing import Any

from markupsafe import Markup
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from layercard.report.roi import RATIOS, SHOWN, Ratios, Roi, RoiInputs, bound, javascript, roi
from layercard.report.terminal import pairs

GROUPS = (
    (
        "Training",
        (
            ("gpu_price_per_hour", "GPU price", "money / hour"),
            ("runs_per_month", "Fine-tuning runs", "a month"),
            ("hours_per_run", "Hours of an all-layer run", "hours"),
            ("gpus", "GPUs a run", ""),
        ),
    ),
    (
        "A smaller GPU (optional)",
        (
            ("run_memory_gb", "Memory of an all-layer run", "GB a GPU"),
            ("smaller_gpu_memory_gb", "Memory of the smaller GPU", "GB"),
            ("smaller_gpu_price_per_hour", "Its price", "money / hour"),
            ("smaller_gpu_speed", "Its speed", "share of the other's"),
        ),
    ),
    (
        "Serving",
        (
            ("adapters_served", "Adapters served", ""),
            ("adapter_mb", "Size of an all-layer adapter", "MB"),
            ("storage_price_per_gb_month", "Price of keeping them ready", "money / GB / month"),
            ("requests_per_month", "Requests", "a month"),
            ("tokens_per_month", "Tokens generated", "a month"),
            ("concurrent_requests", "Requests answered at a time", "a GPU"),
            ("adapter_latency_ms", "Time that all-layer adapters add", "ms / token, 0 when merged"),
        ),
    ),
    (
        "Set-up and energy",
        (
            ("engineer_hours", "Engineer hours for set-up", "hours, once"),
            ("engineer_rate", "Their rate", "money / hour"),
            ("profile_hours", "GPU hours to profile", "hours, once"),
            ("gpu_watts", "Power of a GPU (optional)", "W"),
            ("grid_gco2_per_kwh", "CO₂ of the grid (optional)", "g / kWh"),
        ),
    ),
)
"""Fields of the form: name, label, unit."""
LEADING = ("saved_month", "saved_year", "hours_saved", "payback_months")
"""Results that are shown large."""


def calculator(ratios: Ratios, inputs: RoiInputs | None = None) -> dict[str, Any]:
    """Values for the template: the form, the ratios, the results and the script that finds them again as one types."""
    found = roi(inputs or RoiInputs(), ratios)
    values, given = bound(found.inputs, ratios), found.inputs.model_dump()
    return {
        "groups": [(title, [_field(*field, given, values) for field in fields]) for title, fields in GROUPS],
        "currency": found.inputs.currency,
        "ratios": [(name, getattr(ratios, name)) for name in RATIOS],
        "where": ratios.where,
        "placement": ratios.placement,
        "leading": [_result(name, found) for name in LEADING],
        "results": [_result(formula.name, found) for formula in SHOWN],
        "assumptions": found.assumptions,
        "assumed": found.with_assumptions is not None,
        "data": {"ratios": ratios.model_dump(), "units": {formula.name: _unit(formula.unit, found) for formula in SHOWN}},
        "script": Markup(javascript()),
    }


def _field(name: str, label: str, unit: str, given: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    limits = RoiInputs.model_json_schema()["properties"][name]
    return {
        "name": name,
        "label": label,
        "unit": unit,
        "value": given[name],
        "least": limits.get("minimum", 0),
        "whole": isinstance(given[name], int),
        "measured": values[name] if given[name] is None else None,
    }


def _result(name: str, found: Roi) -> dict[str, Any]:
    formula = next(formula for formula in SHOWN if formula.name == name)
    return {
        "name": name,
        "title": formula.title,
        "unit": _unit(formula.unit, found),
        "range": found.results[name],
        "assumed": found.with_assumptions[name] if found.with_assumptions else None,
    }


def _unit(unit: str, found: Roi) -> str:
    return unit.replace("money", found.inputs.currency)


def amount(value: float | None) -> str:
    """A result as the page shows it, before its script does the same.

    >>> [amount(value) for value in (None, 1234.56, 12.345, 0.0814)]
    ['–', '1,235', '12.3', '0.081']
    """
    if value is None:
        return "–"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 3 if abs(value) < 1 else 2
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def roi_view(found: Roi) -> RenderableType:
    """What is saved, the ratios it follows from, and what is assumed, for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(f"{found.ratios.placement} against all layers", overflow="fold")
    assumed = found.with_assumptions
    for title in ("Low", "Mid", "High", *(["Assumed"] if assumed else []), "Unit"):
        table.add_column(title, justify="left" if title == "Unit" else "right")
    for formula in SHOWN:
        ends = found.results[formula.name]
        cells = [amount(ends.low), amount(ends.mid), amount(ends.high)]
        extra = [amount(assumed[formula.name].mid)] if assumed else []
        table.add_row(formula.title, *cells, *extra, Text(_unit(formula.unit, found)))
    rows = {}
    for name in RATIOS:
        ratio = getattr(found.ratios, name)
        between = f" ({ratio.low:.2f}–{ratio.high:.2f})" if ratio.low < ratio.high else ""
        rows[name.replace("_", " ").capitalize()] = f"{ratio.mid:.2f}{between} of all layers: {ratio.source}"
    notes = [Text.assemble(("! ", "bold yellow"), text) for text in found.assumptions]
    return Group(table, Text(), pairs(rows), Text(), *notes)
