"""A model whose weights stay on disk, and are in memory for the length of a `with` block."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.initialization import no_init_weights

from layercard.errors import ModelError, one_line
from layercard.hub import hub_answers
from layercard.layers import Block, find_blocks
from layercard.loading import Progress, auto_class, cached_snapshot, locate, quiet_libraries
from layercard.models import DTYPES, BaseModel, find_device, shared_keys
from layercard.stream.sources import Source, find_sources
from layercard.stream.weights import Weights

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
