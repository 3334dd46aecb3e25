"""One trial: a set of layers of one model, trained on one task from one seed at one learning rate. It ends in one JSON file.

```python
trials = [Trial(settings, "e2e", layers, seed, rank=8, learning_rate=4e-3) for layers in placements for seed in range(3)]
records = run_trials(trials, "results", Workers(4))  # makes what is missing in results/runs/, and reads the rest
```

Trials of one task and seed share the frozen part below their layers: the hidden states that enter each placement's lowest layer are
computed once (`ReplayedSet`). Records have the shape of PEFT's method comparison: `run_info`, `train_info`, `meta_info`.
"""

import os
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from layercard.card.numbers import stretches
from layercard.measure import PeakMemory, Phases
from layercard.models.load import BaseModel, Progress, describe, load_model
from layercard.profiling.step_probe import ReplayedSet
from layercard.profiling.training_probe import ProbeTraining, trained
from layercard.settings import BenchSettings
from layercard.training.evaluate import generate, score_texts
from layercard.trials.storage import Storage
from layercard.trials.tasks import general_examples, load_task, training_order
from layercard.trials.workers import Job, Workers

SCHEMA = "layercard-bench-run/1"
EVAL_BATCH = 8


@dataclass(frozen=True)
class Trial:
    """What to train. A folder holds trials of one `settings` alone, so the key names only the rest.

    Rank and learning rate are those given here, not those of the settings; the scale alpha is twice the rank. The seed is of the data order
    and the adapters' start. The `split` is measured on: `test`, or `valid` where a learning rate is chosen.
    """

    settings: BenchSettings
    task: str
    layers: tuple[int, ...]
    seed: int
    rank: int
    learning_rate: float
    split: str = "test"

    @property
    def key(self) -> str:
        """The name of the trial, which is the stem of its file."""
        return f"{self.task}-{self.split}-s{self.seed}-r{self.rank}-lr{self.learning_rate:g}-l{compact(self.layers)}"

    @property
    def file(self) -> str:
        """Where its record lies in a storage."""
        return f"runs/{self.key}.json"


def compact(layers: Sequence[int]) -> str:
    """Layers as short text for a file name.

    >>> compact((0, 1, 2, 9, 14, 15))
    '0-2.9.14.15'
    """
    parts = stretches(sorted(layers))
    words = [f"{part[0]}-{part[-1]}" if len(part) > 2 else ".".join(map(str, part)) for part in parts]
    return ".".join(words)


def run_trial(trial: Trial, folder: str | Path | Storage, progress: Progress | None = None) -> dict[str, Any]:
    """The record of one trial: read from the folder, or made and kept there."""
    return run_trials([trial], folder, progress=progress)[0]


def run_trials(
    trials: Sequence[Trial], folder: str | Path | Storage, workers: Workers | None = None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """The records of trials, in their order; what is missing in the folder is made first, so a killed call is simply made again.

    Args:
        trials: What to train.
        folder: A folder, or an address of fsspec that all workers reach.
        workers: Where to run; in this process when not given.
        progress: Told of batches, steps and finished trials.
    """
    storage, workers = Storage.at(folder), workers or Workers()
    for _ in workers.run(trial_jobs(trials, storage, workers.count), progress or (lambda phase, done, total: None)):
        pass
    return [storage.read(trial.file, "run") for trial in trials]


def read_trials(folder: str | Path | Storage) -> dict[str, dict[str, Any]]:
    """The records in a folder, by the keys of their trials."""
    storage = Storage.at(folder)
    return {Path(name).stem: storage.read(name, "run") for name in storage.names("runs")}


def trial_jobs(trials: Sequence[Trial], storage: Storage, workers: int = 1) -> list[Job]:
    """Jobs for the trials that are missing, those that share the frozen part together; enough of them for each worker to have one."""
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in dict.fromkeys(trials):
        if not storage.exists(trial.file):
            groups.setdefault((trial.settings, trial.task, trial.seed, trial.split), []).append(trial)
    parts = workers if len(groups) < 2 * workers else 1
    jobs: list[Job] = []
    for group in groups.values():
        group.sort(key=lambda trial: min(trial.layers))
        jobs += [(run_group, (storage, tuple(group[part::parts]))) for part in range(min(parts, len(group)))]
    return jobs


def run_group(storage: Storage, trials: Sequence[Trial], progress: Progress | None = None) -> None:
    """Make the trials of one task, seed and split, and keep each record as it is made."""
    first = trials[0]
    # A search for a learning rate comes again with the same layers: the group of the call before then serves it too.
    key = (first.settings, first.task, first.seed, first.split, frozenset(min(trial.layers) for trial in trials))
    if key not in _groups:
        _groups.clear()
        _groups[key] = Group(trials, progress)
    for done, trial in enumerate(trials):
        if not storage.exists(trial.file):  # a worker that was taken for lost may have written it
            storage.write(trial.file, _groups[key].run(trial, progress))
        if progress:
            progress(f"{trial.task} seed {trial.seed}", done + 1, len(trials))


_groups: dict[tuple[Any, ...], "Group"] = {}
_models: dict[tuple[str, str, str], BaseModel] = {}


def base_model(settings: BenchSettings) -> BaseModel:
    """The base model, loaded once in each process."""
    key = (settings.model, settings.device, settings.dtype)
    if key not in _models:
        _models.clear()
        _models[key] = load_model(settings.model, device=settings.device, dtype=settings.dtype)
    return _models[key]


class Group:
    """Trials of one task, seed and split: their batches and held-out records, with the hidden states that enter their lowest layers."""

    def __init__(self, trials: Sequence[Trial], progress: Progress | None = None) -> None:
        first = trials[0]
        self.base, settings = base_model(first.settings), first.settings
        self.data = load_task(self.base, settings, first.task)
        self.held_out = self.data.held_out[first.split]
        starts = sorted({min(trial.layers) for trial in trials})
        ends = sorted({*starts, len(self.base.blocks) - 1})
        order = training_order(self.data.train.examples, self.data.batch_size, settings.steps, first.seed)
        self.train = ReplayedSet(self.base, order, starts, self.data.batch_size, by_length=False, progress=progress)
        self.test = ReplayedSet(self.base, self.held_out, ends, EVAL_BATCH, progress=progress)
        self.before = self.test.losses(ends[-1])
        if first.split == "test":
            self.general = ReplayedSet(self.base, general_examples(self.base, settings.max_length), ends, EVAL_BATCH)
            self.general_before = self.general.losses(ends[-1])

    def run(self, trial: Trial, progress: Progress | None = None) -> dict[str, Any]:
        """Train and measure; gives the record."""
        settings, before, lowest = trial.settings, self.before, min(trial.layers)
        how = ProbeTraining(
            steps=settings.steps,
            batch_size=self.data.batch_size,
            rank=trial.rank,
            alpha=2.0 * trial.rank,
            learning_rate=trial.learning_rate,
            seed=trial.seed,
        )
        phases = Phases()
        with ExitStack() as stack:
            with phases.phase("train"):
                adapted = stack.enter_context(trained(self.base, trial.layers, self.train, how, progress))
            with phases.phase("evaluate"):
                after = self.test.losses(lowest)
            # Standard error of the reduction over held-out records: that of a ratio of sums.
            saved, tokens = before.nats - after.nats, after.tokens.sum()
            error = (saved - saved.sum() / tokens * after.tokens).square().sum().sqrt() / tokens
            parameters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
            info: dict[str, Any] = {
                "status": "success" if bool(torch.isfinite(after.nats).all()) else "diverged",
                "train_time": phases.to_json()[0]["seconds"],
                "frozen_prefix_kept": True,
                "num_trainable_params": parameters,
                "num_total_params": sum(p.numel() for p in adapted.parameters()),
                "file_size": 4 * parameters,
                "metrics": {
                    "split": trial.split,
                    "loss_before": before.loss,
                    "loss_after": after.loss,
                    "loss_reduction": before.loss - after.loss,
                    "accuracy_before": before.accuracy,
                    "accuracy_after": after.accuracy,
                    "reduction_standard_error": float(error),
                    "records": len(after.tokens),
                },
            }
            if trial.split == "test":
                with phases.phase("forgetting"):
                    info["forgetting"] = self.general.losses(lowest).loss - self.general_before.loss
                with phases.phase("memory"):  # of adapters and optimiser, and what the largest step adds to them
                    info["peak_memory_bytes"] = self._step_bytes(lowest) + 12 * parameters
                with phases.phase("generate"):
                    info["generated"] = None
                    if settings.generate:
                        examples = list(self.held_out[: settings.generate])
                        texts = generate(self.base, examples, model=adapted, max_new_tokens=128)
                        info["generated"] = score_texts([example.record for example in examples], texts)
            info["phases"] = phases.to_json()
        return {
            "schema": SCHEMA,
            "run_info": {
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "experiment_name": trial.key,
                "task": trial.task,
                "layers": list(trial.layers),
                "train_config": asdict(how),
                "peft_config": {"peft_type": "LORA", "r": how.rank, "lora_alpha": how.alpha, "layers_to_transform": list(trial.layers)},
            },
            "train_info": info,
            "meta_info": {
                "model_info": describe(self.base),
                "dataset_info": {
                    "train": {"fingerprint": self.data.train.fingerprint, "records": len(self.data.train)},
                    "held_out": {"split": trial.split, "records": len(self.held_out)},
                },
                "settings": asdict(settings),
                "package_info": {name: version(name) for name in ("layercard", "torch", "transformers", "peft", "numpy")},
                "system_info": {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()},
            },
        }

    def _step_bytes(self, lowest: int) -> int:
        """Bytes of live tensors that the largest step adds."""
        largest = max(range(len(self.train.batches)), key=lambda number: self.train.batches[number].input_ids.numel())
        peak = PeakMemory(self.base.device)
        peak.start()
        try:
            with torch.enable_grad():
                self.train.forward(largest, lowest)[0].mean().backward()
        finally:
            peak.stop()
        return peak.bytes
