"""Where a model's decoder blocks and their linear modules are, found from the module tree and not from a list of names."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from peft import LoraConfig
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layercard.errors import ModelError

STACKED = ("gate_up_proj", "up_proj", "down_proj")
"""The names of stacked experts' parameters in every way of transformers to run them."""
ROUTERS = {"router", "gate"}
"""What the module is called that sends tokens to experts, in every family that has experts."""


@dataclass(frozen=True)
class LinearModule:
    """One linear module of a block, or that of one expert.

    Attributes:
        name: Path below the block (`self_attn.q_proj`).
        path: Path in the model (`model.layers.3.self_attn.q_proj`).
        module: The module itself; its weight is `[out, in]`, or `[in, out]` where `transposed` (GPT-2's `Conv1D`), or packed where
            it is quantised.
        expert: Number of the expert that it belongs to; then `path` ends in that number (`…experts.gate_up_proj[3]`), and `module`
            holds the stacked weights of all experts.
    """

    name: str
    path: str
    module: nn.Module
    in_features: int
    out_features: int
    transposed: bool
    expert: int | None = None
    experts: ClassVar[int] = 1
    active: ClassVar[int] = 1


@dataclass(frozen=True)
class ExpertStack:
    """One linear module of all experts of a block, stored as a single three-dimensional parameter.

    Attributes:
        name: Path below the block (`mlp.experts.gate_up_proj`).
        path: Path of the parameter in the model.
        module: The module that holds the parameter and runs the experts.
        experts: Number of experts E, each of `in_features` and `out_features`.
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
    def modules(self) -> tuple[LinearModule, ...]:
        """The linear module of each expert; the same objects at each call, so that a saved state can name them."""
        return tuple(
            LinearModule(f"{self.name}[{e}]", f"{self.path}[{e}]", self.module, self.in_features, self.out_features, self.transposed, e)
            for e in range(self.experts)
        )


@dataclass(frozen=True)
class Block:
    """One decoder block ("layer"), index 0 at the input; `stacks` belong to its experts, where it has any."""

    index: int
    path: str
    module: nn.Module
    linear_modules: tuple[LinearModule, ...]
    stacks: tuple[ExpertStack, ...] = ()

    @property
    def adaptable(self) -> tuple[LinearModule | ExpertStack, ...]:
        """Every module or stack that an adapter can be put on."""
        return (*self.linear_modules, *self.stacks)

    @cached_property
    def modules(self) -> tuple[LinearModule, ...]:
        """Every module whose inputs and gradients are read: the linear modules, then those of each expert."""
        return (*self.linear_modules, *(module for stack in self.stacks for module in stack.modules))


def find_blocks(model: nn.Module) -> tuple[Block, ...]:
    """The decoder blocks of a model, in order.

    They are an `nn.ModuleList` whose elements contain linear modules. Where there are several, two rules choose:

    1. The list belongs to the text model: it lies in the smallest part of the model that holds the input embedding and any such
       list. So the tower of a vision-language model is not taken, however large it is.
    2. Of the lists there, the one whose linear modules have most weights, the outer one of equals. So a list of experts inside a
       block loses to the list of blocks.

    Embeddings and output heads are in no such list, and a list of bare linear modules (several heads) does not count.

    The linear modules of a block are those that signals can be read from and an adapter can be put on: not those whose weight the model
    reads without running the module, not those whose name PEFT takes for another, and not routers, which stay frozen in all families.

    Raises:
        ModelError: There is no list of blocks with linear modules in it.
    """
    # Step 1: every list of modules, with the number of weights in its linear modules.
    sizes: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            size = sum(linear.in_features * linear.out_features for block in module for linear in _linear_modules(block, ""))
            if size > 0:
                sizes[path] = size
    if not sizes:
        raise ModelError(f"{type(model).__name__} has no list of decoder blocks with linear maps; layercard needs a transformer decoder")

    # Step 2: the largest list in the smallest subtree around the input embedding that has any.
    nearest, subtree = list(sizes), _embedding_path(model)
    while subtree:
        subtree = subtree.rpartition(".")[0]
        inside = [path for path in sizes if not subtree or path.startswith(f"{subtree}.")]
        if inside:
            nearest = inside
            break
    list_path = max(nearest, key=lambda path: sizes[path])
    modules = model.get_submodule(list_path)
    assert isinstance(modules, nn.ModuleList)

    # Step 3: of the linear modules leave out those that an adapter would have no effect on, or would miss, and routers.
    running = [
        [linear for linear in _linear_modules(block, f"{list_path}.{i}") if _runs(block, linear) and not _routes(block, linear)]
        for i, block in enumerate(modules)
    ]
    reachable = _reachable_by_peft(model, [linear.path for linears in running for linear in linears])
    return tuple(
        Block(
            index,
            f"{list_path}.{index}",
            block,
            tuple(linear for linear in running[index] if linear.path in reachable),
            tuple(_stacks(block, f"{list_path}.{index}")),
        )
        for index, block in enumerate(modules)
    )


def transformers_model(model: nn.Module) -> PreTrainedModel | None:
    """The model of transformers inside a wrapper such as PEFT's, or the model itself."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _embedding_path(model: nn.Module) -> str:
    """Path of the input embedding: the one that a transformers model names, else the largest; empty where there is none."""
    inner = transformers_model(model)
    named = inner.get_input_embeddings() if inner is not None else None
    sizes = {path: module.weight.numel() for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    largest = max(sizes, key=lambda path: sizes[path], default="")
    return next((path for path, module in model.named_modules() if module is named), largest)


def _linear_modules(block: nn.Module, block_path: str) -> Iterator[LinearModule]:
    """All linear modules below a block.

    Quantised ones that are not an `nn.Linear` (GPTQ, AWQ, HQQ, AQLM) are known by their two widths. Adapters have these too, but hold
    a module.
    """
    for name, module in block.named_modules():
        n_in, n_out = (vars(module).get(width) for width in ("in_features", "out_features"))
        is_leaf = next(module.children(), None) is None
        if isinstance(module, Conv1D):
            n_in, n_out = map(int, module.weight.shape)
        if name and isinstance(n_in, int) and isinstance(n_out, int) and (is_leaf or isinstance(module, nn.Linear | Conv1D)):
            yield LinearModule(name, f"{block_path}.{name}", module, n_in, n_out, isinstance(module, Conv1D))


def _runs(block: nn.Module, linear: LinearModule) -> bool:
    """Whether a model runs a linear module, and does not read its weight alone, so that hooks and adapters on it have an effect.

    Fused kernels of Mamba's mixers (known by their own `A_log` and `D`) run `in_proj` only, `nn.MultiheadAttention` does not run its
    `out_proj`, nor Gemma 3n in training `correction_coefs`.
    """
    parent, _, leaf = linear.name.rpartition(".")
    holder = block.get_submodule(parent)
    in_mixer = {"A_log", "D"} <= dict(holder.named_parameters(recurse=False)).keys()
    return not (isinstance(holder, nn.MultiheadAttention) or leaf == "correction_coefs" or (in_mixer and leaf != "in_proj"))


def _routes(block: nn.Module, linear: LinearModule) -> bool:
    """Whether a linear module belongs to a router: most families' routers are modules of a kind of their own, but not those of Phi-3.5-MoE,
    Llama 4, JetMoe, DBRX, LongCat and Zaya."""
    return not ROUTERS.isdisjoint(linear.name.split(".")) and any(
        _is_stacked(module) or (isinstance(module, nn.ModuleList) and name.endswith("experts")) for name, module in block.named_modules()
    )


def _is_stacked(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts as one parameter."""
    weights = module.parameters(recurse=False)
    return not isinstance(module, _ConvNd) and any(weight.ndim == 3 and min(weight.shape) > 1 for weight in weights)


def _stacks(block: nn.Module, block_path: str) -> Iterator[ExpertStack]:
    """The stacks of a block's experts: `use_experts_implementation` of transformers gives their modules `is_transposed`."""
    for name, module in block.named_modules():
        transposed = vars(module).get("is_transposed")
        if transposed is None:
            continue
        active = vars(module.config).get("num_experts_per_tok") or ExpertStack.active
        for parameter, weight in module.named_parameters(recurse=False):
            # Quantised experts hold whole numbers or 8-bit floats, which nothing can be multiplied with as they are.
            if parameter in STACKED and weight.ndim == 3 and weight.is_floating_point() and weight.element_size() > 1:
                experts, first, second = weight.shape
                n_in, n_out = (first, second) if transposed else (second, first)
                path = f"{name}.{parameter}"
                yield ExpertStack(path, f"{block_path}.{path}", module, parameter, experts, n_in, n_out, transposed, min(active, experts))


def unread_experts(block: Block) -> tuple[str, ...]:
    """Modules of a block that hold stacked weights which are in none of its `stacks`: experts that are quantised, or that the family's
    own code runs in a way of its own (Llama 4, JetMoe). Neither signals nor adapters reach them."""
    read = {stack.module for stack in block.stacks}
    return tuple(name for name, module in block.module.named_modules() if module not in read and _is_stacked(module))


def _reachable_by_peft(model: nn.Module, paths: list[str]) -> set[str]:
    """Those of some linear modules that PEFT can be pointed at.

    transformers 5 holds experts as stacked parameters, so PEFT turns every target that ends in `gate_proj`, `up_proj` or `down_proj`
    into the experts of *all* blocks in families that have them (DeepSeek-V3, Qwen3-Next): shared experts and dense blocks as well, and
    exact paths too. PEFT itself is asked, with all names that it may want together; before 0.19 it did no such thing.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return set(paths)
    config = LoraConfig(target_modules=[*paths, "gate_proj", "up_proj", "w1", "w3"])
    convert_peft_config_for_transformers(config, model, None)
    return set(paths) & set(config.target_modules or ())
