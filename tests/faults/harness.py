"""Runs commands, kills them at random points and starts them again until they are done."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

WARM = Path(__file__).with_name("warm.py")
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
"""How a command ends that gets one of these."""


@dataclass
class Warm:
    """The process that forks commands (`warm.py`)."""

    folder: Path
    process: Any = None
    logs: int = 0

    def __enter__(self) -> "Warm":
        with (self.folder / "warm.log").open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(WARM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        assert json.loads(self.process.stdout.readline()) == {"ready": True}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=60)

    def _ask(self, value: dict[str, Any]) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        return said

    def start(self, arguments: list[str]) -> tuple[int, Path]:
        """Start a command; gives its process id and the file of what it says."""
        self.logs += 1
        log = self.folder / f"log-{self.logs}.txt"
        return int(self._ask({"arguments": arguments, "log": str(log)})["pid"]), log

    def wait(self, pid: int) -> int:
        """The exit status of a command, negative for a signal."""
        return int(self._ask({"wait": pid})["status"])

    def run(self, arguments: list[str]) -> tuple[int, str]:
        """Exit status of a command that nobody disturbs, and what it said."""
        pid, log = self.start(arguments)
        status = self.wait(pid)
        return status, log.read_text()


@dataclass
class Killings:
    """Kills a command again and again until it is done.

    Attributes:
        warm: Where commands run.
        seconds: How long the command takes undisturbed; kills come at a random moment before that.
        seed: Of moments and signals.
        kills: How many kills hit a running command so far, by signal.
    """

    warm: Warm
    seconds: float
    seed: int = 0
    kills: dict[str, int] = field(default_factory=lambda: {number.name: 0 for number in SIGNALS})

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    @property
    def total(self) -> int:
        return sum(self.kills.values())

    def until_done(self, arguments: list[str], most: int) -> None:
        """Kill the command at most so many times, then let it end."""
        for _ in range(most):
            pid, log = self.warm.start(arguments)
            number = self.random.choice(list(SIGNALS))
            time.sleep(self.random.uniform(0.0, self.seconds))
            os.kill(pid, number)  # a child that has ended is there until it is waited for
            status, said = self.warm.wait(pid), log.read_text()
            ignored = status == 0 and "Exception ignored in" in said  # the signal fell into a destructor: Python goes on, to the end
            assert ignored or "Traceback" not in said, said
            if status == 0 or (self.total and status == 2 and "exists already" in said):  # the kill before came after the result
                return
            assert status in (SIGNALS[number], -number), f"{number.name}: {status}: {said}"
            self.kills[number.name] += 1
        status, said = self.warm.run(arguments)
        assert status == 0 or "exists already" in said, said
