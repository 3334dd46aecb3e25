"""Whether the Layer Card of one data set serves another: cards of one model side by side, from the cards alone.

For every pair of cards: Spearman's rank correlation of each measure's layer profile, the layers that both have among their best k,
and what is lost on B when its layers are chosen from A's card, as B's card predicts it. Then a verdict in words.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from layercard.card.card import LayerCard, rounding_between
from layercard.errors import CardError, suggestion
from layercard.records import Estimate, Part, Record
from layercard.selection.select import performance_kept, probe_measure, select, set_similarity
from layercard.statistics.coverage import coverage, demand, smoothing_kernel
from layercard.statistics.ranks import drawn_stretches, noise, noise_scale, plain_p_value, shift_p_value, spearman, spearman_rows

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
"""Split-half rank correlation of a card's own ranking below which the card says nothing."""
REUSE, AGAIN, UNKNOWN = "reuse the card", "profile again", "not enough evidence"


class Interval(Estimate):
    """A number whose 95 % interval is known."""

    low: float
    high: float


class Agreement(Interval):
    """Spearman's rank correlation of two layer profiles.

    `p` is the share of the shifted profiles that agree at least as well (`statistics.ranks.shift_p_value`). `p_plain` is the p value for
    independent layers: too small, since neighbouring layers are alike.
    """

    p: float
    p_plain: float


class Overlap(Part):
    """Layers among the best k of both cards: how many, which, and how many chance would give (`k² / L`)."""

    k: int
    shared: int
    layers: tuple[int, ...]
    expected: float


class Swap(Part):
    """What happens on the data of the `target` card when `layers`, the choice of the `source` card, take the place of its `own`.

    `kept` and `kept_own` are the performance that they keep there, % of all layers; `lost` is the difference in points, with its interval
    over the target's sampling error.
    """

    source: str
    target: str
    layers: tuple[int, ...]
    own: tuple[int, ...]
    kept: float
    kept_own: float
    lost: Interval


class Verdict(Part):
    """Whether one card serves both data sets: `REUSE`, `AGAIN` or `UNKNOWN`, and why."""

    word: str
    reason: str


class Pair(Part):
    """Two cards compared."""

    a: str
    b: str
    measures: dict[str, Agreement]
    top: Overlap
    swaps: tuple[Swap, Swap]
    verdict: Verdict


class Transfer(Record):
    """Several cards of one model compared, each pair of them.

    `cards` have `name`, `data`, `dtype` and `stability`. `matrix` is Spearman's correlation of `measure`, one row a card. `lost` are the
    points lost on the card of the column with the choice from the card of the row; 0 on the diagonal.
    """

    noun: ClassVar = "comparison of cards"
    made_by: ClassVar = "layercard transfer"
    schema_: Literal["layercard-transfer/1"] = Field(default="layercard-transfer/1", alias="schema")
    model: dict[str, Any]
    cards: tuple[dict[str, Any], ...]
    measure: str
    k: int
    matrix: tuple[tuple[float, ...], ...]
    lost: tuple[tuple[float, ...], ...]
    pairs: tuple[Pair, ...]


def transfer(
    cards: Sequence[tuple[str, LayerCard]],
    *,
    k: int = 5,
    measure: str = MEASURE,
    across_dtypes: bool = False,
    seed: int = 0,
    choices: Mapping[str, Sequence[int]] | None = None,
) -> Transfer:
    """Compare cards of one model.

    Args:
        cards: Names and cards, at least two.
        k: How many layers a placement takes, and how many best layers are compared.
        measure: Which profile the matrix and the best k are of; the verdict always looks at the gain estimate.
        across_dtypes: Whether cards of one model in several dtypes may be compared; their weights differ by rounding.
        seed: Of the bootstrap.
        choices: By the card's name the layers whose swap is valued, where they are not to be chosen from the card.

    Raises:
        CardError: Fewer than two cards, one card twice, cards of different models, or a measure that a card does not have.
        SelectionError: k outside 1 to the number of layers.
    """
    check_cards(cards, across_dtypes)
    measures = shared_measures([card for _, card in cards])
    if measure not in measures:
        raise CardError(f"not all cards have the measure {measure!r}; {suggestion(measure, measures)}")
    chosen = {name: select(card, k=k, objective="performance").layers for name, card in cards if name not in (choices or {})}
    chosen |= {name: tuple(sorted(layers)) for name, layers in (choices or {}).items()}
    rows = {name: row for row, (name, _) in enumerate(cards)}
    matrix, lost = np.eye(len(cards)), np.zeros((len(cards), len(cards)))
    pairs = []
    for (a, card_a), (b, card_b) in combinations(cards, 2):
        agreements = {name: agreement(card_a, card_b, name, seed) for name in shared_measures([card_a, card_b])}
        swaps = (swap(a, b, card_b, chosen[a], chosen[b], seed), swap(b, a, card_a, chosen[b], chosen[a], seed))
        stability = {a: card_a.stability.get(MEASURE), b: card_b.stability.get(MEASURE)}
        word = verdict(agreements[MEASURE], swaps, stability, card_a.model.layers)
        pairs.append(Pair(a=a, b=b, measures=agreements, top=overlap(card_a, card_b, measure, k), swaps=swaps, verdict=word))
        matrix[rows[a], rows[b]] = matrix[rows[b], rows[a]] = agreements[measure].value
        for each in swaps:
            lost[rows[each.source], rows[each.target]] = each.lost.value
    return Transfer(
        model=cards[0][1].model.model_dump(),
        cards=tuple(
            {"name": name, "data": card.data.model_dump(), "dtype": card.settings.get("dtype"), "stability": dict(card.stability)}
            for name, card in cards
        ),
        measure=measure,
        k=k,
        matrix=tuple(map(tuple, matrix.tolist())),
        lost=tuple(map(tuple, lost.tolist())),
        pairs=tuple(pairs),
    )


def check_cards(cards: Sequence[tuple[str, LayerCard]], across_dtypes: bool = False) -> None:
    """Raise `CardError` unless there are at least two different cards, and all of one model."""
    if len(cards) < 2:
        given = f"only {cards[0][0]}" if cards else "no card"
        raise CardError(f"transfer compares at least two cards, found {given}; name another card of the same model")
    for (name, card), (other_name, other) in combinations(cards, 2):
        if name == other_name or card == other:
            raise CardError(f"{name} and {other_name} are the same card; name cards of different data")
    name, card = cards[0]
    model, dtype = card.model, card.settings.get("dtype")
    for other_name, other in cards[1:]:
        if rounding_between(model.model_dump(), other.model.model_dump()) < math.inf:
            continue
        # Other weights: one model in two dtypes passes where that is wanted. A model's folder or owner may have another name.
        fingerprints, other_dtype = f"fingerprints {model.fingerprint} and {other.model.fingerprint}", other.settings.get("dtype")
        stem, other_stem = (each.name.rstrip("/").rpartition("/")[2].lower() for each in (model, other.model))
        if (stem, model.layers) != (other_stem, other.model.layers):
            raise CardError(
                f"{name} is of {model.name} ({model.layers} layers) and {other_name} of {other.model.name} ({other.model.layers} layers), "
                f"{fingerprints}; layers of different models cannot be compared, so profile one model on both data sets"
            )
        if dtype == other_dtype:
            raise CardError(
                f"{name} and {other_name} are both of {model.name} in {dtype}, but its weights differ ({fingerprints}); "
                "profile the same weights on both data sets"
            )
        if not across_dtypes:
            raise CardError(
                f"{name} is of {model.name} in {dtype} and {other_name} in {other_dtype} ({fingerprints}); "
                "profile both in one dtype, or pass --across-dtypes to compare them all the same"
            )


def shared_measures(cards: Sequence[LayerCard]) -> list[str]:
    """Measures with an interval that every layer of all cards has, in the order of the card."""
    layers = [layer for card in cards for layer in card.layers]
    return [name for name, _ in layers[0] if all(isinstance(getattr(layer, name), Estimate) for layer in layers)]


def agreement(a: LayerCard, b: LayerCard, measure: str, seed: int = 0) -> Agreement:
    """Spearman's correlation of a measure's profiles in two cards.

    The interval resamples stretches of neighbouring layers and moves each value by its own sampling error, drawn from the interval
    in the card; where the card knows how far halves of its records agree, the noise is scaled to that. Noise only ever lowers a rank
    correlation, so the interval reaches rather too low than too high.
    """
    x, y = np.array(a.values(measure)), np.array(b.values(measure))
    rng = np.random.default_rng(seed)
    drawn = drawn_stretches(len(x), REPEATS, rng)
    moved = []
    for profile, card in ((x, a), (y, b)):
        # Averages over neighbours err like neighbours; the noise upsets the order as much as halving the records did.
        deviations = _deviations(card, measure)
        kernel = smoothing_kernel(len(deviations)) if measure == "gain_estimate" else None
        halves = card.stability.get(measure)
        scale = 1.0 if halves is None else noise_scale(profile, deviations, halves, rng, kernel)
        moved.append(np.take_along_axis(profile + scale * noise(deviations, REPEATS, rng, kernel), drawn, axis=1))
    rho = spearman(x, y)
    return Agreement(**_with_interval(rho, spearman_rows(*moved)), p=shift_p_value(x, y), p_plain=plain_p_value(rho, len(x)))


def overlap(a: LayerCard, b: LayerCard, measure: str, k: int) -> Overlap:
    """Layers among the k largest values of a measure in both cards."""
    best = [set(np.argsort(-np.array(card.values(measure)), kind="stable")[:k].tolist()) for card in (a, b)]
    both = tuple(sorted(best[0] & best[1]))
    return Overlap(k=k, shared=len(both), layers=both, expected=k * k / a.model.layers)


def swap(source: str, target: str, card: LayerCard, layers: tuple[int, ...], own: tuple[int, ...], seed: int = 0) -> Swap:
    """What `layers` are worth on the data of `card`, against its `own` choice.

    The interval of what is lost comes from the sampling error of the step probe; the coupling is taken as it is in the card.
    """
    similar, probe = set_similarity(card), probe_measure(card)
    gains = np.array(card.values(probe))
    moved = gains + noise(_deviations(card, probe), REPEATS, np.random.default_rng(seed))

    def keeps(values: np.ndarray, chosen: tuple[int, ...]) -> float:
        weights = demand(values)
        return 100 * performance_kept(coverage(similar, weights, chosen) / float(weights.sum()))[0]

    kept, kept_own = keeps(gains, layers), keeps(gains, own)
    lost = _with_interval(kept_own - kept, np.array([keeps(row, own) - keeps(row, layers) for row in moved]))
    return Swap(source=source, target=target, layers=layers, own=own, kept=kept, kept_own=kept_own, lost=Interval(**lost))


def verdict(ranks: Agreement, swaps: Sequence[Swap], stability: dict[str, float | None], depth: int) -> Verdict:
    """Whether one card serves both data sets, and why.

    "profile again" where it is clear that something is lost or that layers rank differently, "reuse the card" where it is clear that
    they do not, "not enough evidence" in between. Below ten layers no agreement of ranks can rule chance out (`p` is at least 1 / 2L), so
    there the verdict rests on what is lost, and says so.

    Args:
        ranks: Agreement of the gain estimates.
        swaps: Both directions.
        stability: For each card the split-half correlation of its own gain estimate; `None` where it is not known.
        depth: Number of layers L.
    """
    least_p = 1 / (2 * depth)
    few = least_p > SURE

    def points(lost: Interval) -> str:
        return f"{lost.value:.1f} points ({lost.low:.1f} to {lost.high:.1f})"

    agree = f"Spearman of the gain estimates {ranks.value:.2f} ({ranks.low:.2f} to {ranks.high:.2f})"
    for each in swaps:
        if each.lost.low > TOLERANCE:
            reason = f"{each.source}'s layers lose {points(each.lost)} on {each.target}, more than {TOLERANCE:g} points"
            return Verdict(word=AGAIN, reason=reason)
    if ranks.high < AGREES:
        return Verdict(word=AGAIN, reason=f"the data sets rank layers differently: {agree}")
    doubts = [
        f"the ranking of {name} is not stable (its halves agree with {halves:.2f}), so profile more records"
        for name, halves in stability.items()
        if halves is not None and halves < STABLE
    ]
    if ranks.value < AGREES or (ranks.low <= 0 and not few):
        doubts.append(f"{agree} {'is low' if ranks.value < AGREES else 'may be zero'}")
    if ranks.p > max(SURE, least_p + 1e-9):
        doubts.append(f"profiles as smooth as these agree as well by chance (p = {ranks.p:.2f})")
    doubts += [
        f"{each.source}'s layers may lose over {TOLERANCE:g} points on {each.target}: {points(each.lost)}"
        for each in swaps
        if each.lost.high > TOLERANCE
    ]
    if doubts:
        return Verdict(word=UNKNOWN, reason="; ".join(doubts))
    worst = max(swaps, key=lambda each: each.lost.value)
    lost = f"{worst.source}'s layers lose {points(worst.lost)} of all layers' performance on {worst.target}"
    caution = f"; {depth} layers alone cannot rule chance out (p is never below {least_p:.2f}), so this rests on the points lost"
    return Verdict(word=REUSE, reason=f"{lost}; {agree}, p = {ranks.p:.3f}{caution if few else ''}")


def _deviations(card: LayerCard, measure: str) -> np.ndarray:
    """Standard deviation of each layer's value: a 95 % interval is 2 · 1.96 of them wide."""
    estimates = [getattr(layer, measure) for layer in card.layers]
    return np.array([max(estimate.high - estimate.low, 0.0) for estimate in estimates]) / (2 * 1.959964)


def _with_interval(value: float, resampled: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
    return {"value": value, "low": min(value, low), "high": max(value, high)}
