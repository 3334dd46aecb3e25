"""What commands share at the terminal: progress on stderr, results on stdout."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from layercard.processes import is_first


def out() -> Console:
    """Where results are printed; text is shown as it is, never read as markup."""
    return Console(file=sys.stdout, markup=False, emoji=False, highlight=False)


def emit_json(value: dict[str, Any]) -> None:
    """Print a JSON object, and nothing else, on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


class Level(StrEnum):
    """Values of `--log-level`."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class _ToStderr(logging.Handler):
    """Writes a line to what stderr is at the moment: where bars are drawn, that puts it above them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write `level: message`, in one line."""
        sys.stderr.write(f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}\n")


@contextmanager
def logging_to_stderr(level: str) -> Iterator[None]:
    """Show what the library logs from this level on; of several processes, what the first one does."""
    logger, handler = logging.getLogger("layercard"), _ToStderr() if is_first() else logging.NullHandler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


PROGRESS = "LAYERCARD_PROGRESS"
"""Environment variable; with the value `lines` progress is written for programs: a tab-separated line `progress PHASE DONE TOTAL`."""


class Pace:
    """How long the rest of a phase takes, judged by the parts that were done while this watched.

    A part's time is a mean over them in which each counts nine tenths of the next, so that a slow beginning is soon forgotten and one slow
    part moves little. What was done before the first call, by an interrupted run, says nothing about time and counts nothing.
    """

    FADING = 0.9

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._done: int | None = None
        self._total = 0
        self._at = self._seconds = self._parts = 0.0

    def update(self, done: int, total: int) -> None:
        """`done` of `total` parts are behind us now."""
        now = self._clock()
        if self._done is not None and done > self._done:
            new = done - self._done
            kept = self.FADING**new
            counted = (1 - kept) / (1 - self.FADING)
            self._seconds = kept * self._seconds + counted * (now - self._at) / new
            self._parts = kept * self._parts + counted
        if done != self._done:
            self._at = now
        self._done, self._total = done, total

    def remaining(self) -> float | None:
        """Seconds; they run down while a part is at work, and stand where it takes longer than others. `None`: nothing to judge by."""
        if self._done is None or not self._parts:
            return 0.0 if self._done is not None and self._done >= self._total else None
        each, left = self._seconds / self._parts, self._total - self._done
        return max(each * left - (self._clock() - self._at), each * (left - 1), 0.0)


class _Remaining(ProgressColumn):
    """The remaining time of a phase; a dash until two parts are known."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """As `h:mm:ss`."""
        seconds = task.fields["pace"].remaining()
        return Text("-:--:--" if seconds is None else str(timedelta(seconds=math.ceil(seconds))), style="progress.remaining")


class Display:
    """Progress bars on stderr, one for each phase; it is itself the callback that the library calls.

    A phase that starts over (its count falls) gets a new bar. Where stderr is no terminal, nothing is drawn, and of
    several processes only the first draws.
    """

    def __init__(self) -> None:
        self._lines = os.environ.get(PROGRESS) == "lines"
        columns = (TextColumn("{task.description:<16}"), BarColumn(30), TaskProgressColumn(), TimeElapsedColumn(), _Remaining())
        console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        self._bars = Progress(*columns, console=console, disable=not (console.is_terminal and is_first()))
        self._tasks: dict[str, tuple[TaskID, int, Pace]] = {}

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` parts of a phase are behind us."""
        if self._lines:
            sys.stderr.write(f"progress\t{phase}\t{done}\t{total}\n")
            sys.stderr.flush()
        known = self._tasks.get(phase)
        if known is None or done < known[1]:
            pace = Pace()
            task = self._bars.add_task(phase, total=total, pace=pace)
        else:
            task, _, pace = known
        pace.update(done, total)
        self._tasks[phase] = (task, done, pace)
        self._bars.update(task, completed=done, total=total)
