"""The README of a card's repository on the hub: YAML for its search, then the card in words, tables and two pictures.

What a card says in words may come from anyone, so it is shown as text: no line of it becomes markup, a link or YAML.
"""

import html
import json
import re

from layercard.card.numbers import Json, best_layers, interval, short, stability_words
from layercard.records import Estimate
from layercard.report.frames import MEASURES

TAG = "layercard"
DEPTH, COUPLING = "gain_estimate.svg", "coupling.svg"
"""Names of the pictures in the repository."""
LONGEST = 200
"""Characters of one text before it is cut."""
COLUMNS = ("gain_estimate", "training_probe", "step_probe", "centrality", "resnorm")


def fingerprint_tag(fingerprint: str) -> str:
    """The tag by which cards of a model are found; letters, digits and hyphens only.

    >>> fingerprint_tag("0123456789abcdef")
    'layercard-0123456789abcdef'
    """
    return f"{TAG}-{re.sub(r'[^a-z0-9]', '', fingerprint.lower())[:64]}"


def readme(card: Json, name: str, license_id: str | None = None) -> str:
    """The page.

    Args:
        card: JSON value of a card that was read by `LayerCard`.
        name: Name of the repository.
        license_id: Licence of the card, as the hub names licences; none is said when not given.
    """
    model, data = card["model"], card["data"]
    title = f"Layer Card of {_line(model['name'])}"
    tags = [TAG, fingerprint_tag(model["fingerprint"]), _name_tag(model["name"])]
    header = ["---", f"pretty_name: {_quoted(title)}", "viewer: false", "tags:", *(f"- {_quoted(tag)}" for tag in tags if tag)]
    header += [*([f"license: {_quoted(license_id)}"] if license_id else []), "---"]
    best = best_layers(card)
    return "\n".join(
        [
            *header,
            "",
            f"# {_plain(title)}",
            "",
            f"What a low-rank adapter could gain in each of the {model['layers']} layers of {_plain(model['name'])}, measured on "
            f"{data['records']:,} records with layercard. It is of use for a model with the same weights: their fingerprint is "
            f"`{fingerprint_tag(model['fingerprint']).removeprefix(f'{TAG}-')}`.",
            "",
            *_facts(card),
            "",
            f"![Gain estimate of each layer]({DEPTH})",
            "",
            f"![Coupling of the layers]({COUPLING})",
            "",
            "## Best single layers",
            "",
            *_table(card, best),
            "",
            *_warnings(card),
            "## Use",
            "",
            "```bash",
            f"layercard pull {name} -o card.json",
            "layercard select card.json --k 5 -o placement.json",
            "```",
            "",
        ]
    )


def _name_tag(name: str) -> str:
    """The last part of a model's name, as far as a tag can hold it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", _line(name).rpartition("/")[2]).strip("-.")


def _facts(card: Json) -> list[str]:
    data, settings = card["data"], card["settings"]
    made = ", ".join(f"{key} {settings[key]}" for key in ("rank", "ridge", "probe", "seed", "dtype") if settings.get(key) is not None)
    rows = {
        "Records": f"{data['records']:,} from {data['source']}: {data['tokens']:,} tokens, {data['labelled_tokens']:,} labelled",
        "Records' fingerprint": str(data["fingerprint"]),
        "Made with": f"{made}; layercard {card['versions'].get('layercard', 'of an unknown version')}",
        "Ranking": stability_words(card),
    }
    return ["| | |", "| --- | --- |", *(f"| {name} | {_plain(value)} |" for name, value in rows.items())]


def _table(card: Json, layers: list[int]) -> list[str]:
    columns = [key for key in COLUMNS if any(Estimate.read(card["layers"][layer].get(key)) for layer in layers)]
    head = ["Layer", *(MEASURES[key].title for key in columns)]
    rows = []
    for layer in layers:
        cells = [str(layer)]
        for key in columns:
            found = Estimate.read(card["layers"][layer].get(key))
            between = interval(found)
            cells.append("–" if found is None else f"{short(found.value)} ({between})" if between else short(found.value))
        rows.append(f"| {' | '.join(cells)} |")
    return [f"| {' | '.join(head)} |", f"|{' ---: |' * len(head)}", *rows, "", "Values with 95 % intervals over records."]


def _warnings(card: Json) -> list[str]:
    found = [f"- {_plain(warning)}" for warning in card.get("warnings") or ()]
    return ["## What to know before trusting it", "", *found, ""] if found else []


def _line(value: object) -> str:
    """A text on one line, without characters that cannot be seen, cut where it is long."""
    words = " ".join("".join(character if character.isprintable() else " " for character in str(value)).split())
    return words if len(words) <= LONGEST else f"{words[: LONGEST - 1]}…"


def _quoted(value: str) -> str:
    """A YAML string: that of JSON is one."""
    return json.dumps(_line(value), ensure_ascii=False)


def _plain(value: object) -> str:
    """A text that Markdown and HTML show as it is.

    >>> _plain("<b>[a](https://x)|`c`")
    '&lt;b&gt;\\\\[a\\\\](https&#58;//x)\\\\|\\\\`c\\\\`'
    """
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", html.escape(_line(value), quote=False)).replace(":", "&#58;").replace("@", "&#64;")
