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
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights

from layercard.errors import ModelError
from layercard.layers import Block, find_blocks
from layercard.loading import Progress, cached_snapshot, locate, quiet_libraries, refuse_encoder_decoder
from layercard.models import DTYPES, BaseModel, find_device, is_classifier
from layercard.stream.weights import Weights


@dataclass
class StreamedModel:
    """A model without weights, and where they are.

    Attributes:
        base: The model with its parameters on the meta device; buffers that are not stored are real.
        weights: The tensors on disk.
        names: For each parameter and stored buffer by its name in the model the name of its tensor. Tied ones share a tensor.
        dtype: What parameters are read as.
        device: Where they are read to.
        resident_bytes: Bytes of the parameters in memory now.
        peak_bytes: The most there were at once.
    """

    base: BaseModel
    weights: Weights
    names: dict[str, str]
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
        """Put the tensors of one module in place of what it has; `read` has those that are in memory already, by stored name."""
        for kind in (module._parameters, module._buffers):
            for name, tensor in list(kind.items()):
                stored = self.names.get(f"{path}.{name}")
                if tensor is None or stored is None:
                    continue
                if stored not in read:
                    value = self.weights.read(stored, self.dtype, self.device)
                    read[stored] = nn.Parameter(value, requires_grad=False) if kind is module._parameters else value
                was.append((module, name, tensor))
                kind[name] = read[stored]

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
        name: A local folder with safetensors weights, a hub id whose files are in the cache, or `smollm2-135m`.
        device: As `load_model`; blocks go there one at a time.
        dtype: As `load_model`; `auto` takes the type that the configuration names.
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
    folder = Path(place) if Path(place).is_dir() else Path(cached_snapshot(place))
    with quiet_libraries():
        model, kind = _empty(folder, name, dtype, trust_remote_code)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        except Exception as error:  # transformers raises many kinds
            raise ModelError(f"{folder}: its tokenizer cannot be read ({' '.join(str(error).split())[:120]})") from error
    if is_classifier(model):
        raise ModelError(f"{name} is a classifier, and only language models can be streamed; profile without --stream")
    weights = Weights(folder)
    names = _names(model, weights, name)
    digest = _fingerprint(model, weights, names, kind, progress)
    base = BaseModel(model, tokenizer, name, digest, find_blocks(model))
    return StreamedModel(base, weights, names, kind, target)


def _empty(folder: Path, name: str, dtype: str, trust_remote_code: bool) -> tuple[PreTrainedModel, torch.dtype]:
    """The model without memory for its parameters; buffers that are computed are real."""
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds
        raise ModelError(f"{folder} has no usable configuration ({' '.join(str(error).split())[:120]}); copy it again") from error
    refuse_encoder_decoder(name, config)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{name} has quantised weights, which cannot be streamed; profile without --stream")
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    kind = DTYPES[dtype] if dtype != "auto" else config.dtype or torch.float32
    try:
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=kind, trust_remote_code=trust_remote_code)
    except Exception as error:  # values that the model's class refuses, each in its own way
        raise ModelError(f"{name} cannot be built as a causal language model ({' '.join(str(error).split())[:120]})") from error
    model.tie_weights()
    return model.eval(), kind


def _names(model: PreTrainedModel, weights: Weights, name: str) -> dict[str, str]:
    """The stored name of each parameter and of each stored buffer.

    A tied parameter is stored once. What is put together from several tensors, such as the experts of many models, is not found.
    """
    own = _own_names(model, weights)
    persistent = model.state_dict().keys()
    parameters = list(model.named_parameters(remove_duplicate=False))
    buffers = [(path, value) for path, value in model.named_buffers(remove_duplicate=False) if path in persistent]
    found = {path: own[path] for path, _ in (*parameters, *buffers) if path in own}
    stored_of = {id(value): found[path] for path, value in parameters if path in found}
    for path, value in parameters:
        if path not in found and id(value) in stored_of:
            found[path] = stored_of[id(value)]
    missing = [path for path, _ in parameters if path not in found]
    if missing:
        raise ModelError(
            f"{name}: its files hold no {missing[0]} ({len(missing)} such tensors are missing); models stored under other names, such as "
            "mixtures of experts with a tensor for each expert, cannot be streamed: profile without --stream"
        )
    for path, value in parameters:
        if weights.tensors[found[path]].shape != tuple(value.shape):
            raise ModelError(f"{name}: {found[path]} is stored as {weights.tensors[found[path]].shape}, not {tuple(value.shape)}")
    return found


def _own_names(model: PreTrainedModel, weights: Weights) -> dict[str, str]:
    """The stored name by the model's own: files may spell names as older versions did, and leave out the prefix of the base model."""
    known = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    found = {}
    for stored in weights.tensors:
        path, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, known)
        if pattern is None:
            found[path] = stored
    return found


def _fingerprint(model: PreTrainedModel, weights: Weights, names: dict[str, str], dtype: torch.dtype, progress: Progress | None) -> str:
    """What `models.fingerprint` gives for the whole model, from one tensor after another."""
    tied = {path for path, _ in model.named_parameters(remove_duplicate=False)}
    others = sorted(path for path in model.state_dict() if path not in tied)
    digest = hashlib.sha256()
    paths = [*sorted(path for path, _ in model.named_parameters()), *others]
    for at, path in enumerate(paths):
        tensor = weights.read(names[path], dtype)
        digest.update(f"{path} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if progress:
            progress("fingerprint", at + 1, len(paths))
    return digest.hexdigest()[:16]
