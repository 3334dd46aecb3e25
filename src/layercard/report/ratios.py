"""The ratios of the calculator, taken from runs where there are any, else from the card's cost; each says what it comes from."""

from collections.abc import Sequence

from layercard.card.numbers import Json, listed
from layercard.cost.model import CostModel
from layercard.records import Estimate
from layercard.report.costs import where
from layercard.report.roi import NOT_MEASURED, Ratio, Ratios
from layercard.report.trials import Row, mean

COST_ERROR = 0.061
"""Worst error of a step time that a measured cost model predicts (`benchmarks/results/cost_model.json`)."""
SOURCES = {"rates": "estimated from FLOPs, bytes and a device's rates", "shapes": "estimated from shapes alone"}


def ratios_of(layers: Sequence[int], card: Json | None = None, rows: Sequence[Row] = ()) -> Ratios:
    """What is known of a placement against all layers.

    The time that adapters add to a token is taken from an accelerator's cost only: that of a processor core says nothing of a GPU's price.

    Args:
        layers: The placement.
        card: JSON value of a card; its `cost` is used where no run says the same.
        rows: Trained placements (`trials.rows_of`), the one with these layers and all layers among them or not.
    """
    chosen = tuple(sorted(layers))
    cost = CostModel.from_json(dict(card["cost"]), "the card's cost") if card and card.get("cost") else None
    row = next((row for row in rows if row.layers == chosen), None)
    whole = next((row for row in rows if len(row.layers) == row.depth), None)
    every = range(len(cost.layers)) if cost else None
    measured = cost is not None and cost.source == "measured"
    return Ratios(
        placement=f"layers {listed(chosen, ' ')}",
        time=_time(row, chosen, cost),
        memory=_memory(row, chosen, cost),
        latency=_latency(chosen, cost),
        adapter_size=_size(row, whole, chosen, cost),
        run_memory_gb=(cost.weights_bytes + cost.peak_memory(every)) / 1e9 if cost and every and measured else None,
        adapter_mb=_adapter_mb(whole, cost),
        adapter_latency_ms=1e3 * cost.inference_latency(every) if cost and every and measured and not cost.threads else None,
        where=_where(cost, row),
    )


def _time(row: Row | None, layers: Sequence[int], cost: CostModel | None) -> Ratio:
    if row is not None and row.time_share is not None:
        return _ratio(row.time_share, 0.01, f"timed against all layers, {_count(row.timings, 'timing')}")
    if cost is None:
        return NOT_MEASURED
    share = cost.step_time(layers) / cost.step_time(range(len(cost.layers)))
    if cost.source == "measured":
        source = f"step time from the card's cost, its parts measured on {where(cost)}; ± {100 * COST_ERROR:.1f} %"
        return Ratio.of(share, source, low=share * (1 - COST_ERROR), high=share * (1 + COST_ERROR))
    return Ratio.of(share, f"step time {SOURCES[cost.source]}", measured=False)


def _memory(row: Row | None, layers: Sequence[int], cost: CostModel | None) -> Ratio:
    """Peak memory with the frozen model in it, which only the cost knows the size of."""
    if cost is None:
        return NOT_MEASURED
    frozen, every = cost.weights_bytes, range(len(cost.layers))
    known = [(trial.memory, trial.whole_memory) for trial in row.trials if trial.memory and trial.whole_memory] if row else []
    if known:
        found = mean([Estimate(value=(frozen + own) / (frozen + whole)) for own, whole in known])
        return _ratio(found, 1.0, f"peaks measured, {_count(len(known), 'run')}")
    share = (frozen + cost.peak_memory(layers)) / (frozen + cost.peak_memory(every))
    if cost.source == "measured":
        return Ratio.of(share, f"peak memory from the card's cost, its parts measured on {where(cost)}")
    return Ratio.of(share, f"peak memory {SOURCES[cost.source]}", measured=False)


def _latency(layers: Sequence[int], cost: CostModel | None) -> Ratio:
    whole = cost.inference_latency(range(len(cost.layers))) if cost else 0.0
    if cost is None or whole <= 0:
        return NOT_MEASURED
    share = cost.inference_latency(layers) / whole
    if cost.source == "measured":
        return Ratio.of(share, f"time that adapters, not merged, add to a token, measured on {where(cost)}")
    return Ratio.of(share, f"added latency {SOURCES[cost.source]}", measured=False)


def _size(row: Row | None, whole: Row | None, layers: Sequence[int], cost: CostModel | None) -> Ratio:
    if row is not None and whole is not None and row.adapter_bytes and whole.adapter_bytes:
        return Ratio.of(row.adapter_bytes.value / whole.adapter_bytes.value, "sizes of the saved adapters")
    if cost is None:
        return NOT_MEASURED
    return Ratio.of(cost.adapter_bytes(layers) / cost.adapter_bytes(range(len(cost.layers))), "counted from the shapes of the adapted maps")


def _adapter_mb(whole: Row | None, cost: CostModel | None) -> float | None:
    if whole is not None and whole.adapter_bytes:
        return whole.adapter_bytes.value / 1e6
    return None if cost is None else cost.adapter_bytes(range(len(cost.layers))) / 1e6


def _ratio(found: Estimate, scale: float, source: str) -> Ratio:
    low, high = (None if end is None else scale * end for end in (found.low, found.high))
    return Ratio.of(scale * found.value, source, low=low, high=high)


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ', without an interval'}"


def _where(cost: CostModel | None, row: Row | None) -> str:
    found = [f"{where(cost)}, {cost.batch_size} records of {cost.tokens} tokens"] if cost and cost.source == "measured" else []
    machines = dict.fromkeys(trial.machine for trial in row.trials if trial.machine) if row else {}
    return "; ".join([*found, *machines])
