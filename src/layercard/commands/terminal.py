"""What commands share at the terminal: progress on stderr, results on stdout."""

import json
import os
import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from layercard.processes import is_first


def out() -> Console:
    """Where results are printed; text is shown as it is, never read as markup."""
    return Console(file=sys.stdout, markup=False, emoji=False, highlight=False)


def emit_json(value: dict[str, Any]) -> None:
    """Print a JSON object, and nothing else, on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


PROGRESS = "LAYERCARD_PROGRESS"
"""Environment variable; with the value `lines` progress is written for programs: a tab-separated line `progress PHASE DONE TOTAL`."""


class Display:
    """Progress bars on stderr, one for each phase; it is itself the callback that the library calls.

    A phase that starts over (its count falls) gets a new bar. Where stderr is no terminal, nothing is drawn, and of
    several processes only the first draws.
    """

    def __init__(self) -> None:
        self._lines = os.environ.get(PROGRESS) == "lines"
        columns = (TextColumn("{task.description:<16}"), BarColumn(30), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        self._bars = Progress(*columns, console=console, disable=not (console.is_terminal and is_first()))
        self._tasks: dict[str, tuple[TaskID, int]] = {}

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
        task, before = self._tasks.get(phase, (None, 0))
        if task is None or done < before:
            task = self._bars.add_task(phase, total=total)
        self._tasks[phase] = (task, done)
        self._bars.update(task, completed=done, total=total)
