"""What a placement is predicted to keep and to cost, in words."""

from collections.abc import Mapping
from typing import Any

from layercard.report.frames import Json, Number, number, short

_COSTS = {"step_time": ("step time", "seconds"), "peak_memory": ("peak memory", "bytes"), "latency": ("added latency", "seconds")}


def predicted_rows(predicted: Json) -> dict[str, str]:
    """Rows of a table: what is kept, what it costs, how it was found, and remarks."""
    rows: dict[str, str] = {}
    kept = number(predicted.get("performance_kept"))
    if kept is not None:
        rows["Keeps"] = f"{percent(kept)} of the performance of all layers, predicted"
    costs = [words for key, (name, unit) in _COSTS.items() if (words := _cost(predicted.get(key), name, unit))]
    if costs:
        rows["Costs"] = ", ".join(costs) + " (of all layers)"
    parameters = predicted.get("parameters")
    if isinstance(parameters, Mapping) and parameters.get("count") is not None:
        rows["Adapters"] = f"{parameters['count']:,} weights, {100 * parameters['share']:.0f}% of all layers"
    if predicted.get("layers_in_backward"):
        rows["Backward"] = f"through {predicted['layers_in_backward']} layers"
    solver = predicted.get("solver")
    if isinstance(solver, Mapping):
        gap = number(solver.get("gap"))
        rows["Solver"] = f"{solver.get('status')}" + (f", at most {100 * gap.value:.2g}% from the best" if gap is not None else "")
    notes = [predicted.get("remark"), (predicted.get("baseline") or {}).get("note")]
    if predicted.get("cost_source") == "shapes":
        notes.append("costs are estimated from shapes alone; profile with --cost to measure them")
    for at, note in enumerate(note for note in notes if note):
        rows["Note" if at == 0 else f"Note {at + 1}"] = str(note)
    return rows


def percent(kept: Number) -> str:
    """A share from 0 to 1 as per cent, with its interval.

    >>> percent(Number(0.953, 0.91, 0.99))
    '95% (91–99)'
    """
    between = f" ({100 * kept.low:.0f}–{100 * kept.high:.0f})" if kept.low is not None and kept.high is not None else ""
    return f"{100 * kept.value:.0f}%{between}"


def _cost(found: Any, name: str, unit: str) -> str | None:
    if not isinstance(found, Mapping) or found.get("share") is None:
        return None
    amount = found.get(unit)
    absolute = "" if amount is None else f" {amount / 2**20:,.0f} MiB," if unit == "bytes" else f" {short(amount)} s,"
    return f"{name}{absolute} {100 * found['share']:.0f}%"
