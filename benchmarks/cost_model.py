"""Predicted against measured step time and peak memory of placements: random ones and the fixed strategies.

The cost model is measured once (`layercard.timing.measure_cost`). Then the placements take turns: stock PEFT adapters, train mode, one
warm-up step and two timed ones as the trainer runs them, on the same batch. Time is the median over all timed steps of a placement;
memory is what the trainer counts: adapters, state of the optimiser, and the most that is alive within a step.

    python benchmarks/cost_model.py
"""

import argparse
import random
import statistics
import time
from typing import Any

import torch

from common import report, task_file
from layercard.adapters import adapted, no_deprecations, place
from layercard.cost import CostModel
from layercard.data import Batch, load_data
from layercard.memory import PeakMemory
from layercard.models import BaseModel, load_model
from layercard.selection import strategy_layers
from layercard.stamps import MAX_GRAD_NORM, training_step
from layercard.timing import measure_cost, usual_batch

STRATEGIES = ("first", "middle", "last", "uniform")
MIB = 2**20


def placements(depth: int, count: int, seed: int) -> dict[str, tuple[int, ...]]:
    """`count` random sets of 1 to 10 layers, then the fixed strategies with 5, then all."""
    rng = random.Random(seed)
    found = {f"random {at + 1}": tuple(sorted(rng.sample(range(depth), rng.randint(1, min(10, depth))))) for at in range(count)}
    found |= {f"{name} 5": tuple(strategy_layers(name, depth, min(5, depth))) for name in STRATEGIES}
    return found | {"all": tuple(range(depth))}


def steps(base: BaseModel, batch: Batch, layers: tuple[int, ...], rank: int, *, count_bytes: bool) -> tuple[list[float], int | None]:
    """Seconds of two training steps, and with `count_bytes` the bytes that a further one takes."""
    with no_deprecations(), adapted(base, place(base, layers), rank=rank, alpha=2.0 * rank) as model:
        model.train()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-6, weight_decay=0.0)

        def step() -> float:
            started = time.perf_counter()
            training_step(model, batch, optimizer, lambda _: None)
            return time.perf_counter() - started

        step()
        seconds = [step(), step()]
        if not count_bytes:
            return seconds, None
        held = sum(weight.nbytes for weight in weights)
        held += sum(value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))
        peak = PeakMemory(base.device)
        peak.start()
        step()
        peak.stop()
    return seconds, peak.bytes + held


def rows(cost: CostModel, plan: dict[str, tuple[int, ...]], seconds: dict[str, float], memory: dict[str, int]) -> list[list[Any]]:
    """One row a placement: times in seconds and as % of all, memory in MiB, errors in % of what was measured."""
    found: list[list[Any]] = []
    for name, layers in plan.items():
        time_predicted, memory_predicted = cost.step_time(layers), cost.peak_memory(layers)
        found.append(
            [
                name,
                " ".join(map(str, layers)) if len(layers) < len(cost.layers) else f"0–{len(layers) - 1}",
                seconds[name],
                time_predicted,
                100 * (time_predicted / seconds[name] - 1),
                100 * seconds[name] / seconds["all"],
                100 * time_predicted / cost.step_time(plan["all"]),
                memory[name] / MIB,
                memory_predicted / MIB,
                100 * (memory_predicted / memory[name] - 1),
            ]
        )
    return found


COLUMNS = ["placement", "layers", "s", "predicted s", "error %", "% of all", "predicted % of all", "MiB", "predicted MiB", "memory error %"]


def errors(table: list[list[Any]], column: int) -> dict[str, float]:
    """Median and worst of the absolute errors of the random placements."""
    found = [abs(row[column]) for row in table if row[0].startswith("random")]
    return {"median": statistics.median(found), "worst": max(found)}


def main() -> None:
    """Measure the cost model, then the placements, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--placements", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="repeats of the cost model's own steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    base = load_model(options.model)
    dataset = load_data(task_file("e2e", "train"), base.tokenizer, records=64, max_length=256)
    batch = usual_batch(dataset.examples, options.batch_size, base.pad_id).to(base.device)
    started = time.perf_counter()
    cost = measure_cost(base, batch, rank=options.rank, repeats=options.repeats)
    spent = time.perf_counter() - started
    plan = placements(len(base.blocks), options.placements, options.seed)
    seconds: dict[str, list[float]] = {name: [] for name in plan}
    memory: dict[str, int] = {}
    for at in range(options.rounds):
        for name in random.Random(at).sample(list(plan), len(plan)):
            found, counted = steps(base, batch, plan[name], options.rank, count_bytes=at == 0)
            seconds[name] += found
            memory |= {} if counted is None else {name: counted}
            print(f"round {at + 1} {name}: {found[0]:.2f} {found[1]:.2f} s", flush=True)
    table = rows(cost, plan, {name: statistics.median(found) for name, found in seconds.items()}, memory)
    of_time, of_memory = errors(table, 4), errors(table, 9)
    report(
        "cost_model",
        f"Predicted and measured cost of a training step: {options.batch_size} E2E records padded to {cost.tokens} tokens, rank "
        f"{options.rank}. Errors of the random placements, median and worst: time {of_time['median']:.1f} and {of_time['worst']:.1f} %, "
        f"memory {of_memory['median']:.1f} and {of_memory['worst']:.1f} %",
        COLUMNS,
        table,
        time_error=of_time,
        memory_error=of_memory,
        seconds=seconds,
        layers={name: list(layers) for name, layers in plan.items()},
        cost=cost.to_json(),
        cost_seconds=spent,
        max_grad_norm=MAX_GRAD_NORM,
    )


if __name__ == "__main__":
    main()
