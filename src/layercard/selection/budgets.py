"""Limits as users write them (`12s`, `60%`, `500MiB`), read and turned into budgets on a card's costs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from layercard.cost.model import CostModel, Linear, What
from layercard.errors import SelectionError
from layercard.selection.solver import Budget

_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0}
_BYTES = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40}
_COUNT = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}


Limited = What | Literal["process"]
"""What a limit is on: a cost of a step, or the memory of the whole process, weights included."""


class Limit(NamedTuple):
    """A kind of limit: the cost, how users write it, its name in messages, and the forms that are understood."""

    what: Limited
    units: Mapping[str, float]
    label: str
    forms: str


LIMITS = {
    "max_time": Limit("time", _SECONDS, "step time", "seconds (12s, 800ms) or a share of all layers (60%)"),
    "max_memory": Limit("process", _BYTES, "memory", "bytes (6GB, 500MiB) or a share of all layers (60%)"),
    "max_training_memory": Limit("memory", _BYTES, "peak memory", "bytes (2GB, 500MiB) or a share of all layers (60%)"),
    "max_params": Limit("params", _COUNT, "number of adapter weights", "a number (300000, 2M) or a share of all layers (60%)"),
    "max_latency": Limit("latency", _SECONDS, "added latency", "seconds (5ms) or a share of all layers (60%)"),
}
"""The limits on costs, by their names in `Budgets`."""


@dataclass(frozen=True)
class Budgets:
    """What a placement may cost and must keep; text with its unit as on the command line, or numbers in the base unit.

    Attributes:
        max_time: Step time, in seconds or % of all layers.
        max_memory: Memory of the process that trains, the model's weights included, in bytes or % of all layers.
        max_training_memory: Peak memory above the frozen model, in bytes or % of all layers.
        max_params: Adapter weights, a count or % of all layers.
        max_latency: Latency that unmerged adapters add to each token, in seconds or % of all layers.
        min_performance: Performance kept, in % of all layers (95 or "95%"): the lower end of the interval of what is predicted reaches it.
        stream: `max_memory` is that of a streamed training: the blocks below the lowest adapted one stay on disk; block 0 is not adapted.
    """

    max_time: str | float | None = None
    max_memory: str | float | None = None
    max_params: str | float | None = None
    max_latency: str | float | None = None
    min_performance: str | float | None = None
    max_training_memory: str | float | None = None
    stream: bool = False

    def given(self) -> dict[str, Any]:
        """Those that are set."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) not in (None, False)}

    def resolve(self, cost: CostModel) -> tuple[Budget, ...]:
        """The limits on costs, in the unit of the cost model.

        Raises:
            SelectionError: A limit that cannot be read, or seconds where times are only known relative to each other.
        """
        if self.stream and self.max_memory is None:
            raise SelectionError("--stream says how --max-memory is meant, and there is none; give one, or leave --stream out")
        budgets = []
        for name, value in self.given().items():
            if name not in LIMITS:
                continue
            what, units, _, forms = LIMITS[name]
            text, option, form = _written(value), option_of(name), form_of(what, cost, stream=self.stream)
            match = re.fullmatch(r"(.*?[\d.])\s*(%|[a-zA-Z]*)", text)
            number, unit = (_number(match[1]), match[2].lower()) if match else (None, "")
            if number is None or unit not in (*units, "%"):
                raise SelectionError(f"{option} {text!r} cannot be read; give {forms}")
            if unit == "" and isinstance(value, str) and what != "params":
                usual = "MB" if units is _BYTES else "s"
                raise SelectionError(f"{option} {text} could be {text}{usual} or {text}%; write which")
            if unit != "%" and what in ("time", "latency") and not cost.absolute:
                raise SelectionError(
                    f"{option} {text} is in seconds, but the card has no measured cost, only relative ones from the shapes of its "
                    "modules; give a share of all layers such as 60%, or profile again with --cost"
                )
            if what == "process" and not cost.absolute:
                raise SelectionError(
                    f"{option} counts the model's weights, which a card without measured cost does not know; profile again with --cost, "
                    "or give --max-training-memory, which is above the frozen model"
                )
            every = range(len(cost.layers))
            limit = number / 100 * form_of(what, cost).of(every) if unit == "%" else number * units[unit]
            if not 0 < limit < float("inf"):
                raise SelectionError(f"{option} {text} leaves nothing to spend; give {forms} above 0")
            if what == "process" and self.stream:  # a streamed training adapts any block but the first: that one is over any limit
                form = Linear(form.fixed, form.through, (form.own[0] + limit, *form.own[1:]))
            budgets.append(Budget(name, form, limit))
        return tuple(budgets)

    def kept(self) -> float | None:
        """`min_performance` from 0 to 1.

        Raises:
            SelectionError: It is not a share above 0 and up to 100 %.
        """
        if self.min_performance is None:
            return None
        text = _written(self.min_performance)
        number = _number(text.removesuffix("%"))
        if number is None:
            raise SelectionError(f"--min-performance {text!r} is not a share; give per cent of all layers, such as 95%")
        if 0 < number <= 1 and not text.endswith("%"):
            raise SelectionError(f"--min-performance {text} is in per cent of all layers; did you mean {100 * number:g}%?")
        if not 0 < number <= 100:
            raise SelectionError(f"--min-performance {text} cannot be met; give more than 0% and at most 100% of all layers")
        return number / 100


def option_of(name: str) -> str:
    """`max_time` as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def form_of(what: Limited, cost: CostModel, *, stream: bool = False) -> Linear:
    """What a limit is on, as a linear form; `stream` is for the memory of the process."""
    return cost.linear_process(stream=stream) if what == "process" else cost.linear(what)


def amount(what: Limited, value: float, cost: CostModel) -> str:
    """A cost in words, with its share of all layers."""
    total = form_of(what, cost).of(range(len(cost.layers)))
    share = f"{100 * value / total:.1f}%" if total > 0 else "0%"
    if what in ("time", "latency") and not cost.absolute:
        return f"{share} of all layers"
    mebibytes = f"{value / 2**20:,.0f} MiB"
    number = {"memory": mebibytes, "process": mebibytes, "params": f"{value:,.0f}"}.get(what, f"{value:.3g} s")
    return f"{number} ({share} of all layers)"


def _written(value: Any) -> str:
    try:
        return str(value).strip()
    except ValueError:  # Python writes no whole number of over 4,300 digits
        return "a number of thousands of digits"


def _number(text: str) -> float | None:
    """The finite number in a text, if there is one."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None
