"""From a model and records to a Layer Card."""

import math
from dataclasses import asdict, dataclass

import torch

from layercard.assembly import Assembly
from layercard.card import LayerCard
from layercard.data import Dataset, Example
from layercard.errors import DataError
from layercard.models import BaseModel, Progress
from layercard.probe import ReplayedSet, StepProbe, step_probe
from layercard.signals import Fit, HeldOut, fit_pass, held_out_pass
from layercard.statistics.coupling import curvature, descent


@dataclass(frozen=True)
class ProfileSettings:
    """How a card is made.

    Attributes:
        rank: Rank of the steps (that of the adapter one means to train).
        ridge: λ as a share of the robust energy of each input (`statistics.residual.ridge_scale`).
        batch_size: Records in a batch.
        fit_share: Share of the records that make the steps; the others measure them.
        label_samples: How often labels are drawn from the model for the coupling.
        step_probe: Whether to run the step probe.
        probe_records: How many of the held-out records the step probe measures on; it takes two forward passes for each layer.
        seed: Of the split, the drawn labels and the bootstrap.
    """

    rank: int = 8
    ridge: float = 1.0
    batch_size: int = 8
    fit_share: float = 0.6
    label_samples: int = 3
    step_probe: bool = True
    probe_records: int = 16
    seed: int = 0


def profile(base: BaseModel, dataset: Dataset, settings: ProfileSettings | None = None, progress: Progress | None = None) -> LayerCard:
    """Make the Layer Card of a model on a reference data set.

    The model is bit for bit the same afterwards: weights, hooks, `requires_grad`, `.grad`, modes and random state.

    Args:
        base: The model.
        dataset: Reference records, at least 4.
        settings: How.
        progress: Told of each phase.

    Raises:
        DataError: Fewer than 4 records, or a loss that is not finite.
    """
    settings = settings or ProfileSettings()
    fit_examples, held_examples = split_records(dataset, settings)
    fit = fit_pass(base, fit_examples, rank=settings.rank, ridge=settings.ridge, batch_size=settings.batch_size, progress=progress)
    held_out = held_out_pass(
        base,
        held_examples,
        fit,
        samples=settings.label_samples,
        seed=settings.seed,
        batch_size=settings.batch_size,
        progress=progress,
    )
    probe = _step_probe(base, held_examples, fit, held_out, settings, progress) if settings.step_probe else None
    return Assembly(base, dataset, asdict(settings), fit, held_out, probe, len(fit_examples)).card()


def split_records(dataset: Dataset, settings: ProfileSettings) -> tuple[list[Example], list[Example]]:
    """Records that make the steps, and records that measure them; the split depends on the seed alone."""
    if len(dataset) < 4:
        raise DataError(f"{dataset.source} gives {len(dataset)} records; a card needs at least 4, and 64 are a good start")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    cut = min(max(round(settings.fit_share * len(order)), 2), len(order) - 2)
    return [dataset.examples[row] for row in sorted(order[:cut])], [dataset.examples[row] for row in sorted(order[cut:])]


def step_lengths(fit: Fit, held_out: HeldOut) -> torch.Tensor:
    """`b_ℓ / K_ℓℓ: [L]`, the length at which the quadratic model puts the minimum along each layer's step."""
    k, b = curvature(held_out.drawn, held_out.labelled).diagonal(), descent(held_out.slopes, held_out.labelled)
    lengths = torch.where((k > 0) & (b > 0), b / k.clamp(min=1e-12), torch.full_like(b, math.nan))
    usual = lengths.nanmedian()
    return torch.where(lengths.isnan(), usual if not usual.isnan() else torch.ones_like(usual), lengths)


def _step_probe(
    base: BaseModel, examples: list[Example], fit: Fit, held_out: HeldOut, settings: ProfileSettings, progress: Progress | None
) -> StepProbe:
    lengths = step_lengths(fit, held_out).tolist()
    scaled = [{path: (down * length, up) for path, (down, up) in step.items()} for step, length in zip(fit.steps, lengths, strict=True)]
    probed = examples[: settings.probe_records]
    entered = ReplayedSet(base, probed, range(len(base.blocks)), settings.batch_size, progress=progress)
    slopes = (descent(held_out.slopes, held_out.labelled) * torch.tensor(lengths)).tolist()
    return step_probe(base, scaled, slopes, entered, progress)
