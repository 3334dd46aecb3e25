"""Cards and placements as small pieces of HTML for notebooks: tables without scripts, links or colours of their own.

Text takes the colour of the notebook around it, so it reads in light and dark alike; what files say is escaped and long texts are cut.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from layercard.card.numbers import Json, best_layers, interval, listed, predicted_rows, short, stability_words
from layercard.records import Estimate

LONGEST = 300
"""Characters of one text before it is cut."""
MOST_ROWS = 32
"""Rows of a table before the rest is counted only."""
CARD_COLUMNS = (
    ("gain_estimate", "Gain estimate"),
    ("training_probe", "Training probe"),
    ("step_probe", "Step probe"),
    ("resnorm", "Resnorm"),
)
"""Measures in the short table of a card; those that it lacks are left out."""
FRAME = (
    "color:inherit;background:none;border:1px solid;border-color:rgba(128,128,128,0.5);border-radius:6px;padding:8px 12px;max-width:60em"
)
CELL = "color:inherit;background:none;padding:2px 10px 2px 0;text-align:left;vertical-align:top;white-space:normal;overflow-wrap:anywhere"


def card_html(card: Json) -> str:
    """A card as HTML: model, data, how stable its ranking is, its warnings, and a table of its best single layers with intervals.

    Args:
        card: JSON value of a card that was read by `LayerCard`.
    """
    model, data = card["model"], card["data"]
    best = best_layers(card)
    facts = {
        "Model": f"{model['name']}, {model['layers']} layers, weights {str(model['fingerprint'])[:12]}",
        "Data": f"{data['source']}, {data['records']:,} records, {data['tokens']:,} tokens, {data['labelled_tokens']:,} of them labelled",
        "Ranking": stability_words(card),
        "Best layers": ", ".join(map(str, best)),
    }
    facts |= _numbered("Warning", card.get("warnings") or ())
    columns = [(key, title) for key, title in CARD_COLUMNS if any(Estimate.read(card["layers"][at].get(key)) for at in best)]
    rows = [[str(at), *(_measured(card["layers"][at].get(key)) for key, _ in columns)] for at in best]
    caption = "Best single layers, with 95 % intervals"
    return _frame("Layer Card", facts, caption, ["Layer", *(title for _, title in columns)], rows)


def placement_html(placement: Json) -> str:
    """A placement as HTML: its layers, what they were chosen for, what is predicted of them, and a table of the reasons.

    Args:
        placement: JSON value of a `Placement`.
    """
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


def _measured(raw: Any) -> str:
    found = Estimate.read(raw)
    if found is None:
        return "–"
    between = interval(found)
    return f"{short(found.value)} ({between})" if between else short(found.value)


def _numbered(name: str, texts: Iterable[Any]) -> dict[str, str]:
    return {name if at == 0 else f"{name} {at + 1}": str(text) for at, text in enumerate(texts)}


def _frame(title: str, facts: Mapping[str, str], caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A title, names with values, and a table; every text is escaped here and nowhere else."""
    shown = list(facts.items())[:MOST_ROWS]
    named = "".join(f"<tr>{_cell('th', name, scope='row')}{_cell('td', value)}</tr>" for name, value in shown)
    table = f'<div style="{FRAME}"><strong>{_text(title)}</strong><table>{named}</table>'
    if rows:
        head = "".join(_cell("th", column, scope="col") for column in columns)
        body = "".join(
            f"<tr>{_cell('th', row[0], scope='row')}{''.join(_cell('td', value) for value in row[1:])}</tr>" for row in rows[:MOST_ROWS]
        )
        more = f"<div>and {len(rows) - MOST_ROWS:,} more</div>" if len(rows) > MOST_ROWS else ""
        above = f'<caption style="{CELL}">{_text(caption)}</caption>'
        table += f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"
    return f"{table}</div>"


def _cell(tag: str, value: object, scope: str = "") -> str:
    where, wrap = (f' scope="{scope}"', ";white-space:nowrap") if scope else ("", "")
    return f'<{tag}{where} style="{CELL}{wrap}">{_text(value)}</{tag}>'


def _text(value: object) -> str:
    text = str(value)
    return html.escape(text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")
