"""One training run of the benchmark: a set of layers, a task, a seed, a learning rate; one immutable JSON file.

Runs of one task and seed share the frozen part below their layers: the hidden states that enter each placement's lowest layer are
computed once (`probe.ReplayedSet`). The records have the shape of PEFT's method comparison: `run_info`, `train_info`, `meta_info`.
"""

import os
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from layercard.card.numbers import stretches
from layercard.data.load import Example
from layercard.measure import PeakMemory, Phases
from layercard.models.load import BaseModel, Progress, describe, load_model
from layercard.models.losses import RecordLosses
from layercard.profiling.step_probe import ReplayedSet
from layercard.profiling.training_probe import ProbeTraining, trained
from layercard.settings import BenchSettings
from layercard.training.evaluate import generate, score_texts
from layercard.trials.storage import Storage
from layercard.trials.tasks import TaskData, general_examples, load_task, training_order

SCHEMA = "layercard-bench-run/1"
PACKAGES = ("layercard", "torch", "transformers", "peft", "numpy")
EVAL_BATCH = 8


@dataclass(frozen=True)
class Item:
    """One run to make; its name says all that decides its outcome within a benchmark."""

    task: str
    layers: tuple[int, ...]
    seed: int
    rank: int
    learning_rate: float
    split: str = "test"

    @property
    def name(self) -> str:
        """Stem of the result file."""
        return f"{self.task}-{self.split}-s{self.seed}-r{self.rank}-lr{self.learning_rate:g}-l{compact(self.layers)}"


def compact(layers: Sequence[int]) -> str:
    """Layers as short text for a file name.

    >>> compact((0, 1, 2, 9, 14, 15))
    '0-2.9.14.15'
    """
    parts = stretches(sorted(layers))
    words = [f"{part[0]}-{part[-1]}" if len(part) > 2 else ".".join(map(str, part)) for part in parts]
    return ".".join(words)


def run_name(item: Item) -> str:
    """Where the result of a run lies."""
    return f"runs/{item.name}.json"


_LOADED: dict[tuple[str, str, str], BaseModel] = {}


def base_model(settings: BenchSettings) -> BaseModel:
    """The base model, loaded once in each process."""
    key = (settings.model, settings.device, settings.dtype)
    if key not in _LOADED:
        _LOADED.clear()
        _LOADED[key] = load_model(settings.model, device=settings.device, dtype=settings.dtype)
    return _LOADED[key]


def task_data(base: BaseModel, settings: BenchSettings, task: str) -> TaskData:
    """The records of a task as the settings want them."""
    return load_task(
        base,
        task,
        settings.data,
        records=settings.train_records,
        max_length=settings.max_length,
        batch_tokens=settings.batch_tokens,
        valid_tokens=settings.valid_tokens,
        test_tokens=settings.test_tokens,
    )


class Group:
    """Runs of one task, seed and split: their batches and held-out records, with the hidden states that enter their lowest layers."""

    def __init__(self, settings: BenchSettings, items: Sequence[Item], progress: Progress | None = None) -> None:
        self.settings, self.base = settings, base_model(settings)
        first = items[0]
        self.data = task_data(self.base, settings, first.task)
        self.split = first.split
        self.held_out: tuple[Example, ...] = self.data.test if first.split == "test" else self.data.valid
        order = training_order(self.data.train.examples, self.data.batch_size, settings.steps, first.seed)
        starts = sorted({min(item.layers) for item in items})
        ends = sorted({*starts, len(self.base.blocks) - 1})
        self.train = ReplayedSet(self.base, order, starts, self.data.batch_size, by_length=False, progress=progress)
        self.test = ReplayedSet(self.base, self.held_out, ends, EVAL_BATCH, progress=progress)
        self.before = self.test.losses(ends[-1])
        if first.split == "test":
            self.general = ReplayedSet(self.base, general_examples(self.base, settings.max_length), ends, EVAL_BATCH)
            self.general_before = self.general.losses(ends[-1])

    def run(self, item: Item, storage: Storage, progress: Progress | None = None) -> None:
        """Train, measure and write the record; a record that is there is kept."""
        if storage.exists(run_name(item)):
            return
        lowest = min(item.layers)
        how = ProbeTraining(
            steps=self.settings.steps,
            batch_size=self.data.batch_size,
            rank=item.rank,
            alpha=2.0 * item.rank,
            learning_rate=item.learning_rate,
            seed=item.seed,
        )
        phases = Phases()
        with ExitStack() as stack:
            with phases.phase("train"):
                adapted = stack.enter_context(trained(self.base, item.layers, self.train, how, progress))
            with phases.phase("evaluate"):
                after = self.test.losses(lowest)
            parameters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
            info: dict[str, Any] = {
                "status": "success" if bool(torch.isfinite(after.nats).all()) else "diverged",
                "train_time": phases.found[0].seconds,
                "frozen_prefix_kept": True,
                "num_trainable_params": parameters,
                "num_total_params": sum(p.numel() for p in adapted.parameters()),
                "file_size": 4 * parameters,
                "metrics": self._outcome(after),
            }
            if self.split == "test":
                with phases.phase("forgetting"):
                    info["forgetting"] = self.general.losses(lowest).loss - self.general_before.loss
                with phases.phase("memory"):
                    info["peak_memory_bytes"] = self._peak(lowest) + 12 * parameters
                with phases.phase("generate"):
                    info["generated"] = self._generated(adapted)
            info["phases"] = phases.to_json()
        storage.write(run_name(item), self._record(item, how, info))  # a worker that was taken for lost may have written the same

    def _outcome(self, after: RecordLosses) -> dict[str, Any]:
        return {
            "split": self.split,
            "loss_before": self.before.loss,
            "loss_after": after.loss,
            "loss_reduction": self.before.loss - after.loss,
            "accuracy_before": self.before.accuracy,
            "accuracy_after": after.accuracy,
            "reduction_standard_error": self._standard_error(after),
            "records": len(after.tokens),
        }

    def _standard_error(self, after: RecordLosses) -> float:
        """Of the loss reduction, over held-out records: that of a ratio of sums, nats per labelled token."""
        saved = self.before.nats - after.nats
        deviation = saved - saved.sum() / after.tokens.sum() * after.tokens
        return float(deviation.square().sum().sqrt() / after.tokens.sum())

    def _peak(self, lowest: int) -> int:
        """Bytes that the largest step adds to weights, adapters and optimiser, counted in live tensors."""
        largest = max(range(len(self.train.batches)), key=lambda at: self.train.batches[at].input_ids.numel())
        peak = PeakMemory(self.base.device)
        peak.start()
        try:
            with torch.enable_grad():
                self.train.forward(largest, lowest)[0].mean().backward()
        finally:
            peak.stop()
        return peak.bytes

    def _generated(self, adapted: Any) -> dict[str, Any] | None:
        if not self.settings.generate:
            return None
        examples = list(self.held_out[: self.settings.generate])
        texts = generate(self.base, examples, model=adapted, max_new_tokens=128)
        return score_texts([example.record for example in examples], texts)

    def _record(self, item: Item, how: ProbeTraining, info: dict[str, Any]) -> dict[str, Any]:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return {
            "schema": SCHEMA,
            "run_info": {
                "created_at": now,
                "experiment_name": item.name,
                "task": item.task,
                "layers": list(item.layers),
                "train_config": asdict(how),
                "peft_config": {"peft_type": "LORA", "r": how.rank, "lora_alpha": how.alpha, "layers_to_transform": list(item.layers)},
            },
            "train_info": info,
            "meta_info": {
                "model_info": describe(self.base),
                "dataset_info": {
                    "train": {"fingerprint": self.data.train.fingerprint, "records": len(self.data.train)},
                    "held_out": {"split": self.split, "records": len(self.held_out)},
                },
                "settings": asdict(self.settings),
                "package_info": {name: version(name) for name in PACKAGES},
                "system_info": {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()},
            },
        }


_KEPT: dict[tuple[BenchSettings, str, int, str, frozenset[int]], Group] = {}


def _group(settings: BenchSettings, items: Sequence[Item], progress: Progress | None) -> Group:
    """The group of some runs; that of the runs before where it serves them too, as in a search for a learning rate."""
    first = items[0]
    key = (settings, first.task, first.seed, first.split, frozenset(min(item.layers) for item in items))
    if key not in _KEPT:
        _KEPT.clear()
        _KEPT[key] = Group(settings, items, progress)
    return _KEPT[key]


def run_items(settings: BenchSettings, storage: Storage, items: Sequence[Item], progress: Progress | None = None) -> int:
    """Make the runs of one task, seed and split that are missing; gives their number."""
    missing = [item for item in items if not storage.exists(run_name(item))]
    if missing:
        group = _group(settings, missing, progress)
        for at, item in enumerate(missing):
            group.run(item, storage, progress)
            if progress:
                progress(f"{item.task} seed {item.seed}", at + 1, len(missing))
    return len(missing)
