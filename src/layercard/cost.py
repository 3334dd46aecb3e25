"""What a placement costs: step time, peak memory, adapter size and inference latency of any set of layers, from one cost model.

One training step of adapters in the layers S of a frozen model, ℓ = min S:

    time(S)   = embedding + head forward and backward + overhead + Σ_all forward_j + Σ_{j ≥ ℓ} backward_j + Σ_{i ∈ S} adapter_i
    memory(S) = held(S) + max over the moments of a step of what is alive then (`CostModel.peak_memory`)

Backward stops at the lowest adapted layer, so what lies above it is paid for whether it is adapted or not. Times are of one step on
one batch, in seconds; bytes are of tensors above the frozen model. The numbers come from the clock (`layercard.timing`), from a
device's rates (`layercard.rates`), or from shapes alone, where the unit of time is the step of all layers.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from layercard.errors import CardError, PlacementError
from layercard.files import read_json, shown, write_json

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
        """Relative costs of a model of which only the shapes are known (`layercard.rates.from_shapes`)."""
        from layercard import rates

        with _within_bounds():
            return rates.from_shapes(shapes, **sizes)

    @classmethod
    def from_rates(cls, shapes: Shapes, *, flops: float, bandwidth: float, **sizes: Any) -> "CostModel":
        """Costs of a model from its shapes and a device's rates (`layercard.rates.from_rates`)."""
        from layercard import rates

        with _within_bounds():
            return rates.from_rates(shapes, flops=flops, bandwidth=bandwidth, **sizes)


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
