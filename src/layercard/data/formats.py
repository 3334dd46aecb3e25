"""Whether the Hugging Face hub can be reached, asked once: its clients retry each file for most of a minute.

Records as they are read: one dictionary after the other, each with where it stands, from a file, the hub or the built-in set.
"""

import csv
import difflib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils

from layercard.data.synthetic import SPLITS, synthetic_records
from layercard.errors import DataError, one_line

# ---- hub


def hub_answers() -> bool:
    """Whether the hub answers within ten seconds; false in its client's offline mode."""
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10.0)
    except Exception:  # the client's own network errors, or its offline mode
        return False
    return True


# ---- records

Located = Iterator[tuple[str, dict[str, Any]]]
"""Pairs of a place ("line 12") and a record."""

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""The name of a file or set (`read_records`), or records in memory: a list of dictionaries, a `datasets.Dataset`."""

HUB = "hub:"
SYNTHETIC = "synthetic"
MEMORY = "records in memory"
_BOM = b"\xef\xbb\xbf"
_CHOICES = f"name a JSON Lines, CSV or Parquet file, {HUB}NAME[:split] or {SYNTHETIC}"


def read_records(source: str) -> tuple[str, Located]:
    """What to call a source, and its records, read one by one as they are asked for.

    Args:
        source: A `.csv`, `.tsv` or `.parquet` file, any other file as JSON Lines, `hub:NAME[:split]`, or `synthetic[:split]`.

    Raises:
        DataError: There is no such source; while reading, a record that is no record, with its line number.
    """
    kind, _, split = source.partition(":")
    if kind == SYNTHETIC:
        return _read_synthetic(split or "train")
    if source.startswith(HUB):
        return source, _read_hub(source)
    path = Path(source).expanduser()
    _check_file(path, source)
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet, ".pq": _read_parquet}
    return source, readers.get(path.suffix.lower(), _read_jsonl)(path)


def find_records(source: Source) -> tuple[str, Located]:
    """What to call a source, and its records one by one, whether it is a name or records in memory.

    Raises:
        DataError: As `read_records`; while reading, a record in memory that is no mapping.
    """
    return read_records(os.fspath(source)) if isinstance(source, str | os.PathLike) else (MEMORY, _read_memory(source))


def _read_memory(rows: Iterable[Any]) -> Located:
    for number, record in enumerate(rows, 1):
        if not isinstance(record, Mapping):
            raise DataError(f"record {number}: expected a dictionary, found {type(record).__name__}; give a list of records, or one split")
        yield f"record {number}", dict(record)


def _read_synthetic(split: str) -> tuple[str, Located]:
    if split not in SPLITS:
        raise DataError(f"{SYNTHETIC}:{split}: no such split; choose {', '.join(f'{SYNTHETIC}:{name}' for name in SPLITS)}")
    name = SYNTHETIC if split == "train" else f"{SYNTHETIC}:{split}"
    return f"{name} (generated, seed 0)", ((f"record {at}", record) for at, record in enumerate(synthetic_records(split), 1))


def _check_file(path: Path, source: str) -> None:
    try:
        folder_items = sorted(item.name for item in path.parent.iterdir()) if not path.exists() else []
        inside = sorted(item.name for item in path.iterdir() if item.suffix in (".jsonl", ".csv", ".parquet")) if path.is_dir() else []
    except OSError:
        folder_items, inside = [], []
    if path.is_dir():
        raise DataError(f"{source} is a folder; name a file in it" + (f", such as {path / inside[0]}" if inside else ""))
    if not path.exists():
        known = {name.lower(): str(path.with_name(name)) for name in folder_items} | {SYNTHETIC: SYNTHETIC}
        close = difflib.get_close_matches(path.name.lower(), list(known), n=1, cutoff=0.6)
        raise DataError(f"{source}: no such file" + (f", did you mean {known[close[0]]}?" if close else "") + f"; {_CHOICES}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, split at line feeds only (a JSON string may hold U+2028), with a leading byte-order mark dropped."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.removeprefix(_BOM) if number == 1 else raw
                try:
                    yield number, line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path} line {number}: no UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); name a readable file") from error


def _read_jsonl(path: Path) -> Located:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            if number == 1 and line.lstrip().startswith("["):
                raise DataError(f"{path} line 1: a JSON array, not JSON Lines; write one object on each line") from None
            detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise DataError(f"{path} line {number}: no JSON ({detail}); mend or remove the line") from None
        if not isinstance(record, dict):
            raise DataError(f"{path} line {number}: expected a JSON object, found {type(record).__name__}; write one object on each line")
        yield f"line {number}", record


def _read_csv(path: Path) -> Located:
    reader = csv.DictReader((line for _, line in _lines(path)), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                found = f"more cells than the {len(reader.fieldnames or ())} columns" if None in record else "too few cells"
                raise DataError(f"{path} line {reader.line_num}: {found}; quote cells that hold commas or line ends")
            yield f"line {reader.line_num}", dict(record)
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: no CSV ({error}); mend or remove the line") from None


def _read_parquet(path: Path) -> Located:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow; install it with `pip install 'layercard[data]'`") from None
    numbers = itertools.count(1)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for rows in file.iter_batches(batch_size=256):
                for record in rows.to_pylist():
                    yield f"row {next(numbers)}", record
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # a ValueError: text that is no UTF-8
        detail = one_line(error, 120)
        raise DataError(f"{path} cannot be read as Parquet ({detail}); it may be cut short, so write it again") from error


def _read_hub(source: str) -> Located:
    name, _, split = source.removeprefix(HUB).partition(":")
    if not name:
        raise DataError(f"{source}: no data set is named; write {HUB}NAME or {HUB}NAME:split")
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: reading from the hub needs datasets; install it with `pip install 'layercard[data]'`") from None
    if not hub_answers():
        raise DataError(f"{source}: the hub cannot be reached; check the network, or save the set as JSON Lines and name that file")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        for number, record in enumerate(rows, 1):
            yield f"record {number}", dict(record)
    except Exception as error:  # datasets, the hub client and the readers behind them each raise their own kinds
        detail = one_line(error)
        raise DataError(f"{source} cannot be read ({detail}); check the name and the split") from error
