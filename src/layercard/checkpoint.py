"""Values made of dataclasses, dicts, lists, numbers and tensors as one safetensors file, and back, bit for bit.

The tensors are the file's; a JSON value in its header says where each belongs. Nothing is read but the classes that the reader names,
and things that live elsewhere (a model's maps) are written as their name.

Where a long computation stands: a folder with a plan and parts, from which a later call of the same plan goes on.

A part is one file that is written whole or not at all and names the plan it is of, so that what a killed run or another plan has left is
never taken for this one's. One run at a time works in a folder. Parts that are finished are kept at once; what a pass has summed up so
far is kept from time to time (`State.snapshot`), such that keeping takes at most a twentieth of the time.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file

from layercard import processes
from layercard.errors import OutputError, ProcessError
from layercard.files import alone, read_json, replacing, write_json

# ---- saved

_HEADER = "value"


@dataclass(frozen=True)
class Form:
    """What values may be made of, besides dicts with keys of text, lists, tuples, numbers, text, truth values and `None`.

    Attributes:
        classes: Dataclasses.
        outside: Objects that are not written but named, by name.
    """

    classes: tuple[type, ...] = ()
    outside: Mapping[str, object] = field(default_factory=dict)

    def pack(self, value: Any) -> tuple[str, dict[str, torch.Tensor]]:
        """The JSON text and the tensors of a value; the tensors are not copied."""
        packer = _Packer(self)
        return json.dumps(packer.pack(value)), packer.tensors

    def unpack(self, text: str, tensors: Mapping[str, torch.Tensor]) -> Any:
        """The value that was packed, its tensors on the devices where they were."""
        return self._unpack(json.loads(text), {kind.__name__: kind for kind in self.classes}, tensors)

    def _unpack(self, value: Any, classes: Mapping[str, type], tensors: Mapping[str, torch.Tensor]) -> Any:
        if not isinstance(value, dict):
            return value
        kind, content = str(value["kind"]), value["of"]
        if kind == "tensor":
            return tensors[content].to(value["device"])
        if kind == "outside":
            return self.outside[content]
        if kind in ("list", "tuple"):
            items = [self._unpack(item, classes, tensors) for item in content]
            return items if kind == "list" else tuple(items)
        parts = {name: self._unpack(item, classes, tensors) for name, item in content.items()}
        return parts if kind == "dict" else classes[kind](**parts)


class _Packer:
    """One value on its way into JSON and tensors."""

    def __init__(self, form: Form) -> None:
        self.classes = form.classes
        self.names = {id(thing): name for name, thing in form.outside.items()}
        self.tensors: dict[str, torch.Tensor] = {}

    def pack(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if id(value) in self.names:
            return {"kind": "outside", "of": self.names[id(value)]}
        if isinstance(value, torch.Tensor):
            name = str(len(self.tensors))
            self.tensors[name] = value
            return {"kind": "tensor", "of": name, "device": str(value.device)}
        if isinstance(value, (list, tuple)):
            return {"kind": type(value).__name__, "of": [self.pack(item) for item in value]}
        if isinstance(value, dict):
            return {"kind": "dict", "of": {name: self.pack(item) for name, item in value.items()}}
        if isinstance(value, self.classes) and is_dataclass(value):
            return {"kind": type(value).__name__, "of": {part.name: self.pack(getattr(value, part.name)) for part in fields(value)}}
        raise TypeError(f"a value of {type(value).__name__} has no form in a file")


def write(path: Path, form: Form, value: Any, **labels: str) -> None:
    """Write a value to a file; `labels` stand in its header. Not atomic: see `files.replacing`.

    Raises:
        OSError: It cannot be written.
    """
    text, tensors = form.pack(value)
    try:
        save_file(_own(tensors), path, {_HEADER: text, **labels})
    except SafetensorError as error:
        raise OSError(" ".join(str(error).split())) from error


def read(path: Path, form: Form, **labels: str) -> Any:
    """The value in a file that has these labels; `None` where there is no such file, or it is of something else or not whole."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if any(header.get(name) != label for name, label in labels.items()):
                return None
            return form.unpack(header[_HEADER], {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def to_bytes(form: Form, value: Any) -> bytes:
    """A value as the bytes of such a file."""
    text, tensors = form.pack(value)
    return save(_own(tensors | {"text": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}))


def from_bytes(form: Form, data: bytes) -> Any:
    """The value that `to_bytes` was given."""
    tensors = load(data)
    return form.unpack(bytes(tensors.pop("text").tolist()).decode(), tensors)


def size(form: Form, value: Any) -> int:
    """Bytes of a value's tensors."""
    return sum(tensor.nbytes for tensor in form.pack(value)[1].values())


def _own(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, none sharing memory with another."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        place = kept.untyped_storage().data_ptr()
        found[name] = kept.clone() if place in seen or kept.untyped_storage().nbytes() != kept.nbytes else kept
        seen.add(place)
    return found


# ---- state

SCHEMA = "layercard-state/1"
PLAN_FILE = "plan.json"
EVERY = 30.0
"""Seconds between two snapshots of a pass, at least."""
SHARE = 20.0
"""Times as long as it took to write one lies between it and the next, at least."""


class State:
    """The parts of one plan in a folder; without a folder nothing is kept, and nothing is found.

    Args:
        folder: Where the parts lie.
        plan: Digest of the plan; parts of another one are not read.
        form: What parts are made of.
    """

    def __init__(self, folder: Path | None = None, plan: str = "", form: Form | None = None) -> None:
        self.folder, self.plan, self.form = folder, plan, form or Form()
        self._next = time.monotonic() + EVERY

    def load(self, name: str) -> Any:
        """The part of that name, `None` where it was not kept."""
        return None if self.folder is None else read(self._path(name), self.form, plan=self.plan)

    def save(self, name: str, value: Any) -> None:
        """Keep a part.

        Raises:
            OutputError: It cannot be written.
        """
        if self.folder is None:
            return
        started = time.monotonic()
        try:
            with replacing(self._path(name)) as part:
                write(part, self.form, value, plan=self.plan)
        except OutputError as error:
            if processes.is_first():
                raise
            raise ProcessError(f"process {processes.rank()}: {error}") from error
        ended = time.monotonic()
        self._next = ended + max(EVERY, SHARE * (ended - started))

    def snapshot(self, name: str, value: Callable[[], Any]) -> None:
        """Keep a part that is not finished, if it is time to and half of the free disk holds it."""
        if self.folder is None or time.monotonic() < self._next:
            return
        found = value()
        if 2 * size(self.form, found) > shutil.disk_usage(self.folder).free:
            self._next = time.monotonic() + EVERY
            return
        self.save(name, found)

    def drop(self, name: str) -> None:
        """Remove a part that is not needed any more."""
        if self.folder is not None:
            self._path(name).unlink(missing_ok=True)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The part of that name, made and kept where it is missing.

        Of several processes the first reads and writes it, all get it, and all take part in making it.
        """
        found = self.load(name) if processes.is_first() else None
        if found is not None:
            logging.getLogger(__name__).info("%s is taken from %s", name, self.folder)
        if processes.count() > 1:
            found = from_bytes(self.form, processes.of_first(to_bytes(self.form, found)))
        if found is None:
            found = make()
            processes.by_first(lambda: self.save(name, found))
        return found

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"


@contextmanager
def opened(folder: Path | None, plan: dict[str, Any], form: Form) -> Iterator[State]:
    """The state of a plan in `folder`, which this run has for itself meanwhile; `folder` stays when the block ends.

    Of several processes the first opens it. What another plan has left there is removed, and the log says so.

    Raises:
        OutputError: The folder is something else, another run works in it, or it cannot be written.
    """
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
    if folder is None:
        yield State()
        return
    with ExitStack() as stack:

        def take() -> None:
            check_folder(folder)
            stack.enter_context(alone(folder))
            _take_over(folder, plan, digest)

        processes.by_first(take)
        folder.mkdir(parents=True, exist_ok=True)  # of a process on a machine that does not see the first one's
        yield State(folder, digest, form)


def _take_over(folder: Path, plan: dict[str, Any], digest: str) -> None:
    """Make a folder the state of a plan."""
    path = folder / PLAN_FILE
    there = read_json(path, OutputError, "plan") if path.exists() else {}
    if there.get("digest") == digest:
        return
    if there:
        names = sorted(name for name in {*plan, *there} - {"digest"} if plan.get(name) != there.get(name))
        logging.getLogger(__name__).warning("%s was of another %s: starting over", folder, ", ".join(names))
    write_json(path, {**plan, "digest": digest}, force=True)  # from here on the old parts are nobody's
    for part in folder.rglob("*.safetensors"):
        part.unlink()


def discard(folder: Path) -> None:
    """Remove a state.

    Raises:
        OutputError: The folder is something else, or another run works in it.
    """
    check_folder(folder)
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        with alone(folder):
            folder.rename(removed)  # at once, so that an interrupt here leaves no half of a state
        shutil.rmtree(removed)


def check_folder(folder: Path) -> None:
    """Raise `OutputError` if `folder` exists and is no state."""
    if not folder.exists() or (folder / PLAN_FILE).is_file():
        return
    if not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir()):
        raise OutputError(f"{folder} exists, where the state of the run would be kept; move it away, or name another output")
