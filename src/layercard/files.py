"""Reading and writing the files that outlive a run: whole or not at all."""

import errno
import json
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from layercard.errors import LayercardError, OutputError

LOCK_FILE = ".lock"
"""Held by the run that works in a folder (`alone`); that of a killed run stays there, empty and held by nobody."""


def refuse_existing(path: Path, force: bool) -> None:
    """Raise `OutputError` if something is at `path` and `force` is not set, or if no file can be written there; nothing is made or changed.

    A link counts as what it points to. What is not a regular file is never replaced: a device such as /dev/null and what this process
    has open (/dev/stdout) are written to, all else is refused.
    """
    if not is_stream(path):
        if _file_at(path) is not None and not force:
            raise OutputError(f"{path} exists already; name another output or pass --force to replace it")
        with writing(path):
            folder = next(parent for parent in Path(os.path.realpath(path)).parents if parent.exists())
            if not folder.is_dir():
                raise OutputError(f"cannot make the folder {path.parent}: {folder} is a file; choose another output")
            if not os.access(folder, os.W_OK | os.X_OK):
                raise OutputError(f"cannot write {path}: {folder} may not be written to; choose another output")


def is_stream(path: Path) -> bool:
    """Whether bytes go straight to it: a character device such as /dev/null, or what this process has open, such as /dev/stdout."""
    if re.fullmatch(r"/dev/(std(in|out|err)|fd/\d+)|/proc/(self|\d+)/fd/\d+", str(path)):
        return True
    with suppress(OSError, ValueError):
        return stat.S_ISCHR(path.stat().st_mode)
    return False


def _file_at(path: Path) -> os.stat_result | None:
    """What is known of the regular file at `path`, links followed; `None` where there is nothing.

    Raises:
        OutputError: There is something else.
    """
    with writing(path):
        try:
            there = path.stat()
        except FileNotFoundError:
            return None
        except ValueError as error:  # a name with a zero byte
            raise OutputError(f"cannot write {path}: {error}; choose another output") from error
    if stat.S_ISDIR(there.st_mode):
        raise OutputError(f"{path} is a folder; name a file to write")
    if not stat.S_ISREG(there.st_mode):
        raise OutputError(f"{path} is not a regular file, so it is not replaced; choose another output")
    return there


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the system about an output into one line.

    Raises:
        OutputError: In place of an `OSError`, such as that of a full disk.
    """
    try:
        yield
    except OSError as error:
        room = "make room or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise OutputError(f"cannot write {path}: {error.strerror or error}; {room}choose another output") from error


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder with those above it where they are missing; those made that are empty when the block ends are gone again."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # the first that is not empty
            for each in missing:
                each.rmdir()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; move it to `path` when the block ends well, remove it when it does not.

    Through a link its target is replaced. The mode is that of the file which was there, else what the umask leaves. To a device such as
    /dev/null what was written is copied.

    Raises:
        OutputError: It cannot be written: also in place of an `OSError` in the block, such as that of a full disk.
    """
    if is_stream(path):
        import tempfile

        with writing(path), tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part"
            yield part
            with path.open("ab") as stream:
                stream.write(part.read_bytes())
        return
    earlier = _file_at(path)
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name[:50]}.{uuid.uuid4().hex[:8]}.part")  # a character takes at most four bytes
    with writing(path), _made(target.parent):
        try:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            mode = stat.S_IMODE((earlier or part.stat()).st_mode)
            yield part
            part.chmod(mode)  # libraries that write safetensors leave 0600
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Have a folder, made where it is missing, for this run alone while the block lasts; the system frees it if the process dies.

    A folder that was made here and is empty at the end is gone again.

    Raises:
        OutputError: Another run has it, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    with ExitStack() as stack:
        try:
            stack.enter_context(_made(folder))
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


def write_text(path: str | Path, text: str, *, force: bool = False) -> Path:
    """Write `text` to `path` atomically; what UTF-8 cannot hold (bytes of a file's name that are no text) becomes `?`.

    Raises:
        OutputError: `path` exists and `force` is not set, or it cannot be written.
    """
    path = Path(path)
    refuse_existing(path, force)
    with replacing(path) as part:
        part.write_bytes(text.encode("utf-8", errors="replace"))
    return path


def write_json(path: str | Path, value: dict[str, Any], *, force: bool = False) -> Path:
    """Write a JSON object to `path` atomically; NaN and infinity are refused, since JSON has neither."""
    return write_text(path, json_text(value), force=force)


def json_text(value: dict[str, Any]) -> str:
    """A JSON object as the files of this package hold it.

    Raises:
        OutputError: It holds a number that JSON or Python cannot write: NaN, infinity, or one of thousands of digits.
    """
    try:
        return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise OutputError(f"the result holds a number that JSON cannot ({error}); look at the records and rates") from error


def read_json(path: str | Path, error: type[LayercardError], what: str) -> dict[str, Any]:
    """Read a JSON object from `path`.

    Args:
        path: The file.
        error: The exception class for a file that is missing, truncated or not JSON object.
        what: What the file should be ("card", "placement"), for the message.
    """
    return parse_json(read_bytes(path, error, what), str(path), error, what)


def read_bytes(path: str | Path, error: type[LayercardError], what: str) -> bytes:
    """The bytes of a file, or an `error` that says in one line why they cannot be had; `what` says what the file should be."""
    path = Path(path)
    check_file(path, error, what)
    try:
        return path.read_bytes()
    except OSError as problem:
        raise error(f"{path}: {problem.strerror or problem}; name a readable {what}") from None


def check_file(path: Path, error: type[LayercardError], what: str) -> None:
    """Refuse what cannot be read as a file, without opening it: a pipe that nobody writes to would be waited for."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise error(f"{path}: no such file; name an existing {what}") from None
    except (OSError, ValueError) as problem:
        raise error(f"{path}: {getattr(problem, 'strerror', None) or problem}; name a readable {what}") from None
    if stat.S_ISDIR(mode):
        raise error(f"{path} is a folder; name the {what} file in it")
    if (not stat.S_ISREG(mode) and not is_stream(path)) or stat.S_ISCHR(mode):
        raise error(f"{path} is not a regular file; name a {what}")


def shown(value: object, limit: int = 60) -> str:
    """A value as a message names it: on one line, and not longer than a line.

    >>> shown("a/1"), len(shown([0] * 1000))
    ("'a/1'", 60)
    """
    try:
        text = repr(value)
    except ValueError:
        text = "a number of thousands of digits"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def parse_json(data: bytes, source: str, error: type[LayercardError], what: str) -> dict[str, Any]:
    """The JSON object in `data`, UTF-8; `source` names it in messages, the rest is as in `read_json`."""
    try:
        text = data.decode("utf-8")
        value = json.loads(text)
        if "\\ud" in text.lower():  # halves of pairs can be escaped, and then neither written nor printed
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as problem:
        raise error(
            f"{source} is not a whole {what} (line {problem.lineno}: {problem.msg}); it may be truncated, so make it again"
        ) from None
    except RecursionError:
        raise error(f"{source} is not a whole {what} (nested too deeply); make it again") from None
    except UnicodeDecodeError as problem:
        raise error(f"{source} is not a whole {what} (byte {problem.start} is not UTF-8); make it again, or save it as UTF-8") from None
    except UnicodeEncodeError:
        raise error(f"{source} is not a whole {what} (a text in it has half of a surrogate pair); make it again") from None
    except ValueError:  # Python's own limit for whole numbers
        raise error(f"{source} is not a whole {what} (a number in it has thousands of digits); make it again") from None
    if not isinstance(value, dict):
        raise error(f"{source} holds no {what}: expected a JSON object, found {type(value).__name__}")
    return value
