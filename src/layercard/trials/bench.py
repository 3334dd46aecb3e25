"""`layercard bench placements`: strategies side by side. Cards and scores, learning rates, trials and step times of every cell.

Everything lies in one storage and is never made twice, so the benchmark may be killed at any point and started again. Each of several
models has a part of it (`Bench`); their jobs share the workers.

| file | what |
| --- | --- |
| `settings.json` | what all trials share, and the day on which the benchmark began |
| `cards/TASK.json`, `scores/TASK.json` | card, and the peers' scores, from the same records |
| `rates/TASK-rR-kN-nSTEPS.json` | the learning rate for N layers, and the records in a step |
| `runs/KEY.json` | a trial |
| `times/TASK-rR-lLAYERS.json` | a step time of stock training |
"""

import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from layercard.card.card import LayerCard, cost_of
from layercard.checkpoint import discard
from layercard.cost.measure import adapted_layers, usual_batch
from layercard.data.load import Batch, load_data
from layercard.errors import BenchmarkError, suggestion
from layercard.files import shown
from layercard.models.load import BaseModel, Progress
from layercard.models.losses import training_step
from layercard.profiling.profile import profile_records
from layercard.selection.budgets import Budgets
from layercard.selection.select import predict, select
from layercard.selection.strategies import ALIASES, strategy_layers, top_layers
from layercard.settings import BenchSettings, ProfileSettings, TrainSettings
from layercard.trials.peers import PEERS, peer_scores
from layercard.trials.records import TrialRecord
from layercard.trials.storage import Storage
from layercard.trials.tasks import base_model, batch_size, check_tasks, load_task, split_source
from layercard.trials.trial import Trial, compact, read_trial, run_trials, trial_jobs
from layercard.trials.workers import Job, Workers

SETTINGS = "settings.json"
FIXED = ("random", "uniform", "last", "middle", "first", "all")
EQUAL_PARAMETERS = "performance_equal_parameters"
"""Our choice with the rank raised until it has as many parameters as all layers at the usual rank."""
UNIFORM_ABOVE = "uniform_above"
"""Evenly spread above the lowest layer that a time budget allows, with as many layers as our choice under that budget."""
STRATEGIES = (*FIXED, "performance", "balanced", *PEERS, "resnorm", EQUAL_PARAMETERS, UNIFORM_ABOVE)
MOST_RATES = 6
"""Learning rates tried at most."""
RATE_COUNTS = (1, 3, 5, 8, 13, 21)
"""Numbers of layers for which a learning rate is searched, besides all layers; others take that of the nearest."""
ROUNDS = 3
"""Timed steps of each placement; the first, which allocates the optimiser's state, comes on top."""


@dataclass(frozen=True)
class Grid:
    """Which cells to fill: every task, strategy, number of layers (or time budget) and seed; `all`, the reference, is always run.

    Budgets are step times in % of all layers, for `performance` and `uniform_above`; the number of layers is then free.
    """

    tasks: tuple[str, ...]
    strategies: tuple[str, ...]
    ks: tuple[int, ...] = (5,)
    seeds: tuple[int, ...] = (0, 1, 2)
    budgets: tuple[float, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One cell of a table before it is measured.

    `k` layers were asked for, or as many as a `budget` (step time in % of all layers) allows; `layers` were chosen. `predicted` is the
    performance kept as the task's card says, % of all layers.
    """

    task: str
    strategy: str
    k: int
    budget: float | None
    seed: int
    layers: tuple[int, ...]
    rank: int
    predicted: float | None = None

    @property
    def rate_count(self) -> int:
        """The number of layers whose learning rate is used: that of `RATE_COUNTS` which is nearest in ratio."""
        count = len(self.layers)
        return count if self.strategy == "all" else min(RATE_COUNTS, key=lambda other: max(other, count) / min(other, count))


def check_strategies(strategies: Sequence[str]) -> tuple[str, ...]:
    """Names as the benchmark uses them; `bottom` and `top` are understood.

    Raises:
        BenchmarkError: An unknown name.
    """
    for name in strategies:
        if name not in STRATEGIES and name not in ALIASES:
            raise BenchmarkError(f"strategy {name!r} is unknown; {suggestion(name, [*STRATEGIES, *ALIASES])}")
    return tuple(dict.fromkeys(ALIASES.get(name, name) for name in strategies))


@dataclass(frozen=True)
class Bench:
    """One model's part of a benchmark: its settings, where its results lie, and what stands before its progress among several models."""

    settings: BenchSettings
    storage: Storage
    title: str = ""

    def job(self, function: Callable[..., Any], *arguments: Any) -> Job:
        """A job of this model, with its title before what it tells."""
        return (_titled, (self.title, function, arguments)) if self.title else (function, arguments)

    def keep_settings(self) -> None:
        """Write the settings into a new storage; raise `BenchmarkError` where it has others."""
        now, today = asdict(self.settings), {"day": datetime.now(tz=UTC).date().isoformat()}
        if not self.storage.exists(SETTINGS):
            self.storage.write(SETTINGS, now | today)
            return
        kept = self.storage.read(SETTINGS, "benchmark settings")
        usual = {field.name: field.default for field in fields(self.settings) if field.default is not MISSING}
        there = usual | kept
        for name in sorted(now.keys() - {"steps"}):  # trials of several lengths may lie side by side
            if there.get(name) != now[name]:
                raise BenchmarkError(
                    f"{self.storage.place} holds a benchmark with {name} = {there.get(name)!r}, now it is {now[name]!r}; "
                    "use the same or name another folder"
                )
        if "day" not in kept:  # versions before this one did not keep it
            self.storage.write(SETTINGS, kept | today)

    @property
    def day(self) -> date | None:
        """The day that chat templates print in all trials of this storage; `None` where it has no settings yet."""
        day = self.storage.read(SETTINGS, "benchmark settings").get("day") if self.storage.exists(SETTINGS) else None
        try:
            return None if day is None else date.fromisoformat(day)
        except (TypeError, ValueError):
            raise BenchmarkError(f"{self.storage.named(SETTINGS)} says that its day is {shown(day)}; write it as in 2026-11-29") from None

    # ---- cards and scores

    def prepare(self, task: str, peers: Sequence[str] = PEERS, progress: Progress | None = None) -> None:
        """Make the card and the peers' scores of a task, from the same records, where they are missing."""
        if self.prepared(task, peers):
            return
        settings, card, scores = self.settings, f"cards/{task}.json", f"scores/{task}.json"
        there = self.scores(task)
        missing = [name for name in peers if name not in there]
        base, source = base_model(settings), split_source(task, "train", settings.data)
        records = load_data(source, base.tokenizer, records=settings.card_records, max_length=settings.max_length, day=self.day)
        if not self.storage.exists(card):
            state = self.storage.working(f"{card}.state")
            how = ProfileSettings(rank=settings.rank, cost=True, probe=settings.probe)
            self.storage.write(card, profile_records(base, records, how, progress, state=state).to_json())
            discard(state)
        if missing or not self.storage.exists(scores):
            value = there | peer_scores(base, records.examples, missing)
            self.storage.write(scores, {"task": task, "records": len(records), "scores": value})

    def prepared(self, task: str, peers: Sequence[str]) -> bool:
        """Whether `prepare` has nothing left to do."""
        files = all(self.storage.exists(f"{folder}/{task}.json") for folder in ("cards", "scores"))
        return files and set(peers) <= set(self.scores(task))

    def card(self, task: str) -> LayerCard:
        """The card of a task."""
        return LayerCard.from_json(self.storage.read(f"cards/{task}.json", "card"))

    def scores(self, task: str) -> dict[str, list[float]]:
        """The peers' scores of a task that are there."""
        name = f"scores/{task}.json"
        scores: dict[str, list[float]] = self.storage.read(name, "scores")["scores"] if self.storage.exists(name) else {}
        return scores

    def choices(self, task: str) -> dict[str, Any]:
        """What an earlier version chose from the task's card, where its choices were trained and are kept.

        Layers by `k`, by `max_time` in % of all layers, and `balanced`. They are not chosen anew: results stay those of the sets that ran.
        """
        name = f"choices/{task}.json"
        return self.storage.read(name, "choices") if self.storage.exists(name) else {}

    # ---- what each strategy chooses

    def cells(self, grid: Grid) -> list[Cell]:
        """The cells of a grid: what each strategy chooses, from the cards and scores in the storage.

        A budget that no placement of a task keeps (the forward pass alone may be dearer) gives no cell.
        """
        cells: list[Cell] = []
        for task in grid.tasks:
            chooser = Chooser(self, task)
            for seed in grid.seeds:
                cells.append(chooser.choose("all", chooser.num_layers, seed))
                for k in grid.ks:
                    cells += [chooser.choose(name, k, seed) for name in grid.strategies if name != "all"]
                for budget in filter(chooser.fits, grid.budgets):
                    cells += [chooser.choose(name, 0, seed, budget) for name in ("performance", UNIFORM_ABOVE)]
        return cells

    # ---- learning rates

    def rate_file(self, task: str, count: int, rank: int) -> str:
        """Where the result of a search for a learning rate lies."""
        return f"rates/{task}-r{rank}-k{count:02d}-n{self.settings.steps}.json"

    def find_rate(self, task: str, count: int, rank: int, progress: Progress | None = None) -> float:
        """The best learning rate for the `count` middle layers, seed 0: doubled from the start while that helps, else halved.

        One placement stands for all of as many layers, so none is favoured; the middle ones are neither the dearest nor the cheapest.
        Searches for other numbers of layers are not consulted, so the result does not depend on the order of searches.
        """
        name = self.rate_file(task, count, rank)
        if self.storage.exists(name):
            return float(self.storage.read(name, "learning rate")["learning_rate"])
        opened = load_task(self.settings, task, self.day)
        size, layers = batch_size(self.settings, opened.train), tuple(strategy_layers("middle", len(opened.base.blocks), count))
        tried: dict[float, float] = {}

        def loss(rate: float) -> float:
            if rate not in tried:
                trial = Trial(task, layers, self.training(0, rank, rate, size), split="valid")
                tried[rate] = run_trials([trial], opened, self.storage, progress=progress)[0].loss
            return tried[rate]

        best = climb(loss, self.settings.learning_rate)
        rows = [{"learning_rate": rate, "loss": None if math.isinf(value) else value} for rate, value in sorted(tried.items())]
        found = {"task": task, "layers": list(layers), "rank": rank, "learning_rate": best, "batch_size": size}
        self.storage.write(name, found | {"split": "valid", "tried": rows})
        return best

    # ---- trials

    def training(self, seed: int, rank: int, learning_rate: float, batch_size: int) -> TrainSettings:
        """How a trial trains; the scale alpha is twice the rank."""
        how: dict[str, Any] = {"seed": seed, "rank": rank, "alpha": 2.0 * rank, "learning_rate": learning_rate, "batch_size": batch_size}
        return TrainSettings(steps=self.settings.steps, save_steps=0, **how)

    def trial(self, cell: Cell) -> Trial:
        """The trial that measures a cell, at the learning rate that was found for its number of layers."""
        rate = self.storage.read(self.rate_file(cell.task, cell.rate_count, cell.rank), "learning rate")
        return Trial(cell.task, cell.layers, self.training(cell.seed, cell.rank, rate["learning_rate"], rate["batch_size"]))

    def record(self, cell: Cell) -> TrialRecord:
        """The record of a finished cell."""
        return read_trial(self.storage, self.trial(cell).file)

    # ---- step times

    def time_file(self, task: str, layers: Sequence[int], rank: int) -> str:
        """Where the step time of a placement lies."""
        return f"times/{task}-r{rank}-l{compact(layers)}.json"

    def measure_times(self, task: str, placements: Sequence[tuple[tuple[int, ...], int]], tell: Progress) -> None:
        """Step times of stock training: the whole model forward, PEFT's adapters, nothing kept, placements alternating.

        Placements (layers and rank) that were not timed yet run in turn and beside all layers; medians over rounds, and of the ratios in
        a round.
        """
        missing = [placement for placement in placements if not self.storage.exists(self.time_file(task, *placement))]
        if not missing:
            return
        opened = load_task(self.settings, task, self.day)
        base, size = opened.base, batch_size(self.settings, opened.train)
        batch = usual_batch(opened.train.examples[: 16 * size], size, base.pad_id).to(base.device)
        every = (tuple(range(len(base.blocks))), self.settings.rank)
        step_seconds(base, batch, *every)
        rounds: list[tuple[float, list[float]]] = []
        for done in range(ROUNDS):
            rounds.append((step_seconds(base, batch, *every), [step_seconds(base, batch, *placement) for placement in missing]))
            tell(f"step times {task}", done + 1, ROUNDS)
        for column, (layers, rank) in enumerate(missing):
            value = {
                "task": task,
                "layers": list(layers),
                "rank": rank,
                "tokens": int(batch.attention_mask.sum()),
                "step_seconds": statistics.median(steps[column] for _, steps in rounds),
                "all_layers_seconds": statistics.median(seconds for seconds, _ in rounds),
                "share_of_all": statistics.median(steps[column] / seconds for seconds, steps in rounds),
                "rounds": ROUNDS,
                "threads": torch.get_num_threads(),
            }
            self.storage.write(self.time_file(task, layers, rank), value)


class Chooser:
    """Applies strategies to the card and scores of one task."""

    def __init__(self, bench: Bench, task: str) -> None:
        self.task, self.rank, self.card = task, bench.settings.rank, bench.card(task)
        self.scores = bench.scores(task) | {"resnorm": self.card.values("resnorm")}
        self.num_layers, self.time = self.card.model.layers, cost_of(self.card).linear("time")
        self.choices = bench.choices(task)

    def choose(self, strategy: str, k: int, seed: int, budget: float | None = None) -> Cell:
        """The layers that a strategy takes: k, or as many as a budget allows."""
        rank, layers = self.rank, []
        if budget is not None:
            ours = self.choices.get("max_time", {}).get(f"{budget:g}")
            ours = ours or list(select(self.card, objective="performance", budgets=Budgets(max_time=f"{budget:g}%"), fast=False).layers)
            layers = ours if strategy == "performance" else self._uniform_above(len(ours), budget)
        elif strategy in FIXED:
            layers = strategy_layers(strategy, self.num_layers, k, seed)
        elif strategy == UNIFORM_ABOVE:
            layers = strategy_layers("uniform", self.num_layers, k)
        elif strategy in ("performance", EQUAL_PARAMETERS):
            layers = self.choices.get("k", {}).get(str(k)) or list(select(self.card, k=k, objective="performance", fast=False).layers)
            rank = self.rank if strategy == "performance" else max(1, round(self.rank * self.num_layers / k))
        elif strategy == "balanced":
            layers = self.choices.get("balanced") or list(select(self.card, objective="balanced", fast=False).layers)
        else:
            layers = top_layers(self.scores[strategy], k)
        predicted = 100 * predict(self.card, layers)["performance_kept"]["value"]
        return Cell(self.task, strategy, k, budget, seed, tuple(layers), rank, predicted)

    def fits(self, budget: float) -> bool:
        """Whether any placement keeps a step-time budget, in % of all layers."""
        least = min(self.time.of([layer]) for layer in range(self.num_layers))
        return least <= budget / 100 * self.time.of(range(self.num_layers))

    def _uniform_above(self, count: int, budget: float) -> list[int]:
        for lowest in range(self.num_layers - count + 1):
            layers = [lowest + layer for layer in strategy_layers("uniform", self.num_layers - lowest, count)]
            if self.time.of(layers) <= budget / 100 * self.time.of(range(self.num_layers)):
                return layers
        return strategy_layers("last", self.num_layers, count)


def climb(loss: Callable[[float], float], start: float) -> float:
    """The rate of smallest loss among `start · 2^i`, followed upwards, then downwards, as long as it improves.

    >>> climb(lambda rate: abs(rate - 8), 2)
    8
    >>> climb(lambda rate: abs(rate - 0.5), 2)
    0.5
    """
    best, left = start, MOST_RATES - 1
    for factor in (2, 0.5):
        while left > 0 and (loss(best * factor) < loss(best) or (factor < 1 and math.isinf(loss(best)))):
            best, left = best * factor, left - 1
        if best != start:
            break
    return best


def step_seconds(base: BaseModel, batch: Batch, layers: Sequence[int], rank: int) -> float:
    """Seconds of one step of stock training with adapters in `layers`, after one that is not counted."""
    with adapted_layers(base, layers, rank) as (adapted, optimizer):
        training_step(adapted, batch, optimizer)
        started = time.perf_counter()
        training_step(adapted, batch, optimizer)
        if base.device.type == "cuda":
            torch.cuda.synchronize(base.device)
        return time.perf_counter() - started


def benches(models: Sequence[BenchSettings], place: str | Path) -> list[Bench]:
    """The parts of a benchmark: in `place` itself for one model, in a folder of its own for each of several.

    >>> benches([BenchSettings("org/a"), BenchSettings("b")], "s3://bucket/bench")[0].storage.place
    's3://bucket/bench/org-a'

    Args:
        models: The settings of each model.
        place: A folder, or an address of fsspec.

    Raises:
        BenchmarkError: Two models would have the same folder.
    """
    storage = Storage.at(place)
    if len(models) == 1:
        return [Bench(models[0], storage)]
    names = [re.sub(r"[^\w.-]+", "-", settings.model).strip("-.") for settings in models]
    for name in names:
        if names.count(name) > 1:
            raise BenchmarkError(f"two models would have the folder {name}; name each model once")
    return [Bench(settings, storage.below(name), name) for settings, name in zip(models, names, strict=True)]


def bench_placements(
    parts: Sequence[Bench], grid: Grid, workers: Workers | None = None, progress: Progress | None = None, *, times: bool = True
) -> list[list[Cell]]:
    """Make what is missing of a grid for every model; gives the cells of each, whose records lie in its storage (`tables.summarise`).

    Args:
        parts: The models (`benches`); an unfinished benchmark of the same settings in their storage is gone on with.
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
    peers = tuple(name for name in PEERS if name in grid.strategies)
    with ExitStack() as stack:
        for part in parts:
            check_tasks(grid.tasks, part.settings.data)
            stack.enter_context(part.storage.alone())
            part.keep_settings()
        cards = [part.job(part.prepare, task, peers) for part in parts for task in grid.tasks if not part.prepared(task, peers)]
        _finish(workers, cards, "cards", tell)
        cells = [part.cells(grid) for part in parts]
        run_cells(list(zip(parts, cells, strict=True)), workers, tell)
        for part, part_cells in zip(parts, cells, strict=True):
            for task in grid.tasks if times else ():
                function, arguments = part.job(part.measure_times, task, sorted({(c.layers, c.rank) for c in part_cells if c.task == task}))
                function(*arguments, tell)
    return cells


def run_cells(every: Sequence[tuple[Bench, Sequence[Cell]]], workers: Workers, tell: Progress | None = None) -> None:
    """Search the learning rates that cells need, then make their trials, where they are missing."""
    tell = tell or (lambda phase, done, total: None)
    searches = []
    for part, cells in every:
        needed = sorted({(cell.task, cell.rate_count, cell.rank) for cell in cells})
        searches += [part.job(part.find_rate, *search) for search in needed if not part.storage.exists(part.rate_file(*search))]
    _finish(workers, searches, "learning rates", tell)
    jobs = []
    for part, cells in every:
        for task in dict.fromkeys(cell.task for cell in cells):
            trials = [part.trial(cell) for cell in cells if cell.task == task]
            opener = partial(load_task, part.settings, task, part.day)
            jobs += [part.job(function, *arguments) for function, arguments in trial_jobs(trials, opener, part.storage, workers.count)]
    _finish(workers, jobs, "runs", tell)


def _finish(workers: Workers, jobs: Sequence[Job], phase: str, tell: Progress) -> None:
    for done, _ in enumerate(workers.run(jobs, tell)):
        tell(phase, done + 1, len(jobs))


def _titled(title: str, function: Callable[..., Any], arguments: tuple[Any, ...], progress: Progress | None = None) -> Any:
    """A job with its model's title before what it tells; in other local processes it tells nothing."""
    if progress is None:
        return function(*arguments)
    return function(*arguments, lambda phase, done, total: progress(f"{title}: {phase}", done, total))
