"""What a placement saves in money, hours, energy and CO₂: one table of formulas, evaluated here and in the page alike.

`roi` compares training and serving with adapters in the layers of a placement against adapters in all layers. `RoiInputs` are the
reader's own figures; `Ratios` are what was measured of the placement, as shares of all layers (0.6: 40 % less). `FORMULAS` is the whole
model, in the order in which it is evaluated: each line may use inputs, ratios and the lines above it. The same text runs in Python and,
through `javascript`, in a page, with the same double precision arithmetic in the same order.

A ratio that was not measured counts as 1, so nothing is saved by it, in `Roi.results`; what it would save is told apart from these, in
`Roi.with_assumptions`. Nothing here reads files: `layercard.report.ratios` takes the ratios from cards, placements and runs.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from layercard.errors import ReportError

SCHEMA = "layercard-roi/1"
RATIOS = ("time", "memory", "latency", "adapter_size")

_Amount = Annotated[FiniteFloat, Field(ge=0, le=1e12)]
_Positive = Annotated[FiniteFloat, Field(ge=1e-6, le=1e12)]
_Count = Annotated[int, Field(ge=0, le=10**15)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RoiInputs(_Frozen):
    """The reader's figures. Money is in `currency`, whatever that is; a month is a month; 1 GB is 10⁹ bytes.

    The defaults are an example, not a recommendation: whatever is not given is named in `Roi.assumptions`. `None` means "as measured"
    for the three figures of an all-layer run, and "not counted" for the rest.

    Attributes:
        currency: What money is counted in; a name only.
        gpu_price_per_hour: Price of one GPU for one hour.
        runs_per_month: Fine-tuning runs a month.
        hours_per_run: Hours (by the clock) of one run with adapters in all layers.
        gpus: GPUs that a run takes.
        run_memory_gb: Memory that an all-layer run takes at its peak on each GPU, GB.
        smaller_gpu_price_per_hour: Price of a smaller GPU that would do if the run took less memory; `None`: there is none.
        smaller_gpu_memory_gb: Memory of that GPU, GB.
        smaller_gpu_speed: Its speed as a share of the other one's (0.5: a run takes twice as long).
        adapters_served: Adapters kept ready for serving.
        adapter_mb: Size of one all-layer adapter, MB.
        storage_price_per_gb_month: What keeping 1 GB of adapters ready costs a month.
        requests_per_month: Requests answered a month.
        tokens_per_month: Tokens generated a month.
        concurrent_requests: Requests that one GPU answers at a time, and which share the time that an adapter adds.
        adapter_latency_ms: Time that all-layer adapters, not merged into the weights, add to each generated token, ms; 0 when merged.
        engineer_hours: Working hours to set this up, once.
        engineer_rate: Cost of one of these hours.
        profile_hours: GPU hours to profile the model, once.
        gpu_watts: Power that a GPU draws, W; `None`: no energy is given.
        grid_gco2_per_kwh: CO₂ of the grid's electricity, g/kWh; `None`: no CO₂ is given.
    """

    currency: Annotated[str, Field(max_length=12, pattern=r"^[^<>&\"'\x00-\x1f]*$")] = "USD"
    gpu_price_per_hour: _Amount = 2.5
    runs_per_month: _Amount = 20.0
    hours_per_run: _Amount = 8.0
    gpus: Annotated[int, Field(ge=1, le=10**6)] = 1
    run_memory_gb: _Amount | None = None
    smaller_gpu_price_per_hour: _Amount | None = None
    smaller_gpu_memory_gb: _Amount | None = None
    smaller_gpu_speed: _Positive = 1.0
    adapters_served: _Count = 10
    adapter_mb: _Amount | None = None
    storage_price_per_gb_month: _Amount = 0.1
    requests_per_month: _Count = 100_000
    tokens_per_month: _Count = 20_000_000
    concurrent_requests: _Positive = 8.0
    adapter_latency_ms: _Amount | None = None
    engineer_hours: _Amount = 8.0
    engineer_rate: _Amount = 80.0
    profile_hours: _Amount = 0.5
    gpu_watts: _Amount | None = None
    grid_gco2_per_kwh: _Amount | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "RoiInputs":
        """Check and read plain values.

        Raises:
            ReportError: A name that there is not, or a value that is no number in range.
        """
        for name in values:
            if name not in cls.model_fields:
                close = difflib.get_close_matches(str(name), cls.model_fields, n=1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(cls.model_fields)}"
                raise ReportError(f"{name!r} is no figure of the calculator; {hint}")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as problem:
            first = problem.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ReportError(f"{where}: {first['msg']}, found {str(first['input'])[:40]!r}; give a number in range") from None


class Ratio(_Frozen):
    """A cost of the placement as a share of all layers' (0.6: 40 % less), with the ends of its interval.

    Attributes:
        low: The lower end; the most that can be saved.
        mid: The value.
        high: The upper end; the least that can be saved.
        measured: Whether it was measured; else it is an assumption and kept out of `Roi.results`.
        source: Where it comes from, in words.
    """

    low: Annotated[FiniteFloat, Field(ge=0, le=1e6)]
    mid: Annotated[FiniteFloat, Field(ge=0, le=1e6)]
    high: Annotated[FiniteFloat, Field(ge=0, le=1e6)]
    measured: bool
    source: str

    @model_validator(mode="after")
    def _ordered(self) -> "Ratio":
        if not self.low <= self.mid <= self.high:
            raise ValueError(f"low {self.low}, mid {self.mid}, high {self.high} are not in order")
        return self

    @classmethod
    def of(cls, mid: float, source: str, *, low: float | None = None, high: float | None = None, measured: bool = True) -> "Ratio":
        """A ratio; without ends its interval is the value alone."""
        ends = (mid if low is None else min(max(low, 0.0), mid), mid if high is None else max(high, mid))
        return cls(low=ends[0], mid=mid, high=ends[1], measured=measured, source=source)


NOT_MEASURED = Ratio(low=1.0, mid=1.0, high=1.0, measured=False, source="not measured, so nothing is saved by it")


class Ratios(_Frozen):
    """What is known of one placement against all layers.

    Attributes:
        placement: The placement in words.
        time: Training time.
        memory: Peak memory of training, the frozen model included.
        latency: Time that adapters, not merged, add to each token.
        adapter_size: Bytes of a saved adapter.
        run_memory_gb: Peak memory of an all-layer run, as measured, GB.
        adapter_mb: Size of an all-layer adapter, as measured, MB.
        adapter_latency_ms: Time that all-layer adapters add to each token, as measured, ms.
        where: Where all this was measured, in words.
    """

    placement: str = "the placement"
    time: Ratio = NOT_MEASURED
    memory: Ratio = NOT_MEASURED
    latency: Ratio = NOT_MEASURED
    adapter_size: Ratio = NOT_MEASURED
    run_memory_gb: _Amount | None = None
    adapter_mb: _Amount | None = None
    adapter_latency_ms: _Amount | None = None
    where: str = ""


class Range(_Frozen):
    """A result: `mid` from the measured values, `low` and `high` from the ends of their intervals; `None`: not known, or never."""

    low: float | None
    mid: float | None
    high: float | None


@dataclass(frozen=True)
class Formula:
    """One line of the model.

    Attributes:
        name: What it defines.
        unit: Its unit; `money` is in the reader's currency.
        expression: Arithmetic over inputs, ratios and lines above, and the functions of `FUNCTIONS`.
        title: What it is, for people; empty for a step on the way, which no one is shown.
        needs: Inputs without which it has no value.
    """

    name: str
    unit: str
    expression: str
    title: str = ""
    needs: tuple[str, ...] = ()


FUNCTIONS: dict[str, tuple[Callable[..., float | None], str, str]] = {
    "positive": (lambda x: 1.0 if x > 0 else 0.0, "(x) => (x > 0 ? 1 : 0)", "1 if x > 0, else 0"),
    "fits": (lambda need, room: 1.0 if need <= room else 0.0, "(need, room) => (need <= room ? 1 : 0)", "1 if need ≤ room, else 0"),
    "over": (
        lambda a, b: a / b if b is not None and a is not None and b > 0 else None,
        "(a, b) => (a !== null && b !== null && b > 0 ? a / b : null)",
        "a / b, and no value where b is not above 0",
    ),
    "zero": (lambda x: 0.0 if x is None else x, "(x) => (x === null ? 0 : x)", "x, and 0 where x has no value"),
}
"""For each function of the formulas: Python, JavaScript, and in words."""

FORMULAS = (
    Formula("gpu_hours", "GPU h / month", "runs_per_month * hours_per_run * gpus"),
    Formula("smaller_price", "money / GPU h", "smaller_gpu_price_per_hour / smaller_gpu_speed"),
    Formula(
        "moves",
        "0 or 1",
        "positive(run_memory_gb) * positive(smaller_gpu_memory_gb) * positive(gpu_price_per_hour - smaller_price)"
        " * fits(run_memory_gb * memory, smaller_gpu_memory_gb) * (1 - fits(run_memory_gb, smaller_gpu_memory_gb))",
    ),
    Formula("run_time", "share", "time * (1 + moves * (1 / smaller_gpu_speed - 1))"),
    Formula("training_saved", "money / month", "gpu_hours * gpu_price_per_hour * (1 - time)", "Shorter training"),
    Formula(
        "smaller_gpu_saved", "money / month", "moves * gpu_hours * time * (gpu_price_per_hour - smaller_price)", "Training on a smaller GPU"
    ),
    Formula(
        "serving_hours_saved",
        "GPU h / month",
        "tokens_per_month * adapter_latency_ms / 3600000 / concurrent_requests * (1 - latency)",
    ),
    Formula("serving_saved", "money / month", "serving_hours_saved * gpu_price_per_hour", "Faster answers"),
    Formula("storage_saved_gb", "GB", "adapters_served * adapter_mb / 1000 * (1 - adapter_size)", "Room for adapters saved"),
    Formula("storage_saved", "money / month", "storage_saved_gb * storage_price_per_gb_month", "Smaller adapters"),
    Formula("saved_month", "money / month", "training_saved + smaller_gpu_saved + serving_saved + storage_saved", "Saved a month"),
    Formula("saved_year", "money / year", "12 * saved_month", "Saved a year"),
    Formula("setup_cost", "money", "engineer_hours * engineer_rate + profile_hours * gpu_price_per_hour", "Set-up, once"),
    Formula("first_year", "money", "saved_year - setup_cost", "First year, set-up taken off"),
    Formula("payback_months", "months", "over(setup_cost, saved_month)", "Payback"),
    Formula("hours_saved", "h / month", "runs_per_month * hours_per_run * (1 - run_time)", "Hours of waiting saved a month"),
    Formula("gpu_hours_saved", "GPU h / month", "gpu_hours * (1 - run_time) + serving_hours_saved", "GPU hours saved a month"),
    Formula(
        "request_seconds_saved",
        "s / request",
        "zero(over(tokens_per_month, requests_per_month)) * adapter_latency_ms / 1000 * (1 - latency)",
        "Saved on each request",
    ),
    Formula("energy_saved", "kWh / month", "gpu_hours_saved * gpu_watts / 1000", "Energy saved a month", ("gpu_watts",)),
    Formula("co2_saved", "kg / month", "energy_saved * grid_gco2_per_kwh / 1000", "CO₂ saved a month", ("gpu_watts", "grid_gco2_per_kwh")),
)
"""The model, from the top down."""

SHOWN = tuple(formula for formula in FORMULAS if formula.title)
"""The lines that are results."""

_CODE: dict[str, CodeType] = {formula.name: compile(formula.expression, f"<{formula.name}>", "eval") for formula in FORMULAS}
_NAMESPACE: dict[str, Any] = {"__builtins__": {}, **{name: python for name, (python, _, _) in FUNCTIONS.items()}}
_ENDS: tuple[tuple[Literal["low", "mid", "high"], Literal["low", "mid", "high"]], ...] = (("low", "high"), ("mid", "mid"), ("high", "low"))


class Roi(_Frozen):
    """What a placement saves.

    Attributes:
        inputs: The reader's figures.
        ratios: What was measured.
        results: For each of `SHOWN` its range, from measured ratios alone.
        with_assumptions: The same with ratios that were not measured; `None` where there is none.
        assumptions: What of all this was not measured, in sentences.
    """

    inputs: RoiInputs
    ratios: Ratios
    results: dict[str, Range]
    with_assumptions: dict[str, Range] | None
    assumptions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of schema `layercard-roi/1`."""
        return {"schema": SCHEMA, **self.model_dump(mode="json"), "units": {formula.name: formula.unit for formula in SHOWN}}


def roi(inputs: RoiInputs, ratios: Ratios) -> Roi:
    """What a placement saves against all layers, by `FORMULAS`.

    Args:
        inputs: The reader's figures.
        ratios: What was measured.

    >>> half = Ratio.of(0.5, "measured on one GPU")
    >>> found = roi(RoiInputs(gpu_price_per_hour=2, runs_per_month=10, hours_per_run=5, engineer_hours=1, engineer_rate=25,
    ...                       profile_hours=0), Ratios(time=half))
    >>> found.results["saved_month"].mid, found.results["payback_months"].mid
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


def evaluate(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """All lines of `FORMULAS` for one set of inputs and ratios; a line whose `needs` are `None` is `None`.

    An input that is `None` counts as 0 in the lines that do without it.
    """
    known: dict[str, float | None] = {name: 0.0 if value is None else value for name, value in values.items()}
    for formula in FORMULAS:
        if any(values.get(name) is None for name in formula.needs):
            known[formula.name] = None
        else:
            known[formula.name] = eval(_CODE[formula.name], _NAMESPACE, known)
    return {formula.name: known[formula.name] for formula in FORMULAS}


def bound(inputs: RoiInputs, ratios: Ratios) -> dict[str, float | None]:
    """The inputs as the formulas take them: numbers, and what was measured where the reader gives nothing."""
    found = {name: value for name, value in inputs.model_dump().items() if name != "currency"}
    for name in ("run_memory_gb", "adapter_mb", "adapter_latency_ms"):
        if found[name] is None:
            found[name] = getattr(ratios, name)
    return {name: None if value is None else float(value) for name, value in found.items()}


def _ranges(inputs: RoiInputs, ratios: Ratios, *, only_measured: bool) -> dict[str, Range]:
    """Each shown line at the cautious ends of all ratios, at their values, and at the other ends."""
    values = bound(inputs, ratios)
    found = {}
    for name, end in _ENDS:
        shares = {
            ratio: getattr(getattr(ratios, ratio), end) if getattr(ratios, ratio).measured or not only_measured else 1.0 for ratio in RATIOS
        }
        found[name] = evaluate(values | shares)
    return {formula.name: _range([found[name][formula.name] for name, _ in _ENDS]) for formula in SHOWN}


def _range(ends: list[float | None]) -> Range:
    """In order of size; a payback that one end never reaches has no upper end."""
    known = [value for value in ends if value is not None and math.isfinite(value)]
    high = max(known) if len(known) == len(ends) else None
    return Range(low=min(known, default=None), mid=ends[1], high=high)


def _assumptions(inputs: RoiInputs, ratios: Ratios) -> Iterable[str]:
    for name in RATIOS:
        ratio: Ratio = getattr(ratios, name)
        if not ratio.measured:
            yield f"{name.replace('_', ' ')}: {ratio.source}"
    given = inputs.model_fields_set
    missing = [name for name in RoiInputs.model_fields if name not in given and name != "currency" and getattr(inputs, name) is not None]
    if missing:
        yield f"example figures, not given: {', '.join(missing)}"
    for name in ("run_memory_gb", "adapter_mb", "adapter_latency_ms"):
        if getattr(inputs, name) is not None:
            yield f"{name}: given by hand"
        elif getattr(ratios, name) is None:
            yield f"{name}: neither measured on an accelerator nor given, so it saves nothing"


def javascript() -> str:
    """The model as JavaScript: `layercardRoi(inputs, ratios)` gives `{results, with_assumptions}` as `roi` does.

    `inputs` holds the fields of `RoiInputs` as numbers or null, `ratios` is the JSON value of `Ratios`.
    """
    functions = "\n".join(f"  const {name} = {source};" for name, (_, source, _) in FUNCTIONS.items())
    names = ", ".join([*(name for name in RoiInputs.model_fields if name != "currency"), *RATIOS])
    lines = []
    for formula in FORMULAS:
        missing = " || ".join(f"given.{name} === null" for name in formula.needs)
        lines.append(f"    const {formula.name} = {f'{missing} ? null : ' if missing else ''}{formula.expression};")
    shown = json.dumps([formula.name for formula in SHOWN])
    return _TWIN % {
        "functions": functions,
        "names": names,
        "lines": "\n".join(lines),
        "results": ", ".join(formula.name for formula in SHOWN),
        "shown": shown,
        "ratios": json.dumps(RATIOS),
        "unmeasured": NOT_MEASURED.model_dump_json(),
    }


_TWIN = """const layercardRoi = (() => {
%(functions)s
  const shown = %(shown)s, names = %(ratios)s, unmeasured = %(unmeasured)s;
  const evaluate = (given) => {
    const known = Object.fromEntries(Object.entries(given).map(([name, value]) => [name, value === null ? 0 : value]));
    const { %(names)s } = known;
%(lines)s
    return { %(results)s };
  };
  const range = (ends) => {
    const known = ends.filter((value) => value !== null && Number.isFinite(value));
    return {
      low: known.length ? Math.min(...known) : null,
      mid: ends[1],
      high: known.length === ends.length ? Math.max(...known) : null,
    };
  };
  const ranges = (values, ratios, onlyMeasured) => {
    const found = ["high", "mid", "low"].map((end) => {
      const shares = names.map((name) => [name, ratios[name].measured || !onlyMeasured ? ratios[name][end] : 1]);
      return evaluate({ ...values, ...Object.fromEntries(shares) });
    });
    return Object.fromEntries(shown.map((name) => [name, range(found.map((one) => one[name]))]));
  };
  return (inputs, ratios) => {
    const values = { ...inputs };
    for (const name of ["run_memory_gb", "adapter_mb", "adapter_latency_ms"]) values[name] ??= ratios[name] ?? null;
    const assumed = names.some((name) => !ratios[name].measured && ratios[name].source !== unmeasured.source);
    return {
      results: ranges(values, ratios, true),
      with_assumptions: assumed ? ranges(values, ratios, false) : null,
    };
  };
})();
"""
