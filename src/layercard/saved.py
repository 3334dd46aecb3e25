"""Values made of dataclasses, dicts, lists, numbers and tensors as one safetensors file, and back, bit for bit.

The tensors are the file's; a JSON value in its header says where each belongs. Nothing is read but the classes that the reader names,
and things that live elsewhere (a model's maps) are written as their name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file

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
