"""One run in several processes, as `torchrun` and `accelerate launch` start them; in a single process all of this does nothing.

Both launchers number the processes in the environment (`RANK` of `WORLD_SIZE`, `LOCAL_RANK` on this machine). Process 0 writes files and
prints; the others compute their share. Functions that exchange something must be called by all processes.
"""

import gc
import importlib
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from layercard import errors

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def count() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def local_rank() -> int:
    """Number of this process on its machine, from 0: the GPU that it drives."""
    return int(os.environ.get("LOCAL_RANK", "0")) if count() > 1 else 0


def is_first() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


@contextmanager
def joined(device: "torch.device") -> Iterator[None]:
    """Connect the processes of this run: NCCL between GPUs, Gloo between CPUs. Nothing changes where the caller has connected them.

    Raises:
        TrainingError: Another process has ended, so that this one cannot go on.
    """
    import torch.distributed as dist

    if count() == 1 or dist.is_initialized():
        yield
        return
    # Before there is a group: where this is imported later, default arguments of its functions hold the group for good.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
        if not isinstance(error, RuntimeError) or "onnection" not in str(error):
            raise
        raise errors.TrainingError("another process of this run has ended; mend what it says, then start the run again") from error
    finally:
        _disconnect(failure)


def _disconnect(failure: BaseException | None) -> None:
    """Leave the other processes, and end the threads that exchanged tensors with them.

    Such a thread lets go of the last tensors by itself, for which it needs Python. One that is late, on a busy machine, finds the
    interpreter going down, and the whole process ends with "terminate called without an active exception" and the status of an abort.
    The threads end with their group, and the group with the last object that knows it: a model in `DistributedDataParallel`, which
    stands in a circle of references, and after a failure in the frames of its traceback as well.
    """
    import torch.distributed as dist

    while failure is not None:
        traceback.clear_frames(failure.__traceback__)
        failure = failure.__cause__ or failure.__context__
    dist.destroy_process_group()
    gc.collect()


def wait() -> None:
    """Return once all processes are here."""
    if count() > 1:
        import torch.distributed as dist

        dist.barrier()


def gathered(value: T) -> list[T]:
    """The value of every process, in the order of their numbers; tensors must lie on the CPU."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def of_first(value: T) -> T:
    """The value of the first process."""
    if count() == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def by_first(run: Callable[[], T]) -> T:
    """Let the first process run a function; every process gets its value, or raises its error."""
    if count() == 1:
        return run()
    value, error = None, None
    if is_first():
        try:
            value = run()
        except errors.LayercardError as problem:
            error = problem
    value, error = of_first((value, error))
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def total(values: Sequence[float]) -> list[float]:
    """Sums over all processes, in float64."""
    import torch

    sums = torch.tensor(values, dtype=torch.float64)
    add_up(sums)
    return [float(value) for value in sums]


def stacked(rows: "torch.Tensor") -> "list[torch.Tensor]":
    """The tensors `[n, ...]` of every process, in the order of their numbers; n may differ, and may be 0."""
    return [part.to(rows.device) for part in gathered(rows.cpu())]


def add_up(tensor: "torch.Tensor") -> None:
    """Put the sum over all processes in place of a tensor's values."""
    if count() == 1 or tensor.numel() == 0:
        return
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    carried = tensor.to(device).contiguous()
    dist.all_reduce(carried)
    tensor.copy_(carried)
