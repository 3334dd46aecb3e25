"""Records as they are read: one dictionary after the other, each with where it stands, from a file, the hub or the built-in set."""

import csv
import difflib
import gzip
import io
import itertools
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from layercard.data.synthetic import SPLITS, synthetic_records
from layercard.errors import DataError, one_line
from layercard.hub import hub_answers

Located = Iterator[tuple[str, dict[str, Any] | DataError]]
"""Pairs of a place ("line 12") and a record, or what is wrong with it."""

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Sequence[str | os.PathLike[str]]
"""The name of a file or set (`find_records`), several in this order, or records in memory: a list of dictionaries, a `datasets.Dataset`."""

HUB = "hub:"
SYNTHETIC = "synthetic"
MEMORY = "records in memory"
LARGEST = 2**30
"""Bytes of a line, or of a JSON array, that is read: each must be held in memory."""
_BOM = b"\xef\xbb\xbf"
_CHOICES = f"name a JSON Lines, CSV or Parquet file, {HUB}NAME[:split] or {SYNTHETIC}"


def find_records(source: str | os.PathLike[str] | Iterable[Mapping[str, Any]]) -> tuple[str, Located]:
    """What to call a source, and its records, read one by one as they are asked for.

    Args:
        source: A `.csv`, `.tsv` or `.parquet` file, any other file as JSON Lines or a JSON array, each also compressed (`.gz`);
            `hub:NAME[:split]`; `synthetic[:split]`; or records in memory.

    Raises:
        DataError: There is no such source; while reading, a file that cannot be read on.
    """
    if not isinstance(source, str | os.PathLike):
        return MEMORY, ((f"record {number}", _record(record)) for number, record in enumerate(source, 1))
    name = os.fspath(source)
    kind, _, split = name.partition(":")
    if kind == SYNTHETIC:
        return _read_synthetic(split or "train")
    if name.startswith(HUB):
        return name, _read_hub(name)
    path = Path(name).expanduser()
    _check_file(path, name)
    suffix = (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet, ".pq": _read_parquet}
    return name, readers.get(suffix, _read_json)(path)


def _read_synthetic(split: str) -> tuple[str, Located]:
    if split not in SPLITS:
        raise DataError(f"{SYNTHETIC}:{split}: no such split; choose {', '.join(f'{SYNTHETIC}:{name}' for name in SPLITS)}")
    name = SYNTHETIC if split == "train" else f"{SYNTHETIC}:{split}"
    return f"{name} (generated, seed 0)", ((f"record {number}", record) for number, record in enumerate(synthetic_records(split), 1))


def _check_file(path: Path, source: str) -> None:
    """Refuse what is not there and what is not a regular file: opening a FIFO would wait for ever."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # a ValueError: a name with a null character
        reason = "no such file" if isinstance(error, FileNotFoundError) else (getattr(error, "strerror", None) or str(error)).lower()
        names = {name.lower(): str(path.with_name(name)) for name in _names(path.parent)} | {SYNTHETIC: SYNTHETIC}
        close = difflib.get_close_matches(path.name.lower(), list(names), n=1, cutoff=0.6)
        raise DataError(f"{source}: {reason}" + (f", did you mean {names[close[0]]}?" if close else "") + f"; {_CHOICES}") from None
    if stat.S_ISDIR(mode):
        inside = [name for name in _names(path) if name.endswith((".jsonl", ".csv", ".parquet"))]
        raise DataError(f"{source} is a folder; name a file in it" + (f", such as {path / inside[0]}" if inside else ""))
    if not stat.S_ISREG(mode):
        raise DataError(f"{source} is not a regular file; {_CHOICES}")


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except (OSError, ValueError):
        return []


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, str | DataError]]:
    """Numbered lines, split at line feeds only (a JSON string may hold U+2028), with a leading byte-order mark dropped."""
    try:
        with _open(path) as file:
            for number, raw in enumerate(iter(lambda: file.readline(LARGEST), b""), 1):
                if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise DataError(f"{path} line 1: not UTF-8 at byte 1 (it looks like UTF-16); save the file as UTF-8")
                if len(raw) == LARGEST:
                    raise DataError(f"{path} line {number}: longer than {LARGEST / 2**30:g} GiB; write one record on each line")
                try:
                    line: str | DataError = (raw.removeprefix(_BOM) if number == 1 else raw).decode("utf-8")
                except UnicodeDecodeError as error:
                    line = DataError(f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8")
                yield number, line
    except (OSError, EOFError, zlib.error) as error:  # the last two: a compressed file that was cut short or damaged
        raise DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); name a readable file") from error


def _read_json(path: Path) -> Located:
    """JSON Lines; or one JSON array of records, or an object with the array as its `data`."""
    is_first = True
    for number, line in _lines(path):
        if isinstance(line, str) and not line.strip():
            continue
        value = line if isinstance(line, DataError) else _json_value(line)
        if is_first and isinstance(line, str):
            is_first = False
            is_open = isinstance(value, DataError) and line.lstrip().startswith(("[", "{"))
            if (is_open or _rows_in(value) is not None) and (rows := _read_array(path)) is not None:
                yield from ((f"record {place}", _record(row)) for place, row in enumerate(rows, 1))
                return
        yield f"line {number}", _record(value)


def _record(value: Any) -> dict[str, Any] | DataError:
    """A value as a record, or why it is none."""
    if isinstance(value, DataError):
        return value
    if not isinstance(value, Mapping):
        return DataError(f"expected an object, found {type(value).__name__}; give a list of records, or one object on each line")
    columns = list(value.values())
    if len(columns) > 1 and all(isinstance(column, list) and column and isinstance(column[0], str) for column in columns):
        return DataError("a table by columns; write one object on each line, with one value for each column")
    return dict(value)


def _rows_in(value: Any) -> list[Any] | None:
    """The records of a JSON value that holds all of a file: an array, or the `data` of an object (in UltraChat that is a conversation)."""
    rows = value.get("data") if isinstance(value, dict) else value
    return rows if isinstance(rows, list) and (rows is value or all(isinstance(row, dict) for row in rows)) else None


def _read_array(path: Path) -> list[Any] | None:
    """The records of a file that is one JSON value; `None` where it is JSON Lines."""
    with _open(path) as file:
        raw = file.read(LARGEST + 1).removeprefix(_BOM)
    if len(raw) > LARGEST:
        raise DataError(f"{path} line 1: a JSON array of more than {LARGEST / 2**30:g} GiB; write one object on each line instead")
    text = raw.decode("utf-8", errors="replace")
    value = _json_value(text)
    if isinstance(value, DataError):
        if text.lstrip().startswith("["):
            reason = str(value).partition(";")[0]
            raise DataError(f"{path} line 1: a JSON array that is cut short or broken ({reason}); write one object on each line")
        return None
    rows = _rows_in(value)
    if rows is None:
        raise DataError(f"{path} line 1: one JSON object over many lines; write each record on one line, or all as an array")
    return rows


def _json_value(text: str) -> Any:
    """What JSON text says, or a `DataError` with the reason why it is none."""
    try:
        return json.loads(text, object_pairs_hook=_once_each)
    except RecursionError:
        return DataError("not JSON (nested too deeply); mend or remove the line")
    except json.JSONDecodeError as error:
        rest = text[error.pos :].strip() if error.msg == "Extra data" else ""
        if rest == ",":
            return DataError("a comma behind the object; remove it, or write the whole file as an array")
        if rest.startswith("{"):
            return DataError("several objects on one line; write one object on each line")
        return DataError(f"not JSON ({error.msg} at column {error.colno}); mend or remove the line")
    except ValueError as error:
        reason = "a number of thousands of digits" if "digits" in str(error) else one_line(error, 80)
        return DataError(f"not JSON ({reason}); mend or remove the line")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that gives each key once."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r:.40} is there twice")
    return value


def _read_csv(path: Path) -> Located:
    def texts() -> Iterator[str]:
        for number, line in _lines(path):
            if isinstance(line, DataError):  # the rows behind it cannot be told apart with certainty
                raise DataError(f"{path} line {number}: {line}")
            yield line

    lines = texts()
    first = next(lines, "")
    delimiter = "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes) else ","
    if delimiter == "," and "," not in first and ";" in first:  # as spreadsheets write it where a comma is the decimal mark
        delimiter = ";"
    csv.field_size_limit(LARGEST)  # else a cell of 131,072 characters is an error; long records are cut later
    reader = csv.DictReader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    try:
        columns = reader.fieldnames or ()
        if twice := next((name for name in columns if columns.count(name) > 1), None):
            raise DataError(f"{path} line 1: the column {twice!r} is there twice; rename or remove one")
        for record in reader:
            place, row = f"line {reader.line_num}", cast(dict[str, Any] | DataError, record)
            if None in record or None in record.values():
                cells = f"more cells than the {len(columns)} columns" if None in record else "too few cells"
                row = DataError(f"{cells}; quote cells that hold commas or line ends")
            yield place, row
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: not CSV ({error}); mend or remove the line") from None


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
