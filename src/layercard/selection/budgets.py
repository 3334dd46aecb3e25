"""Limits as users write them (`12s`, `60%`, `500MiB`), read and turned into budgets on a card's costs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from layercard.cost.model import CostModel, What
from layercard.errors import SelectionError
from layercard.selection.solver import Budget

_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0}
_BYTES = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40}
_COUNT = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
_KINDS: dict[str, tuple[What, Mapping[str, float], str, str]] = {
    "max_time": ("time", _SECONDS, "step time", "seconds (0.8, 12s, 800ms) or a share of all layers (60%)"),
    "max_memory": ("memory", _BYTES, "peak memory", "bytes (2GB, 500MiB) or a share of all layers (60%)"),
    "max_params": ("params", _COUNT, "number of adapter weights", "a number (300000, 2M) or a share of all layers (60%)"),
    "max_latency": ("latency", _SECONDS, "added latency", "seconds (0.002, 5ms) or a share of all layers (60%)"),
}


@dataclass(frozen=True)
class Budgets:
    """What a placement may cost and must keep; text as on the command line, or numbers in the base unit.

    Attributes:
        max_time: Step time, in seconds or % of all layers.
        max_memory: Peak memory above the frozen model, in bytes or % of all layers.
        max_params: Adapter weights, a count or % of all layers.
        max_latency: Latency that unmerged adapters add to each token, in seconds or % of all layers.
        min_performance: Predicted performance kept, in % of all layers (95 or "95%").
    """

    max_time: str | float | None = None
    max_memory: str | float | None = None
    max_params: str | float | None = None
    max_latency: str | float | None = None
    min_performance: str | float | None = None

    def given(self) -> dict[str, Any]:
        """Those that are set."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    @property
    def limits_cost(self) -> bool:
        """Whether any cost is limited."""
        return any(name in _KINDS for name in self.given())

    def resolve(self, cost: CostModel) -> tuple[Budget, ...]:
        """The limits on costs, in the unit of the cost model.

        Raises:
            SelectionError: A limit that cannot be read, or seconds where times are only known relative to each other.
        """
        return tuple(_budget(name, text, cost) for name, text in self.given().items() if name in _KINDS)

    def kept(self) -> float | None:
        """`min_performance` from 0 to 1.

        Raises:
            SelectionError: It is no share above 0 and up to 100 %.
        """
        if self.min_performance is None:
            return None
        text = str(self.min_performance).strip()
        number = _number(text.removesuffix("%"))
        if number is None:
            raise SelectionError(f"--min-performance {text!r} is no share; give per cent of all layers, such as 95%")
        if 0 < number <= 1 and not text.endswith("%"):
            raise SelectionError(f"--min-performance {text} is in per cent of all layers; did you mean {100 * number:g}%?")
        if not 0 < number <= 100:
            raise SelectionError(f"--min-performance {text} cannot be met; give more than 0% and at most 100% of all layers")
        return number / 100


def option(name: str) -> str:
    """`max_time` as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def amount(what: What, value: float, cost: CostModel) -> str:
    """A cost in words, with its share of all layers."""
    whole = cost.linear(what).of(range(len(cost.layers)))
    share = f"{100 * value / whole:.1f}%" if whole > 0 else "0%"
    if what in ("time", "latency") and not cost.absolute:
        return f"{share} of all layers"
    if what == "memory":
        return f"{value / 2**20:,.0f} MiB ({share} of all layers)"
    if what == "params":
        return f"{value:,.0f} ({share} of all layers)"
    return f"{value:.3g} s ({share} of all layers)"


def label(name: str) -> str:
    """What a budget limits, in words."""
    return _KINDS[name][2]


def kind(name: str) -> What:
    """The cost that a budget limits."""
    return _KINDS[name][0]


def _budget(name: str, given: str | float, cost: CostModel) -> Budget:
    what, units, _, forms = _KINDS[name]
    text = str(given).strip()
    form = cost.linear(what)
    if text.endswith("%"):
        share = _number(text[:-1])
        limit = None if share is None else share / 100 * form.of(range(len(cost.layers)))
    else:
        found = re.fullmatch(r"(.*?[\d.])\s*([a-zA-Z]*)", text)
        number = _number(found[1]) if found else None
        scale = units.get(found[2].lower()) if found else None
        limit = None if number is None or scale is None else number * scale
        if limit is not None and what in ("time", "latency") and not cost.absolute:
            raise SelectionError(
                f"{option(name)} {text} is in seconds, but the card has no measured cost, only relative ones from the shapes of its "
                "modules; give a share of all layers such as 60%, or profile again with --cost"
            )
    if limit is None:
        raise SelectionError(f"{option(name)} {text!r} cannot be read; give {forms}")
    if not 0 < limit < float("inf"):
        raise SelectionError(f"{option(name)} {text} leaves nothing to spend; give {forms} above 0")
    return Budget(name, form, limit)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value == value and abs(value) != float("inf") else None
