"""Reading and writing the files that outlive a run: whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from layercard.errors import LayercardError, OutputError

LOCK_FILE = ".lock"
"""Held by the run that works in a folder (`alone`); that of a killed run stays there, empty and held by nobody."""


def refuse_existing(path: Path, force: bool) -> None:
    """Raise `OutputError` if `path` exists and `force` is not set, or if its folder cannot be made."""
    if path.exists() and not force:
        raise OutputError(f"{path} exists already; name another output or pass --force to replace it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {path.parent}: {error.strerror or error}; choose another output") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; move it to `path` when the block ends well, remove it when it does not.

    Raises:
        OutputError: It cannot be written: also in place of an `OSError` in the block, such as that of a full disk.
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; choose another output") from error
    os.close(descriptor)
    part = Path(name)
    try:
        yield part
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; make room or choose another output") from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Have a folder, made where it is missing, for this run alone while the block lasts; the system frees it if the process dies.

    Raises:
        OutputError: Another run has it, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_FILE, timeout=0)
        lock.acquire()
    except Timeout:
        raise OutputError(f"another run is at work in {folder}; wait for it, or name another output") from None
    except OSError as error:
        raise OutputError(f"cannot write the folder {folder}: {error.strerror or error}; choose another output") from error
    try:
        yield
    finally:
        with suppress(OSError):  # while the lock is held, so that no other run holds the file that goes
            (folder / LOCK_FILE).unlink(missing_ok=True)
        lock.release()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str, *, force: bool = False) -> Path:
    """Write `text` to `path` atomically.

    Raises:
        OutputError: `path` exists and `force` is not set, or it cannot be written.
    """
    path = Path(path)
    refuse_existing(path, force)
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def write_json(path: str | Path, value: dict[str, Any], *, force: bool = False) -> Path:
    """Write a JSON object to `path` atomically; NaN and infinity are refused, since JSON has neither."""
    return write_text(path, json_text(value), force=force)


def json_text(value: dict[str, Any]) -> str:
    """A JSON object as the files of this package hold it; NaN and infinity raise `ValueError`."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: str | Path, error: type[LayercardError], what: str) -> dict[str, Any]:
    """Read a JSON object from `path`.

    Args:
        path: The file.
        error: The exception class for a file that is missing, truncated or no JSON object.
        what: What the file should be ("card", "placement"), for the message.
    """
    return parse_json(read_bytes(path, error, what), str(path), error, what)


def read_bytes(path: str | Path, error: type[LayercardError], what: str) -> bytes:
    """The bytes of a file, or an `error` that says in one line why they cannot be had; `what` says what the file should be."""
    path = Path(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise error(f"{path}: no such file; name an existing {what}") from None
    except IsADirectoryError:
        raise error(f"{path} is a folder; name the {what} file in it") from None
    except OSError as problem:
        raise error(f"{path}: {problem.strerror or problem}; name a readable {what}") from None


def shown(value: object, limit: int = 60) -> str:
    """A value as a message names it: on one line, and not longer than a line.

    >>> shown("a/1"), len(shown([0] * 1000))
    ("'a/1'", 60)
    """
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def parse_json(data: bytes, source: str, error: type[LayercardError], what: str) -> dict[str, Any]:
    """The JSON object in `data`, UTF-8; `source` names it in messages, the rest is as in `read_json`."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as problem:  # not UTF-8, no JSON, a number of thousands of digits, or nested too deeply
        detail = f"line {problem.lineno}: {problem.msg}" if isinstance(problem, json.JSONDecodeError) else type(problem).__name__
        raise error(f"{source} is no whole {what} ({detail}); it may be truncated, so make it again") from None
    if not isinstance(value, dict):
        raise error(f"{source} is no {what}: expected a JSON object, found {type(value).__name__}")
    return value
