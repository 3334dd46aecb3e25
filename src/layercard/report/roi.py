"""What a placement saves in money, hours, energy and CO₂: one table of formulas, computed here and in the page alike.

`roi` compares training and serving with adapters in the layers of a placement against adapters in all layers. `RoiInputs` are the
reader's own figures; `Ratios` are what was measured of the placement, as shares of all layers (0.6: 40 % less). `compute` is the whole
model. Its source is read as text too, which is the docs' and the page's JavaScript: the same operations in the same order on the same
doubles.

A ratio that was not measured counts as 1, so nothing is saved by it, in `Roi.results`; what it would save is told apart from these, in
`Roi.with_assumptions`.
"""

import ast
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, FiniteFloat, ValidationError, model_validator

from layercard.card.card import LayerCard, training_cost
from layercard.card.numbers import listed
from layercard.cost.model import CostModel
from layercard.errors import ReportError, suggestion
from layercard.files import shown
from layercard.records import Estimate, Part, Record, first_problem
from layercard.report.trials import Trial, TrialGroup, by_regime, mean, task_word
from layercard.report.words import counted, device_of, template
from layercard.trials.result import Result

RATIOS = ("time", "memory", "latency", "adapter_size")
MEASURED_FIGURES = ("run_memory_gb", "adapter_mb", "adapter_latency_ms")
"""Figures of a run of all layers that are taken as measured where the reader gives none."""
SHARE_ERROR = 0.093
"""Worst error of a share of the step time of all layers that a measured cost model predicts (`benchmarks/results/cost_model.json`)."""

_Amount = Annotated[FiniteFloat, Field(ge=0, le=1e12)]
_Positive = Annotated[FiniteFloat, Field(ge=1e-6, le=1e12)]
_Count = Annotated[int, Field(ge=0, le=10**15)]


def _figure(default: float | None, label: str, unit: str = "") -> Any:
    return Field(default=default, title=label, json_schema_extra={"unit": unit})


class RoiInputs(Part, extra="forbid"):
    """The reader's figures, each with its label and unit. `docs/roi.md` says what they mean.

    Money is in `currency`, whatever that is; 1 GB is 10⁹ bytes. The defaults are an example, not a recommendation: whatever is not given
    is named in `Roi.assumptions`. `None` means "as measured" for `MEASURED_FIGURES`, and "not counted" for the rest.
    """

    currency: Annotated[str, Field(max_length=12, pattern=r"^[^<>&\"'\x00-\x1f]*$")] = "USD"
    gpu_price_per_hour: _Amount = _figure(2.5, "GPU price", "money / hour")
    runs_per_month: _Amount = _figure(20.0, "Fine-tuning runs", "a month")
    hours_per_run: _Amount = _figure(8.0, "Hours of an all-layer run", "hours")
    gpus: Annotated[int, Field(ge=1, le=10**6)] = _figure(1, "GPUs a run")
    run_memory_gb: _Amount | None = _figure(None, "Memory of an all-layer run", "GB a GPU")
    smaller_gpu_price_per_hour: _Amount | None = _figure(None, "Its price", "money / hour")
    smaller_gpu_memory_gb: _Amount | None = _figure(None, "Memory of the smaller GPU", "GB")
    smaller_gpu_speed: _Positive = _figure(1.0, "Its speed", "share of the other's")
    adapters_served: _Count = _figure(10, "Adapters served")
    adapter_mb: _Amount | None = _figure(None, "Size of an all-layer adapter", "MB")
    storage_price_per_gb_month: _Amount = _figure(0.1, "Price of keeping them ready", "money / GB / month")
    requests_per_month: _Count = _figure(100_000, "Requests", "a month")
    tokens_per_month: _Count = _figure(20_000_000, "Tokens generated", "a month")
    concurrent_requests: _Positive = _figure(8.0, "Requests answered at a time", "a GPU")
    adapter_latency_ms: _Amount | None = _figure(None, "Time that all-layer adapters add", "ms / token, 0 when merged")
    engineer_hours: _Amount = _figure(8.0, "Engineer hours for set-up", "hours, once")
    engineer_rate: _Amount = _figure(80.0, "Their rate", "money / hour")
    profile_hours: _Amount = _figure(0.5, "GPU hours to profile", "hours, once")
    gpu_watts: _Amount | None = _figure(None, "Power of a GPU (optional)", "W")
    grid_gco2_per_kwh: _Amount | None = _figure(None, "CO₂ of the grid (optional)", "g / kWh")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Check and read plain values.

        Raises:
            ReportError: A name that there is not, or a value that is not a number in range.
        """
        for name in values:
            if name not in cls.model_fields:
                raise ReportError(f"{name!r} is not a figure of the calculator; {suggestion(str(name), cls.model_fields)}")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as problem:
            raise ReportError(
                f"{first_problem(problem, 'figures')}, found {shown(problem.errors()[0]['input'])}; give a number in range"
            ) from None


GROUPS = {
    "Training": ("gpu_price_per_hour", "runs_per_month", "hours_per_run", "gpus"),
    "A smaller GPU (optional)": ("run_memory_gb", "smaller_gpu_memory_gb", "smaller_gpu_price_per_hour", "smaller_gpu_speed"),
    "Serving": (
        *("adapters_served", "adapter_mb", "storage_price_per_gb_month", "requests_per_month", "tokens_per_month"),
        *("concurrent_requests", "adapter_latency_ms"),
    ),
    "Set-up and energy": ("engineer_hours", "engineer_rate", "profile_hours", "gpu_watts", "grid_gco2_per_kwh"),
}
"""The fields of the page's form."""
FIGURES = {name: RoiInputs.model_fields[name] for names in GROUPS.values() for name in names}
"""The reader's figures, in the order of their fields on the page."""


def with_labels(text: str) -> str:
    """A sentence of the calculator with the fields called as the page calls them.

    >>> with_labels("example figures, not given: gpus, gpu_watts")
    'example figures, not given: GPUs a run, Power of a GPU (optional)'
    """
    return re.sub(r"\b[a-z_]+\b", lambda word: str(FIGURES[word[0]].title) if word[0] in FIGURES else word[0], text)


class Ratio(Part):
    """A cost of the placement as a share of all layers' (0.6: 40 % less), with the ends of its interval."""

    low: Annotated[FiniteFloat, Field(ge=0, le=1e6)]
    mid: Annotated[FiniteFloat, Field(ge=0, le=1e6)]
    high: Annotated[FiniteFloat, Field(ge=0, le=1e6)]
    measured: bool  # else it is an assumption and kept out of `Roi.results`
    predicted: bool = False  # whether it was not timed as such, but follows from measured parts
    source: str  # where it comes from, in words

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.mid <= self.high:
            raise ValueError(f"low {self.low}, mid {self.mid}, high {self.high} are not in order")
        return self

    @classmethod
    def of(
        cls, mid: float, source: str, *, low: float | None = None, high: float | None = None, measured: bool = True, predicted: bool = False
    ) -> Self:
        """A ratio; without ends its interval is the value alone."""
        ends = (mid if low is None else min(max(low, 0.0), mid), mid if high is None else max(high, mid))
        return cls(low=ends[0], mid=mid, high=ends[1], measured=measured, predicted=predicted, source=source)

    @property
    def basis(self) -> str:
        """Whether it was measured, in a word."""
        return "assumed" if not self.measured else "predicted" if self.predicted else "measured"


NOT_MEASURED = Ratio(low=1.0, mid=1.0, high=1.0, measured=False, source="not measured, so nothing is saved by it")


class Ratios(Part):
    """What is known of one placement against all layers."""

    placement: str = "the placement"  # in words
    time: Ratio = NOT_MEASURED  # of training
    memory: Ratio = NOT_MEASURED  # peak of training, the frozen model included
    latency: Ratio = NOT_MEASURED  # time that adapters, not merged, add to each token
    adapter_size: Ratio = NOT_MEASURED  # bytes of a saved adapter
    # These figures of all layers, as measured, and where all this was measured, in words.
    run_memory_gb: _Amount | None = None
    adapter_mb: _Amount | None = None
    adapter_latency_ms: _Amount | None = None
    where: str = ""


# ---- the formulas

FUNCTIONS: dict[str, Callable[..., float | None]] = {
    "positive": lambda x: 1.0 if x > 0 else 0.0,
    "fits": lambda need, room: 1.0 if need <= room else 0.0,
    "over": lambda a, b: a / b if b > 0 else None,  # no value where b is not above 0
    "zero": lambda x: 0.0 if x is None else x,
}
"""The functions of the formulas; their twins in JavaScript are in `templates/formulas.js.j2`."""


def compute(v: Any) -> None:
    """The whole model, from the top down: each line uses figures, ratios and the lines above it, and reads as one of JavaScript too."""
    v.gpu_hours = v.runs_per_month * v.hours_per_run * v.gpus
    v.smaller_price = v.smaller_gpu_price_per_hour / v.smaller_gpu_speed
    v.moves = (
        v.positive(v.run_memory_gb)
        * v.positive(v.smaller_gpu_memory_gb)
        * v.positive(v.gpu_price_per_hour - v.smaller_price)
        * v.fits(v.run_memory_gb * v.memory, v.smaller_gpu_memory_gb)
        * (1 - v.fits(v.run_memory_gb, v.smaller_gpu_memory_gb))
    )
    v.run_time = v.time * (1 + v.moves * (1 / v.smaller_gpu_speed - 1))
    v.training_saved = v.gpu_hours * v.gpu_price_per_hour * (1 - v.time)
    v.smaller_gpu_saved = v.moves * v.gpu_hours * v.time * (v.gpu_price_per_hour - v.smaller_price)
    v.serving_hours_saved = v.tokens_per_month * v.adapter_latency_ms / 3600000 / v.concurrent_requests * (1 - v.latency)
    v.serving_saved = v.serving_hours_saved * v.gpu_price_per_hour
    v.storage_saved_gb = v.adapters_served * v.adapter_mb / 1000 * (1 - v.adapter_size)
    v.storage_saved = v.storage_saved_gb * v.storage_price_per_gb_month
    v.saved_month = v.training_saved + v.smaller_gpu_saved + v.serving_saved + v.storage_saved
    v.saved_year = 12 * v.saved_month
    v.setup_cost = v.engineer_hours * v.engineer_rate + v.profile_hours * v.gpu_price_per_hour
    v.first_year = v.saved_year - v.setup_cost
    v.payback_months = v.over(v.setup_cost, v.saved_month)
    v.hours_saved = v.runs_per_month * v.hours_per_run * (1 - v.run_time)
    v.gpu_hours_saved = v.gpu_hours * (1 - v.run_time) + v.serving_hours_saved
    v.request_seconds_saved = v.zero(v.over(v.tokens_per_month, v.requests_per_month)) * v.adapter_latency_ms / 1000 * (1 - v.latency)
    v.energy_saved = v.gpu_hours_saved * v.gpu_watts / 1000
    v.co2_saved = v.energy_saved * v.grid_gco2_per_kwh / 1000


class Formula(NamedTuple):
    """A line of the model: its name, its unit (`money` is in the reader's currency), its title, figures that it needs, and its text.

    A line without a title is a step on the way, which nobody is shown.
    """

    name: str
    unit: str
    title: str
    needs: tuple[str, ...]
    expression: str


_UNITS: dict[str, tuple[str, ...]] = {
    "gpu_hours": ("GPU h / month", ""),
    "smaller_price": ("money / GPU h", ""),
    "moves": ("0 or 1", ""),
    "run_time": ("share", ""),
    "training_saved": ("money / month", "Shorter training"),
    "smaller_gpu_saved": ("money / month", "Training on a smaller GPU"),
    "serving_hours_saved": ("GPU h / month", ""),
    "serving_saved": ("money / month", "Faster answers"),
    "storage_saved_gb": ("GB", "Room for adapters saved"),
    "storage_saved": ("money / month", "Smaller adapters"),
    "saved_month": ("money / month", "Saved a month"),
    "saved_year": ("money / year", "Saved a year"),
    "setup_cost": ("money", "Set-up, once"),
    "first_year": ("money", "First year, set-up taken off"),
    "payback_months": ("months", "Payback"),
    "hours_saved": ("h / month", "Hours of waiting saved a month"),
    "gpu_hours_saved": ("GPU h / month", "GPU hours saved a month"),
    "request_seconds_saved": ("s / request", "Saved on each request"),
    "energy_saved": ("kWh / month", "Energy saved a month", "gpu_watts"),
    "co2_saved": ("kg / month", "CO₂ saved a month", "gpu_watts", "grid_gco2_per_kwh"),
}
_assignments = [node for node in ast.walk(ast.parse(inspect.getsource(compute))) if isinstance(node, ast.Assign)]
_texts = {ast.unparse(node.targets[0])[2:]: re.sub(r"\bv\.", "", ast.unparse(node.value)) for node in _assignments}
FORMULAS = tuple(Formula(name, unit, title, tuple(needs), _texts[name]) for name, (unit, title, *needs) in _UNITS.items())
SHOWN = tuple(formula for formula in FORMULAS if formula.title)
"""The lines that are results."""


def evaluate(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """All lines of the model for one set of figures and ratios; a line whose `needs` are `None` is `None`.

    A figure that is `None` counts as 0 in the lines that do without it.
    """
    numbers = SimpleNamespace(**FUNCTIONS, **{name: 0.0 if value is None else value for name, value in values.items()})
    compute(numbers)
    has_value = {formula.name: all(values.get(name) is not None for name in formula.needs) for formula in FORMULAS}
    return {name: getattr(numbers, name) if has else None for name, has in has_value.items()}


def javascript() -> str:
    """The model as JavaScript: `layercardRoi(inputs, ratios)` gives `{results, with_assumptions}` as `roi` does.

    `inputs` holds the fields of `RoiInputs` as numbers or null, `ratios` is the JSON value of `Ratios`.
    """
    names = [*(name for name in RoiInputs.model_fields if name != "currency"), *RATIOS]
    return template("formulas.js.j2", html=False).render(
        formulas=FORMULAS,
        shown=[formula.name for formula in SHOWN],
        names=names,
        ratios=RATIOS,
        measured_figures=MEASURED_FIGURES,
        unmeasured=NOT_MEASURED.source,
    )


# ---- the result


class Range(Part):
    """A result: `mid` from the measured values, `low` and `high` from the ends of their intervals; `None`: not known, or never."""

    low: float | None
    mid: float | None
    high: float | None


class Roi(Record):
    """What a placement saves."""

    error: ClassVar = ReportError
    noun: ClassVar = "calculation"
    made_by: ClassVar = "layercard roi"
    schema_: Literal["layercard-roi/1"] = Field(default="layercard-roi/1", alias="schema")
    inputs: RoiInputs
    ratios: Ratios
    results: dict[str, Range]  # for each of `SHOWN`, from measured ratios alone
    with_assumptions: dict[str, Range] | None  # the same with ratios that were not measured; `None` where there are none
    assumptions: tuple[str, ...]  # what of all this was not measured, in sentences
    units: dict[str, str] = Field(default_factory=lambda: {formula.name: formula.unit for formula in SHOWN})


def roi(inputs: RoiInputs, ratios: Ratios) -> Roi:
    """What a placement saves against all layers, by `FORMULAS`.

    Args:
        inputs: The reader's figures.
        ratios: What was measured.

    >>> half = Ratio.of(0.5, "measured on one GPU")
    >>> saved = roi(RoiInputs(gpu_price_per_hour=2, runs_per_month=10, hours_per_run=5, engineer_hours=1, engineer_rate=25,
    ...                       profile_hours=0), Ratios(time=half)).results
    >>> saved["saved_month"].mid, saved["payback_months"].mid
    (50.0, 0.5)
    """
    assumed = any(not getattr(ratios, name).measured and getattr(ratios, name) != NOT_MEASURED for name in RATIOS)
    return Roi(
        inputs=inputs,
        ratios=ratios,
        results=_ranges(inputs, ratios, only_measured=True),
        with_assumptions=_ranges(inputs, ratios, only_measured=False) if assumed else None,
        assumptions=tuple(_assumptions(inputs, ratios)),
    )


def bound(inputs: RoiInputs, ratios: Ratios) -> dict[str, float | None]:
    """The figures as the formulas take them: numbers, and what was measured where the reader gives nothing."""
    values = inputs.model_dump(exclude={"currency"})
    values |= {name: getattr(ratios, name) for name in MEASURED_FIGURES if values[name] is None}
    return {name: None if value is None else float(value) for name, value in values.items()}


def _ranges(inputs: RoiInputs, ratios: Ratios, *, only_measured: bool) -> dict[str, Range]:
    """Each shown line at the cautious ends of all ratios, at their values, and at the other ends."""
    values, outcomes = bound(inputs, ratios), []
    for end in ("high", "mid", "low"):
        shares = {name: getattr(ratios, name) for name in RATIOS}
        counted_shares = {name: getattr(share, end) if share.measured or not only_measured else 1.0 for name, share in shares.items()}
        outcomes.append(evaluate(values | counted_shares))
    ranges = {}
    for formula in SHOWN:
        ends = [outcome[formula.name] for outcome in outcomes]
        numbers = [value for value in ends if value is not None and math.isfinite(value)]
        # In order of size; a payback that one end never reaches has no upper end.
        high = max(numbers) if len(numbers) == len(ends) else None
        ranges[formula.name] = Range(low=min(numbers, default=None), mid=ends[1], high=high)
    return ranges


def _assumptions(inputs: RoiInputs, ratios: Ratios) -> Iterator[str]:
    for name in RATIOS:
        ratio: Ratio = getattr(ratios, name)
        if not ratio.measured:
            yield f"{name.replace('_', ' ')}: {ratio.source}"
    given, values = inputs.model_fields_set | {"currency"}, inputs.model_dump()
    examples = [name for name, value in values.items() if name not in given and value is not None]
    if examples:
        yield f"example figures, not given: {', '.join(examples)}"
    for name in MEASURED_FIGURES:
        if values[name] is not None:
            yield f"{name}: given by hand"
        elif getattr(ratios, name) is None:
            yield f"{name}: neither measured on an accelerator nor given, so it saves nothing"


# ---- ratios from cards and runs


def ratios_of(
    layers: Sequence[int],
    card: LayerCard | None = None,
    groups: Sequence[TrialGroup] = (),
    modules: str = "all",
    result: Result | None = None,
) -> Ratios:
    """What is known of a placement against all layers: from a run's result, else from trainings, else predicted from the card's cost.

    The time that adapters add to a token is taken from an accelerator's cost only: that of a processor core says nothing of a GPU's price.

    Args:
        layers: The placement.
        card: The card of its model.
        groups: Trained placements (`trials.grouped`), the one with these layers and all layers among them or not; those of the placement's
            own regime (`trials.by_regime`) are taken.
        modules: The set of modules that the placement adapts in its layers; a card's cost counts all of them.
        result: What `layercard run` ended with, where it chose this placement.
    """
    chosen = tuple(sorted(layers))
    regimes = by_regime(groups, chosen, modules, task_word(card.data.source) if card else "")
    own = next(iter(regimes.values()), [])
    group = next((group for group in own if (group.layers, group.modules) == (chosen, modules)), None)
    all_layers = next((group for group in own if len(group.layers) == group.depth and group.modules == "all"), None)
    runs: Sequence[Trial] = group.trials if group else ()
    parts: dict[str, Any] = {}
    places: list[str] = []
    if card is not None and card.cost is not None:
        cost = training_cost(card)
        parts = _from_cost(cost, chosen, "" if modules == "all" else f"; counted as if all modules were adapted, not {modules} alone")
        if cost.source == "measured":
            places.append(f"{device_of(cost)}, {cost.batch_size} records of {cost.tokens} tokens")
        # Peak memory with the frozen model in it, whose size only the cost knows.
        peaks = [(run.peak_memory_bytes, run.memory_of_all) for run in runs if run.peak_memory_bytes and run.memory_of_all]
        if peaks:
            frozen = cost.weights_bytes
            share = mean([Estimate(value=(frozen + memory) / (frozen + of_all)) for memory, of_all in peaks])
            parts["memory"] = Ratio.of(share.value, f"peaks measured, {_trials(len(peaks), 'run')}", low=share.low, high=share.high)
    if group is not None and group.time_share is not None:
        share = group.time_share.divided_by(100)
        source = f"timed against all layers, {_trials(group.timings, 'timing')}"
        parts["time"] = Ratio.of(share.value, source, low=share.low, high=share.high)
    if all_layers is not None and all_layers.adapter_bytes:
        parts["adapter_mb"] = all_layers.adapter_bytes.value / 1e6
        if group is not None and group.adapter_bytes:
            share_of_bytes = group.adapter_bytes.value / all_layers.adapter_bytes.value
            parts["adapter_size"] = Ratio.of(share_of_bytes, "sizes of the saved adapters")
    if result is not None and result.all_layers.step_seconds:
        is_all = result.all_layers.source == "measured"
        source = (
            "all layers are what was trained"
            if is_all
            else "seconds a step, timed in the race beside all layers, 1 timing, without an interval"
        )
        parts["time"] = Ratio.of(
            result.step_seconds / result.all_layers.step_seconds, source, measured=result.all_layers.source != "unknown"
        )
    places += dict.fromkeys(run.machine for run in runs if run.machine)
    return Ratios(placement=f"layers {listed(chosen, ' ')}", where="; ".join(places), **parts)


def _from_cost(cost: CostModel, layers: Sequence[int], remark: str) -> dict[str, Any]:
    """The ratios that a card's cost gives, and the figures of all layers where it was measured; sources end with `remark`."""
    every, measured = range(len(cost.layers)), cost.source == "measured"
    frozen, error = cost.weights_bytes, SHARE_ERROR if measured else 0.0
    guess = "estimated from FLOPs, bytes and a device's rates" if cost.source == "rates" else "estimated from shapes alone"
    sources = {"time": f"step time {guess}", "memory": f"peak memory {guess}", "latency": f"added latency {guess}"}
    parts: dict[str, Any] = {"adapter_mb": cost.adapter_bytes(every) / 1e6}
    if measured:
        on = f"measured on {device_of(cost)}"
        sources["time"] = (
            f"step time predicted from the card's cost, its parts {on}; ± {100 * error:.1f} %, the worst of 16 shares that were timed"
        )
        sources["memory"] = f"peak memory predicted from the card's cost, its parts {on}; without an interval"
        sources["latency"] = f"time that adapters, not merged, add to a token, predicted from the card's cost, its parts {on}"
        parts["run_memory_gb"] = (frozen + cost.peak_memory(every)) / 1e9
        parts["adapter_latency_ms"] = None if cost.threads else 1e3 * cost.inference_latency(every)
    sources = {name: source + remark for name, source in sources.items()}
    basis = {"measured": measured, "predicted": measured}
    time = cost.step_time(layers) / cost.step_time(every)
    memory = (frozen + cost.peak_memory(layers)) / (frozen + cost.peak_memory(every))
    parts["time"] = Ratio.of(time, sources["time"], low=time * (1 - error), high=time * (1 + error), **basis)
    parts["memory"] = Ratio.of(memory, sources["memory"], **basis)
    if cost.inference_latency(every) > 0:
        latency = cost.inference_latency(layers) / cost.inference_latency(every)
        parts["latency"] = Ratio.of(latency, sources["latency"], **basis)
    size = cost.adapter_bytes(layers) / cost.adapter_bytes(every)
    return parts | {"adapter_size": Ratio.of(size, f"counted from the shapes of the adapted maps{remark}")}


def _trials(count: int, noun: str) -> str:
    return counted(count, noun) if count > 1 else f"1 {noun}, without an interval"
