"""Where adapters land against where they were to land, in words."""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from layercard.indices import listed
from layercard.inspection import few
from layercard.layers import find_blocks
from layercard.selection import Placement

TOWERS = {"vision": "the vision tower", "visual": "the vision tower", "audio": "the audio tower"}
"""What a list of layers is called that has such a word in its path."""


@dataclass(frozen=True)
class Blocks:
    """The text model's blocks as names.

    Attributes:
        paths: Path of each block.
        maps: For each block the paths of its linear maps.
        stacks: For each block the paths of its stacked experts.
        modules: Paths of all modules and parameters of the model.
    """

    paths: tuple[str, ...]
    maps: tuple[tuple[str, ...], ...]
    stacks: tuple[tuple[str, ...], ...]
    modules: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> "Blocks":
        """Those of a model, which may be empty of weights.

        Raises:
            ModelError: It has none.
        """
        found = find_blocks(model)
        names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
        return cls(
            tuple(block.path for block in found),
            tuple(tuple(projection.path for projection in block.projections) for block in found),
            tuple(tuple(stack.path for stack in block.stacks) for block in found),
            frozenset(names),
        )

    @property
    def every(self) -> range:
        """Indices of all blocks."""
        return range(len(self.paths))

    def layer(self, path: str) -> int | None:
        """Index of the block that a path lies in; `None` outside of them."""
        return next((at for at, block in enumerate(self.paths) if path.startswith(f"{block}.")), None)

    def by_layer(self, paths: Iterable[str]) -> dict[int, list[str]]:
        """Paths by the index of their block, ascending; those outside of the blocks are left out."""
        found: dict[int, list[str]] = {}
        for path in paths:
            layer = self.layer(path)
            if layer is not None:
                found.setdefault(layer, []).append(path)
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Asked:
    """What a configuration asks for.

    Attributes:
        layers: `layers_to_transform` as a list, `None` where it is not given.
        names: `target_modules` as a list of names; empty where it is a regular expression, `all-linear` or not given.
        parameters: `target_parameters`.
    """

    layers: tuple[int, ...] | None
    names: tuple[str, ...]
    parameters: tuple[str, ...]


def index_words(blocks: Blocks, asked: Asked, wanted: Sequence[int] | None) -> list[str]:
    """What PEFT makes of `layers_to_transform` that nobody means, and where it is not what was wanted."""
    if asked.layers is None:
        return []
    last = len(blocks.paths) - 1
    if not asked.layers:
        return [f"layers_to_transform is empty, which PEFT reads as all layers (0-{last})"]
    words = []
    outside = [layer for layer in asked.layers if layer not in blocks.every]
    if outside:
        dropped = "it" if len(outside) == 1 else "them"
        words.append(f"{_layers(outside)} {_are(outside)} not in the model, which has layers 0-{last}: PEFT drops {dropped} silently")
    if wanted is not None and set(wanted) != set(asked.layers):
        words.append(f"the configuration asks for {_layers(asked.layers)}, not {listed(sorted(wanted))}")
    return words


def layer_words(blocks: Blocks, asked: Asked, wanted: Sequence[int] | None, adapted: Iterable[str]) -> list[str]:
    """Differences between the layers that were wanted and those that are adapted; none where no layers were wanted."""
    words = index_words(blocks, asked, wanted)
    if wanted is None:
        return words
    inside = [layer for layer in wanted if layer in blocks.every]
    landed = blocks.by_layer(adapted)
    beside = {layer: paths for layer, paths in landed.items() if layer not in inside}
    stacked = [layer for layer, paths in landed.items() if set(paths) & set(blocks.stacks[layer])]
    start = f"you asked for {_layers(sorted(inside)) if inside else 'no layer of this model'}"
    if set(stacked) - set(inside):
        number = f"all {len(stacked)} layers" if len(stacked) == len(blocks.paths) else f"layers {listed(stacked)}"
        words.append(f"{start}, experts of {number} are adapted")
    more = [layer for layer, paths in beside.items() if set(paths) - set(blocks.stacks[layer])]
    if more:
        words.append(f"{start}, {_layers(more)} {_are(more)} adapted too")
    words += [_nothing_words(blocks, asked, layer) for layer in sorted(set(inside) - set(landed))]
    return words


def tower_words(blocks: Blocks, adapted: Iterable[str], *, wanted: bool) -> list[str]:
    """What is adapted outside of the text model's blocks, grouped by the list of layers it lies in."""
    groups: dict[str, set[int]] = {}
    others = []
    for path in adapted:
        if blocks.layer(path) is None:
            match = re.match(r"(.+?)\.(\d+)\.", path)
            if match:
                groups.setdefault(match[1], set()).add(int(match[2]))
            else:
                others.append(path)
    too = " too" if wanted else ", which is not part of the text model"
    words = [f"{_layers(sorted(layers))} of {_tower(group)} {_are(layers)} adapted{too}" for group, layers in groups.items()]
    return words + ([f"{few(others)} {_are(others)} adapted{too}"] if others else [])


def name_words(blocks: Blocks, asked: Asked) -> list[str]:
    """Names in the configuration that match nothing in the model."""
    words = []
    for field, names in (("target_modules", asked.names), ("target_parameters", asked.parameters)):
        for name in names:
            if not any(_is(path, name) for path in blocks.modules):
                close = difflib.get_close_matches(name, {path.rpartition(".")[2] for path in blocks.modules}, n=1, cutoff=0.7)
                words.append(
                    f"{field} names {name!r}, which matches nothing in this model{f'; did you mean {close[0]!r}?' if close else ''}"
                )
    return words


def path_words(blocks: Blocks, placement: Placement, adapted: Iterable[str]) -> list[str]:
    """Targets of a placement that are not adapted, and what is adapted beside them, within the layers of the placement."""
    found, planned = set(adapted), set(placement.targets)
    unknown = [path for path in placement.targets if path not in blocks.modules]
    if unknown:
        return [f"the placement names {unknown[0]}, which this model does not have; select again for this model"]
    reached = {blocks.layer(path) for path in found}
    missing = {path for path in planned - found if blocks.layer(path) in reached}
    extra = {path for path in found - planned if blocks.layer(path) in placement.layers}
    return [f"{few(paths)} {what}" for paths, what in ((missing, "planned and not adapted"), (extra, "adapted and not planned")) if paths]


def partial_words(blocks: Blocks, asked: Asked, wanted: Sequence[int] | None, adapted: Iterable[str]) -> list[str]:
    """Blocks that lack some of the named modules and are adapted in the others: worth knowing, but no difference."""
    landed = blocks.by_layer(adapted)
    lacking: dict[str, list[int]] = {}
    for layer in landed if wanted is None else sorted(set(wanted) & set(landed)):
        for name in (each for each in asked.names if "." not in each):
            if not any(_is(path, name) for path in blocks.maps[layer]) and any(_is(path, name) for maps in blocks.maps for path in maps):
                lacking.setdefault(name, []).append(layer)
    return [f"{_blocks(layers)} no {name}" for name, layers in lacking.items()]


def _nothing_words(blocks: Blocks, asked: Asked, layer: int) -> str:
    """Why a block gets nothing, as far as names tell."""
    absent = [name for name in asked.names if "." not in name and not any(_is(path, name) for path in blocks.maps[layer])]
    reason = f" has no {', '.join(absent)} and" if absent and len(absent) == len(asked.names) else ""
    return f"block {layer}{reason} gets nothing"


def _is(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _layers(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {listed(sorted(layers))}"


def _are(things: Collection[object]) -> str:
    return "is" if len(things) == 1 else "are"


def _blocks(layers: Sequence[int]) -> str:
    return f"block {layers[0]} has" if len(layers) == 1 else f"blocks {listed(layers)} have"


def _tower(path: str) -> str:
    """A list of layers by its path, with a plain name where the path tells what it is."""
    plain = next((name for word, name in TOWERS.items() if word in path), "")
    return f"{plain} ({path})" if plain else path
