"""From a model and records to a Layer Card."""

import difflib
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from layercard.assembly import Assembly
from layercard.card import LayerCard
from layercard.cost import CostModel
from layercard.data import Dataset, Example
from layercard.errors import DataError, TrainingError
from layercard.halving import TrainingProbe, training_probes
from layercard.models import BaseModel, Progress
from layercard.probe import ProbeTraining, ReplayedSet, StepProbe, step_probe
from layercard.settings import TrainSettings
from layercard.signals import Fit, HeldOut, fit_pass, held_out_pass
from layercard.statistics.coupling import curvature, descent
from layercard.timing import measure_cost, usual_batch

PROBES = ("none", "step", "train")


@dataclass(frozen=True)
class ProfileSettings:
    """How a card is made.

    Attributes:
        rank: Rank of the steps (that of the adapter one means to train).
        ridge: λ as a share of the robust energy of each input (`statistics.residual.ridge_scale`).
        batch_size: Records in a batch.
        fit_share: Share of the records that make the steps; the others measure them.
        label_samples: How often labels are drawn from the model for the coupling.
        probe: `none`, `step` (the step probe) or `train` (the step probe, then the training probe).
        probe_steps: Training steps of the training probe; layers that it prunes take fewer.
        probe_records: How many of the held-out records the step probe measures on; it takes two forward passes for each layer.
        cost: Whether to time a few training steps (`timing.measure_cost`). Readings of a clock differ from call to call, so a card that
            must come out the same again does without.
        seed: Of the split, the drawn labels and the bootstrap.
    """

    rank: int = 8
    ridge: float = 1.0
    batch_size: int = 8
    fit_share: float = 0.6
    label_samples: int = 3
    probe: str = "step"
    probe_steps: int = 48
    probe_records: int = 16
    cost: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.probe not in PROBES:
            near = difflib.get_close_matches(self.probe, PROBES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(PROBES)}"
            raise TrainingError(f"probe {self.probe!r} is unknown; {hint}")
        if self.probe_steps < 1:
            raise TrainingError(f"{self.probe_steps} steps of the training probe train nothing; give 1 or more")

    def training(self) -> ProbeTraining:
        """How the training probe trains: adapters of the card's rank, with twice the rank as alpha."""
        return ProbeTraining(steps=self.probe_steps, rank=self.rank, alpha=2.0 * self.rank, seed=self.seed)


def profile(
    base: BaseModel,
    dataset: Dataset,
    settings: ProfileSettings | None = None,
    progress: Progress | None = None,
    *,
    state: Path | None = None,
) -> LayerCard:
    """Make the Layer Card of a model on a reference data set.

    The model is bit for bit the same afterwards: weights, hooks, `requires_grad`, `.grad`, modes and random state.

    Args:
        base: The model.
        dataset: Reference records, at least 4.
        settings: How.
        progress: Told of each phase.
        state: Folder where the training probe keeps how far it is; what an interrupted call left there is used.

    Raises:
        DataError: Fewer than 4 records, or a loss that is not finite.
        TrainingError: A loss of the training probe is not finite.
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
    probe = _step_probe(base, held_examples, fit, held_out, settings, progress) if settings.probe != "none" else None
    trained = _training_probe(base, fit_examples, held_examples, dataset, settings, state, progress) if settings.probe == "train" else None
    made_with = asdict(settings) | ({"training_probe": asdict(settings.training())} if trained is not None else {})
    card = Assembly(base, dataset, made_with, fit, held_out, probe, trained, len(fit_examples)).card()
    return card.with_cost(_cost(base, dataset, settings, progress)) if settings.cost else card


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


def _training_probe(
    base: BaseModel,
    fit_examples: list[Example],
    held_examples: list[Example],
    dataset: Dataset,
    settings: ProfileSettings,
    state: Path | None,
    progress: Progress | None,
) -> TrainingProbe:
    key = f"{dataset.fingerprint} {len(dataset)} {settings.fit_share} {settings.seed}"
    return training_probes(
        base,
        fit_examples,
        held_examples,
        settings.training(),
        key=key,
        batch_size=settings.batch_size,
        folder=state,
        progress=progress,
    )


def _cost(base: BaseModel, dataset: Dataset, settings: ProfileSettings, progress: Progress | None) -> CostModel:
    """Cost of a training step on a batch as training takes them by default."""
    batch = usual_batch(dataset.examples, TrainSettings().batch_size, base.pad_id, settings.seed)
    return measure_cost(base, batch, rank=settings.rank, repeats=1, progress=progress)
