"""The command lines that make a card, a placement and a comparison again, from what these files say of themselves."""

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layercard.card.card import LayerCard
    from layercard.report.sources import Sources
    from layercard.selection.placement import Placement
    from layercard.trials.records import Comparison

Json = Mapping[str, Any]


def commands_of(sources: "Sources") -> list[str]:
    """The command lines that make the files of a report again, as far as the files say."""
    card = sources.card if sources.result is None else None  # a run made all of it
    lines = command_lines(card, sources.placement, next(iter(sources.comparisons), None)) if card is not None else []
    return [*lines, *dict.fromkeys(str(table["command"]) for table in sources.tables if table.get("command"))]


def command_lines(card: "LayerCard", placement: "Placement | None", comparison: "Comparison | None") -> list[str]:
    """One command line for each file that is given, in the order in which they are run."""
    lines = [_profile(card)]
    if placement is not None and placement.objective != "given":  # what was named by hand has no rule behind it
        lines.append(_select(placement))
    if comparison is not None:
        lines.append(_compare(comparison, placement))
    return [shlex.join(["layercard", *line]) for line in lines]


def _options(values: Json, *names: str) -> list[str]:
    """`--batch-size 8` for each name that has a value."""
    return [part for name in names if values.get(name) is not None for part in (f"--{name.replace('_', '-')}", str(values[name]))]


def _sources(option: str, source: object) -> list[str]:
    """Data sources as `--data` takes them; the built-in set also says how it was generated."""
    return [part for name in str(source).split(" + ") for part in (option, name.partition(" (")[0])]


def _profile(card: "LayerCard") -> list[str]:
    settings, data = card.settings, card.data
    probe = ["--probe", kind] if (kind := settings.get("probe", "step")) != "step" else []
    probe += _options(settings, "probe_steps") if kind == "train" else []
    line = ["profile", card.model.name, *_sources("--data", data.source), "--records", str(data.records)]
    options = _options(settings, "rank", "ridge", "batch_size", "label_samples", "device", "dtype", "seed")
    return [*line, *options, *probe, "-o", "card.json"]


def _select(placement: "Placement") -> list[str]:
    objective = placement.objective
    how = "--objective" if objective in ("performance", "cost", "balanced") else "--strategy"
    asked = placement.asked
    count = asked.get("k") if asked else len(placement.layers)
    budgets = _options(
        asked, "max_time", "max_memory", "max_training_memory", "max_params", "max_latency", "min_performance", "modules", "epochs", "seed"
    )
    ranks = ["--allocate-ranks", *_options(asked, "rank", "alpha")] if "rank" in asked else []
    return ["select", "card.json", *_options({"k": count}, "k"), how, objective, *budgets, *ranks, "-o", "placement.json"]


def _compare(comparison: "Comparison", placement: "Placement | None") -> list[str]:
    layers = placement.layers if placement is not None else None
    names = ["placement.json" if row.layers == layers else row.name for row in comparison.rows]
    line = ["compare", str(comparison.model.get("name"))]
    for data, source, records in ((comparison.data, "--data", "--records"), (comparison.valid, "--valid", "--valid-records")):
        line += [*_sources(source, data["source"]), records, str(data.get("records"))] if "source" in data else []
    settings = comparison.settings
    given = ("rank", "alpha", "dropout", "learning_rate", "steps", "epochs", "batch_size", "accumulation", "seed")
    bf16 = ["--bf16"] if settings.get("bf16") else []
    return [*line, "--placements", ",".join(names), *_options(settings, *given), *bf16, "-o", "compare"]
