"""Costs without a clock: from the shapes of the linear maps, and a device's FLOP/s and bytes/s."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layercard.cost import WEIGHT_BYTES, CostModel, LayerCost, ModuleCost, Shape, Shapes
from layercard.errors import CardError

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
