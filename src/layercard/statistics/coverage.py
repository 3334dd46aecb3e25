"""What a set of layers can correct: how much of every layer's own gain it covers.

Let `s_j` be what a step in layer j alone gains (the step probe, smoothed over depth) and `ρ_ji` the coupling of layers j and i.
Lengths add where squares are gains, so layer j asks for `w_j = √s_j`, and layer i meets the share `|ρ_ji|` of it. A set S covers

    f(S) = Σ_j w_j max_{i ∈ S} |ρ_ji|,

which is facility location (p-median): monotone and submodular, so neighbours, which correct the same residual, count once.
Greedy is within 1 − 1/e of the best set (Nemhauser, Wolsey and Fisher 1978); a mixed-integer programme finds the best.
How well it predicts trained gains is measured in `benchmarks/rank_agreement.py`.
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


def shrunk(similar: np.ndarray, share: float = 0.75) -> np.ndarray:
    """Each `|ρ_ji|` moved three quarters of the way to the mean over all pairs as far apart in depth, `[L, L]`.

    An entry of the coupling comes from a few dozen records and is noisy; the best of all sets would be one that noise flatters. The
    mean over pairs is steadier, and coupling depends above all on the distance. The means fall with the distance, as they would
    without noise; the diagonal stays 1.

    Args:
        similar: `|ρ|: [L, L]`.
        share: How far to move, 0 to 1.
    """
    index = np.arange(len(similar))
    apart = np.abs(index[:, None] - index)
    means = np.minimum.accumulate([similar[apart == distance].mean() for distance in index])
    return (1 - share) * similar + share * means[apart]


def coverage(similar: np.ndarray, weights: np.ndarray, layers: Sequence[int]) -> float:
    """`f(S)` for the layers of S; 0 for none."""
    if not len(layers):
        return 0.0
    return float(weights @ similar[:, list(layers)].max(axis=1))


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
