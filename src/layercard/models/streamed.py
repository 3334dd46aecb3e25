"""Tensors of a model folder, read one at a time with plain reads: nothing is mapped, so that a limit on memory holds for them too.

The format: eight bytes with the length of a JSON header, the header with dtype, shape and place of each tensor, then their bytes
(huggingface/safetensors).

Which stored tensors make each parameter of a model: one under the same or an older name, or several put together (experts).

A model whose weights stay on disk, and are in memory for the length of a `with` block.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.initialization import no_init_weights

from layercard.errors import ModelError, one_line
from layercard.files import read_json
from layercard.hub import hub_answers
from layercard.models.layers import Block, find_blocks
from layercard.models.load import (
    DTYPES,
    BaseModel,
    Progress,
    auto_class,
    cached_snapshot,
    find_device,
    locate,
    quiet_libraries,
    shared_keys,
)

# ---- stream.weights

INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000
"""Bytes; what safetensors itself allows."""
SAFETENSORS_DTYPES = {
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
    if kind not in SAFETENSORS_DTYPES:
        raise ModelError(f"{path} stores {name} as {kind:.20}, and quantised weights cannot be streamed; profile without --stream")
    stored = Stored(path, data + low if whole else 0, SAFETENSORS_DTYPES[kind], shape)
    if not whole or high - low != stored.size or data + high > size:
        raise ModelError(f"{path} places {name} where the file is not; copy it again, or save the model again")
    return stored


# ---- stream.sources


@dataclass(frozen=True)
class Source:
    """Where one tensor of a model comes from.

    Attributes:
        path: Its name in the model.
        shape: Its shape there.
        stored: Names of the stored tensors, each with the pattern of the converter that it matches (empty without one).
        converter: What puts several together, as transformers does when it loads them; `None` where one is taken as it is.
    """

    path: str
    shape: tuple[int, ...]
    stored: tuple[tuple[str, str], ...]
    converter: WeightConverter | None = None

    def read(self, weights: Weights, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """The tensor; what it is made of is in memory meanwhile too.

        Raises:
            ModelError: It cannot be read, or is not of the model's shape.
        """
        if self.converter is None:
            found = weights.read(self.stored[0][0], dtype, device)
        else:
            converter = deepcopy(self.converter)
            for name, pattern in self.stored:
                converter.add_tensor(self.path, name, pattern, weights.read(name, dtype))
            found = self._converted(converter).to(device)
        if tuple(found.shape) != self.shape:
            raise ModelError(f"{self.stored[0][0]} is stored as {tuple(found.shape)}, not {self.shape}; use a whole model")
        return found

    def _converted(self, converter: WeightConverter) -> torch.Tensor:
        try:
            made: Mapping[str, Any] = converter.convert(self.path)
            value = made[self.path]
        except Exception as error:  # operations of transformers on tensors that do not fit each other
            raise ModelError(f"{self.path} cannot be put together from {self.stored[0][0]} and others; use a whole model") from error
        return value[0] if isinstance(value, list) else value


def find_sources(model: PreTrainedModel, weights: Weights, name: str) -> dict[str, Source]:
    """The source of each parameter and of each stored buffer; tied parameters share one.

    Raises:
        ModelError: There is none, or it is of another shape.
    """
    own = _own_sources(model, weights)
    persistent = model.state_dict().keys()
    parameters = list(model.named_parameters(remove_duplicate=False))
    buffers = [(path, value) for path, value in model.named_buffers(remove_duplicate=False) if path in persistent]
    found = {path: own[path] for path, _ in (*parameters, *buffers) if path in own}
    source_of = {id(value): found[path] for path, value in parameters if path in found}
    for path, value in parameters:
        if path not in found and id(value) in source_of:
            found[path] = source_of[id(value)]
    missing = [path for path, _ in parameters if path not in found]
    if missing:
        raise ModelError(
            f"{name}: its files hold no {missing[0]} ({len(missing)} such tensors are missing); a model that is stored under other names "
            "cannot be streamed: profile without --stream"
        )
    for path, value in parameters:
        (first, *_), shape = found[path].stored, tuple(value.shape)
        if found[path].converter is None and weights.tensors[first[0]].shape != shape:
            raise ModelError(f"{name}: {first[0]} is stored as {weights.tensors[first[0]].shape}, not {shape}; use a whole model")
    return found


def _own_sources(model: PreTrainedModel, weights: Weights) -> dict[str, Source]:
    """By the model's own names: files may spell them as older versions did, and leave out the prefix of the base model."""
    known = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    parts: dict[str, list[tuple[str, str]]] = {}
    for stored in sorted(weights.tensors, key=dot_natural_key):
        path, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, known)
        if path not in known and stored in known:  # a name that needed no change
            path, pattern = stored, None
        if path in known:
            parts.setdefault(path, []).append((stored, pattern or ""))
    return {
        path: Source(path, tuple(known[path].shape), tuple(stored), by_pattern.get(stored[0][1]))
        for path, stored in parts.items()
        if len(stored) == 1 or stored[0][1]
    }


# ---- stream.streamed

FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
"""What of a model on the hub is fetched."""


@dataclass
class StreamedModel:
    """A model without weights, and where they are.

    Attributes:
        base: The model with its parameters on the meta device; buffers that are not stored are real.
        weights: The tensors on disk.
        sources: For each parameter and stored buffer, by its name in the model, where it comes from. Tied ones share a source.
        dtype: What parameters are read as.
        device: Where they are read to.
        resident_bytes: Bytes of the parameters in memory now.
        peak_bytes: The most there were at once.
    """

    base: BaseModel
    weights: Weights
    sources: dict[str, Source]
    dtype: torch.dtype
    device: torch.device
    resident_bytes: int = 0
    peak_bytes: int = 0
    _paths: dict[nn.Module, str] = field(default_factory=dict)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The decoder blocks."""
        return self.base.blocks

    @contextmanager
    def loaded(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """The weights of some modules in memory, what they share in it once; gone when the block ends."""
        was: list[tuple[nn.Module, str, Any]] = []
        read: dict[str, Any] = {}
        before = self.resident_bytes
        try:
            for module in modules:
                for path, inner in module.named_modules():
                    self._fill(inner, ".".join(filter(None, (self._path(module), path))), read, was)
            self.resident_bytes += sum(tensor.nbytes for tensor in read.values())
            self.peak_bytes = max(self.peak_bytes, self.resident_bytes)
            yield
        finally:
            self.resident_bytes = before
            for module, name, tensor in reversed(was):
                (module._parameters if name in module._parameters else module._buffers)[name] = tensor

    def _path(self, module: nn.Module) -> str:
        if not self._paths:
            self._paths.update({inner: name for name, inner in self.base.model.named_modules()})
        return self._paths[module]

    def _fill(self, module: nn.Module, path: str, read: dict[str, Any], was: list[tuple[nn.Module, str, Any]]) -> None:
        """Put the tensors of one module in place of what it has; `read` has those that are in memory already, by their source."""
        for kind in (module._parameters, module._buffers):
            for name, tensor in list(kind.items()):
                source = self.sources.get(f"{path}.{name}")
                if tensor is None or source is None:
                    continue
                if source.path not in read:
                    value = source.read(self.weights, self.dtype, self.device)
                    read[source.path] = nn.Parameter(value, requires_grad=False) if kind is module._parameters else value
                was.append((module, name, tensor))
                kind[name] = read[source.path]

    def head(self) -> nn.Module:
        """The output head.

        Raises:
            ModelError: The model names none.
        """
        head = self.base.model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{self.base.name} names no output head, so it cannot be streamed; profile without --stream")
        return head

    def outside(self) -> list[nn.Module]:
        """Modules with weights that are neither in a block nor the embedding or the head: norms, positions."""
        model = self.base.model
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        blocks = [block.module for block in self.blocks]
        found: list[nn.Module] = []

        def walk(module: nn.Module) -> None:
            if module in ends or module in blocks:
                return
            below = list(module.children())
            if below:
                for child in below:
                    walk(child)
            elif module._parameters or module._buffers:
                found.append(module)

        walk(model)
        return found


@dataclass(frozen=True)
class ModelInMemory:
    """A model whose weights are in memory already, with what `BlockByBlock` needs of a `StreamedModel`."""

    base: BaseModel

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The decoder blocks."""
        return self.base.blocks

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self.base.device

    @contextmanager
    def loaded(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Nothing to do: the modules are in memory."""
        yield

    def head(self) -> nn.Module:
        """The output head."""
        return self.base.model.get_output_embeddings()

    def outside(self) -> list[nn.Module]:
        """Nothing needs to be loaded."""
        return []


def open_model(
    name: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> StreamedModel:
    """A model by name, without reading its weights but for the fingerprint.

    Args:
        name: A local folder with safetensors weights, a hub id (its files are fetched to the cache), or `smollm2-135m`.
        device: As `load_model`; blocks go there one at a time.
        dtype: As `load_model`; `auto` takes the type that the configuration names, else that of the files.
        trust_remote_code: Whether code that comes with the model may run.
        progress: Told of tensors, `fingerprint`.

    Raises:
        ModelError: The model cannot be found or streamed: a `.gguf` file, pickled or quantised weights, a classifier, tensors under
            names that are not the model's.
    """
    name, target = os.fspath(name), find_device(device)
    place = locate(name, progress)
    if place.lower().endswith(".gguf"):
        raise ModelError(f"{name} is a GGUF file, whose weights cannot be streamed; name a folder with safetensors weights")
    folder = _folder(place)
    weights = Weights(folder)
    stored = next((each.dtype for each in weights.tensors.values() if each.dtype.is_floating_point), torch.float32)
    with quiet_libraries():
        model, kind = _empty(folder, name, dtype, stored, trust_remote_code)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        except Exception as error:  # transformers raises many kinds
            raise ModelError(f"{folder}: its tokenizer cannot be read ({one_line(error, 120)})") from error
    if shared_keys(model):
        raise ModelError(f"blocks of {name} share keys and values, so it cannot be streamed; profile without --stream")
    _place_buffers(model, target)
    sources = find_sources(model, weights, name)
    digest = _fingerprint(model, weights, sources, kind, progress)
    base = BaseModel(model, tokenizer, name, digest, find_blocks(model))
    return StreamedModel(base, weights, sources, kind, target)


def _folder(place: str) -> Path:
    """Where a model's files are; those of one on the hub are fetched to its cache first, where it answers."""
    if Path(place).is_dir():
        return Path(place)
    if not hub_answers():
        return Path(cached_snapshot(place))
    try:
        return Path(snapshot_download(place, allow_patterns=FILES))
    except Exception as error:  # the hub client raises many kinds
        reason = one_line(error, 120)
        raise ModelError(f"{place!r} is no local folder, and the hub did not give it ({reason}); name a folder or another model") from error


def _empty(folder: Path, name: str, dtype: str, stored: torch.dtype, trust_remote_code: bool) -> tuple[PreTrainedModel, torch.dtype]:
    """The model without memory for its parameters, and their type; buffers that are computed are real."""
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds
        raise ModelError(f"{folder} has no usable configuration ({one_line(error, 120)}); copy it again") from error
    whole = auto_class(name, config)
    if whole is AutoModelForSequenceClassification:
        raise ModelError(f"{name} is a classifier, and only language models can be streamed; profile without --stream")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{name} has quantised weights, which cannot be streamed; profile without --stream")
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    kind: torch.dtype = getattr(torch, dtype) if dtype != "auto" else config.dtype or stored
    try:
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False), no_init_weights():
            model = whole.from_config(config, dtype=kind, trust_remote_code=trust_remote_code)
    except Exception as error:  # values that the model's class refuses, each in its own way
        raise ModelError(
            f"{name} cannot be built from its configuration ({one_line(error, 120)}); mend it, or profile without --stream"
        ) from error
    model.tie_weights()
    return model.eval(), kind


def _place_buffers(model: nn.Module, device: torch.device) -> None:
    """Move what a model computes when it is built to where its blocks will run."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _fingerprint(
    model: PreTrainedModel, weights: Weights, sources: dict[str, Source], dtype: torch.dtype, progress: Progress | None
) -> str:
    """What `models.fingerprint` gives for the whole model, from one tensor after another."""
    tied = {path for path, _ in model.named_parameters(remove_duplicate=False)}
    others = sorted(path for path in model.state_dict() if path not in tied)
    digest = hashlib.sha256()
    paths = [*sorted(path for path, _ in model.named_parameters()), *others]
    for at, path in enumerate(paths):
        tensor = sources[path].read(weights, dtype)
        digest.update(f"{path} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if progress:
            progress("fingerprint", at + 1, len(paths))
    return digest.hexdigest()[:16]
