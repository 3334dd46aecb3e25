"""From coverage to performance kept: a monotone curve fitted to trained sets of layers, with an interval.

Performance kept is the loss reduction of a placement as a share of the reduction of all layers; coverage enters as a share of what all
layers cover. The knots lie in `calibration.json`, in per cent of performance; between them the curve is straight.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np

CEILING = 1.05
"""Performance at which the interval would close: a little over that of all layers, which some placements surpass."""


@cache
def _curve() -> tuple[np.ndarray, np.ndarray, float]:
    found = json.loads(Path(__file__).with_name("calibration.json").read_text(encoding="utf-8"))
    knots = np.array(found["knots"], dtype=float)
    return knots[:, 0], np.maximum.accumulate(knots[:, 1]) / 100, float(found["spread"])


def performance_kept(share: float) -> tuple[float, float, float]:
    """Value, low and high of the performance kept, from 0 to 1, for a share of the coverage of all layers.

    >>> performance_kept(1.0)[0], performance_kept(0.0)[0]
    (1.0, 0.0)
    """
    shares, kept, spread = _curve()
    value = float(np.interp(share, shares, kept))
    half = spread * (CEILING - value)
    return value, max(0.0, value - half) if share < 1 else value, min(max(1.0, value), value + half)


def coverage_share(kept: float) -> float:
    """The least share of coverage whose performance kept is `kept`, from 0 to 1; the inverse of `performance_kept`.

    >>> round(performance_kept(coverage_share(0.95))[0], 9)
    0.95
    """
    shares, values, _ = _curve()
    if kept >= values[-1]:
        return float(shares[int(np.argmax(values >= values[-1]))]) if kept == values[-1] else float("inf")
    at = int(np.searchsorted(values, kept, side="left"))
    if at == 0:
        return float(shares[0])
    low, high = values[at - 1], values[at]
    return float(shares[at - 1] + (kept - low) / (high - low) * (shares[at] - shares[at - 1]))
