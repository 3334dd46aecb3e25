"""Whether the Layer Card of one data set serves another: cards of one model side by side, from the cards alone.

For every pair of cards: Spearman's rank correlation of each measure's layer profile, the layers that both have among their best k,
and what is lost on B when its layers are chosen from A's card, as B's card predicts it. Then a verdict in words.
"""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from layercard import records
from layercard.card.card import LayerCard
from layercard.errors import CardError
from layercard.selection.select import performance_kept, probe_measure, select, set_similarity
from layercard.statistics.coverage import coverage, demand, smoothing_kernel
from layercard.statistics.ranks import noise, noise_scale, plain_p_value, shift_p_value, spearman, spearman_rows, stretches

SCHEMA = "layercard-transfer/1"
REPEATS = 2000
MEASURE = "gain_estimate"
"""What placements are chosen from, and so what the verdict looks at."""
TOLERANCE = 2.0
"""Loss of performance, in points of all layers' performance, that does not matter: trained runs differ by as much from seed to seed."""
AGREES = 0.5
"""Rank correlation below which two profiles rank layers differently."""
SURE = 0.05
"""p value from which on agreement may be chance."""
STABLE = 0.8
"""Split-half rank correlation of a card's own ranking below which the card is no evidence."""
REUSE, AGAIN, UNKNOWN = "reuse the card", "profile again", "not enough evidence"
_NORMAL_95 = 2 * 1.959964
"""Width of a 95 % interval in standard deviations."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement(Estimate):
    """Spearman's rank correlation of two layer profiles.

    Attributes:
        p: Share of the shifted profiles that agree at least as well (`statistics.ranks.shift_p_value`).
        p_plain: The p value for independent layers; too small, since neighbouring layers are alike.
    """

    p: float
    p_plain: float


@dataclass(frozen=True)
class Overlap:
    """Layers among the best k of both cards: how many, which, and how many chance would give (`k² / L`)."""

    k: int
    shared: int
    layers: tuple[int, ...]
    expected: float


@dataclass(frozen=True)
class Swap:
    """What happens on a card's data when its layers are chosen from another card.

    Attributes:
        source: Name of the card that the layers are chosen from.
        target: Name of the card that says what they are worth.
        layers: The choice of the source.
        own: The choice of the target itself.
        kept: Performance that `layers` keep on the target, % of all layers.
        kept_own: Performance that `own` keeps there, %.
        lost: `kept_own − kept` in points, with its interval over the target's sampling error.
    """

    source: str
    target: str
    layers: tuple[int, ...]
    own: tuple[int, ...]
    kept: float
    kept_own: float
    lost: Estimate


@dataclass(frozen=True)
class Pair:
    """Two cards compared; `word` is the verdict and `reason` says why."""

    a: str
    b: str
    measures: dict[str, Agreement]
    top: Overlap
    swaps: tuple[Swap, Swap]
    word: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """The pair as a JSON object."""
        found = {name: value for name, value in asdict(self).items() if name not in ("word", "reason")}
        return {**found, "verdict": {"word": self.word, "reason": self.reason}}


@dataclass(frozen=True)
class Transfer:
    """Several cards of one model compared, each pair of them.

    Attributes:
        names: What the cards are called.
        cards: The cards.
        measure: What `matrix` and the best k are of.
        matrix: Spearman's correlation of that measure, one row a card.
        lost: Points lost on the card of the column with the choice from the card of the row; 0 on the diagonal.
        pairs: Every pair.
    """

    names: tuple[str, ...]
    cards: tuple[LayerCard, ...]
    measure: str
    k: int
    matrix: tuple[tuple[float, ...], ...]
    lost: tuple[tuple[float, ...], ...]
    pairs: tuple[Pair, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of schema `layercard-transfer/1`."""
        return {
            "schema": SCHEMA,
            "model": self.cards[0].model.model_dump(),
            "cards": [
                {"name": name, "data": card.data.model_dump(), "dtype": card.settings.get("dtype"), "stability": dict(card.stability)}
                for name, card in zip(self.names, self.cards, strict=True)
            ],
            "measure": self.measure,
            "k": self.k,
            "matrix": [list(row) for row in self.matrix],
            "lost": [list(row) for row in self.lost],
            "pairs": [pair.to_json() for pair in self.pairs],
        }


def transfer(
    cards: Sequence[tuple[str, LayerCard]], *, k: int = 5, measure: str = MEASURE, across_dtypes: bool = False, seed: int = 0
) -> Transfer:
    """Compare cards of one model.

    Args:
        cards: Names and cards, at least two.
        k: How many layers a placement takes, and how many best layers are compared.
        measure: Which profile the matrix and the best k are of; the verdict always looks at the gain estimate.
        across_dtypes: Whether cards of one model in several dtypes may be compared; their weights differ by rounding.
        seed: Of the bootstrap.

    Raises:
        CardError: Fewer than two cards, one card twice, cards of different models, or a measure that a card does not have.
        SelectionError: k outside 1 to the number of layers.
    """
    check_cards(cards, across_dtypes)
    check_measure([card for _, card in cards], measure)
    chosen = {name: select(card, k=k, objective="performance").layers for name, card in cards}
    pairs = tuple(_pair(a, b, chosen, k, measure, seed) for a, b in combinations(cards, 2))
    at = {name: row for row, (name, _) in enumerate(cards)}
    matrix, lost = np.eye(len(cards)), np.zeros((len(cards), len(cards)))
    for pair in pairs:
        matrix[at[pair.a], at[pair.b]] = matrix[at[pair.b], at[pair.a]] = pair.measures[measure].value
        for swap in pair.swaps:
            lost[at[swap.source], at[swap.target]] = swap.lost.value
    names, values = zip(*cards, strict=True)
    return Transfer(names, values, measure, k, _rows(matrix), _rows(lost), pairs)


def check_cards(cards: Sequence[tuple[str, LayerCard]], across_dtypes: bool = False) -> None:
    """Make sure that there are at least two different cards, and all of one model.

    Raises:
        CardError: They are not.
    """
    if len(cards) < 2:
        found = f"only {cards[0][0]}" if cards else "no card"
        raise CardError(f"transfer compares at least two cards, found {found}; name another card of the same model")
    for (name, card), (other_name, other) in combinations(cards, 2):
        if name == other_name or card == other:
            raise CardError(f"{name} and {other_name} are the same card; name cards of different data")
    name, card = cards[0]
    for other_name, other in cards[1:]:
        if card.model.fingerprint != other.model.fingerprint:
            _check_dtypes(name, card, other_name, other, across_dtypes)


def _check_dtypes(name: str, card: LayerCard, other_name: str, other: LayerCard, across_dtypes: bool) -> None:
    """Let two cards with different weights pass if these are one model's in two dtypes, and that is wanted."""
    one, two = ((c.model, c.settings.get("dtype")) for c in (card, other))
    fingerprints = f"fingerprints {one[0].fingerprint} and {two[0].fingerprint}"
    if (_stem(one[0].name), one[0].layers) != (_stem(two[0].name), two[0].layers):
        raise CardError(
            f"{name} is of {one[0].name} ({one[0].layers} layers) and {other_name} of {two[0].name} ({two[0].layers} layers), "
            f"{fingerprints}; layers of different models cannot be compared, so profile one model on both data sets"
        )
    if one[1] == two[1]:
        raise CardError(
            f"{name} and {other_name} are both of {one[0].name} in {one[1]}, but its weights differ ({fingerprints}); "
            "profile the same weights on both data sets"
        )
    if not across_dtypes:
        raise CardError(
            f"{name} is of {one[0].name} in {one[1]} and {other_name} in {two[1]} ({fingerprints}); "
            "profile both in one dtype, or pass --across-dtypes to compare them all the same"
        )


def _stem(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def check_measure(cards: Sequence[LayerCard], measure: str) -> None:
    """Raise `CardError` unless all cards have the measure."""
    shared = shared_measures(cards)
    if measure not in shared:
        near = difflib.get_close_matches(measure, shared, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(shared)}"
        raise CardError(f"not all cards have the measure {measure!r}; {hint}")


def shared_measures(cards: Sequence[LayerCard]) -> list[str]:
    """Measures with an interval that every layer of all cards has, in the order of the card."""
    names = [name for name, entry in cards[0].layers[0] if isinstance(entry, records.Estimate)]
    return [name for name in names if all(isinstance(getattr(layer, name), records.Estimate) for card in cards for layer in card.layers)]


def agreement(a: LayerCard, b: LayerCard, measure: str, seed: int = 0) -> Agreement:
    """Spearman's correlation of a measure's profiles in two cards.

    The interval resamples stretches of neighbouring layers and moves each value by its own sampling error, drawn from the interval
    in the card; where the card knows how far halves of its records agree, the noise is scaled to that. Noise only ever lowers a rank
    correlation, so the interval reaches rather too low than too high.
    """
    x, y = np.array(a.values(measure)), np.array(b.values(measure))
    rng = np.random.default_rng(seed)
    drawn = stretches(len(x), REPEATS, rng)
    one, two = (np.take_along_axis(side + _order_noise(card, measure, rng), drawn, axis=1) for side, card in ((x, a), (y, b)))
    found = spearman(x, y)
    return Agreement(*_with_interval(found, spearman_rows(one, two)), p=shift_p_value(x, y), p_plain=plain_p_value(found, len(x)))


def _order_noise(card: LayerCard, measure: str, rng: np.random.Generator) -> np.ndarray:
    """Sampling error of a profile, `[REPEATS, L]`, scaled so that it upsets the order as much as halving the records did."""
    deviations = _deviations(card, measure)
    kernel = smoothing_kernel(len(deviations)) if measure == "gain_estimate" else None  # averages over neighbours err like neighbours
    halves = card.stability.get(measure)
    scale = 1.0 if halves is None else noise_scale(np.array(card.values(measure)), deviations, halves, rng, kernel)
    return scale * noise(deviations, REPEATS, rng, kernel)


def overlap(a: LayerCard, b: LayerCard, measure: str, k: int) -> Overlap:
    """Layers among the k largest values of a measure in both cards."""
    best = [set(np.argsort(-np.array(card.values(measure)), kind="stable")[:k].tolist()) for card in (a, b)]
    both = tuple(sorted(best[0] & best[1]))
    return Overlap(k, len(both), both, k * k / a.model.layers)


def swap(source: str, target: str, card: LayerCard, layers: tuple[int, ...], own: tuple[int, ...], seed: int = 0) -> Swap:
    """What `layers` are worth on the data of `card`, against its `own` choice.

    The interval of what is lost comes from the sampling error of the step probe; the coupling is taken as it is in the card.
    """
    similar, probe = set_similarity(card), probe_measure(card)
    gains = np.array(card.values(probe))
    moved = gains + noise(_deviations(card, probe), REPEATS, np.random.default_rng(seed))

    def kept(values: np.ndarray, chosen: tuple[int, ...]) -> float:
        weights = demand(values)
        return 100 * performance_kept(coverage(similar, weights, chosen) / float(weights.sum()))[0]

    value, value_own = kept(gains, layers), kept(gains, own)
    lost = np.array([kept(row, own) - kept(row, layers) for row in moved])
    return Swap(source, target, layers, own, value, value_own, Estimate(*_with_interval(value_own - value, lost)))


def _pair(a: tuple[str, LayerCard], b: tuple[str, LayerCard], chosen: dict[str, tuple[int, ...]], k: int, measure: str, seed: int) -> Pair:
    (name_a, card_a), (name_b, card_b) = a, b
    measures = {name: agreement(card_a, card_b, name, seed) for name in shared_measures([card_a, card_b])}
    swaps = (
        swap(name_a, name_b, card_b, chosen[name_a], chosen[name_b], seed),
        swap(name_b, name_a, card_a, chosen[name_b], chosen[name_a], seed),
    )
    word, reason = verdict(measures[MEASURE], swaps, {name: card.stability.get(MEASURE) for name, card in (a, b)})
    return Pair(name_a, name_b, measures, overlap(card_a, card_b, measure, k), swaps, word, reason)


def verdict(ranks: Agreement, swaps: Sequence[Swap], stability: dict[str, float | None]) -> tuple[str, str]:
    """Whether one card serves both data sets, and why.

    "profile again" where it is clear that something is lost or that layers rank differently, "reuse the card" where it is clear that
    they do not, "not enough evidence" in between.

    Args:
        ranks: Agreement of the gain estimates.
        swaps: Both directions.
        stability: For each card the split-half correlation of its own gain estimate; `None` where it is not known.
    """
    worst = max(swaps, key=lambda found: found.lost.value)
    lost = f"{worst.source}'s layers lose {_points(worst.lost)} of all layers' performance on {worst.target}"
    agree = f"Spearman of the gain estimates {ranks.value:.2f} ({ranks.low:.2f} to {ranks.high:.2f})"
    clear = next((found for found in swaps if found.lost.low > TOLERANCE), None)
    if clear is not None:
        return AGAIN, f"{clear.source}'s layers lose {_points(clear.lost)} on {clear.target}, more than {TOLERANCE:g} points"
    if ranks.high < AGREES:
        return AGAIN, f"the data sets rank layers differently: {agree}"
    doubts = [
        f"the ranking of {name} is not stable (its halves agree with {found:.2f}), so profile more records"
        for name, found in stability.items()
        if found is not None and found < STABLE
    ]
    if ranks.value < AGREES:
        doubts.append(f"{agree} is low")
    elif ranks.low <= 0:
        doubts.append(f"{agree} may be zero")
    if ranks.p > SURE:
        doubts.append(f"profiles as smooth as these agree as well by chance (p = {ranks.p:.2f})")
    doubts.extend(
        f"{found.source}'s layers may lose over {TOLERANCE:g} points on {found.target}: {_points(found.lost)}"
        for found in swaps
        if found.lost.high > TOLERANCE
    )
    if doubts:
        return UNKNOWN, "; ".join(doubts)
    return REUSE, f"{lost}; {agree}, p = {ranks.p:.3f}"


def _points(lost: Estimate) -> str:
    return f"{lost.value:.1f} points ({lost.low:.1f} to {lost.high:.1f})"


def _deviations(card: LayerCard, measure: str) -> np.ndarray:
    """Standard deviation of each layer's value, from the width of its interval."""
    found = [getattr(layer, measure) for layer in card.layers]
    return np.array([max(entry.high - entry.low, 0.0) for entry in found]) / _NORMAL_95


def _with_interval(value: float, resampled: np.ndarray) -> tuple[float, float, float]:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return value, min(value, float(low)), max(value, float(high))


def _rows(matrix: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
