"""Tasks of a benchmark: folders with train, valid and test records, and how much of each is used."""

from collections.abc import Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from layercard.data.load import Dataset, Example, fingerprint, load_data
from layercard.errors import BenchmarkError, suggestion
from layercard.models.load import BaseModel, load_model
from layercard.settings import BenchSettings
from layercard.trials.trial import Task

SYNTHETIC = "synthetic"
GENERAL = Path(__file__).with_name("general.txt")
"""Plain English, one paragraph a line: how much a model forgets is measured on it."""


def known_tasks(folder: str | None) -> list[str]:
    """The sub-folders of `folder` that hold `train.jsonl`, `valid.jsonl` and `test.jsonl`, and the built-in `synthetic`."""
    tasks = sorted(path.parent for path in Path(folder).glob("*/train.jsonl")) if folder else []
    return [*(task.name for task in tasks if all((task / f"{split}.jsonl").is_file() for split in ("valid", "test"))), SYNTHETIC]


def check_tasks(tasks: Sequence[str], folder: str | None) -> None:
    """Raise `BenchmarkError` for a task that is not there."""
    known = known_tasks(folder)
    for task in tasks:
        if task not in known:
            raise BenchmarkError(f"task {task!r} is unknown in {folder or 'the built-in tasks'}; {suggestion(task, known)}")


def split_source(task: str, split: str, folder: str | None) -> str:
    """What `load_data` reads for one split of a task; the built-in set has no test part, so its held-out records serve twice."""
    if task == SYNTHETIC:
        return "synthetic:train" if split == "train" else "synthetic:valid"
    return str(Path(folder or ".") / task / f"{split}.jsonl")


def base_model(settings: BenchSettings) -> BaseModel:
    """The base model of a benchmark, loaded once in each process."""
    return _loaded(settings.model, settings.device, settings.dtype)


@lru_cache(maxsize=1)
def _loaded(model: str, device: str, dtype: str) -> BaseModel:
    return load_model(model, device=device, dtype=dtype)


@lru_cache(maxsize=1)
def load_task(settings: BenchSettings, task: str, day: date | None = None) -> Task:
    """A task with as much of its three splits as the settings say: held-out records up to a number of tokens, so that tasks cost alike.

    Learning rates are chosen on `valid`, placements compared on `test`. Chat templates that show a date print `day`, or else today.
    """
    base = base_model(settings)
    how: dict[str, Any] = {"records": settings.train_records, "max_length": settings.max_length, "day": day}
    train, valid, test = (
        load_data(split_source(task, split, settings.data), base.tokenizer, **how) for split in ("train", "valid", "test")
    )
    chosen = up_to(valid, settings.valid_tokens)
    if task == SYNTHETIC:
        test = test.part(range(len(chosen), len(test)), test.source) if len(test) > len(chosen) else test
    held_out = {"valid": chosen, "test": up_to(test, settings.test_tokens)}
    return Task(task, base, train, held_out, general=general_text(base, settings.max_length), answers=settings.generate)


def batch_size(settings: BenchSettings, train: Dataset) -> int:
    """Records in a step, such that it has about `batch_tokens` tokens."""
    return max(1, round(settings.batch_tokens * len(train) / train.tokens))


def up_to(data: Dataset, tokens: int) -> Dataset:
    """The first records, until they have at least `tokens` tokens together."""
    count = total = 0
    while count < len(data) and total < tokens:
        total += len(data.examples[count].input_ids)
        count += 1
    return data.part(range(count), data.source)


def general_text(base: BaseModel, max_length: int) -> Dataset:
    """The paragraphs of `GENERAL`, a label on every token but the first."""
    texts = [text for text in GENERAL.read_text(encoding="utf-8").split("\n") if text]
    tokens = [tuple(base.tokenizer(text)["input_ids"][:max_length]) for text in texts]
    examples = tuple(Example(ids, ids, {"text": text}) for ids, text in zip(tokens, texts, strict=True) if len(ids) > 1)
    return Dataset(examples, "plain English", fingerprint(examples))
