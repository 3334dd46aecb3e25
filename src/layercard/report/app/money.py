"""The calculator of the app: the reader's figures as fields, and what a placement saves with them."""

from collections.abc import Sequence

from layercard.report.app.library import Entry
from layercard.report.ratios import ratios_of
from layercard.report.roi import Roi, RoiInputs, roi
from layercard.report.trials import Row, compared, of_comparison, of_run, rows_of

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
NAMES = tuple(name for group in FIGURES.values() for name in group)
WHOLE = ("gpus", "adapters_served", "requests_per_month", "tokens_per_month")
"""Figures that are counts."""


def default(name: str) -> float | None:
    """The example that a field starts with."""
    value = RoiInputs.model_fields[name].default
    return None if value is None else float(value)


def saved(figures: Sequence[float | None], currency: str, layers: Sequence[int], card: Entry, entries: Sequence[Entry]) -> Roi:
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
    given = {name: int(value) if name in WHOLE else value for name, value in zip(NAMES, figures, strict=True) if value is not None}
    changed = {name: value for name, value in given.items() if value != default(name)}
    return roi(RoiInputs.of({**changed, "currency": currency}), ratios_of(layers, card.value, runs_of(card, entries)))


def runs_of(card: Entry, entries: Sequence[Entry]) -> list[Row]:
    """Trained placements of a card's model, from run records and comparisons."""
    fingerprint = card.value["model"]["fingerprint"]
    ours = [entry for entry in entries if entry.problem is None and (entry.value.get("model") or {}).get("fingerprint") == fingerprint]
    trials = [of_run(entry.value) for entry in ours if entry.kind == "run record"]
    trials += [trial for entry in ours if entry.kind == "comparison" for trial in of_comparison(entry.value)]
    return rows_of(compared(trials))
