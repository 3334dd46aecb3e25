"""Adapters that are loaded once and then put on and taken off a base model at once, for serving and timing several of them in turn.

PEFT wraps each adapted module. Loaded by itself and taken off again, an adapter is just these wrappers, kept aside by path; they refer
to the base model's modules and copy none of its weights. Putting them in place is the same model as PEFT's own, module for module, and
the blocks without adapters stay plain.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from layercard.adapters.apply import CONFIG_FILE, adapted, loaded
from layercard.errors import PlacementError
from layercard.files import read_json
from layercard.models.adapted import quiet_peft
from layercard.models.load import BaseModel
from layercard.selection.placement import Placement


@dataclass(frozen=True)
class Adapter:
    """An adapter of a base model, at present off it.

    Attributes:
        name: What it is called in tables: the folder it was loaded from, or what it was made for.
        modules: The modules that take the place of the base model's, by path.
        layers: Indices of the decoder blocks in which they lie, ascending.
        outside: Paths of those that lie in no block, such as an embedding or the head.
    """

    name: str
    modules: Mapping[str, nn.Module]
    layers: tuple[int, ...]
    outside: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Size of what the adapter adds to the base model's weights."""
        return sum(weight.nbytes for module in self.modules.values() for name, weight in module.named_parameters() if not _of_base(name))


def load_adapter(base: BaseModel, folder: str | Path, *, name: str = "") -> Adapter:
    """The LoRA adapter that `layercard train` or PEFT saved in `folder`, called by `name` or the folder; `base` stays as it is.

    Raises:
        PlacementError: There is no adapter in the folder, it was trained for another model, or it is none that can be put on and taken
            off by its modules alone.
    """
    folder = Path(folder)
    if (folder / CONFIG_FILE).is_file():
        _check(folder, read_json(folder / CONFIG_FILE, PlacementError, "adapter"))
    take = taker(base, name or str(folder))
    with loaded(base, folder):
        return take()


def random_adapter(base: BaseModel, placement: Placement, *, name: str = "", rank: int = 8, seed: int = 0) -> Adapter:
    """A LoRA adapter with random weights at a placement's paths, both factors other than zero: for measuring."""
    generator = torch.Generator().manual_seed(seed)
    take = taker(base, name or placement.objective)
    with adapted(base, placement, rank=rank, alpha=2.0 * rank) as model:
        with torch.no_grad():
            for path, weight in model.named_parameters():
                if ".lora_" in path:
                    weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
        model.eval()
        return take()


def taker(base: BaseModel, name: str) -> Callable[[], Adapter]:
    """A function that, called once PEFT has put an adapter on `base`, gives it as an `Adapter`; `base` is plain when this is called."""
    before = dict(base.model.named_modules())
    blocks = {block.index: f"{block.path}." for block in base.blocks}

    def take() -> Adapter:
        found: dict[str, nn.Module] = {}
        for path, module in before.items():
            parent, _, child = path.rpartition(".")
            now = before[parent]._modules.get(child) if path else module
            if now is not None and now is not module:
                found[path] = now.requires_grad_(False)
        layers = [index for index, prefix in blocks.items() if any(path.startswith(prefix) for path in found)]
        outside = tuple(path for path in found if not path.startswith(tuple(blocks.values())))
        return Adapter(name, found, tuple(layers), outside)

    return take


@contextmanager
def switched_on(base: BaseModel, adapter: Adapter | None) -> Iterator[None]:
    """Put an adapter on `base` for the length of a `with` block; with `None` the model is plain."""
    places = [] if adapter is None else [(*_place(base, path), module) for path, module in adapter.modules.items()]
    own = [(parent, child, parent._modules[child]) for parent, child, _ in places]
    try:
        for parent, child, module in places:
            parent._modules[child] = module
        yield
    finally:
        for parent, child, plain in own:
            parent._modules[child] = plain


def merged(adapter: Adapter) -> Adapter:
    """The adapter written into copies of the weights that it changes: plain modules, as fast as the base model's.

    The base model's own weights stay as they are, so this takes memory for the copies; a model that is merged for good does not.
    """
    with quiet_peft():
        return Adapter(adapter.name, {path: _merged(module) for path, module in adapter.modules.items()}, adapter.layers, adapter.outside)


def _merged(module: nn.Module) -> nn.Module:
    if not isinstance(module, BaseTunerLayer):
        return module
    inner: Any = copy.deepcopy(module)
    while isinstance(inner, BaseTunerLayer):  # of several parameters of one module the wrappers nest
        inner.merge()
        inner = inner.base_layer
    return inner


def _place(base: BaseModel, path: str) -> tuple[nn.Module, str]:
    parent, _, child = path.rpartition(".")
    return base.model.get_submodule(parent), child


def _of_base(name: str) -> bool:
    """Whether a weight in a wrapper, by its name there, is the base model's.

    >>> _of_base("base_layer.weight"), _of_base("lora_A.default.weight"), _of_base("base_layer.lora_A.default.weight")
    (True, False, False)
    """
    inner = name
    while inner.startswith("base_layer."):
        inner = inner.removeprefix("base_layer.")
    return inner.startswith("original_module.") or (inner != name and not inner.startswith("lora_"))


def _check(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `PlacementError` for what does more than put modules in place of others."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise PlacementError(f"{folder} is an adapter of type {kind!r}; layercard serves and times LoRA adapters")
    plain = {"bias": "none", "layer_replication": None, "alora_invocation_tokens": None}
    odd = next((name for name, value in plain.items() if config.get(name, value) != value), None)
    if odd is not None:
        raise PlacementError(f"{folder} has {odd} = {config[odd]!r}, which changes the base model beside the adapters; train it without")
