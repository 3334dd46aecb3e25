"""Tasks: folders with train, valid and test records, and how much of each is used."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from layercard.data.load import Dataset, Example, drawn, load_data
from layercard.errors import BenchmarkError
from layercard.models.load import BaseModel

SYNTHETIC = "synthetic"
SPLITS = ("train", "valid", "test")
GENERAL = Path(__file__).with_name("general.txt")
"""Passages of plain English, one a line: how much a model forgets is measured on them."""


def known_tasks(folder: str | None) -> list[str]:
    """The sub-folders of `folder` that hold `train.jsonl`, `valid.jsonl` and `test.jsonl`, and the built-in `synthetic`."""
    root = Path(folder) if folder else None
    found = sorted(path.parent.name for path in root.glob("*/train.jsonl")) if root and root.is_dir() else []
    whole = [name for name in found if root and all((root / name / f"{split}.jsonl").is_file() for split in SPLITS)]
    return [*whole, SYNTHETIC]


def check_tasks(tasks: Sequence[str], folder: str | None) -> None:
    """Raise `BenchmarkError` for a task that is not there."""
    known = known_tasks(folder)
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"{folder or 'no --data folder'} has {', '.join(known)}"
            raise BenchmarkError(f"task {task!r} is unknown; {hint}")


def split_source(task: str, split: str, folder: str | None) -> str:
    """What `load_data` reads for one split of a task; the built-in set has no test part, so its held-out records serve twice."""
    if task == SYNTHETIC:
        return "synthetic:train" if split == "train" else "synthetic:valid"
    return str(Path(folder or ".") / task / f"{split}.jsonl")


@dataclass(frozen=True)
class TaskData:
    """The records of one task: a pool to train on, and held-out records up to a number of tokens, so that tasks cost alike.

    Attributes:
        train: The pool.
        valid: Records on which learning rates are chosen.
        test: Records on which placements are compared.
        batch_size: Records in a step, such that a step has about the wanted number of tokens.
    """

    train: Dataset
    valid: tuple[Example, ...]
    test: tuple[Example, ...]
    batch_size: int


def load_task(
    base: BaseModel,
    task: str,
    folder: str | None,
    *,
    records: int,
    max_length: int,
    batch_tokens: int,
    valid_tokens: int,
    test_tokens: int,
) -> TaskData:
    """Read the three splits of a task."""

    def read(split: str, count: int) -> Dataset:
        return load_data(split_source(task, split, folder), base.tokenizer, records=count, max_length=max_length)

    train = read("train", records)
    size = max(1, round(batch_tokens * len(train) / train.tokens))
    valid, test = up_to(read("valid", records).examples, valid_tokens), read("test", records).examples
    if task == SYNTHETIC:
        test = test[len(valid) :] or test
    return TaskData(train, valid, up_to(test, test_tokens), size)


def up_to(examples: Sequence[Example], tokens: int) -> tuple[Example, ...]:
    """The first examples, until they have at least `tokens` tokens together."""
    taken, total = [], 0
    for example in examples:
        if total >= tokens:
            break
        taken.append(example)
        total += len(example.input_ids)
    return tuple(taken)


def general_examples(base: BaseModel, max_length: int) -> tuple[Example, ...]:
    """The passages of `GENERAL`, a label on every token but the first."""
    texts = GENERAL.read_text(encoding="utf-8").split("\n")
    found = [tuple(base.tokenizer(text)["input_ids"][:max_length]) for text in texts if text]
    return tuple(Example(ids, ids, {"text": text}) for ids, text in zip(found, texts, strict=False) if len(ids) > 1)


def training_order(examples: Sequence[Example], batch_size: int, steps: int, seed: int, group: int = 8) -> list[Example]:
    """Examples in the order of training, `steps · batch_size` of them; a batch is `batch_size` consecutive ones.

    Within each `group` batches the examples are put in batches by length, which wastes less on padding, and the batches shuffled.
    The order depends on the seed alone, so every placement sees the same batches.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = drawn(len(examples), steps * batch_size, generator)
    ordered: list[Example] = []
    for start in range(0, len(rows), group * batch_size):
        chunk = sorted(rows[start : start + group * batch_size], key=lambda row: len(examples[row].input_ids))
        cuts = [chunk[at : at + batch_size] for at in range(0, len(chunk), batch_size)]
        for at in torch.randperm(len(cuts), generator=generator).tolist():
            ordered += [examples[row] for row in cuts[at]]
    return ordered
