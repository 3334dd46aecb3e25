"""Records and token batches: what a model is profiled, trained and measured on."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from layercard.errors import DataError

IGNORED = -100
"""Label of a token that carries no loss."""


@dataclass(frozen=True)
class Example:
    """One record as tokens.

    Attributes:
        input_ids: Token ids, without padding.
        labels: The same ids where the token carries loss, else `IGNORED`; the loss at position t predicts `labels[t]`.
        record: The record as read (`prompt`, `completion`, `references`, `answer`, …).
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    record: dict[str, Any] = field(compare=False)

    @property
    def labelled(self) -> int:
        """Number of tokens that carry loss (the first token of a record is never predicted)."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Dataset:
    """Examples with where they came from."""

    examples: tuple[Example, ...]
    source: str
    fingerprint: str
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def tokens(self) -> int:
        """Tokens, padding not counted."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def labelled_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(example.labelled for example in self.examples)


@dataclass(frozen=True)
class Batch:
    """Right-padded tokens of a few examples: `[B, T]` each.

    Attributes:
        input_ids: Token ids.
        attention_mask: 1 for tokens, 0 for padding.
        labels: Ids where a token carries loss, else `IGNORED`.
        rows: Position of each row's example in the list that the batches were made of.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    rows: tuple[int, ...]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), self.rows)


def collate(examples: Sequence[Example], rows: Sequence[int], pad_id: int) -> Batch:
    """Pad the examples at positions `rows` to one batch."""
    width = max(len(examples[row].input_ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    for at, row in enumerate(rows):
        example = examples[row]
        n = len(example.input_ids)
        ids[at, :n] = torch.tensor(example.input_ids)
        mask[at, :n] = 1
        labels[at, :n] = torch.tensor(example.labels)
    return Batch(ids, mask, labels, tuple(rows))


def batches(examples: Sequence[Example], size: int, pad_id: int, *, by_length: bool = False) -> Iterator[Batch]:
    """Batches of `size` examples, in order, or with `by_length` such that rows of similar length share a batch."""
    order = list(range(len(examples)))
    if by_length:
        order.sort(key=lambda row: len(examples[row].input_ids))
    for start in range(0, len(order), size):
        yield collate(examples, order[start : start + size], pad_id)


def encode_pair(tokenizer: Any, record: dict[str, Any], separator: str, max_length: int) -> tuple[Example, bool]:
    """Tokens of a `prompt` + `completion` record, loss on the completion and its end token; whether it was cut."""
    prompt = tokenizer(record["prompt"] + separator, add_special_tokens=True).input_ids
    completion = [*tokenizer(record["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids = [*prompt, *completion]
    labels = [IGNORED] * len(prompt) + completion
    return Example(tuple(ids[:max_length]), tuple(labels[:max_length]), record), len(ids) > max_length


def load_data(
    source: str, tokenizer: Any, *, records: int | None = None, max_length: int = 1024, separator: str = "\n"
) -> Dataset:
    """Read and tokenise records (JSON Lines with `prompt` and `completion`)."""
    path = Path(source)
    examples, truncated = [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        if records is not None and len(examples) == records:
            break
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{source} line {number}: no JSON ({error.msg}); mend or remove the line") from None
        example, cut = encode_pair(tokenizer, record, separator, max_length)
        truncated += cut
        examples.append(example)
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.input_ids, example.labels)).encode())
    return Dataset(tuple(examples), source, digest.hexdigest()[:16], truncated)
