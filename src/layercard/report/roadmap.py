"""The way from a model to a deployed adapter in three phases: what was done for this model, what is next, and with which command.

The phases, their steps and commands are in `roadmap.toml`. What was done comes from the files that are there (cards, placements, run
records, comparisons), as their JSON values.
"""

import shlex
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files as package_files
from typing import NamedTuple

from layercard.card.numbers import Json, listed, percent, stability_words
from layercard.records import Estimate

DONE, NEXT, OPEN = "done", "next", "open"
"""States of a step: there is a file for it; it is the one to do now; it comes later, or can be left out."""
KINDS = ("card", "placement", "run record", "comparison", "evaluation")


class ModelFile(NamedTuple):
    """A file: what a command line calls it, its kind (one of `KINDS`), and its value."""

    name: str
    kind: str
    value: Json


class Step(NamedTuple):
    """A step: its title and state, what there is or what it gives, the command that does it, and whether it may be left out."""

    title: str
    state: str
    detail: str
    command: str
    optional: bool = False


class Phase(NamedTuple):
    """One of the three phases, with its steps in order."""

    name: str
    purpose: str
    steps: tuple[Step, ...]

    @property
    def state(self) -> str:
        """`done` when every step that is needed is done, `next` when the next step lies here."""
        states = [step.state for step in self.steps if not step.optional]
        return DONE if all(state == DONE for state in states) else NEXT if NEXT in states else OPEN


class Roadmap(NamedTuple):
    """The three phases for one model, and the step to do now; `None` when all is done."""

    model: str
    phases: tuple[Phase, ...]
    next: Step | None = None


def roadmap(files: Sequence[ModelFile], card: ModelFile | None = None) -> Roadmap:
    """Where a model stands.

    Args:
        files: All files that there are; those of other models are left aside.
        card: The card of the model in question; without one the way begins at its start.
    """
    fingerprint = card.value["model"]["fingerprint"] if card else None
    models = [(file, file.value.get("model")) for file in files]
    ours = [file for file, model in models if card and isinstance(model, Mapping) and model.get("fingerprint") == fingerprint]
    by_kind = {kind: [file for file in sorted(ours, key=_order) if file.kind == kind] for kind in KINDS}
    others = [file.name for file in by_kind["card"] if card is not None and file.name != card.name]
    placements, runs, comparisons = by_kind["placement"], by_kind["run record"], by_kind["comparison"]

    # What commands call the model, its data and its files: as they are, or as they will be.
    placement = placements[0].name if placements else "placement.json"
    adapter = runs[0].name.rpartition("/")[0] if runs and "/" in runs[0].name else "adapter"
    names = {"model": "MODEL", "data": "train.jsonl", "valid": "valid.jsonl", "card": "card.json", "other": [*others, "other-card.json"][0]}
    names |= {"placement": placement, "placements": f"{placement},all", "adapter": adapter}
    # What there is of each step that is done; an empty text leaves what the step gives.
    done: dict[str, str] = {}
    if card is not None:
        data = card.value["data"]
        source = str(data["source"]).partition(" (")[0]
        names |= {"model": str(card.value["model"]["name"]), "card": card.name, "data": source}
        if source.startswith("synthetic"):
            names["valid"] = "synthetic:valid"
        ranking = stability_words(card.value["stability"])
        done["Make the Layer Card"] = f"{card.name}: {data['records']:,} records of {data['source']}; ranking {ranking}"
        done["Read it"] = ""
    if others:
        done["Does it serve other data too?"] = f"{', '.join(others)} of the same model; compare before you reuse one for the other"
    if placements:
        done["Choose the layers"] = "; ".join(map(_placement_words, placements[:3])) + (" …" if len(placements) > 3 else "")
    if runs:
        done["Train"] = "; ".join(map(_run_words, runs[:3]))
    if comparisons:
        done["Check against all layers"] = "; ".join(map(_comparison_words, comparisons[:2]))
    if by_kind["evaluation"]:
        done["Score what it writes"] = ", ".join(file.name for file in by_kind["evaluation"])

    quoted = {key: shlex.quote(name) for key, name in names.items()}
    phases: list[Phase] = []
    following: Step | None = None
    for phase in tomllib.loads(package_files("layercard.report").joinpath("roadmap.toml").read_text(encoding="utf-8"))["phases"]:
        steps = []
        for entry in phase["steps"]:
            title, optional = entry["title"], entry.get("optional", False)
            command = "layercard " + entry["command"].format(**quoted)
            step = Step(title, DONE if title in done else OPEN, done.get(title) or entry["detail"], command, optional)
            # The first step that is needed and not done is the next one.
            if following is None and step.state == OPEN and not optional:
                step = following = step._replace(state=NEXT)
            steps.append(step)
        phases.append(Phase(phase["name"], phase["purpose"], tuple(steps)))
    return Roadmap(names["model"] if card else "", tuple(phases), following)


def roadmap_markdown() -> str:
    """The way of a model for which there is nothing yet, as the text of the first page of the documentation."""
    parts = []
    for number, phase in enumerate(roadmap([]).phases, 1):
        lines = [f"# {step.title}{' (optional)' if step.optional else ''}: {step.detail}\n{step.command}" for step in phase.steps]
        parts.append("\n".join([f"**{number}. {phase.name}.** {phase.purpose}\n", "```sh", *lines, "```\n"]))
    return "\n".join(parts)


def _order(file: ModelFile) -> tuple[bool, int, str]:
    """Placements and runs of few layers first, then files that lie next to the card rather than in folders of runs."""
    value = file.value.get("placement", file.value)
    layers, depth = value.get("layers"), (value.get("model") or {}).get("layers")
    return isinstance(layers, list) and len(layers) == depth, file.name.count("/"), file.name


def _placement_words(file: ModelFile) -> str:
    performance = Estimate.read((file.value.get("predicted") or {}).get("performance_kept"))
    keeps = f", {percent(performance)} predicted" if performance is not None else ""
    return f"{file.name}: layers {listed([int(layer) for layer in file.value['layers']])}{keeps}"


def _run_words(file: ModelFile) -> str:
    reduction = Estimate.read(file.value.get("loss_reduction"))
    gained = f", loss reduced by {reduction.value:.3f} nats per labelled token" if reduction is not None else ""
    return f"{file.name}: {len(file.value['placement']['layers'])} layers{gained}"


def _comparison_words(file: ModelFile) -> str:
    rows = [(str(row["name"]), Estimate.read(row.get("performance_kept"))) for row in file.value["rows"]]
    words = [f"{name} keeps {value.value:.0f} %" for name, value in rows if value is not None and name != "all"]
    return f"{file.name}: {', '.join(words[:3]) or f'{len(rows)} placements'}"
