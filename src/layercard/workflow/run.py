"""`layercard run`: from model and data to a trained adapter, chosen by measuring on these data; every step leaves its file.

| step | file |
| --- | --- |
| a few timed steps of all layers | `timing/run.json` |
| profile, where the search has time for it | `card.json` |
| race | `race/`, `race.json` |
| choose | `placement.json` |
| train | `adapter/` |
| result | `result.json` |

A step whose file is there is not done again, so a run that was interrupted goes on with the same call. Card and race together take at
most `RunSettings.search` of what training all layers with the fast parts would take.
"""

import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from layercard.adapters.apply import place
from layercard.card.card import LayerCard
from layercard.data.formats import Source
from layercard.data.load import Dataset, load_data
from layercard.errors import DataError, OutputError, TrainingError
from layercard.files import LOCK_FILE, alone, write_json, write_text
from layercard.models.load import BaseModel, Progress, describe, load_model, wrap_model
from layercard.models.losses import RecordLosses
from layercard.profiling.profile import profile_records
from layercard.records import Estimate
from layercard.report.page import report_page
from layercard.report.sources import TIMING, read_sources
from layercard.report.words import duration
from layercard.selection.budgets import Budgets
from layercard.selection.learning_rate import Length, usual_rate
from layercard.selection.pareto import pareto
from layercard.selection.placement import Placement
from layercard.selection.select import select
from layercard.settings import FastSettings, ProfileSettings, RunSettings, TrainSettings
from layercard.statistics.ratios import ratio_interval
from layercard.training.evaluate import describe_data, held_out_losses
from layercard.training.records import Run
from layercard.training.train import LEAST_WATCHED, PLAN as TRAIN_PLAN, RUN_FILE, WATCH_SHARE, other_run, train
from layercard.training.trainer import MEASUREMENTS, check_reporters
from layercard.trials.race import HEAT_NOISE, LONGER, Course, Entrant, Heat, Race, Shape, race, race_shape
from layercard.trials.result import AllLayers, Chosen, Measured, Result, Seconds
from layercard.trials.trial import Task
from layercard.trials.workers import Workers

PLAN_FILE, CARD_FILE, RACE_FILE, PLACEMENT_FILE, RESULT_FILE = "plan.json", "card.json", "race.json", "placement.json", "result.json"
ADAPTER, REPORT_FILE, RACE = "adapter", "report.html", "race"
FILES = (PLAN_FILE, CARD_FILE, RACE_FILE, PLACEMENT_FILE, RESULT_FILE, ADAPTER, REPORT_FILE, TIMING, RACE, f"{CARD_FILE}.state")
"""All that a run leaves in its folder."""
ALL_LAYERS = "all layers"
"""What the entrant with all modules of all layers is called."""
LEAST_RECORDS = 16
"""Records below which nothing can be chosen or judged."""
HELD_OUT = (0.1, 16, 300)
"""Share of the records that a split holds out, the least and the most of them."""
MEASURED_COST = 1 / 3
"""What a held-out record costs to measure, in records trained: forward alone."""
TIMED_STEPS = (2, 4)
"""Steps of all layers that the plan is made from: a fiftieth of the run, the least and the most of them."""
PATIENCE = 2
"""Measurements of the held-out loss without a better one after which the full training stops, unless told."""
CARD_SHARE = 0.4
"""Part of the search that a card may take; the race has the rest."""
CARD_STEPS = 0.9
"""Fast training steps of all layers, 8 records each, that a card takes for each of its records."""
CARD_RECORDS = (16, 64)
"""The least records that a card says something from, and the most that it needs."""


@dataclass(frozen=True)
class Plan:
    """What a run will do, and how long it will take.

    Attributes:
        steps: Updates of the final training.
        step_seconds: Of one with all layers, measured.
        card_records: Records of the card; 0 for none.
        race: How large the race is; `None` for no race.
        search_seconds: What card and race may take.
        notes: What a user should know of it, in sentences.
    """

    steps: int
    step_seconds: float
    card_records: int
    race: Shape | None
    search_seconds: float
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The plan in words, a line a step."""
        parts = [f"card from {self.card_records} records" if self.card_records else "no card", "no race"]
        if self.race is not None:
            final = f", two of them again for {LONGER * self.race.steps}" if self.race.final else ""
            parts[1] = f"race of {1 + self.race.entrants} candidates, {self.race.steps} steps each{final}"
        training = f"{self.steps} steps, at most {duration(self.steps * self.step_seconds)}"
        return [
            f"search: {'; '.join(parts)} (up to {duration(self.search_seconds if self.race else 0.0)})",
            f"train: {training} ({self.step_seconds:.2f} s a step of all layers)",
            *self.notes,
        ]


def split(data: Dataset, valid: Dataset | None, seed: int) -> tuple[Dataset, Dataset, str]:
    """Records to train on and held-out ones, and what was done in a sentence; a tenth is held out where none are given.

    Raises:
        DataError: Fewer than `LEAST_RECORDS` records.
    """
    share, least, most = HELD_OUT
    needed = LEAST_RECORDS if valid is not None else 2 * least
    if len(data) < needed:
        raise DataError(f"{data.source} has {len(data)} records; a run needs at least {needed}, so add records or train without choosing")
    if valid is not None:
        return data, valid, ""
    count = min(most, max(least, math.floor(share * len(data))))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out, rest = sorted(order[:count]), sorted(order[count:])
    note = f"no held-out records are given: {count} of {len(data):,} are held out (drawn with seed {seed})"
    return data.part(rest, f"{data.source} (without held-out)"), data.part(held_out, f"{data.source} (held out)"), note


OpenRecords = Callable[[], tuple[BaseModel, Dataset, Dataset | None]]
"""Gives model, records and held-out records as they were read."""


@dataclass(frozen=True)
class Choice:
    """What `tune` decided, and what it was decided from; `run` goes on with it."""

    data: Dataset
    valid: Dataset
    before: RecordLosses  # of the base model on `valid`
    plan: Plan
    timed: Run
    card: LayerCard | None
    race: Race | None
    chosen: Entrant
    why: str
    placement: Placement


def tune(
    base: BaseModel,
    data: Dataset,
    output: str | Path,
    *,
    valid: Dataset | None = None,
    settings: RunSettings | None = None,
    training: TrainSettings | None = None,
    fast: FastSettings | None = None,
    workers: Workers | None = None,
    open_records: OpenRecords | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], object] | None = None,
) -> Choice:
    """Choose layers, modules and learning rate by short trainings on these records; the arguments are those of `run`.

    The folder gets `timing/`, `card.json`, `race/`, `race.json` and `placement.json`; what is there is not made again.
    """
    settings, training, output = settings or RunSettings(), training or TrainSettings(), Path(output)
    with alone(output):
        data, valid, note = _begun(output, base, data, valid, settings, training)
        how: dict[str, Any] = {"workers": workers, "open_records": open_records, "progress": progress, "tell": tell}
        return _chosen(base, data, valid, output, settings, training, fast or FastSettings(), note=note, **how)


def _chosen(
    base: BaseModel,
    data: Dataset,
    valid: Dataset,
    output: Path,
    settings: RunSettings,
    training: TrainSettings,
    fast: FastSettings,
    *,
    note: str,
    workers: Workers | None,
    open_records: OpenRecords | None,
    progress: Progress | None,
    tell: Callable[[str], object] | None,
) -> Choice:
    """`tune` in a folder that is taken and begun."""
    # Step 1: say what the records are, and measure the base on those that are held out.
    tell = tell or logging.getLogger(__name__).info
    cut = f"; {data.truncated:,} are cut" if data.truncated else ""
    share = data.labelled_tokens / data.tokens
    tell(f"data: {len(data):,} records to train on, {data.tokens:,} tokens, {share:.0%} of them learnt; {len(valid):,} held out{cut}")
    if note:
        tell(note)
    before = held_out_losses(base.model, base.pad_id, valid, progress=progress, phase="loss before")

    # Step 2: time a few steps of all layers, and plan from that.
    timed = _timed(base, data, training, fast, output / TIMING, progress)
    plan = plan_run(data, settings, training, timed, len(valid))
    for line in plan.lines():
        tell(line)

    # Step 3: the card, where the search has time for one.
    card = _card(base, data, plan, training, output, progress)

    # Step 4: the race, or the rules where there is no time for one.
    length = Length(plan.steps, plan.steps * training.batch_size * training.accumulation / len(data))
    entrants, left_out = candidates(base, card, settings, length, timed)
    if training.learning_rate is not None:
        entrants = [entrant.model_copy(update={"learning_rate": training.learning_rate}) for entrant in entrants]
    raced: Race | None = None
    if (output / RACE_FILE).exists():
        raced = Race.load(output / RACE_FILE)
    elif plan.race is not None:
        task = race_task(base, data, valid, before, fast, plan.race)
        opener = task if open_records is None else partial(_opened, open_records, training.seed, fast, plan.race)
        course = Course(opener, training, length, output / RACE, workers or Workers(), progress)
        how: dict[str, Any] = {"objective": settings.objective, "tolerance": settings.tolerance_share(), "left_out": left_out}
        how |= {"search_rate": training.learning_rate is None, "max_memory": settings.max_memory_bytes()}
        about = {"model": describe(base), "data": describe_data(data)}
        raced = race(course, entrants, plan.race, task.losses["valid"], about=about, **how)
        raced.save(output / RACE_FILE, force=True)
    chosen = raced.chosen if raced else _by_rule(entrants, settings)
    why = raced.why if raced else "there was no time for a race, so the rules decide (docs/run.md)"
    tell(f"chosen: {chosen.name}, learning rate {chosen.learning_rate:.3g}; {why}")
    placement = place(base, chosen.layers, objective=chosen.name, modules=chosen.modules)
    placement = placement.changed(
        learning_rate=chosen.learning_rate,
        learning_rate_steps=plan.steps,
        learning_rate_passes=length.passes,
        learning_rate_source="given" if training.learning_rate is not None else "race" if raced else "rule",
        reasons=dict.fromkeys(map(str, chosen.layers), why),
    )
    placement.save(output / PLACEMENT_FILE, force=True)
    return Choice(data, valid, before, plan, timed, card, raced, chosen, why, placement)


def run(
    model: BaseModel | PreTrainedModel | str,
    data: Dataset | Source,
    output: str | Path,
    *,
    tokenizer: Any = None,
    valid: Dataset | Source | None = None,
    settings: RunSettings | None = None,
    training: TrainSettings | None = None,
    fast: FastSettings | None = None,
    workers: Workers | None = None,
    open_records: OpenRecords | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], object] | None = None,
) -> Result:
    """Choose where and how to adapt by measuring on these records, train to the full length, and say what it gave.

    Args:
        model: The base model: what `load_model` gives, its name, or a transformers model, then with its `tokenizer`.
        data: Records to train on: a `Dataset`, or what `load_data` takes.
        output: The folder that gets every file; where it holds a part of this run, that part is not done again.
        tokenizer: Only for a transformers model.
        valid: Held-out records, given as `data` is; a tenth of `data` when not given.
        settings: How to choose, and within what limits.
        training: The full-length training: steps or epochs, batch, rank. A learning rate in it is taken and not searched.
        fast: Which work training leaves out; all that is exact when not given.
        workers: Where the heats of the race run; in this process when not given.
        open_records: How workers in other processes get model, records and held-out records; a function that can be pickled by name, or a
            partial call of one.
        progress: Told of every phase.
        tell: Called with each line that says what will be done or was decided.

    Raises:
        DataError: Too few records.
        OutputError: `output` holds another run, or cannot be written.
        BenchmarkError: Nothing keeps the limits.
        TrainingError: A limit that leaves no time to train, or as `train`.
    """
    settings, training, output = settings or RunSettings(), training or TrainSettings(), Path(output)
    base = wrap_model(model, tokenizer) if isinstance(model, PreTrainedModel) else load_model(model) if isinstance(model, str) else model

    def read(records: Dataset | Source) -> Dataset:
        return records if isinstance(records, Dataset) else load_data(records, base.tokenizer, classes=base.classes)

    data, held_out = read(data), None if valid is None else read(valid)
    with alone(output):
        data, held_out, note = _begun(output, base, data, held_out, settings, training)
        if (output / RESULT_FILE).exists():
            return Result.load(output / RESULT_FILE)
        where: dict[str, Any] = {"workers": workers, "open_records": open_records, "progress": progress, "tell": tell}
        choice = _chosen(base, data, held_out, output, settings, training, fast or FastSettings(), note=note, **where)
        patience = PATIENCE if training.patience is None else training.patience
        full = replace(training, steps=choice.plan.steps, epochs=None, learning_rate=choice.chosen.learning_rate, patience=patience)
        how: dict[str, Any] = {"valid": choice.valid, "fast": fast, "before": choice.before, "progress": progress}
        begun = (output / ADAPTER / TRAIN_PLAN).exists() or (output / ADAPTER / RUN_FILE).exists()
        trained = train(base, choice.placement, choice.data, output / ADAPTER, full, **how, resume=begun, force=not begun)
        result = _result(base, choice, trained, {**training.to_json(), **settings.to_json()})
        result.save(output / RESULT_FILE, force=True)
        return result


def race_task(base: BaseModel, data: Dataset, valid: Dataset, before: RecordLosses | None, fast: FastSettings, shape: Shape) -> Task:
    """What the heats of a race share: they are judged on the first held-out records."""
    count = min(shape.judges, len(valid))
    judges = valid.part(range(count), f"{valid.source} (first {count})")
    task = Task("race", base, data, {"valid": judges}, fast, moments=0)
    if before is not None:
        task.losses["valid"] = RecordLosses(before.nats[:count], before.tokens[:count])
    return task


def _opened(open_records: OpenRecords, seed: int, fast: FastSettings, shape: Shape) -> Task:
    """`race_task` in a worker."""
    base, data, valid = open_records()
    data, valid, _ = split(data, valid, seed)
    return race_task(base, data, valid, None, fast, shape)


def plan_only(
    base: BaseModel,
    data: Dataset,
    output: str | Path,
    *,
    valid: Dataset | None = None,
    settings: RunSettings | None = None,
    training: TrainSettings | None = None,
    fast: FastSettings | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Time a few steps and say what `run` would do; the steps are kept in `output` for it."""
    settings, training, fast, output = settings or RunSettings(), training or TrainSettings(), fast or FastSettings(), Path(output)
    with alone(output):
        data, held_out, _ = _begun(output, base, data, valid, settings, training)
        return plan_run(data, settings, training, _timed(base, data, training, fast, output / TIMING, progress), len(held_out))


def write_report(output: Path, commands: Sequence[str] = ()) -> Path:
    """The page of a finished run, `report.html`."""
    files = [output / name for name in (RESULT_FILE, RACE_FILE, CARD_FILE, PLACEMENT_FILE, ADAPTER)]
    sources = read_sources([path for path in files if path.exists()])
    if sources.card is not None:
        sources.front = pareto(sources.card)
    return write_text(output / REPORT_FILE, report_page(sources, commands=commands), force=True)


def rate_of_all(output: Path) -> float:
    """The learning rate that a finished run found best for all layers; the chosen one where there was no race."""
    chosen = Result.load(output / RESULT_FILE).chosen
    if chosen.name == ALL_LAYERS or not (output / RACE_FILE).exists():
        return chosen.learning_rate
    heats = [heat for heat in Race.load(output / RACE_FILE).heats if heat.entrant.name == ALL_LAYERS]
    longest = max(heat.steps for heat in heats)
    return min((heat for heat in heats if heat.steps == longest), key=lambda heat: heat.result).entrant.learning_rate


def clear(output: Path) -> None:
    """Remove what an earlier run left in a folder, its result first; other files stay."""
    for name in (RESULT_FILE, *FILES):
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def plan_run(data: Dataset, settings: RunSettings, training: TrainSettings, timed: Run, held_out: int) -> Plan:
    """What there is time for, from the timed steps of all layers; `held_out` records are measured now and then.

    Raises:
        TrainingError: `max_time` leaves less than a few steps.
    """
    step, notes = timed.train_seconds / timed.steps, []
    steps, per_step = training.total_steps(len(data)), training.batch_size * training.accumulation
    limit = settings.max_seconds()
    if limit is not None:
        # All held-out records before and after, and a share of the time, or the least, while the training watches the loss.
        measured = (2 * held_out + MEASUREMENTS * min(held_out, LEAST_WATCHED)) * MEASURED_COST / per_step
        affordable = math.floor((limit / step - measured) / (1 + settings.search_share() + WATCH_SHARE))
        if affordable < TIMED_STEPS[1]:
            raise TrainingError(
                f"--max-time {duration(limit)} leaves {max(0, affordable)} steps of {step:.1f} s beside measuring {held_out} held-out "
                f"records; allow at least {duration((measured + 2 * TIMED_STEPS[1]) * step)}, or hold out fewer"
            )
        if affordable < steps:
            notes.append(f"{steps} steps would take {duration(steps * step)}; --max-time {duration(limit)} leaves {affordable}")
            steps = affordable
    # The learning rate matters most, so the race comes first and the card has what a full race leaves.
    search = settings.search_share() * steps
    card_steps = CARD_STEPS * per_step / 8  # steps of all layers that a card takes for each of its records
    records = min(CARD_RECORDS[1], len(data), int(CARD_SHARE * search / card_steps))
    shape = race_shape(steps, search - records * card_steps, per_step) if records >= CARD_RECORDS[0] else None
    if shape is None or not shape.final:
        records, shape = 0, race_shape(steps, search, per_step)
        notes.append("the search is too short for a card: candidates come from the rules")
    if shape is None:
        notes.append("the search is too short for a race, so the rules decide (more steps or a larger --search would allow one)")
    return Plan(steps, step, records, shape, search * step, tuple(notes))


def candidates(
    base: BaseModel, card: LayerCard | None, settings: RunSettings, length: Length, timed: Run
) -> tuple[list[Entrant], list[str]]:
    """Who takes part in the race, the reference first, and who does not, in words.

    All layers are always asked; with a limit on memory the reference is the largest that is predicted to keep it.
    """
    count, limit = len(base.blocks), settings.max_memory_bytes()
    width, rank = base.model.get_input_embeddings().weight.shape[1], timed.settings["rank"]
    every = tuple(range(count))
    half, quarter = every[count // 2 :], every[count - max(1, count // 4) :]
    named: list[tuple[str, Sequence[int], str]] = [(ALL_LAYERS, every, "all"), ("all layers, MLP", every, "mlp")]
    if card is not None:
        named.append(("balanced", select(card, objective="balanced").layers, "all"))
        if limit is not None and card.cost is not None:
            within = Budgets(max_memory=limit)
            named.append(("best within the memory", select(card, objective="performance", budgets=within).layers, "all"))
    else:
        named.append(("last half", half, "all"))
    if settings.objective == "memory" or limit is not None:
        named += [("last half, MLP", half, "mlp"), ("last quarter", quarter, "all")]
    else:
        named += [("all layers, out", every, "out"), ("last half, MLP", half, "mlp")]
    entrants, left_out, seen = [], [], set()
    for name, layers, modules in named:
        if (tuple(layers), modules) in seen:
            continue
        seen.add((tuple(layers), modules))
        # Memory falls about with the blocks that backward goes through; what was timed is that of all.
        predicted = timed.peak_memory_bytes * (count - min(layers)) / count
        if card is not None and card.cost is not None and modules == "all":
            everything = card.cost.peak_memory(range(count))
            predicted = timed.peak_memory_bytes * card.cost.peak_memory(layers) / everything
        if limit is not None and predicted > 1.1 * limit:
            left_out.append(f"{name}: predicted to take {predicted / 2**20:,.0f} MiB")
            continue
        rate = usual_rate(width, length, len(layers) / count, rank)
        entrants.append(Entrant(name=name, layers=tuple(layers), modules=modules, learning_rate=float(f"{rate:.3g}")))
    if not entrants:
        fewest = every[-1:]
        rate = usual_rate(width, length, 1 / count, rank)
        entrants.append(Entrant(name="last layer", layers=fewest, modules="all", learning_rate=float(f"{rate:.3g}")))
    return entrants, left_out


def _by_rule(entrants: Sequence[Entrant], settings: RunSettings) -> Entrant:
    """Without a race: all layers for the objective `quality`, fewer of them for `memory`, and for `time` their MLP modules alone.

    The steps with MLP modules are shorter, and the loss after as many of them is about the same (docs/run.md).
    """
    first = entrants[0]
    if settings.objective == "memory":
        return next((entrant for entrant in entrants if len(entrant.layers) < len(first.layers)), first)
    if settings.objective == "time":
        return next((entrant for entrant in entrants if entrant.layers == first.layers and entrant.modules == "mlp"), first)
    return first


def _begun(
    output: Path, base: BaseModel, data: Dataset, valid: Dataset | None, settings: RunSettings, training: TrainSettings
) -> tuple[Dataset, Dataset, str]:
    """`split`, with what decides about the run written into a new folder; one that holds another run is refused."""
    check_reporters(training)
    data, valid, note = split(data, valid, training.seed)
    plan = {
        "schema": "layercard-plan/1",
        "model": base.fingerprint,
        "dtype": str(base.model.dtype),
        "day": data.day or valid.day,
        "data": data.fingerprint,
        "valid": valid.fingerprint,
        **training.deciding(),
        **settings.to_json(),
    }
    path = output / PLAN_FILE
    if path.exists():
        if other := other_run(path, plan, OutputError):
            raise OutputError(f"{output} {other}; give it as it was, name another output, or pass --force")
        return data, valid, note
    output.mkdir(parents=True, exist_ok=True)
    others = [entry.name for entry in output.iterdir() if entry.name != LOCK_FILE]
    if others:
        raise OutputError(f"{output} is not empty (it holds {others[0]}); name another output")
    write_json(path, plan)
    return data, valid, note


def _timed(base: BaseModel, data: Dataset, training: TrainSettings, fast: FastSettings, folder: Path, progress: Progress | None) -> Run:
    """A few steps of all layers, for their time and memory; read where they were made before."""
    if (folder / RUN_FILE).exists():
        return Run.load(folder / RUN_FILE)
    placement = place(base, range(len(base.blocks)), objective="all layers")
    least, most = TIMED_STEPS
    steps = max(least, min(most, training.total_steps(len(data)) // 50))
    rate = usual_rate(base.model.get_input_embeddings().weight.shape[1], Length(steps), rank=training.rank)
    settings = replace(training, steps=steps, epochs=None, learning_rate=rate, save_steps=0, report_to="none", patience=None)
    told = progress and (lambda phase, done, total: progress("time a few steps", done, total))
    return train(base, placement, data, folder, settings, fast=fast, force=folder.exists(), progress=told)


def _card(base: BaseModel, data: Dataset, plan: Plan, training: TrainSettings, output: Path, progress: Progress | None) -> LayerCard | None:
    if not plan.card_records:
        return None
    if (output / CARD_FILE).exists():
        return LayerCard.load(output / CARD_FILE)
    how = ProfileSettings(rank=training.rank, seed=training.seed)
    some = data.part(range(plan.card_records), f"{data.source} (first {plan.card_records})")
    card = profile_records(base, some, how, progress, state=output / f"{CARD_FILE}.state")
    card.save(output / CARD_FILE, force=True)
    return card


def _result(base: BaseModel, choice: Choice, trained: Run, settings: dict[str, Any]) -> Result:
    """Put together what was measured."""
    assert trained.loss_before is not None and trained.loss_after is not None and trained.loss_reduction is not None
    chosen, timed, card, raced = choice.chosen, choice.timed, choice.card, choice.race
    is_all = len(chosen.layers) == len(base.blocks) and chosen.modules == "all"
    low, high = trained.loss_reduction_interval or (trained.loss_reduction, trained.loss_reduction)
    step = trained.train_seconds / trained.steps
    pair = None if is_all else _pair(raced, chosen, len(base.blocks))
    if is_all:
        reduction, source = Estimate(value=trained.loss_reduction, low=low, high=high), "measured"
        all_step, all_memory = step, trained.peak_memory_bytes
    elif raced is None or pair is None:
        reduction, source = Estimate(value=trained.loss_reduction), "unknown"
        all_step, all_memory = timed.train_seconds / timed.steps, timed.peak_memory_bytes
    else:
        # Heats of one length are compared, since the first steps of a training take longer than the others.
        mine, theirs = pair
        reduction, source = _estimate_of_all(raced, mine, theirs, trained.loss_reduction), "estimated"
        all_step, all_memory = step * theirs.step_seconds / mine.step_seconds, theirs.peak_memory_bytes
    every: dict[str, Any] = {"loss_reduction": reduction, "source": source, "step_seconds": all_step, "peak_memory_bytes": all_memory}
    seconds = {
        "timing": timed.train_seconds,
        "profile": sum(phase.seconds for phase in card.phases) if card else 0.0,
        "race": raced.seconds if raced else 0.0,
        "train": trained.train_seconds,
        "evaluate": sum(phase["seconds"] for phase in trained.phases if phase["name"] == "loss after"),
    }
    return Result(
        model=describe(base),
        data=describe_data(choice.data),
        valid=describe_data(choice.valid),
        chosen=Chosen(**chosen.model_dump()),
        verdict="not worth training" if low <= 0 else "all layers" if is_all else "adapt",
        why=choice.why,
        measured=Measured(
            loss_before=trained.loss_before, loss_after=trained.loss_after, loss_reduction=trained.loss_reduction, interval=(low, high)
        ),
        all_layers=AllLayers(**every),
        steps=trained.steps,
        planned_steps=choice.plan.steps,
        stopped=next((note for note in trained.notes if note.startswith("training stopped")), ""),
        seconds=Seconds(**seconds, total=sum(seconds.values())),
        step_seconds=step,
        peak_memory_bytes=trained.peak_memory_bytes,
        adapter_bytes=trained.adapter_bytes,
        settings=settings,
        notes=choice.plan.notes,
    )


def _pair(raced: Race | None, chosen: Entrant, count: int) -> tuple[Heat, Heat] | None:
    """The best heat of the chosen entrant and that of all layers and modules, of the greatest length that both ran."""
    heats = [heat for heat in raced.heats if heat.loss is not None] if raced else []
    alike = [heat for heat in heats if heat.entrant.name == chosen.name]
    every = [heat for heat in heats if len(heat.entrant.layers) == count and heat.entrant.modules == "all"]
    lengths = {heat.steps for heat in alike} & {heat.steps for heat in every}
    if not lengths:
        return None
    mine, theirs = (min((heat for heat in part if heat.steps == max(lengths)), key=lambda heat: heat.result) for part in (alike, every))
    return mine, theirs


def _estimate_of_all(raced: Race, mine: Heat, theirs: Heat, reduction: float) -> Estimate:
    """What all layers would have taken away: what one heat has over the other is taken to last, in nats.

    The interval has the noise of the two heats over records, and of training.
    """
    value = reduction + mine.result - theirs.result
    low, high = ratio_interval([a - b for a, b in zip(mine.nats, theirs.nats, strict=True)], raced.labelled)
    half = math.hypot((high - low) / 2, 1.96 * HEAT_NOISE * reduction)
    return Estimate(value=value, low=value - half, high=value + half)
