"""One run in several processes, as `torchrun` and `accelerate launch` start them; in a process alone all of this does nothing.

Both launchers number the processes in the environment (`RANK` of `WORLD_SIZE`, `LOCAL_RANK` on this machine). Process 0 writes files and
prints; the others compute their share.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from layercard import errors

if TYPE_CHECKING:
    import torch


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def count() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_rank() -> int:
    """Number of this process on its machine, from 0: the GPU that it drives."""
    return int(os.environ.get("LOCAL_RANK", "0")) if count() > 1 else 0


def is_first() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


@contextmanager
def joined(device: "torch.device") -> Iterator[None]:
    """Let the processes of this run speak to each other: NCCL between GPUs, Gloo between CPUs.

    Where the caller has joined them already, nothing is changed.
    """
    import torch.distributed as dist

    if count() == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def total(values: Sequence[float], device: "torch.device") -> list[float]:
    """Sums over all processes, in float64; all must call it, and all get the same."""
    if count() == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return [float(value) for value in sums]


def wait() -> None:
    """Return once all processes are here."""
    if count() > 1:
        import torch.distributed as dist

        dist.barrier()


def by_first(run: Callable[[], dict[str, Any] | None], device: "torch.device") -> dict[str, Any] | None:
    """Let the first process run a function; every process gets its JSON value, or raises its error."""
    if count() == 1:
        return run()
    said: dict[str, Any] = {"value": None, "kind": None, "message": ""}
    if is_first():
        try:
            said["value"] = run()
        except errors.LayercardError as error:
            said.update(kind=type(error).__name__, message=str(error))
    heard = json.loads(_broadcast(json.dumps(said).encode(), device))
    if heard["kind"] is not None:
        raise vars(errors)[heard["kind"]](heard["message"])
    value: dict[str, Any] | None = heard["value"]
    return value


def _broadcast(text: bytes, device: "torch.device") -> bytes:
    """What the first process gave."""
    import torch
    import torch.distributed as dist

    size = torch.tensor([len(text)], device=device)
    dist.broadcast(size, src=0)
    held = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if is_first():
        held.copy_(torch.tensor(list(text), dtype=torch.uint8))
    dist.broadcast(held, src=0)
    return bytes(held.cpu().tolist())
