"""What sliders and layers picked by hand come to: a placement, what is predicted of it, and what changes between two."""

import re
import shlex
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layercard.card.card import LayerCard
from layercard.card.numbers import Json, percent, short
from layercard.errors import LayercardError
from layercard.records import Estimate
from layercard.selection.budgets import Budgets
from layercard.selection.pareto import pareto
from layercard.selection.placement import Placement
from layercard.selection.select import given, select

SECONDS = 0.06
"""Time limit of each search while a slider moves; the placement says how far it may be from the best."""
NO_LIMIT = 100.0
"""Slider position that means no limit, % of all layers."""
LIMITS = {"max_time": "step time", "max_memory": "peak memory", "max_params": "adapter weights", "max_latency": "added latency"}
"""The budgets that have a slider, and what they limit."""
WORDS = {f"--{name.replace('_', '-')}": words for name, words in LIMITS.items()} | {
    "--min-performance": "performance kept",
    "--k": "number of layers",
}
"""Options of the command line as the page calls them."""
SHARES = {"Step time": "step_time", "Peak memory": "peak_memory", "Adapter weights": "parameters", "Added latency": "latency"}
"""Predicted costs: what the page calls them, and their name in a placement."""
MEASURES = ("Performance kept", *SHARES, "Layers", "Layers in backward")
"""What is told of a placement."""


@dataclass(frozen=True)
class Wishes:
    """What the controls say.

    Attributes:
        objective: `balanced`, `performance` or `cost`.
        k: Number of layers; `None` for as many as are best.
        kept: Least performance kept, %; `None` for what the objective does by itself.
        limits: Budgets by name (`LIMITS`), % of all layers.
    """

    objective: str = "balanced"
    k: int | None = None
    kept: float | None = None
    limits: Mapping[str, float] | None = None

    def budgets(self) -> Budgets:
        """As the selection takes them."""
        given_limits = {name: f"{value:g}%" for name, value in (self.limits or {}).items()}
        return Budgets(**given_limits, min_performance=None if self.kept is None else f"{self.kept:g}%")


def wishes(objective: str, k: float, kept: float, time: float, memory: float, params: float, latency: float) -> Wishes:
    """The controls as they stand: 0 layers or 0 % kept means not given, 100 % of a cost no limit.

    >>> wishes("balanced", 0, 90, 100, 60, 100, 100)
    Wishes(objective='balanced', k=None, kept=90.0, limits={'max_memory': 60.0})
    """
    found = dict(zip(LIMITS, (time, memory, params, latency), strict=True))
    return Wishes(
        str(objective),
        int(k) or None,
        float(kept) or None,
        {name: float(value) for name, value in found.items() if value is not None and value < NO_LIMIT},
    )


@dataclass(frozen=True)
class Choice:
    """A placement, or in words why there is none."""

    placement: Placement | None
    problem: str | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The chosen layers; none where nothing meets the wishes."""
        return self.placement.layers if self.placement else ()


def choose(card: LayerCard, wanted: Wishes, seconds: float = SECONDS) -> Choice:
    """The placement that the selection gives, or what it says where there is none."""
    try:
        return Choice(select(card, objective=wanted.objective, k=wanted.k, budgets=wanted.budgets(), seconds=seconds))
    except LayercardError as error:
        return Choice(None, page_words(str(error)))


def by_hand(card: LayerCard, layers: Iterable[Any]) -> Choice:
    """The placement of the layers that were picked, or what is wrong with them."""
    try:
        return Choice(given(card, [int(layer) for layer in layers]))
    except (LayercardError, ValueError) as error:
        return Choice(None, str(error))


def page_words(message: str) -> str:
    """A message of the selection with options of the command line in the page's words.

    >>> page_words("no placement keeps --max-memory 32 MiB; lower --min-performance or allow more")
    'no placement keeps peak memory 32 MiB; lower performance kept or allow more'
    """
    return re.sub(r"--[a-z-]+", lambda found: WORDS.get(found[0], found[0]), message)


def command_line(wanted: Wishes, card_name: str) -> str:
    """The `layercard select` command that makes the same choice."""
    options = ["--objective", wanted.objective, *(["--k", str(wanted.k)] if wanted.k else [])]
    for name, value in wanted.budgets().given().items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(["layercard", "select", card_name, *options, "-o", "placement.json"])


def rows(placement: Json) -> dict[str, str]:
    """What is predicted of a placement, in words, for each of `MEASURES`."""
    predicted = placement["predicted"]
    kept, depth = Estimate.read(predicted.get("performance_kept")), int(placement["model"]["layers"])
    return dict(
        zip(
            MEASURES,
            (
                "not known" if kept is None else percent(kept),
                _cost(predicted["step_time"], "seconds"),
                _cost(predicted["peak_memory"], "bytes"),
                _cost(predicted["parameters"], "count"),
                _cost(predicted["latency"], "seconds"),
                f"{len(placement['layers'])} of {depth}",
                str(predicted["layers_in_backward"]).replace("/", " of "),
            ),
            strict=True,
        )
    )


def changes(chosen: Json, other: Json) -> list[tuple[str, str, str, str]]:
    """Rows of a table: measure, the chosen placement, the other one, and the difference in points or numbers."""
    one, two = rows(chosen), rows(other)
    kept = [float(placement["predicted"]["performance_kept"]["value"]) for placement in (chosen, other)]
    shares = [[float(placement["predicted"][key]["share"]) for placement in (chosen, other)] for key in SHARES.values()]
    differences = [
        *(_points(*pair) for pair in (kept, *shares)),
        _count(len(other["layers"]) - len(chosen["layers"])),
        _count(_backward(other) - _backward(chosen)),
    ]
    return [(name, one[name], two[name], differences[at]) for at, name in enumerate(MEASURES)]


class Fronts:
    """The front of each card that was opened, made once and kept for the next `most` cards."""

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._found: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def known(self, digest: str) -> dict[str, Any] | None:
        """The front of the card with this digest as JSON, if it was made before."""
        return self._found.get(digest)

    def of(self, digest: str, card: LayerCard, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
        """The front of a card as JSON; two who ask at once wait for one search."""
        with self._lock:
            if digest not in self._found:
                self._found[digest] = pareto(card, progress=progress).to_json()
                while len(self._found) > self._most:
                    self._found.pop(next(iter(self._found)))
            return self._found[digest]


def _cost(found: Mapping[str, Any], unit: str) -> str:
    amount, share = found.get(unit), 100 * float(found["share"])
    if amount is None:
        return f"{share:.0f}%"
    size = {"bytes": f"{amount / 2**20:,.0f} MiB", "count": f"{amount:,}"}.get(unit, f"{short(amount)} s")
    return f"{share:.0f}% · {size}"


def _points(chosen: float, other: float) -> str:
    found = 100 * (other - chosen)
    return "same" if abs(found) < 0.05 else f"{'+' if found > 0 else '−'}{abs(found):.1f} points"


def _count(difference: int) -> str:
    return "same" if difference == 0 else f"{'+' if difference > 0 else '−'}{abs(difference)}"


def _backward(placement: Json) -> int:
    return int(str(placement["predicted"]["layers_in_backward"]).partition("/")[0])


def picked(layers: Sequence[int]) -> list[str]:
    """Layers as the boxes of the page name them."""
    return [str(layer) for layer in layers]
