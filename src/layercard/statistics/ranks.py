"""Rank agreement of two profiles over depth, honest about neighbouring layers being alike.

A profile changes smoothly from layer to layer, so L layers are not L independent samples, and two profiles that have nothing to
do with each other often agree. Two things follow. The interval resamples *stretches* of neighbouring layers (block bootstrap,
Künsch 1989). The p value compares the profiles with shifted ones, which are as smooth: the second profile is moved round the
depth by every number of layers, as it is and turned about, and p is the share of these 2L arrangements, the true one among them,
that agree at least as well. So p is never below 1 / 2L. Brain maps are compared like this for the same reason (spin test,
Alexander-Bloch and others 2018). The usual p value, for independent layers, is far too small here.
"""

import math

import numpy as np
from scipy.stats import rankdata, t as student


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation (ties share their mean rank); 0 where one side is constant."""
    return float(spearman_rows(np.asarray(x), np.asarray(y)))


def spearman_rows(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation along the last axis: `[…, L]` and `[…, L]` to `[…]`."""
    a, b = (rankdata(side, axis=-1) for side in (x, y))
    a, b = a - a.mean(axis=-1, keepdims=True), b - b.mean(axis=-1, keepdims=True)
    norm = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return np.where(norm > 0, (a * b).sum(axis=-1) / np.where(norm > 0, norm, 1.0), 0.0)


def shift_p_value(x: np.ndarray, y: np.ndarray) -> float:
    """Share of the shifts of `y`, mirrored ones included, that agree with `x` at least as well as `y` itself does: at least 1 / 2L.

    >>> hump = np.array([0.0, 1.0, 3.0, 5.0, 6.0, 4.0, 2.0, 0.5])
    >>> shift_p_value(hump, hump**2)
    0.0625
    """
    depth = len(y)
    moved = np.stack([np.roll(side, by) for side in (y, y[::-1]) for by in range(depth)])
    agreeing = spearman_rows(np.broadcast_to(x, moved.shape), moved) >= spearman(x, y) - 1e-12
    return float(agreeing.mean())


def plain_p_value(rho: float, depth: int) -> float:
    """One-sided p value of Spearman's correlation if the layers were independent (Student's t)."""
    if depth < 3:
        return 1.0
    return float(student.sf(rho * math.sqrt((depth - 2) / max(1 - rho * rho, 1e-300)), depth - 2))


def drawn_stretches(depth: int, repeats: int, rng: np.random.Generator) -> np.ndarray:
    """Layers drawn in stretches of about √L neighbours, going round at the end: `[repeats, L]` indices."""
    length = max(1, round(math.sqrt(depth)))
    starts = rng.integers(depth, size=(repeats, math.ceil(depth / length)))
    return ((starts[:, :, None] + np.arange(length)) % depth).reshape(repeats, -1)[:, :depth]


def noise(deviations: np.ndarray, repeats: int, rng: np.random.Generator, kernel: np.ndarray | None = None) -> np.ndarray:
    """Normal noise of given standard deviations, `[repeats, L]`; smooth over depth where a smoothing `kernel: [L, L]` is given."""
    drawn = rng.standard_normal((repeats, len(deviations)))
    if kernel is not None:
        drawn = drawn @ kernel.T / np.sqrt((kernel * kernel).sum(axis=1))
    return drawn * deviations


def noise_scale(
    profile: np.ndarray, deviations: np.ndarray, halves: float, rng: np.random.Generator, kernel: np.ndarray | None = None
) -> float:
    """How much of the noise of single values changes their order: the largest factor, 0 to 1, under which two halves agree as they did.

    A good part of an interval is common to all layers (an easier sample of records raises them all) and leaves their order alone, so
    noise drawn layer by layer from the intervals overstates it. Half the records have √2 times the error.

    Args:
        profile: The values, `[L]`.
        deviations: Their standard deviations.
        halves: Median rank correlation found between halves of the records.
        rng: Draws the noise.
        kernel: As in `noise`.
    """
    pairs = 200
    first, second = (math.sqrt(2) * noise(deviations, pairs, rng, kernel) for _ in range(2))
    for factor in np.geomspace(1, 0.01, 30).tolist():
        if np.median(spearman_rows(profile + factor * first, profile + factor * second)) >= halves:
            return float(factor)
    return 0.0
