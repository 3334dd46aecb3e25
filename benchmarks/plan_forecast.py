"""How far `layercard plan` is right: its forecasts of time and memory against real trainings (`layercard train`'s own record).

The forecast is made first, from its few timed steps, in a process of its own; then each training runs in another. Cores are shared with
other work here, so both are measured in seconds of CPU time of one thread instead of by the clock: the waiting for the core is not in it.
Trainings: stock in all layers, all layers, MLP only and five chosen layers for one epoch, and five chosen layers for three. The rows of
*rates* are what the cost model says without timed steps, from the rates that this machine reaches. What was measured is kept in
`results/plan_forecast/`, so that the benchmark goes on where it was stopped.

    python benchmarks/plan_forecast.py                                  SmolLM2-135M on E2E
    python benchmarks/plan_forecast.py --model qwen.gguf --name qwen2.5-coder-0.5b --records 24
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, report, task_file
from layercard.adapters.apply import place
from layercard.cost.devices import REACHED, Rates
from layercard.cost.estimate import device_rates
from layercard.data.load import Dataset, load_data
from layercard.files import write_json
from layercard.models.load import BaseModel, load_model
from layercard.selection.strategies import strategy_layers
from layercard.settings import FastSettings, TrainSettings
from layercard.training.train import train
from layercard.workflow.plan import plan_elsewhere, plan_here

FOLDER = RESULTS / "plan_forecast"
TOKENS, VALID, BATCH, CHOSEN = 256, 32, 4, 5
MIB = 2**20
TRAININGS: dict[str, tuple[str, str, bool, float]] = {
    "all layers, stock, 1 epoch": ("all", "all", False, 1),
    "all layers, 1 epoch": ("all", "all", True, 1),
    "all layers, MLP, 1 epoch": ("all", "mlp", True, 1),
    "uniform 5, 1 epoch": ("uniform", "all", True, 1),
    "middle 5, 3 epochs": ("middle", "all", True, 3),
}
"""Strategy, set of modules, whether the fast parts are on, epochs."""
COLUMNS = ["model", "training", "steps", "s", "forecast s", "error %", "from rates, error %", "MiB", "forecast MiB", "memory error %"]


def count_cpu_time() -> None:
    """Let everything in this process that reads the clock read the CPU time of the process, which has one thread."""
    torch.set_num_threads(1)
    time.perf_counter = time.process_time


def opened(options: argparse.Namespace) -> tuple[BaseModel, Dataset, Dataset]:
    """Model, records and held-out records."""
    base = load_model(options.model, dtype=options.dtype)
    data = load_data(task_file("e2e", "train"), base.tokenizer, records=options.records, max_length=TOKENS)
    return base, data, load_data(task_file("e2e", "valid"), base.tokenizer, records=VALID, max_length=TOKENS)


def layers_of(base: BaseModel, strategy: str) -> tuple[int, ...]:
    """The layers of a strategy, all or five of them."""
    return tuple(strategy_layers(strategy, len(base.blocks), min(CHOSEN, len(base.blocks))))


def settings_of(epochs: float) -> TrainSettings:
    """The settings of all trainings."""
    return TrainSettings(epochs=epochs, batch_size=BATCH, save_steps=0, learning_rate=1e-3)


def forecast(options: argparse.Namespace, epochs: float) -> dict[str, Any]:
    """What the plan for so many epochs says of each training that has them."""
    base, data, valid = opened(options)
    settings, started = settings_of(epochs), time.perf_counter()
    chosen = {name: layers_of(base, strategy) for name, (strategy, *_) in TRAININGS.items()}
    plan = plan_here(base, data, settings, valid=valid)
    seconds = time.perf_counter() - started
    flops, bandwidth = device_rates(base.device, base.model.dtype, rows=BATCH * 64)
    # The rates that this machine reaches, in place of half of the published ones.
    machine = Rates("here", flops / REACHED / 1e12, bandwidth / REACHED / 1e9, 1.0, "measured")
    rated = plan_elsewhere(base.model, data, machine, settings, dtype=options.dtype, valid=valid)
    found: dict[str, Any] = {"plan_seconds": seconds, "flops": flops, "bandwidth": bandwidth}
    for name, (_, modules, fast, _) in TRAININGS.items():
        wanted = (chosen[name], modules, fast, False)
        row, estimated = (
            next(row for row in each.rows if (row.layers, row.modules, row.fast, row.stream) == wanted) for each in (plan, rated)
        )
        found[name] = {"seconds": row.train_seconds, "bytes": row.memory_bytes, "evaluation": row.evaluation_seconds}
        found[name] |= {"rates_seconds": estimated.train_seconds, "rates_bytes": estimated.memory_bytes}
    return found


def training(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """One training, as `layercard train` runs it."""
    base, data, valid = opened(options)
    strategy, modules, fast, epochs = TRAININGS[name]
    placement = place(base, layers_of(base, strategy), modules=modules)
    with tempfile.TemporaryDirectory() as folder:
        how = FastSettings() if fast else FastSettings.baseline()
        run = train(base, placement, data, Path(folder) / "adapter", settings_of(epochs), valid=valid, fast=how)
    evaluation = sum(phase["seconds"] for phase in run.phases if phase["name"] in ("loss before", "loss after"))
    return {
        "seconds": run.train_seconds,
        "bytes": run.peak_memory_bytes,
        "steps": run.steps,
        "evaluation": evaluation,
        "fast": run.fast["did"],
    }


def child(options: argparse.Namespace, what: str) -> dict[str, Any]:
    """What is measured in a process of its own, where it was not yet."""
    path = FOLDER / f"{options.name}-{options.records}-{what.replace(', ', '-').replace(' ', '-')}.json"
    if not path.exists():
        print(f"{path.stem} …", file=sys.stderr, flush=True)
        flags = ["--model", options.model, "--name", options.name, "--records", str(options.records), "--dtype", options.dtype]
        subprocess.run([sys.executable, __file__, *flags, "--child", what, "--to", str(path)], check=True)
    return dict(json.loads(path.read_text()))


def rows(options: argparse.Namespace) -> list[list[Any]]:
    """Forecast against measured, one row a training."""
    table = []
    for name, (*_, epochs) in TRAININGS.items():
        run, said = child(options, name), child(options, f"plan {epochs}")[name]
        error, rated, memory = (
            100 * (said[key] / run[of] - 1) for key, of in (("seconds", "seconds"), ("rates_seconds", "seconds"), ("bytes", "bytes"))
        )
        table.append([options.name, name, run["steps"], run["seconds"], said["seconds"], error, rated, run["bytes"] / MIB])
        table[-1] += [said["bytes"] / MIB, memory]
    return table


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--name", default="smollm2-135m", help="how files and table call the model")
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--to", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        count_cpu_time()
        result = training(options, options.child) if options.child in TRAININGS else forecast(options, float(options.child.split()[1]))
        write_json(options.to, result, force=True)
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    kept = RESULTS / "plan_forecast.json"
    others = [row for row in json.loads(kept.read_text())["rows"] if row[0] != options.name] if kept.exists() else []
    table = [*others, *rows(options)]
    worst = {name: max(abs(row[at]) for row in table) for name, at in (("time", 5), ("memory", 9))}
    title = (
        f"Forecasts of layercard plan against real trainings of {options.dtype} models on E2E, batches of {BATCH}, in seconds of CPU time "
        f"of one thread (cores were shared); worst error: time {worst['time']:.0f} %, memory {worst['memory']:.0f} %"
    )
    report("plan_forecast", title, COLUMNS, table, worst=worst)


if __name__ == "__main__":
    main()
