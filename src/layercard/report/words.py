"""What reports call things: the measures of a layer (`measures.toml`), and times, sizes and amounts in words."""

import math
import tomllib
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from layercard.card.card import LayerCard
from layercard.cost.model import CostModel
from layercard.errors import visible
from layercard.records import Estimate

if TYPE_CHECKING:
    from jinja2 import Template


class Measure(NamedTuple):
    """One measure of a layer: its name in the card, its name for people, how to read it, and whether its axes are logarithmic."""

    key: str
    title: str
    reading: str
    wide: bool = False


_TABLE = tomllib.loads(files("layercard.report").joinpath("measures.toml").read_text(encoding="utf-8"))
MEASURES = {key: Measure(key, **entry) for key, entry in _TABLE.items()}
"""All measures in the order of a report."""


def title_of(key: str) -> str:
    """What people call a measure; its own name where it is not one of `MEASURES`."""
    return MEASURES[key].title if key in MEASURES else key


def measured(card: LayerCard) -> list[Measure]:
    """The measures that at least one layer of the card has."""
    return [measure for measure in MEASURES.values() if any(card.profile(measure.key))]


def read_on(card: LayerCard, measure: Measure) -> Measure:
    """A measure whose reading says whether it is cross-fitted on this card, as far as the card says so."""
    if not card.cross_fitted or measure.key == "training_probe":
        return measure
    words = (
        "Cross-fitted: each half of the records is measured with the steps of the other."
        if measure.key in card.cross_fitted
        else "Not cross-fitted: it describes the records themselves."
    )
    return measure._replace(reading=f"{measure.reading} {words}")


def bar_fractions(values: Sequence[Estimate | None], *, wide: bool = False) -> list[float | None]:
    """Lengths of bars from 0 to 1: proportional to the values, or to their logarithm where they span orders of magnitude (`wide`).

    Negative values get no bar. On a logarithmic scale the smallest positive value gets a short bar.
    """
    positive = [value.value for value in values if value is not None and value.value > 0]
    top, bottom = max(positive, default=1.0), min(positive, default=1.0)

    def fraction(value: float) -> float:
        if value <= 0:
            return 0.0
        if wide and top > bottom:
            return 0.1 + 0.9 * (math.log(value) - math.log(bottom)) / (math.log(top) - math.log(bottom))
        return value / top

    return [None if value is None else fraction(value.value) for value in values]


def template(name: str, *, html: bool = True, **filters: Callable[..., str]) -> "Template":
    """A file of `templates/`; with `html`, whatever is put into it is escaped, and what cannot be seen is shown as an escape."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    def finalize(value: Any) -> Any:
        return visible(value) if type(value) is str else value  # text of the templates themselves is a class of its own

    environment = Environment(
        loader=PackageLoader("layercard.report"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize if html else None,
    )
    environment.filters |= filters
    return environment.get_template(name)


def seconds(value: float, cost: CostModel) -> str:
    """A time with its unit, or a share of the step of all layers where nothing was measured."""
    if not cost.absolute:
        return f"{100 * value:.2f} %"
    if value >= 1 or value == 0:
        return f"{value:.2f} s"
    return f"{1e3 * value:.1f} ms" if value >= 1e-4 else f"{1e6 * value:.1f} µs"


def size(value: float) -> str:
    """Bytes with a unit.

    >>> size(3_500_000), size(900)
    ('3.3 MiB', '0.9 KiB')
    """
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value / 1024:.1f} KiB"


def counted(count: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "thread"), counted(2, "thread")
    ('1 thread', '2 threads')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def device_of(cost: CostModel) -> str:
    """The device of a cost, with its threads where it has some."""
    threads = [counted(cost.threads, "thread")] if cost.threads else []
    return ", ".join([cost.device or "a device without a name", *threads])


def signed(value: float, digits: int = 2) -> str:
    """A number with a real minus sign, and without one on zero.

    >>> signed(-0.25), signed(-0.001), signed(1.25, 1)
    ('−0.25', '0.00', '1.2')
    """
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def amount(value: float | None) -> str:
    """A result of the calculator, as the script of the page writes it too.

    >>> [amount(value) for value in (None, 1234.56, 12.345, 0.0814)]
    ['–', '1,235', '12.3', '0.081']
    """
    if value is None:
        return "–"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 3 if abs(value) < 1 else 2
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(5.2), duration(400), duration(9000)
    ('5 s', '6.7 min', '2.5 h')
    """
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
