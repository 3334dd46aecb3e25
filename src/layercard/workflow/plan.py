"""`layercard plan`: will a training fit, how long will it take and what will it cost, for all layers and for other placements.

On this machine a few training steps are timed, with the fast parts on and stock, on batches of the user's records; every placement
follows from these (`layercard.cost.training`). For a device that is not at hand the steps are estimated from the shapes of the model and
the device's published rates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from layercard.cost.devices import LAUNCH, MARGIN, REACHED, Rates
from layercard.cost.estimate import estimated_cost, free_bytes
from layercard.cost.measure import measure_cost, measure_step, usual_batch
from layercard.cost.model import LIBRARY_BYTES, CostModel
from layercard.cost.training import TrainingForecast, TrainingPlan, Workload, forecast_training, heaviest_batch, workload
from layercard.data.load import Dataset, collate
from layercard.errors import PlacementError
from layercard.fast.fast_training import fast_training
from layercard.models.load import BaseModel, Progress, describe
from layercard.selection.placement import Placement
from layercard.selection.select import LAYERS
from layercard.selection.strategies import strategy_layers
from layercard.settings import FastSettings, TrainSettings
from layercard.training.evaluate import describe_data
from layercard.training.trainer import MEASUREMENTS


@dataclass(frozen=True)
class Candidate:
    """A placement that a plan prices: its name, layers and set of modules."""

    name: str
    layers: tuple[int, ...]
    modules: str = "all"


def candidates(depth: int, placement: Placement | None = None) -> list[Candidate]:
    """All layers first, then the given placement and plain ones of as many layers, each once."""
    every = tuple(range(depth))
    k = min(depth, LAYERS if placement is None else len(placement.layers))
    named = [Candidate("all layers", every), Candidate("all layers, MLP", every, "mlp")]
    if placement is not None:
        named.append(Candidate("the placement", placement.layers, placement.modules or "all"))
    named += [Candidate(f"{name} {k}", tuple(strategy_layers(name, depth, k))) for name in ("uniform", "middle", "last")]
    return list({(each.layers, each.modules): each for each in reversed(named)}.values())[::-1]


def plan_here(
    base: BaseModel,
    data: Dataset,
    settings: TrainSettings | None = None,
    *,
    valid: Dataset | None = None,
    placement: Placement | None = None,
    fast: FastSettings | None = None,
    price_per_hour: float | None = None,
    progress: Progress | None = None,
) -> TrainingPlan:
    """Forecast trainings on this machine from a few timed steps of plain LoRA; the model is the same afterwards.

    Args:
        base: The model.
        data: Records to train on.
        settings: How to train; one epoch when not given.
        valid: Held-out records, whose loss is measured before and after, and ten times more with `settings.patience`.
        placement: A placement to price beside the plain ones.
        fast: Which fast parts are on.
        price_per_hour: Of this machine, in any currency.
        progress: Told of the phase `cost`.

    Raises:
        DataError, ModelError: As `measure_cost`.
    """
    settings, fast = settings or TrainSettings(), fast or FastSettings()
    work = workload(data, settings, valid, evaluations=2 + (MEASUREMENTS if settings.patience else 0))
    usual = usual_batch(data.examples, settings.batch_size, base.pad_id, settings.seed)
    heaviest = collate(data.examples, heaviest_batch(data, settings), base.pad_id)
    around = partial(fast_training, settings=replace(fast, prefix_cache=False, cache_folder=None, cache_bytes=None))
    how: dict[str, Any] = {"rank": settings.rank, "heaviest": heaviest, "progress": progress}
    cost = measure_cost(base, usual, repeats=1, around=around, **how)
    stock = measure_step(base, usual, rank=settings.rank, heaviest=heaviest)
    rows = forecasts(cost, work, candidates(len(base.blocks), placement), width=base.model.config.get_text_config().hidden_size)
    scale = work.padded_tokens / usual.input_ids.numel()
    baseline = rows[0].model_copy(
        update={
            "name": "all layers, stock",
            "fast": False,
            "first_step_seconds": scale * stock.seconds,
            "later_step_seconds": scale * stock.seconds,
            "train_seconds": work.steps * scale * stock.seconds,
            "memory_bytes": stock.bytes,
            "process_bytes": rows[0].process_bytes + stock.bytes - rows[0].memory_bytes,
            "cache_bytes": 0,
        }
    )
    return TrainingPlan(
        model=describe(base),
        data=describe_data(data),
        settings=settings.deciding(),
        workload=work,
        source="measured",
        device=cost.device,
        memory_bytes=free_bytes(base.device) + LIBRARY_BYTES + cost.weights_bytes,  # model and libraries have theirs already
        price_per_hour=price_per_hour,
        rows=(baseline, *rows),
        notes=_notes(settings),
    )


def plan_elsewhere(
    model: Any,
    data: Dataset,
    device: Rates,
    settings: TrainSettings | None = None,
    *,
    name: str = "",
    dtype: str = "bfloat16",
    valid: Dataset | None = None,
    placement: Placement | None = None,
    price_per_hour: float | None = None,
) -> TrainingPlan:
    """Forecast trainings on a device that is not at hand, from shapes and published rates; `model` may be without weights.

    Raises:
        CardError: The sizes are such that no cost follows from them.
    """
    settings = settings or TrainSettings()
    work = workload(data, settings, valid, evaluations=2 + (MEASUREMENTS if settings.patience else 0))
    rates: dict[str, Any] = {"flops": device.flops, "bandwidth": device.bytes_per_second, "launch": LAUNCH}
    how: dict[str, Any] = {"rank": settings.rank, "name": name, "dtype": dtype, "batch_size": settings.batch_size, "device": device.name}
    labelled = max(1, round(work.labelled_tokens / settings.accumulation))

    def cost_of(tokens: float, *, fast: bool) -> CostModel:
        length = max(2, round(tokens / settings.accumulation / settings.batch_size))
        return estimated_cost(model, **rates, **how, length=length, labelled=labelled, fast=fast)

    cost, stock = cost_of(work.tokens, fast=True), cost_of(work.padded_tokens, fast=False)
    width = model.config.get_text_config().hidden_size
    chosen = candidates(len(cost.layers), placement)
    baseline = forecast_training(stock, work, chosen[0].layers, name="all layers, stock")
    return TrainingPlan(
        model={"name": name, "layers": len(cost.layers)},
        data=describe_data(data),
        settings=settings.deciding(),
        workload=work,
        source="rates",
        device=f"{device.name}: {device.tflops:g} TFLOP/s and {device.bandwidth:g} GB/s published, {REACHED:.0%} of both assumed",
        memory_bytes=round(device.memory * 1e9),
        margin=MARGIN,
        price_per_hour=price_per_hour,
        rows=(baseline, *forecasts(cost, work, chosen, width=width)),
        notes=_notes(settings),
    )


def forecasts(cost: CostModel, work: Workload, chosen: Sequence[Candidate], *, width: int) -> list[TrainingForecast]:
    """A forecast for each candidate, and a streamed one where blocks can stay on disk; a set that a layer lacks is left out."""
    rows = []
    for candidate in chosen:
        how: dict[str, Any] = {"name": candidate.name, "modules": candidate.modules, "width": width}
        try:
            rows.append(forecast_training(cost, work, candidate.layers, **how))
        except PlacementError:
            continue
        if min(candidate.layers) > 0:
            rows.append(forecast_training(cost, work, candidate.layers, stream=True, **how))
    return rows


def _notes(settings: TrainSettings) -> tuple[str, ...]:
    notes = []
    if settings.method != "lora":
        notes.append(f"steps are those of plain LoRA; {settings.method} takes more")
    if settings.accumulation > 1:
        notes.append("memory is that of one batch of the accumulated ones")
    return tuple(notes)
