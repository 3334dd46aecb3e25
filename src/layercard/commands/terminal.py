"""What commands share at the terminal: progress on stderr, results on stdout."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from layercard.processes import is_first

PROGRESS = "LAYERCARD_PROGRESS"
"""Environment variable; with the value `lines` progress is written for programs: a tab-separated line `progress PHASE DONE TOTAL`."""


def out() -> Console:
    """Where results are printed; text is shown as it is, never read as markup."""
    return Console(file=sys.stdout, markup=False, emoji=False, highlight=False)


def emit_json(value: dict[str, Any]) -> None:
    """Print a JSON object, and nothing else, on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def show_result(
    value: dict[str, Any], as_json: bool, view: RenderableType, *, wrote: Path | str | None = None, then: str | None = None
) -> None:
    """Print what a command found: as JSON and nothing else, or drawn, with the output that was written and the command that comes next."""
    if as_json:
        emit_json(value)
        return
    console = out()
    console.print(view, soft_wrap=isinstance(view, str))
    remarks = [f"wrote {wrote}" if wrote else "", f"next: {then}" if then else ""]
    if any(remarks):
        console.print("; ".join(filter(None, remarks)), style="dim", soft_wrap=True)


Level = Literal["debug", "info", "warning", "error"]
"""Values of `--log-level`."""


class _ToStderr(logging.Handler):
    """Writes a line to what stderr is at the moment: where bars are drawn, that puts it above them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write `level: message`, in one line."""
        sys.stderr.write(f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}\n")


@contextmanager
def logging_to_stderr(level: Level) -> Iterator[None]:
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


class Display:
    """Progress bars on stderr, one for each phase, with the time that the rest of it takes; it is the callback that the library calls.

    A phase that starts over (its count falls) gets a new bar. Where stderr is not a terminal nothing is drawn, and of several processes
    only the first draws.
    """

    def __init__(self) -> None:
        self._lines = os.environ.get(PROGRESS) == "lines"
        self._tasks: dict[str, TaskID] = {}
        columns = (TextColumn("{task.description:<16}"), BarColumn(30), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        # Parts of a phase may take minutes, so speed is judged over the last ten and not, as usual, over half a minute.
        self.bars = Progress(*columns, console=console, disable=not (console.is_terminal and is_first()), speed_estimate_period=600)

    def __enter__(self) -> "Display":
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that `done` of `total` parts of a phase are behind us."""
        if self._lines:
            sys.stderr.write(f"progress\t{phase}\t{done}\t{total}\n")
            sys.stderr.flush()
        task = self._tasks.get(phase)
        if task is None or done < self.bars.tasks[task].completed:
            # What an interrupted run did counts as done from the start, so that it does not flatter the speed.
            self._tasks[phase] = self.bars.add_task(phase, total=total, completed=done)
        else:
            self.bars.update(task, completed=done, total=total)
