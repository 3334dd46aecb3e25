"""Step time of stock training: the whole model forward, PEFT's adapters, nothing kept, placements alternating."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from layercard.cost.measure import adapted_layers, usual_batch
from layercard.data.load import Batch
from layercard.models.load import BaseModel, Progress
from layercard.models.losses import training_step
from layercard.trials.runs import BenchSettings, base_model, compact, task_data
from layercard.trials.storage import Storage

ROUNDS = 3
"""Timed steps of each placement; the first, which allocates the optimiser's state, comes on top."""

Sized = tuple[tuple[int, ...], int]
"""Layers, and rank of their adapters."""


def time_name(task: str, layers: Sequence[int], rank: int) -> str:
    """Where the step time of a placement lies."""
    return f"times/{task}-r{rank}-l{compact(layers)}.json"


def measure_times(settings: BenchSettings, storage: Storage, task: str, placements: Sequence[Sized], tell: Progress) -> None:
    """Time the placements that were not timed yet, in turn and beside all layers; medians over rounds, and of the ratios in a round."""
    missing = [(layers, rank) for layers, rank in placements if not storage.exists(time_name(task, layers, rank))]
    if not missing:
        return
    base = base_model(settings)
    data = task_data(base, settings, task)
    batch = usual_batch(data.train.examples[: 16 * data.batch_size], data.batch_size, base.pad_id).to(base.device)
    every = (tuple(range(len(base.blocks))), settings.rank)
    step_seconds(base, batch, *every)
    rounds: list[tuple[float, list[float]]] = []
    for at in range(ROUNDS):
        rounds.append((step_seconds(base, batch, *every), [step_seconds(base, batch, *placement) for placement in missing]))
        tell(f"step times {task}", at + 1, ROUNDS)
    whole = statistics.median(seconds for seconds, _ in rounds)
    for column, (layers, rank) in enumerate(missing):
        value: dict[str, Any] = {"task": task, "layers": list(layers), "rank": rank, "tokens": int(batch.attention_mask.sum())}
        value |= {"step_seconds": statistics.median(own[column] for _, own in rounds), "all_layers_seconds": whole}
        value |= {"share_of_all": statistics.median(own[column] / seconds for seconds, own in rounds), "rounds": ROUNDS}
        value["threads"] = torch.get_num_threads()
        storage.write(time_name(task, layers, rank), value)


def step_seconds(base: BaseModel, batch: Batch, layers: Sequence[int], rank: int) -> float:
    """Seconds of one step of stock training with adapters in `layers`, after one that is not counted."""
    with adapted_layers(base, layers, rank) as (adapted, optimizer):
        training_step(adapted, batch, optimizer)
        started = time.perf_counter()
        training_step(adapted, batch, optimizer)
        if base.device.type == "cuda":
            torch.cuda.synchronize(base.device)
        return time.perf_counter() - started
