"""The same jobs one after another, in local processes, or on a Ray cluster."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from layercard.errors import BenchmarkError, LayercardError, one_line
from layercard.models.load import Progress

Job = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function that can be pickled by name, and its arguments; it takes the progress callback as one more argument."""


ATTEMPTS = 3
"""How often a job is started that ends without an answer because its worker or machine was lost."""


@dataclass(frozen=True)
class Workers:
    """Where jobs run.

    Attributes:
        count: Jobs at a time; 1 runs them in this process.
        ray: Address of a Ray cluster ("local" starts one on this machine); `count` processes here where it is `None`.
        cpus: Cores that each job on Ray reserves.
        gpus: GPUs that each job on Ray reserves; a part of one lets several jobs share it.
        memory: Bytes that each job on Ray reserves; 0 for no reservation.
    """

    count: int = 1
    ray: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0

    def run(self, jobs: Sequence[Job], progress: Progress) -> Iterator[Any]:
        """Results of the jobs as they come in. An error in a job is raised here; what other jobs wrote stays.

        Jobs in this process and on Ray tell `progress` what they do; those in other local processes are only counted as they end. A job
        whose worker was lost is started again, and goes on from the results that are there.

        Raises:
            BenchmarkError: Ray is asked for and not installed, its cluster cannot be reached or has nothing like the resources, or a
                job's worker was lost again and again.
        """
        if self.ray is not None:
            yield from _on_ray(jobs, self, progress)
        elif self.count == 1 or len(jobs) < 2:
            yield from (function(*arguments, progress) for function, arguments in jobs)
        else:
            yield from _in_processes(jobs, self.count)


def _in_processes(jobs: Sequence[Job], count: int) -> Iterator[Any]:
    """In a pool of processes; a pool that lost one is made anew for the jobs without an answer."""
    left = list(jobs)
    for attempt in range(ATTEMPTS):
        pool = ProcessPoolExecutor(
            count,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_limit_threads,
            initargs=(max(1, len(os.sched_getaffinity(0)) // count),),
        )
        try:
            running = {pool.submit(function, *arguments): (function, arguments) for function, arguments in left}
            for future in as_completed(running):
                found = future.result()
                left.remove(running[future])
                yield found
            return
        except BrokenProcessPool:
            if attempt + 1 == ATTEMPTS:
                raise BenchmarkError(_LOST.format(times=ATTEMPTS)) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_LOST = "a worker was lost {times} times; look whether memory runs out, then give the same command again, which goes on"


def _limit_threads(threads: int) -> None:
    """Processes that use all cores each would spin against one another."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _on_ray(jobs: Sequence[Job], workers: Workers, progress: Progress) -> Iterator[Any]:
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError, WorkerCrashedError
    except ImportError:
        raise BenchmarkError("--ray needs Ray, which is not installed; pip install 'layercard[ray]' or use --workers") from None
    address = workers.ray
    try:
        started = not ray.is_initialized()
        if started:
            where: dict[str, Any] = {"num_cpus": workers.count} if address == "local" else {}
            ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False, **where)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BenchmarkError(f"no Ray cluster at {address!r} ({one_line(error, 100)}); start one or use --workers") from None
    try:
        _check_resources(ray.cluster_resources(), workers)
        resources: dict[str, Any] = {"num_cpus": workers.cpus, "num_gpus": workers.gpus, "memory": workers.memory or None}
        heard = ray.remote(_Heard).options(num_cpus=0, resources={"node:__internal_head__": 0.001}).remote()
        remote = ray.remote(_apply).options(**resources, max_retries=ATTEMPTS - 1)
        waiting = [remote.remote(function, arguments, heard) for function, arguments in jobs]
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=1.0)
            for said in ray.get(heard.taken.remote()):
                progress(*said)
            for one in done:
                yield ray.get(one)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, LayercardError) else error) from None
    except WorkerCrashedError:
        raise BenchmarkError(_LOST.format(times=ATTEMPTS)) from None
    except RayError as error:
        raise BenchmarkError(f"Ray lost a job ({one_line(error, 100)}); give the same command again, which goes on") from None
    finally:
        if started:
            ray.shutdown()


def _check_resources(there: dict[str, float], workers: Workers) -> None:
    """Ray waits for ever for what no machine has."""
    for name, wanted in (("CPU", workers.cpus), ("GPU", workers.gpus), ("memory", workers.memory)):
        if wanted > there.get(name, 0):
            raise BenchmarkError(f"the Ray cluster has {there.get(name, 0):g} {name}, and a run asks for {wanted:g}; ask for less")


class _Heard:
    """What jobs say of their progress, until it is taken; runs beside the driver."""

    def __init__(self) -> None:
        self.said: dict[str, tuple[str, int, int]] = {}

    def say(self, phase: str, done: int, total: int) -> None:
        self.said[phase] = (phase, done, total)

    def taken(self) -> list[tuple[str, int, int]]:
        said, self.said = list(self.said.values()), {}
        return said


def _apply(function: Callable[..., Any], arguments: tuple[Any, ...], heard: Any) -> Any:
    """Runs on a worker."""
    return function(*arguments, lambda phase, done, total: heard.say.remote(phase, done, total))
