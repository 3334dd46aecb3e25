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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from layercard.errors import OutputError
from layercard.fast.rows import KEY_BYTES
from layercard.files import replacing
from layercard.meta import free_bytes

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
