"""A placement: which layers get adapters, as exact module paths, and why."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercard.card.notebook import placement_html
from layercard.errors import PlacementError
from layercard.files import read_json, shown, write_json

if TYPE_CHECKING:
    pass

SCHEMA = "layercard-placement/1"
PREDICTED = ("performance_kept", "step_time", "peak_memory", "parameters", "latency")
"""Predictions that are read; each is an object."""


@dataclass(frozen=True)
class Placement:
    """The layers that get adapters in one model.

    Attributes:
        model: `name`, `fingerprint` and number of `layers` of the base model.
        layers: Block indices, ascending, 0 at the input.
        paths: Exact paths of the adapted modules.
        parameters: Exact paths of adapted parameters that are no module's weight of their own, such as the stacked experts of a
            mixture-of-experts block (`model.layers.3.mlp.experts.gate_up_proj`); mostly empty.
        objective: What the layers were chosen for ("performance", "middle", …).
        predicted: What the card predicts: `performance_kept` and so on; empty where nothing is known.
        reasons: For each layer a sentence that says why it was taken.
        asked: The number of layers and the budgets that it was chosen for, as far as they were given.
        rank_pattern: The rank of each path's adapter; empty where all have the rank of the training settings.
        alpha_pattern: The alpha of each path's adapter; there is one exactly where there is a rank.
    """

    model: dict[str, Any]
    layers: tuple[int, ...]
    paths: tuple[str, ...]
    objective: str
    predicted: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checked = check_layers(self.layers, int(self.model["layers"]))
        object.__setattr__(self, "layers", checked)
        object.__setattr__(self, "paths", tuple(str(path) for path in self.paths))
        object.__setattr__(self, "parameters", tuple(str(path) for path in self.parameters))
        if not self.targets:
            raise PlacementError("a placement without module paths adapts nothing; select again from a card that lists its modules")
        self._check_patterns()

    @property
    def targets(self) -> tuple[str, ...]:
        """Everything that gets an adapter: `paths`, then `parameters`."""
        return self.paths + self.parameters

    def _check_patterns(self) -> None:
        if not self.rank_pattern and not self.alpha_pattern:
            return
        if set(self.rank_pattern) != set(self.targets) or set(self.alpha_pattern) != set(self.targets):
            raise PlacementError("rank_pattern and alpha_pattern must name every path of the placement and no other; select again")
        for path, rank in self.rank_pattern.items():
            alpha = self.alpha_pattern[path]
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise PlacementError(f"rank_pattern has {shown(rank)} for {path}; ranks are whole numbers of at least 1, so select again")
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
                raise PlacementError(f"alpha_pattern has {shown(alpha)} for {path}; alphas are numbers above 0, so select again")

    def to_json(self) -> dict[str, Any]:
        """The JSON object of schema `layercard-placement/1`."""
        return {
            "schema": SCHEMA,
            "model": dict(self.model),
            "layers": list(self.layers),
            "paths": list(self.paths),
            **({"parameters": list(self.parameters)} if self.parameters else {}),
            "objective": self.objective,
            "predicted": dict(self.predicted),
            "reasons": dict(self.reasons),
            **{name: dict(part) for name in ("asked", "rank_pattern", "alpha_pattern") if (part := getattr(self, name))},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], source: str = "placement") -> "Placement":
        """Check and read a JSON object; `source` names it in messages."""
        if value.get("schema") != SCHEMA:
            raise PlacementError(f"{source}: schema {shown(value.get('schema'))} is not {SCHEMA!r}; make it with `layercard select`")
        try:
            return cls(
                model=dict(value["model"]),
                layers=tuple(value["layers"]),
                paths=tuple(value["paths"]),
                objective=str(value["objective"]),
                predicted=_checked_predictions(value.get("predicted") or {}),
                reasons={str(k): str(v) for k, v in (value.get("reasons") or {}).items()},
                asked=dict(value.get("asked") or {}),
                rank_pattern=dict(value.get("rank_pattern") or {}),
                alpha_pattern=dict(value.get("alpha_pattern") or {}),
                parameters=tuple(value.get("parameters") or ()),
            )
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as problem:
            raise PlacementError(f"{source}: not a whole placement ({problem}); make it with `layercard select`") from None

    def _repr_html_(self) -> str:
        """What a notebook shows: layers, objective, predictions and the reason for each layer, all escaped."""
        return placement_html(self.to_json())

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the placement to a file, atomically."""
        return write_json(path, self.to_json(), force=force)

    @classmethod
    def load(cls, path: str | Path) -> "Placement":
        """Read a placement from a file."""
        return cls.from_json(read_json(path, PlacementError, "placement"), str(path))


def _checked_predictions(value: Mapping[str, Any]) -> dict[str, Any]:
    """What is predicted, if the parts that are read later are objects; a `TypeError` says which is not."""
    for name in PREDICTED:
        if not isinstance(value.get(name) or {}, dict):
            raise TypeError(f"predicted.{name} is {shown(value[name])}, and not an object")
    return dict(value)


def check_layers(layers: Iterable[Any], depth: int) -> tuple[int, ...]:
    """Layer indices as plain ascending integers.

    PEFT adapts *every* layer for an empty list, drops indices out of range silently and cannot save NumPy integers or a
    `range`; none of these gets past this check.

    Raises:
        PlacementError: Empty, out of range, negative, repeated, or not integers.
    """
    found = []
    for layer in layers:
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise PlacementError(f"layer {layer!r} is not an integer; give block indices from 0 to {depth - 1}")
        found.append(int(layer.__index__()))
    if not found:
        raise PlacementError("no layers: an empty placement adapts nothing; choose at least one layer")
    outside = [layer for layer in found if not 0 <= layer < depth]
    if outside:
        raise PlacementError(f"layer {outside[0]} is outside the model, which has layers 0 to {depth - 1}")
    if len(set(found)) != len(found):
        raise PlacementError(f"layers {sorted(found)} name a layer twice; name each once")
    return tuple(sorted(found))
