"""Ranks for the chosen layers: one total, shared in proportion to the root of what each layer covers."""

from collections.abc import Sequence

import numpy as np

from layercard.errors import SelectionError
from layercard.statistics.coverage import covered_by


def shared_ranks(similar: np.ndarray, weights: np.ndarray, layers: Sequence[int], rank: int) -> dict[int, int]:
    """A rank for each layer, at least 1, that sum to `rank` times the number of layers.

    Layer i covers `a_i = Σ_j w_j C_ji` over the layers j that it covers best, itself among them; its rank is proportional to `√a_i`.
    What rounding leaves goes to the largest remainders, of equal ones to the lower layer.

    Args:
        similar: `C: [L, L]`.
        weights: `w: [L]`.
        layers: The chosen layers.
        rank: Mean rank.

    Raises:
        SelectionError: The rank is below 1.
    """
    if rank < 1:
        raise SelectionError(f"rank = {rank} cannot be shared out; give a whole number of at least 1")
    chosen = sorted(layers)
    covering = covered_by(similar, chosen)
    amounts = np.array([float(weights[covering == i] @ similar[covering == i, i]) for i in chosen])
    roots = np.sqrt(amounts)
    parts = roots / roots.sum() if roots.sum() > 0 else np.full(len(chosen), 1 / len(chosen))
    spare = (rank - 1) * len(chosen)
    exact = spare * parts
    ranks = 1 + np.floor(exact).astype(int)
    left = rank * len(chosen) - int(ranks.sum())
    for at in np.argsort(-(exact - np.floor(exact)), kind="stable")[:left]:
        ranks[at] += 1
    return dict(zip(chosen, ranks.tolist(), strict=True))
