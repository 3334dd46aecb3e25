"""Where adapters land against where they were to land, in words.

Whether an adapter or configuration adapts in a model what it was meant to, for those made elsewhere too.

PEFT itself is asked: it wraps the model, whose weights may be missing, and what it adapted is compared with what was asked for. Then it
loads the saved weights, and what matched nothing or has no effect is said.
"""

import copy
import dataclasses
import difflib
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from layercard.adapters.apply import PLACEMENT_FILE, adapted_ranks
from layercard.adapters.files import load_weights, read_adapter_config, read_weights, saved_modules, unknown_keys, without_effect
from layercard.card.numbers import listed
from layercard.errors import PlacementError, one_line
from layercard.models.adapted import adapted_paths, few, quiet_peft, unchanged
from layercard.models.layers import find_blocks
from layercard.selection.placement import Placement

# ---- differences

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
            tuple(tuple(projection.path for projection in block.linear_modules) for block in found),
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


# ---- verification

SCHEMA = "layercard-verification/1"


@dataclass(frozen=True)
class Verification:
    """What an adapter or configuration asks for, what it adapts, and where the two differ.

    Attributes:
        source: What was verified.
        model: Name of the model, and number of `layers`.
        method: PEFT's name of the method.
        asked: What the configuration chooses modules by, as far as it is given.
        planned: The layers that were wanted: the placement's, those given, or the configuration's own; `None` where nothing says.
        adapted: Paths of the modules and parameters that PEFT adapts.
        layers: Layers of the text model with something adapted.
        saved: Paths of the modules with saved weights; `None` where there are no weights.
        differences: What is not as planned, a sentence each; empty where all is.
        notes: What is worth knowing and no difference.
    """

    source: str
    model: dict[str, Any]
    method: str
    asked: dict[str, Any]
    planned: tuple[int, ...] | None
    adapted: tuple[str, ...]
    layers: tuple[int, ...]
    saved: tuple[str, ...] | None
    differences: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def as_planned(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """The JSON object of schema `layercard-verification/1`."""
        return {
            "schema": SCHEMA,
            "as_planned": self.as_planned,
            "source": self.source,
            "model": dict(self.model),
            "method": self.method,
            "asked": dict(self.asked),
            "planned_layers": None if self.planned is None else list(self.planned),
            "adapted_layers": list(self.layers),
            "adapted": list(self.adapted),
            "saved": None if self.saved is None else list(self.saved),
            "differences": list(self.differences),
            "notes": list(self.notes),
        }

    def check(self) -> None:
        """Raise `PlacementError` with the first difference, and the number of the others, unless all is as planned."""
        if self.differences:
            more = f" (and {len(self.differences) - 1} more)" if len(self.differences) > 1 else ""
            raise PlacementError(f"{self.source} is not as planned: {self.differences[0]}{more}")


def verify_config(
    model: PreTrainedModel,
    config: PeftConfig,
    *,
    placement: Placement | None = None,
    layers: Sequence[int] | None = None,
    name: str = "",
    source: str = "the configuration",
) -> Verification:
    """What a PEFT configuration adapts in a model, against what was planned.

    Args:
        model: The model without adapters; it may lie on the meta device, and is as before afterwards.
        config: The configuration; it is not changed.
        placement: The placement that it should follow, target by target.
        layers: The layers that it should adapt, where there is no placement; its own `layers_to_transform` when not given.
        name: What the model is called.
        source: What the configuration is called.

    Raises:
        ModelError: The model has no decoder blocks.
    """
    return _verify(model, config, None, placement, layers, name, source)


def verify_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    placement: Placement | None = None,
    layers: Sequence[int] | None = None,
    name: str = "",
    fingerprint: str | None = None,
) -> Verification:
    """`verify_config` of an adapter's folder or configuration file, with its saved weights and its base model.

    Args:
        model: The model without adapters; it may lie on the meta device.
        folder: An adapter's folder, or a configuration of PEFT's as JSON.
        placement: The placement that it should follow; `placement.json` in the folder when not given, unless `layers` are.
        layers: The layers that it should adapt.
        name: What the model is called; compared with the name of the adapter's base model.
        fingerprint: The model's fingerprint, where its weights were read; compared with the placement's, and then names do not matter.

    Raises:
        PlacementError: There is no such adapter, or it cannot be read.
        ModelError: The model has no decoder blocks.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    if placement is None and layers is None:
        placement = own_placement(folder)
    found = _verify(model, config, read_weights(folder), placement, layers, name, str(folder))
    base = base_words(config, placement, name, fingerprint)
    unknown = unknown_keys(folder, config)
    return dataclasses.replace(
        found,
        differences=((base, *found.differences) if base else found.differences),
        notes=((*found.notes, f"this PEFT leaves out {few(unknown)}, which it does not know") if unknown else found.notes),
    )


def own_placement(folder: str | Path) -> Placement | None:
    """The placement that `layercard train` wrote beside an adapter; `None` where there is none."""
    path = Path(folder) / PLACEMENT_FILE
    return Placement.load(path) if path.is_file() else None


def base_words(config: PeftConfig, placement: Placement | None, name: str, fingerprint: str | None) -> str:
    """How the adapter's base model is another than this one; empty where it is the same, or where nothing tells."""
    planned = placement.model if placement is not None else {}
    if fingerprint and planned.get("fingerprint"):
        is_other = planned["fingerprint"] != fingerprint
        words = (
            f"the adapter is for {planned.get('name')!r} (fingerprint {planned['fingerprint']}), this model has fingerprint {fingerprint}"
        )
        return words if is_other else ""
    base = config.base_model_name_or_path
    return f"the adapter was trained on {base!r}, this model is {name!r}" if base and name and _last(base) != _last(name) else ""


def _verify(
    model: PreTrainedModel,
    config: PeftConfig,
    weights: Mapping[str, torch.Tensor] | None,
    placement: Placement | None,
    layers: Sequence[int] | None,
    name: str,
    source: str,
) -> Verification:
    blocks, asked = Blocks.of(model), asked_of(config)
    wanted = placement.layers if placement is not None else layers if layers is not None else asked.layers
    adapted: tuple[str, ...] = ()
    notes = _config_notes(config)
    try:
        with _wrapped(model, config) as wrapped:
            adapted = adapted_paths(wrapped)
            asked = _as_converted(asked, wrapped.peft_config["default"])
            words = _landed_words(blocks, asked, wanted, placement, adapted)
            words += _rank_words(wrapped, placement) + _beside_words(config, wanted)
            words += [] if weights is None else load_weights(wrapped, weights)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        words = [*index_words(blocks, asked, wanted), *name_words(blocks, asked), f"PEFT refuses it: {one_line(error, 200)}"]
    if not adapted and not words:
        words = ["no module of this model is adapted"]
    if wanted is None:
        notes += tower_words(blocks, adapted, wanted=False)
    notes += partial_words(blocks, asked, wanted, adapted)
    if weights is not None:
        still, saved, shown = without_effect(config, weights)
        effect = (
            f"it loads but has no effect in {still} of {saved} modules: {shown} is {'one' if shown.startswith('ia3') else 'zero'} there"
        )
        (words if still == saved else notes).extend([effect] if still else [])
    return Verification(
        source,
        {"name": name, "layers": len(blocks.paths)},
        PeftType(config.peft_type).value,
        _chosen_by(config),
        None if wanted is None else tuple(wanted),
        adapted,
        tuple(blocks.by_layer(adapted)),
        None if weights is None else saved_modules(config, weights),
        tuple(words),
        tuple(notes),
    )


def asked_of(config: PeftConfig) -> Asked:
    """What a configuration asks for, as plain tuples."""
    given = vars(config)
    layers, names = given.get("layers_to_transform"), given.get("target_modules")
    return Asked(
        None if layers is None else (layers,) if isinstance(layers, int) else tuple(layers),
        () if names is None or isinstance(names, str) else tuple(sorted(names)),
        tuple(sorted(given.get("target_parameters") or ())),
    )


def _as_converted(asked: Asked, config: PeftConfig) -> Asked:
    """Without the names that PEFT has turned into stacked experts (`gate_proj`): they match something, under another name."""
    parameters, left = vars(config).get("target_parameters"), vars(config).get("target_modules")
    if set(parameters or ()) == set(asked.parameters) or isinstance(left, str):
        return asked
    return dataclasses.replace(asked, names=tuple(name for name in asked.names if name in (left or ())))


def _landed_words(
    blocks: Blocks, asked: Asked, wanted: Sequence[int] | None, placement: Placement | None, adapted: tuple[str, ...]
) -> list[str]:
    words = layer_words(blocks, asked, wanted, adapted) + name_words(blocks, asked)
    if wanted is not None:
        words += tower_words(blocks, adapted, wanted=True)
    return words + ([] if placement is None else path_words(blocks, placement, adapted))


def _rank_words(model: PeftModel, placement: Placement | None) -> list[str]:
    """Targets whose rank or scale is another than the placement's."""
    if placement is None or not placement.rank_pattern:
        return []
    found = adapted_ranks(model)
    planned = {path: (rank, placement.alpha_pattern[path] / rank) for path, rank in placement.rank_pattern.items()}
    other = [path for path in planned if path in found and found[path] != planned[path]]
    if not other:
        return []
    (rank, scale), (has, own) = planned[other[0]], found[other[0]]
    return [
        f"{len(other)} modules have another rank or scale than planned, such as {other[0]}: {has} and {own:g}, not {rank} and {scale:g}"
    ]


def _beside_words(config: PeftConfig, wanted: Sequence[int] | None) -> list[str]:
    """What a configuration trains that no layer limits."""
    everywhere = wanted is not None and vars(config).get("bias") == "all"
    return ["bias='all' trains the biases of every layer"] if everywhere else []


def _config_notes(config: PeftConfig) -> list[str]:
    """Ranks of single modules without an alpha, which change the scale alpha / rank there; modules trained whole."""
    given = vars(config)
    whole = [f"{few(given['modules_to_save'])} trained whole and saved along"] if given.get("modules_to_save") else []
    if config.peft_type not in (PeftType.LORA, PeftType.LOHA, PeftType.LOKR) or not given.get("rank_pattern"):
        return whole
    alone = sorted(set(given["rank_pattern"]) - set(given.get("alpha_pattern") or {}))
    scaled = [f"rank_pattern names {name!r} and alpha_pattern does not, so the scale alpha / rank is another there" for name in alone[:1]]
    return scaled + whole


def _chosen_by(config: PeftConfig) -> dict[str, Any]:
    given = {name: vars(config).get(name) for name in ("layers_to_transform", "layers_pattern", "target_modules", "target_parameters")}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in given.items() if value is not None}


@contextmanager
def _wrapped(model: PreTrainedModel, config: PeftConfig) -> Iterator[PeftModel]:
    """The model as PEFT adapts it by a copy of the configuration, with adapters that take no memory; as before afterwards."""
    copied = copy.deepcopy(config)
    if copied.peft_type == PeftType.LORA:
        vars(copied)["init_lora_weights"] = True  # PiSSA and its like would decompose weights that may be missing
    with unchanged(model), quiet_peft(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield get_peft_model(model, copied, low_cpu_mem_usage=True)


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
