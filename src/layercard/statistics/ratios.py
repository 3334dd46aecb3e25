"""Bootstrap over records of ratios of sums, such as nats per labelled token. Numpy alone, since reports are made without torch."""

import math
from typing import Any

import numpy as np

RESAMPLES = 1000
TAILS = (0.025, 0.975)
"""Ends of a 95 % interval."""


def resampled_sums(*values: Any, seed: int = 0) -> list[np.ndarray]:
    """Sums over resampled records `[resamples]` of each array `[records]`; records are drawn together, so pairs stay pairs."""
    records = len(values[0])
    counts = np.random.default_rng(seed).multinomial(records, np.full(records, 1 / records), size=RESAMPLES)
    return [counts @ np.asarray(value, dtype=float) for value in values]


def ratio_interval(top: Any, bottom: Any, seed: int = 0) -> tuple[float, float]:
    """95 % interval of `Σ top / Σ bottom` over records, `[records]` each.

    >>> ratio_interval([2.0, 2.0], [1.0, 1.0])
    (2.0, 2.0)
    """
    above, below = resampled_sums(top, bottom, seed=seed)
    low, high = np.quantile(above[below != 0] / below[below != 0], TAILS) if (below != 0).any() else (math.nan, math.nan)
    return float(low), float(high)
