"""Training runs, whatever wrote their records, as one kind of value; and all runs of one placement as means with intervals.

A run compares with the run of all layers on the same task, from the same seed, with the same rank: that gives what it keeps of the
loss reduction and what it takes of the time. Runs without such a partner keep their own numbers and have no shares.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from layercard.card.numbers import Json, listed
from layercard.files import shown
from layercard.records import Estimate
from layercard.selection.placement import check_layers
from layercard.selection.strategies import STRATEGIES
from layercard.statistics.ratios import TAILS, resampled_sums
from layercard.training.records import Run
from layercard.trials.records import TrialRecord

LEVEL = 0.95

Shares = Mapping[tuple[str, tuple[int, ...], int | None], float]
"""Step times that were measured apart, in % of all layers, by task, layers and rank."""


@dataclass(frozen=True)
class Trial:
    """One training run."""

    name: str  # what the placement is called; empty where the record does not say
    task: str  # the data, in a word
    layers: tuple[int, ...]
    depth: int  # layers of the model
    seed: int
    rank: int | None
    reduction: Estimate | None  # of the loss on held-out records, nats per labelled token
    performance_kept: Estimate | None  # the same in % of all layers
    seconds: float | None  # within training steps; `None` where part of the forward pass was stored, so that it does not compare
    time_share: float | None  # % of all layers
    memory: float | None  # peak bytes above the frozen model
    adapter_bytes: float | None  # of the saved adapter
    machine: str  # where it ran, in words
    memory_of_all: float | None = None  # `memory` of the run of all layers that it compares with
    nats: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # loss of each held-out record before and after
    losses: tuple[float, ...] = ()  # training loss of each step

    @property
    def all_layers(self) -> bool:
        """Whether all layers are adapted."""
        return len(self.layers) == self.depth


def of_run(run: Run) -> Trial:
    """The run of a record of `layercard train`."""
    by_record = (run.valid or {}).get("per_record") or {}
    before, after = by_record.get("nats_before"), by_record.get("nats_after")
    row = {**run.model_dump(), "layers": run.placement["layers"], "loss_reduction": None}
    if run.loss_reduction is not None:
        low, high = run.loss_reduction_interval or (None, None)
        row["loss_reduction"] = Estimate(value=run.loss_reduction, low=low, high=high)
    task, device = task_word(str(run.data.get("source", "data"))), str(run.model.get("device", ""))
    trial = _run(row, task, run.placement["model"], run.settings, device)
    nats = (tuple(before), tuple(after)) if before and after and len(before) == len(after) else None
    return replace(trial, nats=nats, losses=tuple(run.losses))


def of_trial(record: TrialRecord) -> list[Trial]:
    """The run of a trial of `layercard bench`; none for one on validation records, which chose a learning rate."""
    if record.split == "valid":
        return []
    return [_run(record.model_dump(), record.task, record.model, record.settings, record.machine, record.name)]


def of_comparison(comparison: Json) -> list[Trial]:
    """The runs of `layercard compare`, which have names, shares and paired intervals."""
    model, task = comparison["model"], task_word(str((comparison.get("data") or {}).get("source", "data")))
    rows = [(str(row["name"]), row) for row in comparison["rows"]]
    return [_run(row, task, model, comparison.get("settings"), str(model.get("device", "")), name) for name, row in rows]


def _run(row: Json, task: str, model: Json, settings: Json | None, machine: str, name: str = "") -> Trial:
    """A run from what `layercard train` and `compare` say of it under the same keys."""
    settings, depth = settings or {}, int(model["layers"])
    rank = settings.get("rank")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise TypeError(f"rank is {shown(rank)}")
    return Trial(
        name=name,
        task=task,
        layers=check_layers(row["layers"], depth),
        depth=depth,
        seed=int(settings.get("seed") or 0),
        rank=rank,
        reduction=Estimate.read(row.get("loss_reduction")),
        performance_kept=Estimate.read(row.get("performance_kept")),
        seconds=_number(row.get("train_seconds")),
        time_share=_number(row.get("time_share")),
        memory=_number(row.get("peak_memory_bytes")),
        adapter_bytes=_number(row.get("adapter_bytes")),
        machine=machine,
    )


def _number(raw: Any) -> float | None:
    estimate = Estimate.read(raw)
    return None if estimate is None else estimate.value


def task_word(source: str) -> str:
    """A data source as a word: its folder for `…/e2e/train.jsonl`, else its own name.

    >>> task_word("../data/e2e/train.jsonl"), task_word("synthetic (seed 0)"), task_word("hub:org/set:train")
    ('e2e', 'synthetic', 'hub:org/set:train')
    """
    if source.startswith("hub:"):
        return source
    parts = [part for part in source.partition(" (")[0].replace("\\", "/").split("/") if part not in ("", ".", "..")]
    stem = parts[-1].partition(".")[0].partition(":")[0] if parts else source
    return parts[-2] if len(parts) > 1 and stem in ("train", "valid", "test") else stem


def compared(runs: Sequence[Trial], shares: Shares | None = None) -> list[Trial]:
    """The runs with what they keep and take of all layers, as far as there is a run of all layers to compare with."""
    partners, compared_runs = {(run.task, run.seed, run.rank): run for run in runs if run.all_layers}, []
    for run in runs:
        all_layers = partners.get((run.task, run.seed, run.rank))
        performance, share = run.performance_kept, run.time_share
        if performance is None and all_layers is not None and run.reduction and all_layers.reduction and all_layers.reduction.value > 0:
            performance = _kept_paired(run, all_layers) or Estimate(value=100 * run.reduction.value / all_layers.reduction.value)
        if share is None:
            share = (shares or {}).get((run.task, run.layers, run.rank))
        if share is None and all_layers is not None and run.seconds and all_layers.seconds:
            share = 100 * run.seconds / all_layers.seconds
        if run.all_layers and share is not None:
            share = 100.0
        compared_runs.append(
            replace(run, performance_kept=performance, time_share=share, memory_of_all=all_layers.memory if all_layers else None)
        )
    return compared_runs


def _kept_paired(run: Trial, all_layers: Trial) -> Estimate | None:
    """Per cent kept with a bootstrap interval over the held-out records, where both runs were measured on the same ones."""
    if run.nats is None or all_layers.nats is None or run.nats[0] != all_layers.nats[0]:
        return None
    (before, after), after_all = (np.array(side) for side in run.nats), np.array(all_layers.nats[1])
    reached, possible = before - after, before - after_all
    reached_sums, possible_sums = resampled_sums(reached, possible)
    if possible.sum() <= 0 or (possible_sums <= 0).any():
        return None
    low, high = np.quantile(100 * reached_sums / possible_sums, TAILS)
    return Estimate(value=float(100 * reached.sum() / possible.sum()), low=float(low), high=float(high))


@dataclass(frozen=True)
class TrialGroup:
    """All runs of one placement; numbers are means over them, as in `Trial`."""

    name: str
    layers: tuple[int, ...]
    depth: int
    trials: tuple[Trial, ...]
    reduction: dict[str, Estimate]  # by task
    performance_kept: Estimate | None
    time_share: Estimate | None  # runs of one task that share one timing count once
    timings: int  # how many timings that is
    memory: Estimate | None
    adapter_bytes: Estimate | None


def grouped(runs: Iterable[Trial], names: Mapping[tuple[int, ...], str] | None = None) -> list[TrialGroup]:
    """One group a placement and rank: all layers first, then those that the reader gave, plain ones, and all others by what they keep.

    Args:
        runs: Runs, compared with all layers.
        names: Names of placements by their layers.
    """
    names = names or {}
    by_placement: dict[tuple[tuple[int, ...], int | None], list[Trial]] = defaultdict(list)
    for run in runs:
        by_placement[run.layers, run.rank].append(run)
    usual_rank = min((rank for _, rank in by_placement if rank is not None), default=None)
    groups = []
    for (layers, rank), members in by_placement.items():
        first = members[0]
        plain = plain_name(layers, first.depth)
        name = plain if plain == "all" else names.get(layers) or first.name or plain or f"layers {listed(layers, ' ')}"
        reductions: dict[str, list[Estimate]] = defaultdict(list)
        for run in members:
            if run.reduction is not None:
                reductions[run.task].append(run.reduction)
        timings = {(run.task, run.time_share): run.time_share for run in members if run.time_share is not None}
        groups.append(
            TrialGroup(
                name=name + (f", rank {rank}" if rank is not None and rank != usual_rank else ""),
                layers=layers,
                depth=first.depth,
                trials=tuple(members),
                reduction={task: mean(values) for task, values in reductions.items()},
                performance_kept=_mean_of(run.performance_kept for run in members),
                time_share=_mean_of(timings.values()),
                timings=len(timings),
                memory=_mean_of(run.memory for run in members),
                adapter_bytes=_mean_of(run.adapter_bytes for run in members),
            )
        )
    places = {layers: place for place, layers in enumerate(names, 1)}

    def order(group: TrialGroup) -> tuple[int, float]:
        unnamed = len(places) + (2 if group.name.startswith("layers ") else 1)
        place = places.get(group.layers, 0 if len(group.layers) == group.depth else unnamed)
        return place, -(group.performance_kept.value if group.performance_kept else 0.0)

    return sorted(groups, key=order)


def plain_name(layers: Sequence[int], depth: int) -> str | None:
    """The plain placement that these layers are, if any.

    >>> plain_name([3, 9, 15, 21, 27], 30), plain_name([1, 9], 30)
    ('uniform 5', None)
    """
    if len(layers) == depth:
        return "all"
    names = [name for name, choose in STRATEGIES.items() if name != "all" and choose(depth, len(layers)) == list(layers)]
    return f"{names[0]} {len(layers)}" if names else None


def mean(values: Sequence[Estimate]) -> Estimate:
    """Mean with its 95 % t interval; of a single number, that number with its own interval.

    >>> mean([Estimate(value=1.0), Estimate(value=2.0), Estimate(value=3.0)])
    Estimate(value=2.0, low=-0.48..., high=4.48...)
    """
    if len(values) == 1:
        return values[0]
    from scipy.special import stdtrit

    points = [estimate.value for estimate in values]
    middle = float(np.mean(points))
    half = float(stdtrit(len(points) - 1, (1 + LEVEL) / 2) * np.std(points, ddof=1) / len(points) ** 0.5)
    return Estimate(value=middle, low=middle - half, high=middle + half)


def _mean_of(values: Iterable[Estimate | float | None]) -> Estimate | None:
    estimates = [estimate for estimate in map(Estimate.read, values) if estimate is not None]
    return mean(estimates) if estimates else None
