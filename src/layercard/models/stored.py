"""Tensors in safetensors files, which of them make each tensor of a model, and the fingerprint of a model's weights.

Tensors are read one at a time with plain reads: nothing is mapped, so that a limit on memory holds for them too. A safetensors file is
eight bytes with the length of a JSON header, the header with dtype, shape and place of each tensor, and their bytes. A parameter of a
model is one stored tensor under the same or an older name, or several put together (experts). Whatever is wrong is said in one line, as
a `ModelError`.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from layercard.errors import ModelError
from layercard.files import check_file, read_json
from layercard.models.layers import Block

INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000
"""Bytes; what safetensors itself allows."""
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}
SAFETENSORS_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
PIECE = 2**22
"""Numbers of a tensor that are converted at once where it is read or hashed in another type than it is stored in."""
SKETCHED = 16
"""Linear modules of which `sketch` takes a number."""


# Tensors in files


class Stored(NamedTuple):
    """A tensor in a file: where its bytes are, and what it is."""

    path: Path
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Weights:
    """The tensors of some safetensors files by name, and how many bytes were read so far, headers not counted."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.tensors: dict[str, Stored] = {}
        self.bytes_read = 0
        self.stamps: dict[Path, tuple[int, int]] = {}  # size and time of change when the header was read
        for path in files:
            self.stamps[path] = _stamp(path)
            for name, stored in read_header(path).items():
                if name in self.tensors:
                    other = self.tensors[name].path.name
                    raise ModelError(f"{path} holds {name}, and so does {other}; remove the file that is not the model's")
                self.tensors[name] = stored

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> torch.Tensor:
        """One tensor, in `dtype` where it is of floating point and one is given."""
        if name not in self.tensors:
            raise ModelError(f"the model's files hold no {name}; use a whole model")
        stored = self.tensors[name]
        kind = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
        flat = torch.empty(math.prod(stored.shape), dtype=kind)
        try:
            with stored.path.open("rb", buffering=0) as file:
                if _stamp(stored.path) != self.stamps[stored.path]:
                    raise ModelError(f"{stored.path} has changed since it was opened; give the same command again")
                file.seek(stored.start)
                if kind == stored.dtype:
                    self._fill(flat, file, stored, name)
                else:  # a piece at a time, so that the tensor is never there in both types
                    for piece in flat.split(PIECE):
                        as_stored = torch.empty(len(piece), dtype=stored.dtype)
                        self._fill(as_stored, file, stored, name)
                        piece.copy_(as_stored)
                if hasattr(os, "posix_fadvise"):  # the pages are not needed again soon; under a limit they would count
                    os.posix_fadvise(file.fileno(), stored.start, stored.size, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise ModelError(f"{stored.path} cannot be read ({error.strerror or error}); copy the file again") from error
        self.bytes_read += stored.size
        return flat.reshape(stored.shape).to(device)

    @staticmethod
    def _fill(flat: torch.Tensor, file: RawIOBase, stored: Stored, name: str) -> None:
        """Read the bytes of a tensor from where the file stands."""
        left = flat.view(torch.uint8).numpy().data
        while left:
            count = file.readinto(left)
            if not count:
                raise ModelError(f"{stored.path} ends within {name}; copy the file again")
            left = left[count:]


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of the last change of a file; zeros where it cannot be looked at, as reading it says why."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model, as its index names them; all of the folder's where there is no index."""
    if not (folder / INDEX).is_file():
        files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
        if not files:
            raise ModelError(f"{folder} holds no safetensors weights, and only these can be streamed; save the model as safetensors")
        return files
    places = read_json(folder / INDEX, ModelError, "index").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) and Path(name).name == name for name in places.values()):
        raise ModelError(f"{folder / INDEX} has no weight_map from tensors to files; copy it again")
    files = sorted({folder / name for name in places.values()})
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {missing[0]}, which its index names; copy it there")
    return files


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, each checked against the file's size."""
    check_file(path, ModelError, "safetensors file")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise ValueError
            entries = dict(json.loads(file.read(length)).items())
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror or error}); copy it again") from error
    except (ValueError, AttributeError, RecursionError) as error:  # not JSON, not text, not an object
        raise ModelError(f"{path} is not a whole safetensors file; copy it again, or save the model again") from error
    entries.pop("__metadata__", None)
    tensors, data = {}, 8 + length
    for name, entry in entries.items():
        try:
            kind, shape, (low, high) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise ModelError(f"{path} says nothing usable of {name}; save the model again") from error
        if kind not in SAFETENSORS_DTYPES:
            raise ModelError(f"{path} stores {name} as {kind:.20}, and quantised weights cannot be streamed; profile without --stream")
        dtype = SAFETENSORS_DTYPES[kind]
        numbers = all(type(number) is int and number >= 0 for number in (*shape, low, high))
        if not numbers or high - low != math.prod(shape) * dtype.itemsize or data + high > size:
            raise ModelError(f"{path} places {name} where the file is not; copy it again, or save the model again")
        tensors[name] = Stored(path, data + low, high - low, dtype, shape)
    return tensors


# Which stored tensors make each tensor of a model


@dataclass(frozen=True)
class Source:
    """Where the tensor `path` of a model comes from.

    Attributes:
        stored: Names of the stored tensors, each with the pattern of the converter that it matches (empty without one).
        converter: What puts several together, as transformers does when it loads them; `None` where one is taken as it is.
    """

    path: str
    shape: tuple[int, ...]
    stored: tuple[tuple[str, str], ...]
    converter: WeightConverter | None = None

    def read(self, weights: Weights, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> torch.Tensor:
        """The tensor; what it is made of is in memory meanwhile too."""
        first = self.stored[0][0]
        if self.converter is None:
            tensor = weights.read(first, dtype, device)
        else:
            converter = deepcopy(self.converter)
            for name, pattern in self.stored:
                converter.add_tensor(self.path, name, pattern, weights.read(name, dtype))
            try:
                value = converter.convert(self.path)[self.path]
            except Exception as error:  # operations of transformers on tensors that do not fit each other
                raise ModelError(f"{self.path} cannot be put together from {first} and others; use a whole model") from error
            tensor = (value[0] if isinstance(value, list) else value).to(device)
        if tuple(tensor.shape) != self.shape:
            raise ModelError(f"{first} is stored as {tuple(tensor.shape)}, not {self.shape}; use a whole model")
        return tensor


def find_sources(model: PreTrainedModel, weights: Weights, name: str) -> dict[str, Source]:
    """The source of each parameter and of each stored buffer; tied parameters share one."""
    # Step 1: sources by the model's names. Files may spell them as older versions did, and leave out the prefix of the base model.
    saved, mapping = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    parts: dict[str, list[tuple[str, str]]] = {}
    for stored in sorted(weights.tensors, key=dot_natural_key):
        path, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, saved)
        if path not in saved and stored in saved:  # a name that needed no change
            path, pattern = stored, None
        if path in saved:
            parts.setdefault(path, []).append((stored, pattern or ""))
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    sources = {
        path: Source(path, tuple(saved[path].shape), tuple(stored), by_pattern.get(stored[0][1]))
        for path, stored in parts.items()
        if len(stored) == 1 or stored[0][1]
    }

    # Step 2: a parameter that is tied to another may be stored under the other's name alone.
    parameters = list(model.named_parameters(remove_duplicate=False))
    source_of = {id(value): sources[path] for path, value in parameters if path in sources}
    sources |= {path: source_of[id(value)] for path, value in parameters if path not in sources and id(value) in source_of}

    # Step 3: every parameter has one, of its own shape.
    missing = [path for path, _ in parameters if path not in sources]
    if missing:
        raise ModelError(
            f"{name}: its files hold no {missing[0]} ({len(missing)} such tensors are missing); a model that is stored under other names "
            "cannot be streamed: profile without --stream"
        )
    for path, value in parameters:
        (first, *_), shape = sources[path].stored, tuple(value.shape)
        if value.is_floating_point() and not weights.tensors[first[0]].dtype.is_floating_point:
            raise ModelError(f"{name}: {first[0]} is stored as whole numbers, and its model is not quantised; use a whole model")
        if sources[path].converter is None and weights.tensors[first[0]].shape != shape:
            raise ModelError(f"{name}: {first[0]} is stored as {weights.tensors[first[0]].shape}, not {shape}; use a whole model")
    return sources


# The fingerprint


def fingerprint(model: nn.Module, *, exact: bool = False) -> str:
    """First 16 hex digits of SHA-256 over every parameter's name, shape and numbers, and over what else is saved with a model.

    Numbers are taken in bfloat16, the type that most weights are stored in, so that a model has the same fingerprint in any type that
    holds what is stored. `exact` takes them bit for bit as they are. It is the same on every device. Tied weights count once.
    """
    saved = model.state_dict()  # first: bitsandbytes puts weights that it has rearranged for a CPU back in order
    tensors = saved | dict(model.named_parameters())
    return digest(((path, tensors[path]) for path in fingerprint_paths(model, saved)), exact=exact)


def fingerprint_paths(model: nn.Module, saved: dict[str, Any]) -> list[str]:
    """What a fingerprint is made of, in its order: the parameters, then what else is in the `state_dict`."""
    tied = {path for path, _ in model.named_parameters(remove_duplicate=False)}
    others = sorted(path for path, value in saved.items() if path not in tied and isinstance(value, torch.Tensor))
    return [*sorted(path for path, _ in model.named_parameters()), *others]


def digest(tensors: Iterable[tuple[str, torch.Tensor]], *, exact: bool = False) -> str:
    """First 16 hex digits of SHA-256 over name, shape and numbers of some tensors, in the order given, as `fingerprint` takes them."""
    sha256 = hashlib.sha256()
    for path, tensor in tensors:
        if tensor.is_meta:
            raise ModelError(f"{path} is offloaded, so its values are not there; load the model without offload, or profile with --stream")
        kind = torch.bfloat16 if tensor.is_floating_point() and not exact else tensor.dtype
        sha256.update(f"{path} {tuple(tensor.shape)} {kind}\n".encode())
        for piece in tensor.detach().reshape(-1).split(PIECE):
            sha256.update(piece.to("cpu", kind).view(torch.uint8).numpy().data)
        del tensor, piece  # before the next one is read
    return sha256.hexdigest()[:16]


@torch.no_grad()
def sketch(model: PreTrainedModel, blocks: Sequence[Block], read: Callable[[str], torch.Tensor] | None = None) -> str:
    """64 hex digits by which a model is known after its weights were rounded to 8 or 4 bits (`layercard.card.card.rounding_between`).

    Sixteen linear modules give a float16 each: a random projection of what a random input gives, as a share of its length, so that it is
    about 1 in size and moves by as much as the weights do. `read` gives weights that are on disk. Empty where quantised modules cannot run.
    """
    modules = [module for block in blocks for module in block.linear_modules]
    numbers = []
    for module in (modules[number * len(modules) // SKETCHED] for number in range(min(SKETCHED, len(modules)))):
        weight = read(f"{module.path}.weight") if read else module.module._parameters.get("weight")
        x_i, projection_o = (
            torch.randn(width, generator=torch.Generator().manual_seed(0)) for width in (module.in_features, module.out_features)
        )
        if weight is not None and weight.is_floating_point() and weight.dtype.itemsize > 1 and weight.ndim == 2:
            weight = weight.detach().to(torch.bfloat16).float().cpu()  # as in the fingerprint
            y_o = x_i @ weight if module.transposed else weight @ x_i
        else:  # what a quantised module holds only the module itself can read; its bias is taken off again
            x_ti = torch.stack([x_i, torch.zeros_like(x_i)]).to(model.device, model.dtype)
            try:
                y_to = module.module(x_ti)
            except (RuntimeError, NotImplementedError):  # kernels that are for another device
                return ""
            y_o = (y_to[0] - y_to[1]).float().cpu()
        numbers.append(float(projection_o @ y_o / y_o.norm().clamp(min=torch.finfo(torch.float32).tiny)))
    return torch.tensor(numbers, dtype=torch.float32).nan_to_num().half().numpy().tobytes().hex()
