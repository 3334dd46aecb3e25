"""Records as they are read: one dictionary after the other, each with where it stands, from a file, the hub or the built-in set."""

import csv
import difflib
import gzip
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from layercard.data.synthetic import SPLITS, synthetic_records
from layercard.errors import DataError, one_line
from layercard.hub import hub_answers

Located = Iterator[tuple[str, dict[str, Any]]]
"""Pairs of a place ("line 12") and a record."""

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""The name of a file or set (`read_records`), or records in memory: a list of dictionaries, a `datasets.Dataset`."""

HUB = "hub:"
SYNTHETIC = "synthetic"
MEMORY = "records in memory"
LARGEST_ARRAY = 2**30
"""Bytes of a JSON array that is read; unlike JSON Lines it must be held in memory whole."""
_BOM = b"\xef\xbb\xbf"
_CHOICES = f"name a JSON Lines, CSV or Parquet file, {HUB}NAME[:split] or {SYNTHETIC}"


def find_records(source: Source) -> tuple[str, Located]:
    """What to call a source, and its records one by one, whether it is a name or records in memory.

    Raises:
        DataError: As `read_records`; while reading, a record in memory that is not a mapping.
    """
    if isinstance(source, str | os.PathLike):
        return read_records(os.fspath(source))

    rows: Iterable[Any] = source

    def records() -> Located:
        for number, record in enumerate(rows, 1):
            if not isinstance(record, Mapping):
                kind = type(record).__name__
                raise DataError(f"record {number}: expected a dictionary, found {kind}; give a list of records, or one split")
            yield f"record {number}", dict(record)

    return MEMORY, records()


def read_records(source: str) -> tuple[str, Located]:
    """What to call a source, and its records, read one by one as they are asked for.

    Args:
        source: A `.csv`, `.tsv` or `.parquet` file, any other file as JSON Lines or a JSON array, each also compressed (`.gz`),
            `hub:NAME[:split]`, or `synthetic[:split]`.

    Raises:
        DataError: There is no such source; while reading, something that is not a record, with its line number.
    """
    kind, _, split = source.partition(":")
    if kind == SYNTHETIC:
        return _read_synthetic(split or "train")
    if source.startswith(HUB):
        return source, _read_hub(source)
    path = Path(source).expanduser()
    _check_file(path, source)
    suffix = (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet, ".pq": _read_parquet}
    return source, readers.get(suffix, _read_json)(path)


def _read_synthetic(split: str) -> tuple[str, Located]:
    if split not in SPLITS:
        raise DataError(f"{SYNTHETIC}:{split}: no such split; choose {', '.join(f'{SYNTHETIC}:{name}' for name in SPLITS)}")
    name = SYNTHETIC if split == "train" else f"{SYNTHETIC}:{split}"
    return f"{name} (generated, seed 0)", ((f"record {number}", record) for number, record in enumerate(synthetic_records(split), 1))


def _check_file(path: Path, source: str) -> None:
    try:
        neighbours = sorted(item.name for item in path.parent.iterdir()) if not path.exists() else []
        inside = sorted(item.name for item in path.iterdir() if item.suffix in (".jsonl", ".csv", ".parquet")) if path.is_dir() else []
    except OSError:
        neighbours, inside = [], []
    if path.is_dir():
        raise DataError(f"{source} is a folder; name a file in it" + (f", such as {path / inside[0]}" if inside else ""))
    if not path.exists():
        names = {name.lower(): str(path.with_name(name)) for name in neighbours} | {SYNTHETIC: SYNTHETIC}
        close = difflib.get_close_matches(path.name.lower(), list(names), n=1, cutoff=0.6)
        raise DataError(f"{source}: no such file" + (f", did you mean {names[close[0]]}?" if close else "") + f"; {_CHOICES}")
    if not path.is_file():
        raise DataError(f"{source} is not a regular file; {_CHOICES}")


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, split at line feeds only (a JSON string may hold U+2028), with a leading byte-order mark dropped."""
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, 1):
                if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise DataError(f"{path} line 1: no UTF-8 at byte 1 (it looks like UTF-16); save the file as UTF-8")
                line = raw.removeprefix(_BOM) if number == 1 else raw
                try:
                    yield number, line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path} line {number}: no UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    except (OSError, EOFError) as error:  # an EOFError: a compressed file that was cut short
        raise DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); name a readable file") from error


def _read_json(path: Path) -> Located:
    """JSON Lines; or one JSON array of records, or an object with the array as its `data`."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            record = json.loads(line, object_pairs_hook=_once_each)
        except (ValueError, RecursionError) as error:
            if number == 1 and line.lstrip()[:1] in ("[", "{") and (array := _read_array(path)) is not None:
                yield from array
                return
            if number == 1 and line.lstrip().startswith("["):
                raise DataError(f"{place}: a JSON array that is cut short or broken; write one object on each line") from None
            raise DataError(f"{place}: {_json_problem(error, line)}") from None
        if number == 1 and (isinstance(record, list) or (isinstance(record, dict) and isinstance(record.get("data"), list))):
            yield from _read_array(path) or ()
            return
        if not isinstance(record, dict):
            raise DataError(f"{place}: expected a JSON object, found {type(record).__name__}; write one object on each line")
        columns = list(record.values())
        if len(columns) > 1 and all(isinstance(column, list) and column and isinstance(column[0], str) for column in columns):
            raise DataError(f"{place}: a table by columns; write one object on each line, with one value for each column")
        yield f"line {number}", record


def _read_array(path: Path) -> Located | None:
    """The records of a file that is one JSON value; `None` where it is not one."""
    if path.stat().st_size > LARGEST_ARRAY:
        raise DataError(f"{path} line 1: a JSON array of more than {LARGEST_ARRAY / 2**30:g} GiB; write one object on each line instead")
    try:
        with _open(path) as file:
            value = json.loads(file.read().removeprefix(_BOM).decode("utf-8"), object_pairs_hook=_once_each)
    except (ValueError, RecursionError, OSError, EOFError):
        return None
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(f"{path} line 1: one JSON object over many lines; write each record on one line, or all as an array")

    def records() -> Located:
        for number, record in enumerate(rows, 1):
            if not isinstance(record, dict):
                raise DataError(f"{path} record {number}: expected a JSON object, found {type(record).__name__}; mend or remove it")
            yield f"record {number}", record

    return records()


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that gives each key once."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r:.40} is there twice")
    return value


def _json_problem(error: Exception, line: str) -> str:
    """Why a line is not JSON, and how to mend it."""
    if isinstance(error, RecursionError):
        return "no JSON (nested too deeply); mend or remove the line"
    if not isinstance(error, json.JSONDecodeError):
        return f"no JSON ({one_line(error, 80)}); mend or remove the line"
    if error.msg == "Extra data":
        rest = line[error.pos :].strip()
        if rest == ",":
            return "a comma behind the object; remove it, or write the whole file as an array"
        if rest.startswith("{"):
            return "several objects on one line; write one object on each line"
    return f"no JSON ({error.msg} at column {error.colno}); mend or remove the line"


def _read_csv(path: Path) -> Located:
    lines = _lines(path)
    first = next(lines, (1, ""))[1]
    delimiter = "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes) else ","
    if delimiter == "," and "," not in first and ";" in first:  # as spreadsheets write it where a comma is the decimal mark
        delimiter = ";"
    reader = csv.DictReader(itertools.chain([first], (line for _, line in lines)), delimiter=delimiter, strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                cells = f"more cells than the {len(reader.fieldnames or ())} columns" if None in record else "too few cells"
                raise DataError(f"{path} line {reader.line_num}: {cells}; quote cells that hold commas or line ends")
            yield f"line {reader.line_num}", _with_json_cells(record)
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: no CSV ({error}); mend or remove the line") from None


def _with_json_cells(record: dict[str, str]) -> dict[str, Any]:
    """A row whose columns of messages, which a table can only hold as JSON text, are read."""
    row: dict[str, Any] = dict(record)
    for name in ("messages", "conversations", "conversation"):
        if row.get(name, "").lstrip().startswith("["):
            try:
                row[name] = json.loads(row[name])
            except ValueError:
                continue
    return row


def _read_parquet(path: Path) -> Located:
    import pyarrow
    import pyarrow.parquet

    numbers = itertools.count(1)
    try:
        with _open(path) as raw:
            content = io.BytesIO(raw.read()) if path.suffix.lower() == ".gz" else raw
            with pyarrow.parquet.ParquetFile(content) as file:
                for rows in file.iter_batches(batch_size=256):
                    for record in rows.to_pylist():
                        yield f"row {next(numbers)}", record
    except (pyarrow.ArrowException, OSError, EOFError, ValueError) as error:  # a ValueError: text that is not UTF-8
        raise DataError(f"{path} cannot be read as Parquet ({one_line(error, 120)}); it may be cut short, so write it again") from error


def _read_hub(source: str) -> Located:
    name, _, split = source.removeprefix(HUB).partition(":")
    if not name:
        raise DataError(f"{source}: no data set is named; write {HUB}NAME or {HUB}NAME:split")
    if not hub_answers():
        raise DataError(f"{source}: the hub cannot be reached; check the network, or save the set as JSON Lines and name that file")
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        for number, record in enumerate(rows, 1):
            yield f"record {number}", dict(record)
    except Exception as error:  # datasets, the hub client and the readers behind them each raise their own kinds
        raise DataError(f"{source} cannot be read ({one_line(error)}); check the name and the split") from error
