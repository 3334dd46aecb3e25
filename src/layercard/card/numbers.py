"""Numbers of cards and placements in words, the same in terminal, report and notebook, and both as small pieces of HTML for the latter.

What was not measured is `None`, not zero. HTML has no scripts, links or colours of its own: its text takes the colour of the notebook
around it, what files say is escaped, and long texts are cut.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from layercard.errors import visible
from layercard.records import Estimate

Json = Mapping[str, Any]
_STABILITY = ((0.9, "very stable"), (0.75, "stable"), (0.5, "shaky, profile more records before relying on single layers"))
PREDICTED = (
    "predicted and not measured: read off the card by a curve fitted to trained placements of one model (SmolLM2-135M, three tasks, 32 "
    "steps); the 90 % interval is how far placements of a task lie that had no part in the curve, and says nothing of other models"
)
"""What a predicted performance is, and what its interval is of (`selection/calibration.json`)."""
_COSTS = {"step_time": ("step time", "seconds"), "peak_memory": ("peak memory", "bytes"), "latency": ("added latency", "seconds")}


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


def best_layers(estimates: Sequence[Estimate | None]) -> list[int]:
    """The few layers with the highest values, best first: five, or a quarter of a shallow model."""
    values = {layer: estimate.value for layer, estimate in enumerate(estimates) if estimate is not None}
    return sorted(values, key=lambda layer: (-values[layer], layer))[: max(1, min(5, len(estimates) // 4))]


def stability_words(stability: Mapping[str, float]) -> str:
    """How far a card's own ranking can be relied on, in a sentence, from its `stability`."""
    for key in ("gain_estimate", "step_probe"):
        if key in stability:
            words = (words for bound, words in _STABILITY if stability[key] >= bound)
            verdict = next(words, "unstable, do not rely on it; profile more records")
            return f"{verdict} (two halves of the records agree with Spearman {stability[key]:.2f} on the {key.replace('_', ' ')})"
    return "not known: the card does not say how stable its ranking is"


def short(value: float) -> str:
    """A number in at most seven characters, three significant digits.

    >>> [short(x) for x in (0, 1.0949, 0.01234, -0.5, 12.06, 1790, 61234, 0.00012)]
    ['0', '1.09', '0.0123', '−0.500', '12.1', '1,790', '6.1e4', '1.2e-4']
    """
    size = abs(value)
    if size == 0:
        text = "0"
    elif 0.001 <= size < 9999.5:
        text = f"{size:,.{max(0, 2 - math.floor(math.log10(size)))}f}"
    else:
        mantissa, exponent = f"{size:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    return f"−{text}" if value < 0 else text


def interval(estimate: Estimate | None) -> str:
    """`low–high` of an estimate that has an interval, else nothing."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"{short(estimate.low)}–{short(estimate.high)}"


def with_interval(estimate: Estimate | None) -> str:
    """A number with its interval in brackets, a dash where there is none."""
    if estimate is None:
        return "–"
    return f"{short(estimate.value)} ({interval(estimate)})" if interval(estimate) else short(estimate.value)


def percent(share: Estimate) -> str:
    """A share from 0 to 1 as per cent, with its interval.

    >>> percent(Estimate(value=0.953, low=0.91, high=0.99))
    '95% (91–99)'
    """
    between = f" ({100 * share.low:.0f}–{100 * share.high:.0f})" if share.low is not None and share.high is not None else ""
    return f"{100 * share.value:.0f}%{between}"


def predicted_rows(predicted: Json) -> dict[str, str]:
    """Rows of a table: what a placement keeps and costs, how it was found, and remarks."""
    rows: dict[str, str] = {}
    performance = Estimate.read(predicted.get("performance_kept"))
    if performance is not None:
        rows["Keeps"] = f"{percent(performance)} of the performance of all layers, predicted"
    costs = []
    for key, (name, unit) in _COSTS.items():
        part = predicted.get(key)
        part = part if isinstance(part, Mapping) else {}
        share = Estimate.read(part.get("share"))
        if share is not None:
            amount = Estimate.read(part.get(unit))
            words = "" if amount is None else f" {amount.value / 2**20:,.0f} MiB," if unit == "bytes" else f" {short(amount.value)} s,"
            costs.append(f"{name}{words} {100 * share.value:.0f}%")
    if costs:
        rows["Costs"] = ", ".join(costs) + " (of all layers)"
    weights = predicted.get("parameters")
    if isinstance(weights, Mapping):
        count, share = Estimate.read(weights.get("count")), Estimate.read(weights.get("share"))
        if count is not None and share is not None:
            rows["Adapters"] = f"{count.value:,.0f} weights, {100 * share.value:.0f}% of all layers"
    if predicted.get("layers_in_backward"):
        rows["Backward"] = f"through {predicted['layers_in_backward']} layers"
    solver = predicted.get("solver")
    if isinstance(solver, Mapping):
        gap = Estimate.read(solver.get("gap"))
        rows["Solver"] = f"{solver.get('status')}" + (f", at most {100 * gap.value:.2g}% from the best" if gap is not None else "")
    baseline = predicted.get("baseline")
    notes = [predicted.get("remark"), baseline.get("note") if isinstance(baseline, Mapping) else None]
    if performance is not None:
        notes.append(f"the performance is {PREDICTED}")
    if predicted.get("cost_source") == "shapes":
        notes.append("costs are estimated from shapes alone; profile with --cost to measure them")
    return rows | numbered("Note", [note for note in notes if note])


def reasons_apart(reasons: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """What the reasons of all layers of a placement have in common, and what is special about each layer; none where all say the same.

    >>> reasons_apart({"3": "cheapest: stands in for 4", "9": "cheapest: stands in for 8"})
    ('cheapest', {'3': 'stands in for 4', '9': 'stands in for 8'})
    >>> reasons_apart({"3": "won the race", "9": "won the race"})
    ('won the race', {})
    """
    texts = set(reasons.values())
    if len(texts) == 1 and len(reasons) > 1:
        return texts.pop(), {}
    beginnings = {text.partition(": ")[0] for text in texts if ": " in text}
    if len(beginnings) != 1 or not all(": " in text for text in texts):
        return "", dict(reasons)
    return beginnings.pop(), {layer: text.partition(": ")[2] for layer, text in reasons.items()}


def numbered(name: str, texts: Sequence[Any]) -> dict[str, str]:
    """Texts as rows of a table, all but the first with a number.

    >>> numbered("Note", ["a", "b"])
    {'Note': 'a', 'Note 2': 'b'}
    """
    return {name if number == 1 else f"{name} {number}": str(text) for number, text in enumerate(texts, 1)}


# ---- for notebooks

LONGEST = 300
"""Characters of one text before it is cut."""
MOST_ROWS = 32
"""Rows of a table before the rest is counted only."""
FRAME = (
    "color:inherit;background:none;border:1px solid;border-color:rgba(128,128,128,0.5);border-radius:6px;padding:8px 12px;max-width:60em"
)
CELL = "color:inherit;background:none;padding:2px 10px 2px 0;text-align:left;vertical-align:top;white-space:normal;overflow-wrap:anywhere"


def framed(title: str, facts: Mapping[str, str], caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A title, names with values, and a table as HTML; every text is escaped in here and nowhere else."""

    def text(value: str) -> str:
        return html.escape(visible(value if len(value) <= LONGEST else f"{value[: LONGEST - 1]}…"))

    def head(value: str, scope: str) -> str:
        return f'<th scope="{scope}" style="{CELL};white-space:nowrap">{text(value)}</th>'

    def row(first: str, *others: str) -> str:
        return f"<tr>{head(first, 'row')}" + "".join(f'<td style="{CELL}">{text(value)}</td>' for value in others) + "</tr>"

    page = f'<div style="{FRAME}"><strong>{text(title)}</strong>'
    page += f"<table>{''.join(row(*fact) for fact in list(facts.items())[:MOST_ROWS])}</table>"
    if rows:
        page += f'<table><caption style="{CELL}">{text(caption)}</caption>'
        page += f"<thead><tr>{''.join(head(column, 'col') for column in columns)}</tr></thead>"
        page += f"<tbody>{''.join(row(*cells) for cells in rows[:MOST_ROWS])}</tbody></table>"
        if len(rows) > MOST_ROWS:
            page += f"<div>and {len(rows) - MOST_ROWS:,} more</div>"
    return f"{page}</div>"
