"""What adapters cost when the model writes: time to the first token, tokens a second and memory, against the base model.

The variants (base, adapters as PEFT runs them, adapters merged into the weights) take turns within each round, every second round in
the opposite order, so that a machine that slows down slows them all. Each reading is compared with the base model's of the same round.
No token ends a text here, and no value changes a time: every variant does the same number of steps.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel

from layercard.cost.measure import device_name, synchronize
from layercard.errors import DataError, ModelError
from layercard.measure import PeakMemory
from layercard.models.hooks import frozen
from layercard.models.load import BaseModel, Progress, describe
from layercard.models.losses import keeps_logits
from layercard.records import Estimate, Part, Record
from layercard.serving.adapter_switch import Adapter, check_positions, merged, switched_on

Clock = Callable[[], float]


class Variant(Part):
    """A way to run the model: kind `base`, `adapter` or `merged`. Of each reading there is the median, the smallest and the largest."""

    name: str
    kind: str
    layers: list[int]
    first_token_seconds: Estimate
    first_token_ratio: Estimate  # to the base model in the same round
    tokens_per_second: Estimate  # all rows together
    tokens_per_second_ratio: Estimate
    weights_bytes: int  # of a merged model as if its base were gone
    peak_bytes: int  # alive beside the weights at the worst moment, keys and values included


class Latency(Record):
    """Times and memory of each variant, and the sizes that they were measured with."""

    error: ClassVar = DataError
    noun: ClassVar = "latency measurement"
    made_by: ClassVar = "layercard latency"

    schema_: Literal["layercard-latency/1"] = Field(default="layercard-latency/1", alias="schema")
    model: dict[str, Any]
    dtype: str
    device: str
    threads: int
    variants: list[Variant]
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int


@dataclass(frozen=True)
class Reading:
    """One run: seconds until the first token is known, and tokens a second after it, all rows together."""

    first_token: float
    rate: float


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
) -> Latency:
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

    Raises:
        DataError: The sizes are too small, too long for the model, or two adapters have one name.
        ModelError: Memory runs out.
    """
    # Step 1: refuse what cannot be timed.
    sizes = (prompt_tokens, "prompt tokens", 1), (new_tokens, "new tokens", 2), (batch_size, "rows in a batch", 1), (repeats, "repeats", 1)
    for value, size, least in sizes:
        if value < least:
            raise DataError(f"{value} {size} cannot be timed; give {least} or more")
    check_positions(base, prompt_tokens, new_tokens)
    names = [adapter.name for adapter in adapters]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"adapter {twice} is given twice; name each once")

    # Step 2: run all variants in each round. The first round warms up and counts memory.
    variants: list[tuple[str, str, Adapter | None]] = [("base", "base", None)]
    for given in adapters:
        variants += [(given.name, "adapter", given), (f"{given.name}, merged", "merged", merged(given))]
    vocabulary = base.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (batch_size, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(base.device)
    total, done, peak = (repeats + 1) * len(variants), 0, PeakMemory(base.device)
    peaks, readings = dict[str, int](), {name: list[Reading]() for name, _, _ in variants}
    try:
        with frozen(base.model), torch.no_grad():
            for number in range(repeats + 1):
                for name, _, adapter in variants if number % 2 == 0 else reversed(variants):
                    if progress is not None:
                        progress("latency", done, total)
                    with switched_on(base, adapter):
                        if number == 0:
                            peak.start()
                        reading = write(base.model, ids, new_tokens, device=base.device, clock=clock if number else time.perf_counter)
                    if number == 0:
                        peak.stop()
                        peaks[name] = peak.bytes
                    else:
                        readings[name].append(reading)
                    done += 1
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error):
            rows = f"{batch_size} rows of {prompt_tokens} tokens"
            raise ModelError(f"memory ran out writing after {rows} with {base.name}; choose a smaller batch or prompt") from error
        raise
    finally:
        peak.stop()
    if progress is not None:
        progress("latency", total, total)

    # Step 3: compare each reading with the base model's of the same round.
    results = []
    for name, kind, adapter in variants:
        pairs = list(zip(readings[name], readings["base"], strict=True))
        with switched_on(base, adapter):
            weights = sum(weight.nbytes for weight in base.model.parameters())
        results.append(
            Variant(
                name=name,
                kind=kind,
                layers=[] if adapter is None else list(adapter.layers),
                first_token_seconds=_spread(reading.first_token for reading, _ in pairs),
                first_token_ratio=_spread(reading.first_token / plain.first_token for reading, plain in pairs),
                tokens_per_second=_spread(reading.rate for reading, _ in pairs),
                tokens_per_second_ratio=_spread(reading.rate / plain.rate for reading, plain in pairs),
                weights_bytes=weights,
                peak_bytes=peaks[name],
            )
        )
    return Latency(
        model=describe(base),
        dtype=str(base.model.dtype).removeprefix("torch."),
        device=device_name(base.device),
        threads=torch.get_num_threads() if base.device.type == "cpu" else 0,
        variants=results,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        repeats=repeats,
    )


def write(model: PreTrainedModel, ids: torch.Tensor, count: int, *, device: torch.device, clock: Clock = time.perf_counter) -> Reading:
    """Write `count` tokens after the prompts `ids: [B, T]`, greedily and with a cache, whatever the tokens are."""
    last = {"logits_to_keep": 1} if keeps_logits(model) else {}
    synchronize(device)
    started = clock()
    cache, following = None, ids
    for number in range(count):
        output = model(input_ids=following, past_key_values=cache, use_cache=True, **last)
        cache, following = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
        if number == 0:
            synchronize(device)
            first = clock() - started
    synchronize(device)
    return Reading(first, ids.shape[0] * (count - 1) / (clock() - started - first))


def _spread(values: Iterable[float]) -> Estimate:
    """The median of some readings, the smallest and the largest."""
    readings = list(values)
    return Estimate(value=statistics.median(readings), low=min(readings), high=max(readings))
