"""Time and memory of the phases of a run: measured here, kept in its record, and told to the log."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Phase:
    """What one phase took.

    Attributes:
        name: As progress names it.
        seconds: From beginning to end.
        resident_peak_bytes: The most main memory that the process has held up to the end of the phase, those before it included:
            where it is more than that of the phase before, this phase needed it. `None` where the system does not tell.
        device_peak_bytes: The most GPU memory that tensors took during the phase; `None` without a GPU.
    """

    name: str
    seconds: float
    resident_peak_bytes: int | None
    device_peak_bytes: int | None = None


class Phases:
    """Measures one phase after another; each is told to the log `layercard.phases` as it ends.

    >>> phases = Phases()
    >>> with phases.phase("load"):
    ...     pass
    >>> [phase["name"] for phase in phases.to_json()]
    ['load']

    Args:
        clock: Gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.found: list[Phase] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside; a phase that raises is not kept."""
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        started = self.clock()
        yield
        device_peak = None
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            device_peak = torch.cuda.max_memory_allocated()
        self._add(Phase(name, self.clock() - started, resident_peak(), device_peak))

    def _add(self, phase: Phase) -> None:
        self.found.append(phase)
        resident = "unknown" if phase.resident_peak_bytes is None else f"{phase.resident_peak_bytes / 2**20:,.0f} MiB"
        device = "" if phase.device_peak_bytes is None else f", GPU {phase.device_peak_bytes / 2**20:,.0f} MiB"
        logging.getLogger(__name__).info("%s: %.2f s, memory up to %s%s", phase.name, phase.seconds, resident, device)

    def to_json(self) -> list[dict[str, Any]]:
        """The phases in their order, each as a JSON object."""
        return [asdict(phase) for phase in self.found]


def resident_peak() -> int | None:
    """The most main memory that this process has held since it began, in bytes; `None` where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
