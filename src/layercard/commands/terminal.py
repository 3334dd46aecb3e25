"""What commands share at the terminal: progress on stderr, results on stdout."""

import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from rich.console import Console, ConsoleOptions, RenderableType, RenderHook
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment

from layercard.errors import visible
from layercard.files import json_text, write_json
from layercard.processes import is_first

PROGRESS = "LAYERCARD_PROGRESS"
"""Environment variable; with the value `lines` progress is written for programs: a tab-separated line `progress PHASE DONE TOTAL`."""


class _Escaping(RenderHook):
    """What is printed, with the characters as escapes that a terminal would obey; rich's own colours stay."""

    def process_renderables(self, renderables: list[Any]) -> list[Any]:
        """Wrap each of them."""
        return [_Escaped(each) for each in renderables]


class _Escaped(NamedTuple):
    renderable: Any

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def out() -> Console:
    """Where results are printed; text is shown as it is, never read as markup, and nothing of it steers the terminal."""
    console = Console(file=sys.stdout, markup=False, emoji=False, highlight=False)
    console.push_render_hook(_Escaping())
    return console


def say(line: str) -> None:
    """Write one line on stderr."""
    sys.stderr.write(f"{visible(' '.join(line.splitlines()))}\n")


def emit_json(value: dict[str, Any]) -> None:
    """Print a JSON object, and nothing else, on stdout."""
    sys.stdout.write(visible(json_text(value)))  # the escapes are those of JSON, so that nothing else is read from it


def command_line(*words: object) -> str:
    """A command line to copy and run."""
    return shlex.join(["layercard", *map(str, words)])


def show_result(
    result: Any,
    as_json: bool,
    view: RenderableType,
    *,
    output: Path | None = None,
    force: bool = False,
    wrote: Path | str | None = None,
    then: Sequence[object] = (),
) -> None:
    """Print a command's result, a record or a JSON object: as JSON and nothing else, or drawn, with what was written and what comes next.

    With `output` it is saved there first.
    """
    value = result if isinstance(result, dict) else result.to_json()
    if output is not None:
        wrote = write_json(output, value, force=force)
    if as_json:
        emit_json(value)
        return
    console = out()
    if view != "":
        console.print(view, soft_wrap=isinstance(view, str))
    remarks = [f"wrote {wrote}" if wrote else "", f"next: {command_line(*then)}" if then else ""]
    if any(remarks):
        console.print("; ".join(filter(None, remarks)), style="dim", soft_wrap=True)


Level = Literal["debug", "info", "warning", "error"]
"""Values of `--log-level`."""


class _ToStderr(logging.Handler):
    """Writes a line to what stderr is at the moment: where bars are drawn, that puts it above them."""

    def __init__(self) -> None:
        super().__init__()
        self._warned: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write `level: message`, in one line; the same warning once, since a model is checked at several steps of a command."""
        line = f"{record.levelname.lower()}: {record.getMessage()}"
        if record.levelno < logging.WARNING or line not in self._warned:
            say(line)
        if record.levelno >= logging.WARNING:
            self._warned.add(line)


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
            sys.stderr.write(f"progress\t{visible(phase)}\t{done}\t{total}\n")
            sys.stderr.flush()
        task = self._tasks.get(phase)
        if task is None or done < self.bars.tasks[task].completed:
            # What an interrupted run did counts as done from the start, so that it does not flatter the speed.
            self._tasks[phase] = self.bars.add_task(visible(phase), total=total, completed=done)
        else:
            self.bars.update(task, completed=done, total=total)
