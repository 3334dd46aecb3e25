"""The Layer Card: what profiling found, as one versioned JSON value that describes itself."""

import logging
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, FiniteFloat, field_validator, model_validator

from layercard.card.numbers import best_layers, framed, numbered, stability_words, with_interval
from layercard.cost.model import CostModel, Shape
from layercard.errors import CardError, LayercardError, TrainingError
from layercard.files import shown
from layercard.records import Estimate, Part, Record
from layercard.settings import ProfileSettings, check

NOTEBOOK_COLUMNS = {
    "gain_estimate": "Gain estimate",
    "training_probe": "Training probe",
    "step_probe": "Step probe",
    "resnorm": "Resnorm",
}
"""Measures that a notebook shows of the best layers; those that a card lacks are left out."""
MOST_ROUNDING = 0.3
"""Share by which rounding moves weights at most: 4 bits move them by about a tenth, and other models are 1.4 apart."""
MOST = 2**50
"""Records or tokens that a card may count."""
Count = Annotated[int, Field(ge=1, le=MOST)]
Size = Annotated[int, Field(ge=1, le=2**24)]
"""Features or experts of a map."""


class ModelInfo(Part):
    """The profiled model: the name it was asked for by, a hash of its weights, its number of blocks.

    `rounded` says that they are a rounding of others, to 8 or 4 bits; the `sketch` tells which (`rounding_between`).
    """

    name: str
    fingerprint: str
    layers: Annotated[int, Field(ge=1, le=100_000)]
    rounded: bool = False
    sketch: Annotated[str, Field(pattern="^([0-9a-f]{4})*$", max_length=1000)] = ""


def rounding_between(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """How far the weights of two `model` objects lie apart, as a share: 0 for the same, infinity for those of different models.

    What lies between is a rounding to 8 or 4 bits, and only where one of the two is said to be `rounded`.
    """
    if a.get("fingerprint") == b.get("fingerprint"):
        return 0.0
    first, second = (_sketch(each.get("sketch")) for each in (a, b))
    if not (a.get("rounded") or b.get("rounded")) or len(first) != len(second) or not first.any() or a.get("layers") != b.get("layers"):
        return math.inf
    share = float(np.linalg.norm(first - second) / np.linalg.norm(first))
    return share if share < MOST_ROUNDING else math.inf


def _sketch(text: object) -> np.ndarray:
    """The numbers of a sketch, none where it is not one: placements hold whatever was written there."""
    is_sketch = isinstance(text, str) and re.fullmatch("([0-9a-f]{4}){1,250}", text)
    return np.frombuffer(bytes.fromhex(str(text)) if is_sketch else b"", "<f2").astype(float)


def check_same_model(made: Mapping[str, Any], here: Mapping[str, Any], noun: str, error: type[LayercardError], mend: str) -> None:
    """Raise `error` unless what was `made` for one `model` object serves for the one `here`; a rounding between them is logged."""
    share = rounding_between(made, here)
    if share == math.inf:
        theirs, ours = (f"{each.get('name')} ({each.get('fingerprint')}, {each.get('layers')} layers)" for each in (made, here))
        earlier = "" if made.get("sketch") else "; versions before this one made other fingerprints"
        raise error(f"the {noun} is of {theirs}, the model is {ours}, with other weights{earlier}; {mend}")
    if share:
        logging.getLogger(__name__).warning(
            "the %s is of %s; the weights here are %.1f %% from those, as 8 or 4 bits are: taken for the same model",
            noun,
            made.get("name"),
            100 * share,
        )


class DataInfo(Part):
    """The records that were profiled. `fit_records` of them made the steps, the others measured them; when not given each did both, with
    the steps of the half to which it does not belong."""

    source: str
    fingerprint: str
    records: Count
    tokens: Count
    labelled_tokens: Count
    fit_records: Count | None = None
    truncated: Annotated[int, Field(ge=0, le=MOST)] = 0
    loss: FiniteFloat | None = None


class ModuleCard(Part):
    """One linear map of a layer: its exact path, shape and share of the layer's signals.

    Where `experts` is set, it is a map of that many experts, stacked in one parameter: `path` is that parameter's. `expert_tokens` says
    how many of the tokens that made the steps were sent to each, `expert_resnorm` what each has of `resnorm` (squares add up).
    """

    path: str
    in_features: Size
    out_features: Size
    resnorm: FiniteFloat
    resnorm_rank: FiniteFloat
    gradient_norm: FiniteFloat
    ridge: FiniteFloat
    shares_input_with: str | None = None
    experts: Size | None = None
    expert_tokens: tuple[Annotated[int, Field(ge=0, le=MOST)], ...] | None = None
    expert_resnorm: tuple[FiniteFloat, ...] | None = None


class PhaseInfo(Part):
    """What one phase of profiling took: `layercard.measure.Phase` says how it is measured."""

    name: str
    seconds: FiniteFloat
    resident_peak_bytes: int | None = None
    device_peak_bytes: int | None = None


class LayerEntry(Part):
    """One layer; `docs/card.md` has each measure with its unit. `None` was not measured."""

    index: Annotated[int, Field(ge=0)]
    resnorm: Estimate
    resnorm_rank: Estimate
    residual_fraction: Estimate
    gradient_norm: Estimate
    activation_energy: Estimate
    effective_rank: Estimate
    condition: Estimate
    noise_amplification: Estimate
    predicted_gain: Estimate
    centrality: Estimate
    step_probe: Estimate | None = None
    step_curvature: Estimate | None = None
    longest_step: Estimate | None = None
    training_probe: Estimate | None = None
    training_probe_steps: int | None = None
    gain_estimate: Estimate
    forward_seconds: FiniteFloat | None = None
    backward_seconds: FiniteFloat | None = None
    adapter_seconds: FiniteFloat | None = None
    saved_bytes: int | None = None
    modules: tuple[ModuleCard, ...]


class LayerCard(Record):
    """A whole card.

    Attributes:
        model: The profiled model: name, fingerprint, number of layers L.
        data: The records: source, fingerprint, counts.
        settings: How it was made (`ProfileSettings`), with device and dtype.
        versions: Of the packages that made it.
        layers: The L layers, index 0 at the input, each with its measures and modules.
        coupling: `ρ_ℓm`, one row a layer.
        descent: `b_ℓ`, first-order decrease of the held-out loss along each layer's step, nats per labelled token.
        curvature: `K_ℓℓ`, nats per labelled token.
        stability: For each measure the median Spearman correlation of its profile between halves of the records.
        cross_fitted: The measures that are cross-fitted: half of the records made the steps and the other half measured them, then the
            other way round, and the two are averaged. The others describe the records themselves. Empty: made by an earlier version,
            which held some records out once.
        units: Unit of each measure.
        warnings: What a reader must know before trusting the card, in words.
        cost: What placements cost on the machine that made the card; `None` was not measured (`cost_of` estimates it).
        phases: Time and memory of the phases of profiling, in the call that finished it; like `cost` they are readings of a clock, so a
            card that must come out the same again (`ProfileSettings.cost` off) has none.
    """

    noun: ClassVar[str] = "card"
    made_by: ClassVar[str] = "layercard profile"
    schema_: Literal["layercard/1"] = Field(default="layercard/1", alias="schema")
    model: ModelInfo
    data: DataInfo
    settings: dict[str, Any]
    versions: dict[str, str]
    layers: Annotated[tuple[LayerEntry, ...], Field(min_length=1)]
    coupling: tuple[tuple[FiniteFloat, ...], ...]
    descent: tuple[FiniteFloat, ...]
    curvature: tuple[FiniteFloat, ...]
    stability: dict[str, FiniteFloat]
    cross_fitted: tuple[str, ...] = ()
    units: dict[str, str] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    cost: CostModel | None = None
    phases: tuple[PhaseInfo, ...] = ()

    @field_validator("settings")
    @classmethod
    def _check_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        try:
            for field in ProfileSettings.fields():
                if field.name in settings:
                    check(field.name, settings[field.name], field.type, field.metadata)
        except TrainingError as problem:
            raise ValueError(str(problem)) from None
        for name in ("dtype", "device"):
            if not isinstance(settings.get(name, ""), str):
                raise ValueError(f"{name} is {shown(settings[name])}, not a text")
        return settings

    @model_validator(mode="after")
    def _shapes(self) -> "LayerCard":
        depth = self.model.layers
        if [layer.index for layer in self.layers] != list(range(depth)):
            raise ValueError(f"layers must be 0 to {depth - 1} in order, found {len(self.layers)}")
        if len(self.coupling) != depth or any(len(row) != depth for row in self.coupling):
            raise ValueError(f"coupling must be {depth} by {depth}")
        if len(self.descent) != depth or len(self.curvature) != depth:
            raise ValueError(f"descent and curvature must have {depth} numbers")
        if self.cost is not None and len(self.cost.layers) != depth:
            raise ValueError(f"cost must have {depth} layers, found {len(self.cost.layers)}")
        return self

    def profile(self, measure: str) -> list[Estimate | None]:
        """One measure of all layers, layer 0 first; `None` where it was not measured."""
        return [Estimate.read(getattr(layer, measure)) for layer in self.layers]

    def best_layers(self) -> list[int]:
        """The few layers with the highest gain estimate, best first."""
        return best_layers(self.profile("gain_estimate"))

    def values(self, measure: str) -> list[float]:
        """The values of one measure, layer by layer.

        Raises:
            CardError: The card does not have the measure.
        """
        estimates = [getattr(layer, measure, None) for layer in self.layers]
        values = [estimate.value for estimate in estimates if isinstance(estimate, Estimate)]
        if len(values) < len(self.layers):
            measures = sorted(name for name, value in self.layers[0] if isinstance(value, Estimate))
            raise CardError(f"the card has no {measure}; it has {', '.join(measures)}")
        return values

    def with_cost(self, cost: CostModel | None) -> "LayerCard":
        """The same card with a cost model, and its times and bytes at each layer; with `None` without any."""
        names = ("forward_seconds", "backward_seconds", "adapter_seconds", "saved_bytes")
        layers = tuple(
            layer.model_copy(update={name: None if cost is None else getattr(cost.layers[layer.index], name) for name in names})
            for layer in self.layers
        )
        return self.model_copy(update={"layers": layers, "cost": cost})

    def check_model(self, model: dict[str, Any]) -> None:
        """Make sure that the card belongs to a model, given as `layercard.models.load.describe` does.

        Raises:
            CardError: The weights differ by more than rounding.
        """
        check_same_model(self.model.model_dump(), model, "card", CardError, "profile this model first")

    def _repr_html_(self) -> str:
        """What a notebook shows: model, data, warnings and the best single layers with their intervals, all escaped."""
        model, data, best = self.model, self.data, self.best_layers()
        records = f"{data.records:,} records, {data.tokens:,} tokens, {data.labelled_tokens:,} of them labelled"
        facts = {
            "Model": f"{model.name}, {model.layers} layers, weights {model.fingerprint[:12]}",
            "Data": f"{data.source}, {records}",
            "Ranking": stability_words(self.stability),
            "Best layers": ", ".join(map(str, best)),
        }
        columns = {"Layer": [str(layer) for layer in best]}
        for key, title in NOTEBOOK_COLUMNS.items():
            estimates = self.profile(key)
            if any(estimates[layer] for layer in best):
                columns[title] = [with_interval(estimates[layer]) for layer in best]
        rows = list(zip(*columns.values(), strict=True))
        facts |= numbered("Warning", self.warnings)
        return framed("Layer Card", facts, "Best single layers, with 95 % intervals", list(columns), rows)


def training_cost(card: LayerCard, *, fast: bool = True, epochs: float = 1.0) -> CostModel:
    """What a step costs as it will be trained: with the fast parts and over so many epochs, or stock, which has neither."""
    cost, data = cost_of(card), card.data
    if not fast:
        return cost
    positions = cost.batch_size * cost.tokens
    real = cost.real_tokens or cost.batch_size * data.tokens / data.records  # what is not padding, of a usual batch or on average
    return cost.made_fast(min(1.0, real / positions), epochs)


def cost_of(card: LayerCard) -> CostModel:
    """The card's measured cost or, where it has none, relative costs from the shapes of its modules and the length of its records."""
    if card.cost is not None:
        return card.cost
    data, batch_size = card.data, 4
    fit_tokens = data.tokens * (data.fit_records or data.records) / data.records
    rank = card.settings.get("rank")  # whatever another version wrote there

    def shape(module: ModuleCard) -> Shape:
        if module.experts is None:
            return Shape(module.in_features, module.out_features, name=module.path)
        # How many experts a token enters follows from the tokens that each of them saw.
        active = max(1, round(sum(module.expert_tokens or ()) / fit_tokens))
        return Shape(module.in_features, module.out_features, module.experts, min(active, module.experts), module.path)

    return CostModel.from_shapes(
        [[shape(module) for module in layer.modules] for layer in card.layers],
        model=card.model.name,
        batch_size=batch_size,
        length=max(1, round(data.tokens / data.records)),
        labelled=max(1, round(batch_size * data.labelled_tokens / data.records)),
        rank=rank if type(rank) is int and 0 < rank < 2**31 else 8,
    )
