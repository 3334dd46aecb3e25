"""The command lines that make a card, a placement and a comparison again, from what these files say of themselves."""

import shlex
from collections.abc import Mapping
from typing import Any


def command_lines(card: Mapping[str, Any], placement: Mapping[str, Any] | None, comparison: Mapping[str, Any] | None) -> list[str]:
    """One command line for each file that is given, in the order in which they are run."""
    lines = [_profile(card)]
    if placement is not None and placement["objective"] != "given":  # what was named by hand has no rule behind it
        lines.append(_select(placement))
    if comparison is not None:
        lines.append(_compare(comparison, placement))
    return [shlex.join(["layercard", *line]) for line in lines]


def _options(values: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """`--batch-size 8` for each name that has a value."""
    return [part for name in names if values.get(name) is not None for part in (f"--{name.replace('_', '-')}", str(values[name]))]


def _source(data: Mapping[str, Any]) -> str:
    """A data source as `--data` takes it; the built-in set also says how it was generated."""
    return str(data["source"]).partition(" (")[0]


def _profile(card: Mapping[str, Any]) -> list[str]:
    settings, data = card["settings"], card["data"]
    found = _options(settings, ("rank", "ridge", "batch_size", "label_samples", "device", "dtype", "seed"))
    kind = settings.get("probe") or ("step" if settings.get("step_probe", True) else "none")  # earlier cards have a yes or no
    probe = {"step": [], "none": ["--probe", "none"], "train": ["--probe", "train", *_options(settings, ("probe_steps",))]}[kind]
    return [
        "profile",
        str(card["model"]["name"]),
        "--data",
        _source(data),
        "--records",
        str(data["records"]),
        *found,
        *probe,
        "-o",
        "card.json",
    ]


def _select(placement: Mapping[str, Any]) -> list[str]:
    objective = str(placement["objective"])
    how = "--objective" if objective in ("performance", "cost", "balanced") else "--strategy"
    asked = placement.get("asked") or {}
    budgets = ("max_time", "max_memory", "max_params", "max_latency", "min_performance", "seed")
    count = asked.get("k") if asked else len(placement["layers"])
    ranks = ["--allocate-ranks", *_options(asked, ("rank", "alpha"))] if "rank" in asked else []
    given = [*(["--k", str(count)] if count is not None else []), how, objective, *_options(asked, budgets), *ranks]
    return ["select", "card.json", *given, "-o", "placement.json"]


def _compare(comparison: Mapping[str, Any], placement: Mapping[str, Any] | None) -> list[str]:
    chosen = list(placement["layers"]) if placement is not None else None
    names = ["placement.json" if list(row["layers"]) == chosen else str(row["name"]) for row in comparison["rows"]]
    data, valid, settings = comparison.get("data") or {}, comparison.get("valid") or {}, comparison.get("settings") or {}
    records = [
        *(["--data", _source(data), "--records", str(data.get("records"))] if "source" in data else []),
        *(["--valid", _source(valid), "--valid-records", str(valid.get("records"))] if "source" in valid else []),
    ]
    given = ("rank", "alpha", "dropout", "learning_rate", "steps", "epochs", "batch_size", "accumulation", "seed")
    line = ["compare", str(comparison["model"].get("name")), *records, "--placements", ",".join(names)]
    return [*line, *_options(settings, given), *(["--bf16"] if settings.get("bf16") else []), "-o", "compare"]
