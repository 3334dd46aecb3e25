"""What a placement costs: step time, peak memory, adapter size and inference latency of any set of layers, from one cost model.

One training step of adapters in the layers S of a frozen model, ℓ = min S:

    time(S)   = embedding + head forward and backward + overhead + Σ_all forward_j + Σ_{j ≥ ℓ} backward_j + Σ_{i ∈ S} adapter_i
    memory(S) = held(S) + max over the moments of a step of what is alive then (`CostModel.peak_memory`)

Backward stops at the lowest adapted layer, so what lies above it is paid for whether it is adapted or not. Times are of one step on
one batch, in seconds; bytes are of tensors above the frozen model. The numbers come from the clock (`layercard.timing`), from a
device's rates (`layercard.rates`), or from shapes alone, where the unit of time is the step of all layers.

Costs without a clock: from the shapes of the linear maps, and a device's FLOP/s and bytes/s.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from layercard.errors import CardError, PlacementError
from layercard.files import read_json, shown, write_json

# ---- cost

SCHEMA = "layercard-cost/1"
WEIGHT_BYTES = 4
"""Adapters are kept in float32, whatever the model's type is."""
STATE_BYTES = 8
"""AdamW keeps two float32 numbers for each trained weight."""
UPDATE_BYTES = 12
"""Gradient, and what one update makes on the way, for each trained weight: float32 numbers."""

What = Literal["time", "memory", "params", "latency"]


class Shape(NamedTuple):
    """A linear map, or one map of `experts`, of which a token enters `active`."""

    in_features: int
    out_features: int
    experts: int = 1
    active: float = 1.0


Shapes = Sequence[Sequence[tuple[int, int] | Shape]]
"""For each layer the `(in, out)` of its linear maps; a `Shape` for stacked experts."""

_Amount = Annotated[FiniteFloat, Field(ge=0)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Positive = Annotated[int, Field(ge=1, lt=2**63)]


@dataclass(frozen=True)
class Linear:
    """A cost that is linear in the layers once their lowest is known: `c(S) = fixed + Σ_{j ≥ min S} through[j] + Σ_{i ∈ S} own[i]`.

    >>> Linear(1.0, (2.0, 3.0, 4.0), (0.5, 0.5, 0.5)).of([1])
    8.5
    """

    fixed: float
    through: tuple[float, ...]
    own: tuple[float, ...]

    def of(self, layers: Iterable[int]) -> float:
        """The cost of a placement.

        Raises:
            PlacementError: No layer is given, or one that is not there.
        """
        chosen = _checked(layers, len(self.own))
        return self.fixed + sum(self.through[chosen[0] :]) + sum(self.own[layer] for layer in chosen)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ModuleCost(_Part):
    """The adapter of one linear map, or the adapters of a map of `experts`; `adapter_seconds` is its share of the layer's."""

    name: str = ""
    in_features: _Positive
    out_features: _Positive
    experts: _Positive = 1
    adapter_seconds: _Amount = 0.0


class LayerCost(_Part):
    """What one layer costs in one step.

    Attributes:
        forward_seconds: Forward of the frozen block, no graph kept.
        backward_seconds: What it takes more when backward goes through it: the gradient of its input, and keeping the graph.
        adapter_seconds: What adapters on all its linear maps take more, forward, backward and update.
        saved_bytes: Kept from forward to backward when backward goes through it.
        adapter_saved_bytes: Kept besides when it is adapted.
        adapter_parameters: Weights of its adapters.
        adapter_latency_seconds: Time that its adapters, not merged, add to each generated token.
        modules: Its linear maps.
    """

    forward_seconds: _Amount
    backward_seconds: _Amount
    adapter_seconds: _Amount
    saved_bytes: _Count
    adapter_saved_bytes: _Count
    adapter_parameters: _Count
    adapter_latency_seconds: _Amount
    modules: tuple[ModuleCost, ...] = ()


class CostModel(_Part):
    """What each part of a training step costs, and so any placement.

    Attributes:
        source: `measured` on this device; `rates`: from FLOPs, bytes and a device's rates; `shapes`: relative only, the step time of
            all layers is 1, and so is the latency that all of them add.
        model: Name of the model.
        batch_size: Records in the batch.
        tokens: Tokens of a row, padding included.
        labelled_tokens: Labelled tokens in the batch; the head runs on these only.
        rank: Rank of each adapter.
        dtype: The model's type.
        device: Where it was measured, in words.
        threads: Threads that torch computed with; 0 where that says nothing.
        embedding_seconds: All that comes before the first block.
        head_forward_seconds: Last norm, head and loss.
        head_backward_seconds: Backward through them.
        overhead_seconds: The rest of a step: clipping, update, zeroing, as far as it does not grow with the adapters.
        weights_bytes: The frozen model itself; in no peak.
        shared_bytes: Alive through the whole step: embedded tokens, masks, position tables.
        head_bytes: Alive at the worst moment in the head or loss besides what is saved: logits, their gradient.
        block_bytes: Alive at the worst moment within a block's backward besides what is saved.
        forward_bytes: Alive at the worst moment within a block whose graph is not kept.
        layers: Each layer.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    schema_: Literal["layercard-cost/1"] = Field(default="layercard-cost/1", alias="schema")
    source: Literal["measured", "rates", "shapes"]
    model: str = ""
    batch_size: _Positive
    tokens: _Positive
    labelled_tokens: _Positive
    rank: _Positive
    dtype: str
    device: str = ""
    threads: _Count = 0
    embedding_seconds: _Amount
    head_forward_seconds: _Amount
    head_backward_seconds: _Amount
    overhead_seconds: _Amount
    weights_bytes: _Count
    shared_bytes: _Count
    head_bytes: _Count
    block_bytes: _Count
    forward_bytes: _Count
    layers: Annotated[tuple[LayerCost, ...], Field(min_length=1)]

    @property
    def absolute(self) -> bool:
        """Whether times are in seconds; from shapes alone they are shares of the step of all layers."""
        return self.source != "shapes"

    def linear(self, what: What) -> Linear:
        """One cost as a linear form, for a solver.

        `time` and `latency` in seconds (shares with source `shapes`), `params` in weights, all three exact; `memory` in bytes, an
        upper bound of `peak_memory` that is equal to it wherever the worst moment is the head's or a block's backward.
        """
        zeros = (0.0,) * len(self.layers)
        if what == "time":
            steady = self.embedding_seconds + self.head_forward_seconds + self.head_backward_seconds + self.overhead_seconds
            return Linear(
                steady + sum(layer.forward_seconds for layer in self.layers),
                tuple(layer.backward_seconds for layer in self.layers),
                tuple(layer.adapter_seconds for layer in self.layers),
            )
        if what == "memory":
            return Linear(
                float(self.shared_bytes + max(self.head_bytes, self.block_bytes, self.forward_bytes)),
                tuple(float(layer.saved_bytes) for layer in self.layers),
                tuple(float(_held(layer) + max(layer.adapter_saved_bytes, _updated(layer))) for layer in self.layers),
            )
        if what == "params":
            return Linear(0.0, zeros, tuple(float(layer.adapter_parameters) for layer in self.layers))
        return Linear(0.0, zeros, tuple(layer.adapter_latency_seconds for layer in self.layers))

    def step_time(self, layers: Iterable[int]) -> float:
        """Seconds of one training step with adapters in `layers` (a share of all layers' with source `shapes`)."""
        return self.linear("time").of(layers)

    def peak_memory(self, layers: Iterable[int]) -> int:
        """Bytes that training in `layers` takes at its peak above the frozen model, as a run record's `peak_memory_bytes` counts.

        Adapters and the state of AdamW are held throughout; the worst moment is one of these:

        - the frozen part runs (`forward_bytes`);
        - the loss is computed, or backward is within the topmost block: all that is saved, and `head_bytes` or `block_bytes`;
        - the update: all gradients, and what AdamW makes on the way.
        """
        chosen = _checked(layers, len(self.layers))
        adapted = [self.layers[layer] for layer in chosen]
        saved = sum(layer.saved_bytes for layer in self.layers[chosen[0] :]) + sum(layer.adapter_saved_bytes for layer in adapted)
        moments = (
            self.shared_bytes + self.forward_bytes,
            self.shared_bytes + saved + max(self.head_bytes, self.block_bytes),
            sum(_updated(layer) for layer in adapted),
        )
        return sum(_held(layer) for layer in adapted) + max(moments)

    def adapter_bytes(self, layers: Iterable[int]) -> int:
        """Bytes of the adapters' weights, as they are stored (float32)."""
        return round(WEIGHT_BYTES * self.linear("params").of(layers))

    def inference_latency(self, layers: Iterable[int]) -> float:
        """Seconds that adapters in `layers`, not merged into the weights, add to each generated token."""
        return self.linear("latency").of(layers)

    def to_json(self) -> dict[str, Any]:
        """The JSON object of schema `layercard-cost/1`."""
        return self.model_dump(mode="json", by_alias=True)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write it to a file, atomically; an existing file is kept unless `force`."""
        return write_json(path, self.to_json(), force=force)

    @classmethod
    def from_json(cls, value: dict[str, Any], source: str = "cost model") -> "CostModel":
        """Check and read a JSON object; `source` names it in messages.

        Raises:
            CardError: Another schema, or a part is missing or of the wrong kind.
        """
        if value.get("schema") != SCHEMA:
            raise CardError(f"{source}: schema {shown(value.get('schema'))} is not {SCHEMA!r}; make the file with `layercard cost`")
        try:
            return cls.model_validate(value)
        except ValidationError as problem:
            first = problem.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "cost"
            raise CardError(f"{source}: {where}: {first['msg']}; make the file again with `layercard cost`") from None

    @classmethod
    def load(cls, path: str | Path) -> "CostModel":
        """Read it from a file."""
        return cls.from_json(read_json(path, CardError, "cost model"), str(path))

    @classmethod
    def from_shapes(cls, shapes: Shapes, **sizes: Any) -> "CostModel":
        """Relative costs of a model of which only the shapes are known (`layercard.cost.model.from_shapes`)."""
        with _within_bounds():
            return from_shapes(shapes, **sizes)

    @classmethod
    def from_rates(cls, shapes: Shapes, *, flops: float, bandwidth: float, **sizes: Any) -> "CostModel":
        """Costs of a model from its shapes and a device's rates (`layercard.cost.model.from_rates`)."""
        with _within_bounds():
            return from_rates(shapes, flops=flops, bandwidth=bandwidth, **sizes)


@contextmanager
def _within_bounds() -> Iterator[None]:
    """Raise `CardError` where costs that follow from given sizes are no numbers that a cost model can hold."""
    try:
        yield
    except (ValidationError, OverflowError):
        raise CardError("the maps, records or tokens are so large that no cost follows from them; check these sizes") from None


def _held(layer: LayerCost) -> int:
    return (WEIGHT_BYTES + STATE_BYTES) * layer.adapter_parameters


def _updated(layer: LayerCost) -> int:
    return UPDATE_BYTES * layer.adapter_parameters


def _checked(layers: Iterable[int], depth: int) -> list[int]:
    chosen = sorted(set(layers))
    if not chosen:
        raise PlacementError("a placement without layers has no cost; give at least one layer")
    if chosen[0] < 0 or chosen[-1] >= depth:
        wrong = chosen[0] if chosen[0] < 0 else chosen[-1]
        raise PlacementError(f"layer {wrong} is not in the cost model; it has layers 0 to {depth - 1}")
    return chosen


# ---- rates

ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
BALANCE = 10.0
"""FLOPs that a usual device does while it moves one byte."""
THIN = 0.4
"""Share of the rate of large products that the thin ones of adapters reach, measured at rank 8 on a CPU."""
UNION = 1.75
"""Positions that are labelled in any row of a batch, as a multiple of the labelled tokens; the head runs on all of them in all rows."""


def from_shapes(shapes: Shapes, **sizes: Any) -> CostModel:
    """Relative costs of a model of which only the shapes are known: times are shares of the step of all layers.

    FLOPs and bytes are weighed as on a usual device, `BALANCE` FLOP in the time of one byte. Other arguments as `from_rates` takes them.
    """
    found = from_rates(shapes, flops=BALANCE, bandwidth=1.0, launch=0.0, **sizes)
    every = range(len(found.layers))
    return _scaled(found, 1.0 / found.step_time(every), 1.0 / found.inference_latency(every))


def from_rates(
    shapes: Shapes,
    *,
    flops: float,
    bandwidth: float,
    launch: float = 1e-5,
    vocabulary: int = 32_768,
    batch_size: int = 4,
    length: int = 64,
    labelled: int | None = None,
    rank: int = 8,
    dtype: str = "float32",
    model: str = "",
    device: str = "",
) -> CostModel:
    """Costs of a model from its shapes and a device's rates; each operation takes `max(FLOPs / flops, bytes / bandwidth, launch)`.

    Against what was measured of a 135M model on a CPU, with that CPU's rates: memory within 5 %, the shares of placements in the
    step time of all layers within 8 points; of a small model of experts (4 layers, 4 of 16 experts a token) memory within 21 %, the
    shares within 15 points. A measured model is better wherever it can be had.

    Args:
        shapes: For each layer the `(in, out)` of its linear maps, and a `Shape` for each map of its experts; the first map of a layer
            reads the hidden state.
        flops: Floating point operations per second that large matrix products reach there.
        bandwidth: Bytes per second of the memory.
        launch: Seconds that the smallest operation takes.
        vocabulary: Rows of the head.
        batch_size: Records in the batch.
        length: Tokens of a row.
        labelled: Labelled tokens in the batch; half of all when not given.
        rank: Rank of each adapter.
        dtype: Type of weights and activations.
        model: Name of the model.
        device: Name of the device.

    Raises:
        CardError: A layer without maps, or a size or rate that is not positive.
    """
    labelled = max(1, batch_size * length // 2) if labelled is None else labelled
    rates = {"flops": flops, "bandwidth": bandwidth}
    _check(shapes, dtype, **rates, vocabulary=vocabulary, batch_size=batch_size, length=length, labelled=labelled, rank=rank)
    work = _Work(flops, bandwidth, launch, ELEMENT_BYTES[dtype], batch_size, length, rank)
    blocks = [[Shape(*one) for one in layer] for layer in shapes]
    width = blocks[0][0].in_features
    kept = labelled if batch_size == 1 else min(batch_size * length, round(UNION * labelled))
    head = work.product(kept, width, vocabulary)
    softmax = work.moved((kept + labelled) * vocabulary, 4, 3)
    return CostModel(
        source="rates",
        model=model,
        batch_size=batch_size,
        tokens=length,
        labelled_tokens=labelled,
        rank=rank,
        dtype=dtype,
        device=device or f"{flops:.3g} FLOP/s, {bandwidth:.3g} B/s",
        embedding_seconds=work.moved(work.positions * width, work.size, 3),
        head_forward_seconds=head + softmax,
        head_backward_seconds=head + softmax,
        overhead_seconds=0.0,
        weights_bytes=work.size * (vocabulary * width + sum(_weights(one) for layer in blocks for one in layer)),
        shared_bytes=work.positions * width * work.size,
        head_bytes=(kept + 3 * labelled) * vocabulary * 4,
        block_bytes=work.transient(blocks) + work.size * max(map(_unfolded, blocks)),
        forward_bytes=work.transient(blocks),
        layers=tuple(work.layer(layer) for layer in blocks),
    )


def _check(shapes: Shapes, dtype: str, **sizes: float) -> None:
    wrong = next((name for name, size in sizes.items() if not 0 < size < float("inf")), None)
    if wrong is not None:
        raise CardError(f"{wrong} is {sizes[wrong]!r}; give a number above 0")
    if dtype not in ELEMENT_BYTES:
        raise CardError(f"dtype {dtype!r} has no known size; choose one of {', '.join(ELEMENT_BYTES)}")
    if not shapes or any(not layer for layer in shapes):
        raise CardError("a layer has no linear maps; give the (in, out) of the maps of every layer")


def _scaled(model: CostModel, time: float, latency: float) -> CostModel:
    def layer(cost: LayerCost) -> LayerCost:
        return cost.model_copy(
            update={
                **{name: getattr(cost, name) * time for name in ("forward_seconds", "backward_seconds", "adapter_seconds")},
                "adapter_latency_seconds": cost.adapter_latency_seconds * latency,
                "modules": tuple(m.model_copy(update={"adapter_seconds": m.adapter_seconds * time}) for m in cost.modules),
            }
        )

    steady = ("embedding_seconds", "head_forward_seconds", "head_backward_seconds", "overhead_seconds")
    return model.model_copy(
        update={name: getattr(model, name) * time for name in steady}
        | {"layers": tuple(map(layer, model.layers)), "source": "shapes", "device": ""}
    )


@dataclass(frozen=True)
class _Work:
    """FLOPs and bytes of the parts of a block on one batch, as time on a device."""

    flops: float
    bandwidth: float
    launch: float
    size: int
    batch_size: int
    length: int
    rank: int

    @property
    def positions(self) -> int:
        return self.batch_size * self.length

    def product(self, rows: int, n_in: int, n_out: int, rate: float = 1.0) -> float:
        """Time of `[rows, in] @ [in, out]` at a share of the device's FLOP/s."""
        moved = self.size * (rows * (n_in + n_out) + n_in * n_out) / self.bandwidth
        return max(2 * rows * n_in * n_out / (rate * self.flops), moved, self.launch)

    def thin(self, rows: int, n_in: int, n_out: int) -> float:
        """Time of the two products of an adapter, `[rows, in] @ [in, r] @ [r, out]`."""
        return self.product(rows, n_in, self.rank, THIN) + self.product(rows, self.rank, n_out, THIN)

    def moved(self, elements: int, size: int, times: float) -> float:
        """Time to read or write so many elements so many times."""
        return max(elements * size * times / self.bandwidth, self.launch)

    def rows(self, one: Shape) -> int:
        """Rows that enter a map, those of all its experts together."""
        return round(self.positions * one.active)

    def forward(self, one: Shape) -> float:
        """A frozen map; of its experts only those that are used are read."""
        rows, used = self.rows(one), min(one.experts, self.rows(one))
        moved = self.size * (rows * (one.in_features + one.out_features) + used * one.in_features * one.out_features) / self.bandwidth
        return max(2 * rows * one.in_features * one.out_features / self.flops, moved, self.launch)

    def adapter(self, rows: int, n_in: int, n_out: int) -> float:
        """Forward of an adapter: two thin products, the scaling (read, write) and the sum (two reads, write)."""
        return self.thin(rows, n_in, n_out) + self.moved(rows * n_out, self.size, 2) + self.moved(rows * n_out, self.size, 3)

    def stack(self, one: Shape) -> float:
        """Adding `B A` to the weights of all experts, as PEFT does before they run: one thin product, a read and a write."""
        rows = one.experts * one.out_features
        return self.product(rows, self.rank, one.in_features, THIN) + self.moved(rows * one.in_features, self.size, 2)

    def layer(self, maps: Sequence[Shape]) -> LayerCost:
        """One layer: its products, attention, and what is elementwise."""
        rows, width = self.positions, maps[0].in_features
        widths = sum(round(one.active * one.out_features) for one in maps)
        products = sum(self.forward(one) for one in maps)
        attention = max(4 * rows * self.length * width / self.flops, self.moved(rows * (4 * width + self.length), self.size, 2))
        elementwise = self.moved(rows * (8 * width + 2 * widths), self.size, 1)
        modules = tuple(self.module(one) for one in maps)
        single, stacked = [one for one in maps if one.experts == 1], [one for one in maps if one.experts > 1]
        kept = rows * (_distinct_inputs(single, width) + self.rank * len(single))
        return LayerCost(
            forward_seconds=products + attention + elementwise,
            backward_seconds=products + 2 * attention + 2 * elementwise,
            adapter_seconds=sum(module.adapter_seconds for module in modules),
            saved_bytes=self.size * rows * (5 * width + widths),
            adapter_saved_bytes=self.size * (kept + sum(self.rows(one) * one.in_features + _weights(one) for one in stacked)),
            adapter_parameters=sum(self.parameters(one) for one in maps),
            adapter_latency_seconds=sum(self.adapter(1, *one[:2]) for one in single) + sum(map(self.stack, stacked)),
            modules=modules,
        )

    def parameters(self, one: Shape) -> int:
        """Weights of the adapters of a map or stack."""
        return self.rank * one.experts * (one.in_features + one.out_features)

    def module(self, one: Shape) -> ModuleCost:
        """An adapter's forward; backward has the gradients of A, of B and of the input, and sums the latter; and the update.

        Backward of experts needs the gradients of all their weights first, from which those of A and B follow.
        """
        rows, (n_in, n_out) = self.positions, one[:2]
        if one.experts > 1:
            forward, backward = self.stack(one), self.forward(one) + self.moved(_weights(one), self.size, 1) + 2 * self.stack(one)
        else:
            forward = self.adapter(rows, n_in, n_out)
            backward = 2 * self.thin(rows, n_in, n_out) + self.moved(rows * n_out, self.size, 2) + self.moved(rows * n_in, self.size, 3)
        seconds = forward + backward + self.moved(self.parameters(one), WEIGHT_BYTES, 16)
        return ModuleCost(in_features=n_in, out_features=n_out, experts=one.experts, adapter_seconds=seconds)

    def transient(self, blocks: Sequence[Sequence[Shape]]) -> int:
        """Bytes alive within one block at its worst moment: three tensors of its widest map."""
        return self.size * 3 * max(self.rows(one) * max(one.in_features, one.out_features) for layer in blocks for one in layer)


def _weights(one: Shape) -> int:
    return one.experts * one.in_features * one.out_features


def _unfolded(layer: Sequence[Shape]) -> int:
    """Gradients of the weights of a layer's largest stack, less the folded weights of the other stacks, which are dropped by then."""
    sizes = [_weights(one) for one in layer if one.experts > 1]
    return max(0, 2 * max(sizes, default=0) - sum(sizes))


def _distinct_inputs(maps: Sequence[Shape], width: int) -> int:
    """Sum of the widths of the inputs that are kept for adapters alone, as far as widths tell.

    Of hidden width there are two, of attention and of the feed-forward part, whatever the number of maps that read them; the output of
    attention is kept anyway. Every other width is an input of its own.
    """
    others = sum(one.in_features for one in maps if one.in_features != width)
    return others + width * min(2, sum(one.in_features == width for one in maps))
