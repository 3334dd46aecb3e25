"""Adapters that are loaded once and then put on and taken off a base model at once, for serving and timing several of them in turn.

PEFT wraps each adapted module. Loaded by itself and taken off again, an adapter is just these wrappers, kept aside by path; they refer
to the base model's modules and copy none of its weights. Putting them in place is the same model as PEFT's own, module for module, and
the blocks without adapters stay plain.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from layercard.adapters.apply import adapted, loaded
from layercard.adapters.files import read_adapter
from layercard.errors import DataError, PlacementError
from layercard.models.adapted import quiet_peft
from layercard.models.load import BaseModel
from layercard.selection.placement import Placement

PLAIN = {"bias": "none", "layer_replication": None, "alora_invocation_tokens": None}
"""Settings of LoRA with these values put modules in place of others and do nothing else."""


@dataclass(frozen=True)
class Adapter:
    """An adapter of a base model, at present off it."""

    name: str  # what tables call it: the folder it was loaded from, or what it was made for
    modules: Mapping[str, nn.Module]  # they take the place of the base model's, by path
    layers: tuple[int, ...]  # indices of the decoder blocks in which they lie, ascending
    outside: tuple[str, ...]  # paths of those that lie in no block, such as an embedding or the head
    bytes: int = 0  # what it adds to the base model's weights


def load_adapter(base: BaseModel, folder: str | Path, *, name: str = "") -> Adapter:
    """The LoRA adapter that `layercard train` or PEFT saved in `folder`, called by `name` or the folder; `base` stays as it is.

    Raises:
        PlacementError: There is no adapter in the folder, it was trained for another model, or it cannot be put on and taken off by its
            modules alone.
    """
    config = read_adapter(folder, base.model).config
    if config.peft_type != PeftType.LORA:
        kind = PeftType(config.peft_type).value
        raise PlacementError(f"{folder} is an adapter of type {kind!r}; layercard serves and times LoRA adapters")
    for setting, plain in PLAIN.items():
        if vars(config).get(setting, plain) != plain:
            effect = f"{setting} = {vars(config)[setting]!r}, which changes the base model beside the adapters"
            raise PlacementError(f"{folder} has {effect}; train it without")
    plain_modules = dict(base.model.named_modules())
    with loaded(base, folder):
        return _taken(base, plain_modules, name or str(folder))


def random_adapter(base: BaseModel, placement: Placement, *, name: str = "", rank: int = 8, seed: int = 0) -> Adapter:
    """A LoRA adapter with random weights at a placement's paths, both factors other than zero: for measuring."""
    generator = torch.Generator().manual_seed(seed)
    plain_modules = dict(base.model.named_modules())
    with adapted(base, placement, rank=rank, alpha=2.0 * rank) as model:
        with torch.no_grad():
            for path, weight in model.named_parameters():
                if ".lora_" in path:
                    weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
        model.eval()
        return _taken(base, plain_modules, name or placement.objective)


def _taken(base: BaseModel, plain_modules: Mapping[str, nn.Module], name: str) -> Adapter:
    """The adapter that is on `base`, whose modules without it are `plain_modules`."""
    modules: dict[str, nn.Module] = {}
    for path, module in plain_modules.items():
        parent, _, child = path.rpartition(".")
        now = plain_modules[parent]._modules.get(child) if path else module
        if now is not None and now is not module:
            modules[path] = now.requires_grad_(False)
    blocks = {block.index: f"{block.path}." for block in base.blocks}
    layers = [index for index, block in blocks.items() if any(path.startswith(block) for path in modules)]
    outside = tuple(path for path in modules if not path.startswith(tuple(blocks.values())))
    base_weights = {id(weight) for module in plain_modules.values() for weight in module._parameters.values()}
    weights = {id(weight): weight.nbytes for module in modules.values() for weight in module.parameters()}
    return Adapter(name, modules, tuple(layers), outside, sum(size for key, size in weights.items() if key not in base_weights))


def check_positions(base: BaseModel, prompt_tokens: int, new_tokens: int) -> None:
    """Raise `DataError` if a prompt and what is written after it are longer than the model's positions."""
    limit = getattr(base.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(limit, int) and prompt_tokens + new_tokens > limit:
        raise DataError(f"{prompt_tokens} tokens and {new_tokens} new ones exceed the {limit} positions of {base.name}; take fewer")


@contextmanager
def switched_on(base: BaseModel, adapter: Adapter | None) -> Iterator[None]:
    """Put an adapter on `base` for the length of a `with` block; with `None` the model is plain."""
    places = []
    for path, module in adapter.modules.items() if adapter is not None else ():
        parent_path, _, child = path.rpartition(".")
        parent = base.model.get_submodule(parent_path)
        places.append((parent, child, module, parent._modules[child]))
    try:
        for parent, child, module, _ in places:
            parent._modules[child] = module
        yield
    finally:
        for parent, child, _, plain in places:
            parent._modules[child] = plain


def merged(adapter: Adapter) -> Adapter:
    """The adapter written into copies of the weights that it changes: plain modules, as fast as the base model's.

    The base model's own weights stay as they are, so this takes memory for the copies; a model that is merged for good does not.
    """
    modules = dict(adapter.modules)
    with quiet_peft():
        for path, module in adapter.modules.items():
            if isinstance(module, BaseTunerLayer):
                inner: Any = copy.deepcopy(module)
                while isinstance(inner, BaseTunerLayer):  # of several parameters of one module the wrappers nest
                    inner.merge()
                    inner = inner.base_layer
                modules[path] = inner
    return replace(adapter, modules=modules)
