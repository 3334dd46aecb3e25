"""A model whose weights stay on disk, and are in memory for the length of a `with` block: `open_model` and `StreamedModel.loaded`.

Tensors of a model folder are read one at a time with plain reads: nothing is mapped, so that a limit on memory holds for them too.
A safetensors file is eight bytes with the length of a JSON header, the header with dtype, shape and place of each tensor, and their bytes.
A parameter of a model is one stored tensor under the same or an older name, or several put together (experts). Whatever is wrong is said
in one line, as a `ModelError`.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
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
    check_dtype,
    digest,
    find_device,
    fingerprint_paths,
    locate,
    quiet_libraries,
    read_tokenizer,
    shared_keys,
    snapshot,
)

INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000
"""Bytes; what safetensors itself allows."""
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}
SAFETENSORS_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}


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
        for path in files:
            for name, stored in _read_header(path).items():
                if name in self.tensors:
                    other = self.tensors[name].path.name
                    raise ModelError(f"{path} holds {name}, and so does {other}; remove the file that is not the model's")
                self.tensors[name] = stored

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> torch.Tensor:
        """One tensor, in `dtype` where it is of floating point and one is given."""
        if name not in self.tensors:
            raise ModelError(f"the model's files hold no {name}; use a whole model")
        stored = self.tensors[name]
        raw = torch.empty(stored.size, dtype=torch.uint8)
        left = raw.numpy().data
        try:
            with stored.path.open("rb", buffering=0) as file:
                file.seek(stored.start)
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise ModelError(f"{stored.path} ends within {name}; copy the file again")
                    left = left[count:]
                if hasattr(os, "posix_fadvise"):  # the pages are not needed again soon; under a limit they would count
                    os.posix_fadvise(file.fileno(), stored.start, stored.size, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise ModelError(f"{stored.path} cannot be read ({error.strerror or error}); copy the file again") from error
        self.bytes_read += stored.size
        tensor = raw.view(stored.dtype).reshape(stored.shape)
        return tensor.to(device, dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)


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


def _read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, each checked against the file's size."""
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


def stored_bytes(name: str, dtype: str) -> int:
    """Bytes that the weights of a model in a local folder take in a dtype (`auto`: as stored); 0 where that is not known before loading."""
    folder = Path(name).expanduser()
    if not folder.is_dir() or dtype not in DTYPES:
        return 0
    try:
        tensors = Weights(weight_files(folder)).tensors.values()
    except ModelError:  # quantised, or broken, which loading says better
        return 0
    kind = DTYPES[dtype]
    sizes = (math.prod(each.shape) * (kind.itemsize if isinstance(kind, torch.dtype) else each.dtype.itemsize) for each in tensors)
    return sum(sizes)


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

    def read(self, weights: Weights, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
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
        if sources[path].converter is None and weights.tensors[first[0]].shape != shape:
            raise ModelError(f"{name}: {first[0]} is stored as {weights.tensors[first[0]].shape}, not {shape}; use a whole model")
    return sources


# Models


@dataclass
class StreamedModel:
    """A model whose parameters are on the meta device, and where they are on disk.

    Attributes:
        base: The model; buffers that are not stored are real.
        weights: The tensors on disk.
        sources: For each parameter and stored buffer, by its name in the model, where it comes from. Tied ones share a source. What has
            none stays as it is: a model in memory has no sources at all (`in_memory`).
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

    @classmethod
    def in_memory(cls, base: BaseModel) -> "StreamedModel":
        """A model in memory with the same interface; nothing needs to be read."""
        return cls(base, Weights([]), {}, base.model.dtype, base.device)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The decoder blocks."""
        return self.base.blocks

    @contextmanager
    def loaded(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """The weights of some modules in memory, what they share in it once; gone when the block ends."""
        if not self._paths:
            self._paths.update({module: path for path, module in self.base.model.named_modules()})
        replaced: list[tuple[dict[str, Any], str, Any]] = []
        read: dict[str, Any] = {}  # by source
        before = self.resident_bytes
        try:
            for module in (inner for outer in modules for inner in outer.modules()):
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in list(tensors.items()):
                        source = self.sources.get(".".join(filter(None, (self._paths.get(module, "?"), name))))
                        if tensor is None or source is None:
                            continue
                        if source.path not in read:
                            value = source.read(self.weights, self.dtype, self.device)
                            read[source.path] = nn.Parameter(value, requires_grad=False) if tensors is module._parameters else value
                        replaced.append((tensors, name, tensor))
                        tensors[name] = read[source.path]
            self.resident_bytes += sum(tensor.nbytes for tensor in read.values())
            self.peak_bytes = max(self.peak_bytes, self.resident_bytes)
            yield
        finally:
            self.resident_bytes = before
            for tensors, name, tensor in reversed(replaced):
                tensors[name] = tensor

    def load_from(self, lowest: int) -> None:
        """Read for good what runs from block `lowest` on: these blocks, what is outside of blocks, and the head.

        What lies below stays on disk. In its place stand weights of the same shape, type and device that are all zero and take no memory,
        so that libraries find what they expect.
        """
        upper = [*(block.module for block in self.blocks[lowest:]), *self.outside(), self.head()]
        self._hold({self.sources[path].path for outer in upper for path in self._stored_in(outer)})

    def hold_places(self) -> None:
        """Put weights that take no memory where none are loaded, as `load_from` does, so that adapters can be put on."""
        self._hold(set())

    def _hold(self, wanted: set[str]) -> None:
        held: dict[str, torch.Tensor] = {}
        self._stored_in(self.base.model)  # remembers which module stands where before adapters come between
        for path, source in self.sources.items():
            module = self.base.model.get_submodule(path.rpartition(".")[0])
            tensors: dict[str, Any] = module._parameters if path.rpartition(".")[2] in module._parameters else module._buffers
            if source.path not in held:
                if source.path in wanted:
                    held[source.path] = source.read(self.weights, self.dtype, self.device)
                    self.resident_bytes += held[source.path].nbytes
                else:
                    held[source.path] = torch.zeros(1, dtype=self.dtype, device=self.device).expand(source.shape)
                if tensors is module._parameters:
                    held[source.path] = nn.Parameter(held[source.path], requires_grad=False)
            tensors[path.rpartition(".")[2]] = held[source.path]
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)

    def bytes_from(self, lowest: int) -> int:
        """Bytes of what `load_from` reads."""
        upper = [*(block.module for block in self.blocks[lowest:]), *self.outside(), self.head()]
        sources = {self.sources[path].path: self.sources[path] for outer in upper for path in self._stored_in(outer)}
        return sum(math.prod(source.shape) * self.dtype.itemsize for source in sources.values())

    def _stored_in(self, outer: nn.Module) -> list[str]:
        """Names in the model of what is stored of a module and of those inside it."""
        if not self._paths:
            self._paths.update({module: path for path, module in self.base.model.named_modules()})
        names = [
            ".".join(filter(None, (self._paths[module], name)))
            for module in outer.modules()
            for name in (*module._parameters, *module._buffers)
        ]
        return [name for name in names if name in self.sources]

    def head(self) -> nn.Module:
        """The output head."""
        head = self.base.model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{self.base.name} names no output head, so it cannot be streamed; profile without --stream")
        return head

    def outside(self) -> list[nn.Module]:
        """Modules with weights that are neither in a block nor the embedding or the head: norms, positions."""
        model = self.base.model
        inside = [model.get_input_embeddings(), model.get_output_embeddings(), *(block.module for block in self.blocks)]
        inner = {module for outer in inside if outer is not None for module in outer.modules()}
        leaves = (module for module in model.modules() if next(module.children(), None) is None)
        return [module for module in leaves if module not in inner and (module._parameters or module._buffers)]


def open_model(
    name: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> StreamedModel:
    """A model by name, without reading its weights but for the fingerprint. Arguments are those of `load_model`.

    The name is a local folder with safetensors weights, a hub id (its files are fetched to the cache), or `smollm2-135m`. Blocks go to the
    device one at a time; `auto` takes the dtype that the configuration names, else that of the files; `progress` is told of `fingerprint`.

    Raises:
        ModelError: The model cannot be found or streamed: a `.gguf` file, pickled or quantised weights, a classifier, tensors under
            names that are not the model's.
    """
    name, target = os.fspath(name), find_device(device)
    check_dtype(dtype)
    place = locate(name, progress)
    if place.lower().endswith(".gguf"):
        raise ModelError(f"{name} is a GGUF file, whose weights cannot be streamed; name a folder with safetensors weights")
    folder = Path(place if Path(place).is_dir() else snapshot(place, online=hub_answers()))
    weights = Weights(weight_files(folder))
    with quiet_libraries():
        model, kind = _empty_model(folder, name, dtype, weights, trust_remote_code)
        tokenizer = read_tokenizer(str(folder), trust_remote_code)
    if shared_keys(model):
        raise ModelError(f"blocks of {name} share keys and values, so it cannot be streamed; profile without --stream")

    # What a model computes when it is built goes to where its blocks will run.
    for module in model.modules():
        module._buffers.update({key: buffer.to(target) for key, buffer in module._buffers.items() if buffer is not None})

    # The fingerprint is that of `fingerprint`, from one tensor after another.
    sources = find_sources(model, weights, name)
    paths = fingerprint_paths(model, model.state_dict())

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number, path in enumerate(paths, 1):
            yield path, sources[path].read(weights, kind)
            if progress:
                progress("fingerprint", number, len(paths))

    base = BaseModel(model, tokenizer, name, digest(tensors()), find_blocks(model))
    return StreamedModel(base, weights, sources, kind, target)


def _empty_model(folder: Path, name: str, dtype: str, weights: Weights, trust_remote_code: bool) -> tuple[PreTrainedModel, torch.dtype]:
    """The model without memory for its parameters, and their type; buffers that are computed are real."""
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds
        raise ModelError(f"{folder} has no usable configuration ({one_line(error, 120)}); copy it again") from error
    model_class = auto_class(name, config)
    if model_class is AutoModelForSequenceClassification:
        raise ModelError(f"{name} is a classifier, and only language models can be streamed; profile without --stream")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{name} has quantised weights, which cannot be streamed; profile without --stream")
    stored = next((each.dtype for each in weights.tensors.values() if each.dtype.is_floating_point), torch.float32)
    kind: torch.dtype = getattr(torch, dtype) if dtype != "auto" else config.dtype or stored
    try:
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False), no_init_weights():
            model = model_class.from_config(config, dtype=kind, trust_remote_code=trust_remote_code)
    except Exception as error:  # values that the model's class refuses, each in its own way
        raise ModelError(
            f"{name} cannot be built from its configuration ({one_line(error, 120)}); mend it, or profile without --stream"
        ) from error
    model.tie_weights()
    return model.eval(), kind
