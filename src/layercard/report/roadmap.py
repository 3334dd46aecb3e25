"""The way from a model to a deployed adapter in three phases: what was done for this model, what is next, and with which command.

Everything comes from the files that are there (cards, placements, run records, comparisons), as their JSON values.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from layercard.card.numbers import Json, listed, percent, stability_words
from layercard.records import Estimate

DONE, NEXT, OPEN = "done", "next", "open"
"""States of a step: there is a file for it; it is the one to do now; it comes later, or can be left out."""


_KINDS = ("card", "placement", "run record", "comparison", "evaluation")


@dataclass(frozen=True)
class Found:
    """A file: what a command line calls it, its kind (one of `_KINDS`), and its value."""

    name: str
    kind: str
    value: Json


@dataclass(frozen=True)
class Step:
    """A step of the way.

    Attributes:
        title: What is done.
        state: `done`, `next` or `open`.
        detail: What was found, or what the step gives.
        command: The command line that does it.
        optional: Whether the way goes on without it.
    """

    title: str
    state: str
    detail: str
    command: str
    optional: bool = False


@dataclass(frozen=True)
class Phase:
    """One of the three phases, with its steps in order."""

    name: str
    purpose: str
    steps: tuple[Step, ...]

    @property
    def state(self) -> str:
        """`done` when every step that is needed is done, `next` when the next step lies here."""
        states = [step.state for step in self.steps if not step.optional]
        return DONE if all(state == DONE for state in states) else NEXT if NEXT in states else OPEN


@dataclass(frozen=True)
class Roadmap:
    """The three phases for one model, and the step to do now; `None` when all is done."""

    model: str
    phases: tuple[Phase, ...]
    next: Step | None = field(default=None)


@dataclass(frozen=True)
class _Names:
    """What commands name: the model, data and files, as they are or as they will be called."""

    model: str = "MODEL"
    data: str = "train.jsonl"
    valid: str = "valid.jsonl"
    card: str = "card.json"
    placement: str = "placement.json"
    adapter: str = "adapter"


def roadmap(files: Sequence[Found], card: Found | None = None) -> Roadmap:
    """Where a model stands.

    Args:
        files: All files that were found; those of other models are left aside.
        card: The card of the model in question; without one the way begins at its start.
    """
    ours = [found for found in files if card is not None and _fingerprint(found) == card.value["model"]["fingerprint"]]
    ours.sort(key=_order)
    by_kind = {kind: [found for found in ours if found.kind == kind] for kind in _KINDS}
    names = _names(card, by_kind)
    phases = (
        Phase("Profile", "Measure once, without training, what each layer could do.", _profile(card, by_kind, names)),
        Phase("Select", "Choose the layers that keep what you need at the least cost.", _select(card, by_kind, names)),
        Phase("Deploy", "Train adapters there and nowhere else, check what they keep, and use them.", _deploy(by_kind, names)),
    )
    return _with_next(card, phases)


def roadmap_markdown() -> str:
    """The way of a model of which nothing is there yet, as the text of the first page of the documentation."""
    parts = []
    for at, phase in enumerate(roadmap([]).phases, 1):
        lines = [f"# {step.title}{' (optional)' if step.optional else ''}: {step.detail}\n{step.command}" for step in phase.steps]
        parts.append("\n".join([f"**{at}. {phase.name}.** {phase.purpose}\n", "```sh", *lines, "```\n"]))
    return "\n".join(parts)


def _with_next(card: Found | None, phases: tuple[Phase, ...]) -> Roadmap:
    """The first step that is needed and not done becomes the next one."""
    following: Step | None = None
    marked = []
    for phase in phases:
        steps = []
        for step in phase.steps:
            if following is None and step.state == OPEN and not step.optional:
                step = following = Step(step.title, NEXT, step.detail, step.command)
            steps.append(step)
        marked.append(Phase(phase.name, phase.purpose, tuple(steps)))
    return Roadmap(str(card.value["model"]["name"]) if card else "", tuple(marked), following)


def _profile(card: Found | None, by_kind: Mapping[str, Sequence[Found]], names: _Names) -> tuple[Step, ...]:
    make = ["profile", names.model, "--data", names.data, "-o", names.card]
    made = "a few minutes; the model is not changed"
    if card is not None:
        data = card.value["data"]
        made = f"{card.name}: {data['records']:,} records of {data['source']}; ranking {stability_words(card.value)}"
    others = [found for found in by_kind["card"] if card is not None and found.name != card.name]
    second = f"{', '.join(found.name for found in others)} of the same model; compare before you reuse one for the other"
    other = others[0].name if others else "other-card.json"
    return (
        _step("Make the Layer Card", card is not None, made, make),
        _step("Read it", card is not None, "a table of the layers with the best ones marked, and warnings in words", ["show", names.card]),
        _step(
            "Does it serve other data too?",
            bool(others),
            second if others else "cards of the same model on two data sets, and a verdict: reuse, profile again, or not enough evidence",
            ["transfer", names.card, other],
            optional=True,
        ),
    )


def _select(card: Found | None, by_kind: Mapping[str, Sequence[Found]], names: _Names) -> tuple[Step, ...]:
    placements = by_kind["placement"]
    detail = "the cheapest placement that keeps 95 % of the performance of all layers, or what your budgets allow"
    if placements:
        detail = "; ".join(_placement_words(found) for found in placements[:3]) + (" …" if len(placements) > 3 else "")
    front = "the least step time and the least memory for every performance kept"
    return (
        _step("See what can be had at which cost", False, front, ["pareto", names.card], optional=True),
        _step("Choose the layers", bool(placements), detail, ["select", names.card, "-o", names.placement]),
    )


def _deploy(by_kind: Mapping[str, Sequence[Found]], names: _Names) -> tuple[Step, ...]:
    runs, comparisons = by_kind["run record"], by_kind["comparison"]
    trained = "; ".join(_run_words(found) for found in runs[:3]) if runs else "LoRA in these layers only; the folder loads with plain PEFT"
    measured = (
        "; ".join(_comparison_words(found) for found in comparisons[:2])
        if comparisons
        else ("the same training in all layers and in the chosen ones: performance kept, time and memory, measured")
    )
    evaluated = [found.name for found in by_kind["evaluation"]]
    data = ["--data", names.data, "--valid", names.valid]
    return (
        _step("Train", bool(runs), trained, ["train", names.model, *data, "--placement", names.placement, "-o", names.adapter]),
        _step(
            "Check against all layers",
            bool(comparisons),
            measured,
            ["compare", names.model, *data, "--placements", f"{names.placement},all", "-o", "compare"],
        ),
        _step(
            "Score what it writes",
            bool(evaluated),
            ", ".join(evaluated) or "loss, BLEU, chrF, ROUGE-L or exact match on held-out records",
            ["eval", names.model, "--data", names.valid, "--adapter", names.adapter],
            optional=True,
        ),
    )


def _step(title: str, done: bool, detail: str, command: Sequence[str], optional: bool = False) -> Step:
    return Step(title, DONE if done else OPEN, detail, shlex.join(["layercard", *command]), optional)


def _names(card: Found | None, by_kind: Mapping[str, Sequence[Found]]) -> _Names:
    if card is None:
        return _Names()
    source = str(card.value["data"]["source"]).partition(" (")[0]
    valid = "synthetic:valid" if source.startswith("synthetic") else "valid.jsonl"
    placements, runs = by_kind["placement"], by_kind["run record"]
    adapter = runs[0].name.rpartition("/")[0] if runs and "/" in runs[0].name else "adapter"
    return _Names(
        str(card.value["model"]["name"]), source, valid, card.name, placements[0].name if placements else "placement.json", adapter
    )


def _order(found: Found) -> tuple[bool, int, str]:
    """Placements and runs of few layers first, then files that lie next to the card rather than in folders of runs."""
    value = found.value.get("placement", found.value)
    layers, depth = value.get("layers"), (value.get("model") or {}).get("layers")
    return isinstance(layers, list) and len(layers) == depth, found.name.count("/"), found.name


def _fingerprint(found: Found) -> Any:
    model = found.value.get("model")
    return model.get("fingerprint") if isinstance(model, Mapping) else None


def _placement_words(found: Found) -> str:
    kept = Estimate.read((found.value.get("predicted") or {}).get("performance_kept"))
    keeps = f", {percent(kept)} predicted" if kept is not None else ""
    return f"{found.name}: layers {listed([int(layer) for layer in found.value['layers']])}{keeps}"


def _run_words(found: Found) -> str:
    reduced = Estimate.read(found.value.get("loss_reduction"))
    gained = f", loss reduced by {reduced.value:.3f} nats per labelled token" if reduced is not None else ""
    return f"{found.name}: {len(found.value['placement']['layers'])} layers{gained}"


def _comparison_words(found: Found) -> str:
    kept = [(str(row["name"]), Estimate.read(row.get("performance_kept"))) for row in found.value["rows"]]
    words = [f"{name} keeps {value.value:.0f} %" for name, value in kept if value is not None and name != "all"]
    return f"{found.name}: {', '.join(words[:3]) or f'{len(kept)} placements'}"
