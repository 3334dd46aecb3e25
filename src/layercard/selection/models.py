"""Set models: what a card says a set of layers will gain. Coverage is what `select` uses; the others stand beside it for comparison.

Each takes a card and gives a function of a set of layers, whose order is what counts. Notation as in `docs/maths.md`: s step probe,
ρ coupling, b descent, K curvature.
"""

from collections.abc import Callable, Sequence

import numpy as np

from layercard.card import LayerCard
from layercard.statistics.coverage import coverage, demand, shrunk, similarity

SetGain = Callable[[Sequence[int]], float]
RIDGE = 0.05
"""Added to the diagonal of ρ, so that layers that are nearly alike do not blow up the inverse."""


def probe_measure(card: LayerCard) -> str:
    """Name of the measure that `probe_of` gives."""
    return "step_probe" if card.layers[0].step_probe is not None else "predicted_gain"


def probe_of(card: LayerCard) -> list[float]:
    """The gain of each layer's own step: the step probe or, where it was not run, the quadratic model's."""
    return card.values(probe_measure(card))


def layer_weights(card: LayerCard) -> np.ndarray:
    """Weight `w_j` of each layer in the coverage, from `probe_of`."""
    return demand(probe_of(card))


def set_similarity(card: LayerCard) -> np.ndarray:
    """How far layer i stands in for layer j, `[L, L]`: the coupling with its noise reduced (`shrunk`)."""
    return shrunk(similarity(card.coupling))


def coverage_of(card: LayerCard, power: float = 1.0, weighted: bool = True, noisy: bool = False) -> SetGain:
    """`Σ_j w_j max_{i ∈ S} C_ji^p`, with `w = √s` smoothed over depth or 1, and `C = set_similarity` or, if `noisy`, `|ρ|` itself."""
    similar = (similarity(card.coupling) if noisy else set_similarity(card)) ** power
    weights = layer_weights(card) if weighted else np.ones(card.model.layers)
    return lambda layers: coverage(similar, weights, list(layers))


def probe_quadratic(card: LayerCard) -> SetGain:
    """`½ u_Sᵀ (ρ_SS + 0.05 I)⁻¹ u_S` with `u = √(2 s)`: what measured gains of single layers leave when they overlap as ρ says."""
    rho = np.asarray(card.coupling, dtype=float) + RIDGE * np.eye(card.model.layers)
    u = np.sqrt(2 * np.clip(probe_of(card), 0.0, None))
    return lambda layers: _quadratic(rho, u, list(layers))


def quadratic(card: LayerCard) -> SetGain:
    """`½ b_Sᵀ K_SS⁻¹ b_S`: the decrease in the local quadratic model."""
    scale = np.sqrt(np.clip(card.curvature, 0.0, None))
    curvature = np.asarray(card.coupling, dtype=float) * np.outer(scale, scale)
    b = np.asarray(card.descent, dtype=float)
    return lambda layers: _quadratic(curvature, b, list(layers))


def additive(card: LayerCard, measure: str | None = None) -> SetGain:
    """The sum of a measure of single layers; of the step probe unless told."""
    gains = np.asarray(probe_of(card) if measure is None else card.values(measure))
    return lambda layers: float(gains[list(layers)].sum())


def _quadratic(matrix: np.ndarray, vector: np.ndarray, layers: list[int]) -> float:
    part = vector[layers]
    return float(0.5 * part @ np.linalg.lstsq(matrix[np.ix_(layers, layers)], part, rcond=None)[0])


SET_MODELS: dict[str, Callable[[LayerCard], SetGain]] = {
    "coverage": coverage_of,
    "coverage, coupling as measured": lambda card: coverage_of(card, noisy=True),
    "coverage, squared coupling": lambda card: coverage_of(card, power=2.0),
    "coverage, equal weights": lambda card: coverage_of(card, weighted=False),
    "coverage, equal weights, squared coupling": lambda card: coverage_of(card, power=2.0, weighted=False),
    "quadratic from step probes": probe_quadratic,
    "quadratic": quadratic,
    "sum of step probes": additive,
    "sum of quadratic gains": lambda card: additive(card, "predicted_gain"),
}
"""Set models by name."""
