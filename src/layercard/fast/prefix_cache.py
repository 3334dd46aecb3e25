"""What a frozen-prefix cache will take and save, from the size of the data and three measured rates.

A batch taken apart into records, each known by its tokens and their positions, whatever the batch around it.

A *record* is a run of real tokens: what is between the padding of a row, or one of several that follow each other in a packed row. What
the frozen blocks make of it depends on its tokens and positions alone, so these two are its key; order, batch size and padding are not.

The state of a frozen-prefix cache: what it found and computed, whether it goes on, and which store holds which hidden states.

Some records of a batch, in all that is handed to a block: rows of a padded batch, or tokens of a packed row.

One forward pass through the frozen blocks, with a cache of what they make: which records are known, which are run, what goes on.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from layercard.cost.measure import synchronize
from layercard.errors import TrainingError
from layercard.fast.packing import NAME, Records
from layercard.fast.prefix_blocks import (
    Frozen,
    fingerprints,
)
from layercard.fast.prefix_store import (
    Apart,
    CacheWarning,
    Forecast,
    Rates,
    Record,
    Selection,
    Store,
    Uncacheable,
    Unselectable,
    disk_rates,
    forecast,
    gigabytes,
    room,
    take_apart,
)
from layercard.models.hooks import block_input

if TYPE_CHECKING:
    pass

MEASURED = 3
"""Batches that are timed before the decision to go on stands."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""How far a token's hidden state read from disk may lie from the computed one, as a share of its length."""


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


class Passage:
    """From the entry of block 0 to the entry of block s, for one batch.

    Block 0's wrapper calls `begin`, and every frozen block's `block`, which runs the block, or hands on what enters it. The last one's
    returns the hidden states of the whole batch.
    """

    def __init__(self, cache: "PrefixCache", inputs: Mapping[str, Any]) -> None:
        self.cache, self.inputs = cache, inputs
        self.open = False
        self.start = 0
        self.selection: Selection | None = None
        self.testing: tuple[int, Store] | None = None

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the batch apart and look its records up.

        Raises:
            Uncacheable: It cannot be taken apart.
        """
        started = time.perf_counter()
        hidden = block_input(args, dict(kwargs))[0]
        self.records = self._records(hidden, self._attention(args, kwargs), kwargs.get("position_ids"))
        for name, value in kwargs.items():
            if name != "attention_mask":
                _plain(name, value)
        self.hidden = hidden
        self.store, self.lower = self.cache.store(hidden)
        keys = {record.key for record in self.records}
        self.known = self._look_up(self.store, keys)
        if len(self.known) < len(keys):
            self.store.refresh()
            self.known = self._look_up(self.store, keys)
        else:
            self.store.settle()
        missing = [record for record in self.records if record.key not in self.known]
        self._choose(missing, args, kwargs)
        self.missing = {record.key for record in (self.records if self.testing else missing)}
        self.open = True
        self.cache.seconds_used += time.perf_counter() - started
        if self.timed:
            synchronize(hidden.device)
        self.began = time.perf_counter()

    @property
    def timed(self) -> bool:
        """Whether this pass runs all frozen blocks on the whole batch and is one of those that are measured."""
        return self.runs and self.start == 0 and self.selection is None and self.cache.measured < MEASURED

    def _look_up(self, store: Store, keys: set[bytes]) -> dict[bytes, torch.Tensor]:
        return {key: rows for key in keys if (rows := store.get(key)) is not None}

    def _choose(self, missing: list[Record], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """What the frozen blocks run on: nothing, some records, or the whole batch, and from which block on."""
        cache, lower = self.cache, self.lower
        self.runs, self.below = bool(missing), {}
        if not cache.proven and any(self.store.foreign(key) for key in self.known):
            self.runs, self.testing = True, (cache.depth, self.store)
            return
        if not missing:
            return
        if lower is not None:
            self.below = self._look_up(lower[1], {record.key for record in missing})
            if self.below and not cache.proven:
                self.testing = lower
                return
            if all(record.key in self.below for record in missing):
                self.start = lower[0]
        if len(missing) < len(self.records):
            try:
                selection = self._selection(missing)
                selection.arguments(args, kwargs, self.hidden)
            except Unselectable:
                return
            self.selection = selection

    def _selection(self, missing: list[Record]) -> Selection:
        batch, width = self.hidden.shape[:2]
        packed = batch == 1
        if packed:
            places = [torch.arange(record.start, record.stop) for record in missing]
            index, lengths = torch.cat(places), [record.tokens for record in missing]
        else:
            rows = sorted({record.row for record in missing})
            index, lengths = torch.tensor(rows), []
        return Selection(batch, width, index.to(self.hidden.device), packed, lengths)

    def block(self, at: int, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of frozen block `at`."""
        hidden = block_input(args, kwargs)[0]
        last = at == self.cache.depth - 1
        if not self.runs or at < self.start:
            out: Any = self._handed(at, hidden)
        else:
            out = self._run(at, own, args, kwargs, hidden)
        if not last:
            return out
        return self._handed(at, self._finish(out[0] if isinstance(out, tuple) else out))

    def _run(self, at: int, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor) -> Any:
        if at == self.start:
            if at > 0:
                hidden = self._assembled(self.below)
            if self.selection is not None:
                hidden = self.selection(hidden)
            args, kwargs = block_input(args, kwargs)[1](hidden)
        if self.testing is not None and at == self.testing[0]:
            self._prove(hidden, self.below)
        if self.selection is not None:
            args, kwargs = self.selection.arguments(args, kwargs, hidden)
        with torch.no_grad(), evaluating(self.cache.frozen.in_block[at]):
            out = own(*args, **kwargs)
        self._note_kind(at, out)
        return out

    def _note_kind(self, at: int, out: Any) -> None:
        """Remember what a block returns, and turn the cache off where that is more than hidden states."""
        self.cache.kinds[at] = len(out) if isinstance(out, tuple) else 0
        if isinstance(out, tuple) and any(value is not None for value in out[1:]):
            self.cache.turn_off("the blocks hand on more than hidden states")

    def _handed(self, at: int, hidden: torch.Tensor) -> Any:
        """Hidden states in the form in which a block returns them."""
        length = self.cache.kinds.get(at, 0)
        return (hidden, *[None] * (length - 1)) if length else hidden

    def _finish(self, computed: torch.Tensor) -> torch.Tensor:
        """Keep what was computed and put the batch together; returns the hidden states that enter block s, `[B, T, width]`."""
        cache, timed, fresh = self.cache, self.timed, {}
        if timed:
            synchronize(computed.device)
        started = time.perf_counter()
        if self.runs:
            if self.testing is not None and self.testing[0] == cache.depth:
                self._prove(computed, self.known)
            fresh = self._keep(computed)
        kept = time.perf_counter()
        if self.runs and self.selection is None:
            entry = computed.detach().to(self.store.dtype).to(computed.dtype)
        else:
            entry = self._assembled({**self.known, **fresh})
        if self.hidden.requires_grad and torch.is_grad_enabled():
            entry.requires_grad_()  # reentrant checkpointing needs it
        cache.count(self.records, self.missing, time.perf_counter() - started)
        if timed and cache.active:
            self._measure(started - self.began, kept - started, {**self.known, **fresh})
        return entry

    def _keep(self, computed: torch.Tensor) -> dict[bytes, torch.Tensor]:
        """Put into the store what it does not have; returns that, in the store's dtype."""
        if computed.dtype != self.hidden.dtype:
            self.cache.turn_off(f"the frozen blocks turn {self.hidden.dtype} into {computed.dtype}")
        rows = computed.detach().cpu()
        fresh = {
            record.key: rows[row, low:high].to(self.store.dtype)
            for record, row, low, high in self._places()
            if record.key not in self.known
        }
        if self.cache.active:
            for key, states in fresh.items():
                self.store.add(key, states)
        return fresh

    def _measure(self, compute: float, keeping: float, rows: dict[bytes, torch.Tensor]) -> None:
        """Time reading this batch, and judge whether the cache pays; given are the seconds of computing and keeping it."""
        cache = self.cache
        tokens = max(1, sum(record.tokens for record in self.records))
        started = time.perf_counter()
        self._assembled(rows)
        synchronize(self.hidden.device)
        read = (time.perf_counter() - started) / tokens
        now = Rates(compute / tokens, read, keeping / tokens)
        before = cache.rates or now
        cache.rates = Rates(min(now.compute, before.compute), min(now.read, before.read), min(now.store, before.store))
        cache.measured += 1
        filled = all(record.key in self.known for record in self.records)
        if cache.measured > 1 or filled:
            cache.judge(self.hidden.shape[-1], self.store.dtype.itemsize, filled)

    def _places(self) -> list[tuple[Record, int, int, int]]:
        """Where the records lie in what was computed: record, row, first column, column behind the last."""
        if self.selection is None:
            return [(record, record.row, record.start, record.stop) for record in self.records]
        chosen = [record for record in self.records if record.key in self.missing]
        if not self.selection.packed:
            rows = {row: at for at, row in enumerate(self.selection.index.tolist())}
            return [(record, rows[record.row], record.start, record.stop) for record in chosen]
        ends = np.cumsum([record.tokens for record in chosen]).tolist()
        return [(record, 0, end - record.tokens, end) for record, end in zip(chosen, ends, strict=True)]

    def _assembled(self, rows: Mapping[bytes, torch.Tensor]) -> torch.Tensor:
        """Hidden states `[B, T, width]` of the records in `rows`, zeros elsewhere, on the device and in the dtype of the model."""
        like = self.hidden
        staged = like.device.type == "cuda"
        dtype = self.store.dtype if staged else like.dtype
        with torch.inference_mode(False), torch.no_grad():
            entry = torch.empty(like.shape, dtype=dtype, pin_memory=staged)
            flat = entry.view(-1, like.shape[-1])
            at = 0
            for record in self.records:
                begin = record.row * like.shape[1] + record.start
                states = rows.get(record.key)
                if states is None:
                    continue
                if begin > at:
                    flat[at:begin].zero_()
                flat[begin : begin + record.tokens].copy_(states)
                at = begin + record.tokens
            flat[at:].zero_()
            return entry.to(like.device, like.dtype, non_blocking=True)

    def _prove(self, hidden: torch.Tensor, rows: Mapping[bytes, torch.Tensor]) -> None:
        """Compare what was read from disk with what was computed; once in a process."""
        self.cache.proven = True
        for record in self.records:
            if record.key not in rows:
                continue
            fresh = hidden[record.row, record.start : record.stop].detach().float().cpu()
            apart = (rows[record.key].float() - fresh).norm(dim=-1)
            if not bool((apart <= TOLERANCE[self.store.dtype] * fresh.norm(dim=-1)).all()):
                reason = "hidden states read from disk differ from computed ones; name another cache folder, or delete this one"
                warnings.warn(f"the cache {self.cache.folder} is not used: {reason}", CacheWarning, stacklevel=2)
                self.cache.turn_off(reason)
                self.known = {}
                return

    def _attention(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The mask that block 0 is given."""
        names = self.cache.frozen.block_parameters
        return {**dict(zip(names, args, strict=False)), **kwargs}.get("attention_mask")

    def _records(self, hidden: torch.Tensor, attention: Any, positions: torch.Tensor | None) -> tuple[Record, ...]:
        """The records of the batch.

        Raises:
            Uncacheable: The decoder runs on another layout than it was given, or the batch cannot be taken apart.
        """
        inputs, frozen = self.inputs, self.cache.frozen
        ids = inputs["input_ids"]
        if hidden.ndim != 3 or hidden.shape[:2] != ids.shape:
            raise Uncacheable("another layout in the blocks than at the decoder; enter frozen_prefix before unpadded")
        mask = inputs.get("attention_mask")
        positions = inputs.get("position_ids") if positions is None else positions
        starts = None
        if mask is None and isinstance(attention, Records):
            starts = attention.gather[:, 0].cpu().numpy()
        return take_apart(
            ids.cpu().numpy(),
            None if mask is None else mask.cpu().numpy(),
            None if positions is None else positions.cpu().numpy(),
            _apart(attention if mask is None else False, frozen.parts.config._attn_implementation, ids.shape),
            starts=starts,
            relative=frozen.relative,
        )


def _apart(attention: Any, implementation: str, shape: tuple[int, ...]) -> Apart:
    """Whether a token does not see the one before it, by the mask that the blocks are given."""
    batch, width = shape

    def apart(row: int, at: int) -> bool:
        if isinstance(attention, torch.Tensor) and attention.ndim == 4 and attention.shape[-2:] == (width, width):
            seen = attention[row if len(attention) > 1 else 0, 0, at, at - 1]
            return not bool(seen) if seen.dtype == torch.bool else float(seen) < -1e4
        return attention is None and batch == 1 and "flash" in implementation

    return apart


def _plain(name: str, value: Any) -> None:
    """Raise `Uncacheable` where blocks are handed an object through which they could hand on more than hidden states."""
    if isinstance(value, tuple | list):
        for each in value:
            _plain(name, each)
    elif not (value is None or isinstance(value, bool | int | float | str | torch.Tensor | Records)):
        raise Uncacheable(f"the blocks share {name} ({type(value).__name__})")


PASSES = 2.0
"""Passes over the data that are expected where no number is given."""


@dataclass
class PrefixCache:
    """What `frozen_prefix` does and did; its attributes change as training goes on.

    Attributes:
        active: Whether records are looked up and kept.
        reason: Why not, and what would mend it.
        depth: s: blocks 0 to s − 1 are spared.
        layers: Number of blocks.
        found: Records whose hidden states were read.
        computed: Records whose hidden states were computed, and kept where there was room.
        tokens_found: Tokens of the records found.
        untouched: Batches that ran as without the cache, by the reason.
        seconds_used: Time spent on looking up, keeping and putting together.
        forecast: The last forecast; `None` before the first.
        notes: What a user should know, such as that dropout is off in the frozen blocks.
    """

    frozen: Frozen = field(repr=False)
    folder: Path | None = None
    limit: int = 0
    dtype: torch.dtype | None = None
    tokenizer: Any = field(default=None, repr=False)
    evaluate: bool = False
    always: bool = False
    passes: float = PASSES
    tokens: int | None = None
    active: bool = True
    reason: str = ""
    found: int = 0
    computed: int = 0
    tokens_found: int = 0
    untouched: Counter[str] = field(default_factory=Counter)
    seconds_used: float = 0.0
    forecast: Forecast | None = None
    notes: list[str] = field(default_factory=list)
    kinds: dict[int, int] = field(default_factory=dict, repr=False)
    proven: bool = field(default=False, repr=False)
    rates: Rates | None = field(default=None, repr=False)
    measured: int = field(default=0, repr=False)
    adapters: tuple[Any, ...] = field(default=(), repr=False)
    _stores: dict[tuple[Any, ...], Store] = field(default_factory=dict, repr=False)
    _lower: dict[tuple[Any, ...], tuple[int, Store]] = field(default_factory=dict, repr=False)
    _disk: tuple[float, float] | None = field(default=None, repr=False)
    _weights: Any = field(default=None, repr=False)

    @property
    def depth(self) -> int:
        """s: the block that the kept hidden states enter."""
        return self.frozen.depth

    @property
    def layers(self) -> int:
        """Number of blocks of the model."""
        return len(self.frozen.parts.blocks)

    @property
    def taken(self) -> int:
        """Bytes that the kept hidden states take, those that other processes keep in the same folder included."""
        return sum(store.taken for store in self._stores.values())

    @property
    def seconds_saved(self) -> float:
        """Estimate: the time that the records found would have taken to compute, less all time spent on the cache."""
        return self.tokens_found * self.rates.compute - self.seconds_used if self.rates else 0.0

    def __str__(self) -> str:
        if not self.active:
            return f"frozen blocks computed in every pass: {self.reason}"
        seen = self.found + self.computed
        if not seen and not self.untouched:
            where = f"in {self.folder}" if self.folder else "in memory"
            return "; ".join([f"frozen blocks {self.depth}/{self.layers}: computed once a record, kept {where}", *self.notes])
        parts = [f"frozen blocks {self.depth}/{self.layers}: {self.found} of {seen} records read from the cache"]
        parts += [f"{gigabytes(self.taken)} {'on disk' if self.folder else 'in memory'}"]
        parts += [f"about {abs(self.seconds_saved):.1f} s {'saved' if self.seconds_saved >= 0 else 'lost'}"]
        parts += [f"{count} batches untouched ({why})" for why, count in self.untouched.items()]
        parts += ["full" for store in self._stores.values() if store.full][:1]
        return "; ".join([*parts, *self.notes])

    def flush(self) -> None:
        """Write what waits in memory, so that other processes and later runs can read it; at the end of an epoch, for instance."""
        for store in self._stores.values():
            store.flush()

    def turn_off(self, reason: str) -> None:
        """Compute the frozen blocks in every pass from here on, and let go of what is kept in memory."""
        self.active, self.reason = False, reason
        for store in self._stores.values():
            store.clear()

    def store(self, hidden: torch.Tensor) -> tuple[Store, tuple[int, Store] | None]:
        """The store for hidden states as they are computed now, and where there is one, that of a lower block with its index."""
        regime = self._regime(hidden)
        if regime not in self._stores:
            self._open(regime, hidden)
        return self._stores[regime], self._lower.get(regime)

    def _regime(self, hidden: torch.Tensor) -> tuple[Any, ...]:
        device = hidden.device.type
        implementation = self.frozen.parts.config._attn_implementation
        cast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
        return device, str(hidden.dtype), cast, "sdpa" if implementation == NAME else implementation, str(self.dtype or hidden.dtype)

    def _open(self, regime: tuple[Any, ...], hidden: torch.Tensor) -> None:
        width, dtype, limit = hidden.shape[-1], self.dtype or hidden.dtype, self.limit - self.taken
        if self.folder is None:
            self._stores[regime] = Store(width, dtype, limit=limit)
            return
        labels = fingerprints(self.frozen, self.tokenizer, regime)
        self._stores[regime] = Store(width, dtype, self.folder / labels[-1], limit, labels[-1])
        for depth in range(self.depth - 1, 0, -1):
            folder = self.folder / labels[depth]
            if dtype == hidden.dtype and any(folder.glob("*.safetensors")):
                self._lower[regime] = depth, Store(width, dtype, folder, 0, labels[depth])
                return

    def check_weights(self) -> None:
        """Turn the cache off where frozen weights were changed; raise `TrainingError` where one of them trains."""
        if any(weight.requires_grad for weight in self.frozen.weights):
            raise TrainingError(
                f"a weight below block {self.depth} has become trainable since the cache began; "
                "leave frozen_prefix, or enter it after the weights are chosen"
            )
        versions, sums = self._weights
        now = self.frozen.versions()
        if now != versions:
            if self.frozen.sums() != sums:
                self.turn_off(f"weights below block {self.depth} were changed meanwhile; enter frozen_prefix again")
            self._weights = now, sums

    def watch_weights(self) -> None:
        """Remember the frozen weights and the adapters in them, to see whether they change."""
        self._weights = self.frozen.versions(), self.frozen.sums()
        self.adapters = self.frozen.adapters()

    def measure_disk(self) -> None:
        """Time the folder's disk; where it cannot be written, the store says so when it comes to that."""
        with suppress(OSError):
            self._disk = disk_rates(self.folder) if self.folder else None

    def count(self, records: Sequence[Record], missing: set[bytes], seconds: float) -> None:
        """Add a batch to the counts."""
        computed = sum(record.key in missing for record in records)
        self.computed += computed
        self.found += len(records) - computed
        self.tokens_found += sum(record.tokens for record in records if record.key not in missing)
        self.seconds_used += seconds

    def judge(self, width: int, itemsize: int, filled: bool) -> None:
        """Make a forecast from what is known, and turn the cache off where it loses."""
        rates = self.rates
        if rates is not None and self._disk is not None:
            write, read = (each * width * itemsize for each in self._disk)
            held = self.tokens is not None and self.tokens * width * itemsize < room(None)
            rates = Rates(rates.compute, rates.read if held else max(read, rates.read), rates.store + write)
        self.forecast = forecast(self.tokens, width, itemsize, passes=self.passes, limit=self.limit, rates=rates, filled=filled)
        if not self.forecast.pays and not self.always:
            self.turn_off(self.forecast.reason)
