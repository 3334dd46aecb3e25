"""What each strategy chooses: a card, the peers' scores and a number of layers or a budget to a set of layers."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from layercard.card.card import LayerCard, cost_of
from layercard.errors import BenchmarkError
from layercard.selection.budgets import Budgets
from layercard.selection.select import predict, select
from layercard.selection.strategies import ALIASES, strategy_layers, top_layers
from layercard.trials.peers import PEERS
from layercard.trials.rates import RATE_COUNTS, nearest_count
from layercard.trials.storage import Storage

FIXED = ("random", "uniform", "last", "middle", "first", "all")
OURS = ("performance", "balanced")
SCORES = (*PEERS, "resnorm")
STRATEGIES = (*FIXED, *OURS, *SCORES)
EQUAL_PARAMETERS = "performance_equal_parameters"
"""Our choice with the rank raised until it has as many parameters as all layers at the usual rank."""
UNIFORM_ABOVE = "uniform_above"
"""Evenly spread above the lowest layer that a time budget allows, with as many layers as our choice under that budget."""
KNOWN = (*STRATEGIES, EQUAL_PARAMETERS, UNIFORM_ABOVE)
LABELS = {
    "last": "last (bottom)",
    "first": "first (top)",
    "middle": "middle (closest to the middle)",
    "performance": "ours (performance)",
    "balanced": "ours (balanced)",
    "gradient_norm": "gradient norm (aletheia-lora)",
    "activation_norm": "activation norm (Act-LoRA)",
    "one_minus_cka": "1 - CKA",
    "snr": "signal to noise (Spectrum)",
    EQUAL_PARAMETERS: "ours (performance), parameters of all",
    UNIFORM_ABOVE: "uniform above the lowest allowed",
}


@dataclass(frozen=True)
class Choice:
    """One cell of a table before it is measured.

    Attributes:
        task: Name of the task.
        strategy: One of `KNOWN`.
        k: How many layers were asked for.
        budget: Step time allowed, in % of all layers; `None` without a budget.
        seed: Of the data order, the adapters' start, and the random strategy.
        layers: What was chosen.
        rank: Rank of each adapter.
        predicted: Performance kept as the task's card predicts it, % of all layers.
    """

    task: str
    strategy: str
    k: int
    budget: float | None
    seed: int
    layers: tuple[int, ...]
    rank: int
    predicted: float | None = None

    @property
    def rate_count(self) -> int:
        """The number of layers whose learning rate is used."""
        return nearest_count(len(self.layers), RATE_COUNTS) if self.strategy != "all" else len(self.layers)


def check_strategies(strategies: Sequence[str]) -> tuple[str, ...]:
    """Names as the benchmark uses them; `bottom` and `top` are understood.

    Raises:
        BenchmarkError: An unknown name.
    """
    for name in strategies:
        if name not in KNOWN and name not in ALIASES:
            near = difflib.get_close_matches(name, [*KNOWN, *ALIASES], n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(KNOWN)}"
            raise BenchmarkError(f"strategy {name!r} is unknown; {hint}")
    return tuple(dict.fromkeys(ALIASES.get(name, name) for name in strategies))


class Chooser:
    """Applies strategies to the card and scores of one task, as they lie in a benchmark's storage."""

    def __init__(self, storage: Storage, task: str, rank: int) -> None:
        self.task, self.rank = task, rank
        self.card = LayerCard.from_json(storage.read(card_name(task), "card"))
        self.scores = storage.read(scores_name(task), "scores")["scores"]
        self.scores["resnorm"] = self.card.values("resnorm")
        self.depth = self.card.model.layers

    def choose(self, strategy: str, k: int, seed: int, budget: float | None = None) -> Choice:
        """The layers that a strategy takes."""
        rank = max(1, round(self.rank * self.depth / k)) if strategy == EQUAL_PARAMETERS else self.rank
        layers = self._budgeted(strategy, k, budget) if budget is not None else self._layers(strategy, k, seed)
        predicted = 100 * predict(self.card, layers)["performance_kept"]["value"]
        return Choice(self.task, strategy, k, budget, seed, tuple(layers), rank, predicted)

    def _layers(self, strategy: str, k: int, seed: int) -> Sequence[int]:
        if strategy in FIXED:
            return strategy_layers(strategy, self.depth, k, seed)
        if strategy == UNIFORM_ABOVE:
            return strategy_layers("uniform", self.depth, k)
        if strategy in ("performance", EQUAL_PARAMETERS):
            return select(self.card, k=k, objective="performance").layers
        if strategy == "balanced":
            return select(self.card, objective="balanced").layers
        return top_layers(self.scores[strategy], k)

    def fits(self, budget: float) -> bool:
        """Whether any placement keeps a step-time budget, in % of all layers."""
        time = cost_of(self.card).linear("time")
        least = min(time.of([layer]) for layer in range(self.depth))
        return least <= budget / 100 * time.of(range(self.depth))

    def _budgeted(self, strategy: str, k: int, budget: float) -> Sequence[int]:
        ours = select(self.card, objective="performance", budgets=Budgets(max_time=f"{budget:g}%")).layers
        return ours if strategy == "performance" else self._uniform_above(len(ours), budget)

    def _uniform_above(self, count: int, budget: float) -> list[int]:
        time = cost_of(self.card).linear("time")
        allowed = budget / 100 * time.of(range(self.depth))
        for lowest in range(self.depth - count + 1):
            span = self.depth - lowest
            layers = [lowest + at for at in strategy_layers("uniform", span, count)]
            if time.of(layers) <= allowed:
                return layers
        return strategy_layers("last", self.depth, count)


def card_name(task: str) -> str:
    """Where the card of a task lies."""
    return f"cards/{task}.json"


def scores_name(task: str) -> str:
    """Where the peers' scores of a task lie."""
    return f"scores/{task}.json"
