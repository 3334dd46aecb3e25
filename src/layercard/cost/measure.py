"""One training step with a reading at every border between its parts: of the clock, or of the bytes that are alive.

Seconds of an adapter by itself, for each shape of what gets one: linear maps, and the stacked maps of a block's experts.

A cost model by the clock: a few training steps on this machine, with a stamp at every border between blocks.

Three kinds of step alternate, all on the same batch and in train mode, as a trainer runs them:

- *last*: adapters in the last layer only. Below it no graph is kept, which gives the plain forward of each block;
- *through*: no adapters, but the gradient goes down to the input of block 0: what backward costs a block that is not adapted;
- *all*: adapters in every layer: what it costs more, block by block, and what the update costs.

*last* and *all* are whole training steps of stock PEFT, so the model is exact, to noise, at both ends of what can be placed, and what
lies between follows from the borders. Each figure is the median over the repeats. Blocks of equal shape differ by noise more than by
their work, so each is moved to the mean of its kind as far as the repeats disagree about it (`settled`). Bytes come from one further
step of each kind in which every tensor is counted (`layercard.memory.LiveTensors`).
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from layercard.cost.model import CostModel, LayerCost, ModuleCost
from layercard.data.load import IGNORED, Batch, Example, batches, shuffled
from layercard.errors import DataError, ModelError
from layercard.measure import LiveTensors
from layercard.models.adapted import lora_layers
from layercard.models.hooks import block_borders, frozen, input_gradients
from layercard.models.layers import Block
from layercard.models.load import BaseModel, Progress
from layercard.models.losses import training_step

# ---- stamps


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stamps:
    """What the clock showed, in seconds, at the borders of one step.

    Attributes:
        marks: By name and block: `("enter", i)`, `("leave", i)` and `("back", i)` as `capture.block_borders` gives them, and with block 0
            `start`, `loss` (once it is known), `backward` (once it is through) and `end` (after the update).
    """

    def __init__(self, device: torch.device, depth: int) -> None:
        self.device, self.depth = device, depth
        self.marks: dict[tuple[str, int], float] = {}

    def __call__(self, name: str, index: int = 0) -> None:
        """Read the clock, once the device has done all that it was told."""
        synchronize(self.device)
        self.marks[name, index] = time.perf_counter()

    def between(self, first: tuple[str, int], second: tuple[str, int]) -> float:
        """Growth from one mark to the other."""
        return self.marks[second] - self.marks[first]

    @property
    def total(self) -> float:
        """The whole step."""
        return self.between(("start", 0), ("end", 0))

    @property
    def embedding(self) -> float:
        """From the start to block 0."""
        return self.between(("start", 0), ("enter", 0))

    @property
    def head(self) -> tuple[float, float]:
        """Forward and backward of all above the last block."""
        return self.between(("leave", self.depth - 1), ("loss", 0)), self.between(("loss", 0), ("back", self.depth))

    def forward(self, index: int) -> float:
        """Forward of a block."""
        return self.between(("enter", index), ("leave", index))

    def backward(self, index: int) -> float:
        """Backward of a block; that of the lowest one in the graph ends with backward itself, and below it there is none."""
        if ("back", index + 1) not in self.marks:
            return 0.0
        return self.between(("back", index + 1), ("back", index) if ("back", index) in self.marks else ("backward", 0))

    @property
    def update(self) -> float:
        """Clipping, optimiser and zeroing."""
        return self.between(("backward", 0), ("end", 0))


class ByteCount(Stamps):
    """Bytes of tensors that the step made and that are alive at its borders, in `marks`; `peaks` holds the most since the border before."""

    def __init__(self, live: LiveTensors, depth: int) -> None:
        super().__init__(torch.device("cpu"), depth)
        self.live = live
        self.peaks: dict[tuple[str, int], int] = {}

    def __call__(self, name: str, index: int = 0) -> None:
        """Note what is alive, and what was at the worst moment since the last border."""
        self.marks[name, index] = self.live.now
        self.peaks[name, index] = self.live.peak
        self.live.peak = self.live.now

    def above(self, *ends: tuple[str, int]) -> int:
        """The worst moment in the stretches that end with these marks, above what is alive when the last block is left."""
        top = max(self.peaks[end] for end in ends if end in self.peaks)
        return max(0, round(top - self.marks["leave", self.depth - 1]))

    def within(self, blocks: Sequence[int]) -> int:
        """The worst moment within the forward of any of these blocks, above what is alive when it is entered."""
        return max((round(self.peaks["leave", at] - self.marks["enter", at]) for at in blocks), default=0)

    def kept(self, index: int) -> int:
        """What stays alive after the forward of a block."""
        return max(0, round(self.between(("enter", index), ("leave", index))))


# ---- adapter_timing


def adaptable(block: Block) -> list[tuple[str, int, int, int]]:
    """All that gets an adapter in a block: name, width of input and of output, and number of experts (1 for a linear map)."""
    single = [(p.name, p.in_features, p.out_features, 1) for p in block.linear_modules]
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


# ---- timing


@contextmanager
def adapted_layers(base: BaseModel, layers: Sequence[int], rank: int) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    """The model in train mode with stock PEFT adapters on all maps and experts of some layers, and their optimiser; then as before."""
    with lora_layers(base, layers, rank=rank, alpha=2 * rank) as model:
        model.train()
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        yield model, torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0)


@contextmanager
def through_all(base: BaseModel) -> Iterator[nn.Module]:
    """The model in train mode without adapters, the gradient going down to the input of block 0; as before afterwards."""
    with frozen(base.model), torch.enable_grad(), input_gradients(base.blocks):
        base.model.train()
        yield base.model


def usual_batch(examples: Sequence[Example], size: int, pad_id: int, seed: int = 0) -> Batch:
    """Of the batches that training would draw, the one whose padded length is the median."""
    order = shuffled(len(examples), size * max(1, -(-len(examples) // size)), seed)
    drawn = batches([examples[row] for row in order], size, pad_id)
    found = sorted(drawn, key=lambda batch: batch.input_ids.shape[1])
    return found[(len(found) - 1) // 2]


def random_batch(vocabulary: int, size: int, length: int, seed: int = 0) -> Batch:
    """Random tokens, the second half of each row labelled; the last of several rows is a quarter shorter, so that there is padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    if size > 1:
        mask[-1, length - length // 4 :] = 0
    labels = torch.where((mask == 1) & (torch.arange(length) >= length // 2), ids, IGNORED)
    return Batch(ids, mask, labels, tuple(range(size)))


@dataclass
class Steps:
    """The steps that were timed, by kind, and the readings of single tokens with and without adapters."""

    last: list[Stamps] = field(default_factory=list)
    through: list[Stamps] = field(default_factory=list)
    all: list[Stamps] = field(default_factory=list)
    token_plain: list[Stamps] = field(default_factory=list)
    token_adapted: list[Stamps] = field(default_factory=list)
    through_bytes: ByteCount | None = None
    all_bytes: ByteCount | None = None
    last_bytes: ByteCount | None = None


def measure_cost(base: BaseModel, batch: Batch, *, rank: int = 8, repeats: int = 3, progress: Progress | None = None) -> CostModel:
    """Measure what training adapters of this model costs here, part by part.

    Takes `9 · repeats + 4` training steps on the batch and a few forward passes of one token. The model is the same afterwards:
    weights, hooks, `requires_grad`, modes, random state.

    Args:
        base: The model.
        batch: A batch as training would see it (`usual_batch`, `random_batch`).
        rank: Rank of each adapter.
        repeats: How often each kind of step is set up; each time two steps are timed after one to warm up.
        progress: Told of the phase `cost`.

    Returns:
        The cost model of this batch size, length, rank and machine.

    Raises:
        DataError: The batch has no labelled token, or is longer than the model's positions.
        ModelError: Memory runs out.
    """
    if not bool((batch.labels[:, 1:] != IGNORED).any()):
        raise DataError("the batch has no labelled token, so there is no loss to time; give longer records")
    length, limit = batch.input_ids.shape[1], getattr(base.model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise DataError(f"rows of {length} tokens are longer than the {limit} positions of {base.name}; choose a smaller length")
    batch = batch.to(base.device)
    try:
        steps = _run(base, batch, rank, repeats, progress or (lambda *_: None))
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error):
            size = f"{batch.input_ids.shape[0]} records of {length} tokens"
            raise ModelError(f"memory ran out training all layers of {base.name} on {size}; choose a smaller batch or length") from error
        raise
    return _assembled(base, batch, rank, steps)


def _run(base: BaseModel, batch: Batch, rank: int, repeats: int, progress: Progress) -> Steps:
    """All the steps, kinds alternating; the first round counts bytes and warms up."""
    steps, depth = Steps(), len(base.blocks)
    token = Batch(batch.input_ids[:1, :1], batch.attention_mask[:1, :1], batch.labels[:1, :1], (0,))
    parts = (repeats + 1) * 3
    for at in range(repeats + 1):
        progress("cost", 3 * at, parts)
        with adapted_layers(base, [depth - 1], rank) as (model, optimizer):
            if at == 0:
                steps.last_bytes = _counted(base, model, batch, optimizer)
            else:
                steps.last += _timed(base, model, batch, optimizer)
        progress("cost", 3 * at + 1, parts)
        with through_all(base) as model:
            if at == 0:
                steps.through_bytes = _counted(base, model, batch, None)
            else:
                steps.through += _timed(base, model, batch, None)
                steps.token_plain += _token(base, model, token)
        progress("cost", 3 * at + 2, parts)
        with adapted_layers(base, range(depth), rank) as (model, optimizer):
            if at == 0:
                training_step(model, batch, optimizer)  # makes the optimiser's state, which is not to be counted
                steps.all_bytes = _counted(base, model, batch, optimizer)
            else:
                steps.all += _timed(base, model, batch, optimizer)
                steps.token_adapted += _token(base, model, token)
    progress("cost", parts, parts)
    return steps


def _timed(base: BaseModel, model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer | None) -> list[Stamps]:
    """Two steps, after one that makes the optimiser's state and warms up."""
    found = [Stamps(base.device, len(base.blocks)) for _ in range(3)]
    for stamps in found:
        with block_borders(base.blocks, stamps):
            training_step(model, batch, optimizer, stamps)
    return found[1:]


def _counted(base: BaseModel, model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer | None) -> ByteCount:
    with LiveTensors() as live:
        count = ByteCount(live, len(base.blocks))
        with block_borders(base.blocks, count):
            training_step(model, batch, optimizer, count)
    return count


def _token(base: BaseModel, model: nn.Module, token: Batch) -> list[Stamps]:
    """Four forward passes of one token, as in generation, after one to warm up."""
    training = model.training
    model.eval()
    found = [Stamps(base.device, len(base.blocks)) for _ in range(5)]
    with torch.no_grad():
        for stamps in found:
            with block_borders(base.blocks, stamps):
                model(input_ids=token.input_ids, attention_mask=token.attention_mask, use_cache=False)
    model.train(training)
    return found[1:]


def _assembled(base: BaseModel, batch: Batch, rank: int, steps: Steps) -> CostModel:
    """From readings to the cost of each part."""
    depth = len(base.blocks)
    assert steps.through_bytes is not None and steps.all_bytes is not None and steps.last_bytes is not None
    heads = [stamps.head for stamps in (*steps.last, *steps.through, *steps.all)]
    fixed_update, weight_update = _update(steps, _parameters(base, rank))
    return CostModel(
        source="measured",
        model=base.name,
        batch_size=batch.input_ids.shape[0],
        tokens=batch.input_ids.shape[1],
        labelled_tokens=int((batch.labels[:, 1:] != IGNORED).sum()),
        rank=rank,
        dtype=str(base.model.dtype).removeprefix("torch."),
        device=device_name(base.device),
        threads=torch.get_num_threads() if base.device.type == "cpu" else 0,
        embedding_seconds=statistics.median(s.embedding for s in (*steps.last, *steps.through, *steps.all)),
        head_forward_seconds=statistics.median(forward for forward, _ in heads),
        head_backward_seconds=statistics.median(backward for _, backward in heads),
        overhead_seconds=fixed_update,
        weights_bytes=sum(weight.nbytes for weight in base.model.parameters()),
        shared_bytes=round(steps.all_bytes.marks["enter", 0]),
        head_bytes=steps.all_bytes.above(("loss", 0), ("back", depth)),
        block_bytes=steps.all_bytes.above(*(("back", at) for at in range(depth)), ("backward", 0)),
        forward_bytes=steps.last_bytes.within(range(depth - 1)),
        layers=_layers(base, batch, rank, steps, weight_update),
    )


def _update(steps: Steps, parameters: Sequence[int]) -> tuple[float, float]:
    """Seconds of an update that do not grow with the adapters, and seconds for each trained weight."""
    of_all, of_last = (statistics.median(s.update for s in found) for found in (steps.all, steps.last))
    more = sum(parameters) - parameters[-1]
    each = max(0.0, of_all - of_last) / more if more else 0.0
    return max(0.0, of_last - each * parameters[-1]), each


def _parameters(base: BaseModel, rank: int) -> list[int]:
    return [rank * sum(experts * (n_in + n_out) for _, n_in, n_out, experts in adaptable(block)) for block in base.blocks]


def _layers(base: BaseModel, batch: Batch, rank: int, steps: Steps, weight_update: float) -> tuple[LayerCost, ...]:
    """Each layer: the plain forward of *last*, what *through* takes more, what *all* takes more than that."""
    assert steps.through_bytes is not None and steps.all_bytes is not None
    depth, kinds = len(base.blocks), _kinds(base.blocks)
    passes = {
        name: settled(np.array([[s.forward(at) + s.backward(at) for at in range(depth)] for s in found]), kinds)
        for name, found in (("through", steps.through), ("all", steps.all))
    }
    plain = _plain_forward(steps, kinds)
    latency = np.maximum(0.0, _token_seconds(steps.token_adapted, kinds) - _token_seconds(steps.token_plain, kinds))
    shares = module_seconds(base, batch, rank)
    layers = []
    for at, (block, parameters) in enumerate(zip(base.blocks, _parameters(base, rank), strict=True)):
        adapter = max(0.0, passes["all"][at] - passes["through"][at]) + weight_update * parameters
        maps = adaptable(block)
        known = [shares[n_in, n_out, experts] for _, n_in, n_out, experts in maps]
        layers.append(
            LayerCost(
                forward_seconds=plain[at],
                backward_seconds=max(0.0, passes["through"][at] - plain[at]),
                adapter_seconds=adapter,
                saved_bytes=steps.through_bytes.kept(at),
                adapter_saved_bytes=max(0, steps.all_bytes.kept(at) - steps.through_bytes.kept(at)),
                adapter_parameters=parameters,
                adapter_latency_seconds=float(latency[at]),
                modules=tuple(
                    ModuleCost(
                        name=name, in_features=n_in, out_features=n_out, experts=experts, adapter_seconds=adapter * seconds / sum(known)
                    )
                    for (name, n_in, n_out, experts), seconds in zip(maps, known, strict=True)
                ),
            )
        )
    return tuple(layers)


def _plain_forward(steps: Steps, kinds: Sequence[int]) -> np.ndarray:
    """Forward of each block without a graph, `[L]` seconds; the last one, whose graph *last* keeps, as *through* compares to it below."""
    depth = len(kinds)
    kept = settled(np.array([[s.forward(at) for at in range(depth)] for s in steps.through]), kinds)
    if depth == 1:
        return kept
    plain = settled(np.array([[s.forward(at) for at in range(depth - 1)] for s in steps.last]), kinds[:-1])
    return np.append(plain, kept[-1] * plain.sum() / kept[:-1].sum())


def _token_seconds(readings: Sequence[Stamps], kinds: Sequence[int]) -> np.ndarray:
    return settled(np.array([[s.forward(at) for at in range(len(kinds))] for s in readings]), kinds)


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


def _kinds(blocks: Sequence[Block]) -> list[int]:
    """A number for each block, equal for blocks with the same maps."""
    shapes = [tuple(adaptable(block)) for block in blocks]
    return [shapes.index(shape) for shape in shapes]


def device_name(device: torch.device) -> str:
    """A device in words: the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or device.type
