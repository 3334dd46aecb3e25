"""What a trainer is to read for a placement: keys that it must have, keys that it may keep, and keys that would contradict them.

Keys are written with dots where they lie in a section: `lora_parameters.keys` is `keys` in `lora_parameters`.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from layercard.adapters.lora_config import check_settings
from layercard.card.numbers import listed
from layercard.errors import ExportError
from layercard.selection.placement import Placement
from layercard.settings import integer_if_whole

RANK, ALPHA, DROPOUT = 8, 16.0, 0.0


@dataclass(frozen=True)
class Settings:
    """Rank, alpha and dropout as far as they are given; what is not is left to the file that is merged into.

    Attributes:
        rank: Rank of the adapters; 8 where nothing says.
        alpha: The update is `alpha / rank` times B A; twice the rank where nothing says.
        dropout: Probability of dropping an adapter's input; 0 where nothing says.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None

    @property
    def whole_rank(self) -> int:
        """The rank, or what it is where none is given."""
        return RANK if self.rank is None else self.rank

    @property
    def scaling(self) -> float:
        """Alpha, an integer where it can be."""
        return integer_if_whole(2.0 * self.whole_rank if self.alpha is None else self.alpha)

    @property
    def dropping(self) -> float:
        """The dropout."""
        return DROPOUT if self.dropout is None else self.dropout

    def check(self, placement: Placement) -> None:
        """Raise `PlacementError` or `ExportError` where they are out of range or do not go with the placement."""
        check_settings(placement, self.whole_rank, self.scaling, self.dropping)
        if placement.rank_pattern and (self.rank is not None or self.alpha is not None):
            raise ExportError("the placement has a rank and an alpha for every target; leave --rank and --alpha out")

    def named(self, rank: str, alpha: str, dropout: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The three under a trainer's keys: those that are given, and those that stand where nothing says."""
        values = ((rank, self.rank, self.whole_rank), (alpha, self.alpha, self.scaling), (dropout, self.dropout, self.dropping))
        given = {key: integer_if_whole(found) if key == alpha else found for key, found, _ in values if found is not None}
        return given, {key: usual for key, found, usual in values if found is None}


@dataclass(frozen=True)
class Plan:
    """What one trainer must read.

    Attributes:
        wanted: Keys with the value that they must have.
        usual: Keys with the value that they get where a file says nothing.
        harmless: Values of further keys beside which `wanted` holds; with any other value the key contradicts it.
        notes: Sentences that the user must know.
    """

    wanted: dict[str, Any]
    usual: dict[str, Any] = field(default_factory=dict)
    harmless: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def keys(self) -> dict[str, Any]:
        """All keys of a configuration of its own."""
        return {**self.wanted, **self.usual}


@dataclass(frozen=True)
class Python:
    """How a trainer is called from Python.

    Attributes:
        script: Writes the code.
        arguments: The arguments of PEFT's `LoraConfig`, or of a function that hands them on, in that code.
    """

    script: Callable[[Placement, Settings], str]
    arguments: Callable[[Placement, Settings], dict[str, Any]]


@dataclass(frozen=True)
class Trainer:
    """One trainer.

    Attributes:
        name: As `--to` takes it.
        version: The release whose sources the keys were read from.
        plan: Makes the keys of its configuration.
        merges: Suffixes of the configurations that it reads, the usual one first; none where it is used from Python only.
        python: How it is called from Python, where that is its usual way.
    """

    name: str
    version: str
    plan: Callable[[Placement, Settings], Plan]
    merges: tuple[str, ...] = (".yaml", ".yml")
    python: Python | None = None


@dataclass(frozen=True)
class Split:
    """A placement's paths cut at the list of blocks.

    Attributes:
        prefix: Path of the list (`model.layers`).
        names: Names below the block (`self_attn.q_proj`) of each layer, in the order of the placement.
    """

    prefix: str
    names: dict[int, tuple[str, ...]]

    @property
    def shared(self) -> tuple[str, ...] | None:
        """The names, where every layer has the same ones; else `None`."""
        first, *others = self.names.values()
        return first if all(set(names) == set(first) for names in others) else None

    @property
    def text_only(self) -> bool:
        """Whether the list lies where causal language models without other towers have it: `model.layers`, `transformer.h`."""
        return self.prefix.count(".") == 1


def split(placement: Placement) -> Split | None:
    """The placement's module paths cut at the list of blocks; `None` where there is no one list.

    >>> paths = ("model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj")
    >>> split(Placement({"layers": 3}, (0, 2), paths, "given"))
    Split(prefix='model.layers', names={0: ('mlp.up_proj',), 2: ('mlp.up_proj',)})
    """
    if not placement.paths:
        return None
    for cut in re.finditer(r"\.\d+\.", placement.paths[0]):
        prefix = placement.paths[0][: cut.start()]
        found = [re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)", path) for path in placement.paths]
        parts = [(int(each[1]), each[2]) for each in found if each is not None]
        if len(parts) == len(placement.paths) and {layer for layer, _ in parts} <= set(placement.layers):
            return Split(prefix, {at: tuple(name for layer, name in parts if layer == at) for at in sorted({layer for layer, _ in parts})})
    return None


def by_layer_key(placement: Placement) -> Split | None:
    """The paths cut at their blocks where layer indices and names say the same as full paths do; else `None`.

    They do not where there are stacked experts (PEFT ignores layer indices for them), ranks of single targets, other towers, numbers
    below the block, or layers with different modules.
    """
    parts = split(placement)
    if parts is None or parts.shared is None or not parts.text_only or placement.parameters or placement.rank_pattern:
        return None
    numbered = any(re.search(r"\.\d+\.", f".{name}.") for name in parts.shared)
    return None if numbered or re.search(r"\d", parts.prefix) else parts


def refuse_ranks(placement: Placement, trainer: str) -> None:
    """Raise `ExportError` where the placement has ranks of single targets, for a trainer without a key for them."""
    if placement.rank_pattern:
        raise ExportError(
            f"{trainer} has one rank for all adapters, but the placement has a rank for each; select without --allocate-ranks"
        )


def refuse_parameters(placement: Placement, trainer: str, reason: str) -> None:
    """Raise `ExportError` where the placement has stacked experts, for a trainer that cannot name them."""
    if placement.parameters:
        raise ExportError(f"{trainer} {reason}, but the placement adapts {placement.parameters[0]}; select without the stacked experts")


def refuse_fractions(trainer: str, settings: Settings, placement: Placement) -> None:
    """Raise `ExportError` for an alpha that is no whole number, for a trainer that reads integers only."""
    alphas = [*placement.alpha_pattern.values()] if placement.rank_pattern else [settings.scaling]
    broken = next((alpha for alpha in alphas if alpha != int(alpha)), None)
    if broken is not None:
        raise ExportError(f"{trainer} reads alpha as a whole number, found {broken:g}; give a whole --alpha to select or export")


def heading(placement: Placement) -> str:
    """A sentence on what a configuration was made from; it can stand in a comment."""
    name = "".join(letter if letter.isprintable() else "?" for letter in str(placement.model.get("name", "model")))[:80]
    return f"layercard export: layers {listed(placement.layers)} of {name}"


def as_arguments(values: dict[str, Any]) -> str:
    """Keyword arguments of a call in Python, indented by four; what comes from outside is a quoted string.

    >>> print(as_arguments({"r": 8, "bias": "none", "target_modules": ["q", "v"], "rank_pattern": {"q": 4}}))
        r=8,
        bias="none",
        target_modules=[
            "q",
            "v",
        ],
        rank_pattern={
            "q": 4,
        },
    """
    found = []
    for name, value in values.items():
        if isinstance(value, list) and any(isinstance(each, str) for each in value):
            found += [f"{name}=[", *(f"    {_quoted(each)}," for each in value), "],"]
        elif isinstance(value, dict) and value:
            found += [f"{name}={{", *(f"    {_quoted(key)}: {_quoted(each)}," for key, each in value.items()), "},"]
        else:
            found.append(f"{name}={_quoted(value)},")
    return "\n".join(f"    {line}" for line in found)


def _quoted(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)
