"""Cards and placements as small pieces of HTML for notebooks: tables without scripts, links or colours of their own.

Text takes the colour of the notebook around it, so it reads in light and dark alike; what files say is escaped and long texts are cut.
"""

import html
from collections.abc import Mapping, Sequence

from layercard.card.numbers import Json, best_layers, interval, listed, numbered, predicted_rows, short, stability_words
from layercard.records import Estimate

LONGEST = 300
"""Characters of one text before it is cut."""
MOST_ROWS = 32
"""Rows of a table before the rest is counted only."""
CARD_COLUMNS = {
    "gain_estimate": "Gain estimate",
    "training_probe": "Training probe",
    "step_probe": "Step probe",
    "resnorm": "Resnorm",
}
"""Measures in the short table of a card; those that it lacks are left out."""
FRAME = (
    "color:inherit;background:none;border:1px solid;border-color:rgba(128,128,128,0.5);border-radius:6px;padding:8px 12px;max-width:60em"
)
CELL = "color:inherit;background:none;padding:2px 10px 2px 0;text-align:left;vertical-align:top;white-space:normal;overflow-wrap:anywhere"


def card_html(card: Json) -> str:
    """The JSON value of a card as HTML: model, data, how stable its ranking is, its warnings, and its best single layers."""
    model, data, best = card["model"], card["data"], best_layers(card)
    facts = {
        "Model": f"{model['name']}, {model['layers']} layers, weights {str(model['fingerprint'])[:12]}",
        "Data": f"{data['source']}, {data['records']:,} records, {data['tokens']:,} tokens, {data['labelled_tokens']:,} of them labelled",
        "Ranking": stability_words(card),
        "Best layers": ", ".join(map(str, best)),
    }
    facts |= numbered("Warning", card.get("warnings") or ())
    columns = {"Layer": [str(layer) for layer in best]}
    for key, title in CARD_COLUMNS.items():
        estimates = [Estimate.read(card["layers"][layer].get(key)) for layer in best]
        if any(estimates):
            columns[title] = [_measured(estimate) for estimate in estimates]
    rows = list(zip(*columns.values(), strict=True))
    return _frame("Layer Card", facts, "Best single layers, with 95 % intervals", list(columns), rows)


def placement_html(placement: Json) -> str:
    """The JSON value of a placement as HTML: its layers, what they were chosen for, what is predicted, and the reasons."""
    model, layers, reasons = placement["model"], placement["layers"], placement["reasons"]
    targets = [*placement["paths"], *placement.get("parameters", ())]
    facts = {
        "Model": f"{model.get('name', 'not named')}, {model['layers']} layers",
        "Layers": f"{listed(layers)} ({len(layers)} of {model['layers']})",
        "Modules": f"{len(targets)}: {', '.join(sorted({path.rpartition('.')[2] for path in targets}))}",
        "Objective": placement["objective"],
    }
    if placement.get("asked"):
        facts["Asked for"] = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in placement["asked"].items())
    if placement.get("rank_pattern"):
        facts["Ranks"] = ", ".join(map(str, sorted(set(placement["rank_pattern"].values()))))
    facts |= predicted_rows(placement["predicted"])
    rows = [[str(layer), reasons[str(layer)]] for layer in layers if str(layer) in reasons]
    return _frame("Placement", facts, "Why each layer", ["Layer", "Reason"], rows)


def _measured(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    between = interval(estimate)
    return f"{short(estimate.value)} ({between})" if between else short(estimate.value)


def _frame(title: str, facts: Mapping[str, str], caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A title, names with values, and a table; every text is escaped in here and nowhere else."""

    def text(value: str) -> str:
        return html.escape(value if len(value) <= LONGEST else f"{value[: LONGEST - 1]}…")

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
