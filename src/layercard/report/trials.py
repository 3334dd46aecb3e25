"""Training runs, whatever wrote their records, as one kind of row; and rows of equal placements as means with intervals.

A trial compares with the run of all layers on the same task, from the same seed, with the same rank: that gives what it keeps of the
loss reduction and what it takes of the time. Records without such a run keep their own numbers and have no shares.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from layercard.card.numbers import Json, listed
from layercard.files import shown
from layercard.records import Estimate
from layercard.report.costs import threads
from layercard.selection.placement import check_layers
from layercard.selection.strategies import STRATEGIES
from layercard.statistics.ratios import TAILS, resampled_sums

LEVEL = 0.95
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Trial:
    """One training run.

    Attributes:
        name: What the placement is called; empty where the record gives no name.
        task: The data, in a word.
        layers: Adapted layers.
        depth: Layers of the model.
        seed: Of the run.
        rank: Of the adapters.
        reduction: Loss reduction on held-out records, nats per labelled token.
        kept: The same in % of all layers.
        seconds: Time within training steps; `None` where it does not compare (part of the forward pass was stored).
        time_share: Time in % of all layers.
        memory: Peak bytes above the frozen model.
        whole_memory: The same of the run of all layers that it compares with.
        adapter_bytes: Size of the saved adapter.
        parameters: Trained weights.
        machine: Where it ran, in words.
        nats: Loss of each held-out record before and after, where the record has them.
    """

    name: str
    task: str
    layers: tuple[int, ...]
    depth: int
    seed: int = 0
    rank: int | None = None
    reduction: Estimate | None = None
    kept: Estimate | None = None
    seconds: float | None = None
    time_share: float | None = None
    memory: float | None = None
    whole_memory: float | None = None
    adapter_bytes: float | None = None
    parameters: float | None = None
    machine: str = ""
    nats: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @property
    def whole(self) -> bool:
        """Whether all layers are adapted."""
        return len(self.layers) == self.depth


def of_run(record: Json) -> Trial:
    """The trial of a run record (`layercard train`)."""
    settings, data, model = record.get("settings") or {}, record.get("data") or {}, record["model"]
    depth = int(record["placement"]["model"]["layers"])
    held = (record.get("valid") or {}).get("per_record") or {}
    before, after = held.get("nats_before"), held.get("nats_after")
    return Trial(
        name="",
        task=task_word(str(data.get("source", "data"))),
        layers=check_layers(record["placement"]["layers"], depth),
        depth=depth,
        seed=int(settings.get("seed") or 0),
        rank=_rank(settings.get("rank")),
        reduction=_with_ends(record.get("loss_reduction"), record.get("loss_reduction_interval")),
        seconds=_float(record.get("train_seconds")),
        memory=_float(record.get("peak_memory_bytes")),
        adapter_bytes=_float(record.get("adapter_bytes")),
        parameters=_float(record.get("trainable_parameters")),
        machine=str(model.get("device", "")),
        nats=(tuple(before), tuple(after)) if before and after and len(before) == len(after) else None,
    )


def of_bench(record: Json) -> Trial | None:
    """The trial of a benchmark's run; `None` for a run on validation records, which chose a learning rate."""
    run, trained, meta = record["run_info"], record["train_info"], record["meta_info"]
    metrics = trained.get("metrics") or {}
    if metrics.get("split", "test") != "test":
        return None
    value, error = _float(metrics.get("loss_reduction")), _float(metrics.get("reduction_standard_error"))
    half = None if error is None else NORMAL_95 * error
    system, depth = meta.get("system_info") or {}, int(meta["model_info"]["layers"])
    return Trial(
        name="",
        task=str(run["task"]),
        layers=check_layers(run["layers"], depth),
        depth=depth,
        seed=int(run["train_config"].get("seed") or 0),
        rank=_rank(run["train_config"].get("rank")),
        reduction=None if value is None else _within(value, half),
        seconds=None if trained.get("frozen_prefix_kept") else _float(trained.get("train_time")),
        memory=_float(trained.get("peak_memory_bytes")),
        adapter_bytes=_float(trained.get("file_size")),
        parameters=_float(trained.get("num_trainable_params")),
        machine=", ".join([str(system.get("machine", "")), *([threads(int(system["threads"]))] if system.get("threads") else [])]),
    )


def of_comparison(value: Json) -> list[Trial]:
    """The trials of a comparison (`layercard compare`), which has names, shares and paired intervals."""
    settings, depth = value.get("settings") or {}, int(value["model"]["layers"])
    task = task_word(str((value.get("data") or {}).get("source", "data")))
    return [
        Trial(
            name=str(row["name"]),
            task=task,
            layers=check_layers(row["layers"], depth),
            depth=depth,
            seed=int(settings.get("seed") or 0),
            rank=_rank(settings.get("rank")),
            reduction=Estimate.read(row.get("loss_reduction")),
            kept=Estimate.read(row.get("performance_kept")),
            seconds=_float(row.get("train_seconds")),
            time_share=_float(row.get("time_share")),
            memory=_float(row.get("peak_memory_bytes")),
            adapter_bytes=_float(row.get("adapter_bytes")),
            parameters=_float(row.get("trainable_parameters")),
            machine=str(value["model"].get("device", "")),
        )
        for row in value["rows"]
    ]


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


def _rank(found: Any) -> int | None:
    """A rank, `None` where none is said.

    Raises:
        TypeError: It is something else.
    """
    if found is None or (isinstance(found, int) and not isinstance(found, bool)):
        return found
    raise TypeError(f"rank is {shown(found)}")


def compared(trials: Sequence[Trial], shares: Mapping[tuple[str, tuple[int, ...], int | None], float] | None = None) -> list[Trial]:
    """The trials with what they keep and take of all layers, as far as there is a run of all layers to compare with.

    Args:
        trials: Runs.
        shares: Step times that were measured apart, in % of all layers, by task, layers and rank.
    """
    whole = {(trial.task, trial.seed, trial.rank): trial for trial in trials if trial.whole}
    return [_against(trial, whole.get((trial.task, trial.seed, trial.rank)), shares or {}) for trial in trials]


def _against(trial: Trial, whole: Trial | None, shares: Mapping[tuple[str, tuple[int, ...], int | None], float]) -> Trial:
    kept, share = trial.kept, trial.time_share
    if kept is None and whole is not None and trial.reduction and whole.reduction and whole.reduction.value > 0:
        kept = _paired(trial, whole) or Estimate(value=100 * trial.reduction.value / whole.reduction.value)
    if share is None:
        share = shares.get((trial.task, trial.layers, trial.rank))
    if share is None and whole is not None and trial.seconds and whole.seconds:
        share = 100 * trial.seconds / whole.seconds
    share = 100.0 if trial.whole and share is not None else share
    return replace(trial, kept=kept, time_share=share, whole_memory=whole.memory if whole else None)


def _paired(trial: Trial, whole: Trial) -> Estimate | None:
    """Per cent kept with a bootstrap interval over held-out records, which both runs must have been measured on."""
    if trial.nats is None or whole.nats is None or trial.nats[0] != whole.nats[0]:
        return None
    (before, after), reference = (np.array(side) for side in trial.nats), np.array(whole.nats[1])
    reached, possible = before - after, before - reference
    above, below = resampled_sums(reached, possible)
    if possible.sum() <= 0 or (below <= 0).any():
        return None
    low, high = np.quantile(100 * above / below, TAILS)
    return Estimate(value=float(100 * reached.sum() / possible.sum()), low=float(low), high=float(high))


@dataclass(frozen=True)
class Row:
    """All trials of one placement.

    Attributes:
        name: What it is called.
        layers: Its layers.
        depth: Layers of the model.
        trials: The runs.
        reduction: For each task the mean loss reduction, with its interval.
        kept: Mean share of all layers' loss reduction over tasks and seeds, %.
        time_share: Mean time, % of all layers; runs of one task that share one timing count once.
        timings: How many timings that is.
        memory, adapter_bytes, parameters: Means over runs.
    """

    name: str
    layers: tuple[int, ...]
    depth: int
    trials: tuple[Trial, ...]
    reduction: dict[str, Estimate]
    kept: Estimate | None
    time_share: Estimate | None
    timings: int
    memory: Estimate | None
    adapter_bytes: Estimate | None
    parameters: Estimate | None


def rows_of(trials: Iterable[Trial], known: Mapping[tuple[int, ...], str] | None = None) -> list[Row]:
    """One row a placement and rank: all layers first, then those that the reader gave, plain ones, and all others by what they keep.

    Args:
        trials: Runs, compared with all layers.
        known: Names of placements by their layers.
    """
    known = known or {}
    groups: dict[tuple[tuple[int, ...], int | None], list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[trial.layers, trial.rank].append(trial)
    usual = min((rank for _, rank in groups if rank is not None), default=None)
    rows = []
    for (_, rank), found in groups.items():
        suffix = f", rank {rank}" if rank is not None and rank != usual else ""
        rows.append(_row(_name(found[0], known) + suffix, found))
    places = {layers: at for at, layers in enumerate(known, 1)}
    return sorted(rows, key=lambda row: (_place(row, places), -(row.kept.value if row.kept else 0.0)))


def _place(row: Row, places: Mapping[tuple[int, ...], int]) -> int:
    """All layers, then given placements in their order, then plain ones and those with a name, then the rest."""
    plain = 0 if len(row.layers) == row.depth else len(places) + (2 if row.name.startswith("layers ") else 1)
    return places.get(row.layers, plain)


def _name(trial: Trial, known: Mapping[tuple[int, ...], str]) -> str:
    if trial.whole:
        return "all"
    return known.get(trial.layers) or trial.name or plain_name(trial.layers, trial.depth) or f"layers {listed(trial.layers, ' ')}"


def plain_name(layers: Sequence[int], depth: int) -> str | None:
    """The plain placement that these layers are, if any.

    >>> plain_name([3, 9, 15, 21, 27], 30), plain_name([1, 9], 30)
    ('uniform 5', None)
    """
    if len(layers) == depth:
        return "all"
    names = [name for name, choose in STRATEGIES.items() if name != "all" and choose(depth, len(layers)) == list(layers)]
    return f"{names[0]} {len(layers)}" if names else None


def _row(name: str, trials: list[Trial]) -> Row:
    tasks: dict[str, list[Estimate]] = defaultdict(list)
    for trial in trials:
        if trial.reduction is not None:
            tasks[trial.task].append(trial.reduction)
    timings = list({(trial.task, trial.time_share): trial.time_share for trial in trials if trial.time_share is not None}.values())
    return Row(
        name=name,
        layers=trials[0].layers,
        depth=trials[0].depth,
        trials=tuple(trials),
        reduction={task: mean(values) for task, values in tasks.items()},
        kept=_mean_of(trial.kept for trial in trials),
        time_share=_mean_of(map(_number, timings)),
        timings=len(timings),
        memory=_mean_of(_number(trial.memory) for trial in trials),
        adapter_bytes=_mean_of(_number(trial.adapter_bytes) for trial in trials),
        parameters=_mean_of(_number(trial.parameters) for trial in trials),
    )


def mean(values: Sequence[Estimate]) -> Estimate:
    """Mean with its 95 % t interval; of a single number, that number with its own interval.

    >>> mean([Estimate(value=1.0), Estimate(value=2.0), Estimate(value=3.0)])
    Estimate(value=2.0, low=-0.48..., high=4.48...)
    """
    if len(values) == 1:
        return values[0]
    from scipy.special import stdtrit

    points = [one.value for one in values]
    middle = float(np.mean(points))
    half = float(stdtrit(len(points) - 1, (1 + LEVEL) / 2) * np.std(points, ddof=1) / len(points) ** 0.5)
    return Estimate(value=middle, low=middle - half, high=middle + half)


def _mean_of(values: Iterable[Estimate | None]) -> Estimate | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _within(value: float, half: float | None) -> Estimate:
    return Estimate(value=value) if half is None else Estimate(value=value, low=value - half, high=value + half)


def _number(value: float | None) -> Estimate | None:
    return None if value is None else Estimate(value=value)


def _float(raw: Any) -> float | None:
    found = Estimate.read(raw)
    return None if found is None else found.value


def _with_ends(raw: Any, ends: Any) -> Estimate | None:
    found = Estimate.read(raw)
    if found is None or not isinstance(ends, Sequence) or len(ends) != 2:
        return found
    low, high = (Estimate.read(end) for end in ends)
    return Estimate(value=found.value, low=low.value if low else None, high=high.value if high else None)
