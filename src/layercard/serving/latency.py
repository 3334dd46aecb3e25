"""What adapters cost when the model writes: time to the first token, tokens a second and memory, against the base model.

The variants (base, adapters as PEFT runs them, adapters merged into the weights) take turns within each round, every second round in
the opposite order, so that a machine that slows down slows them all. Each reading is compared with the base model's of the same round.
No token ends a text here, and no value changes a time: every variant does the same number of steps.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from layercard.cost.measure import device_name, synchronize
from layercard.errors import DataError, ModelError
from layercard.measure import PeakMemory
from layercard.models.hooks import frozen
from layercard.models.load import BaseModel, Progress, describe, keeps_logits
from layercard.serving.adapter_switch import Adapter, merged, switched_on

SCHEMA = "layercard-latency/1"
Clock = Callable[[], float]


@dataclass(frozen=True)
class Reading:
    """One run: seconds until the first token is known, and tokens a second after it, all rows together."""

    first_token: float
    rate: float


@dataclass(frozen=True)
class Spread:
    """The median of some readings, the smallest and the largest."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one reading.

        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(value=2.0, low=1.0, high=3.0)
        """
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Variant:
    """A way to run the model.

    Attributes:
        name: What it is called.
        kind: `base`, `adapter` or `merged`.
        adapter: What is put on the base model; `None` for the base model itself.
    """

    name: str
    kind: str
    adapter: Adapter | None


def variants(adapters: Sequence[Adapter]) -> list[Variant]:
    """The base model, each adapter as PEFT runs it, and each merged.

    Raises:
        DataError: Two adapters have the same name.
    """
    names = [adapter.name for adapter in adapters]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"adapter {twice} is given twice; name each once")
    found = [Variant("base", "base", None)]
    for adapter in adapters:
        found += [Variant(adapter.name, "adapter", adapter), Variant(f"{adapter.name}, merged", "merged", merged(adapter))]
    return found


def measure_latency(
    base: BaseModel,
    adapters: Sequence[Adapter],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 5,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Time the base model, each adapter and each adapter merged, on random prompts.

    Args:
        base: The model; it is the same afterwards.
        adapters: Adapters of it, switched off.
        prompt_tokens: Length T of each prompt.
        new_tokens: Tokens that each row writes, at least 2: the first ends the prompt's pass, the others make the rate.
        batch_size: Rows B that are written at once.
        repeats: Rounds; one more comes first to warm up and to count memory.
        progress: Told of the phase `latency`.
        clock: Gives seconds. `time.process_time`, the CPU time of this process, is steadier where other programs run on the same cores;
            it says nothing about a GPU.

    Returns:
        A JSON value of schema `layercard-latency/1`. For each variant: `first_token_seconds`, `tokens_per_second` (B rows together) and
        their ratios to the base model in the same round, each with `value` (median), `low` and `high` (smallest and largest reading);
        `weights_bytes` (all weights, a merged model counted as if its base were gone) and `peak_bytes` (what is alive beside the weights
        at the worst moment, keys and values included).

    Raises:
        DataError: The sizes are too small, too long for the model, or two adapters have one name.
        ModelError: Memory runs out.
    """
    _check(base, prompt_tokens, new_tokens, batch_size, repeats)
    ways, tell = variants(adapters), progress or (lambda *_: None)
    vocabulary = base.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (batch_size, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(base.device)
    total, peaks, readings = (repeats + 1) * len(ways), dict[str, int](), {way.name: list[Reading]() for way in ways}
    with frozen(base.model), torch.no_grad():
        for at in range(repeats + 1):
            for place, way in enumerate(ways if at % 2 == 0 else reversed(ways)):
                tell("latency", at * len(ways) + place, total)
                with switched_on(base, way.adapter):
                    if at == 0:
                        peaks[way.name] = _peak(base, ids, new_tokens)
                    else:
                        readings[way.name].append(_timed(base, ids, new_tokens, clock))
    tell("latency", total, total)
    return _result(base, ways, readings, peaks) | {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "repeats": repeats,
    }


def write(model: PreTrainedModel, ids: torch.Tensor, count: int, *, device: torch.device, clock: Clock = time.perf_counter) -> Reading:
    """Write `count` tokens after the prompts `ids: [B, T]`, greedily and with a cache, whatever the tokens are."""
    last = {"logits_to_keep": 1} if keeps_logits(model) else {}
    synchronize(device)
    started = clock()
    cache, following = None, ids
    for at in range(count):
        output = model(input_ids=following, past_key_values=cache, use_cache=True, **last)
        cache, following = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
        if at == 0:
            synchronize(device)
            first = clock() - started
    synchronize(device)
    return Reading(first, ids.shape[0] * (count - 1) / (clock() - started - first))


def _timed(base: BaseModel, ids: torch.Tensor, count: int, clock: Clock) -> Reading:
    try:
        return write(base.model, ids, count, device=base.device, clock=clock)
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error):
            rows = f"{ids.shape[0]} rows of {ids.shape[1]} tokens"
            raise ModelError(f"memory ran out writing after {rows} with {base.name}; choose a smaller batch or prompt") from error
        raise


def _peak(base: BaseModel, ids: torch.Tensor, count: int) -> int:
    """Bytes alive beside the weights at the worst moment; this run warms up too."""
    peak = PeakMemory(base.device)
    peak.start()
    try:
        _timed(base, ids, count, time.perf_counter)
    finally:
        peak.stop()
    return peak.bytes


def _weights(base: BaseModel, adapter: Adapter | None) -> int:
    with switched_on(base, adapter):
        return sum(weight.nbytes for weight in base.model.parameters())


def _result(base: BaseModel, ways: Sequence[Variant], readings: dict[str, list[Reading]], peaks: dict[str, int]) -> dict[str, Any]:
    plain = readings["base"]
    rows = []
    for way in ways:
        pairs = list(zip(readings[way.name], plain, strict=True))
        rows.append(
            {
                "name": way.name,
                "kind": way.kind,
                "layers": list(way.adapter.layers) if way.adapter is not None else [],
                "first_token_seconds": asdict(Spread.of([found.first_token for found, _ in pairs])),
                "first_token_ratio": asdict(Spread.of([found.first_token / other.first_token for found, other in pairs])),
                "tokens_per_second": asdict(Spread.of([found.rate for found, _ in pairs])),
                "tokens_per_second_ratio": asdict(Spread.of([found.rate / other.rate for found, other in pairs])),
                "weights_bytes": _weights(base, way.adapter),
                "peak_bytes": peaks[way.name],
            }
        )
    return {
        "schema": SCHEMA,
        "model": describe(base),
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "device": device_name(base.device),
        "threads": torch.get_num_threads() if base.device.type == "cpu" else 0,
        "variants": rows,
    }


def _check(base: BaseModel, prompt_tokens: int, new_tokens: int, batch_size: int, repeats: int) -> None:
    sizes = {
        "prompt tokens": (prompt_tokens, 1),
        "new tokens": (new_tokens, 2),
        "rows in a batch": (batch_size, 1),
        "repeats": (repeats, 1),
    }
    for name, (value, least) in sizes.items():
        if value < least:
            raise DataError(f"{value} {name} cannot be timed; give {least} or more")
    limit = getattr(base.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(limit, int) and prompt_tokens + new_tokens > limit:
        raise DataError(f"{prompt_tokens} tokens and {new_tokens} new ones exceed the {limit} positions of {base.name}; take fewer")
