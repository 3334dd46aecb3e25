"""What commands share at the terminal: progress on stderr, results on stdout."""

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from layercard.commands.remaining import Pace, Whole
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


class _Remaining(ProgressColumn):
    """The remaining time of a phase, or of the command; a dash until there is something to judge by."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """As `h:mm:ss`."""
        seconds = task.fields["pace"].remaining()
        return Text("-:--:--" if seconds is None else str(timedelta(seconds=math.ceil(seconds))), style="progress.remaining")


class Display:
    """Progress bars on stderr, one for each phase; it is itself the callback that the library calls.

    A phase that starts over (its count falls) gets a new bar. Where it is known how much work the phases are (`expect`), one more bar
    is of the whole command. Where stderr is no terminal, nothing is drawn, and of several processes only the first draws.
    """

    def __init__(self) -> None:
        self._lines = os.environ.get(PROGRESS) == "lines"
        columns = (TextColumn("{task.description:<16}"), BarColumn(30), TaskProgressColumn(), TimeElapsedColumn(), _Remaining())
        console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        self._bars = Progress(*columns, console=console, disable=not (console.is_terminal and is_first()))
        self._tasks: dict[str, tuple[TaskID, int, Pace]] = {}
        self._whole: tuple[TaskID, Whole] | None = None

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._whole is not None and kind is None:
            self._bars.update(self._whole[0], completed=1.0)
        self._bars.stop()

    def expect(self, work: Mapping[str, float]) -> None:
        """How much work the phases of the command are, in any unit and in their order: one bar, `all`, shows the time to its end."""
        whole = Whole(work)
        self._whole = self._bars.add_task("all", total=1.0, pace=whole), whole

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
        if self._whole is not None:
            bar, whole = self._whole
            whole.paces[phase] = pace
            self._bars.update(bar, completed=whole.share)
