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
LOST = f"a worker was lost {ATTEMPTS} times; look whether memory runs out, then give the same command again, which goes on"


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
    for _ in range(ATTEMPTS):
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(count, mp_context=context, initializer=_limit_threads, initargs=(threads,))
        try:
            running = {pool.submit(function, *arguments): (function, arguments) for function, arguments in left}
            for future in as_completed(running):
                result = future.result()
                left.remove(running[future])
                yield result
            return
        except BrokenProcessPool:
            continue
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    raise BenchmarkError(LOST)


def _limit_threads(threads: int) -> None:
    """Processes that use all cores each would spin against one another."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _on_ray(jobs: Sequence[Job], workers: Workers, progress: Progress) -> Iterator[Any]:
    """On a Ray cluster, which is started where none runs and the address is "local"."""
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError, WorkerCrashedError
    except ImportError:
        raise BenchmarkError("--ray needs Ray, which is not installed; pip install 'layercard[ray]' or use --workers") from None
    started = not ray.is_initialized()
    try:
        if started:
            size: dict[str, Any] = {"num_cpus": workers.count} if workers.ray == "local" else {}
            ray.init(address=workers.ray, include_dashboard=False, log_to_driver=False, configure_logging=False, **size)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BenchmarkError(f"no Ray cluster at {workers.ray!r} ({one_line(error, 100)}); start one or use --workers") from None
    try:
        # Ray would wait for ever for what no machine has.
        resources = ray.cluster_resources()
        for name, asked in (("CPU", workers.cpus), ("GPU", workers.gpus), ("memory", workers.memory)):
            if asked > resources.get(name, 0):
                raise BenchmarkError(f"the Ray cluster has {resources.get(name, 0):g} {name}, and a run asks for {asked:g}; ask for less")
        messages = ray.remote(_Messages).options(num_cpus=0, resources={"node:__internal_head__": 0.001}).remote()
        reserved: dict[str, Any] = {"num_cpus": workers.cpus, "num_gpus": workers.gpus, "memory": workers.memory or None}
        remote = ray.remote(_run_remotely).options(**reserved, max_retries=ATTEMPTS - 1)
        waiting = [remote.remote(function, arguments, messages) for function, arguments in jobs]
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=1.0)
            for message in ray.get(messages.taken.remote()):
                progress(*message)
            for job in done:
                yield ray.get(job)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, LayercardError) else error) from None
    except WorkerCrashedError:
        raise BenchmarkError(LOST) from None
    except RayError as error:
        raise BenchmarkError(f"Ray lost a job ({one_line(error, 100)}); give the same command again, which goes on") from None
    finally:
        if started:
            ray.shutdown()


class _Messages:
    """What jobs tell of their progress, until it is taken; an actor of Ray beside the driver."""

    def __init__(self) -> None:
        self.latest: dict[str, tuple[str, int, int]] = {}

    def add(self, phase: str, done: int, total: int) -> None:
        self.latest[phase] = (phase, done, total)

    def taken(self) -> list[tuple[str, int, int]]:
        messages, self.latest = list(self.latest.values()), {}
        return messages


def _run_remotely(function: Callable[..., Any], arguments: tuple[Any, ...], messages: Any) -> Any:
    return function(*arguments, lambda phase, done, total: messages.add.remote(phase, done, total))
