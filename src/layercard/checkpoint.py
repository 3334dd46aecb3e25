"""Where a long computation stands: a folder with a plan and parts, from which a later call of the same plan goes on.

A part is one safetensors file, written whole or not at all, that names its plan, so that what a killed run or another plan has left is
never taken for this one's. Its tensors are the file's; a JSON value in its header says where each belongs. Finished parts are written
immediately; what a pass has summed up so far is written now and then (`State.snapshot`), in at most a twentieth of the time.
One run at a time works in a folder.
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
from layercard.errors import OutputError, ProcessError, one_line
from layercard.files import alone, read_json, replacing, write_json

SCHEMA = "layercard-state/1"
PLAN_FILE = "plan.json"
EVERY = 30.0
"""Least seconds between two snapshots of a pass."""
SHARE = 20.0
"""The time between two snapshots is at least so many times the time that writing one took."""
_HEADER, _DIGEST = "value", "sha256"


@dataclass(frozen=True)
class Form:
    """What the value of a part may be made of, besides dicts with text keys, lists, tuples, numbers, text, booleans and `None`.

    Attributes:
        classes: Dataclasses. Nothing else is built when a file is read.
        outside: Objects that are written as their name, by name, such as the modules of a model.
    """

    classes: tuple[type, ...] = ()
    outside: Mapping[str, object] = field(default_factory=dict)

    def pack(self, value: Any) -> tuple[str, dict[str, torch.Tensor]]:
        """The JSON text and the tensors of a value; the tensors are not copied."""
        names = {id(thing): name for name, thing in self.outside.items()}
        tensors: dict[str, torch.Tensor] = {}

        def packed(item: Any) -> Any:
            if item is None or isinstance(item, (bool, int, float, str)):
                return item
            if id(item) in names:
                return {"kind": "outside", "of": names[id(item)]}
            if isinstance(item, torch.Tensor):
                name = str(len(tensors))
                tensors[name] = item
                return {"kind": "tensor", "of": name, "device": str(item.device)}
            kind = type(item).__name__
            if isinstance(item, (list, tuple)):
                return {"kind": kind, "of": [packed(part) for part in item]}
            if isinstance(item, dict):
                return {"kind": "dict", "of": {name: packed(part) for name, part in item.items()}}
            if isinstance(item, self.classes) and is_dataclass(item):
                return {"kind": kind, "of": {part.name: packed(getattr(item, part.name)) for part in fields(item)}}
            raise TypeError(f"a value of {kind} has no form in a file")

        return json.dumps(packed(value)), tensors

    def unpack(self, text: str, tensors: Mapping[str, torch.Tensor]) -> Any:
        """The value that was packed, its tensors on the devices where they were."""
        classes = {kind.__name__: kind for kind in self.classes}

        def unpacked(item: Any) -> Any:
            if not isinstance(item, dict):
                return item
            kind, content = str(item["kind"]), item["of"]
            if kind == "tensor":
                return tensors[content].to(item["device"], copy=True)  # aligned as torch does it: kernels round by that
            if kind == "outside":
                return self.outside[content]
            if kind in ("list", "tuple"):
                items = [unpacked(part) for part in content]
                return items if kind == "list" else tuple(items)
            parts = {name: unpacked(part) for name, part in content.items()}
            return parts if kind == "dict" else classes[kind](**parts)

        return unpacked(json.loads(text))


def write(path: Path, form: Form, value: Any, **labels: str) -> None:
    """Write a value to a file; `labels` stand in its header. Not atomic: see `files.replacing`.

    Raises:
        OSError: It cannot be written.
    """
    text, tensors = form.pack(value)
    tensors = _unshared(tensors)
    try:
        save_file(tensors, path, {_HEADER: text, _DIGEST: _content_digest(text, tensors), **labels})
    except SafetensorError as error:
        raise OSError(one_line(error)) from error


def read(path: Path, form: Form, **labels: str) -> Any:
    """The value in a file with these labels; `None` where there is no such file, its labels differ, or a single bit of it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if any(header.get(name) != label for name, label in labels.items()):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        is_whole = header[_DIGEST] == _content_digest(header[_HEADER], tensors)
        return form.unpack(header[_HEADER], tensors) if is_whole else None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def _content_digest(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a value's JSON text and of its tensors, contiguous and on the CPU."""
    sha256 = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def to_bytes(form: Form, value: Any) -> bytes:
    """A value as the bytes of such a file."""
    text, tensors = form.pack(value)
    return save(_unshared(tensors | {"text": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}))


def from_bytes(form: Form, data: bytes) -> Any:
    """The value that `to_bytes` was given."""
    tensors = load(data)
    return form.unpack(bytes(tensors.pop("text").tolist()).decode(), tensors)


def size(form: Form, value: Any) -> int:
    """Bytes of a value's tensors."""
    return sum(tensor.nbytes for tensor in form.pack(value)[1].values())


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, no two in the same memory: safetensors refuses those that share it."""
    copies, places = {}, set()
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        place = flat.untyped_storage().data_ptr()
        copies[name] = flat.clone() if place in places or flat.untyped_storage().nbytes() != flat.nbytes else flat
        places.add(place)
    return copies


class State:
    """The parts of one plan in a folder; without a folder nothing is written, and nothing is there.

    Args:
        folder: Where the parts lie.
        plan: Digest of the plan; parts of another plan are not read.
        form: What parts are made of.
    """

    def __init__(self, folder: Path | None = None, plan: str = "", form: Form | None = None) -> None:
        self.folder, self.plan, self.form = folder, plan, form or Form()
        self._next_snapshot = time.monotonic() + EVERY

    def load(self, name: str) -> Any:
        """The part of that name, `None` where there is none."""
        return None if self.folder is None else read(self.folder / f"{name}.safetensors", self.form, plan=self.plan)

    def save(self, name: str, value: Any) -> None:
        """Write a part.

        Raises:
            OutputError: It cannot be written.
        """
        if self.folder is None:
            return
        started = time.monotonic()
        try:
            with replacing(self.folder / f"{name}.safetensors") as part:
                write(part, self.form, value, plan=self.plan)
        except OutputError as error:
            if processes.is_first():
                raise
            raise ProcessError(f"process {processes.rank()}: {error}") from error
        ended = time.monotonic()
        self._next_snapshot = ended + max(EVERY, SHARE * (ended - started))

    def snapshot(self, name: str, value: Callable[[], Any]) -> None:
        """Write an unfinished part, if it is time to and half of the free disk holds it."""
        if self.folder is None or time.monotonic() < self._next_snapshot:
            return
        part = value()
        if 2 * size(self.form, part) > shutil.disk_usage(self.folder).free:
            self._next_snapshot = time.monotonic() + EVERY
            return
        self.save(name, part)

    def drop(self, name: str) -> None:
        """Remove a part that is not needed any more."""
        if self.folder is not None:
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The part of that name, made and written where it is missing.

        Of several processes the first reads and writes it, all get it, and all take part in making it.
        """
        value = self.load(name) if processes.is_first() else None
        if value is not None:
            logging.getLogger(__name__).info("%s is taken from %s", name, self.folder)
        if processes.count() > 1:
            value = from_bytes(self.form, processes.of_first(to_bytes(self.form, value)))
        if value is None:
            value = make()
            processes.by_first(lambda: self.save(name, value))
        return value


@contextmanager
def opened(folder: Path | None, plan: dict[str, Any], form: Form) -> Iterator[State]:
    """The state of a plan in `folder`, locked for this run meanwhile; `folder` stays when the block ends.

    Of several processes the first opens it. What another plan has left there is removed, and the log says so.

    Raises:
        OutputError: The folder is something else, another run works in it, or it cannot be written.
    """
    if folder is None:
        yield State()
        return
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
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
    earlier = read_json(path, OutputError, "plan") if path.exists() else {}
    if earlier.get("digest") == digest:
        return
    if earlier:
        names = sorted(name for name in {*plan, *earlier} - {"digest"} if plan.get(name) != earlier.get(name))
        logging.getLogger(__name__).warning("%s was of another %s: starting over", folder, ", ".join(names))
    write_json(path, {**plan, "digest": digest}, force=True)  # first: from here on the old parts belong to no plan
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
            folder.rename(removed)  # in one step, so that an interrupt never leaves half a state
        shutil.rmtree(removed)


def check_folder(folder: Path) -> None:
    """Raise `OutputError` if `folder` exists and is not a state."""
    if not folder.exists() or (folder / PLAN_FILE).is_file():
        return
    if not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir()):
        raise OutputError(f"{folder} exists, where the state of the run would be kept; move it away, or name another output")
