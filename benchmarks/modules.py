"""Which modules of a layer are worth an adapter: sets of modules in all layers, at equal rank and at equal numbers of weights.

Every run is a trial (`layercard.trials.trial`) with all fast parts on. At equal rank the sets differ in time, so the held-out loss is also
read off each run's curve at the time in which the cheapest set was through (seconds of steps, straight lines between measurements). At
equal weights the rank of a set is raised until its adapters have as many weights as rank 8 in all modules. The learning rate is the same
for all sets. Runs lie in `results/modules/` and are never made twice.

    python benchmarks/modules.py                         E2E, one seed
    python benchmarks/modules.py --tasks e2e webnlg gsm8k --seeds 3
    python benchmarks/modules.py --tables                only the table, from the runs that are there
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from common import RESULTS, report, task_file
from layercard.data.load import load_data
from layercard.models.load import BaseModel, load_model
from layercard.models.module_sets import MODULE_SETS, module_set
from layercard.settings import TrainSettings
from layercard.trials.records import TrialRecord
from layercard.trials.trial import Task, Trial, run_trials

FOLDER = RESULTS / "modules"
RANK, BATCH, TOKENS = 8, 8, 256
TRAIN, VALID = 1536, 128
RATE = 0.00355
"""The peak learning rate of all runs: about what the rule says for all layers and 48 steps."""
COLUMNS = [
    "task",
    "compared at",
    "modules",
    "rank",
    "weights",
    "runs",
    "s a step",
    "loss after",
    "± records",
    "s",
    "loss at equal time",
    "MiB",
]


def weights_of(base: BaseModel, modules: str, rank: int) -> int:
    """Weights of adapters of a rank on a set of modules in all layers."""
    chosen = [module for block in base.blocks for module in module_set(block.linear_modules, modules)]
    return rank * sum(module.in_features + module.out_features for module in chosen)


def equal_rank(base: BaseModel, modules: str) -> int:
    """The rank at which a set has about as many weights as `RANK` in all modules."""
    return max(1, round(weights_of(base, "all", RANK) / weights_of(base, modules, 1)))


def trials(base: BaseModel, task: str, seeds: int, steps: int) -> dict[tuple[str, str], list[Trial]]:
    """The trials of a task, by what is equal (`rank` or `weights`) and the set of modules."""
    every = tuple(range(len(base.blocks)))
    planned: dict[tuple[str, str], list[Trial]] = {}
    for equal in ("rank", "weights"):
        for modules in MODULE_SETS:
            rank = RANK if equal == "rank" else equal_rank(base, modules)
            how = {"steps": steps, "batch_size": BATCH, "learning_rate": RATE, "rank": rank, "alpha": 2.0 * rank}
            settings = [TrainSettings(**how, seed=seed, save_steps=16) for seed in range(seeds)]
            planned[equal, modules] = [Trial(task, every, setting, modules=modules, split="valid") for setting in settings]
    return planned


def loss_at(record: TrialRecord, seconds: float) -> float:
    """The held-out loss of a run after so many seconds of steps."""
    moments = sorted(record.curve, key=lambda moment: moment.seconds)
    return float(np.interp(seconds, [moment.seconds for moment in moments], [moment.loss for moment in moments]))


def rows(task: str, equal: str, done: dict[str, list[TrialRecord]]) -> list[list[Any]]:
    """One row a set of modules: means over the seeds; `±` is half the 95 % interval of the reduction over held-out records."""
    fastest = min(np.mean([record.train_seconds for record in records]) for records in done.values())
    table: list[list[Any]] = []
    for modules, records in done.items():
        first = records[0]
        reductions = [record.loss_reduction for record in records if record.loss_reduction is not None]
        half = float(np.mean([((each.high or 0.0) - (each.low or 0.0)) / 2 for each in reductions]))
        seconds = float(np.mean([record.train_seconds or 0.0 for record in records]))
        table.append(
            [
                task,
                f"equal {equal}",
                modules,
                first.settings["rank"],
                first.trainable_parameters,
                len(records),
                seconds / first.settings["steps"],
                float(np.mean([record.loss for record in records])),
                half,
                seconds,
                float(np.mean([loss_at(record, fastest) for record in records])),
                (first.peak_memory_bytes or 0) / 2**20,
            ]
        )
    return table


def run(tasks: Sequence[str], seeds: int, steps: int, make: bool) -> list[list[Any]]:
    """Make what is missing, one set of modules after the other, and the rows of all that is complete."""
    base = load_model("smollm2-135m", dtype="bfloat16")
    table: list[list[Any]] = []
    for task in tasks:
        data = load_data(task_file(task, "train"), base.tokenizer, records=TRAIN, max_length=TOKENS)
        valid = load_data(task_file(task, "valid"), base.tokenizer, records=VALID, max_length=TOKENS)
        opened = Task(task, base, data, {"valid": valid})
        done: dict[str, dict[str, list[TrialRecord]]] = {}
        for (equal, modules), planned in trials(base, task, seeds, steps).items():
            there = all((FOLDER / trial.file).exists() for trial in planned)
            if make or there:
                done.setdefault(equal, {})[modules] = run_trials(planned, opened, FOLDER)
                print(task, equal, modules, [record.loss_after for record in done[equal][modules]], flush=True)
        table += [row for equal, records in done.items() for row in rows(task, equal, records)]
    return table


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["e2e"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--tables", action="store_true", help="train nothing")
    options = parser.parse_args()
    table = run(options.tasks, options.seeds, options.steps, make=not options.tables)
    title = (
        f"Sets of modules in all layers of SmolLM2-135M (bfloat16), {options.steps} steps of {BATCH} records, fast parts on, learning "
        f"rate {RATE:g}, {options.seeds} seed(s), {VALID} held-out records; seconds of steps on a shared machine"
    )
    report("modules", title, COLUMNS, table)


if __name__ == "__main__":
    main()
