"""Where a model's decoder blocks and their linear maps are, found from the module tree and not from a list of names."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layercard.errors import ModelError


@dataclass(frozen=True)
class Projection:
    """One linear map of a block.

    Attributes:
        name: Path below the block (`self_attn.q_proj`).
        path: Path in the model (`model.layers.3.self_attn.q_proj`).
        module: The module itself; its weight is `[out, in]`, or `[in, out]` where `transposed` (GPT-2's `Conv1D`).
        in_features: Width of its input.
        out_features: Width of its output.
        transposed: Whether the stored weight is `[in, out]`.
    """

    name: str
    path: str
    module: nn.Module
    in_features: int
    out_features: int
    transposed: bool


@dataclass(frozen=True)
class Block:
    """One decoder block ("layer"), index 0 at the input."""

    index: int
    path: str
    module: nn.Module
    projections: tuple[Projection, ...]


def find_blocks(model: nn.Module) -> tuple[Block, ...]:
    """The decoder blocks of a model, in order.

    They are an `nn.ModuleList` whose elements contain linear maps. Where there are several, two rules choose:

    1. The list belongs to the text model: it lies in the smallest part of the model that holds the input embedding and any such
       list. So the tower of a vision-language model is not taken, however large it is.
    2. Of the lists there, the one whose linear maps have most weights, the outer one of equals. So a list of experts inside a
       block loses to the list of blocks.

    Embeddings and output heads are in no such list, and a list of bare linear maps (several heads) is none.

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
    return tuple(Block(at, f"{path}.{at}", block, tuple(_projections(block, f"{path}.{at}"))) for at, block in enumerate(blocks))


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
        if name and isinstance(module, nn.Linear):
            yield Projection(name, f"{block_path}.{name}", module, module.in_features, module.out_features, False)
        elif name and isinstance(module, Conv1D):
            n_in, n_out = module.weight.shape
            yield Projection(name, f"{block_path}.{name}", module, int(n_in), int(n_out), True)
