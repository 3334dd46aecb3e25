"""Training runs, whatever wrote their records, as one kind of value; and all runs of one placement as means with intervals.

A run compares with the run of all layers on the same task, from the same seed, with the same rank: that gives what it keeps of the
loss reduction and what it takes of the time. Runs without such a partner keep their own numbers and have no shares. Only runs of one
regime (task, rank and length) are averaged and stand in one table.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from pydantic import model_validator

from layercard.card.numbers import listed
from layercard.files import shown
from layercard.records import Estimate
from layercard.selection.placement import check_layers
from layercard.selection.strategies import STRATEGIES
from layercard.statistics.ratios import TAILS, resampled_sums
from layercard.training.records import Run
from layercard.trials.records import Comparison, TrialRecord

LEVEL = 0.95

Shares = Mapping[tuple[str, tuple[int, ...], int | None], float]
"""Step times that were measured apart, in % of all layers, by task, layers and rank."""


class Regime(NamedTuple):
    """What runs must have in common to be compared: the task, the rank of their adapters, and how long they train."""

    task: str
    rank: int | None
    steps: int | None
    epochs: float | None

    @property
    def words(self) -> str:
        """All of it, as far as it is known."""
        length = f"{self.steps} steps" if self.steps else f"{self.epochs:g} epochs" if self.epochs else ""
        return ", ".join(filter(None, (self.task, "" if self.rank is None else f"rank {self.rank}", length)))


class Trial(TrialRecord):
    """One training run, whatever command wrote it; `train_seconds` is `None` where a part of the forward pass was stored."""

    losses: tuple[float, ...] = ()  # training loss of each step
    memory_of_all: int | None = None  # `peak_memory_bytes` of the run of all layers that it compares with

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_layers(self.layers, int(self.model["layers"]))
        if not isinstance(self.rank, int | None) or isinstance(self.rank, bool):
            raise ValueError(f"rank is {shown(self.rank)}")
        return self

    @property
    def depth(self) -> int:
        """Layers of the model."""
        return int(self.model["layers"])

    @property
    def rank(self) -> int | None:
        """Rank of its adapters, where the settings say."""
        return self.settings.get("rank")

    @property
    def everywhere(self) -> bool:
        """Whether all modules of all layers are adapted."""
        return len(self.layers) == self.depth and self.modules == "all"

    @property
    def regime(self) -> Regime:
        """Task, rank and length."""
        return Regime(self.task, self.rank, self.settings.get("steps"), self.settings.get("epochs"))

    @property
    def partner(self) -> tuple[Any, ...]:
        """What a run shares with the run of all layers that it compares with: its regime and its seed."""
        return self.regime, self.settings.get("seed") or 0

    @property
    def curve_points(self) -> tuple[Sequence[float], Sequence[float]]:
        """Seconds and losses: on held-out records where measured on the way, else of training, averaged over 5 % of the steps."""
        if len(self.curve) > 2:
            return [moment.seconds for moment in self.curve], [moment.loss for moment in self.curve]
        width, steps = max(1, len(self.losses) // 20), len(self.losses)
        ends = range(width, steps + 1) if self.losses else ()
        means = [sum(self.losses[end - width : end]) / width for end in ends]
        return [(self.train_seconds or 0.0) * end / steps for end in ends], means


def of_run(run: Run) -> Trial:
    """The run of a record of `layercard train`."""
    row = run.model_dump(exclude={"schema_", "loss_reduction", "valid"})
    if run.loss_reduction is not None:
        low, high = run.loss_reduction_interval or (None, None)
        row["loss_reduction"] = Estimate(value=run.loss_reduction, low=low, high=high)
    placement = run.placement
    about = {"layers": placement["layers"], "modules": placement.get("modules") or "all", "model": placement["model"]}
    about["valid"] = run.valid or {}
    return Trial(**row | about, task=task_word(str(run.data.get("source", "data"))), machine=str(run.model.get("device", "")))


def of_trial(record: TrialRecord) -> list[Trial]:
    """The run of a trial of `layercard bench`; none for one on validation records, which chose a learning rate."""
    return [] if record.split == "valid" else [Trial(**record.model_dump(exclude={"schema_"}))]


def of_comparison(comparison: Comparison) -> list[Trial]:
    """The runs of `layercard compare`, which have names, shares and paired intervals."""
    about = {"model": comparison.model, "machine": str(comparison.model.get("device", ""))}
    about["task"] = task_word(str(comparison.data.get("source", "data")))
    rows = [row.model_dump(exclude={"schema_"}) for row in comparison.rows]
    return [Trial(**row | about | {"settings": row["settings"] or comparison.settings}) for row in rows]


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
    partners, compared_runs = {run.partner: run for run in runs if run.everywhere}, []
    for run in runs:
        all_layers = partners.get(run.partner)
        performance, share, memory = run.performance_kept, run.time_share, None
        if share is None and run.modules == "all":
            share = (shares or {}).get((run.task, run.layers, run.rank))
        if all_layers is not None:
            memory, reached, possible = all_layers.peak_memory_bytes, run.loss_reduction, all_layers.loss_reduction
            if performance is None and reached and possible and possible.value > 0:
                performance = _kept_paired(run, all_layers) or Estimate(value=100 * reached.value / possible.value)
            if share is None and run.train_seconds and all_layers.train_seconds:
                share = 100 * run.train_seconds / all_layers.train_seconds
        if run.everywhere and share is not None:
            share = 100.0
        compared_runs.append(run.model_copy(update={"performance_kept": performance, "time_share": share, "memory_of_all": memory}))
    return compared_runs


def _kept_paired(run: Trial, all_layers: Trial) -> Estimate | None:
    """Per cent kept with a bootstrap interval over the held-out records, where both runs were measured on the same ones."""
    nats = [each.valid.get("per_record") or {} for each in (run, all_layers)]
    before, after, after_all = nats[0].get("nats_before"), nats[0].get("nats_after"), nats[1].get("nats_after")
    if not before or not after or not after_all or before != nats[1].get("nats_before") or not len(before) == len(after) == len(after_all):
        return None
    reached, possible = np.array(before) - np.array(after), np.array(before) - np.array(after_all)
    reached_sums, possible_sums = resampled_sums(reached, possible)
    if possible.sum() <= 0 or (possible_sums <= 0).any():
        return None
    low, high = np.quantile(100 * reached_sums / possible_sums, TAILS)
    return Estimate(value=float(100 * reached.sum() / possible.sum()), low=float(low), high=float(high))


@dataclass(frozen=True)
class TrialGroup:
    """All runs of one placement in one regime; numbers are means over them, as in `Trial`."""

    name: str
    regime: Regime
    layers: tuple[int, ...]
    modules: str
    depth: int
    trials: tuple[Trial, ...]
    loss_reduction: Estimate | None
    performance_kept: Estimate | None
    time_share: Estimate | None  # runs that share one timing count once
    timings: int  # how many timings that is
    memory: Estimate | None
    adapter_bytes: Estimate | None


def grouped(runs: Iterable[Trial], names: Mapping[tuple[int, ...], str] | None = None) -> list[TrialGroup]:
    """One group a placement and regime: all layers, then those that the reader gave, plain ones, all others by what they keep.

    Args:
        runs: Runs, compared with all layers.
        names: Names of placements by their layers.
    """
    names = names or {}
    by_placement: dict[tuple[Regime, tuple[int, ...], str], list[Trial]] = defaultdict(list)
    for run in runs:
        by_placement[run.regime, run.layers, run.modules].append(run)
    groups = []
    for (regime, layers, modules), members in by_placement.items():
        first = members[0]
        plain = plain_name(layers, first.depth)
        name = plain if plain == "all" else names.get(layers) or first.name or plain or f"layers {listed(layers, ' ')}"
        timings = {run.time_share for run in members if run.time_share is not None}
        groups.append(
            TrialGroup(
                name=name + (f", {modules} modules" if modules != "all" else ""),
                regime=regime,
                layers=layers,
                modules=modules,
                depth=first.depth,
                trials=tuple(members),
                loss_reduction=_mean_of(run.loss_reduction for run in members),
                performance_kept=_mean_of(run.performance_kept for run in members),
                time_share=_mean_of(sorted(timings)),
                timings=len(timings),
                memory=_mean_of(run.peak_memory_bytes for run in members),
                adapter_bytes=_mean_of(run.adapter_bytes for run in members),
            )
        )
    places = {layers: place for place, layers in enumerate(names, 1)}

    def order(group: TrialGroup) -> tuple[int, float]:
        unnamed = len(places) + (2 if group.name.startswith("layers ") else 1)
        place = places.get(group.layers, 0 if len(group.layers) == group.depth else unnamed)
        return place, -(group.performance_kept.value if group.performance_kept else 0.0)

    return sorted(groups, key=order)


def by_regime(
    groups: Iterable[TrialGroup], layers: Sequence[int] = (), modules: str = "all", task: str = ""
) -> dict[Regime, list[TrialGroup]]:
    """Groups that compare with each other; first the regime of a placement: on `task` where it was trained on several, and longest."""
    regimes: dict[Regime, list[TrialGroup]] = defaultdict(list)
    for group in groups:
        regimes[group.regime].append(group)

    def order(regime: Regime) -> tuple[bool, bool, int]:
        trained = any((group.layers, group.modules) == (tuple(layers), modules) for group in regimes[regime])
        return not trained, regime.task != task, -(regime.steps or 0)

    return {regime: regimes[regime] for regime in sorted(regimes, key=order)}


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
