"""Profiling from the app: `layercard profile` in a process of its own, with its progress, and ended whole or not at all.

The card is written to a folder that goes away with the job, and moved into the folder of cards when the process has ended well.
"""

import contextlib
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layercard.errors import LayercardError, OutputError
from layercard.files import replacing

PATIENCE = 5.0
"""Seconds that a process gets to end after it was asked to."""
RUNNING, DONE, FAILED, CANCELLED = "running", "done", "failed", "cancelled"


@dataclass(frozen=True)
class Progress:
    """How far a job is: its phase, how many of the phase's parts are done (of 0 where that is not known), and the phases behind it."""

    state: str
    phase: str = "start"
    done: int = 0
    total: int = 0
    finished: tuple[str, ...] = ()
    message: str = ""  # what a failed job said, or where the card of a finished one lies


class Job:
    """A command in a process of its own that writes one file, `made`, in a folder of its own that is removed at the end.

    The file goes to `target` when the process ends well; a number is added where there is such a file already.
    """

    def __init__(self, command: Sequence[str], made: Path, target: Path) -> None:
        self._made, self._target = made, target
        self._lock, self._cancelled = threading.Lock(), False
        self.progress = Progress(RUNNING)
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "LAYERCARD_PROGRESS": "lines", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.progress.state == RUNNING

    def wait(self, seconds: float | None = None) -> Progress:
        """How far it is when it has ended, or after so many seconds."""
        self._reader.join(seconds)
        return self.progress

    def cancel(self) -> Progress:
        """End the process and all that it started; nothing of the card stays."""
        with self._lock:
            self._cancelled = True
        for sign in (signal.SIGINT, signal.SIGKILL):
            if self.running:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, sign)
                self._reader.join(PATIENCE)
        return self.progress

    def _follow(self) -> None:
        """Read what the process says until it ends, then take its card or say what went wrong."""
        last = ""
        try:
            with self._process:
                for line in self._process.stderr or ():
                    last = line.strip() or last
                    self.progress = follow(self.progress, line)
                status = self._process.wait()
            with self._lock:
                if self._cancelled:
                    self.progress = Progress(CANCELLED, message="cancelled; no card was written")
                elif status != 0 or not self._made.is_file():
                    problem = last.removeprefix("error: ")[:400] or f"the process ended with status {status}"
                    self.progress = Progress(FAILED, message=problem)
                else:
                    # Put the card at its target, or beside it where there is one already.
                    path, number = self._target, 1
                    while path.exists():
                        number += 1
                        path = self._target.with_name(f"{self._target.name.removesuffix('.card.json')}-{number}.card.json")
                    with replacing(path) as part:
                        shutil.copyfile(self._made, part)
                    self.progress = Progress(DONE, "done", 1, 1, self.progress.finished, str(path))
        except (LayercardError, OSError) as error:
            self.progress = Progress(FAILED, message=str(error))
        finally:
            shutil.rmtree(self._made.parent, ignore_errors=True)


def follow(before: Progress, line: str) -> Progress:
    """The progress after one more line of the process; lines that tell none change nothing.

    >>> follow(Progress("running", "load", 1, 1), "progress\\tfit\\t2\\t5").phase
    'fit'
    """
    mark, *rest = line.rstrip("\n").split("\t")
    if mark != "progress" or len(rest) != 3 or not all(part.isdigit() for part in rest[1:]):
        return before
    phase, finished = rest[0][:60], before.finished
    if before.phase not in (phase, "start", *finished):
        finished = (*finished, before.phase)
    return Progress(RUNNING, phase, int(rest[1]), int(rest[2]), finished)


def profile_job(model: Path, data: str, records: int, cards: Path, work: Path | None = None) -> Job:
    """A job that profiles a model and puts the card into the folder `cards`; half a card lies in a folder of its own in `work`.

    Raises:
        OutputError: The folder of cards cannot be written.
    """
    if not os.access(cards, os.W_OK):
        raise OutputError(f"{cards} cannot be written; start the app with --cards on a folder of yours")
    made = Path(tempfile.mkdtemp(prefix="profile-", dir=work)) / "card.json"
    command = [sys.executable, "-m", __name__, "profile", str(model), "--data", data, "--records", str(records), "--probe", "step"]
    return Job([*command, "-o", str(made)], made, cards / card_name(str(model), data))


def card_name(model: str, data: str) -> str:
    """What the new card is called: the names of model and data, letters, digits, dots and dashes only.

    >>> card_name("models/SmolLM2 135M", "e2e/train.jsonl")
    'SmolLM2-135M-train.card.json'
    """
    parts = [Path(model.rstrip("/")).name.removesuffix(".gguf"), Path(data).stem]
    clean = [re.sub(r"[^\w.-]+", "-", part).strip(".-")[:40] for part in parts]
    return f"{'-'.join(part for part in clean if part) or 'model'}.card.json"


def _end_with_the_app() -> None:
    """Wait for the end of the pipe that the app holds, which comes with the app's own, a SIGKILL too; then end this process group."""
    os.read(0, 1)
    shutil.rmtree(Path(sys.argv[-1]).parent, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":  # the job itself: `layercard` with an eye on the app
    threading.Thread(target=_end_with_the_app, daemon=True).start()
    runpy.run_module("layercard", run_name="__main__", alter_sys=True)
