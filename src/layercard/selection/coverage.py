"""What a set of layers can correct, as coverage of all layers: the objective that selection maximises.

A layer i stands in for layer j as far as their steps move the outputs alike: `C_ji = |ρ_ji|^p`. A set S covers

    f(S) = Σ_j w_j max_{i ∈ S} C_ji,

facility location (p-median): monotone and submodular, so neighbours, which correct the same residual, count once. Greedy is
within 1 − 1/e of the best set (Nemhauser, Wolsey and Fisher 1978); a mixed-integer programme finds the best and proves it.
"""

from collections.abc import Sequence

import numpy as np

POWER = 2.0


def similarity(coupling: Sequence[Sequence[float]], power: float = POWER) -> np.ndarray:
    """`C_ji = |ρ_ji|^p`, `[L, L]`."""
    return np.abs(np.asarray(coupling, dtype=float)) ** power


def coverage(similar: np.ndarray, weights: np.ndarray, layers: Sequence[int]) -> float:
    """`f(S)` for the layers of S; 0 for none."""
    if not len(layers):
        return 0.0
    return float(weights @ similar[:, list(layers)].max(axis=1))


def covered_by(similar: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    """For each layer of the model the layer of S that covers it best, `[L]`."""
    chosen = np.asarray(layers)
    return chosen[similar[:, chosen].argmax(axis=1)]
