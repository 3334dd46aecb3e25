"""What a placement costs: step time, peak memory, adapter size and inference latency of any set of layers, from one cost model.

One training step of adapters in the layers S of a frozen model, ℓ = min S:

    time(S)   = embedding + head forward and backward + overhead + Σ_all forward_j + Σ_{j ≥ ℓ} backward_j + Σ_{i ∈ S} adapter_i
    memory(S) = held(S) + max over the moments of a step of what is alive then (`CostModel.peak_memory`)
    process(S) = libraries + weights + memory(S); with `--stream` the weights are those from ℓ on (`CostModel.process_memory`)

Backward stops at the lowest adapted layer, so what lies above it is paid for whether it is adapted or not. Times are of one step on
one batch, in seconds; bytes are of tensors above the frozen model. The numbers come from the clock (`layercard.cost.measure`), from a
device's FLOP/s and bytes/s (`CostModel.from_rates`), or from shapes alone, where the unit of time is the step of all layers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, FiniteFloat, ValidationError

from layercard.errors import CardError, PlacementError
from layercard.models.module_sets import attention_outputs, mixes_tokens, module_set
from layercard.records import Part, Record

WEIGHT_BYTES = 4
"""Adapters are kept in float32, whatever the model's type is."""
STATE_BYTES = 8
"""AdamW keeps two float32 numbers for each trained weight."""
UPDATE_BYTES = 12
"""Gradient, and what one update makes on the way, for each trained weight: float32 numbers."""
ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
BALANCE = 10.0
"""FLOPs that a usual device does while it moves one byte."""
LIBRARY_BYTES = 530 * 2**20
"""Main memory of a process on a CPU that has imported what training needs, before it opens a model (measured, torch 2.13)."""
BESIDES_BYTES = 64 * 2**20
"""What training takes besides tensors: tokenizer, code that is loaded on the way, memory that is free but not given back (measured)."""
CHUNK_BYTES = 3 * 24 * 2**20
"""Logits that the head makes at once in fast training on a CPU (`layercard.fast.labels`), and what the loss makes of them."""
THIN = 0.4
"""Share of the rate of large products that the thin ones of adapters reach, measured at rank 8 on a CPU."""
CHUNK = 128
"""Labelled positions that the fast head takes at once, about."""
FUSED_TIME, FUSED_HEAD = 0.6, 0.75
"""What fused adapters take of the time of stock ones, and the head with its loss in one go of the time of both apart, for as many tokens:
measured with 135M weights on a CPU in float32 (0.58 and 0.78) and assumed elsewhere."""
UNION = 1.75
"""Positions that are labelled in any row of a batch, as a multiple of the labelled tokens; the head runs on all of them in all rows."""

What = Literal["time", "memory", "params", "latency"]
_Amount = Annotated[FiniteFloat, Field(ge=0)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Positive = Annotated[int, Field(ge=1, lt=2**63)]


class Shape(NamedTuple):
    """A linear module, or one of `experts`, of which a token enters `active`; `name` is its path below the block."""

    in_features: int
    out_features: int
    experts: int = 1
    active: float = 1.0
    name: str = ""

    @property
    def weights(self) -> int:
        """Weights of all experts."""
        return self.experts * self.in_features * self.out_features


Shapes = Sequence[Sequence[tuple[int, int] | Shape]]
"""For each layer the `(in, out)` of its linear modules; a `Shape` for stacked experts."""


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


class ModuleCost(Part):
    """The adapter of one linear module, or the adapters of one of `experts`; `adapter_seconds` is its share of the layer's."""

    name: str = ""
    in_features: _Positive
    out_features: _Positive
    experts: _Positive = 1
    adapter_seconds: _Amount = 0.0

    @property
    def path(self) -> str:
        """Its name, by which sets of modules know it."""
        return self.name

    @property
    def weights(self) -> int:
        """Weights of the frozen module, or of all experts."""
        return self.experts * self.in_features * self.out_features

    @property
    def adapter_weights(self) -> int:
        """Weights of its adapters at rank 1."""
        return self.experts * (self.in_features + self.out_features)


class LayerCost(Part):
    """What one layer costs in one step.

    Attributes:
        forward_seconds: Forward of the frozen block, no graph kept.
        backward_seconds: What it takes more when backward goes through it: the gradient of its input, and keeping the graph.
        adapter_seconds: What adapters on all its linear modules take more, forward, backward and update.
        saved_bytes: Kept from forward to backward when backward goes through it.
        adapter_saved_bytes: Kept besides when it is adapted.
        adapter_parameters: Weights of its adapters.
        adapter_latency_seconds: Time that its adapters, not merged, add to each generated token.
        weights_bytes: Its frozen weights; 0 in files of before this was known.
        modules: Its linear modules.
    """

    forward_seconds: _Amount
    backward_seconds: _Amount
    adapter_seconds: _Amount
    saved_bytes: _Count
    adapter_saved_bytes: _Count
    adapter_parameters: _Count
    adapter_latency_seconds: _Amount
    weights_bytes: _Count = 0
    modules: tuple[ModuleCost, ...] = ()

    def with_modules(self, name: str, *, fast: bool) -> Self:
        """The layer with adapters on a set of its modules only (`MODULE_SETS`).

        Time and latency are shared out by what each adapter takes alone, kept bytes by the inputs that the modules read (`kept_inputs`).

        Raises:
            PlacementError: An unknown set, or the layer has no such module.
        """
        chosen = module_set(self.modules, name)
        time = sum(each.adapter_seconds for each in chosen) / (sum(each.adapter_seconds for each in self.modules) or 1)
        weights = sum(each.adapter_weights for each in chosen) / sum(each.adapter_weights for each in self.modules)
        inputs = self.kept_inputs(chosen, fast=fast) / (self.kept_inputs(self.modules, fast=fast) or 1)
        changes = {
            "adapter_seconds": time * self.adapter_seconds,
            "adapter_latency_seconds": time * self.adapter_latency_seconds,
            "adapter_saved_bytes": round(inputs * self.adapter_saved_bytes),
            "adapter_parameters": round(weights * self.adapter_parameters),
            "modules": tuple(chosen),
        }
        return self.model_copy(update=changes)

    def kept_inputs(self, modules: Sequence[ModuleCost], *, fast: bool) -> int:
        """Numbers that adapters on some of its modules keep for each token, and of experts each folded weight.

        Modules of one part and width read the same input. That of the last module of attention is kept anyway, and once more by `fast`
        adapters, which are fused.
        """
        last = {each.name for each in attention_outputs(self.modules)}
        inputs = {(mixes_tokens(each.name), each.name in last, each.in_features) for each in modules if fast or each.name not in last}
        return sum(width for _, _, width in inputs) + sum(each.weights for each in modules if each.experts > 1)

    @property
    def held_bytes(self) -> int:
        """Its adapters and the state of AdamW."""
        return (WEIGHT_BYTES + STATE_BYTES) * self.adapter_parameters

    @property
    def updated_bytes(self) -> int:
        """Alive in an update besides: gradients, and what AdamW makes on the way."""
        return UPDATE_BYTES * self.adapter_parameters


class CostModel(Record):
    """What each part of a training step costs, and so any placement.

    Attributes:
        source: `measured` on this device; `rates`: from FLOPs, bytes and a device's rates; `shapes`: relative only, the step time of
            all layers is 1, and so is the latency that all of them add.
        batch_size: Records in the batch.
        tokens: Tokens of a row, padding included.
        real_tokens: Tokens in the batch, padding not counted; 0 where that was not kept.
        labelled_tokens: Labelled tokens in the batch; the head runs on these only.
        fast: Whether these are steps with the fast parts (`layercard.fast`): no padding, head on labelled positions, fused adapters.
        epochs: Passes over the data that step times are means of: with the fast parts the blocks below the lowest adapted layer run in the
            first one only.
        rank: Rank of each adapter.
        device: Where it was measured, in words.
        threads: Threads that torch computed with; 0 where that says nothing.
        embedding_seconds: All that comes before the first block.
        head_forward_seconds: Last norm, head and loss.
        head_backward_seconds: Backward through them.
        overhead_seconds: The rest of a step: clipping, update, zeroing, as far as it does not grow with the adapters.
        weights_bytes: The frozen model itself; not in `peak_memory`.
        head_weights_bytes: Of these, what is neither in a block nor the input embedding alone: last norm, head (an embedding that is
            tied to it, too) and tables of positions. 0 in files of before this was known.
        shared_bytes: Alive through the whole step: embedded tokens, masks, position tables.
        head_bytes: Alive at the worst moment in the head or loss besides what is saved: logits, their gradient.
        block_bytes: Alive at the worst moment within a block's backward besides what is saved.
        forward_bytes: Alive at the worst moment within a block whose graph is not kept.
        layers: Each layer.
    """

    error: ClassVar = CardError
    noun: ClassVar = "cost model"
    made_by: ClassVar = "layercard cost"
    schema_: Literal["layercard-cost/1"] = Field(default="layercard-cost/1", alias="schema")
    source: Literal["measured", "rates", "shapes"]
    model: str = ""
    batch_size: _Positive
    tokens: _Positive
    real_tokens: _Count = 0
    labelled_tokens: _Positive
    fast: bool = False
    epochs: Annotated[FiniteFloat, Field(ge=1)] = 1.0
    rank: _Positive
    dtype: str
    device: str = ""
    threads: _Count = 0
    embedding_seconds: _Amount
    head_forward_seconds: _Amount
    head_backward_seconds: _Amount
    overhead_seconds: _Amount
    weights_bytes: _Count
    head_weights_bytes: _Count = 0
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
        layers, zeros = self.layers, (0.0,) * len(self.layers)
        if what == "time":
            steady = self.embedding_seconds + self.head_forward_seconds + self.head_backward_seconds + self.overhead_seconds
            first = 1 / self.epochs if self.fast else 1.0  # share of the passes in which the frozen blocks run
            return Linear(
                steady + sum(first * layer.forward_seconds for layer in layers),
                tuple((1 - first) * layer.forward_seconds + layer.backward_seconds for layer in layers),
                tuple(layer.adapter_seconds for layer in layers),
            )
        if what == "memory":
            return Linear(
                float(self.shared_bytes + max(self.head_bytes, self.block_bytes, self.forward_bytes)),
                tuple(float(layer.saved_bytes) for layer in layers),
                tuple(float(layer.held_bytes + max(layer.adapter_saved_bytes, layer.updated_bytes)) for layer in layers),
            )
        if what == "params":
            return Linear(0.0, zeros, tuple(float(layer.adapter_parameters) for layer in layers))
        return Linear(0.0, zeros, tuple(layer.adapter_latency_seconds for layer in layers))

    def step_time(self, layers: Iterable[int]) -> float:
        """Seconds of one training step with adapters in `layers` (a share of all layers' with source `shapes`)."""
        return self.linear("time").of(layers)

    def step_parts(self, layers: Iterable[int]) -> dict[str, float]:
        """Where `step_time` goes, part by part: `below` and `above` are the layers under the lowest adapted one, and from it on."""
        chosen = _checked(layers, len(self.layers))
        below, above = self.layers[: chosen[0]], self.layers[chosen[0] :]
        return {
            "embedding": self.embedding_seconds,
            "forward below": sum(layer.forward_seconds for layer in below),
            "forward above": sum(layer.forward_seconds for layer in above),
            "backward above": sum(layer.backward_seconds for layer in above),
            "adapters": sum(self.layers[layer].adapter_seconds for layer in chosen),
            "head and loss": self.head_forward_seconds + self.head_backward_seconds,
            "update and rest": self.overhead_seconds,
        }

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
            sum(layer.updated_bytes for layer in adapted),
        )
        return sum(layer.held_bytes for layer in adapted) + max(moments)

    def weights_in_memory(self, layers: Iterable[int], *, stream: bool = False) -> int:
        """Bytes of the frozen weights that training in `layers` keeps: with `stream` those from the lowest of them on, and the head.

        Where the model's file does not tell the weights of its layers, they are those of its linear modules, and all else counts as head.
        """
        chosen = _checked(layers, len(self.layers))
        if not stream:
            return self.weights_bytes
        blocks, head = self._weights()
        return head + sum(blocks[chosen[0] :])

    def process_memory(self, layers: Iterable[int], *, stream: bool = False) -> int:
        """Bytes that a process which trains in `layers` takes at its peak: libraries, weights, and `peak_memory` above them.

        With the head a chunk at a time (`CHUNK_BYTES`), as training does unless told otherwise.

        With `stream` the blocks below the lowest layer stay on disk; while they pass through, embedding or one block is in memory in place
        of the upper ones. On a GPU its own memory holds about as much besides tensors (context, kernels).
        """
        blocks, head = self._weights()
        passing = max(self.weights_bytes - head - sum(blocks), *blocks) + self.forward_bytes if stream else 0
        step = self._in_chunks().peak_memory(layers)
        return LIBRARY_BYTES + BESIDES_BYTES + max(self.weights_in_memory(layers, stream=stream) + step, passing)

    def linear_process(self, *, stream: bool = False) -> Linear:
        """`process_memory` as a linear form, for a solver: an upper bound as `linear("memory")` is one."""
        form, (blocks, head) = self._in_chunks().linear("memory"), self._weights()
        if not stream:
            return Linear(form.fixed + LIBRARY_BYTES + BESIDES_BYTES + self.weights_bytes, form.through, form.own)
        passing = max(self.weights_bytes - head - sum(blocks), *blocks) + self.forward_bytes
        through = tuple(saved + weights for saved, weights in zip(form.through, blocks, strict=True))
        return Linear(LIBRARY_BYTES + BESIDES_BYTES + max(form.fixed + head, passing - through[-1]), through, form.own)

    def _in_chunks(self) -> Self:
        """The same costs with no more logits at once than fast training makes."""
        return self.model_copy(update={"head_bytes": min(self.head_bytes, CHUNK_BYTES)})

    def _weights(self) -> tuple[list[int], int]:
        """Bytes of the frozen weights of each layer, and of what is above them all."""
        if all(layer.weights_bytes for layer in self.layers):
            return [layer.weights_bytes for layer in self.layers], self.head_weights_bytes
        size = ELEMENT_BYTES.get(self.dtype, 4)
        blocks = [size * sum(each.weights for each in layer.modules) for layer in self.layers]
        return blocks, max(0, self.weights_bytes - sum(blocks))

    def made_fast(self, real_share: float, epochs: float = 1.0) -> Self:
        """The costs of steps with the fast parts, from those of stock ones.

        Padding is left out, the head runs on labelled positions, forward and gradient in one go, and adapters are fused (`FUSED_TIME`). A
        model that was measured with the fast parts is taken as it is.

        Args:
            real_share: Share of a batch's positions that are not padding, above 0 and up to 1.
            epochs: Passes over the data.
        """
        if self.fast:
            return self.model_copy(update={"epochs": epochs})
        positions = self.batch_size * self.tokens
        # The stock head runs on all positions that are labelled in any row; the fast one on each label's own.
        union = self.labelled_tokens / min(positions, UNION * self.labelled_tokens) if self.batch_size > 1 else 1.0
        layers = []
        for layer in self.layers:
            stock = layer.kept_inputs(layer.modules, fast=False)
            kept = layer.kept_inputs(layer.modules, fast=True) / stock if stock else 1.0
            changes = {
                "forward_seconds": real_share * layer.forward_seconds,
                "backward_seconds": real_share * layer.backward_seconds,
                "adapter_seconds": real_share * FUSED_TIME * layer.adapter_seconds,
                "saved_bytes": round(real_share * layer.saved_bytes),
                "adapter_saved_bytes": round(real_share * kept * layer.adapter_saved_bytes),
            }
            layers.append(layer.model_copy(update=changes))
        head = FUSED_HEAD * union * (self.head_forward_seconds + self.head_backward_seconds)
        whole = {
            "fast": True,
            "epochs": epochs,
            "real_tokens": round(real_share * positions),
            "embedding_seconds": real_share * self.embedding_seconds,
            "head_forward_seconds": head,
            "head_backward_seconds": 0.0,
            "shared_bytes": round(real_share * self.shared_bytes),
            "head_bytes": round(union * self.head_bytes),
            "block_bytes": round(real_share * self.block_bytes),
            "forward_bytes": round(real_share * self.forward_bytes),
            "layers": tuple(layers),
        }
        made = self.model_copy(update=whole)
        return made if self.absolute else made.in_shares()

    def with_modules(self, name: str) -> Self:
        """The same model with adapters on a set of modules (`MODULE_SETS`) of each layer.

        Raises:
            PlacementError: An unknown set, or a layer has no such module.
        """
        if name in ("", "all"):
            return self
        return self.model_copy(update={"layers": tuple(layer.with_modules(name, fast=self.fast) for layer in self.layers)})

    def adapter_bytes(self, layers: Iterable[int]) -> int:
        """Bytes of the adapters' weights, as they are stored (float32)."""
        return round(WEIGHT_BYTES * self.linear("params").of(layers))

    def inference_latency(self, layers: Iterable[int]) -> float:
        """Seconds that adapters in `layers`, not merged into the weights, add to each generated token."""
        return self.linear("latency").of(layers)

    @classmethod
    def from_shapes(cls, shapes: Shapes, **sizes: Any) -> Self:
        """Relative costs of a model of which only the shapes are known: times are shares of the step of all layers.

        FLOPs and bytes are weighed as on a usual device, `BALANCE` FLOP in the time of one byte. `sizes` are arguments of `from_rates`.
        """
        return cls.from_rates(shapes, flops=BALANCE, bandwidth=1.0, launch=0.0, **sizes).model_copy(update={"device": ""}).in_shares()

    def in_shares(self) -> Self:
        """The same costs with times as shares of the step of all layers, and latencies as shares of what all of them add."""
        every = range(len(self.layers))
        step, latency = self.step_time(every), self.inference_latency(every)

        def shares(part: Part) -> dict[str, float]:
            seconds = {name: value for name, value in part if name.endswith("_seconds")}
            return {name: value / (latency if name == "adapter_latency_seconds" else step) for name, value in seconds.items()}

        layers = tuple(
            layer.model_copy(update=shares(layer) | {"modules": tuple(m.model_copy(update=shares(m)) for m in layer.modules)})
            for layer in self.layers
        )
        return self.model_copy(update=shares(self) | {"layers": layers, "source": "shapes"})

    @classmethod
    def from_rates(
        cls,
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
        fast: bool = False,
        model: str = "",
        device: str = "",
    ) -> Self:
        """Costs of a model from its shapes and a device's rates; each operation takes `max(FLOPs / flops, bytes / bandwidth, launch)`.

        Against what was measured of a 135M model on a CPU, with that CPU's rates: memory within 5 %, the shares of placements in the
        step time of all layers within 8 points; of a small model of experts (4 layers, 4 of 16 experts a token) memory within 21 %, the
        shares within 15 points. A measured model is better wherever it can be had.

        Args:
            shapes: For each layer the `(in, out)` of its linear modules, and a `Shape` for each stack of its experts; the first module
                of a layer reads the hidden state.
            flops: Floating point operations per second that large matrix products reach there.
            bandwidth: Bytes per second of the memory.
            launch: Seconds that the smallest operation takes.
            vocabulary: Rows of the head; the embedding is taken to be tied to it.
            batch_size: Records in the batch, of `length` tokens each.
            labelled: Labelled tokens in the batch; half of all when not given.
            rank: Rank of each adapter.
            dtype: Type of weights and activations.
            fast: Of a step with the fast parts; `length` is that of the records then, without padding.

        Raises:
            CardError: A layer without modules, or a size or rate that is not positive or too large.
        """
        labelled = max(1, batch_size * length // 2) if labelled is None else labelled
        sizes = {"flops": flops, "bandwidth": bandwidth, "vocabulary": vocabulary, "batch_size": batch_size, "length": length}
        for name, size in {**sizes, "labelled": labelled, "rank": rank}.items():
            if not 0 < size < float("inf"):
                raise CardError(f"{name} is {size!r}; give a number above 0")
        if dtype not in ELEMENT_BYTES:
            raise CardError(f"dtype {dtype!r} has no known size; choose one of {', '.join(ELEMENT_BYTES)}")
        if not shapes or any(not layer for layer in shapes):
            raise CardError("a layer has no linear maps; give the (in, out) of the maps of every layer")
        blocks = [[Shape(*shape) for shape in layer] for layer in shapes]
        step = _Step(flops, bandwidth, launch, ELEMENT_BYTES[dtype], batch_size, length, rank, fast)
        positions, width = batch_size * length, blocks[0][0].in_features
        try:
            # The head runs on every position that is labelled in some row; softmax and loss make float32 copies of the logits.
            rows = labelled if batch_size == 1 or fast else min(positions, round(UNION * labelled))
            head = step.product(rows, width, vocabulary) + step.moved((rows + labelled) * vocabulary, 3, size=4)
            # Alive within one block at its worst moment: three tensors of its widest module.
            widest = max(step.rows(each) * max(each.in_features, each.out_features) for layer in blocks for each in layer)
            transient = step.size * 3 * widest
            return cls(
                source="rates",
                model=model,
                batch_size=batch_size,
                tokens=length,
                real_tokens=positions if fast else 0,
                labelled_tokens=labelled,
                fast=fast,
                rank=rank,
                dtype=dtype,
                device=device or f"{flops:.3g} FLOP/s, {bandwidth:.3g} B/s",
                embedding_seconds=step.moved(positions * width, 3),
                head_forward_seconds=head,
                head_backward_seconds=head,
                overhead_seconds=0.0,
                weights_bytes=step.size * (vocabulary * width + sum(each.weights for layer in blocks for each in layer)),
                head_weights_bytes=step.size * vocabulary * width,
                shared_bytes=positions * width * step.size,
                head_bytes=4 * vocabulary * (3 * min(labelled, CHUNK) if fast else rows + 3 * labelled),
                block_bytes=transient + step.size * max(map(_unfolded, blocks)),
                forward_bytes=transient,
                layers=tuple(step.layer(layer) for layer in blocks),
            )
        except (ValidationError, OverflowError):
            raise CardError("the maps, records or tokens are so large that no cost follows from them; check these sizes") from None


def _checked(layers: Iterable[int], depth: int) -> list[int]:
    chosen = sorted(set(layers))
    if not chosen:
        raise PlacementError("a placement without layers has no cost; give at least one layer")
    if chosen[0] < 0 or chosen[-1] >= depth:
        wrong = chosen[0] if chosen[0] < 0 else chosen[-1]
        raise PlacementError(f"layer {wrong} is not in the cost model; it has layers 0 to {depth - 1}")
    return chosen


def _unfolded(layer: Sequence[Shape]) -> int:
    """Gradients of the weights of a layer's largest stack, less the folded weights of the other stacks, which are dropped by then."""
    sizes = [each.weights for each in layer if each.experts > 1]
    return max(0, 2 * max(sizes, default=0) - sum(sizes))


@dataclass(frozen=True)
class _Step:
    """Seconds of the parts of a training step on one batch, from FLOPs and bytes; `size` is that of a number in bytes."""

    flops: float
    bandwidth: float
    launch: float
    size: int
    batch_size: int
    length: int
    rank: int
    fast: bool = False

    def seconds(self, flops: float, moved_bytes: float) -> float:
        return max(flops / self.flops, moved_bytes / self.bandwidth, self.launch)

    def moved(self, elements: int, times: float, size: int | None = None) -> float:
        """To read or write so many elements so many times."""
        return self.seconds(0.0, elements * (size or self.size) * times)

    def product(self, rows: int, n_in: int, n_out: int, rate: float = 1.0) -> float:
        """`[rows, in] @ [in, out]` at a share of the device's FLOP/s."""
        return self.seconds(2 * rows * n_in * n_out / rate, self.size * (rows * (n_in + n_out) + n_in * n_out))

    def rows(self, shape: Shape) -> int:
        """Rows that enter a module, those of all its experts together."""
        return round(self.batch_size * self.length * shape.active)

    def forward(self, shape: Shape) -> float:
        """A frozen module; of its experts only those that are used are read."""
        rows, (n_in, n_out) = self.rows(shape), shape[:2]
        return self.seconds(2 * rows * n_in * n_out, self.size * (rows * (n_in + n_out) + min(shape.experts, rows) * n_in * n_out))

    def thin(self, rows: int, n_in: int, n_out: int) -> float:
        """The two products of an adapter, `[rows, in] @ [in, r] @ [r, out]`."""
        return self.product(rows, n_in, self.rank, THIN) + self.product(rows, self.rank, n_out, THIN)

    def adapter(self, rows: int, shape: Shape) -> float:
        """Forward of an adapter: two thin products, the scaling (read, write) and the sum (two reads, write); fused, only read and write.

        Experts: PEFT adds `B A` to the weights of all of them before they run, which is one thin product, a read and a write.
        """
        n_in, n_out = shape[:2]
        if shape.experts > 1:
            return self.product(shape.experts * n_out, self.rank, n_in, THIN) + self.moved(shape.weights, 2)
        return self.thin(rows, n_in, n_out) + self.moved(rows * n_out, 2) + (0.0 if self.fast else self.moved(rows * n_out, 3))

    def module(self, shape: Shape) -> ModuleCost:
        """An adapter's forward; backward has the gradients of A, of B and of the input, and sums the latter; and the update.

        Backward of experts needs the gradients of all their weights first, from which those of A and B follow.
        """
        rows, (n_in, n_out) = self.batch_size * self.length, shape[:2]
        forward = self.adapter(rows, shape)
        if shape.experts > 1:
            backward = self.forward(shape) + self.moved(shape.weights, 1) + 2 * forward
        else:
            summed = self.moved(rows * n_in, 2) if self.fast else self.moved(rows * n_out, 2) + self.moved(rows * n_in, 3)
            backward = 2 * self.thin(rows, n_in, n_out) + summed
        update = self.moved(self.parameters(shape), 16, size=WEIGHT_BYTES)
        seconds = forward + backward + update
        return ModuleCost(name=shape.name, in_features=n_in, out_features=n_out, experts=shape.experts, adapter_seconds=seconds)

    def parameters(self, shape: Shape) -> int:
        """Weights of the adapters of a module or stack."""
        return self.rank * shape.experts * (shape.in_features + shape.out_features)

    def layer(self, shapes: Sequence[Shape]) -> LayerCost:
        """One layer: its products, attention, and what is elementwise."""
        rows, width = self.batch_size * self.length, shapes[0].in_features
        widths = sum(round(each.active * each.out_features) for each in shapes)
        products = sum(self.forward(each) for each in shapes)
        attention = self.seconds(4 * rows * self.length * width, self.size * 2 * rows * (4 * width + self.length))
        elementwise = self.moved(rows * (8 * width + 2 * widths), 1)
        modules = tuple(self.module(each) for each in shapes)

        # Inputs that are kept for adapters alone, as far as widths tell. There are two of hidden width, of attention and of the
        # feed-forward part, however many modules read them; the output of attention is kept anyway (a fused adapter keeps it once more).
        # Any other width is its own input.
        single, stacked = [each for each in shapes if each.experts == 1], [each for each in shapes if each.experts > 1]
        inputs = [each.in_features for each in single if each.in_features != width]
        inputs += [width] * min(3 if self.fast else 2, len(single) - len(inputs))
        saved = rows * (sum(inputs) + self.rank * len(single)) + sum(self.rows(each) * each.in_features + each.weights for each in stacked)
        return LayerCost(
            forward_seconds=products + attention + elementwise,
            backward_seconds=products + 2 * attention + 2 * elementwise,
            adapter_seconds=sum(module.adapter_seconds for module in modules),
            saved_bytes=self.size * rows * (5 * width + widths),
            adapter_saved_bytes=self.size * saved,
            adapter_parameters=sum(self.parameters(each) for each in shapes),
            adapter_latency_seconds=sum(self.adapter(1, each) for each in (*single, *stacked)),
            weights_bytes=self.size * sum(each.weights for each in shapes),
            modules=modules,
        )
