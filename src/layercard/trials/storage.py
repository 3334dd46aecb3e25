"""Where the results of a benchmark lie: a folder, or a place that all machines reach, such as `s3://bucket/bench` (fsspec).

Both hold the same files under the same names. A file is written whole or not at all and never changed, so machines may write side by side:
two that made the same run have written the same.
"""

import hashlib
import posixpath
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercard.errors import BenchmarkError, LayercardError, OutputError, one_line
from layercard.files import alone, json_text, parse_json, read_json, write_json
from layercard.models.embedded import cache_root

MARK = "://"
"""A place with it is an address; anything else is a folder."""


@dataclass(frozen=True)
class Storage:
    """JSON files by name, below one place.

    Attributes:
        place: A folder, or an address that fsspec understands; with its access data in the environment or in fsspec's own settings.
    """

    place: str

    @classmethod
    def at(cls, place: "str | Path | Storage") -> "Storage":
        """The storage of a folder or address; `file://` is a folder.

        >>> Storage.at("file:///data/bench").folder
        PosixPath('/data/bench')
        >>> Storage.at("s3://bucket/bench/").named("runs/a.json")
        's3://bucket/bench/runs/a.json'
        """
        return place if isinstance(place, Storage) else cls(str(place).removeprefix("file://").rstrip("/") or "/")

    @property
    def folder(self) -> Path | None:
        """The folder; `None` for an address."""
        return None if MARK in self.place else Path(self.place)

    def named(self, name: str) -> str:
        """The whole name of a file."""
        return posixpath.join(self.place, name)

    def below(self, name: str) -> "Storage":
        """A part of this storage."""
        return Storage(self.named(name))

    def exists(self, name: str) -> bool:
        """Whether there is such a file.

        Raises:
            OutputError: The storage cannot be reached.
        """
        if self.folder is not None:
            return (self.folder / name).exists()
        with self._reached(name) as (system, path):
            system.invalidate_cache()  # another machine may have written it since
            return bool(system.exists(path))

    def read(self, name: str, what: str) -> dict[str, Any]:
        """The JSON object in a file; `what` it should be is for the message.

        Raises:
            BenchmarkError: It is not there, or no whole JSON object.
            OutputError: The storage cannot be reached.
        """
        if self.folder is not None:
            return read_json(self.folder / name, BenchmarkError, what)
        try:
            with self._reached(name) as (system, path):
                data = system.cat_file(path)
        except FileNotFoundError:
            raise BenchmarkError(f"{self.named(name)}: no such file; name an existing {what}") from None
        return parse_json(data, self.named(name), BenchmarkError, what)

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON object, whole or not at all; one that is there is replaced.

        Raises:
            OutputError: It cannot be written.
        """
        if self.folder is not None:
            write_json(self.folder / name, value, force=True)
            return
        data = json_text(value).encode()
        with self._reached(name) as (system, path):
            parent, last = posixpath.split(path)
            part = f"{parent}/.{last}.{uuid.uuid4().hex[:8]}.part"
            system.makedirs(parent, exist_ok=True)
            system.pipe_file(part, data)
            system.mv(part, path)

    def working(self, name: str) -> Path:
        """A folder of this machine for what a part needs while it is made: beside the results, or in the cache for an address."""
        if self.folder is not None:
            return self.folder / name
        return cache_root() / "bench" / hashlib.sha256(self.place.encode()).hexdigest()[:16] / name

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have a folder for this run alone; nobody is kept from an address, where two runs only do the same work twice."""
        if self.folder is None:
            yield
            return
        with alone(self.folder):
            yield

    @contextmanager
    def _reached(self, name: str) -> Iterator[tuple[Any, str]]:
        """The file system, and the path of a file in it."""
        from fsspec.core import url_to_fs

        try:
            system, root = url_to_fs(self.place)
            yield system, posixpath.join(root, name)
        except (LayercardError, FileNotFoundError):
            raise
        except ImportError as error:
            raise OutputError(f"{self.place} cannot be reached ({one_line(error)}); install that package or name a folder") from None
        except Exception as error:  # each storage has exceptions of its own
            detail = one_line(error)
            raise OutputError(f"{self.named(name)} cannot be reached ({detail}); check the address and the access to it") from error
