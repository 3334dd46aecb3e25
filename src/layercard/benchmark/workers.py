"""The same jobs one after another, in local processes, or on a Ray cluster."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from layercard.errors import BenchmarkError
from layercard.models import Progress

Job = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function that can be pickled by name, and its arguments; it takes the progress callback as one more argument."""


@dataclass(frozen=True)
class Workers:
    """Where jobs run.

    Attributes:
        count: Jobs at a time; 1 runs them in this process.
        ray: Address of a Ray cluster ("local" starts one on this machine); `count` processes here where it is `None`.
    """

    count: int = 1
    ray: str | None = None

    def run(self, jobs: Sequence[Job], progress: Progress) -> Iterator[Any]:
        """Results of the jobs as they come in. An error in a job is raised here; what other jobs wrote stays.

        Jobs in this process tell `progress` what they do; those elsewhere are only counted as they end.

        Raises:
            BenchmarkError: Ray is asked for and not installed, or its cluster cannot be reached.
        """
        if self.ray is not None:
            yield from _on_ray(jobs, self.ray, self.count)
        elif self.count == 1 or len(jobs) < 2:
            yield from (function(*arguments, progress) for function, arguments in jobs)
        else:
            yield from _in_processes(jobs, self.count)


def _in_processes(jobs: Sequence[Job], count: int) -> Iterator[Any]:
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_limit_threads, initargs=(threads,))
    try:
        for future in as_completed([pool.submit(function, *arguments) for function, arguments in jobs]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _limit_threads(threads: int) -> None:
    """Processes that use all cores each would spin against one another."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _on_ray(jobs: Sequence[Job], address: str, count: int) -> Iterator[Any]:
    try:
        import ray
    except ImportError:
        raise BenchmarkError("--ray needs Ray, which is not installed; pip install 'layercard[ray]' or use --workers") from None
    try:
        started = not ray.is_initialized()
        if started:
            where: dict[str, Any] = {"num_cpus": count} if address == "local" else {}
            ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False, **where)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BenchmarkError(f"no Ray cluster at {address!r} ({' '.join(str(error).split())[:100]}); start one or use --workers") from None
    try:
        remote = ray.remote(_apply)
        waiting = [remote.remote(function, arguments) for function, arguments in jobs]
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            yield ray.get(done[0])
    finally:
        if started:
            ray.shutdown()


def _apply(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments)
