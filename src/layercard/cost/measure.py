"""A cost model by the clock: a few training steps on this machine, with a reading at every border between blocks.

Three kinds of step alternate, all on the same batch and in train mode, as a trainer runs them:

- *last*: adapters in the last layer only. Below it no graph is kept, which gives the plain forward of each block;
- *through*: no adapters, but the gradient goes down to the input of block 0: what backward costs a block that is not adapted;
- *all*: adapters in every layer: what it costs more, block by block, and what the update costs.

*last* and *all* are whole training steps of stock PEFT, so the model is exact, to noise, at both ends of what can be placed, and what
lies between follows from the borders. Each figure is the median over the repeats. Blocks of equal shape differ by noise more than by
their work, so each is moved to the mean of its kind as far as the repeats disagree about it (`settled`). Bytes come from one further
step of each kind in which every tensor is counted (`layercard.measure.LiveTensors`).
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from layercard.cost.model import STATE_BYTES, WEIGHT_BYTES, CostModel, LayerCost, ModuleCost
from layercard.data.load import IGNORED, Batch, Example, batches, shuffled
from layercard.errors import DataError, ModelError
from layercard.measure import LiveTensors
from layercard.models.adapted import lora_layers
from layercard.models.hooks import block_borders, frozen, input_gradients
from layercard.models.layers import Block
from layercard.models.load import BaseModel, Progress
from layercard.models.losses import training_step

Border = tuple[str, int]
"""`("enter", i)`, `("leave", i)` and `("back", i)` as `block_borders` calls them, and with block 0 those of `training_step`: `start`,
`loss` (once it is known), `backward` (once it is through) and `end` (after the update)."""


class Speed(Protocol):
    """How steps are made faster: what `layercard.fast.fast_training` yields."""

    @property
    def labels_only(self) -> bool:
        """Whether `model(**batch)` gives its loss from labelled positions only."""


Around = Callable[[nn.Module], AbstractContextManager[Speed]]
"""Makes the steps inside a `with` block faster."""


class StepClock:
    """What the clock showed at the borders of one step, in `marks`, seconds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: dict[Border, float] = {}

    def __call__(self, name: str, block: int = 0) -> None:
        """Read the clock, once the device has done all that it was told."""
        synchronize(self.device)
        self.marks[name, block] = time.perf_counter()

    def between(self, first: Border, second: Border) -> float:
        """Growth from one mark to the other."""
        return self.marks[second] - self.marks[first]

    def forward(self, block: int) -> float:
        """Forward of a block."""
        return self.between(("enter", block), ("leave", block))

    def both(self, block: int) -> float:
        """Forward and backward of a block; the backward of the lowest one in the graph ends with backward itself."""
        if ("back", block + 1) not in self.marks:
            return self.forward(block)
        end = ("back", block) if ("back", block) in self.marks else ("backward", 0)
        return self.forward(block) + self.between(("back", block + 1), end)


class StepBytes:
    """Bytes of the tensors that a step made and that are alive at its borders, in `marks`; in `peaks` the most since the border before."""

    def __init__(self, live: LiveTensors) -> None:
        self.live = live
        self.marks: dict[Border, int] = {}
        self.peaks: dict[Border, int] = {}

    def __call__(self, name: str, block: int = 0) -> None:
        """Note what is alive, and what was at the worst moment since the last border."""
        self.marks[name, block] = self.live.now
        self.peaks[name, block] = self.live.peak
        self.live.peak = self.live.now

    def above(self, base: Border, *ends: Border) -> int:
        """The worst moment in the stretches that end with these marks, above what is alive at the border `base`."""
        return max(0, max(self.peaks[end] for end in ends if end in self.peaks) - self.marks[base])

    def saved(self, block: int) -> int:
        """What stays alive after the forward of a block."""
        return max(0, self.marks["leave", block] - self.marks["enter", block])


@contextmanager
def adapted_layers(base: BaseModel, layers: Sequence[int], rank: int) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    """The model in train mode with stock PEFT adapters on all modules and experts of some layers, and their optimiser; then as before."""
    with lora_layers(base, layers, rank=rank, alpha=2 * rank) as model:
        model.train()
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        yield model, torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0)


@contextmanager
def through_all(base: BaseModel) -> Iterator[tuple[nn.Module, None]]:
    """The model in train mode without adapters or optimiser, the gradient going down to the input of block 0; as before afterwards."""
    with frozen(base.model), torch.enable_grad(), input_gradients(base.blocks):
        base.model.train()
        yield base.model, None


def usual_batch(examples: Sequence[Example], size: int, pad_id: int, seed: int = 0) -> Batch:
    """Of the batches that training would draw, the one whose padded length is the median."""
    order = shuffled(len(examples), size * max(1, -(-len(examples) // size)), seed)
    drawn = batches([examples[row] for row in order], size, pad_id)
    by_length = sorted(drawn, key=lambda batch: batch.input_ids.shape[1])
    return by_length[(len(by_length) - 1) // 2]


def random_batch(vocabulary: int, size: int, length: int, seed: int = 0) -> Batch:
    """Random tokens, the second half of each row labelled; the last of several rows is a quarter shorter, so that there is padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    if size > 1:
        mask[-1, length - length // 4 :] = 0
    labels = torch.where((mask == 1) & (torch.arange(length) >= length // 2), ids, IGNORED)
    return Batch(ids, mask, labels, tuple(range(size)))


def measure_cost(
    base: BaseModel,
    batch: Batch,
    *,
    rank: int = 8,
    repeats: int = 3,
    heaviest: Batch | None = None,
    around: Around | None = None,
    progress: Progress | None = None,
) -> CostModel:
    """Measure what training adapters of this model costs here, part by part.

    Takes `9 · repeats + 4` training steps on the batch, 7 without repeats, and a few forward passes of one token. The model is the same
    afterwards: weights, hooks, `requires_grad`, modes, random state.

    Args:
        base: The model.
        batch: A batch as training would see it (`usual_batch`, `random_batch`).
        rank: Rank of each adapter.
        repeats: How often each kind of step is set up; each time two steps are timed after one to warm up. 0: the round that counts bytes
            warms up, and one step of each kind is timed behind it.
        heaviest: The batch whose bytes are counted; the same when not given.
        around: Makes steps faster, such as `fast_training`; stock PEFT when not given.
        progress: Told of the phase `cost`.

    Raises:
        DataError: The batch has no labelled token, or is longer than the model's positions.
        ModelError: Memory runs out.
    """
    if not bool((batch.labels[:, 1:] != IGNORED).any()):
        raise DataError("the batch has no labelled token, so there is no loss to time; give longer records")
    length, limit = batch.input_ids.shape[1], getattr(base.model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise DataError(f"rows of {length} tokens are longer than the {limit} positions of {base.name}; choose a smaller length")
    counted, batch, depth = (heaviest or batch).to(base.device), batch.to(base.device), len(base.blocks)
    progress = progress or (lambda *_: None)
    token = Batch(batch.input_ids[:1, :1], batch.attention_mask[:1, :1], batch.labels[:1, :1], (0,))
    clocks: dict[str, list[StepClock]] = {kind: [] for kind in ("last", "through", "all", "through, token", "all, token")}
    counts: dict[str, StepBytes] = {}
    parts = 3 * (repeats + 1)
    try:
        # The kinds alternate, so that a machine that grows slower or faster does so for all; the first round counts bytes and warms up.
        for part in range(parts):
            progress("cost", part, parts)
            kind = ("last", "through", "all")[part % 3]
            layers = range(depth) if kind == "all" else [depth - 1]
            with through_all(base) if kind == "through" else adapted_layers(base, layers, rank) as (model, optimizer):
                if part < 3:
                    if kind == "all":
                        training_step(model, counted, optimizer)  # makes the optimiser's state, which is not to be counted
                    counts[kind] = counted_step(base, model, counted, optimizer, around)
                if part >= 3 or not repeats:
                    clocks[kind] += timed_steps(base, model, batch, optimizer, 3 if repeats else 1, around)[1 if repeats else 0 :]
                    if kind != "last":
                        clocks[f"{kind}, token"] += _timed_tokens(base, model, token)
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error):
            size = f"{batch.input_ids.shape[0]} records of {length} tokens"
            raise ModelError(f"memory ran out training all layers of {base.name} on {size}; choose a smaller batch or length") from error
        raise
    progress("cost", parts, parts)
    return _cost_model(base, batch, rank, clocks, counts, fast=around is not None)


@contextmanager
def _made_faster(base: BaseModel, model: nn.Module, around: Around | None, mark: Callable[[str, int], object]) -> Iterator[bool]:
    """The borders of the blocks watched, and the fast parts at work where there are any; gives `training_step`'s `labels_only`."""
    with ExitStack() as stack:
        speed = stack.enter_context(around(model)) if around is not None else None
        stack.enter_context(block_borders(base.blocks, mark))
        yield speed is not None and speed.labels_only


def timed_steps(
    base: BaseModel,
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer | None,
    steps: int,
    around: Around | None = None,
) -> list[StepClock]:
    """So many steps one after another; the first one makes the optimiser's state and warms up, unless there was one before."""
    clocks = [StepClock(base.device) for _ in range(steps)]
    for clock in clocks:
        with _made_faster(base, model, around, clock) as labels_only:
            training_step(model, batch, optimizer, clock, labels_only=labels_only)
    return clocks


class Step(NamedTuple):
    """One training step: seconds, and bytes at the worst moment above the frozen model."""

    seconds: float
    bytes: int


def measure_step(
    base: BaseModel,
    batch: Batch,
    *,
    layers: Sequence[int] | None = None,
    rank: int = 8,
    heaviest: Batch | None = None,
    around: Around | None = None,
) -> Step:
    """A step of adapters in some layers, or all: three on the batch, of which two are timed, and one more on the heaviest, counted."""
    with adapted_layers(base, range(len(base.blocks)) if layers is None else layers, rank) as (model, optimizer):
        clocks = timed_steps(base, model, batch.to(base.device), optimizer, 3, around)[1:]
        counts = counted_step(base, model, (heaviest or batch).to(base.device), optimizer, around)
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    seconds = statistics.mean(clock.between(("start", 0), ("end", 0)) for clock in clocks)
    return Step(seconds, (WEIGHT_BYTES + STATE_BYTES) * trained + max(counts.peaks.values()))


def counted_step(
    base: BaseModel, model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer | None, around: Around | None = None
) -> StepBytes:
    """One step whose tensors are counted."""
    with LiveTensors() as live:
        count = StepBytes(live)
        with _made_faster(base, model, around, count) as labels_only:
            training_step(model, batch, optimizer, count, labels_only=labels_only)
    return count


def _timed_tokens(base: BaseModel, model: nn.Module, token: Batch) -> list[StepClock]:
    """Four forward passes of one token, as in generation, after one to warm up."""
    training = model.training
    model.eval()
    clocks = [StepClock(base.device) for _ in range(5)]
    with torch.no_grad():
        for clock in clocks:
            with block_borders(base.blocks, clock):
                model(input_ids=token.input_ids, attention_mask=token.attention_mask, use_cache=False)
    model.train(training)
    return clocks[1:]


def _cost_model(
    base: BaseModel,
    batch: Batch,
    rank: int,
    clocks: dict[str, list[StepClock]],
    counts: dict[str, StepBytes],
    *,
    fast: bool,
) -> CostModel:
    """From readings to the cost of each part."""
    depth = len(base.blocks)
    modules = [[(each.name, each.in_features, each.out_features, each.experts) for each in block.adaptable] for block in base.blocks]
    kinds = [modules.index(same) for same in modules]  # equal for blocks with the same modules
    parameters = [rank * sum(experts * (n_in + n_out) for _, n_in, n_out, experts in each) for each in modules]

    def median(first: Border, second: Border, *kinds_of_step: str) -> float:
        return statistics.median(clock.between(first, second) for kind in kinds_of_step for clock in clocks[kind])

    def per_block(kind: str, seconds: Callable[[StepClock, int], float]) -> np.ndarray:
        return settled(np.array([[seconds(clock, block) for block in range(depth)] for clock in clocks[kind]]), kinds)

    # The update: what grows with the number of trained weights, and what does not.
    update_all, update_last = (median(("backward", 0), ("end", 0), kind) for kind in ("all", "last"))
    more = sum(parameters) - parameters[-1]
    weight_update = max(0.0, update_all - update_last) / more if more else 0.0

    # Each block: the plain forward of *last*, what *through* takes more, what *all* takes more than that. The graph of the last block is
    # kept in *last* too, so its plain forward is taken to be less than that of *through* as it is below.
    forward = per_block("through", StepClock.forward)
    if depth > 1:
        plain = settled(np.array([[clock.forward(block) for block in range(depth - 1)] for clock in clocks["last"]]), kinds[:-1])
        forward = np.append(plain, forward[-1] * plain.sum() / forward[:-1].sum())
    through, both = per_block("through", StepClock.both), per_block("all", StepClock.both)
    latency = np.maximum(0.0, per_block("all, token", StepClock.forward) - per_block("through, token", StepClock.forward))

    # The adapter time of a block is shared out by what the adapter of each of its modules takes alone.
    alone = _module_seconds(base, batch, rank, {shape[1:] for each in modules for shape in each})
    weights, head = frozen_weights(base.model, base.blocks)
    layers = []
    for block in range(depth):
        adapter = max(0.0, both[block] - through[block]) + weight_update * parameters[block]
        total = sum(alone[shape[1:]] for shape in modules[block])
        saved = counts["through"].saved(block)
        layers.append(
            LayerCost(
                forward_seconds=forward[block],
                backward_seconds=max(0.0, through[block] - forward[block]),
                adapter_seconds=adapter,
                saved_bytes=saved,
                adapter_saved_bytes=max(0, counts["all"].saved(block) - saved),
                adapter_parameters=parameters[block],
                adapter_latency_seconds=float(latency[block]),
                weights_bytes=weights[block],
                modules=tuple(
                    ModuleCost(
                        name=name,
                        in_features=n_in,
                        out_features=n_out,
                        experts=experts,
                        adapter_seconds=adapter * alone[n_in, n_out, experts] / total,
                    )
                    for name, n_in, n_out, experts in modules[block]
                ),
            )
        )
    steps, top = ("last", "through", "all"), ("leave", depth - 1)
    return CostModel(
        source="measured",
        model=base.name,
        batch_size=batch.input_ids.shape[0],
        tokens=batch.input_ids.shape[1],
        real_tokens=int(batch.attention_mask.sum()),
        labelled_tokens=int((batch.labels[:, 1:] != IGNORED).sum()),
        fast=fast,
        rank=rank,
        dtype=str(base.model.dtype).removeprefix("torch."),
        device=device_name(base.device),
        threads=torch.get_num_threads() if base.device.type == "cpu" else 0,
        embedding_seconds=median(("start", 0), ("enter", 0), *steps),
        head_forward_seconds=median(top, ("loss", 0), *steps),
        head_backward_seconds=median(("loss", 0), ("back", depth), *steps),
        overhead_seconds=max(0.0, update_last - weight_update * parameters[-1]),
        weights_bytes=sum(weight.nbytes for weight in base.model.parameters()),
        head_weights_bytes=head,
        shared_bytes=counts["all"].marks["enter", 0],
        head_bytes=counts["all"].above(top, ("loss", 0), ("back", depth)),
        block_bytes=counts["all"].above(top, *(("back", block) for block in range(depth)), ("backward", 0)),
        forward_bytes=max((counts["last"].above(("enter", block), ("leave", block)) for block in range(depth - 1)), default=0),
        layers=tuple(layers),
    )


def frozen_weights(model: PreTrainedModel, blocks: Sequence[Block]) -> tuple[list[int], int]:
    """Bytes of the weights of each block, and of what is in memory whatever the blocks: all others but an embedding that is not the head's.

    The model may be empty (on the meta device).
    """
    of_blocks = [sum(weight.nbytes for weight in block.module.parameters()) for block in blocks]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or {id(weight) for weight in head.parameters()} & {id(weight) for weight in embedding.parameters()}
    alone = 0 if tied else sum(weight.nbytes for weight in embedding.parameters())
    return of_blocks, sum(weight.nbytes for weight in model.parameters()) - sum(of_blocks) - alone


def _module_seconds(
    base: BaseModel, batch: Batch, rank: int, shapes: set[tuple[int, int, int]], repeats: int = 3
) -> dict[tuple[int, int, int], float]:
    """Seconds of an adapter alone, forward and backward on this batch, for each shape `(in, out, experts)`."""
    zeros = partial(torch.zeros, device=base.device, dtype=next(base.model.parameters()).dtype)
    result = {}
    for n_in, n_out, experts in sorted(shapes):
        if experts > 1:  # PEFT adds `B A` to the weights of all experts, whichever are used
            weight = zeros(experts, n_out, n_in)
            down, up = zeros(experts, rank, n_in).requires_grad_(), zeros(experts, n_out, rank).requires_grad_()
            given = [down, up]
        else:
            weight = zeros(*batch.input_ids.shape, n_out)
            down, up = zeros(rank, n_in).requires_grad_(), zeros(n_out, rank).requires_grad_()
            given = [zeros(*batch.input_ids.shape, n_in).requires_grad_(), down, up]
        seconds = []
        for _ in range(repeats + 1):
            synchronize(base.device)
            started = time.perf_counter()
            with torch.enable_grad():
                output = torch.baddbmm(weight, up, down) if experts > 1 else weight + ((given[0] @ down.T) @ up.T) * 2.0
                torch.autograd.grad(output, given, weight if experts > 1 else torch.ones_like(output))
            synchronize(base.device)
            seconds.append(time.perf_counter() - started)
        result[n_in, n_out, experts] = statistics.median(seconds[1:])
    return result


def settled(samples_rl: np.ndarray, kinds: Sequence[int]) -> np.ndarray:
    """Typical time of each block from repeated readings, `[L]`, such that their sum is the typical sum.

    The median of each block over the repeats, moved to the mean of the blocks of its kind by the share of their spread that is noise:
    `m + max(0, 1 − noise / spread) (x − m)`. Noise is the variance of a median of R readings, taken from how the repeats differ once
    what a whole repeat was slower or faster is taken off.

    Args:
        samples_rl: Readings `[repeats, blocks]`, seconds.
        kinds: The kind of each block; blocks of one kind do equal work.
    """
    repeats = len(samples_rl)
    typical, groups = np.median(samples_rl, axis=0), np.array(kinds)
    result = typical.copy()
    for kind in set(kinds):
        chosen = groups == kind
        mean, many = typical[chosen].mean(), int(chosen.sum())
        if many < 2:
            continue
        drift = samples_rl[:, chosen] - np.median(samples_rl[:, chosen], axis=1, keepdims=True)
        noise = np.pi / 2 * drift.var(axis=0, ddof=1).mean() / repeats if repeats > 1 else np.inf
        spread = max(typical[chosen].var(ddof=1), 1e-300)
        result[chosen] = mean + max(0.0, 1.0 - noise / spread) * (typical[chosen] - mean)
    return result * (np.median(samples_rl.sum(axis=1)) / result.sum())


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device: torch.device) -> str:
    """A device in words: the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or device.type
