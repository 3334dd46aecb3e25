"""The placement tables: every experiment of `experiments/`, run as `layercard bench placements` runs it.

Runs, cards, learning rates and step times lie in `results/placements/`, one JSON each, and are never made twice; the tables in
`results/*.json` are written from them. With `--tables` nothing is trained: cells whose runs are missing end the program.

    python benchmarks/placements.py --workers 2
    python benchmarks/placements.py --tables
"""

import argparse
import json
from pathlib import Path

from common import RESULTS, data_folder, report
from layercard.settings import BenchSettings
from layercard.trials.bench import Bench, Grid, bench_placements
from layercard.trials.storage import Storage
from layercard.trials.tables import Result, measured, reduction_table, trade_off_table
from layercard.trials.workers import Workers

EXPERIMENTS = Path(__file__).parent / "experiments"
STORAGE = Storage.at(RESULTS / "placements")
TITLES = {
    "placements": "Loss reduction with five layers",
    "equal_parameters": "As many parameters as all layers",
    "budgets": "Other numbers of layers, and step-time budgets in % of all layers",
}
TRADE_OFF = ("all", "last", "first", "middle", "uniform", "balanced", "performance")
"""Rows of the trade-off table."""


def grid_of(name: str) -> Grid:
    """The cells of an experiment."""
    config = json.loads((EXPERIMENTS / name / "config.json").read_text())
    return Grid(**{key: tuple(config[key]) for key in ("tasks", "strategies", "ks", "seeds", "budgets")})


def tell(phase: str, done: int, total: int) -> None:
    """One line for each finished part."""
    if not phase.startswith(("train", "loss")):
        print(f"{phase}: {done} of {total}", flush=True)


def write_tables(name: str, results: list[Result]) -> None:
    """The result files of an experiment: `NAME_table`, and for the placements the trade-off of each task and of all."""
    tasks = list(dict.fromkeys(one["task"] for one in results))
    seeds = len({one["seed"] for one in results})
    about = f"SmolLM2-135M, {', '.join(tasks)}, mean over {seeds} seeds ± half of the 95 % t interval"
    columns, rows = reduction_table(results)
    report(f"{name}_table", f"{TITLES[name]}: {about}", columns, rows, runs=len(results))
    if name != "placements":
        return
    wanted = [one for strategy in TRADE_OFF for one in results if one["strategy"] == strategy]
    for task in ("all", *tasks):
        chosen = [one for one in wanted if task in ("all", one["task"])]
        columns, rows = trade_off_table(chosen)
        where = "mean of the tasks" if task == "all" else task
        report(f"trade_off_{task}", f"Cost and performance, {where}: {about}", columns, rows, runs=len(chosen))


def main() -> None:
    """Run and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--experiments", nargs="+", default=list(TITLES))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tables", action="store_true", help="only write tables from the runs that are there")
    parser.add_argument("--no-times", action="store_true", help="leave out the step times, which need an otherwise idle machine")
    options = parser.parse_args()
    bench = Bench(BenchSettings(options.model, data_folder()), STORAGE)
    for name in options.experiments:
        grid = grid_of(name)
        if options.tables:
            cells = bench.cells(grid)
        else:
            (cells,) = bench_placements([bench], grid, Workers(options.workers), tell, times=False)
        if name == "placements" and not (options.tables or options.no_times):
            for task in grid.tasks:
                shown = {(cell.layers, cell.rank) for cell in cells if cell.task == task and cell.strategy in TRADE_OFF}
                bench.measure_times(task, sorted(shown), tell)
        write_tables(name, measured(bench, cells))


if __name__ == "__main__":
    main()
