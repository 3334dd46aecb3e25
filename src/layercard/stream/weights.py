"""Tensors of a model folder, read one at a time with plain reads: nothing is mapped, so that a limit on memory holds for them too.

The format: eight bytes with the length of a JSON header, the header with dtype, shape and place of each tensor, then their bytes
(huggingface/safetensors).
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layercard.errors import ModelError
from layercard.files import read_json

INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000
"""Bytes; what safetensors itself allows."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: the file, the first byte in it, and what it is."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Weights:
    """The tensors of all safetensors files of a folder.

    Attributes:
        tensors: Each by name.
        bytes_read: What was read so far, headers not counted.

    Args:
        folder: A model folder.

    Raises:
        ModelError: A file is missing, cut off or not well formed.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, Stored] = {}
        self.bytes_read = 0
        for path in _files(folder):
            for name, stored in _header(path).items():
                if name in self.tensors:
                    raise ModelError(
                        f"{path} holds {name}, and so does {self.tensors[name].path.name}; remove the file that is not the model's"
                    )
                self.tensors[name] = stored

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> torch.Tensor:
        """One tensor, in `dtype` where it is of floating point and one is given.

        Raises:
            ModelError: There is no such tensor, or it cannot be read.
        """
        if name not in self.tensors:
            raise ModelError(f"the model's files hold no {name}; use a whole model")
        stored = self.tensors[name]
        raw = torch.empty(stored.size, dtype=torch.uint8)
        _fill(stored, raw.numpy().data, name)
        self.bytes_read += stored.size
        found = raw.view(stored.dtype).reshape(stored.shape)
        return found.to(device, dtype if dtype is not None and found.is_floating_point() else found.dtype)


def _fill(stored: Stored, into: memoryview, name: str) -> None:
    try:
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.start)
            done = 0
            while done < len(into):
                count = file.readinto(into[done:])
                if not count:
                    raise ModelError(f"{stored.path} ends within {name}; copy the file again")
                done += count
            if hasattr(os, "posix_fadvise"):  # the pages are not needed again soon; under a limit they would count
                os.posix_fadvise(file.fileno(), stored.start, stored.size, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise ModelError(f"{stored.path} cannot be read ({error.strerror or error}); copy the file again") from error


def _files(folder: Path) -> list[Path]:
    """The files that hold a model, as its index names them; all of the folder's where there is none."""
    if not (folder / INDEX).is_file():
        found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
        if not found:
            raise ModelError(f"{folder} holds no safetensors weights, and only these can be streamed; save the model as safetensors")
        return found
    places = read_json(folder / INDEX, ModelError, "index").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) and Path(name).name == name for name in places.values()):
        raise ModelError(f"{folder / INDEX} has no weight_map from tensors to files; copy it again")
    found = sorted({folder / name for name in places.values()})
    missing = [path.name for path in found if not path.is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {missing[0]}, which its index names; copy it there")
    return found


def _header(path: Path) -> dict[str, Stored]:
    broken = ModelError(f"{path} is no whole safetensors file; copy it again, or save the model again")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise broken
            entries = json.loads(file.read(length).decode("utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror or error}); copy it again") from error
    except (ValueError, RecursionError) as error:  # no JSON, or no text
        raise broken from error
    if not isinstance(entries, dict):
        raise broken
    return {name: _stored(path, 8 + length, size, name, entry) for name, entry in entries.items() if name != "__metadata__"}


def _stored(path: Path, data: int, size: int, name: str, entry: Any) -> Stored:
    """One entry of a header, checked against the file's size."""
    try:
        kind, shape, (low, high) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, low, high))
    except (TypeError, KeyError, ValueError) as error:
        raise ModelError(f"{path} says nothing usable of {name}; save the model again") from error
    if kind not in DTYPES:
        raise ModelError(f"{path} stores {name} as {kind:.20}, and quantised weights cannot be streamed; profile without --stream")
    stored = Stored(path, data + low if whole else 0, DTYPES[kind], shape)
    if not whole or high - low != stored.size or data + high > size:
        raise ModelError(f"{path} places {name} where the file is not; copy it again, or save the model again")
    return stored
