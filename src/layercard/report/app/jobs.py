"""Work that the app starts: a layercard command in a process of its own, with one bar, and ended whole or not at all.

What the command writes lies in a folder that goes away with the job, and is moved into the folder of cards when the process has ended well.
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
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from layercard.errors import LayercardError, OutputError
from layercard.files import replacing

PATIENCE = 1.0
"""Seconds that a process gets to end after it was asked to."""
RUNNING, CANCELLING, DONE, FAILED, CANCELLED = "running", "cancelling", "done", "failed", "cancelled"
PHASES = {
    "fetch": ("fetching the model", 1),
    "load": ("loading the model", 3),
    "loss before": ("measuring the loss before", 4),
    "time a few steps": ("timing a few steps", 5),
    "fit pass": ("measuring every layer", 20),
    "steps": ("computing the step of each layer", 3),
    "held-out pass": ("measuring on held-out records", 8),
    "entries": ("storing what enters each layer", 3),
    "step probe": ("trying the step of each layer", 12),
    "cost": ("timing the layers", 4),
    "short trainings": ("short trainings of the candidates", 25),
    "train": ("training", 100),
    "loss after": ("measuring the loss after", 4),
}
"""What a command is doing, in words, in order, and how long it takes beside the others, roughly; a job has some of them."""
KINDS = {
    "profile": ("load", "fit pass", "steps", "held-out pass", "entries", "step probe", "cost"),
    "run": tuple(PHASES),
    "train": ("load", "loss before", "train", "loss after"),
}
"""The phases of each command that the app starts."""


@dataclass(frozen=True)
class Progress:
    """How far a job is: the share of all its work that is behind it, as far as its own words tell, and what it does now."""

    state: str
    share: float = 0.0  # 0 to 1; it never falls
    doing: str = "starting"
    said: tuple[str, ...] = ()  # what it decided, in its own lines
    message: str = ""  # what a failed job said, or where the result of a finished one lies
    seconds: float = 0.0
    raced: float = 0.0  # steps of short trainings that are done
    to_race: float = 0.0  # and all of them, once the plan says so


class Job:
    """A command in a process of its own that writes `made`, a file or folder, in a folder of its own that is removed at the end.

    What it made goes to `target` when the process ends well; a number is added where there is such a file already.
    """

    def __init__(self, kind: str, command: Sequence[str], made: Path, target: Path) -> None:
        self.kind, self._made, self._target = kind, made, target
        self._lock, self._cancelled, self._started = threading.Lock(), False, time.monotonic()
        self._progress = Progress(RUNNING)
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
        """Whether its process has not ended yet."""
        return self._reader.is_alive()

    @property
    def progress(self) -> Progress:
        """How far it is; a job that was cancelled says so at once, before its process has ended."""
        now = self._progress
        if now.state != RUNNING:
            return now
        return replace(now, state=CANCELLING if self._cancelled else RUNNING, seconds=time.monotonic() - self._started)

    def wait(self, seconds: float | None = None) -> Progress:
        """How far it is when it has ended, or after so many seconds."""
        self._reader.join(seconds)
        return self.progress

    def cancel(self) -> Progress:
        """End the process and all that it started, without waiting for it; nothing that it wrote stays."""
        with self._lock:
            first, self._cancelled = not self._cancelled, True
        if first:
            threading.Thread(target=self._end, daemon=True).start()
        return self.progress

    def _end(self) -> None:
        for sign in (signal.SIGINT, signal.SIGKILL):
            if self.running:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, sign)
                self._reader.join(PATIENCE)

    def _follow(self) -> None:
        """Read what the process says until it ends, then take what it made or say what went wrong."""
        last = ""
        try:
            with self._process:
                for line in self._process.stderr or ():
                    last = line.strip() or last
                    self._progress = follow(self._progress, line, self.kind)
                status = self._process.wait()
            seconds, said = time.monotonic() - self._started, self._progress.said
            with self._lock:
                if self._cancelled:
                    self._progress = Progress(CANCELLED, message="cancelled; nothing of it was kept")
                elif status != 0 or not self._made.exists():
                    problem = last.removeprefix("error: ")[:400] or f"the process ended with status {status}"
                    self._progress = Progress(FAILED, message=problem)
                else:
                    self._progress = Progress(DONE, 1.0, "done", said, str(self._take()), seconds)
        except (LayercardError, OSError) as error:
            self._progress = Progress(FAILED, message=str(error))
        finally:
            shutil.rmtree(self._made.parent, ignore_errors=True)

    def _take(self) -> Path:
        """Put what was made at its target, or beside it where there is such a file already."""
        path, number, ending = self._target, 1, ".card.json" if self._target.name.endswith(".card.json") else ""
        while path.exists():
            number += 1
            path = self._target.with_name(f"{self._target.name.removesuffix(ending)}-{number}{ending}")
        if self._made.is_dir():
            shutil.move(self._made, path)
        else:
            with replacing(path) as part:
                shutil.copyfile(self._made, part)
        return path


def follow(before: Progress, line: str, kind: str) -> Progress:
    """The progress after one more line of the process; lines that tell none change nothing.

    >>> follow(Progress(RUNNING), "progress\\tfit pass\\t1\\t2", "profile").doing
    'measuring every layer, 1 of 2'
    """
    mark, *rest = line.rstrip("\n").split("\t")
    if mark != "progress":
        if not re.match(r"(data|search|train|chosen): |no held-out records", line):
            return before
        race = re.search(r"race of (\d+) candidates, (\d+) steps each(?:, two of them again for (\d+))?", line)
        candidates, steps, longer = (int(number or 0) for number in race.groups()) if race else (0, 0, 0)
        # All layers run at three learning rates, the other candidates at one.
        to_race = before.to_race or (candidates + 2.0) * steps + 2 * longer
        return replace(before, said=(*before.said, line.strip()[:300]), to_race=to_race)
    if len(rest) != 3 or not all(part.isdigit() for part in rest[1:]):
        return before
    phase, done, total = rest[0], int(rest[1]), max(int(rest[2]), 1)
    raced = before.raced
    if kind == "run" and phase in ("train", "race trials") and not any(text.startswith("chosen: ") for text in before.said):
        if phase == "race trials" or not before.to_race:  # one more is done: its steps were counted as they came
            return before
        raced += 1
        phase, done, total = "short trainings", min(int(raced), int(before.to_race)), int(before.to_race)
    phases = KINDS[kind]
    if phase not in phases:
        return before
    weights = [PHASES[name][1] for name in phases]
    place = phases.index(phase)
    share = (sum(weights[:place]) + weights[place] * min(1.0, done / total)) / sum(weights)
    unit = " steps" if phase in ("train", "short trainings") else ""
    counted = f", {done} of {total}{unit}" if total > 1 else ""
    return replace(before, share=max(before.share, share), doing=f"{PHASES[phase][0]}{counted}", raced=raced)


def start(kind: str, model: Path, data: str, records: int, folder: Path, work: Path | None, *, valid: str = "", placement: str = "") -> Job:
    """A job of one of `KINDS`; what it makes goes into `folder`, and lies in a folder of its own in `work` until it is whole.

    Args:
        kind: `profile` makes a card; `run` chooses and trains; `train` trains the layers of a placement.
        model: A model of the given folders.
        data: A data file, or `synthetic`.
        records: Records to take of it.
        folder: Where the result goes.
        work: Where half-made results lie; the system's folder for temporary files when not given.
        valid: Held-out data; empty for none.
        placement: The JSON text of the placement to train.

    Raises:
        OutputError: The folder cannot be written.
    """
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder} cannot be written; start the app with --cards on a folder of yours")
    inside = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=work))
    made = inside / {"profile": "card.json", "run": "run", "train": "adapter"}[kind]
    options = ["--probe", "step"] if kind == "profile" else ["--valid", valid] if valid else []
    if kind == "train":
        (inside / "placement.json").write_text(placement, encoding="utf-8")
        options += ["--placement", str(inside / "placement.json")]
    words = [kind, str(model), "--data", data, "--records", str(records), *options, "-o", str(made)]
    ending = {"profile": ".card.json", "run": "-run", "train": "-adapter"}[kind]
    return Job(kind, [sys.executable, "-m", __name__, *words], made, folder / result_name(str(model), data, ending))


def result_name(model: str, data: str, ending: str) -> str:
    """What a result is called: the names of model and data, letters, digits, dots and dashes only.

    >>> result_name("models/SmolLM2 135M", "e2e/train.jsonl", ".card.json")
    'SmolLM2-135M-train.card.json'
    """
    parts = [Path(model.rstrip("/")).name.removesuffix(".gguf"), Path(data).stem]
    clean = [re.sub(r"[^\w.-]+", "-", part).strip(".-")[:40] for part in parts]
    return f"{'-'.join(part for part in clean if part) or 'model'}{ending}"


def _end_with_the_app() -> None:
    """Wait for the end of the pipe that the app holds, which comes with the app's own, a SIGKILL too; then end this process group."""
    os.read(0, 1)
    shutil.rmtree(Path(sys.argv[-1]).parent, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":  # the job itself: `layercard` with an eye on the app
    threading.Thread(target=_end_with_the_app, daemon=True).start()
    runpy.run_module("layercard", run_name="__main__", alter_sys=True)
