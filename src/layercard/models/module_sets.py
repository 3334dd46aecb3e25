"""Names of modules: sets of them within a layer by what they do in it, and what other libraries call the blocks."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Protocol, TypeVar

from layercard.errors import PlacementError, suggestion

MODULE_SETS = {
    "all": "every linear module",
    "mlp": "the feed-forward part",
    "attention": "attention, or what a block has in its place",
    "out": "the last module of attention and of the feed-forward part (o_proj and down_proj)",
    "down": "the last module of the feed-forward part (down_proj)",
}
"""The sets by name, and what is in each."""
MLX_BLOCKS = {
    "model.layers": "model.layers",
    "model.language_model.layers": "language_model.model.layers",
    "transformer.h": "model.h",
    "gpt_neox.layers": "model.h",
}
"""Where transformers has the blocks, and where mlx-lm has them; below the block both have the same names."""
_MIXES_TOKENS = re.compile(
    r"(^|[._])(\w*attn|\w*attention|mixer|mamba|ssm|conv|recurrent|temporal_block|time_mix\w*|att)([._]|$)", re.IGNORECASE
)
"""How the parts that mix tokens are called, below a block; every other module belongs to the feed-forward part."""

_READS = re.compile(r"(q|k|v|query|key|value)(_|$)", re.IGNORECASE)
"""Modules that read the hidden state, and may be as wide as it."""


class _Shaped(Protocol):
    @property
    def path(self) -> str: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...


Module = TypeVar("Module", bound=_Shaped)


def module_set(modules: Sequence[Module], name: str) -> list[Module]:
    """The modules of one layer that belong to a set, in their order.

    Args:
        modules: All modules of the layer, with path and shape, as a block or a card lists them.
        name: One of `MODULE_SETS`.

    Raises:
        PlacementError: An unknown name, or the layer has no such module.
    """
    if name not in MODULE_SETS:
        raise PlacementError(f"module set {name!r} is unknown; {suggestion(name, MODULE_SETS)}")
    attention = [module for module in modules if mixes_tokens(module.path)]
    feed_forward = [module for module in modules if module not in attention]
    chosen = {
        "all": list(modules),
        "mlp": feed_forward,
        "attention": attention,
        "out": [*_last(attention, modules), *_last(feed_forward, modules)],
        "down": _last(feed_forward, modules),
    }[name]
    if not chosen:
        where = modules[0].path.rpartition(".")[0] if modules else "a layer"
        raise PlacementError(f"{where} has no module of the set {name!r} ({MODULE_SETS[name]}); choose another set, or all")
    return [module for module in modules if module in chosen]


def attention_outputs(modules: Sequence[Module]) -> list[Module]:
    """The last modules of a layer's attention (`o_proj`); none where it has no such part."""
    attention = [module for module in modules if mixes_tokens(module.path)]
    return _last(attention, modules) if attention else []


def mixes_tokens(path: str) -> bool:
    """Whether a module belongs to the part of a block that mixes tokens: attention, or what a block has in its place.

    >>> mixes_tokens("model.layers.3.self_attn.q_proj"), mixes_tokens("mlp.down_proj")
    (True, False)
    """
    return _MIXES_TOKENS.search(_below_block(path)) is not None


def _below_block(path: str) -> str:
    """What stands behind the layer's number: `model.layers.3.self_attn.q_proj` gives `self_attn.q_proj`."""
    return re.split(r"\.\d+\.", path, maxsplit=1)[-1]


def _last(part: Sequence[Module], modules: Sequence[Module]) -> list[Module]:
    """The modules of a part that write into the hidden state: of those as wide as it, the ones with the last one's name."""
    width = Counter(module.in_features for module in modules).most_common(1)[0][0]
    writers = [module for module in part if module.out_features == width and not _READS.match(_leaf(module))]
    return [module for module in writers if _leaf(module) == _leaf(writers[-1])]


def _leaf(module: _Shaped) -> str:
    """The name of a module without its place, and without the number of its expert."""
    return re.sub(r"\[\d+\]$", "", module.path).rpartition(".")[2]
