"""One trial: a placement, trained with some settings from one seed on one task. It ends in one JSON file (`TrialRecord`).

```python
task = Task("mine", base, train, {"valid": valid})
trials = [
    Trial("mine", layers, TrainSettings(steps=steps, batch_size=8, learning_rate=rate, seed=seed), modules="mlp", split="valid")
    for layers in ((20, 21, 22), tuple(range(30)))
    for steps in (24, 96)
    for rate in (1e-3, 2e-3)
    for seed in (0, 1)
]
records = run_trials(trials, task, "results")  # makes what is missing in results/runs/, and reads the rest
records[0].loss_after, records[0].train_seconds, records[0].peak_memory_bytes
[(moment.step, moment.seconds, moment.loss) for moment in records[0].curve]  # held-out loss at an eighth, a quarter, half, the end
read_trials("results")[trials[0].key] == records[0]  # without a model
```

`run_trials(trials, partial(load_task, settings, "e2e"), place, Workers(4))` runs them in processes, and `Workers(4, "local")` on Ray: each
worker makes the task by that call. A folder may hold any trials of one model and data set, of all lengths; killed, the same call goes on.
A trial is what `layercard train` does, so it has its checkpoints, its fast parts and its numbers.
"""

import hashlib
import platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from layercard.adapters.apply import loaded, place
from layercard.card.numbers import stretches
from layercard.data.load import Dataset
from layercard.errors import BenchmarkError, DivergedError, ModelError
from layercard.files import json_text
from layercard.models.load import BaseModel, Progress, describe
from layercard.models.losses import RecordLosses
from layercard.records import Estimate
from layercard.selection.placement import Placement
from layercard.settings import FastSettings, TrainSettings
from layercard.training.evaluate import describe_data, generate, held_out_losses, score_texts
from layercard.training.records import Run
from layercard.training.train import PLAN, train, versions
from layercard.trials.records import TrialRecord
from layercard.trials.storage import Storage
from layercard.trials.workers import Job, Workers

LONGEST_NAME = 80
"""Characters of a list of layers in a file name; a longer one is named by its hash."""
_IN_KEY = {"seed": "s", "rank": "r", "learning_rate": "lr", "batch_size": "b", "steps": "n", "epochs": "e"}
"""How the settings are called that stand in every key; others stand there under their own name where they are not the default."""


@dataclass(frozen=True)
class Trial:
    """What to train, and on which split of the task's held-out records to measure it.

    `placement` is the placement itself, where layers and a set of modules (`MODULE_SETS`) do not say it.
    """

    task: str
    layers: tuple[int, ...]
    settings: TrainSettings
    modules: str = "all"
    split: str = "test"
    placement: Placement | None = None

    @property
    def key(self) -> str:
        """The name of the trial and of its file: all that changes its result, but for model and records.

        >>> Trial("e2e", (0, 1, 2, 9), TrainSettings(steps=32, learning_rate=4e-3), modules="mlp").key
        'e2e-test-s0-r8-lr0.004-b4-n32-l0-2.9-mlp'
        """
        settings, usual = self.settings.deciding(), TrainSettings().deciding()
        if settings["steps"] is None and settings["epochs"] is None:
            settings["epochs"] = 1.0
        if settings["learning_rate"] is None:
            settings["learning_rate"] = (self.placement and self.placement.learning_rate) or "auto"
        words = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in settings.items()}
        parts = [re.sub(r"[^\w.+]+", "-", self.task).strip("-."), self.split]
        parts += [f"{short}{words[name]}" for name, short in _IN_KEY.items() if settings[name] is not None]
        parts += [f"l{compact(self.layers)}", *([] if self.modules == "all" else [self.modules])]
        parts += [f"{name}-{words[name]}" for name, value in settings.items() if name not in _IN_KEY and value != usual[name]]
        if self.placement is not None:
            changing = ("paths", "parameters", "rank_pattern", "alpha_pattern")
            parts.append(_digest({name: getattr(self.placement, name) for name in changing}))
        return "-".join(parts)

    @property
    def file(self) -> str:
        """Where its record lies in a storage."""
        return f"runs/{self.key}.json"


def compact(layers: Sequence[int]) -> str:
    """Layers as short text for a file name.

    >>> compact((0, 1, 2, 9, 14, 15)), compact(range(0, 128, 2))
    ('0-2.9.14.15', '64of0-126-...')
    """
    ordered = sorted(layers)
    words = [f"{part[0]}-{part[-1]}" if len(part) > 2 else ".".join(map(str, part)) for part in stretches(ordered)]
    text = ".".join(words)
    return text if len(text) <= LONGEST_NAME else f"{len(ordered)}of{ordered[0]}-{ordered[-1]}-{_digest(ordered)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json_text(value).encode()).hexdigest()[:10]


@dataclass
class Task:
    """What trials share: model and records.

    Attributes:
        name: As the trials call it.
        base: The frozen base model.
        train: Records to train on.
        held_out: Records to measure on, by split.
        fast: Which work training leaves out; a `cache_folder` lets trials share what enters their lowest layer.
        general: Records on which forgetting is measured, of trials on the split `test`.
        answers: How many records of the split `test` are answered in writing and scored.
        moments: How often the held-out loss is measured before the end: at half of the steps, a quarter, …
        losses: Losses of the base by split, as far as they are known.
    """

    name: str
    base: BaseModel
    train: Dataset
    held_out: Mapping[str, Dataset]
    fast: FastSettings = field(default_factory=FastSettings)
    general: Dataset | None = None
    answers: int = 0
    moments: int = 3
    losses: dict[str, RecordLosses] = field(default_factory=dict)

    def before(self, split: str, progress: Progress | None = None) -> RecordLosses:
        """Losses of the base on a split, measured once."""
        if split not in self.losses:
            data = self.general if split == "general" else self.held_out[split]
            assert data is not None
            self.losses[split] = held_out_losses(self.base.model, self.base.pad_id, data, progress=progress, phase="loss before")
        return self.losses[split]


Opener = Task | Callable[[], Task]
"""A task, or for workers in other processes a function that can be pickled and gives one."""


def run_trials(
    trials: Sequence[Trial],
    task: Opener,
    folder: str | Path | Storage,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> list[TrialRecord]:
    """The records of trials of one task, in their order; what is missing in the folder is made first.

    Args:
        trials: What to train. One that diverges has the status `diverged` and no loss.
        task: Model and records, or how workers get them.
        folder: A folder, or an address of fsspec that all workers reach.
        workers: Where to run; in this process when not given.
        progress: Told of steps and finished trials.

    Raises:
        BenchmarkError: The folder holds one of these trials with another model or other records.
        TrainingError: As `train`.
    """
    storage, workers = Storage.at(folder), workers or Workers()
    for _ in workers.run(trial_jobs(trials, task, storage, workers.count), progress or (lambda phase, done, total: None)):
        pass
    records = [read_trial(storage, trial.file) for trial in trials]
    if not isinstance(task, Task):
        return records
    model, data = describe(task.base), describe_data(task.train)
    dtype = str(task.base.model.dtype).removeprefix("torch.")
    for trial, record in zip(trials, records, strict=True):
        for there, here, name in ((record.model, model, "name"), (record.data, data, "source")):
            if there.get("fingerprint") != here["fingerprint"]:
                was, now = (f"{each.get(name)} ({each.get('fingerprint')})" for each in (there, here))
                raise BenchmarkError(f"{storage.named(trial.file)} was made with {was}, now it is {now}; name another folder")
        if (before := record.model.get("dtype", dtype)) != dtype:
            raise BenchmarkError(f"{storage.named(trial.file)} was made in {before}, now the model is in {dtype}; name another folder")
    return records


def read_trials(folder: str | Path | Storage) -> dict[str, TrialRecord]:
    """The records in a folder, by the keys of their trials."""
    storage = Storage.at(folder)
    return {Path(name).stem: read_trial(storage, name) for name in storage.names("runs")}


def read_trial(storage: Storage, file: str) -> TrialRecord:
    """The record in a file of a storage."""
    return TrialRecord.from_json(storage.read(file, "trial"), storage.named(file))


def trial_jobs(trials: Sequence[Trial], task: Opener, storage: Storage, workers: int = 1) -> list[Job]:
    """Jobs for the trials of one task that are missing, at most one for each worker; those of one lowest layer follow each other."""
    missing = [trial for trial in {trial.key: trial for trial in trials}.values() if not storage.exists(trial.file)]
    missing.sort(key=lambda trial: (trial.split, min(trial.layers)))
    return [(make_trials, (storage, task, tuple(missing[part::workers]))) for part in range(min(workers, len(missing)))]


def make_trials(storage: Storage, task: Opener, trials: Sequence[Trial], progress: Progress | None = None) -> None:
    """Make trials of one task one after another, and write each record as it is made."""
    opened = task if isinstance(task, Task) else task()
    for done, trial in enumerate(trials):
        if not storage.exists(trial.file):  # a worker that was taken for lost may have written it
            folder = storage.working(f"unfinished/{trial.key}")
            try:
                started = (folder / PLAN).exists()
                record = measure(opened, trial, folder, resume=started, force=not started, progress=progress)
            except (DivergedError, ModelError) as error:
                if isinstance(error, ModelError) and "finite" not in str(error):
                    raise
                record = _diverged(opened, trial)
            storage.write(trial.file, record.to_json())
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # other workers' trials may lie there
                folder.parent.rmdir()
        if progress:
            progress(f"{trial.task} trials", done + 1, len(trials))


def measure(
    task: Task,
    trial: Trial,
    folder: Path,
    *,
    name: str = "",
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> TrialRecord:
    """Train in a folder, which then holds the adapter, and measure; `resume` and `force` are as in `train`."""
    placement = trial.placement or place(task.base, trial.layers, modules=trial.modules)
    steps = trial.settings.total_steps(len(task.train))
    run = train(
        task.base,
        placement,
        task.train,
        folder,
        trial.settings,
        valid=task.held_out[trial.split],
        fast=task.fast,
        before=task.before(trial.split, progress),
        moments=sorted({steps // 2**halvings for halvings in range(1, task.moments + 1)} - {0}),
        resume=resume,
        force=force,
        progress=progress,
    )
    extras: dict[str, Any] = {}
    if trial.split == "test" and (task.general is not None or task.answers):
        general_before = None if task.general is None else task.before("general").loss
        with loaded(task.base, folder) as adapted:
            if task.general is not None and general_before is not None:
                extras["forgetting"] = held_out_losses(adapted, task.base.pad_id, task.general).loss - general_before
            if task.answers:
                examples = list(task.held_out["test"].examples[: task.answers])
                texts = generate(task.base, examples, model=adapted)
                extras["generated"] = score_texts([example.record for example in examples], texts)
    return record_of(run, trial.task, trial.split, name=name, modules=trial.modules, **extras)


def record_of(run: Run, task: str, split: str, **more: Any) -> TrialRecord:
    """The record of a trial from that of its run, which was measured on held-out records."""
    assert run.valid is not None and run.loss_reduction is not None and run.loss_reduction_interval is not None
    low, high = run.loss_reduction_interval
    same = ("model", "data", "valid", "settings", "loss_before", "loss_after", "train_seconds", "peak_memory_bytes", "trainable_parameters",
            "adapter_bytes", "layers_in_backward", "fast", "phases", "versions", "curve", "started")  # fmt: skip
    return TrialRecord(
        task=task,
        split=split,
        layers=run.placement["layers"],
        loss_reduction=Estimate(value=run.loss_reduction, low=low, high=high),
        accuracy=run.valid.get("accuracy"),
        machine=f"{platform.machine()}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}",
        **{name: getattr(run, name) for name in same},
        **more,
    )


def _diverged(task: Task, trial: Trial) -> TrialRecord:
    return TrialRecord(
        task=trial.task,
        split=trial.split,
        layers=trial.layers,
        modules=trial.modules,
        model=describe(task.base),
        data=describe_data(task.train),
        valid=describe_data(task.held_out[trial.split]),
        settings=trial.settings.to_json(),
        status="diverged",
        loss_before=task.before(trial.split).loss,
        versions=versions(),
    )
