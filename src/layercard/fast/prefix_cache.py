"""The frozen-prefix cache at work: what it knows and whether it pays, and one batch on its way through the frozen blocks."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from layercard.cost.measure import synchronize
from layercard.data.load import Example
from layercard.errors import TrainingError
from layercard.fast.anatomy import Anatomy, named_arguments
from layercard.fast.packing import NAME, Records
from layercard.fast.prefix_blocks import adapter_states, fingerprints, longest_batch, module_groups, relative_positions
from layercard.fast.prefix_records import Record, Selection, Uncacheable, record_key, take_apart
from layercard.fast.prefix_store import CacheWarning, Store, checksum, disk_rates, gigabytes, room
from layercard.fast.read_ahead import ReadAhead
from layercard.models.hooks import block_input

PASSES = 2.0
"""Passes over the data that are expected where no number is given."""
TIMED_BATCHES = 3
"""Batches that are timed before the decision to go on stands."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""How far a token's hidden state read from disk may lie from the computed one, as a share of its length."""


@dataclass(frozen=True)
class Rates:
    """Seconds a token takes, as measured on the first batches."""

    compute: float  # the forward of embeddings and frozen blocks
    read: float  # looking a record up and putting its hidden states in place
    store: float = 0.0  # keeping them after they were computed, writing included


@dataclass(frozen=True)
class Forecast:
    """What is to be expected of a cache."""

    needed: int | None  # bytes that the data set takes; None where its size is not known
    limit: int  # bytes that the cache may take
    passes: float  # over the data, training and evaluation
    break_even: float  # number of passes from which on the cache pays; infinite where reading is no faster than computing
    saved: float | None  # seconds saved over all passes; None where the size of the data or the rates are not known
    reason: str  # why the cache should stay off; empty where it pays

    @property
    def pays(self) -> bool:
        """Whether the cache should be used."""
        return not self.reason


def forecast(
    tokens: int | None, width: int, itemsize: int, *, passes: float, limit: int, rates: Rates | None = None, filled: bool = False
) -> Forecast:
    """Disk or memory use, break-even and time saved of a cache.

    With c, r and w the seconds a token takes to compute, read and store, P passes cost `P c` without a cache and `c + w + (P − 1) r`
    with one, so that it pays from `P = 1 + w / (c − r)` passes on. A cache that is filled already costs `P r`.

    Args:
        tokens: Real tokens of the data set, where they are known.
        width: Width of the hidden states.
        itemsize: Bytes of one number in the cache.
        passes: Expected passes over the data.
        limit: Bytes that the cache may take.
        rates: Measured rates; without them only the size is judged.
        filled: Whether the records are in the cache already.

    >>> forecast(1_000_000, 576, 4, passes=3, limit=10**10, rates=Rates(compute=1e-4, read=1e-5, store=2e-5)).saved
    160.0
    >>> forecast(1_000_000, 576, 4, passes=3, limit=10**9).reason
    'the data set takes 2.3 GB and the cache may take 1.0 GB; raise max_bytes, or keep bfloat16'
    """
    size = None if tokens is None else tokens * width * itemsize
    break_even, saved, reason = 0.0 if filled else 1.0, None, ""
    if rates is not None:
        gain = rates.compute - rates.read
        break_even = float("inf") if gain <= 0 else 0.0 if filled else 1 + rates.store / gain
        spent = passes * rates.read if filled else rates.compute + rates.store + (passes - 1) * rates.read
        saved = None if tokens is None else round(tokens * (passes * rates.compute - spent), 3)
    if size is not None and size > limit:
        remedy = "raise max_bytes" + (", or keep bfloat16" if itemsize > 2 else "")
        reason = f"the data set takes {gigabytes(size)} and the cache may take {gigabytes(limit)}; {remedy}"
    elif rates is not None and rates.compute <= rates.read:
        reason = f"reading a token takes {rates.read * 1e6:.1f} µs and computing it {rates.compute * 1e6:.1f} µs"
    elif not filled and passes <= break_even:
        reason = f"it pays from {break_even:.2f} passes over the data on, and {passes:g} are expected"
    return Forecast(size, limit, passes, break_even, saved, reason)


@dataclass
class PrefixCache:
    """What `frozen_prefix` does and did; its attributes change as training goes on."""

    parts: Anatomy = field(repr=False)
    folder: Path | None = None
    limit: int = 0
    dtype: torch.dtype | None = None
    tokenizer: Any = field(default=None, repr=False)
    evaluate: bool = False
    always: bool = False
    passes: float = PASSES
    tokens: int | None = None
    active: bool = True  # whether records are looked up and kept
    reason: str = ""  # why not, and what would mend it
    records_read: int = 0  # records whose hidden states were read
    records_computed: int = 0  # records whose hidden states were computed, and kept where there was room
    tokens_read: int = 0
    untouched: Counter[str] = field(default_factory=Counter)  # batches that ran as without the cache, by the reason
    seconds_used: float = 0.0  # on looking up, keeping and putting together
    forecast: Forecast | None = None  # the last one
    notes: list[str] = field(default_factory=list)  # what a user should know, such as that dropout is off in the frozen blocks
    given: Store | None = field(default=None, repr=False)  # holds every record that will come; the frozen blocks have no weights then
    ahead: ReadAhead | None = field(default=None, repr=False)  # reads them before they are asked for
    # What passes through the frozen blocks tell each other; stores by device, dtypes and attention in use.
    stores: dict[tuple[str, ...], Store] = field(default_factory=dict, repr=False)
    lower_stores: dict[tuple[str, ...], tuple[int, Store]] = field(default_factory=dict, repr=False)
    output_lengths: dict[int, int] = field(default_factory=dict, repr=False)
    compared: bool = field(default=False, repr=False)
    rates: Rates | None = field(default=None, repr=False)
    timed_batches: int = field(default=0, repr=False)
    disk_seconds: tuple[float, float] | None = field(default=None, repr=False)

    @property
    def depth(self) -> int:
        """s: blocks 0 to s − 1 are spared, and the kept hidden states enter block s."""
        return self.parts.lowest

    @property
    def taken(self) -> int:
        """Bytes that the kept hidden states take, those that other processes keep in the same folder included."""
        return sum(store.taken for store in self.stores.values())

    @property
    def seconds_saved(self) -> float:
        """Estimate: the time that the records read would have taken to compute, less all time spent on the cache."""
        return self.tokens_read * self.rates.compute - self.seconds_used if self.rates else 0.0

    def __str__(self) -> str:
        if self.given is not None:
            words = [f"blocks 0 to {self.depth - 1} of {len(self.parts.blocks)} on disk", *self.notes]
            return "; ".join([*words, f"{gigabytes(self.given.taken)} of hidden states read {self.records_read} times"])
        if not self.active:
            return f"frozen blocks computed in every pass: {self.reason}"
        blocks, records = f"frozen blocks {self.depth}/{len(self.parts.blocks)}", self.records_read + self.records_computed
        if not records and not self.untouched:
            return "; ".join([f"{blocks}: computed once a record, kept {f'in {self.folder}' if self.folder else 'in memory'}", *self.notes])
        words = [f"{blocks}: {self.records_read} of {records} records read from the cache"]
        words += [f"{gigabytes(self.taken)} {'on disk' if self.folder else 'in memory'}"]
        words += [f"about {abs(self.seconds_saved):.1f} s {'saved' if self.seconds_saved >= 0 else 'lost'}"]
        words += [f"{count} batches untouched ({why})" for why, count in self.untouched.items()]
        words += ["full"] if any(store.full for store in self.stores.values()) else []
        return "; ".join([*words, *self.notes])

    def expect(self, examples: Sequence[Example]) -> None:
        """Announce the next batch, so that it is read while the present one trains; nothing where the blocks are in memory."""
        if self.ahead is not None:
            self.ahead.expect({record_key(example, self.relative) for example in examples})

    def look_up(self, store: Store, keys: set[bytes]) -> dict[bytes, torch.Tensor]:
        """Hidden states of the records that are in a store."""
        if self.ahead is not None and store is self.given:
            return self.ahead.take(keys)
        return {key: rows for key in keys if (rows := store.get(key)) is not None}

    def flush(self) -> None:
        """Write what waits in memory, so that other processes and later runs can read it; at the end of an epoch, for instance."""
        for store in self.stores.values():
            store.flush()

    def leave_alone(self, reason: str) -> None:
        """Count a batch that runs as without the cache.

        Raises:
            TrainingError: It cannot, as the weights of the frozen blocks are not in memory.
        """
        if self.given is not None:
            raise TrainingError(f"the blocks below {self.depth} are not in memory, and this call needs them: {reason}")
        self.untouched[reason] += 1

    def turn_off(self, reason: str) -> None:
        """Compute the frozen blocks in every pass from here on, and let go of what is kept in memory."""
        self.active, self.reason = False, reason
        for store in self.stores.values():
            store.clear()

    def begin(self) -> None:
        """Look at the frozen modules, remember their weights and adapters, time the disk, and judge by the size of the data."""
        self.groups = module_groups(self.parts, self.depth)
        self.modules = [module for group in self.groups for module in group]
        self.weights = [weight for module in self.modules for weight in module._parameters.values() if weight is not None]
        if self.given is not None:
            self.weights, self.compared = [], True
        self.versions, self.sums = [weight._version for weight in self.weights], weight_sums(self.weights)
        self.tuners = [module for module in self.modules if isinstance(module, BaseTunerLayer)]
        self.adapters = adapter_states(self.tuners)
        self.relative = relative_positions(self.parts, self.groups)
        self.longest = longest_batch(self.parts)
        if self.given is not None:
            return
        if self.folder is not None:
            with suppress(OSError):  # where it cannot be written, the store says so when it comes to that
                self.disk_seconds = disk_rates(self.folder)
        self.judge(self.parts.config.hidden_size, (self.dtype or self.parts.causal.dtype).itemsize, filled=False)

    def check_weights(self) -> None:
        """Turn the cache off where frozen weights were changed; raise `TrainingError` where one of them trains."""
        if any(weight.requires_grad for weight in self.weights):
            raise TrainingError(
                f"a weight below block {self.depth} has become trainable since the cache began; "
                "leave frozen_prefix, or enter it after the weights are chosen"
            )
        # A weight's version grows when it is written to; only then is it summed again, as it may have been written with what it was.
        versions = [weight._version for weight in self.weights]
        if versions != self.versions:
            if weight_sums(self.weights) != self.sums:
                self.turn_off(f"weights below block {self.depth} were changed meanwhile; enter frozen_prefix again")
            self.versions = versions

    def stores_for(self, hidden: torch.Tensor) -> tuple[Store, tuple[int, Store] | None]:
        """The store for hidden states as they are computed now, and where there is one, that of a lower block with its index."""
        if self.given is not None:
            return self.given, None
        device, config = hidden.device.type, self.parts.config
        autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
        implementation = "sdpa" if config._attn_implementation == NAME else config._attn_implementation
        dtype, width = self.dtype or hidden.dtype, hidden.shape[-1]
        regime = device, str(hidden.dtype), autocast, implementation, str(dtype)
        if regime not in self.stores and self.folder is None:
            self.stores[regime] = Store(width, dtype, limit=self.limit - self.taken)
        elif regime not in self.stores and self.folder is not None:
            labels = fingerprints(self.parts, self.groups, self.tokenizer, regime)
            self.stores[regime] = Store(width, dtype, self.folder / labels[-1], self.limit - self.taken, labels[-1])
            lower = [depth for depth in range(self.depth - 1, 0, -1) if any((self.folder / labels[depth]).glob("*.safetensors"))]
            if lower and dtype == hidden.dtype:
                self.lower_stores[regime] = lower[0], Store(width, dtype, self.folder / labels[lower[0]], 0, labels[lower[0]])
        return self.stores[regime], self.lower_stores.get(regime)

    def judge(self, width: int, itemsize: int, filled: bool) -> None:
        """Make a forecast from what is known, and turn the cache off where it loses."""
        rates = self.rates
        if rates is not None and self.disk_seconds is not None:
            # What fits into memory is read from the system's memory of the disk, as it was when the rates were measured.
            write, read = (seconds * width * itemsize for seconds in self.disk_seconds)
            fits = self.tokens is not None and self.tokens * width * itemsize < room(None)
            rates = Rates(rates.compute, rates.read if fits else max(read, rates.read), rates.store + write)
        self.forecast = forecast(self.tokens, width, itemsize, passes=self.passes, limit=self.limit, rates=rates, filled=filled)
        if not self.forecast.pays and not self.always:
            self.turn_off(self.forecast.reason)


class Pass:
    """One batch on its way from block 0 to block s.

    Every frozen block calls `block`, which runs it, or hands on what enters it. The last one returns the hidden states of the whole
    batch. Where the batch cannot be taken apart, `given_up` says so and the blocks run as ever.
    """

    def __init__(self, cache: PrefixCache, inputs: Mapping[str, Any]) -> None:
        self.cache, self.inputs = cache, inputs
        self.given_up = False

    def block(self, index: int, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of frozen block `index`."""
        if index == 0:
            try:
                self._begin(args, kwargs)
            except Uncacheable as error:
                self.cache.leave_alone(str(error))
                self.given_up = True
        if self.given_up:
            return run(*args, **kwargs)
        hidden, put = block_input(args, kwargs)
        output: Any = hidden
        if self.runs and index >= self.start:
            if index == self.start:
                hidden = self._assembled(self.lower_rows) if index > 0 else hidden
                hidden = self.selection(hidden) if self.selection is not None else hidden
                args, kwargs = put(hidden)
            if self.comparison is not None and self.comparison[0] == index:
                self._compare(hidden, self.comparison[1])
            if self.selection is not None:
                args, kwargs = self.selection.arguments(args, kwargs, hidden)
            with torch.no_grad(), evaluating(self.cache.groups[index + 1]):
                output = run(*args, **kwargs)
            # What is handed on later has the form of what the block returns; more than hidden states cannot be kept.
            self.cache.output_lengths[index] = len(output) if isinstance(output, tuple) else 0
            if isinstance(output, tuple) and any(value is not None for value in output[1:]):
                self.cache.turn_off("the blocks hand on more than hidden states")
            if index < self.cache.depth - 1:
                return output
        if index == self.cache.depth - 1:
            output = self._finish(output[0] if isinstance(output, tuple) else output)
        length = self.cache.output_lengths.get(index, 0)
        return (output, *[None] * (length - 1)) if length else output

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the batch apart, look its records up, and decide what the frozen blocks run on."""
        started, cache = time.perf_counter(), self.cache
        self.hidden = block_input(args, kwargs)[0]
        self.records = self._taken_apart(args, kwargs)
        self.store, lower = cache.stores_for(self.hidden)
        keys = {record.key for record in self.records}
        self.rows = cache.look_up(self.store, keys)
        if len(self.rows) < len(keys):
            self.store.refresh()
            self.rows = cache.look_up(self.store, keys)
        else:
            self.store.settle()
        missing = [record for record in self.records if record.key not in self.rows]
        if missing and cache.given is not None:
            raise TrainingError(
                f"a record of {missing[0].tokens} tokens did not go through the blocks below {cache.depth}, which are not in memory; "
                "train and evaluate on the records of the pass"
            )
        self.runs, self.start, self.lower_rows = bool(missing), 0, {}
        self.selection: Selection | None = None
        # What another run left on disk is compared once with what is computed, for which the whole batch runs from block 0 on.
        self.comparison: tuple[int, dict[bytes, torch.Tensor]] | None = None
        if not cache.compared and any(self.store.foreign(key) for key in self.rows):
            self.runs, self.comparison = True, (cache.depth, self.rows)
        elif missing and lower:
            depth, store = lower
            self.lower_rows = cache.look_up(store, {record.key for record in missing})
            if self.lower_rows and not cache.compared:
                self.comparison = depth, self.lower_rows
            elif all(record.key in self.lower_rows for record in missing):
                self.start = depth
        if self.comparison is None and 0 < len(missing) < len(self.records):
            with suppress(Uncacheable):  # a block is given something in which records cannot be told apart: all of them run
                selection = Selection.of(missing, self.hidden)
                selection.arguments(args, kwargs, self.hidden)
                self.selection = selection
        self.computed_keys = {record.key for record in (self.records if self.comparison else missing)}
        self.timed = self.runs and self.start == 0 and self.selection is None and cache.timed_batches < TIMED_BATCHES
        cache.seconds_used += time.perf_counter() - started
        if self.timed:
            synchronize(self.hidden.device)
        self.began = time.perf_counter()

    def _taken_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Record, ...]:
        """The records of the batch.

        Raises:
            Uncacheable: The decoder runs on another layout than it was given, or the batch cannot be taken apart.
        """
        ids, mask, positions = self.inputs["input_ids"], self.inputs.get("attention_mask"), kwargs.get("position_ids")
        positions = self.inputs.get("position_ids") if positions is None else positions
        if self.hidden.ndim != 3 or self.hidden.shape[:2] != ids.shape:
            raise Uncacheable("another layout in the blocks than at the decoder; enter frozen_prefix before unpadded")
        # An object that blocks share could carry more than hidden states from one to the next.
        for name, value in kwargs.items():
            values = list(value) if isinstance(value, tuple | list) else [value]
            strange = [v for v in values if v is not None and not isinstance(v, bool | int | float | str | torch.Tensor | Records)]
            if strange and name != "attention_mask":
                raise Uncacheable(f"the blocks share {name} ({type(strange[0]).__name__})")
        attention = named_arguments(self.cache.parts.blocks[0].module, args, kwargs).get("attention_mask") if mask is None else False
        flash = "flash" in self.cache.parts.config._attn_implementation
        batch, width = ids.shape

        def apart(row: int, column: int) -> bool:
            """Whether a token does not see the one before it, by the mask that the blocks are given."""
            if isinstance(attention, torch.Tensor) and attention.ndim == 4 and attention.shape[-2:] == (width, width):
                seen = attention[row if len(attention) > 1 else 0, 0, column, column - 1]
                return not bool(seen) if seen.dtype == torch.bool else float(seen) < -1e4
            return attention is None and batch == 1 and flash

        return take_apart(
            ids.cpu().numpy(),
            None if mask is None else mask.cpu().numpy(),
            None if positions is None else positions.cpu().numpy(),
            apart,
            starts=attention.gather[:, 0].cpu().numpy() if isinstance(attention, Records) else None,
            relative=self.cache.relative,
        )

    def _finish(self, computed: torch.Tensor) -> torch.Tensor:
        """Keep what was computed and put the batch together; returns the hidden states that enter block s, `[B, T, width]`."""
        cache, store, fresh = self.cache, self.store, {}
        if self.timed:
            synchronize(computed.device)
        started = time.perf_counter()
        if self.runs:
            if self.comparison is not None and self.comparison[0] == cache.depth:
                self._compare(computed, self.rows)
            if computed.dtype != self.hidden.dtype:
                cache.turn_off(f"the frozen blocks turn {self.hidden.dtype} into {computed.dtype}")
            fresh = self._computed_rows(computed.detach().cpu())
            if cache.active:
                for key, states in fresh.items():
                    store.add(key, states)
        stored = time.perf_counter()
        rows = {**self.rows, **fresh}
        if self.runs and self.selection is None:
            entry = computed.detach().to(store.dtype).to(computed.dtype)
        else:
            entry = self._assembled(rows)
        if self.hidden.requires_grad and torch.is_grad_enabled():
            entry.requires_grad_()  # reentrant checkpointing needs it
        read = [record.tokens for record in self.records if record.key not in self.computed_keys]
        cache.records_read += len(read)
        cache.records_computed += len(self.records) - len(read)
        cache.tokens_read += sum(read)
        cache.seconds_used += time.perf_counter() - started
        if self.timed and cache.active:
            self._measure(started - self.began, stored - started, rows)
        return entry

    def _computed_rows(self, computed: torch.Tensor) -> dict[bytes, torch.Tensor]:
        """Hidden states of the records that were not known, in the store's dtype, from where they lie in what was computed."""
        fresh, selection, place = {}, self.selection, 0
        rows = [] if selection is None or selection.lengths else selection.index.tolist()
        for record in self.records:
            row, first = record.row, record.start
            if selection is not None:
                if record.key not in self.computed_keys:
                    continue
                row, first = (0, place) if selection.lengths else (rows.index(row), first)
                place += record.tokens
            if record.key not in self.rows:
                fresh[record.key] = computed[row, first : first + record.tokens].to(self.store.dtype)
        return fresh

    def _measure(self, compute: float, storing: float, rows: Mapping[bytes, torch.Tensor]) -> None:
        """Time reading this batch, and judge whether the cache pays; given are the seconds of computing and storing it."""
        cache = self.cache
        tokens = max(1, sum(record.tokens for record in self.records))
        started = time.perf_counter()
        self._assembled(rows)
        synchronize(self.hidden.device)
        now = Rates(compute / tokens, (time.perf_counter() - started) / tokens, storing / tokens)
        before = cache.rates or now
        cache.rates = Rates(min(now.compute, before.compute), min(now.read, before.read), min(now.store, before.store))
        cache.timed_batches += 1
        filled = all(record.key in self.rows for record in self.records)
        if cache.timed_batches > 1 or filled:  # the first batch of all pays for warming up
            cache.judge(self.hidden.shape[-1], self.store.dtype.itemsize, filled)

    def _assembled(self, rows: Mapping[bytes, torch.Tensor]) -> torch.Tensor:
        """Hidden states `[B, T, width]` of the records in `rows`, zeros elsewhere, on the device and in the dtype of the model."""
        like = self.hidden
        on_gpu = like.device.type == "cuda"
        with torch.inference_mode(False), torch.no_grad():
            entry = torch.empty(like.shape, dtype=self.store.dtype if on_gpu else like.dtype, pin_memory=on_gpu)
            flat = entry.view(-1, like.shape[-1])
            place = 0
            for record in self.records:
                begin = record.row * like.shape[1] + record.start
                if record.key in rows:
                    flat[place:begin].zero_()
                    place = begin + record.tokens
                    flat[begin:place].copy_(rows[record.key])
            flat[place:].zero_()
            return entry.to(like.device, like.dtype, non_blocking=True)

    def _compare(self, hidden: torch.Tensor, rows: Mapping[bytes, torch.Tensor]) -> None:
        """Compare what was read from disk with what was computed; once in a process."""
        self.cache.compared = True
        for record in (record for record in self.records if record.key in rows):
            fresh = hidden[record.row, record.start : record.stop].detach().float().cpu()
            distance = (rows[record.key].float() - fresh).norm(dim=-1)
            if not bool((distance <= TOLERANCE[self.store.dtype] * fresh.norm(dim=-1)).all()):
                reason = "hidden states read from disk differ from computed ones; name another cache folder, or delete this one"
                warnings.warn(f"the cache {self.cache.folder} is not used: {reason}", CacheWarning, stacklevel=2)
                self.cache.turn_off(reason)
                self.rows = {}
                return


def weight_sums(weights: Sequence[nn.Parameter]) -> list[int]:
    """A checksum of each weight."""
    return [checksum(weight.detach().reshape(1, -1)) for weight in weights]


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode for some modules, not for their children."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
