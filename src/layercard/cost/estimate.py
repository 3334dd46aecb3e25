"""Costs of models without their weights, from shapes and a device's rates, and whether a model fits the memory that is free."""

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from layercard.cost.measure import frozen_weights, synchronize
from layercard.cost.model import CostModel, Shape
from layercard.models.layers import find_blocks

ROOM = 0.7
"""Share of the free memory that a random model with its training may take."""
UNKNOWN_BYTES = 4 * 2**30
"""Free memory that is assumed where the system does not say."""


def estimated_cost(model: Any, *, flops: float, bandwidth: float, name: str, dtype: str, device: str = "", **sizes: Any) -> CostModel:
    """`CostModel.from_rates` for a model that may be empty; `sizes` are `batch_size`, `length` and `rank`."""
    blocks = find_blocks(model)
    shapes = [
        [Shape(each.in_features, each.out_features, each.experts, float(each.active)) for each in block.adaptable] for block in blocks
    ]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    cost = CostModel.from_rates(
        shapes, flops=flops, bandwidth=bandwidth, vocabulary=vocabulary, model=name, dtype=dtype, device=device, **sizes
    )

    # The weights are the model's own, in the type that is asked for.
    of_blocks, head = frozen_weights(model, blocks)
    share = getattr(torch, dtype).itemsize / model.dtype.itemsize
    layers = tuple(
        layer.model_copy(update={"weights_bytes": round(share * size)}) for layer, size in zip(cost.layers, of_blocks, strict=True)
    )
    total = sum(weight.nbytes for weight in model.parameters())
    return cost.model_copy(update={"weights_bytes": round(share * total), "head_weights_bytes": round(share * head), "layers": layers})


def fits(cost: CostModel, device: torch.device) -> bool:
    """Whether the model and training in all its layers fit the memory that is free on a device."""
    return cost.weights_bytes + cost.peak_memory(range(len(cost.layers))) <= ROOM * free_bytes(device)


def lowest_that_fits(cost: CostModel, free: int, layers: Iterable[int] | None = None) -> int | None:
    """The lowest layer from which on training with `--stream` fits so many free bytes; `None` where none does.

    Of `layers` those from there on are trained, or that layer alone where there are none; without `layers` all from there on.
    """
    depth = len(cost.layers)
    every = range(depth) if layers is None else sorted(layers)
    for lowest in range(1, depth):
        chosen = [layer for layer in every if layer >= lowest] or [lowest]
        if cost.weights_in_memory(chosen, stream=True) + cost.peak_memory(chosen) <= free:
            return chosen[0]
    return None


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; on the CPU, that of the machine, less where the process or its group may have only a part."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free = int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        free = UNKNOWN_BYTES
    with suppress(ImportError, OSError, ValueError, IndexError):  # no limits of address space on this system
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
            free = min(free, max(0, limit - taken))
    with suppress(OSError, ValueError):  # a container without a limit says "max"
        group = Path("/sys/fs/cgroup")
        limit, taken = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        free = min(free, max(0, limit - taken))
    return free


def device_rates(device: torch.device, dtype: torch.dtype, rows: int = 256) -> tuple[float, float]:
    """What this device reaches: FLOP/s of a product `[rows, 2048] @ [2048, 2048]`, and bytes/s of adding two large tensors."""
    width = 2048
    a, b = torch.ones(rows, width, device=device, dtype=dtype), torch.ones(width, width, device=device, dtype=dtype)
    large = torch.ones(2**23, device=device, dtype=dtype)
    other, result = large.clone(), torch.empty_like(large)
    best = []
    for run in (lambda: torch.matmul(a, b), lambda: torch.add(large, other, out=result)):
        seconds = []
        for _ in range(5):
            synchronize(device)
            started = time.perf_counter()
            run()
            synchronize(device)
            seconds.append(time.perf_counter() - started)
        best.append(min(seconds))
    return 2 * rows * width * width / best[0], 3 * large.nbytes / best[1]
