"""Records and token batches: what a model is profiled, trained and measured on."""

import datetime
import hashlib
import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from layercard.data.chat import IGNORED
from layercard.data.encoding import RecordReader, column_names
from layercard.data.formats import Source, find_records
from layercard.errors import DataError
from layercard.settings import DataSettings

__all__ = ["IGNORED", "Batch", "Dataset", "Example", "batches", "collate", "load_data"]

MOST_BAD = 100
"""So many records that cannot be used are enough to refuse a set, where fewer could be used."""


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
        left_out: How many records were left out, since they were too long or could not be used.
        day: The day that the chat template printed, as an ISO date; `None` where it prints none.
    """

    examples: tuple[Example, ...]
    source: str
    fingerprint: str
    truncated: int = 0
    format: str = ""
    notes: tuple[str, ...] = ()
    left_out: int = 0
    day: str | None = None

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
    columns: str | Mapping[str, str] | None = None,
    classes: Mapping[str, int] | None = None,
    on_long: str = "cut",
    on_bad: str = "skip",
    day: datetime.date | None = None,
) -> Dataset:
    """Read and tokenise records.

    A record has `prompt` and `completion` (loss on the completion and its end token), chat `messages` (the tokenizer's template, loss
    on all that the assistant says, see `data.chat`) or `text` (loss on every token but the first, and on an end token); all records of a
    file have what its first has. Well-known columns of other names are understood, and `Dataset.notes` says which were read. For a
    classifier a record has `text` and `label`, the name or number of its class.

    Args:
        source: A JSON Lines, CSV or Parquet file, `hub:NAME[:split]`, or `synthetic[:split]`; several of them as a list, read in this
            order; or the records themselves: a list of dictionaries, a `datasets.Dataset`.
        tokenizer: The model's tokenizer.
        records: Take only the first so many; no more are read.
        max_length: Tokens of a record.
        separator: Put between prompt and completion; `\\n` and `\\t` in it are a line feed and a tab.
        columns: Which columns hold the fields: `prompt=instruction,completion=output`, or a mapping.
        classes: The classes of a classifier (`BaseModel.classes`); `None` for a language model.
        on_long: What is done with a longer record: `cut` (it is counted in `Dataset.truncated`), `skip` or `fail`.
        on_bad: What is done with a record that cannot be used: `skip` (it is counted in `Dataset.left_out`), or `fail`. Where at least half
            of the records cannot be used, or the file cannot be read on, this fails all the same.
        day: The day for chat templates that print one; today when not given. `Dataset.day` of an earlier run gives the same tokens again.

    Raises:
        DataError: No such source, no records, or a record that cannot be used, with its line number.
        TrainingError: `max_length`, `on_long` or `on_bad` is none of the values above.
    """
    DataSettings(max_length=max_length, on_long=on_long, on_bad=on_bad)
    if records is not None and records < 1:
        raise DataError(f"records must be at least 1, found {records}; leave it out to take all")
    names = column_names(columns)
    separator = separator.replace("\\n", "\n").replace("\\t", "\t")
    several = isinstance(source, list | tuple) and bool(source) and all(isinstance(name, str | os.PathLike) for name in source)
    sources: list[Any] = [*source] if several else [source]  # type: ignore[misc]
    files = [(find_records(name), RecordReader(tokenizer, separator, classes, max_length, names, day)) for name in sources]

    # Step 1: encode record by record, and count what is cut or left out.
    examples: list[Example] = []
    truncated, left_out, bad, first_problem = 0, 0, 0, ""
    for label, place, record, reader in ((label, *row, reader) for (label, located), reader in files for row in located):
        try:
            if isinstance(record, DataError):
                raise record
            fields, (ids, labels), is_long = reader.encode(record)
            is_long = is_long or len(ids) > max_length
            example = Example(tuple(ids[:max_length]), tuple(labels[:max_length]), fields)
            if on_long == "cut" or not is_long:
                _check(example, is_long, reader.format)
        except DataError as error:
            bad += 1
            first_problem = first_problem or f"{label} {place}: {error}"
            if on_bad == "fail" or (bad >= MOST_BAD and bad >= len(examples)):
                break
            continue
        if is_long and on_long == "fail":
            raise DataError(f"{label} {place}: longer than {max_length} tokens; raise max_length, or cut or skip long records")
        if is_long and on_long == "skip":
            left_out += 1
            continue
        truncated += is_long
        examples.append(example)
        if len(examples) == records:
            break

    # Step 2: refuse a file of another kind than it seems: one record may be broken, but not half of them.
    if bad and (on_bad == "fail" or bad >= len(examples)):
        count = f" ({bad:,} of the first {bad + left_out + len(examples):,} records cannot be used)" if bad > 1 else ""
        raise DataError(first_problem + count)
    notes = [note for _, reader in files for note in reader.notes]
    if truncated:
        notes.append(f"{truncated:,} of {len(examples):,} records are cut to {max_length:,} tokens")
    if left_out:
        notes.append(f"{left_out:,} records of more than {max_length:,} tokens are left out")
    if bad:
        notes.append(f"{bad:,} records that cannot be used are left out, the first at {first_problem}")
    label = " + ".join(label for (label, _), _ in files)
    if not examples:
        reason = f": {notes[-1]}" if left_out else "; it needs at least one with prompt and completion, messages or text"
        raise DataError(f"{label} holds no records{reason}")
    notes = list(dict.fromkeys(notes))
    for note in notes:
        logging.getLogger(__name__).warning("%s: %s", label, note)
    shown_day = next((str(reader.chat.day) for _, reader in files if reader.chat.shows_day), None)
    kinds = " and ".join(dict.fromkeys(reader.format for _, reader in files if reader.format))
    return Dataset(tuple(examples), label, fingerprint(examples), truncated, kinds, tuple(notes), left_out + bad, shown_day)


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
