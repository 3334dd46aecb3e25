"""Seconds of an adapter by itself, for each shape of what gets one: linear maps, and the stacked maps of a block's experts."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from layercard.data import Batch
from layercard.layers import Block
from layercard.models import BaseModel
from layercard.stamps import synchronize


def adaptable(block: Block) -> list[tuple[str, int, int, int]]:
    """All that gets an adapter in a block: name, width of input and of output, and number of experts (1 for a linear map)."""
    single = [(p.name, p.in_features, p.out_features, 1) for p in block.projections]
    return [*single, *((s.name, s.in_features, s.out_features, s.experts) for s in block.stacks)]


def module_seconds(base: BaseModel, batch: Batch, rank: int, repeats: int = 3) -> dict[tuple[int, int, int], float]:
    """Seconds of an adapter alone, forward and backward on this batch, for each shape `(in, out, experts)` in the model."""
    found = {}
    for n_in, n_out, experts in sorted({(n_in, n_out, experts) for block in base.blocks for _, n_in, n_out, experts in adaptable(block)}):
        once = _of_experts(base, n_in, n_out, experts, rank) if experts > 1 else _of_map(base, batch, n_in, n_out, rank)
        seconds = []
        for _ in range(repeats + 1):
            synchronize(base.device)
            started = time.perf_counter()
            with torch.enable_grad():
                once()
            synchronize(base.device)
            seconds.append(time.perf_counter() - started)
        found[n_in, n_out, experts] = statistics.median(seconds[1:])
    return found


def _of_map(base: BaseModel, batch: Batch, n_in: int, n_out: int, rank: int) -> Callable[[], object]:
    """Forward and backward of the adapter of one linear map."""
    zeros = partial(torch.zeros, device=base.device, dtype=next(base.model.parameters()).dtype)
    x, base_output = zeros(*batch.input_ids.shape, n_in).requires_grad_(), zeros(*batch.input_ids.shape, n_out)
    down, up = zeros(rank, n_in).requires_grad_(), zeros(n_out, rank).requires_grad_()

    def once() -> object:
        output = base_output + ((x @ down.T) @ up.T) * 2.0
        return torch.autograd.grad(output, (x, down, up), torch.ones_like(output))

    return once


def _of_experts(base: BaseModel, n_in: int, n_out: int, experts: int, rank: int) -> Callable[[], object]:
    """Forward and backward of the adapters of stacked experts: PEFT adds `B A` to the weights of all, whichever are used."""
    zeros = partial(torch.zeros, device=base.device, dtype=next(base.model.parameters()).dtype)
    weight = zeros(experts, n_out, n_in)
    down, up = zeros(experts, rank, n_in).requires_grad_(), zeros(experts, n_out, rank).requires_grad_()

    def once() -> object:
        return torch.autograd.grad(torch.baddbmm(weight, up, down), (down, up), weight)

    return once
