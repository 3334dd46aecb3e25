"""What a set of layers can correct: how much of every layer's own gain it covers.

Let `s_j` be what a step in layer j alone gains (the step probe, smoothed over depth) and `C_ji` how far layer i stands in for layer j:
their coupling `|ρ_ji|`, with its noise reduced and drawn towards what depth alone says (`blended`). Lengths add where squares are gains,
so layer j asks for `w_j = √s_j`, and layer i meets the share `C_ji` of it. A set S covers

    f(S) = Σ_j w_j max_{i ∈ S} C_ji,

which is facility location (p-median): monotone and submodular, so neighbours, which correct the same residual, count once.
Greedy is within 1 − 1/e of the best set (Nemhauser, Wolsey and Fisher 1978); a mixed-integer programme finds the best.
How well it predicts trained gains, and depth alone and other models beside it, is measured in `benchmarks/calibration.py`,
`benchmarks/set_gain.py` and `benchmarks/rank_agreement.py`.
"""

from collections.abc import Sequence

import numpy as np


def similarity(coupling: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """`|ρ_ji|`, `[L, L]`."""
    return np.abs(np.asarray(coupling, dtype=float))


def smoothed(gains: Sequence[float] | np.ndarray) -> np.ndarray:
    """Gains averaged over neighbours by a Gaussian whose standard deviation is a fifteenth of the depth, `[L]`.

    Whether one step succeeds is a matter of one layer and a few records; what training gains varies smoothly with depth.
    """
    return smoothing_kernel(len(gains)) @ np.asarray(gains, dtype=float)


def smoothing_kernel(depth: int) -> np.ndarray:
    """The weights of `smoothed`, `[L, L]`; rows sum to 1."""
    index = np.arange(depth)
    kernel = np.exp(-0.5 * (15 * (index[:, None] - index) / depth) ** 2)
    return kernel / kernel.sum(axis=1, keepdims=True)


def demand(gains: Sequence[float] | np.ndarray) -> np.ndarray:
    """`w_j = √s_j`, `[L]`, from the gain of each layer's own step in nats; all ones where no layer gains."""
    roots = np.sqrt(np.clip(smoothed(gains), 0.0, None))
    return roots if roots.any() else np.ones_like(roots)


def shrunk(coupling: Sequence[Sequence[float]] | np.ndarray, share: float = 0.75) -> np.ndarray:
    """Each `|ρ_ji|` moved three quarters of the way to the mean over all pairs as far apart in depth, `[L, L]`.

    An entry of the coupling comes from a few dozen records and is noisy; the best of all sets would be one that noise flatters. The
    mean over pairs is steadier, and coupling depends above all on the distance. The means fall with the distance, as they would
    without noise; the diagonal stays 1. Signs are kept until all is averaged: noise has none to prefer, and its absolute value has.

    Args:
        coupling: `ρ: [L, L]`.
        share: How far to move, 0 to 1.
    """
    rho = np.asarray(coupling, dtype=float)
    index = np.arange(len(rho))
    apart = np.abs(index[:, None] - index)
    means = np.minimum.accumulate([max(rho[apart == distance].mean(), 0.0) for distance in index])
    return np.abs((1 - share) * rho + share * means[apart])


def depth_kernel(depth: int) -> np.ndarray:
    """How far one layer stands in for another as far as depth alone tells, `[L, L]`: `exp(−5 |i − j| / L)`, no card needed."""
    index = np.arange(depth)
    return np.exp(-5 * np.abs(index[:, None] - index) / depth)


def blended(coupling: Sequence[Sequence[float]] | np.ndarray, share: float = 0.5) -> np.ndarray:
    """What `select` takes for `C_ji`: the coupling with its noise reduced (`shrunk`), half way to the `depth_kernel`."""
    return (1 - share) * shrunk(coupling) + share * depth_kernel(len(coupling))


def coverage(similar: np.ndarray, weights: np.ndarray, layers: Sequence[int]) -> float:
    """`f(S)` for the layers of S; 0 for none."""
    if not len(layers):
        return 0.0
    return float(weights @ similar[:, list(layers)].max(axis=1))


def greedy_layers(similar: np.ndarray, weights: np.ndarray, count: int) -> list[int]:
    """So many layers, each the one that adds most to the coverage of those before it."""
    chosen: list[int] = []
    for _ in range(min(count, len(weights))):
        left = [layer for layer in range(len(weights)) if layer not in chosen]
        chosen.append(max(left, key=lambda layer: coverage(similar, weights, [*chosen, layer])))
    return chosen


def gain_estimate(similar: np.ndarray, gains: Sequence[float] | np.ndarray) -> np.ndarray:
    """`s_ℓ · f({ℓ}) / f(all): [L]`, in the unit of the gains.

    What steps at this depth achieve, times the share of what all layers ask for that this layer can meet. Its order is what counts:
    training for many steps gains several times as much.

    Args:
        similar: `|ρ|: [L, L]`.
        gains: The step probe, `[L]`.
    """
    weights = demand(gains)
    return smoothed(gains) * (weights @ similar) / weights.sum()


def covered_by(similar: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    """For each layer of the model the layer of S that covers it best, `[L]`."""
    chosen = np.asarray(layers)
    return chosen[similar[:, chosen].argmax(axis=1)]
