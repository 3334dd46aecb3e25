"""Tasks: folders with train, valid and test records, and how much of each is used."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from layercard.data.load import Dataset, Example, drawn, load_data
from layercard.errors import BenchmarkError, suggestion
from layercard.models.load import BaseModel
from layercard.settings import BenchSettings

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


@dataclass(frozen=True)
class TaskData:
    """The records of one task.

    Attributes:
        train: The pool to train on.
        held_out: Records by split, up to a number of tokens, so that tasks cost alike: learning rates are chosen on `valid`, placements
            compared on `test`.
        batch_size: Records in a step, such that a step has about the wanted number of tokens.
    """

    train: Dataset
    held_out: dict[str, tuple[Example, ...]]
    batch_size: int


def load_task(base: BaseModel, settings: BenchSettings, task: str) -> TaskData:
    """Read the three splits of a task, as much of each as the settings want."""
    train, valid, test = (
        load_data(split_source(task, split, settings.data), base.tokenizer, records=settings.train_records, max_length=settings.max_length)
        for split in ("train", "valid", "test")
    )
    size = max(1, round(settings.batch_tokens * len(train) / train.tokens))
    chosen = up_to(valid.examples, settings.valid_tokens)
    tested = (test.examples[len(chosen) :] or test.examples) if task == SYNTHETIC else test.examples
    return TaskData(train, {"valid": chosen, "test": up_to(tested, settings.test_tokens)}, size)


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
    """The paragraphs of `GENERAL`, a label on every token but the first."""
    texts = [text for text in GENERAL.read_text(encoding="utf-8").split("\n") if text]
    tokens = [tuple(base.tokenizer(text)["input_ids"][:max_length]) for text in texts]
    return tuple(Example(ids, ids, {"text": text}) for ids, text in zip(tokens, texts, strict=True) if len(ids) > 1)


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
        cuts = [chunk[cut : cut + batch_size] for cut in range(0, len(chunk), batch_size)]
        for cut in torch.randperm(len(cuts), generator=generator).tolist():
            ordered += [examples[row] for row in cuts[cut]]
    return ordered
