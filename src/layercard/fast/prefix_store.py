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

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from layercard.cost.estimate import free_bytes
from layercard.errors import OutputError
from layercard.fast.prefix_records import KEY_BYTES
from layercard.files import replacing

FORMAT = "layercard-prefix/1"
SHARD_BYTES = 64 * 2**20
"""A shard is written when so much waits for it."""
PAUSE = 10.0
"""Seconds after which a shard is written although little waits."""
ABANDONED = 3600.0
"""A file half written for so many seconds is that of a process that was killed, and is removed."""


class CacheWarning(UserWarning):
    """Something is wrong with a cache of hidden states; training goes on and computes what it cannot read."""


@dataclass
class _Shard:
    path: Path
    hidden: torch.Tensor
    bounds: list[int]
    checks: list[int]
    tested: set[int]
    ours: bool  # written by this store


@dataclass
class Store:
    """Hidden states by key."""

    width: int
    dtype: torch.dtype  # what they are kept in
    folder: Path | None = None  # where the shards lie; None keeps all in memory
    limit: int = 2**63  # bytes that all shards of the folder, or all records in memory, may take together
    label: str = ""  # written into each shard and asked of it; what the hidden states are of
    taken: int = 0  # bytes that they take now
    full: bool = False  # whether a record was turned away for the limit
    broken: str = ""  # why nothing more is written; empty while writing works
    _in_memory: dict[bytes, torch.Tensor] = field(default_factory=dict)
    _waiting_bytes: int = 0
    _on_disk: dict[bytes, tuple[_Shard, int]] = field(default_factory=dict)
    _file_names: set[str] = field(default_factory=set)
    _folder_changed: int = -1
    _last_write: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._metadata = {"format": FORMAT, "label": self.label, "dtype": str(self.dtype), "width": str(self.width)}
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob(".*.part"):
                if time.time() - part.stat().st_mtime > ABANDONED:
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the cache folder {self.folder}: {error.strerror or error}; name another") from error
        self.refresh()

    def __len__(self) -> int:
        return len(self._in_memory) + len(self._on_disk)

    def get(self, key: bytes) -> torch.Tensor | None:
        """Hidden states `[n, width]` of a record, on the CPU, not to be changed; `None` where they are not kept or are damaged."""
        if key in self._in_memory or key not in self._on_disk:
            return self._in_memory.get(key)
        shard, index = self._on_disk[key]
        rows = shard.hidden[shard.bounds[index] : shard.bounds[index + 1]]
        if index not in shard.tested and checksum(rows) != shard.checks[index]:
            warnings.warn(f"{shard.path} is damaged and not used; its records are computed again, delete it", CacheWarning, stacklevel=2)
            self._on_disk = {key: place for key, place in self._on_disk.items() if place[0] is not shard}
            self.taken -= shard.hidden.nbytes
            return None
        shard.tested.add(index)
        return rows

    def foreign(self, key: bytes) -> bool:
        """Whether a record would be read from a file that another process or run has written."""
        return key not in self._in_memory and key in self._on_disk and not self._on_disk[key][0].ours

    def add(self, key: bytes, hidden: torch.Tensor) -> bool:
        """Keep the hidden states `[n, width]` of a record; returns whether they are kept now.

        They are copied, to the CPU and the store's dtype. A record that would pass the limit is turned away.
        """
        if key in self._in_memory or key in self._on_disk:
            return True
        size = hidden.numel() * self.dtype.itemsize
        if self.broken:
            return False
        if self.taken + size > self.limit:
            self.full = True
            return False
        with torch.inference_mode(False), torch.no_grad():
            self._in_memory[key] = torch.empty(hidden.shape, dtype=self.dtype).copy_(hidden)
        self.taken += size
        self._waiting_bytes += size
        if self.folder is not None and self._waiting_bytes >= SHARD_BYTES:
            self.flush()
        return True

    def flush(self) -> None:
        """Write what waits as one shard; without a folder, or with nothing to write, it does nothing."""
        if self.folder is None or not self._in_memory or self.broken:
            return
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        keys, rows = list(self._in_memory), list(self._in_memory.values())
        tensors = {
            "hidden": torch.cat(rows),
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(len(keys), KEY_BYTES),
            "bounds": torch.tensor([0, *map(len, rows)]).cumsum(0),
            "checks": torch.tensor([checksum(row) for row in rows], dtype=torch.int64),
        }
        try:
            with replacing(path) as part:
                save_file(tensors, part, self._metadata)
        except (OSError, OutputError, SafetensorError) as error:
            self._give_up(error)
            return
        self._last_write = time.monotonic()
        self._file_names.add(path.name)
        self._in_memory.clear()
        self._waiting_bytes = 0
        self._open(path, ours=True)

    def settle(self) -> None:
        """Write what waits if nothing has been written for a while: called when nothing was missing, so that others can read it."""
        if self._in_memory and time.monotonic() - self._last_write > PAUSE:
            self.flush()

    def refresh(self) -> None:
        """Take note of shards that other processes have written since."""
        if self.folder is None or self.broken:
            return
        try:
            changed = self.folder.stat().st_mtime_ns
            if changed == self._folder_changed:
                return
            self._folder_changed = changed
            names = {path.name for path in self.folder.iterdir()} - self._file_names
        except OSError as error:
            self._give_up(error)
            return
        self._file_names |= names
        for name in sorted(names):
            if name.endswith(".safetensors") and not name.startswith("."):
                self.taken += self._open(self.folder / name)

    def clear(self) -> None:
        """Let go of all that is in memory; files stay."""
        self.taken -= self._waiting_bytes
        self._in_memory.clear()
        self._waiting_bytes = 0

    def _open(self, path: Path, *, ours: bool = False) -> int:
        """Map a shard and note its records; returns the bytes of its hidden states, 0 where it is unusable."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                hidden, keys, bounds, checks = (file.get_tensor(name) for name in ("hidden", "keys", "bounds", "checks"))
            for name, value in self._metadata.items():
                if metadata.get(name) != value:
                    raise ValueError(f"its {name} is {metadata.get(name)!r}, not {value!r}")
            records = len(keys)
            fits = keys.shape == (records, KEY_BYTES) and bounds.shape == (records + 1,) and checks.shape == (records,)
            fits = fits and int(bounds[0]) == 0 and bool((bounds.diff() > 0).all())
            if not fits or hidden.shape != (int(bounds[-1]), self.width) or hidden.dtype != self.dtype:
                raise ValueError("its parts do not fit together")
        except FileNotFoundError:
            return 0  # cleared away since the folder was listed
        except (OSError, SafetensorError, ValueError) as error:
            reason = " ".join(str(error).split())
            warnings.warn(f"{path} is not used: {reason}; its records are computed again, delete it", CacheWarning, stacklevel=2)
            return 0
        shard = _Shard(path, hidden, bounds.tolist(), checks.tolist(), set(), ours)
        self._on_disk |= {bytes(key): (shard, index) for index, key in enumerate(keys.numpy())}
        return hidden.nbytes

    def _give_up(self, error: Exception) -> None:
        self.broken = " ".join(str(error).split())
        self.clear()
        warnings.warn(
            f"the cache {self.folder} cannot be written ({self.broken}); training goes on without it, make room for the next run",
            CacheWarning,
            stacklevel=3,
        )


def checksum(rows: torch.Tensor) -> int:
    """Sum of the bytes of contiguous rows `[n, width]`, taken as the longest words that fill a row, modulo 2⁶⁴.

    A change of any one word changes it.
    """
    row_bytes = rows.shape[-1] * rows.element_size()
    word = next(kind for kind in (torch.int64, torch.int32, torch.int16, torch.uint8) if row_bytes % kind.itemsize == 0)
    return int(rows.reshape(-1).view(torch.uint8).view(word).sum(dtype=torch.int64))


def room(folder: Path | None) -> int:
    """Bytes that a cache takes at most where nothing else is said: half of the free disk, or a quarter of the free memory."""
    if folder is None:
        return free_bytes(torch.device("cpu")) // 4
    existing = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    return shutil.disk_usage(existing).free // 2


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


def gigabytes(size: float) -> str:
    """A size in words: `2.3 GB`, `140 MB`."""
    for unit, bytes_each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_each:
            return f"{size / bytes_each:.1f} {unit}" if size < 100 * bytes_each else f"{size / bytes_each:.0f} {unit}"
    return f"{size:.0f} B"
