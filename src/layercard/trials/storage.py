"""Where results lie: a folder, or a place that all machines reach, such as `s3://bucket/bench`; fsspec reads and writes both.

A file is written whole or not at all and never changed, so machines may write side by side: two that made the same run wrote the same.
"""

import hashlib
import posixpath
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from layercard.errors import BenchmarkError, LayercardError, OutputError, one_line
from layercard.files import alone, json_text, parse_json
from layercard.models.embedded import cache_root


@dataclass(frozen=True)
class Storage:
    """JSON files by name, below one place: a folder, or an address whose access data lie in the environment or fsspec's settings."""

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
        return None if "://" in self.place else Path(self.place)

    def named(self, name: str) -> str:
        """The full name of a file."""
        return posixpath.join(self.place, name)

    def below(self, name: str) -> "Storage":
        """A part of this storage."""
        return Storage(self.named(name))

    def exists(self, name: str) -> bool:
        """Whether there is such a file. Raises `OutputError` where the storage cannot be reached, as the other methods do."""
        with self._reached(name) as (system, path):
            system.invalidate_cache()  # another machine may have written it since
            return bool(system.exists(path))

    def names(self, folder: str) -> list[str]:
        """The JSON files in a folder, in order of their names."""
        with self._reached(folder) as (system, path):
            system.invalidate_cache()
            return sorted(posixpath.join(folder, posixpath.basename(file)) for file in system.glob(f"{path}/*.json"))

    def read(self, name: str, what: str) -> dict[str, Any]:
        """The JSON object in a file; `what` it should be is for the message.

        Raises:
            BenchmarkError: The file is missing or broken.
        """
        with self._reached(name) as (system, path):
            try:
                data = system.cat_file(path)
            except FileNotFoundError:
                raise BenchmarkError(f"{self.named(name)}: no such file; name an existing {what}") from None
        return parse_json(data, self.named(name), BenchmarkError, what)

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON object, whole or not at all; one that is there is replaced."""
        data = json_text(value).encode()
        with self._reached(name) as (system, path):
            parent, last = posixpath.split(path)
            part = f"{parent}/.{last}.{uuid.uuid4().hex[:8]}.part"
            system.makedirs(parent, exist_ok=True)
            try:
                system.pipe_file(part, data)
                system.mv(part, path)
            except BaseException:
                with suppress(Exception):
                    system.rm_file(part)
                raise

    def working(self, name: str) -> Path:
        """A folder of this machine for what a part needs while it is made: beside the results, or in the cache for an address."""
        if self.folder is not None:
            return self.folder / name
        return cache_root() / "bench" / hashlib.sha256(self.place.encode()).hexdigest()[:16] / name

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have a folder for this run alone; nobody is kept from an address, where two runs only do the same work twice."""
        with nullcontext() if self.folder is None else alone(self.folder):
            yield

    @contextmanager
    def _reached(self, name: str) -> Iterator[tuple[Any, str]]:
        """The file system, and the path of a file in it."""
        try:
            system, root = url_to_fs(self.place)
            yield system, posixpath.join(root, name)
        except LayercardError:
            raise
        except ImportError as error:
            raise OutputError(
                f"{self.place} needs a package that is not installed ({one_line(error)}); install it or name a folder"
            ) from None
        except Exception as error:  # each file system has exceptions of its own
            detail = one_line(error)
            raise OutputError(f"{self.named(name)} cannot be reached ({detail}); check the address and the access to it") from error
