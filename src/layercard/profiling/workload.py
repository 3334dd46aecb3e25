"""How much work the phases of a long command are, before it begins: for the time that the whole of it will take.

The unit is one token through all blocks, forward. The factors were measured on SmolLM2-135M with 32 E2E records on a CPU; where they are
wrong for a model or machine, a phase's own pace takes over as it begins (`commands.remaining`).
"""

from collections.abc import Mapping, Sequence

from layercard.data.load import Dataset, Example
from layercard.models.load import BaseModel
from layercard.profiling.profile import probe_training, split_records
from layercard.profiling.training_probe import planned_steps
from layercard.settings import ProfileSettings, TrainSettings

BACKWARD = 1.0
"""A backward pass to the inputs alone."""
MOMENTS = 2.0
"""Adding the signals of a pass to the moments."""
SLOPES = 0.5
"""Taking the scalars of a held-out pass."""
SOLVING = 3.2
"""Solving for the steps, for each token that made them, up to the widest input (beyond that the moments are as wide as the input)."""
PROBING = 1.3
"""A forward pass of the step probe, whose head is read for every layer."""
COST_STEPS = 35.0
"""Training steps of the cost, all layers and none counted alike, on a batch that is longer than the mean."""


def profile_work(base: BaseModel, dataset: Dataset, settings: ProfileSettings, *, stream: bool = False) -> dict[str, float]:
    """Work of the phases of a profile, by the names under which progress is told."""
    depth, widest = len(base.blocks), max(one.in_features for block in base.blocks for one in block.linear_modules)
    fit, held = split_records(dataset, settings)
    fit_tokens, held_tokens, probed = _tokens(fit), _tokens(held), _tokens(held[: settings.probe_records])
    fit_pass = fit_tokens * (BACKWARD + MOMENTS)
    solving = SOLVING * min(fit_tokens, widest)
    held_pass = held_tokens * (BACKWARD + SLOPES) * (1 + settings.label_samples)
    probe = {"step probe": probed * (depth + 1) * PROBING}
    if stream:
        work = {"forward": fit_tokens + held_tokens, "backward": fit_tokens + fit_pass + solving + held_tokens + held_pass}
        return work | (probe if settings.probe != "none" else {})
    work = {"fit pass": fit_tokens + fit_pass, "steps": solving, "held-out pass": held_tokens + held_pass}
    if settings.probe != "none":
        work |= {"entries": float(probed)} | probe
    if settings.probe == "train":
        training, mean = probe_training(settings), dataset.tokens / len(dataset)
        work["training probe"] = planned_steps(depth, training.steps) * training.batch_size * mean * (1 + BACKWARD) / 2
    if settings.cost:
        work["cost"] = COST_STEPS * TrainSettings().batch_size * dataset.tokens / len(dataset)
    return work


def training_work(data: Dataset, valid: Dataset | None, settings: TrainSettings) -> dict[str, float]:
    """Work of the phases of a training run."""
    steps = settings.total_steps(len(data))
    work = {"train": steps * settings.batch_size * settings.accumulation * data.tokens / len(data) * (1 + BACKWARD)}
    return {"loss before": float(valid.tokens), **work, "loss after": float(valid.tokens)} if valid is not None else work


def comparison_work(names: Sequence[str], data: Dataset, valid: Dataset, settings: TrainSettings) -> Mapping[str, float]:
    """Work of the phases of a comparison."""
    one = training_work(data, valid, settings)
    before = one.pop("loss before")
    return {"loss before": before} | {f"{name}: {phase}": amount for name in names for phase, amount in one.items()}


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.input_ids) for example in examples)
