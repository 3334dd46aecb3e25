"""The state of a frozen-prefix cache: what it found and computed, whether it goes on, and which store holds which hidden states."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from layercard.errors import TrainingError
from layercard.fast.forecast import Forecast, Rates, forecast, gigabytes
from layercard.fast.frozen import Frozen, fingerprints
from layercard.fast.packing import NAME
from layercard.fast.rows import Record
from layercard.fast.store import Store, disk_rates, room

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
