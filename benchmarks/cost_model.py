"""Predicted against measured step time and peak memory of placements: random ones and the fixed strategies.

In each round the cost model is measured (`layercard.cost.measure.measure_cost`), then the placements take turns in random order: stock PEFT
adapters, train mode, one warm-up step and two timed ones as the trainer runs them, on the same batch. Measured time is the median over
all timed steps of a placement, predicted time the median over the rounds' cost models. Memory is what the trainer counts: adapters,
state of the optimiser, and the most that is alive within a step.

    python benchmarks/cost_model.py
"""

import argparse
import random
import statistics
import time
from typing import Any

import torch

from common import report, task_file
from layercard.adapters.apply import adapted, place
from layercard.cost.measure import measure_cost, usual_batch
from layercard.cost.model import CostModel
from layercard.data.load import Batch, load_data
from layercard.measure import PeakMemory
from layercard.models.adapted import quiet_peft
from layercard.models.load import BaseModel, load_model
from layercard.models.losses import training_step
from layercard.selection.strategies import strategy_layers

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
    with quiet_peft(), adapted(base, place(base, layers), rank=rank, alpha=2.0 * rank) as model:
        model.train()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-6, weight_decay=0.0)

        def step() -> float:
            started = time.perf_counter()
            training_step(model, batch, optimizer)
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


def rows(costs: list[CostModel], plan: dict[str, tuple[int, ...]], seconds: dict[str, float], memory: dict[str, int]) -> list[list[Any]]:
    """One row a placement: times in seconds and as % of all, memory in MiB, errors in % of what was measured."""
    found: list[list[Any]] = []
    predicted = {name: statistics.median(cost.step_time(layers) for cost in costs) for name, layers in plan.items()}
    for name, layers in plan.items():
        memory_predicted = costs[0].peak_memory(layers)
        found.append(
            [
                name,
                " ".join(map(str, layers)) if name != "all" else f"0–{layers[-1]}",
                seconds[name],
                predicted[name],
                100 * (predicted[name] / seconds[name] - 1),
                100 * seconds[name] / seconds["all"],
                100 * predicted[name] / predicted["all"],
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
    """Measure, round after round, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--placements", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1, help="repeats within each cost model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = load_model(options.model)
    dataset = load_data(task_file("e2e", "train"), base.tokenizer, records=64, max_length=256)
    batch = usual_batch(dataset.examples, options.batch_size, base.pad_id).to(base.device)
    plan = placements(len(base.blocks), options.placements, options.seed)
    seconds: dict[str, list[float]] = {name: [] for name in plan}
    memory: dict[str, int] = {}
    costs: list[CostModel] = []
    for at in range(options.rounds):
        started = time.perf_counter()
        costs.append(measure_cost(base, batch, rank=options.rank, repeats=options.repeats))
        print(f"round {at + 1}: cost model in {time.perf_counter() - started:.1f} s, {costs[-1].step_time(plan['all']):.2f} s", flush=True)
        for name in random.Random(at).sample(list(plan), len(plan)):
            found, counted = steps(base, batch, plan[name], options.rank, count_bytes=at == 0)
            seconds[name] += found
            memory |= {} if counted is None else {name: counted}
            print(f"round {at + 1} {name}: {found[0]:.2f} {found[1]:.2f} s", flush=True)
    table = rows(costs, plan, {name: statistics.median(found) for name, found in seconds.items()}, memory)
    of_time, of_memory = errors(table, 4), errors(table, 9)
    report(
        "cost_model",
        f"Predicted and measured cost of a training step: {options.batch_size} E2E records padded to {costs[0].tokens} tokens, rank "
        f"{options.rank}, threads: {options.threads}. Errors of the random placements, median and worst: "
        f"time {of_time['median']:.1f} and {of_time['worst']:.1f} %, memory {of_memory['median']:.1f} and {of_memory['worst']:.1f} %",
        COLUMNS,
        table,
        time_error=of_time,
        memory_error=of_memory,
        seconds=seconds,
        layers={name: list(layers) for name, layers in plan.items()},
        costs=[cost.to_json() for cost in costs],
    )


if __name__ == "__main__":
    main()
