"""Layer indices as short text.

Numbers of cards and placements: read from the JSON value of a file and put in words, alike in terminal, report and notebook.

What was not measured, or is not finite, is `None`, not zero.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from layercard.records import Estimate

# ---- indices


def stretches(layers: Sequence[int]) -> list[list[int]]:
    """Ascending indices cut where one is left out.

    >>> stretches([0, 1, 2, 5, 7, 8])
    [[0, 1, 2], [5], [7, 8]]
    """
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return parts


def listed(layers: Sequence[int], separator: str = ", ") -> str:
    """Ascending indices in short form.

    >>> listed([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    return separator.join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in stretches(layers))


# ---- readings

Json = Mapping[str, Any]
_STABILITY = ((0.9, "very stable"), (0.75, "stable"), (0.5, "shaky, profile more records before relying on single layers"))
_COSTS = {"step_time": ("step time", "seconds"), "peak_memory": ("peak memory", "bytes"), "latency": ("added latency", "seconds")}


def profile_of(card: Json, key: str) -> list[Estimate | None]:
    """One quantity of all layers, from the input to the output side."""
    return [Estimate.read(layer.get(key)) for layer in card["layers"]]


def best_layers(card: Json, key: str = "gain_estimate") -> list[int]:
    """The few layers with the highest `key`, best first: five, or a quarter of a shallow model."""
    count = max(1, min(5, len(card["layers"]) // 4))
    values = {index: found.value for index, found in enumerate(profile_of(card, key)) if found is not None}
    return sorted(values, key=lambda index: (-values[index], index))[:count]


def stability_words(card: Json) -> str:
    """How far the card's own ranking can be relied on, in a sentence."""
    stability = card.get("stability") or {}
    key = "gain_estimate" if Estimate.read(stability.get("gain_estimate")) else "step_probe"
    found = Estimate.read(stability.get(key))
    if found is None:
        return "not known: the card does not say how stable its ranking is"
    title = key.replace("_", " ")
    words = next((words for bound, words in _STABILITY if found.value >= bound), "unstable, do not rely on it; profile more records")
    return f"{words} (two halves of the records agree with Spearman {found.value:.2f} on the {title})"


def short(value: float) -> str:
    """A number in at most seven characters, three significant digits.

    >>> [short(x) for x in (0, 1.0949, 0.01234, -0.5, 12.06, 1790, 61234, 0.00012)]
    ['0', '1.09', '0.0123', '−0.500', '12.1', '1,790', '6.1e4', '1.2e-4']
    """
    size = abs(value)
    if size == 0:
        text = "0"
    elif 0.001 <= size < 9999.5:
        digits = max(0, 2 - math.floor(math.log10(size)))
        text = f"{size:,.{digits}f}"
    else:
        mantissa, exponent = f"{size:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    return f"−{text}" if value < 0 else text


def interval(found: Estimate | None) -> str:
    """`low–high` of a sampled number, else nothing."""
    if found is None or found.low is None or found.high is None:
        return ""
    return f"{short(found.low)}–{short(found.high)}"


def predicted_rows(predicted: Json) -> dict[str, str]:
    """Rows of a table: what is kept, what it costs, how it was found, and remarks."""
    rows: dict[str, str] = {}
    kept = Estimate.read(predicted.get("performance_kept"))
    if kept is not None:
        rows["Keeps"] = f"{percent(kept)} of the performance of all layers, predicted"
    costs = [words for key, (name, unit) in _COSTS.items() if (words := _cost(predicted.get(key), name, unit))]
    if costs:
        rows["Costs"] = ", ".join(costs) + " (of all layers)"
    weights = _adapters(predicted.get("parameters"))
    if weights:
        rows["Adapters"] = weights
    if predicted.get("layers_in_backward"):
        rows["Backward"] = f"through {predicted['layers_in_backward']} layers"
    solver = predicted.get("solver")
    if isinstance(solver, Mapping):
        gap = Estimate.read(solver.get("gap"))
        rows["Solver"] = f"{solver.get('status')}" + (f", at most {100 * gap.value:.2g}% from the best" if gap is not None else "")
    baseline = predicted.get("baseline")
    notes = [predicted.get("remark"), baseline.get("note") if isinstance(baseline, Mapping) else None]
    if predicted.get("cost_source") == "shapes":
        notes.append("costs are estimated from shapes alone; profile with --cost to measure them")
    for at, note in enumerate(note for note in notes if note):
        rows["Note" if at == 0 else f"Note {at + 1}"] = str(note)
    return rows


def percent(kept: Estimate) -> str:
    """A share from 0 to 1 as per cent, with its interval.

    >>> percent(Estimate(value=0.953, low=0.91, high=0.99))
    '95% (91–99)'
    """
    between = f" ({100 * kept.low:.0f}–{100 * kept.high:.0f})" if kept.low is not None and kept.high is not None else ""
    return f"{100 * kept.value:.0f}%{between}"


def _adapters(found: Any) -> str | None:
    if not isinstance(found, Mapping):
        return None
    count, share = Estimate.read(found.get("count")), Estimate.read(found.get("share"))
    return None if count is None or share is None else f"{count.value:,.0f} weights, {100 * share.value:.0f}% of all layers"


def _cost(found: Any, name: str, unit: str) -> str | None:
    share = Estimate.read(found.get("share")) if isinstance(found, Mapping) else None
    if share is None:
        return None
    amount = Estimate.read(found.get(unit))
    absolute = "" if amount is None else f" {amount.value / 2**20:,.0f} MiB," if unit == "bytes" else f" {short(amount.value)} s,"
    return f"{name}{absolute} {100 * share.value:.0f}%"
