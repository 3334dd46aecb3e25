"""Peak memory of a stretch of work, above what was held before it."""

import ctypes
import gc
import threading
from types import TracebackType

import psutil
import torch

INTERVAL = 0.005
"""Seconds between two looks at the process's memory; large tensors of a training step live longer than that."""


class PeakMemory:
    """Measure peak memory in a `with` block; `bytes` is the growth over what was held when the block began.

    On CUDA it is the allocator's own peak. Elsewhere a thread samples the resident set of the process, so only one block may be
    measured at a time. Garbage is collected and returned to the system first, so that an earlier run in the same process leaves
    nothing behind that this one could reuse without being charged for it.

    >>> with PeakMemory(torch.device("cpu")) as peak:
    ...     _ = torch.ones(4_000_000).sum()
    >>> peak.bytes >= 0
    True
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._before = 0
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="layercard-memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        release()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before = self._peak = _resident()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._stop.set()
            self._thread.join()
        self.bytes = max(0, self._peak - self._before)

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._peak = max(self._peak, _resident())


def release() -> None:
    """Give memory that nothing uses back to the system, as far as the platform lets one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # not glibc: its allocator decides by itself
        return


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)
