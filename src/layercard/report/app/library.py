"""The files that the app shows: cards, placements and run records in the given folders, each with its kind or with what is wrong with it.

The page names a file by a key that this list gave it, never by a path: what is not listed cannot be asked for.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layercard.card.card import LayerCard
from layercard.card.numbers import Json
from layercard.errors import CardError, LayercardError, OutputError
from layercard.files import parse_json
from layercard.records import Estimate
from layercard.selection.placement import Placement

LARGEST = 20 * 2**20
"""Bytes of a file that is still read."""
DEEPEST_CARD = 256
"""Layers of a card that can still be explored while sliders move."""
MOST_FILES = 400
"""Files that are looked at."""
MOST_FOLDERS = 4
"""Folders below a given one that are looked into."""
DATA_ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet")
_CARD, _PLACEMENT, _RUN = "layercard/1", "layercard-placement/1", "layercard-run/1"
KINDS = {
    _CARD: "card",
    _PLACEMENT: "placement",
    _RUN: "run record",
    "layercard-compare/1": "comparison",
    "layercard-transfer/1": "transfer",
    "layercard-front/1": "front",
    "layercard-eval/1": "evaluation",
    "layercard-cost/1": "cost",
    "layercard-bench-run/1": "benchmark run",
}
"""What a file's schema says that it is."""


@dataclass(frozen=True)
class Entry:
    """A file.

    Attributes:
        key: What the page calls it by.
        name: Where it lies in the given folder, for people.
        place: Where it lies as a command line can name it.
        digest: Hash of its content.
        kind: A value of `KINDS`, or `unreadable`.
        value: Its JSON object; empty where there is a problem.
        card: The card, where it is one.
        problem: Why it cannot be used, in one line; `None` where it can.
    """

    key: str
    name: str
    kind: str
    value: Json
    card: LayerCard | None = None
    problem: str | None = None
    place: str = ""
    digest: str = ""

    @property
    def label(self) -> str:
        """How a list shows it: for a card also the model and the data."""
        if self.card is None:
            return self.name
        return f"{self.name} · {_short(self.card.model.name)} · {_short(self.card.data.source)}"


def read_entry(key: str, name: str, data: bytes, lies_at: str = "") -> Entry | None:
    """What a file holds; `None` for JSON of other programs. What is no JSON, or says it is ours and is not whole, has a `problem`."""
    try:
        value = parse_json(data, name, CardError, "JSON file")
        schema = value.get("schema")
        if not isinstance(schema, str) or not schema.startswith("layercard"):
            return None
        if schema not in KINDS:
            return None if _internal(schema) else _broken(key, name, f"{name}: schema {schema[:40]!r} is not read; make the file again")
        return replace(_checked(key, name, KINDS[schema], value), place=lies_at or name, digest=hashlib.sha256(data).hexdigest())
    except LayercardError as error:
        return _broken(key, name, str(error))


def read_upload(name: str, size: int, read: Callable[[], bytes], taken: int = 0) -> Entry:
    """The entry of an uploaded file.

    Args:
        name: The file's name as the browser gave it; only its last part counts.
        size: Bytes, looked at before anything is read.
        read: Gives the content.
        taken: How many files were uploaded before, for the key.

    Raises:
        OutputError: Another ending than `.json`, too large, or nothing of ours in it.
    """
    name = name.replace("\\", "/").rpartition("/")[2][:120]
    if not name.lower().endswith(".json"):
        raise OutputError(f"{name!r} is no .json file; upload a card, a placement, a run record or a comparison")
    if size > LARGEST:
        raise OutputError(f"{name} has {size / 2**20:.0f} MiB; files up to {LARGEST // 2**20} MiB are read")
    found = read_entry(f"upload:{taken}:{hashlib.sha256(name.encode()).hexdigest()[:12]}", f"{name} (uploaded)", read(), name)
    if found is None:
        raise OutputError(f"{name} is no file of layercard; upload a card, a placement, a run record or a comparison")
    return found


class Library:
    """The files in the given folders.

    Args:
        folders: Where cards, placements and run records are looked for, and where new cards go: into the first.
        models: Where model folders and data files are looked for; `folders` unless given.

    Raises:
        OutputError: One of them is no folder.
    """

    def __init__(self, folders: Sequence[Path], models: Sequence[Path] = ()) -> None:
        self.folders = tuple(_folder(path) for path in folders)
        self.model_folders = tuple(_folder(path) for path in models) or self.folders
        self._read: dict[Path, tuple[tuple[int, int], Entry | None]] = {}

    def entries(self) -> list[Entry]:
        """All files of ours, and those that should be and cannot be read; what did not change since the last time is not read again."""
        found = [self._entry(root, path) for root, path in self._files((".json",), self.folders)]
        return sorted((entry for entry in found if entry is not None), key=lambda entry: (entry.problem is not None, entry.name))

    def models(self) -> dict[str, Path]:
        """Model folders (a `config.json` beside safetensors) and GGUF files, by the names that the page shows."""
        found = [(root, path) for root, path in self._files((".gguf",), self.model_folders)]
        found += [
            (root, path.parent)
            for root, path in self._files(("config.json",), self.model_folders)
            if path.name == "config.json" and any(path.parent.glob("*.safetensors"))
        ]
        return {self._name(root, path): path for root, path in sorted(found)}

    def data(self) -> dict[str, Path]:
        """Files with records, by the names that the page shows."""
        return {self._name(root, path): path for root, path in self._files(DATA_ENDINGS, self.model_folders)}

    def _files(self, endings: tuple[str, ...], folders: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
        """Files of the given endings with the folder they belong to; no hidden ones, and none that a link leads out of the folders."""
        seen = 0
        for root in folders:
            for folder, below, names in os.walk(root):
                at = Path(folder)
                deep = len(at.relative_to(root).parts)
                below[:] = sorted(name for name in below if not name.startswith(".") and deep < MOST_FOLDERS)
                for name in sorted(names):
                    if name.startswith(".") or not name.lower().endswith(endings):
                        continue
                    if (seen := seen + 1) > MOST_FILES:
                        return
                    if inside(at / name, (root,)):
                        yield root, at / name

    def _entry(self, root: Path, path: Path) -> Entry | None:
        name = self._name(root, path)
        key = f"file:{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
        try:
            found = path.stat()
            stamp = (found.st_mtime_ns, found.st_size)
            if path in self._read and self._read[path][0] == stamp:
                return self._read[path][1]
            if found.st_size > LARGEST:
                entry: Entry | None = _broken(key, name, f"{name} has {found.st_size / 2**20:.0f} MiB; up to {LARGEST // 2**20} are read")
            else:
                entry = read_entry(key, name, path.read_bytes(), place(path))
        except OSError as error:
            return _broken(key, name, f"{name}: {error.strerror or error}; make it readable")
        self._read[path] = (stamp, entry)
        return entry

    def _name(self, root: Path, path: Path) -> str:
        shown = str(path.relative_to(root)) if path != root else path.name
        return shown if len({*self.folders, *self.model_folders}) == 1 else f"{root.name}/{shown}"


def inside(path: Path, folders: Sequence[Path]) -> bool:
    """Whether a path, links followed, lies in one of the folders."""
    real = path.resolve()
    return any(real.is_relative_to(folder) for folder in folders)


def place(path: Path) -> str:
    """A path as a command line names it: relative where it lies below the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def find(entries: Sequence[Entry], key: str | None, kind: str = "card") -> Entry:
    """The listed entry of a key.

    Raises:
        CardError: There is none of that kind.
    """
    for entry in entries:
        if entry.key == key and entry.kind == kind and entry.problem is None:
            return entry
    raise CardError(f"this {kind} is not in the list any more; choose another")


def _checked(key: str, name: str, kind: str, value: dict[str, Any]) -> Entry:
    """The entry of an object with a known schema; what is wrong with it is raised."""
    if kind == "card":
        card = LayerCard.from_json(value, name)
        if card.model.layers > DEEPEST_CARD:
            raise CardError(f"{name}: {card.model.layers} layers; up to {DEEPEST_CARD} can be explored here, use `layercard select`")
        return Entry(key, name, kind, card.to_json(), card)
    if kind == "placement":
        Placement.from_json(value, name)
    elif kind == "run record":
        Placement.from_json(_part(value, "placement", name), f"{name}: placement")
        _part(value, "model", name)
    elif kind == "comparison":
        _part(value, "model", name)
        _check_rows(value.get("rows"), name)
    return Entry(key, name, kind, value)


def _part(value: Mapping[str, Any], part: str, name: str) -> dict[str, Any]:
    found = value.get(part)
    if not isinstance(found, dict):
        raise CardError(f"{name}: {part} is missing; make the file again")
    return found


def _check_rows(rows: Any, name: str) -> None:
    whole = isinstance(rows, list) and all(
        isinstance(row, dict) and isinstance(row.get("name"), str) and isinstance(row.get("layers"), list) for row in rows
    )
    if not whole:
        raise CardError(f"{name}: its rows are not whole; make it again with `layercard compare`")
    if any(Estimate.read(row.get("train_seconds")) is None for row in rows):
        raise CardError(f"{name}: a row has no training time; make it again with `layercard compare`")


def _internal(schema: str) -> bool:
    """Files that belong to unfinished work, which nobody opens."""
    return schema.partition("/")[0] in ("layercard-plan", "layercard-probe", "layercard-bench")


def _broken(key: str, name: str, problem: str) -> Entry:
    return Entry(key, name, "unreadable", {}, problem=" ".join(problem.split())[:300])


def _folder(path: Path) -> Path:
    real = path.expanduser().resolve()
    if not real.is_dir():
        raise OutputError(f"{path} is no folder; name one that is there")
    return real


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"
