"""Time and memory of the phases of a run: measured here, kept in its record, and told to the log.

Peak memory of a stretch of work, such that equal work gives equal numbers whatever the process did before.
"""

import logging
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# ---- phases


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

    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock  # gives seconds
        self.finished: list[Phase] = []

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
        phase = Phase(name, self.clock() - started, resident_peak(), device_peak)
        self.finished.append(phase)
        peaks = {"memory up to": phase.resident_peak_bytes, "GPU": device_peak}
        told = [f"{name}: {phase.seconds:.2f} s", *(f"{of} {peak / 2**20:,.0f} MiB" for of, peak in peaks.items() if peak is not None)]
        logging.getLogger(__name__).info(", ".join(told))

    def to_json(self) -> list[dict[str, Any]]:
        """The phases in their order, each as a JSON object."""
        return [asdict(phase) for phase in self.finished]


def resident_peak() -> int | None:
    """The most main memory that this process has held since it began, in bytes; `None` where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- memory


class PeakMemory:
    """Bytes of tensors made after `start` and alive together at the worst moment before `stop`, in `bytes`.

    On CUDA the allocator counts them; elsewhere `LiveTensors` does. The growth of the process's resident set is no good measure: the C
    library keeps freed blocks, so that one and the same training step of a 135M model grew it by 150 to 350 MB, depending on what ran
    before. With every freed block given back at once it grew by 583 MB where this count says 636 MB (all layers) and by 125 MB for
    166 MB (two layers); what is missing are pages of zeros that nothing wrote to.

    >>> peak = PeakMemory(torch.device("cpu"))
    >>> peak.start()
    >>> a = torch.ones(1000)
    >>> b = a + 1
    >>> del a, b
    >>> c = torch.ones(1000)
    >>> peak.stop()
    >>> peak.bytes
    8000
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._live: LiveTensors | None = None
        self._before: int | None = None

    def start(self) -> None:
        """Count from here on; tensors that exist already are not counted."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._live = LiveTensors()
            self._live.__enter__()

    def stop(self) -> None:
        """Set `bytes`; without a `start` before it does nothing."""
        if self._before is not None:
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            self._before = None
        elif self._live is not None:
            self._live.__exit__(None, None, None)
            self.bytes, self._live = self._live.peak, None


class LiveTensors(TorchDispatchMode):
    """Counts the storages that operations make, forward and backward, until nothing refers to them: `now` and `peak`, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; what it takes in and was not made under this mode is older and counts nothing."""
        kwargs = kwargs or {}
        self._note((args, *kwargs.values()), made=False)
        result = func(*args, **kwargs)
        self._note((result,), made=True)
        return result

    def _note(self, values: Iterable[Any], *, made: bool) -> None:
        for tensor in _tensors(values):
            storage = tensor.untyped_storage()
            if (key := id(storage)) not in self._known:
                size = storage.nbytes() if made else 0
                self.now += size
                self.peak = max(self.peak, self.now)
                self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._forget(key, size))  # type: ignore[misc]

    def _forget(self, key: int, size: int) -> None:
        self.now -= size
        del self._known[key]


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments or results, also in lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
