"""`layercard bench placements`: cards and scores, learning rates, runs and step times of every cell, each kept as it is made.

Everything lies in one folder and is never made twice, so the benchmark may be killed at any point and started again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layercard.benchmark.choices import Choice, Chooser, card_file, check_strategies, scores_file
from layercard.benchmark.peers import peer_scores
from layercard.benchmark.rates import find_rate, known_rate, rate_file
from layercard.benchmark.runs import BenchSettings, Item, base_model, run_file, run_items
from layercard.benchmark.tasks import check_tasks, split_source
from layercard.benchmark.times import measure_times
from layercard.benchmark.workers import Job, Workers
from layercard.data import load_data
from layercard.errors import BenchmarkError
from layercard.files import alone, read_json, write_json
from layercard.models import Progress
from layercard.profiling import ProfileSettings, profile
from layercard.state import discard


@dataclass(frozen=True)
class Grid:
    """Which cells to fill: every task, strategy, number of layers (or time budget) and seed.

    Attributes:
        tasks: Names of tasks.
        strategies: Names of strategies; `all`, the reference, is always run.
        ks: Numbers of layers.
        seeds: Seeds.
        budgets: Step times in % of all layers, for `performance` and `uniform_above`; the number of layers is then free.
    """

    tasks: tuple[str, ...]
    strategies: tuple[str, ...]
    ks: tuple[int, ...] = (5,)
    seeds: tuple[int, ...] = (0, 1, 2)
    budgets: tuple[float, ...] = ()


def bench_placements(
    settings: BenchSettings,
    folder: str | Path,
    grid: Grid,
    workers: Workers | None = None,
    progress: Progress | None = None,
    *,
    times: bool = True,
) -> list[Choice]:
    """Make what is missing of a grid; gives its cells, whose records lie in `folder` afterwards (`summary.summarise`).

    Args:
        settings: What all runs share.
        folder: Results; an unfinished benchmark of the same settings there is gone on with.
        grid: The cells.
        workers: Where to run.
        progress: Told of finished parts.
        times: Whether to measure the step time of stock training of each placement too (needs an otherwise idle machine).

    Raises:
        BenchmarkError: Unknown task or strategy, or the folder belongs to another benchmark.
        OutputError: Another run is at work in the folder.
    """
    folder, workers = Path(folder), workers or Workers()
    check_tasks(grid.tasks, settings.data)
    check_strategies(grid.strategies)
    with alone(folder):
        keep_settings(settings, folder)
        return _fill(settings, folder, grid, workers, progress or (lambda phase, done, total: None), times)


def _fill(settings: BenchSettings, folder: Path, grid: Grid, workers: Workers, tell: Progress, times: bool) -> list[Choice]:
    """Cards, learning rates, runs and step times in turn."""
    where = str(folder)
    _finish(workers, [(prepare, (settings, where, task)) for task in grid.tasks if not _prepared(folder, task)], "cards", tell)
    cells = choices(folder, grid, settings.rank)
    bench_items(settings, folder, cells, workers, tell)
    if times:
        for task in grid.tasks:
            measure_times(settings, where, task, sorted({(cell.layers, cell.rank) for cell in cells if cell.task == task}), tell)
    return cells


def bench_items(settings: BenchSettings, folder: Path, cells: Sequence[Choice], workers: Workers, tell: Progress | None = None) -> None:
    """Search the learning rates that cells need, then make their runs, where they are missing."""
    tell = tell or (lambda phase, done, total: None)
    searches = sorted({(cell.task, cell.rate_count, cell.rank) for cell in cells})
    missing = [search for search in searches if not rate_file(folder, *search).exists()]
    _finish(workers, [(find_rate, (settings, str(folder), *search)) for search in missing], "learning rates", tell)
    _finish(workers, _jobs(settings, str(folder), [item_of(folder, cell) for cell in cells], workers.count), "runs", tell)


def keep_settings(settings: BenchSettings, folder: Path) -> None:
    """Write the settings into a new folder; raise `BenchmarkError` where the folder has others."""
    path, value = folder / "settings.json", asdict(settings)
    if not path.exists():
        write_json(path, value)
        return
    there = read_json(path, BenchmarkError, "benchmark settings")
    differ = sorted(name for name in value if there.get(name) != value[name])
    if differ:
        name = differ[0]
        raise BenchmarkError(
            f"{folder} holds a benchmark with {name} = {there.get(name)!r}, now it is {value[name]!r}; use the same or name another folder"
        )


def prepare(settings: BenchSettings, folder: str, task: str, progress: Progress | None = None) -> None:
    """Make the card and the peers' scores of a task, from the same records."""
    base = base_model(settings)
    records = load_data(
        split_source(task, "train", settings.data), base.tokenizer, records=settings.card_records, max_length=settings.max_length
    )
    card, scores = card_file(Path(folder), task), scores_file(Path(folder), task)
    if not card.exists():
        state = card.with_name(f"{card.name}.state")
        profile(base, records, ProfileSettings(rank=settings.rank, cost=True), progress, state=state).save(card, force=True)
        discard(state)
    if not scores.exists():
        write_json(scores, {"task": task, "records": len(records), "scores": peer_scores(base, records.examples)}, force=True)


def _prepared(folder: Path, task: str) -> bool:
    return card_file(folder, task).exists() and scores_file(folder, task).exists()


def choices(folder: Path, grid: Grid, rank: int) -> list[Choice]:
    """The cells of a grid: what each strategy chooses, from the cards and scores in the folder.

    A budget that no placement of a task keeps (the forward pass alone may be dearer) gives no cell.
    """
    cells: list[Choice] = []
    for task in grid.tasks:
        chooser = Chooser(folder, task, rank)
        for seed in grid.seeds:
            cells.append(chooser.choose("all", chooser.depth, seed))
            for k in grid.ks:
                cells += [chooser.choose(name, k, seed) for name in grid.strategies if name != "all"]
            for budget in filter(chooser.fits, grid.budgets):
                cells += [chooser.choose(name, 0, seed, budget) for name in ("performance", "uniform_above")]
    return cells


def item_of(folder: Path, cell: Choice) -> Item:
    """The run that measures a cell, at the learning rate that was found for its number of layers."""
    rate = known_rate(rate_file(folder, cell.task, cell.rate_count, cell.rank))["learning_rate"]
    return Item(cell.task, cell.layers, cell.seed, cell.rank, float(rate))


def record_of(folder: Path, cell: Choice) -> dict[str, Any]:
    """The record of a finished cell."""
    return read_json(run_file(folder, item_of(folder, cell)), BenchmarkError, "run")


def _jobs(settings: BenchSettings, folder: str, items: Iterable[Item], workers: int) -> list[Job]:
    """Missing runs, those of one task and seed together, since they share the frozen part; at least one part for each worker."""
    groups: dict[tuple[str, int], list[Item]] = {}
    for item in dict.fromkeys(items):
        if not run_file(Path(folder), item).exists():
            groups.setdefault((item.task, item.seed), []).append(item)
    jobs: list[Job] = []
    parts = workers if len(groups) < 2 * workers else 1
    for group in groups.values():
        group.sort(key=lambda item: min(item.layers))
        jobs += [(run_items, (settings, folder, tuple(group[at::parts]))) for at in range(min(parts, len(group)))]
    return jobs


def _finish(workers: Workers, jobs: Sequence[Job], phase: str, tell: Progress) -> None:
    for at, _ in enumerate(workers.run(jobs, tell)):
        tell(phase, at + 1, len(jobs))
