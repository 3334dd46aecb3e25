"""A model whose weights stay on disk, and are in memory for the length of a `with` block: `open_model` and `StreamedModel.loaded`.

How its tensors are found and read is in `stored`. Whatever is wrong is said in one line, as a `ModelError`.
"""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from layercard.errors import ModelError
from layercard.hub import hub_answers
from layercard.models import quantised
from layercard.models.embedded import EMBEDDED
from layercard.models.layers import Block, find_blocks
from layercard.models.load import (
    DTYPES,
    BaseModel,
    Progress,
    auto_class,
    check_dtype,
    empty_model,
    find_device,
    locate,
    quiet_libraries,
    read_config,
    read_tokenizer,
    shared_keys,
    snapshot,
)
from layercard.models.stored import Source, Weights, digest, find_sources, fingerprint_paths, sketch, weight_files


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
    _packed: set[str] = field(default_factory=set)  # weights that are rounded as they are loaded

    @classmethod
    def in_memory(cls, base: BaseModel) -> "StreamedModel":
        """A model in memory with the same interface; nothing needs to be read."""
        return cls(base, Weights([]), {}, base.model.dtype, base.device)

    @property
    def reading(self) -> dict[str, int]:
        """What was read, and the most that was in memory, as a card says it."""
        return {"bytes_read": self.weights.bytes_read, "peak_weights_bytes": self.peak_bytes}

    def go_on(self, reading: dict[str, int]) -> None:
        """Count on from where an interrupted process stood; what was read since, to get there again, does not count twice."""
        self.weights.bytes_read = reading["bytes_read"]
        self.peak_bytes = max(self.peak_bytes, reading["peak_weights_bytes"])

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The decoder blocks."""
        return self.base.blocks

    @contextmanager
    def loaded(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """The weights of some modules in memory, what they share in it once; gone when the block ends."""
        paths = self._module_paths()
        replaced: list[tuple[dict[str, Any], str, Any]] = []
        read: dict[str, Any] = {}  # by source
        before = self.resident_bytes
        try:
            for module in (inner for outer in modules for inner in outer.modules()):
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in list(tensors.items()):
                        source = self.sources.get(".".join(filter(None, (paths.get(module, "?"), name))))
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
        self._hold({source.path for source in self._sources_from(lowest)})

    def quantise(self, lowest: int, bits: int) -> None:
        """Let the linear modules of the blocks from `lowest` on be in 4 or 8 bits once `load_from` reads them.

        Raises:
            ModelError: bitsandbytes is not there, or these blocks have no linear modules that it knows.
        """
        chosen = [linear for block in self.blocks[lowest:] for linear in block.linear_modules if isinstance(linear.module, nn.Linear)]
        if not chosen:
            raise ModelError(f"the blocks of {self.base.name} have no linear modules that bitsandbytes rounds; leave --bits out")
        for linear in chosen:
            assert isinstance(linear.module, nn.Linear)
            self.base.model.set_submodule(linear.path, quantised.empty_linear(linear.module, bits, self.dtype))
        setattr(self.base.model, f"is_loaded_in_{bits}bit", True)  # what PEFT asks
        self.base = replace(self.base, blocks=find_blocks(self.base.model), bits=bits)
        self._packed = {f"{linear.path}.weight" for linear in chosen}
        self._paths.clear()

    def hold_places(self) -> None:
        """Put weights that take no memory where none are loaded, as `load_from` does, so that adapters can be put on."""
        self._hold(set())

    def _hold(self, wanted: set[str]) -> None:
        self._module_paths()  # before adapters come between
        held: dict[str, torch.Tensor] = {}
        for path, source in self.sources.items():
            parent, _, name = path.rpartition(".")
            module = self.base.model.get_submodule(parent)
            tensors: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
            if path in self._packed:
                if source.path in wanted:
                    quantised.fill(module, source.read(self.weights, self.dtype), self.device)
                    self.resident_bytes += module.weight.nbytes
                continue
            if source.path not in held:
                if source.path in wanted:
                    held[source.path] = source.read(self.weights, self.dtype, self.device)
                    self.resident_bytes += held[source.path].nbytes
                else:
                    held[source.path] = torch.zeros(1, dtype=self.dtype, device=self.device).expand(source.shape)
                if tensors is module._parameters:
                    held[source.path] = nn.Parameter(held[source.path], requires_grad=False)
            tensors[name] = held[source.path]
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)

    def bytes_from(self, lowest: int) -> int:
        """Bytes of what `load_from` reads."""
        return sum(math.prod(source.shape) * self.dtype.itemsize for source in self._sources_from(lowest))

    def _sources_from(self, lowest: int) -> list[Source]:
        """The sources of what runs from block `lowest` on, each once."""
        upper, paths = [*(block.module for block in self.blocks[lowest:]), *self.outside(), self.head()], self._module_paths()
        names = (
            ".".join(filter(None, (paths[module], name)))
            for outer in upper
            for module in outer.modules()
            for name in (*module._parameters, *module._buffers)
        )
        return list({self.sources[name].path: self.sources[name] for name in names if name in self.sources}.values())

    def _module_paths(self) -> dict[nn.Module, str]:
        """Where each module stood when this was first asked."""
        if not self._paths:
            self._paths.update({module: path for path, module in self.base.model.named_modules()})
        return self._paths

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
        model, kind = _streamable_model(folder, name, dtype, weights, trust_remote_code)
        tokenizer = read_tokenizer(str(folder), trust_remote_code)
    if shared_keys(model):
        raise ModelError(f"blocks of {name} share keys and values, so it cannot be streamed; profile without --stream")

    # What a model computes when it is built goes to where its blocks will run.
    for module in model.modules():
        module._buffers.update({key: buffer.to(target) for key, buffer in module._buffers.items() if buffer is not None})

    # The fingerprint is that of `fingerprint`, from one tensor after another, as they are stored.
    sources = find_sources(model, weights, name)
    paths = fingerprint_paths(model, model.state_dict())

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number, path in enumerate(paths, 1):
            yield path, sources[path].read(weights)
            if progress:
                progress("fingerprint", number, len(paths))

    blocks = find_blocks(model)
    fingerprint = digest(tensors())
    drawn = sketch(model, blocks, lambda path: sources[path].read(weights))
    base = BaseModel(model, tokenizer, name, fingerprint, blocks, rounded=name == EMBEDDED, sketch=drawn)
    return StreamedModel(base, weights, sources, kind, target)


def _streamable_model(
    folder: Path, name: str, dtype: str, weights: Weights, trust_remote_code: bool
) -> tuple[PreTrainedModel, torch.dtype]:
    """The model without memory for its parameters, and their type.

    Raises:
        ModelError: It is a classifier, or has quantised weights.
    """
    config = read_config(folder, trust_remote_code)
    if auto_class(name, config) is AutoModelForSequenceClassification:
        raise ModelError(f"{name} is a classifier, and only language models can be streamed; profile without --stream")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{name} has quantised weights, which cannot be streamed; profile without --stream")
    stored = next((each.dtype for each in weights.tensors.values() if each.dtype.is_floating_point), torch.float32)
    kind: torch.dtype = getattr(torch, dtype) if dtype != "auto" else config.dtype or stored
    return empty_model(name, config, kind, trust_remote_code), kind
