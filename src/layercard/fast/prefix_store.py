"""Hidden states of records, in memory or in files that several processes share.

In memory each record is a tensor `[n, width]`. On disk records lie in *shards*, safetensors files in one folder that only ever gains
whole ones: a shard is written under a temporary name and moved to its own when it is complete, and no file is changed afterwards. So
every process writes its own shards and reads those of all others. A shard holds

- `hidden`: `[tokens, width]`, the hidden states of its records one after the other, read by memory map;
- `keys`: `[records, 16]`, bytes;
- `bounds`: `[records + 1]`, where each record starts in `hidden`, and the end of the last;
- `checks`: `[records]`, a checksum of each record's bytes, tested when the record is first read;

and in its metadata what the folder is for. A file that is cut short, damaged or of another cache is named in one warning and not used.
"""

import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from layercard.cost.estimate import free_bytes
from layercard.errors import OutputError
from layercard.fast.packing import Records
from layercard.files import replacing

# ---- fast.forecast


@dataclass(frozen=True)
class Rates:
    """Seconds a token, as measured on the first batches.

    Attributes:
        compute: The embeddings' and frozen blocks' forward.
        read: Looking a record up and putting its hidden states in place.
        store: Keeping them after they were computed, writing included.
    """

    compute: float
    read: float
    store: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """What is to be expected of a cache.

    Attributes:
        needed: Bytes that the data set takes; `None` where its size is not known.
        limit: Bytes that the cache may take.
        passes: Passes over the data, training and evaluation.
        break_even: From how many passes on the cache pays; infinite where reading is no faster than computing.
        saved: Seconds saved over all passes; `None` where the size of the data or the rates are not known.
        reason: Why the cache should stay off; empty where it pays.
    """

    needed: int | None
    limit: int
    passes: float
    break_even: float
    saved: float | None
    reason: str

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
        mend = "raise max_bytes" + (", or keep bfloat16" if itemsize > 2 else "")
        reason = f"the data set takes {gigabytes(size)} and the cache may take {gigabytes(limit)}; {mend}"
    elif rates is not None and rates.compute <= rates.read:
        reason = f"reading a token takes {rates.read * 1e6:.1f} µs and computing it {rates.compute * 1e6:.1f} µs"
    elif not filled and passes <= break_even:
        reason = f"it pays from {break_even:.2f} passes over the data on, and {passes:g} are expected"
    return Forecast(size, limit, passes, break_even, saved, reason)


def gigabytes(size: float) -> str:
    """A size in words: `2.3 GB`, `140 MB`."""
    for unit, bytes_each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_each:
            return f"{size / bytes_each:.1f} {unit}" if size < 100 * bytes_each else f"{size / bytes_each:.0f} {unit}"
    return f"{size:.0f} B"


# ---- fast.rows

KEY_BYTES = 16

Ints = npt.NDArray[np.integer]
Apart = Callable[[int, int], bool]
"""`apart(row, column)`: whether the token at `column` of a row does not see the one before it."""


class Uncacheable(Exception):
    """The hidden states of this batch cannot be kept record by record; the message says why."""


@dataclass(frozen=True)
class Record:
    """A run of real tokens: `row`, first column, the column behind the last, and its key."""

    row: int
    start: int
    stop: int
    key: bytes

    @property
    def tokens(self) -> int:
        """Its length."""
        return self.stop - self.start


def take_apart(
    ids_bt: Ints,
    mask_bt: Ints | None,
    positions_bt: Ints | None,
    apart: Apart,
    *,
    starts: Ints | None = None,
    relative: bool = False,
) -> tuple[Record, ...]:
    """The records of a batch, row by row.

    Args:
        ids_bt: Token ids `[B, T]`.
        mask_bt: 1 for real tokens and 0 for padding, `[B, T]`; without it all tokens are real.
        positions_bt: Position ids `[B, T]` or `[1, T]`; without them columns are positions.
        apart: Asked where positions do not go on: two records if it says so, else one with these very positions.
        starts: Where the records of a single row `[1, N]` start, where that is known.
        relative: Whether only distances between positions count, so that the key need not hold the first one.

    Raises:
        Uncacheable: The mask has holes or other values than 0 and 1, or a shape is another.
    """
    batch, width = ids_bt.shape
    firsts, stops = _runs(ids_bt, mask_bt)
    positions = _positions(positions_bt, batch, width)
    breaks = None if positions is None else np.diff(positions, axis=1) != 1
    tokens = np.ascontiguousarray(ids_bt, dtype=np.int32)
    found = []
    for row in range(batch):
        first, stop = int(firsts[row]), int(stops[row])
        if first == stop:
            continue
        own = None if positions is None else positions[row if len(positions) > 1 else 0]
        gaps = [] if breaks is None else (np.flatnonzero(breaks[row if len(breaks) > 1 else 0, first : stop - 1]) + first + 1).tolist()
        if starts is not None:
            cuts = [int(at) for at in starts if at > 0]
        elif gaps and all(apart(row, at) for at in gaps):
            cuts = gaps
        else:
            cuts = []
        for low, high in zip([first, *cuts], [*cuts, stop], strict=True):
            begin = low if own is None else int(own[low])
            uneven = None if own is None or not any(low < at < high for at in gaps) else own[low:high] - begin
            found.append(Record(row, low, high, _key(tokens[row, low:high], None if relative else begin, uneven)))
    return tuple(found)


def _runs(ids_bt: Ints, mask_bt: Ints | None) -> tuple[Ints, Ints]:
    """First column of each row's run of real tokens, and the one behind it."""
    batch, width = ids_bt.shape
    if mask_bt is None:
        return np.zeros(batch, dtype=np.int64), np.full(batch, width, dtype=np.int64)
    if mask_bt.shape != ids_bt.shape:
        raise Uncacheable(f"a mask of shape {list(mask_bt.shape)} for tokens of shape {list(ids_bt.shape)}")
    real = mask_bt.astype(bool)
    if mask_bt.dtype != bool and not (mask_bt == real).all():
        raise Uncacheable("a mask with other values than 0 and 1")
    counts = real.sum(axis=1)
    firsts = np.where(counts > 0, real.argmax(axis=1), 0)
    if (np.diff(real.astype(np.int8), axis=1, prepend=0) == 1).sum(axis=1).max(initial=0) > 1:
        raise Uncacheable("a mask with holes")
    return firsts, firsts + counts


def _positions(positions_bt: Ints | None, batch: int, width: int) -> Ints | None:
    if positions_bt is None:
        return None
    if positions_bt.ndim != 2 or positions_bt.shape[1] != width or positions_bt.shape[0] not in (1, batch):
        raise Uncacheable(f"positions of shape {list(positions_bt.shape)}")
    return positions_bt.astype(np.int64, copy=False)


def _key(tokens: Ints, first: int | None, uneven: Ints | None) -> bytes:
    """Digest of a record: tokens, its first position where it counts, all positions where they are not consecutive."""
    kind = b"" if uneven is None else b"uneven"
    digest = blake2b(tokens.data, digest_size=KEY_BYTES, person=kind)
    if first:
        digest.update(b"@%d" % first)
    if uneven is not None:
        digest.update(uneven.tobytes())
    return digest.digest()


# ---- fast.selecting


class Unselectable(Exception):
    """A block is given something in which the records cannot be told apart."""


@dataclass
class Selection:
    """Which part of a batch `[B, T]` goes on.

    Attributes:
        batch: B.
        width: T, or N for a packed row.
        index: Rows, or tokens of the packed row.
        packed: Which of the two.
        lengths: Lengths of the chosen records of a packed row.
    """

    batch: int
    width: int
    index: torch.Tensor
    packed: bool
    lengths: Sequence[int] = ()
    _made: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments with only this part in them; `hidden`, which is one of them, stays as it is.

        Raises:
            Unselectable: One of them is of another layout.
        """
        return (
            tuple(value if value is hidden else self(value) for value in args),
            {name: value if value is hidden else self(value) for name, value in kwargs.items()},
        )

    def __call__(self, value: Any) -> Any:
        """The part of a value; the same objects give the same results, so that a mask is cut once and not for every block."""
        if id(value) not in self._made:
            self._made[id(value)] = (value, self._part(value))
        return self._made[id(value)][1]

    def _part(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tokens(value) if self.packed else self._rows(value)
        if isinstance(value, Records) and self.packed:
            real = torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]
            return replace(Records.of(real.to(value.gather.device)), window=value.window)
        if isinstance(value, tuple | list):
            return type(value)(self._part(each) for each in value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise Unselectable(type(value).__name__)

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim < 2 or tensor.shape[0] == 1:
            return tensor
        if tensor.shape[0] != self.batch:
            raise Unselectable(f"a tensor of shape {list(tensor.shape)}")
        return tensor.index_select(0, self.index)

    def _tokens(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 4 and tensor.shape[-2:] == (self.width, self.width):
            return tensor.index_select(2, self.index).index_select(3, self.index)
        if tensor.ndim >= 2 and tensor.shape[1] == self.width:
            return tensor.index_select(1, self.index)
        if self.width in tensor.shape:
            raise Unselectable(f"a tensor of shape {list(tensor.shape)}")
        return tensor


# ---- fast.store


FORMAT = "layercard-prefix/1"
SHARD_BYTES = 64 * 2**20
"""A shard is written when so much waits for it."""
PAUSE = 10.0
"""Seconds after which a shard is written although little waits."""
ABANDONED = 3600.0
"""A file half written for so many seconds is that of a process that was killed, and is removed."""
_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


class CacheWarning(UserWarning):
    """Something is wrong with a cache of hidden states; training goes on and computes what it cannot read."""


@dataclass
class _Shard:
    """One file: the map of its hidden states, which of its records were tested, and whether this store has written it."""

    path: Path
    hidden: torch.Tensor
    checks: torch.Tensor
    tested: bytearray
    own: bool


@dataclass
class Store:
    """Hidden states by key.

    Attributes:
        width: Width of the hidden states.
        dtype: What they are kept in.
        folder: Where the shards lie; `None` keeps all in memory.
        limit: Bytes that all shards of the folder, or all records in memory, may take together.
        label: Written into each shard and asked of it; what the hidden states are of.
        taken: Bytes that they take now.
        full: Whether a record was turned away for the limit.
        broken: Why nothing more is written; empty while writing works.
    """

    width: int
    dtype: torch.dtype
    folder: Path | None = None
    limit: int = 2**63
    label: str = ""
    taken: int = 0
    full: bool = False
    broken: str = ""
    _fresh: dict[bytes, torch.Tensor] = field(default_factory=dict)
    _waiting: int = 0
    _kept: dict[bytes, tuple[_Shard, int, int, int]] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)
    _changed: int = -1
    _written: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._prepare()
        self.refresh()

    def __len__(self) -> int:
        return len(self._fresh) + len(self._kept)

    def __contains__(self, key: bytes) -> bool:
        return self.get(key) is not None

    def get(self, key: bytes) -> torch.Tensor | None:
        """Hidden states `[n, width]` of a record, on the CPU, not to be changed; `None` where they are not kept or are damaged."""
        found = self._fresh.get(key)
        if found is not None:
            return found
        place = self._kept.get(key)
        if place is None:
            return None
        shard, at, low, high = place
        rows = shard.hidden[low:high]
        if not shard.tested[at]:
            if checksum(rows) != int(shard.checks[at]):
                self._forget(shard)
                return None
            shard.tested[at] = 1
        return rows

    def foreign(self, key: bytes) -> bool:
        """Whether a record would be read from a file that another process or run has written."""
        return key not in self._fresh and key in self._kept and not self._kept[key][0].own

    def add(self, key: bytes, hidden: torch.Tensor) -> bool:
        """Keep the hidden states `[n, width]` of a record; returns whether they are kept now.

        They are copied, to the CPU and the store's dtype. A record that would pass the limit is turned away.
        """
        if key in self._fresh or key in self._kept:
            return True
        if self.broken:
            return False
        size = hidden.numel() * self.dtype.itemsize
        if self.taken + size > self.limit:
            self.full = True
            return False
        with torch.inference_mode(False), torch.no_grad():
            kept = torch.empty(hidden.shape, dtype=self.dtype)
            self._fresh[key] = kept.copy_(hidden)
        self.taken += size
        self._waiting += size
        if self.folder is not None and self._waiting >= SHARD_BYTES:
            self.flush()
        return True

    def flush(self) -> None:
        """Write what waits as one shard; without a folder, or with nothing to write, it does nothing."""
        if self.folder is None or not self._fresh or self.broken:
            return
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        keys, rows = list(self._fresh), list(self._fresh.values())
        try:
            with replacing(path) as part:
                save_file(_tensors(keys, rows), part, self._metadata())
        except (OSError, OutputError, SafetensorError) as error:
            self._give_up(error)
            return
        self._written = time.monotonic()
        self._seen.add(path.name)
        self._fresh.clear()
        self._waiting = 0
        self._open(path, own=True)

    def settle(self) -> None:
        """Write what waits if nothing has been written for a while: called when nothing was missing, so that others can read it."""
        if self._fresh and time.monotonic() - self._written > PAUSE:
            self.flush()

    def refresh(self) -> None:
        """Take note of shards that other processes have written since."""
        if self.folder is None or self.broken:
            return
        try:
            changed = self.folder.stat().st_mtime_ns
            if changed == self._changed:
                return
            self._changed = changed
            new = sorted({path.name for path in self.folder.iterdir()} - self._seen)
        except OSError as error:
            self._give_up(error)
            return
        for name in new:
            self._seen.add(name)
            if name.endswith(".safetensors") and not name.startswith("."):
                self.taken += self._open(self.folder / name)

    def clear(self) -> None:
        """Let go of all that is in memory; files stay."""
        self.taken -= self._waiting
        self._fresh.clear()
        self._waiting = 0

    def _prepare(self) -> None:
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob(".*.part"):
                if time.time() - part.stat().st_mtime > ABANDONED:
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the cache folder {self.folder}: {error.strerror or error}; name another") from error

    def _metadata(self) -> dict[str, str]:
        return {"format": FORMAT, "label": self.label, "dtype": str(self.dtype), "width": str(self.width)}

    def _open(self, path: Path, *, own: bool = False) -> int:
        """Map a shard and note its records; returns the bytes of its hidden states, 0 where it is unusable."""
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("hidden", "keys", "bounds", "checks")}
                self._test(file.metadata() or {}, tensors)
        except FileNotFoundError:
            return 0  # cleared away since the folder was listed
        except (OSError, SafetensorError, ValueError) as error:
            said = " ".join(str(error).split())
            warnings.warn(f"{path} is not used: {said}; its records are computed again, delete it", CacheWarning, stacklevel=2)
            return 0
        bounds = tensors["bounds"].tolist()
        shard = _Shard(path, tensors["hidden"], tensors["checks"], bytearray(len(bounds) - 1), own)
        raw = tensors["keys"].numpy().tobytes()
        for at in range(len(bounds) - 1):
            self._kept[raw[at * KEY_BYTES : (at + 1) * KEY_BYTES]] = (shard, at, bounds[at], bounds[at + 1])
        return shard.hidden.nbytes

    def _test(self, found: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        wanted = self._metadata()
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(f"its {name} is {found.get(name)!r}, not {value!r}")
        hidden, keys, bounds, checks = (tensors[name] for name in ("hidden", "keys", "bounds", "checks"))
        records = len(keys)
        whole = (
            hidden.shape == (int(bounds[-1]), self.width)
            and hidden.dtype == self.dtype
            and keys.shape == (records, KEY_BYTES)
            and bounds.shape == (records + 1,)
            and checks.shape == (records,)
            and int(bounds[0]) == 0
            and bool((bounds.diff() > 0).all())
        )
        if not whole:
            raise ValueError("its parts do not fit together")

    def _forget(self, shard: _Shard) -> None:
        """Leave a damaged shard aside, with all of its records."""
        warnings.warn(f"{shard.path} is damaged and not used; its records are computed again, delete it", CacheWarning, stacklevel=3)
        self._kept = {key: place for key, place in self._kept.items() if place[0] is not shard}
        self.taken -= shard.hidden.nbytes

    def _give_up(self, error: Exception) -> None:
        self.broken = " ".join(str(error).split())
        self.clear()
        warnings.warn(
            f"the cache {self.folder} cannot be written ({self.broken}); training goes on without it, make room for the next run",
            CacheWarning,
            stacklevel=3,
        )


def room(folder: Path | None) -> int:
    """Bytes that a cache takes at most where nothing else is said: half of the free disk, or a quarter of the free memory."""
    if folder is None:
        return free_bytes(torch.device("cpu")) // 4
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    return shutil.disk_usage(there).free // 2


def disk_rates(folder: Path, size: int = 4 * 2**20) -> tuple[float, float]:
    """Seconds a byte takes to be written to a folder and to be read from its disk, not from the system's memory of it.

    Where the system cannot be told to forget a file, reading is that of its memory.

    Raises:
        OSError: The folder cannot be written to.
    """
    path = folder / f".{uuid.uuid4().hex}.part"
    try:
        started = time.perf_counter()
        path.write_bytes(os.urandom(2**10) * (size // 2**10))
        written = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            opened = time.perf_counter()
            file.read()
        return (written - started) / size, (time.perf_counter() - opened) / size
    finally:
        path.unlink(missing_ok=True)


def checksum(rows: torch.Tensor) -> int:
    """Sum of the bytes of contiguous rows `[n, width]`, taken as the longest words that fill a row, modulo 2⁶⁴.

    A change of any one word changes it.
    """
    row = rows.shape[-1] * rows.element_size()
    word = next(kind for length, kind in _WORDS if row % length == 0)
    return int(rows.reshape(-1).view(torch.uint8).view(word).sum(dtype=torch.int64))


def _tensors(keys: list[bytes], rows: list[torch.Tensor]) -> dict[str, Any]:
    lengths = torch.tensor([0, *(len(row) for row in rows)])
    return {
        "hidden": torch.cat(rows),
        "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(len(keys), KEY_BYTES),
        "bounds": lengths.cumsum(0),
        "checks": torch.tensor([checksum(row) for row in rows], dtype=torch.int64),
    }
