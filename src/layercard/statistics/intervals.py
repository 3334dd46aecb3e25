"""Bootstrap over records: how far a number would move on other records of the same kind."""

from collections.abc import Callable

import numpy as np
import torch

from layercard.statistics.ranks import spearman

REPEATS = 300
LEVEL = 0.95


def bootstrap_weights(records: int, seed: int, repeats: int = REPEATS) -> torch.Tensor:
    """How often each record is drawn in each resample with replacement: `[repeats, records]`, rows sum to `records`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(records, (repeats, records), generator=generator)
    return torch.nn.functional.one_hot(drawn, records).sum(dim=1).double()


def interval(resampled: torch.Tensor, level: float = LEVEL) -> tuple[torch.Tensor, torch.Tensor]:
    """Percentile interval over the first axis: `[repeats, …]` gives two tensors `[…]`."""
    tail = (1 - level) / 2
    low, high = torch.quantile(resampled.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return low, high


def ratio_deviation(numerator_ln: torch.Tensor, denominator_n: torch.Tensor, weights_bn: torch.Tensor) -> torch.Tensor:
    """`Σ w x / Σ w y` in each resample less its value on all records, `[repeats, L]`."""
    resampled = (weights_bn @ numerator_ln.T) / (weights_bn @ denominator_n).unsqueeze(1)
    return resampled - numerator_ln.sum(dim=1) / denominator_n.sum()


def split_half_spearman(profile: Callable[[torch.Tensor], torch.Tensor], records: int, seed: int, repeats: int = 20) -> float:
    """Median rank correlation between the layer profiles of two disjoint halves of the records.

    Args:
        profile: Gives the profile `[L]` for weights `[records]` of 0 or 1.
        records: Number of records, at least 2.
        seed: Of the splits.
        repeats: Number of random splits.
    """
    generator = torch.Generator().manual_seed(seed)
    correlations = []
    for _ in range(repeats):
        first = torch.zeros(records, dtype=torch.float64)
        first[torch.randperm(records, generator=generator)[: records // 2]] = 1
        correlations.append(spearman(profile(first).numpy(), profile(1 - first).numpy()))
    return float(np.median(correlations))
