"""Records and token batches: what a model is profiled, trained and measured on."""

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from layercard.data.chat import IGNORED
from layercard.data.encoding import RecordReader, renamed
from layercard.data.formats import Source, find_records
from layercard.errors import DataError

__all__ = ["IGNORED", "Batch", "Dataset", "Example", "batches", "collate", "load_data"]


@dataclass(frozen=True)
class Example:
    """One record as tokens.

    Attributes:
        input_ids: Token ids, without padding.
        labels: The same ids where the token carries loss, else `IGNORED`; the loss at position t predicts `labels[t]`. For a classifier
            the last one is the number of the text's class, and the others are `IGNORED`.
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
    """Examples with where they came from.

    Attributes:
        examples: The records as tokens, in the order of the source.
        source: The file or name they came from; "synthetic …" for the built-in set.
        fingerprint: 16 hex digits over all ids and labels.
        truncated: How many records were cut to the longest allowed length.
        format: `pair` (prompt and completion), `chat`, `text`, or `class` (text and label, for a classifier).
        notes: What a user should know about how the records were read, such as columns of other names.
    """

    examples: tuple[Example, ...]
    source: str
    fingerprint: str
    truncated: int = 0
    format: str = ""
    notes: tuple[str, ...] = ()

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

    def part(self, rows: Sequence[int], source: str) -> "Dataset":
        """Some of the records, in the given order, as a data set of its own called `source`."""
        examples = tuple(self.examples[row] for row in rows)
        return replace(self, examples=examples, source=source, fingerprint=fingerprint(examples), truncated=0, notes=())


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
    for place, row in enumerate(rows):
        example = examples[row]
        length = len(example.input_ids)
        ids[place, :length] = torch.tensor(example.input_ids)
        mask[place, :length] = 1
        labels[place, :length] = torch.tensor(example.labels)
    return Batch(ids, mask, labels, tuple(rows))


def batches(examples: Sequence[Example], size: int, pad_id: int, *, by_length: bool = False) -> Iterator[Batch]:
    """Batches of `size` examples, in order, or with `by_length` such that rows of similar length share a batch."""
    order = list(range(len(examples)))
    if by_length:
        order.sort(key=lambda row: len(examples[row].input_ids))
    for start in range(0, len(order), size):
        yield collate(examples, order[start : start + size], pad_id)


def positions(parts: Sequence[Batch]) -> list[int]:
    """Positions, padding included, in the first batch, the first two and so on: how far a pass is, where batches differ in length."""
    return list(itertools.accumulate(batch.input_ids.numel() for batch in parts))


def shuffled(records: int, rows: int, seed: int) -> list[int]:
    """Which record stands at each of `rows` places: one seeded shuffle of all records after another.

    The order depends on the seed alone, not on the layers adapted or on the random numbers that dropout draws, so placements that
    are compared see the same batches.

    >>> sorted(shuffled(3, 6, seed=0))
    [0, 0, 1, 1, 2, 2]
    """
    return drawn(records, rows, torch.Generator().manual_seed(seed))


def drawn(records: int, rows: int, generator: torch.Generator) -> list[int]:
    """The places of `shuffled`, from a generator that draws more afterwards."""
    order: list[int] = []
    while len(order) < rows:
        order += torch.randperm(records, generator=generator).tolist()
    return order[:rows]


def load_data(
    source: Source,
    tokenizer: Any,
    *,
    records: int | None = None,
    max_length: int = 1024,
    separator: str = "\n",
    classes: Mapping[str, int] | None = None,
    on_long: str = "cut",
    on_bad: str = "refuse",
) -> Dataset:
    """Read and tokenise records.

    A record has `prompt` and `completion` (loss on the completion and its end token), chat `messages` (the tokenizer's template, loss
    on all that the assistant says, see `data.chat`) or `text` (loss on every token but the first, and on an end token); all records have
    what the first has. Well-known columns of other names are understood (`data.encoding.COLUMNS`). For a classifier a record has `text`
    and `label`, the name or number of its class.

    Args:
        source: A JSON Lines, CSV or Parquet file, `hub:NAME[:split]`, or `synthetic[:split]`; or the records themselves: a list of
            dictionaries, a `datasets.Dataset`.
        tokenizer: The model's tokenizer.
        records: Take only the first so many; no more are read.
        max_length: Tokens of a record.
        on_long: What is done with a longer record: `cut` (it is cut and counted in `Dataset.truncated`), `skip` or `refuse`.
        on_bad: What is done with a record that cannot be used: `refuse`, or `skip`. `Dataset.notes` says how many were skipped, and why
            the first was. A file that cannot be read is always refused.
        separator: Put between prompt and completion.
        classes: The classes of a classifier (`BaseModel.classes`); `None` for a language model.

    Raises:
        DataError: No such source, no records, or a record that cannot be used, with its line number.
    """
    if records is not None and records < 1:
        raise DataError(f"records must be at least 1, found {records}; leave it out to take all")
    if max_length < 2:
        raise DataError(f"max_length must be at least 2 tokens, found {max_length}; 1024 is the default")
    label, located = find_records(source)
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else label
    reader = RecordReader(tokenizer, separator, classes, max_length)
    examples: list[Example] = []
    truncated, skipped = 0, {"long": 0, "bad": 0}
    first_bad = ""
    for place, record in located:
        try:
            (ids, labels), is_long = reader.encode(record)
            is_long = is_long or len(ids) > max_length
            if is_long and on_long == "skip":
                skipped["long"] += 1
                continue
            if is_long and on_long == "refuse":
                raise DataError(f"longer than {max_length} tokens; raise max_length, or cut or skip long records")
            example = Example(tuple(ids[:max_length]), tuple(labels[:max_length]), renamed(record, reader.columns))
            _check(example, is_long, reader.format)
        except DataError as error:
            if on_bad != "skip":
                raise DataError(f"{name} {place}: {error}") from error.__cause__
            skipped["bad"] += 1
            first_bad = first_bad or f"{place}: {error}"
            continue
        truncated += is_long
        examples.append(example)
        if len(examples) == records:
            break
    notes = list(reader.notes)
    if truncated:
        notes.append(f"{truncated:,} of {len(examples):,} records are cut to {max_length:,} tokens")
    if skipped["long"]:
        notes.append(f"{skipped['long']:,} records of more than {max_length:,} tokens are left out")
    if skipped["bad"]:
        notes.append(f"{skipped['bad']:,} records that cannot be used are left out, the first at {first_bad}")
    if not examples:
        reason = f": {notes[-1]}" if any(skipped.values()) else "; it needs at least one with prompt and completion, messages or text"
        raise DataError(f"{name} holds no records{reason}")
    return Dataset(tuple(examples), label, fingerprint(examples), truncated, reader.format, tuple(notes))


def fingerprint(examples: Sequence[Example]) -> str:
    """16 hex digits over all ids and labels."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.input_ids, example.labels)).encode())
    return digest.hexdigest()[:16]


def _check(example: Example, cut: bool, kind: str) -> None:
    """Refuse a record that teaches nothing, or whose answers cannot be compared with."""
    record = example.record
    if kind == "pair" and not record["completion"]:
        raise DataError("completion is empty, so nothing is to be learnt; fill it or remove the record")
    if example.labelled == 0:
        if cut:
            raise DataError(f"the first {len(example.input_ids)} tokens carry no label and the rest is cut; raise max_length")
        raise DataError("no token carries a label; lengthen or remove the record")
    references = record.get("references")
    if references is not None and not (isinstance(references, list) and references and all(isinstance(text, str) for text in references)):
        raise DataError(f'references must be a list of strings, found {type(references).__name__}; write them as ["…", "…"]')
