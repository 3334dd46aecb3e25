"""Where a model's decoder blocks and their linear maps are, found from the module tree and not from a list of names."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from peft import LoraConfig
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layercard.errors import ModelError

STACKED = ("gate_up_proj", "up_proj", "down_proj")
"""What every way of transformers to run experts calls their stacked maps."""


@dataclass(frozen=True)
class Projection:
    """One linear map of a block.

    Attributes:
        name: Path below the block (`self_attn.q_proj`).
        path: Path in the model (`model.layers.3.self_attn.q_proj`).
        module: The module itself; its weight is `[out, in]`, or `[in, out]` where `transposed` (GPT-2's `Conv1D`), or packed where
            the map is quantised.
        in_features: Width of its input.
        out_features: Width of its output.
        transposed: Whether the stored weight is `[in, out]`.
        expert: Number of the expert whose map it is, where `path` ends in that number (`…experts.gate_up_proj[3]`) and `module` holds
            the stacked maps of all of them.
    """

    name: str
    path: str
    module: nn.Module
    in_features: int
    out_features: int
    transposed: bool
    expert: int | None = None


@dataclass(frozen=True)
class ExpertStack:
    """One linear map of all experts of a block, stored as a single three-dimensional parameter.

    Attributes:
        name: Path below the block (`mlp.experts.gate_up_proj`).
        path: Path of the parameter in the model.
        module: The module that holds the parameter and runs the experts.
        parameter: Name of the parameter in that module.
        experts: Number of experts E.
        in_features: Width of what enters an expert's map.
        out_features: Width of what leaves it.
        transposed: Whether the parameter is `[E, in, out]` and not `[E, out, in]`.
        active: Number of experts that a token is sent to; the usual 2 where the configuration does not say.
    """

    name: str
    path: str
    module: nn.Module
    parameter: str
    experts: int
    in_features: int
    out_features: int
    transposed: bool
    active: int = 2

    @cached_property
    def maps(self) -> tuple[Projection, ...]:
        """The map of each expert by itself; the same objects at each call, so that a saved state can name them."""
        return tuple(
            Projection(f"{self.name}[{e}]", f"{self.path}[{e}]", self.module, self.in_features, self.out_features, self.transposed, e)
            for e in range(self.experts)
        )


@dataclass(frozen=True)
class Block:
    """One decoder block ("layer"), index 0 at the input; `stacks` are the maps of its experts, where it has any."""

    index: int
    path: str
    module: nn.Module
    projections: tuple[Projection, ...]
    stacks: tuple[ExpertStack, ...] = ()

    @cached_property
    def maps(self) -> tuple[Projection, ...]:
        """Every linear map that signals are read from: the projections, then each expert's own."""
        return (*self.projections, *(own for stack in self.stacks for own in stack.maps))


def find_blocks(model: nn.Module) -> tuple[Block, ...]:
    """The decoder blocks of a model, in order.

    They are an `nn.ModuleList` whose elements contain linear maps. Where there are several, two rules choose:

    1. The list belongs to the text model: it lies in the smallest part of the model that holds the input embedding and any such
       list. So the tower of a vision-language model is not taken, however large it is.
    2. Of the lists there, the one whose linear maps have most weights, the outer one of equals. So a list of experts inside a
       block loses to the list of blocks.

    Embeddings and output heads are in no such list, and a list of bare linear maps (several heads) is none.

    A block's projections are the maps that signals can be read from and an adapter can be put on: not those whose weight the model
    reads without running the module, and not those whose name PEFT takes for another (`_renamed`).

    Raises:
        ModelError: There is no list of blocks with linear maps in it.
    """
    lists = {path: size for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and (size := _weights(module)) > 0}
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of decoder blocks with linear maps; layercard needs a transformer decoder")
    near = _beside(_embedding_path(model), lists)
    path = max(near, key=lambda candidate: lists[candidate])
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    found = [[p for p in _projections(block, f"{path}.{at}") if not _bypassed(block, p.name)] for at, block in enumerate(blocks)]
    renamed = _renamed(model, [p.path for projections in found for p in projections])
    return tuple(
        Block(at, f"{path}.{at}", block, tuple(p for p in projections if p.path not in renamed), tuple(_stacks(block, f"{path}.{at}")))
        for at, (block, projections) in enumerate(zip(blocks, found, strict=True))
    )


def _embedding_path(model: nn.Module) -> str:
    """Path of the input embedding: the one that a transformers model names, else the largest; empty where there is none."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    wanted = inner.get_input_embeddings() if inner is not None else None
    paths = {path: module.weight.numel() for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return next(
        (path for path, module in model.named_modules() if module is wanted),
        max(paths, key=lambda path: paths[path]) if paths else "",
    )


def _beside(path: str, lists: Iterable[str]) -> list[str]:
    """The lists in the smallest subtree around `path` that has any, in the order of the model."""
    found: list[str] = []
    while path and not found:
        path = path.rpartition(".")[0]
        found = [candidate for candidate in lists if not path or candidate.startswith(f"{path}.")]
    return found or list(lists)


def _weights(blocks: nn.ModuleList) -> int:
    return sum(projection.in_features * projection.out_features for block in blocks for projection in _projections(block, ""))


def _projections(block: nn.Module, block_path: str) -> Iterator[Projection]:
    for name, module in block.named_modules():
        shape = _shape(module) if name else None
        if shape is not None:
            yield Projection(name, f"{block_path}.{name}", module, *shape)


def _stacks(block: nn.Module, block_path: str) -> Iterator[ExpertStack]:
    """The stacked maps of a block's experts: `use_experts_implementation` of transformers gives their modules `is_transposed`."""
    for name, module in block.named_modules():
        transposed = vars(module).get("is_transposed")
        if transposed is None:
            continue
        active = vars(module.config).get("num_experts_per_tok") or ExpertStack.active
        for parameter, weight in module.named_parameters(recurse=False):
            if parameter in STACKED and weight.ndim == 3 and _plain(weight):
                experts, first, second = weight.shape
                n_in, n_out = (first, second) if transposed else (second, first)
                own = f"{name}.{parameter}"
                yield ExpertStack(own, f"{block_path}.{own}", module, parameter, experts, n_in, n_out, transposed, min(active, experts))


def unread_experts(block: Block) -> tuple[str, ...]:
    """Modules of a block that hold stacked weights which are in none of its `stacks`: experts that are quantised, or that the family's
    own code runs in a way of its own (Llama 4, JetMoe). Neither signals nor adapters reach them."""
    known = {stack.module for stack in block.stacks}
    return tuple(
        name
        for name, module in block.module.named_modules()
        if module not in known
        and not isinstance(module, _ConvNd)
        and any(weight.ndim == 3 and min(weight.shape) > 1 for weight in module.parameters(recurse=False))
    )


def _plain(weight: torch.Tensor) -> bool:
    """Whether a weight can be multiplied with as it is: neither whole numbers nor the 8-bit numbers of quantised experts."""
    return weight.is_floating_point() and weight.element_size() > 1


def _shape(module: nn.Module) -> tuple[int, int, bool] | None:
    """Width of what enters and leaves a linear map, and whether its weight is `[in, out]`; `None` for any other module.

    Quantised maps that are no `nn.Linear` (GPTQ, AWQ, HQQ, AQLM) are known by their two widths; adapters, which have them too, by the
    map that they hold.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, False
    if isinstance(module, Conv1D):
        n_in, n_out = module.weight.shape
        return int(n_in), int(n_out), True
    n_in, n_out = (vars(module).get(name) for name in ("in_features", "out_features"))
    leaf = next(module.children(), None) is None
    return (n_in, n_out, False) if leaf and isinstance(n_in, int) and isinstance(n_out, int) else None


def _bypassed(block: nn.Module, name: str) -> bool:
    """Whether a model reads a map's weight without running the map, so that neither hooks nor adapters on it have an effect.

    Fused kernels of Mamba's mixers (known by their own `A_log` and `D`) do so with all but `in_proj`, `nn.MultiheadAttention` with its
    `out_proj`, and Gemma 3n in training with `correction_coefs`.
    """
    parent, _, leaf = name.rpartition(".")
    holder = block.get_submodule(parent)
    mixer = {"A_log", "D"} <= dict(holder.named_parameters(recurse=False)).keys() and leaf != "in_proj"
    return mixer or isinstance(holder, nn.MultiheadAttention) or leaf == "correction_coefs"


def _renamed(model: nn.Module, paths: list[str]) -> set[str]:
    """Those of some maps that PEFT cannot be pointed at, because it takes their names for those of a block's experts.

    transformers 5 holds experts as stacked parameters, so PEFT turns every target that ends in `gate_proj`, `up_proj` or `down_proj`
    into the experts of *all* blocks in families that have them (DeepSeek-V3, Qwen3-Next): shared experts and dense blocks as well, and
    exact paths too. Asked is PEFT itself, with all names that it may want together; before 0.19 it did no such thing.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return set()
    config = LoraConfig(target_modules=[*paths, "gate_proj", "up_proj", "w1", "w3"])
    convert_peft_config_for_transformers(config, model, None)
    return set(paths) - set(config.target_modules or ())
