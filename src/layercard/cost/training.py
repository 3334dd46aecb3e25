"""What a whole training costs: seconds of its steps and evaluations, and memory at its worst moment, from the cost of one step.

With the fast parts on, a record's frozen blocks run when it is seen for the first time; later epochs read what they gave. So with ℓ the
lowest adapted layer, and times scaled to the tokens of a mean step,

    first(S) = embedding + head + rest + Σ_all forward_j + Σ_{j ≥ ℓ} backward_j + Σ_{i ∈ S} adapter_i
    later(S) = first(S) − embedding − Σ_{j < ℓ} forward_j
    train    = steps · (seen first · first + (1 − seen first) · later)

Streamed, the frozen blocks run once over all records before the training, and every step is a later one. Stock training has first steps
only, and computes padding too.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, FiniteFloat

from layercard.cost.model import CostModel
from layercard.data.load import Dataset, Example, shuffled
from layercard.errors import CardError
from layercard.records import Part, Record
from layercard.settings import TrainSettings

EVALUATED = 16
"""Records in a batch when the held-out loss is measured."""
GRADIENT = 0.5
"""Share of the fast head's time that is its forward; the rest is the gradient, which is taken in the same go."""

_Amount = Annotated[FiniteFloat, Field(ge=0)]


class Workload(Part):
    """How much a training has to compute, whatever it adapts; tokens are means over the steps.

    Attributes:
        steps: Updates.
        records: Records in the data.
        batch_size: Records that go through the model at once.
        tokens: Tokens of a step, padding not counted.
        padded_tokens: Tokens of a step with padding.
        labelled_tokens: Labelled tokens of a step.
        seen_first: Share of the steps' tokens that belong to records which were not in a step before, 0 to 1.
        epochs: Passes over the data.
        cached_tokens: Tokens of all records that training and evaluation see, each record once.
        evaluations: How often the held-out loss is measured, before and after training included.
        held_out_tokens: Tokens of one evaluation, with padding.
        held_out_labelled: Labelled tokens of one evaluation.
    """

    steps: int
    records: int
    batch_size: int
    tokens: _Amount
    padded_tokens: _Amount
    labelled_tokens: _Amount
    seen_first: _Amount
    epochs: _Amount
    cached_tokens: int
    evaluations: int = 0
    held_out_tokens: int = 0
    held_out_labelled: int = 0


def order_of(data: Dataset, settings: TrainSettings) -> list[int]:
    """The record at each place of a training, as `layercard train` draws them."""
    return shuffled(len(data), settings.total_steps(len(data)) * settings.batch_size * settings.accumulation, settings.seed)


def heaviest_step(examples: Sequence[Example], batch_size: int, accumulation: int) -> int:
    """The step, counted from 0, with the largest padded batch; never the first of several, which has no optimiser state yet."""
    starts = range(0, len(examples), batch_size)
    sizes = [batch_size * max(len(example.input_ids) for example in examples[start : start + batch_size]) for start in starts]
    steps = [max(sizes[start : start + accumulation]) for start in range(0, len(sizes), accumulation)]
    return max(range(min(1, len(steps) - 1), len(steps)), key=steps.__getitem__)


def heaviest_batch(data: Dataset, settings: TrainSettings) -> list[int]:
    """The records of the batch whose memory a run's record counts."""
    order, size, accumulation = order_of(data, settings), settings.batch_size, settings.accumulation
    step = heaviest_step([data.examples[row] for row in order], size, accumulation)
    parts = [order[start : start + size] for start in range(step * size * accumulation, (step + 1) * size * accumulation, size)]
    return max(parts, key=lambda rows: max(len(data.examples[row].input_ids) for row in rows))


def workload(data: Dataset, settings: TrainSettings, valid: Dataset | None = None, evaluations: int = 2) -> Workload:
    """The workload of a training, counted record by record in the order in which it will see them."""
    steps, order, size = settings.total_steps(len(data)), order_of(data, settings), settings.batch_size
    lengths, labelled = [len(example.input_ids) for example in data.examples], [example.labelled for example in data.examples]
    tokens = sum(lengths[row] for row in order)
    padded = sum(len(part) * max(lengths[row] for row in part) for part in _parts(order, size))
    seen = sum(lengths[row] for row in set(order))
    held_out, held_out_labelled = 0, 0
    if valid is not None:
        sizes = sorted(len(example.input_ids) for example in valid.examples)
        held_out, held_out_labelled = sum(len(part) * max(part) for part in _parts(sizes, EVALUATED)), valid.labelled_tokens
    return Workload(
        steps=steps,
        records=len(data),
        batch_size=size,
        tokens=tokens / steps,
        padded_tokens=padded / steps,
        labelled_tokens=sum(labelled[row] for row in order) / steps,
        seen_first=seen / tokens,
        epochs=len(order) / len(data),
        cached_tokens=seen + (0 if valid is None else valid.tokens),
        evaluations=0 if valid is None else evaluations,
        held_out_tokens=held_out,
        held_out_labelled=held_out_labelled,
    )


def _parts(values: Sequence[int], size: int) -> list[Sequence[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


class TrainingForecast(Part):
    """What a training is forecast to take.

    Attributes:
        name: What the placement is called.
        layers: Its layers.
        modules: Its set of modules.
        fast: Whether the fast parts are on; else it is stock training.
        stream: Whether the blocks below the lowest adapted one stay on disk.
        first_step_seconds: A step on records that were not seen before.
        later_step_seconds: A step on records whose frozen blocks are known.
        pass_seconds: The pass of a streamed training over all records.
        train_seconds: All steps.
        evaluation_seconds: All evaluations.
        memory_bytes: At the worst moment, above the frozen model (`Run.peak_memory_bytes`).
        weights_bytes: The frozen weights that are in memory.
        process_bytes: All that the process takes at its worst moment, weights and libraries included, the prefix cache not.
        cache_bytes: What the prefix cache holds, in memory, or streamed on disk.
    """

    name: str
    layers: tuple[int, ...]
    modules: str = "all"
    fast: bool = True
    stream: bool = False
    first_step_seconds: _Amount
    later_step_seconds: _Amount
    pass_seconds: _Amount = 0.0
    train_seconds: _Amount
    evaluation_seconds: _Amount
    memory_bytes: int
    weights_bytes: int
    process_bytes: int
    cache_bytes: int = 0

    @property
    def seconds(self) -> float:
        """From the loaded model to the evaluated adapter."""
        return self.pass_seconds + self.train_seconds + self.evaluation_seconds

    @property
    def resident_bytes(self) -> int:
        """What the process takes, with what the prefix cache keeps in memory."""
        return self.process_bytes + (0 if self.stream else self.cache_bytes)


def forecast_training(
    cost: CostModel,
    work: Workload,
    layers: Iterable[int],
    *,
    name: str = "",
    modules: str = "all",
    stream: bool = False,
    cache: bool = True,
    width: int = 0,
) -> TrainingForecast:
    """Forecast a training from the cost of one step.

    Args:
        cost: Of a step with the fast parts (`CostModel.fast`), or of a stock one, whose training has no fast parts then.
        work: What the training has to compute.
        layers: Where the adapters are.
        name: What the placement is called.
        modules: The set of modules that is adapted in these layers.
        stream: The blocks below the lowest adapted one stay on disk.
        cache: Whether there may be a prefix cache.
        width: Size of the hidden state, for the size of the cache.

    Raises:
        PlacementError: A layer is not there, or has no such modules.
    """
    chosen = sorted(set(layers))
    cost = cost.with_modules(modules)
    lowest, fast = chosen[0], cost.fast
    # Everything but the head and the rest of a step grows with the tokens that go through the blocks.
    tokens, measured = (work.tokens, cost.real_tokens) if fast else (work.padded_tokens, cost.batch_size * cost.tokens)
    scale, head_scale = tokens / measured, work.labelled_tokens / cost.labelled_tokens
    parts = cost.step_parts(chosen)
    frozen = parts["embedding"] + parts["forward below"]
    trained = parts["forward above"] + parts["backward above"] + parts["adapters"]
    later = scale * trained + head_scale * parts["head and loss"] + parts["update and rest"]
    first = later + scale * frozen

    # A cache is for what is seen more than once: in later epochs, or in training and evaluations within it.
    cached = fast and cache and lowest > 0 and work.epochs > 1
    itemsize = 4 if cost.dtype == "float32" else 2
    seen_first = 0.0 if stream else work.seen_first if cached else 1.0
    head_forward = cost.head_forward_seconds * (GRADIENT if fast else 1.0)
    forward = frozen + parts["forward above"]
    once = forward * work.held_out_tokens / measured + head_forward * work.held_out_labelled / cost.labelled_tokens
    frozen_part = frozen / (forward or 1.0)
    return TrainingForecast(
        name=name,
        layers=tuple(chosen),
        modules=modules,
        fast=fast,
        stream=stream,
        first_step_seconds=first,
        later_step_seconds=later if cached or stream else first,
        pass_seconds=frozen * work.cached_tokens / measured if stream else 0.0,
        train_seconds=work.steps * (seen_first * first + (1 - seen_first) * later),
        evaluation_seconds=work.evaluations * once * (1 - frozen_part if stream else 1.0),
        memory_bytes=cost.peak_memory(chosen),
        weights_bytes=cost.weights_in_memory(chosen, stream=stream),
        process_bytes=cost.process_memory(chosen, stream=stream),
        cache_bytes=work.cached_tokens * width * itemsize if cached or stream else 0,
    )


class TrainingPlan(Record):
    """Forecasts of a training in all layers and in other placements.

    Attributes:
        model: Name, and fingerprint where it was loaded.
        data: The records.
        settings: How it would be trained.
        workload: What that has to compute.
        source: `measured` on this machine, or `rates`: from the published rates of a device.
        device: Where, in words.
        memory_bytes: What there is for the process.
        margin: Forecasts of time may be too high or too low by this factor; `None` where they were measured.
        price_per_hour: Of the device, in any currency.
        rows: The forecasts; the first is stock training of all layers.
        notes: What a user should know.
    """

    error: ClassVar = CardError
    noun: ClassVar = "forecast"
    made_by: ClassVar = "layercard plan"
    schema_: Literal["layercard-forecast/1"] = Field(default="layercard-forecast/1", alias="schema")
    model: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    workload: Workload
    source: Literal["measured", "rates"]
    device: str
    memory_bytes: int
    margin: float | None = None
    price_per_hour: float | None = None
    rows: tuple[TrainingForecast, ...]
    notes: tuple[str, ...] = ()

    def fits(self, row: TrainingForecast) -> bool:
        """Whether it fits the memory that there is."""
        return row.resident_bytes <= self.memory_bytes

    def price(self, row: TrainingForecast) -> float | None:
        """What a training costs, where the price of an hour is known."""
        return None if self.price_per_hour is None else self.price_per_hour * row.seconds / 3600

    def to_json(self) -> dict[str, Any]:
        """The JSON object, with the sums of each row beside its parts."""
        value = super().to_json()
        for row, written in zip(self.rows, value["rows"], strict=True):
            written |= {"seconds": row.seconds, "resident_bytes": row.resident_bytes, "fits": self.fits(row), "price": self.price(row)}
        return value
