"""Bootstrap over records: how far a number would move on other records of the same kind."""

import math
from collections.abc import Callable

import numpy as np
import torch

from layercard.statistics.ranks import spearman

REPEATS = 300
LEVEL = 0.95


def bootstrap_weights(group_n: torch.Tensor, seed: int, repeats: int = REPEATS) -> torch.Tensor:
    """How often each record is drawn in each resample with replacement: `[repeats, n]`; each group is resampled by itself.

    Args:
        group_n: Number of the group of each record.
        seed: Of the draws.
        repeats: Number of resamples.
    """
    weights = torch.zeros(repeats, len(group_n), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for group in group_n.unique().tolist():
        members = (group_n == group).nonzero()[:, 0]
        drawn = torch.randint(len(members), (repeats, len(members)), generator=generator)
        weights[:, members] = torch.nn.functional.one_hot(drawn, len(members)).sum(dim=1).double()
    return weights


def interval(resampled: torch.Tensor, level: float = LEVEL) -> tuple[torch.Tensor, torch.Tensor]:
    """Percentile interval over the first axis: `[repeats, …]` gives two tensors `[…]`."""
    tail = (1 - level) / 2
    low, high = torch.quantile(resampled.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return low, high


def ratio_deviation(numerator_ln: torch.Tensor, denominator_n: torch.Tensor, weights_bn: torch.Tensor) -> torch.Tensor:
    """`Σ w x / Σ w y` in each resample less its value on all records, `[repeats, L]`."""
    resampled = (weights_bn @ numerator_ln.T) / (weights_bn @ denominator_n).unsqueeze(1)
    return resampled - numerator_ln.sum(dim=1) / denominator_n.sum()


def widening(deviations_bl: torch.Tensor, differences_l: torch.Tensor) -> float:
    """By how much resampled deviations must grow to hold the variance of the steps too: `√(1 + r²)`.

    Resampling leaves the steps as they are, and takes a few records for all. What two halves of the records say with steps of their own
    differs by both; half of that difference is the error of their mean, and r is its size over that of the deviations, root mean squares
    over layers. (Where both halves are resampled well, a part is counted twice, which errs on the wide side.)

    Args:
        deviations_bl: Resampled values less the value, `[repeats, L]`.
        differences_l: One half's value less the other's, `[L]`.
    """
    resampled = float(deviations_bl.square().mean())
    return math.sqrt(1 + float(differences_l.square().mean()) / 4 / resampled) if resampled > 0 else 1.0


def split_half_spearman(profile: Callable[[torch.Tensor], torch.Tensor], group_n: torch.Tensor, seed: int, repeats: int = 20) -> float:
    """Median rank correlation between the layer profiles of two disjoint halves of the records.

    Args:
        profile: Gives the profile `[L]` for weights `[n]` of 0 or 1.
        group_n: Number of the group of each record, at least 2 in each; every group is halved.
        seed: Of the splits.
        repeats: Number of random splits.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = [(group_n == group).nonzero()[:, 0] for group in group_n.unique().tolist()]
    correlations = []
    for _ in range(repeats):
        first = torch.zeros(len(group_n), dtype=torch.float64)
        for members in groups:
            first[members[torch.randperm(len(members), generator=generator)[: len(members) // 2]]] = 1
        correlations.append(spearman(profile(first).numpy(), profile(1 - first).numpy()))
    return float(np.median(correlations))
