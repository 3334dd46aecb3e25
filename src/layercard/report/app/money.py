"""The calculator of the app: the reader's figures as fields, and what a placement saves with them."""

import re
from collections.abc import Callable, Sequence
from pathlib import PurePath

from layercard.card.numbers import Json
from layercard.errors import ReportError
from layercard.report.app.library import Entry
from layercard.report.ratios import ratios_of
from layercard.report.roi import Roi, RoiInputs, roi
from layercard.report.trials import Row, Trial, compared, of_comparison, of_run, rows_of

FIGURES: dict[str, dict[str, str]] = {
    "Training": {
        "gpu_price_per_hour": "GPU price per hour",
        "runs_per_month": "Fine-tuning runs a month",
        "hours_per_run": "Hours of an all-layer run",
        "gpus": "GPUs of a run",
        "run_memory_gb": "Memory of an all-layer run, GB (empty: as measured)",
        "smaller_gpu_price_per_hour": "Price of a smaller GPU per hour (empty: none)",
        "smaller_gpu_memory_gb": "Memory of the smaller GPU, GB",
        "smaller_gpu_speed": "Its speed, share of the other",
    },
    "Serving": {
        "adapters_served": "Adapters served",
        "adapter_mb": "Size of an all-layer adapter, MB (empty: as measured)",
        "storage_price_per_gb_month": "Price of keeping 1 GB a month",
        "requests_per_month": "Requests a month",
        "tokens_per_month": "Tokens generated a month",
        "concurrent_requests": "Requests answered at a time",
        "adapter_latency_ms": "Time adapters add to a token, ms (empty: as measured)",
    },
    "Set-up and energy": {
        "engineer_hours": "Engineer hours for set-up",
        "engineer_rate": "Cost of an engineer hour",
        "profile_hours": "GPU hours to profile",
        "gpu_watts": "Power of a GPU, W",
        "grid_gco2_per_kwh": "CO₂ of the grid, g/kWh",
    },
}
"""The fields in groups: name in `RoiInputs`, and what the page calls it."""
LABELS = {name: label.partition(" (")[0].partition(",")[0] for group in FIGURES.values() for name, label in group.items()}
"""The fields in short."""
NAMES = tuple(name for group in FIGURES.values() for name in group)


def default(name: str) -> float | None:
    """The example that a field starts with."""
    value = RoiInputs.model_fields[name].default
    return None if value is None else float(value)


def optional(name: str) -> bool:
    """Whether a field may stay empty."""
    return RoiInputs.model_fields[name].default is None


def figure(name: str, given: float | str | None) -> float | None:
    """What was typed into a field as a number; `None` for an empty one.

    Raises:
        ReportError: It is no number.
    """
    if given is None or not str(given).strip():
        return None
    try:
        return float(str(given).strip().replace(",", "."))
    except ValueError:
        raise ReportError(f"{LABELS[name]}: {str(given)[:40]!r} is no number; give one, such as 2.5") from None


def saved(figures: Sequence[float | str | None], currency: str, layers: Sequence[int], card: Entry, entries: Sequence[Entry]) -> Roi:
    """What a placement saves.

    Args:
        figures: The fields in the order of `NAMES`; `None` for an empty one.
        currency: What money is counted in.
        layers: The placement.
        card: The card; its cost is used where no run says the same.
        entries: All files, for the runs of the same model.

    Raises:
        ReportError: A figure out of range.
    """
    numbers = {name: figure(name, given) for name, given in zip(NAMES, figures, strict=True)}
    changed = {name: value for name, value in numbers.items() if value is not None and value != default(name)}
    try:
        inputs = RoiInputs.of({**changed, "currency": currency})
    except ReportError as error:
        raise ReportError(page_words(str(error))) from None
    return roi(inputs, ratios_of(layers, card.value, runs_of(card, entries)))


def page_words(text: str) -> str:
    """A sentence of the calculator with the fields called as the page calls them.

    >>> page_words("example figures, not given: gpus, gpu_watts")
    'example figures, not given: GPUs of a run, Power of a GPU'
    """
    return re.sub(r"\b[a-z]+(?:_[a-z0-9]+)+\b|\bgpus\b", lambda word: LABELS.get(word[0], word[0]), text)


def runs_of(card: Entry, entries: Sequence[Entry]) -> list[Row]:
    """Trained placements of a card's model, from run records and comparisons; runs that a comparison has are not counted twice."""
    fingerprint = card.value["model"]["fingerprint"]
    ours = [entry for entry in entries if entry.problem is None and (entry.value.get("model") or {}).get("fingerprint") == fingerprint]
    comparisons = [entry for entry in ours if entry.kind == "comparison"]
    covered = [PurePath(entry.place).parent for entry in comparisons]
    trials: list[Trial] = []
    for entry in ours:
        if entry.kind == "comparison":
            trials += _trials(entry, of_comparison)
        elif entry.kind == "run record" and not any(folder in PurePath(entry.place).parent.parents for folder in covered):
            trials += _trials(entry, lambda value: [of_run(value)])
    return rows_of(compared(trials))


def _trials(entry: Entry, read: Callable[[Json], list[Trial]]) -> list[Trial]:
    """The runs of a file; none where it lacks what a run must have."""
    try:
        return read(entry.value)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return []
