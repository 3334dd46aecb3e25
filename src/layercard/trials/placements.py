"""`layercard bench placements`: cards and scores, learning rates, runs and step times of every cell, each kept as it is made.

Everything lies in one folder, or in storage that all workers reach, and is never made twice, so the benchmark may be killed at any point
and started again. Of several models each has a part of it (`Sheet`); their jobs share the workers.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from layercard.checkpoint import discard
from layercard.data.load import load_data
from layercard.errors import BenchmarkError
from layercard.models.load import Progress
from layercard.profiling.profile import profile_records as profile
from layercard.settings import ProfileSettings
from layercard.trials.choices import Choice, Chooser, card_name, check_strategies, scores_name
from layercard.trials.peers import PEERS, peer_scores
from layercard.trials.rates import find_rate, known_rate, rate_name
from layercard.trials.runs import BenchSettings, Item, base_model, run_items, run_name
from layercard.trials.storage import Storage
from layercard.trials.tasks import check_tasks, split_source
from layercard.trials.times import measure_times
from layercard.trials.workers import Job, Workers

SETTINGS = "settings.json"


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


@dataclass(frozen=True)
class Sheet:
    """One model's part of a benchmark.

    Attributes:
        settings: What its runs share.
        storage: Where its results lie.
        title: Stands before what its jobs tell of their progress, where there are several models.
    """

    settings: BenchSettings
    storage: Storage
    title: str = ""

    def job(self, function: Callable[..., Any], *arguments: Any) -> Job:
        """A job that takes settings and storage first."""
        call = (self.settings, self.storage, *arguments)
        return (_titled, (self.title, function, call)) if self.title else (function, call)

    def missing(self, name: str) -> bool:
        """Whether a result is not there yet."""
        return not self.storage.exists(name)


def _titled(title: str, function: Callable[..., Any], arguments: tuple[Any, ...], progress: Progress | None = None) -> Any:
    """A job with its model's title before what it tells; in other local processes it tells nothing."""
    if progress is None:
        return function(*arguments)
    return function(*arguments, lambda phase, done, total: progress(f"{title}: {phase}", done, total))


def sheets(every: Sequence[BenchSettings], place: str | Path) -> list[Sheet]:
    """The parts of a benchmark: in `place` itself for one model, in a folder of its own for each of several.

    >>> sheets([BenchSettings("org/a"), BenchSettings("b")], "s3://bucket/bench")[0].storage.place
    's3://bucket/bench/org-a'

    Args:
        every: The settings of each model.
        place: A folder, or an address of fsspec.

    Raises:
        BenchmarkError: Two models would have the same folder.
    """
    storage = Storage.at(place)
    if len(every) == 1:
        return [Sheet(every[0], storage)]
    names = [re.sub(r"[^\w.-]+", "-", settings.model).strip("-.") for settings in every]
    for name in names:
        if names.count(name) > 1:
            raise BenchmarkError(f"two models would have the folder {name}; name each model once")
    return [Sheet(settings, storage.below(name), name) for settings, name in zip(every, names, strict=True)]


def bench_placements(
    parts: Sequence[Sheet],
    grid: Grid,
    workers: Workers | None = None,
    progress: Progress | None = None,
    *,
    times: bool = True,
) -> list[list[Choice]]:
    """Make what is missing of a grid for every model; gives the cells of each, whose records lie in its storage (`summary.summarise`).

    Args:
        parts: The models (`sheets`); an unfinished benchmark of the same settings in their storage is gone on with.
        grid: The cells.
        workers: Where to run.
        progress: Told of finished parts.
        times: Whether to measure the step time of stock training of each placement too (needs an otherwise idle machine).

    Raises:
        BenchmarkError: Unknown task or strategy, or the storage belongs to another benchmark.
        OutputError: Another run is at work in the folder, or the storage cannot be reached.
    """
    workers, tell = workers or Workers(), progress or (lambda phase, done, total: None)
    check_strategies(grid.strategies)
    with ExitStack() as stack:
        for part in parts:
            check_tasks(grid.tasks, part.settings.data)
            stack.enter_context(part.storage.alone())
            keep_settings(part.settings, part.storage)
        return _fill(parts, grid, workers, tell, times)


def _fill(parts: Sequence[Sheet], grid: Grid, workers: Workers, tell: Progress, times: bool) -> list[list[Choice]]:
    """Cards, learning rates, runs and step times in turn."""
    peers = tuple(name for name in PEERS if name in grid.strategies)
    cards = [part.job(prepare, task, peers) for part in parts for task in grid.tasks if not _prepared(part, task, peers)]
    _finish(workers, cards, "cards", tell)
    found = [choices(part.storage, grid, part.settings.rank) for part in parts]
    bench_items(list(zip(parts, found, strict=True)), workers, tell)
    for part, cells in zip(parts, found, strict=True):
        for task in grid.tasks if times else ():
            placements = sorted({(cell.layers, cell.rank) for cell in cells if cell.task == task})
            function, arguments = part.job(measure_times, task, placements)
            function(*arguments, tell)
    return found


def bench_items(every: Sequence[tuple[Sheet, Sequence[Choice]]], workers: Workers, tell: Progress | None = None) -> None:
    """Search the learning rates that cells need, then make their runs, where they are missing."""
    tell = tell or (lambda phase, done, total: None)
    searches = []
    for part, cells in every:
        wanted = sorted({(cell.task, cell.rate_count, cell.rank) for cell in cells})
        searches += [part.job(find_rate, *search) for search in wanted if part.missing(rate_name(*search))]
    _finish(workers, searches, "learning rates", tell)
    jobs = []
    for part, cells in every:
        jobs += _jobs(part, [item_of(part.storage, cell) for cell in cells], workers.count)
    _finish(workers, jobs, "runs", tell)


def keep_settings(settings: BenchSettings, storage: Storage) -> None:
    """Write the settings into a new storage; raise `BenchmarkError` where it has others."""
    value = asdict(settings)
    if not storage.exists(SETTINGS):
        storage.write(SETTINGS, value)
        return
    usual = {field.name: field.default for field in fields(settings) if field.default is not MISSING}
    there = usual | storage.read(SETTINGS, "benchmark settings")
    differ = sorted(name for name in value if there.get(name) != value[name])
    if differ:
        name = differ[0]
        raise BenchmarkError(
            f"{storage.place} holds a benchmark with {name} = {there.get(name)!r}, now it is {value[name]!r}; "
            "use the same or name another folder"
        )


def prepare(settings: BenchSettings, storage: Storage, task: str, peers: Sequence[str] = PEERS, progress: Progress | None = None) -> None:
    """Make the card and the peers' scores of a task, from the same records, where they are missing."""
    base = base_model(settings)
    records = load_data(
        split_source(task, "train", settings.data), base.tokenizer, records=settings.card_records, max_length=settings.max_length
    )
    card, scores = card_name(task), scores_name(task)
    if not storage.exists(card):
        state = storage.working(f"{card}.state")
        made = profile(base, records, ProfileSettings(rank=settings.rank, cost=True, probe=settings.probe), progress, state=state)
        storage.write(card, made.to_json())
        discard(state)
    there = _scores(storage, task)
    if there is None or not set(peers) <= set(there):
        missing = [name for name in peers if name not in (there or ())]
        storage.write(
            scores, {"task": task, "records": len(records), "scores": (there or {}) | peer_scores(base, records.examples, missing)}
        )


def _scores(storage: Storage, task: str) -> dict[str, Any] | None:
    """The peers' scores that are there."""
    return storage.read(scores_name(task), "scores")["scores"] if storage.exists(scores_name(task)) else None


def _prepared(part: Sheet, task: str, peers: Sequence[str]) -> bool:
    there = _scores(part.storage, task)
    return not part.missing(card_name(task)) and there is not None and set(peers) <= set(there)


def choices(storage: Storage, grid: Grid, rank: int) -> list[Choice]:
    """The cells of a grid: what each strategy chooses, from the cards and scores in the storage.

    A budget that no placement of a task keeps (the forward pass alone may be dearer) gives no cell.
    """
    cells: list[Choice] = []
    for task in grid.tasks:
        chooser = Chooser(storage, task, rank)
        for seed in grid.seeds:
            cells.append(chooser.choose("all", chooser.depth, seed))
            for k in grid.ks:
                cells += [chooser.choose(name, k, seed) for name in grid.strategies if name != "all"]
            for budget in filter(chooser.fits, grid.budgets):
                cells += [chooser.choose(name, 0, seed, budget) for name in ("performance", "uniform_above")]
    return cells


def item_of(storage: Storage, cell: Choice) -> Item:
    """The run that measures a cell, at the learning rate that was found for its number of layers."""
    rate = known_rate(storage, cell.task, cell.rate_count, cell.rank)
    return Item(cell.task, cell.layers, cell.seed, cell.rank, rate)


def record_of(storage: Storage, cell: Choice) -> dict[str, Any]:
    """The record of a finished cell."""
    return storage.read(run_name(item_of(storage, cell)), "run")


def _jobs(part: Sheet, items: Iterable[Item], workers: int) -> list[Job]:
    """Missing runs, those of one task and seed together, since they share the frozen part; at least one part for each worker."""
    groups: dict[tuple[str, int], list[Item]] = {}
    for item in dict.fromkeys(items):
        if part.missing(run_name(item)):
            groups.setdefault((item.task, item.seed), []).append(item)
    jobs: list[Job] = []
    parts = workers if len(groups) < 2 * workers else 1
    for group in groups.values():
        group.sort(key=lambda item: min(item.layers))
        jobs += [part.job(run_items, tuple(group[at::parts])) for at in range(min(parts, len(group)))]
    return jobs


def _finish(workers: Workers, jobs: Sequence[Job], phase: str, tell: Progress) -> None:
    for at, _ in enumerate(workers.run(jobs, tell)):
        tell(phase, at + 1, len(jobs))
