"""A placement: which layers get adapters, as exact module paths, and why."""

import math
from collections.abc import Iterable
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal, Self, SupportsIndex

from pydantic import Field, FiniteFloat, ValidationInfo, field_validator, model_validator

from layercard.card.numbers import framed, listed, predicted_rows
from layercard.errors import PlacementError
from layercard.files import shown
from layercard.records import Record

RATE = ("learning_rate", "learning_rate_steps", "learning_rate_passes", "learning_rate_source")
"""The parts of a placement that say its learning rate."""


class Placement(Record):
    """The layers that get adapters in one model.

    Attributes:
        model: `name`, `fingerprint` and number of `layers` of the base model.
        layers: Block indices, ascending, 0 at the input.
        paths: Exact paths of the adapted modules.
        parameters: Exact paths of adapted parameters that are not the weight of a module, such as the stacked experts of a
            mixture-of-experts block (`model.layers.3.mlp.experts.gate_up_proj`); mostly empty.
        objective: What the layers were chosen for ("performance", "middle", …).
        predicted: What the card predicts: `performance_kept` and so on; empty where nothing is known.
        reasons: For each layer a sentence that says why it was taken.
        asked: The number of layers and the budgets that it was chosen for, as far as they were given.
        rank_pattern: The rank of each path's adapter; empty where all have the rank of the training settings.
        alpha_pattern: The alpha of each path's adapter; there is one exactly where there is a rank.
        modules: Which modules of each layer are adapted (`models.module_sets.MODULE_SETS`); empty: all, or as the paths say.
        learning_rate: Peak learning rate that is recommended for it; `None` where there is none.
        learning_rate_steps: Updates of the run that it is recommended for; `None` where that is not known.
        learning_rate_passes: Passes over the records of that run.
        learning_rate_source: Where it comes from: `race` (measured on the user's records) or `rule`.
    """

    error: ClassVar = PlacementError
    noun: ClassVar = "placement"
    made_by: ClassVar = "layercard select"
    schema_: Literal["layercard-placement/1"] = Field(default="layercard-placement/1", alias="schema")
    model: dict[str, Any]
    layers: tuple[int, ...]
    paths: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    objective: str
    predicted: dict[str, Any] = Field(default_factory=dict)
    reasons: dict[str, str] = Field(default_factory=dict)
    asked: dict[str, Any] = Field(default_factory=dict)
    rank_pattern: dict[str, Any] = Field(default_factory=dict)
    alpha_pattern: dict[str, Any] = Field(default_factory=dict)
    modules: str = ""
    learning_rate: Annotated[FiniteFloat, Field(gt=0)] | None = None
    learning_rate_steps: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    learning_rate_passes: Annotated[FiniteFloat, Field(gt=0)] | None = None
    learning_rate_source: str = ""

    @field_validator("model")
    @classmethod
    def _check_model(cls, model: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(model.get("layers"), int):
            raise ValueError(f"the number of layers is {shown(model.get('layers'))}, not a whole number")
        return model

    @field_validator("layers", mode="before")
    @classmethod
    def _check_layers(cls, layers: Any, info: ValidationInfo) -> Any:
        return check_layers(layers, info.data["model"]["layers"]) if isinstance(layers, Iterable) and "model" in info.data else layers

    @field_validator("predicted")
    @classmethod
    def _check_predicted(cls, predicted: dict[str, Any]) -> dict[str, Any]:
        for name in ("performance_kept", "step_time", "peak_memory", "parameters", "latency"):
            if not isinstance(predicted.get(name) or {}, dict):
                raise ValueError(f"{name} is {shown(predicted[name])}, not an object")
        return predicted

    @model_validator(mode="after")
    def _check_patterns(self) -> Self:
        if not self.targets:
            raise PlacementError("a placement without module paths adapts nothing; select again from a card that lists its modules")
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        if set(self.rank_pattern) != set(self.targets) or set(self.alpha_pattern) != set(self.targets):
            raise PlacementError("rank_pattern and alpha_pattern must name every path of the placement and no other; select again")
        for path, rank in self.rank_pattern.items():
            alpha = self.alpha_pattern[path]
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise PlacementError(f"rank_pattern has {shown(rank)} for {path}; ranks are whole numbers of at least 1, so select again")
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
                raise PlacementError(f"alpha_pattern has {shown(alpha)} for {path}; alphas are numbers above 0, so select again")
        return self

    @property
    def targets(self) -> tuple[str, ...]:
        """Everything that gets an adapter: `paths`, then `parameters`."""
        return self.paths + self.parameters

    def changed(self, **parts: Any) -> "Placement":
        """A copy with other `parts`, checked as a new placement is."""
        return Placement(**{**{name: getattr(self, name) for name in type(self).model_fields if name != "schema_"}, **parts})

    def to_json(self) -> dict[str, Any]:
        """The JSON object of schema `layercard-placement/1`."""
        optional = ("parameters", "asked", "rank_pattern", "alpha_pattern", "modules", *RATE)
        return {name: part for name, part in super().to_json().items() if part or name not in optional}

    def _repr_html_(self) -> str:
        """What a notebook shows: layers, objective, predictions and the reason for each layer, all escaped."""
        facts = {
            "Model": f"{self.model.get('name', 'not named')}, {self.model['layers']} layers",
            "Layers": f"{listed(self.layers)} ({len(self.layers)} of {self.model['layers']})",
            "Modules": f"{len(self.targets)}: {', '.join(sorted({path.rpartition('.')[2] for path in self.targets}))}",
            "Objective": self.objective,
        }
        if self.asked:
            facts["Asked for"] = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.asked.items())
        if self.rank_pattern:
            facts["Ranks"] = ", ".join(map(str, sorted(set(self.rank_pattern.values()))))
        facts |= predicted_rows(self.predicted)
        rows = [[str(layer), self.reasons[str(layer)]] for layer in self.layers if str(layer) in self.reasons]
        return framed("Placement", facts, "Why each layer", ["Layer", "Reason"], rows)


def check_layers(layers: Iterable[Any], num_layers: int) -> tuple[int, ...]:
    """Layer indices as plain ascending integers.

    PEFT adapts *every* layer for an empty list, drops indices out of range silently and cannot save NumPy integers or a
    `range`; none of these gets past this check.

    Raises:
        PlacementError: Empty, out of range, negative, repeated, or not integers.
    """
    checked = []
    for layer in islice(layers, num_layers + 1):  # one more than there are is outside, or there twice
        if isinstance(layer, bool) or not isinstance(layer, SupportsIndex):
            raise PlacementError(f"layer {shown(layer)} is not an integer; give block indices from 0 to {num_layers - 1}")
        checked.append(int(layer.__index__()))
    if not checked:
        raise PlacementError("no layers: an empty placement adapts nothing; choose at least one layer")
    outside = [layer for layer in checked if not 0 <= layer < num_layers]
    if outside:
        raise PlacementError(f"layer {shown(outside[0])} is outside the model, which has layers 0 to {num_layers - 1}")
    if len(set(checked)) != len(checked):
        raise PlacementError(f"layers {shown(sorted(checked))} name a layer twice; name each once")
    return tuple(sorted(checked))
