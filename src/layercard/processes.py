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

    Raises:
        TrainingError: Another process has ended, so that this one cannot go on.
    """
    import torch.distributed as dist

    if count() == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except RuntimeError as error:
        if "onnection" not in str(error):
            raise
        raise errors.TrainingError("another process of this run has ended; mend what it says, then start the run again") from error
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


def broadcast(data: bytes) -> bytes:
    """The bytes that the first process gives, in every process."""
    return data if count() == 1 else _broadcast(data, carrier())


def gathered(data: bytes) -> list[bytes]:
    """The bytes of every process, in the order of their numbers, in every process."""
    import torch

    if count() == 1:
        return [data]
    rows = stacked(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return [bytes(row.numpy().tobytes()) for row in rows]


def stacked(rows: "torch.Tensor") -> "list[torch.Tensor]":
    """The tensors `[n, ...]` of every process, in the order of their numbers; n may differ, and is 0 for none."""
    import torch
    import torch.distributed as dist

    if count() == 1:
        return [rows]
    own = rows.to(carrier())
    sizes = [torch.zeros(1, dtype=torch.long, device=own.device) for _ in range(count())]
    dist.all_gather(sizes, torch.tensor([len(own)], device=own.device))
    longest = max(int(size) for size in sizes)
    padded = torch.cat([own, own.new_zeros(longest - len(own), *own.shape[1:])])
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded)
    return [part[: int(size)].to(rows.device) for part, size in zip(found, sizes, strict=True)]


def add_up(tensor: "torch.Tensor") -> None:
    """Put the sum over all processes in place of a tensor's values."""
    if count() == 1 or tensor.numel() == 0:
        return
    import torch.distributed as dist

    carried = tensor.to(carrier()).contiguous()
    dist.all_reduce(carried)
    tensor.copy_(carried)


def carrier() -> "torch.device":
    """Where tensors lie while they go from one process to another."""
    import torch
    import torch.distributed as dist

    joined_by_nccl = count() > 1 and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if joined_by_nccl else torch.device("cpu")


def _broadcast(text: bytes, device: "torch.device") -> bytes:
    """What the first process gave."""
    import torch
    import torch.distributed as dist

    size = torch.tensor([len(text)], device=device)
    dist.broadcast(size, src=0)
    held = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if is_first():
        held.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(held, src=0)
    return held.cpu().numpy().tobytes()
