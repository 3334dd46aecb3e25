"""Where a model's decoder blocks and their linear maps are, found from the module tree and not from a list of names."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

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

    They are the `nn.ModuleList` whose elements hold the largest number of linear maps' parameters, taken outermost first.

    Raises:
        ModelError: There is no list of blocks with linear maps in it.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            size = sum(p.in_features * p.out_features for block in module for p in _projections(block, ""))
            if size > 0 and (best is None or size > best[0]):
                best = (size, path, module)
    if best is None:
        raise ModelError(f"{type(model).__name__} has no list of decoder blocks with linear maps; layercard needs a transformer decoder")
    _, path, blocks = best
    return tuple(
        Block(index, f"{path}.{index}", block, tuple(_projections(block, f"{path}.{index}"))) for index, block in enumerate(blocks)
    )


def _projections(block: nn.Module, block_path: str) -> Iterator[Projection]:
    for name, module in block.named_modules():
        shape = _linear_shape(module)
        if shape is not None:
            n_in, n_out, transposed = shape
            yield Projection(name, f"{block_path}.{name}", module, n_in, n_out, transposed)


def _linear_shape(module: nn.Module) -> tuple[int, int, bool] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, False
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), nn.Parameter):
        n_in, n_out = module.weight.shape
        return int(n_in), int(n_out), True
    return None
