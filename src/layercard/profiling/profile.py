"""From a model and records to a Layer Card.

`layercard.profile`: the first call of the way through, for models and records at hand.

```python
card = layercard.profile(model, tokenizer, records)
placement = layercard.select(card, k=5)
model = layercard.apply(model, placement, LoraConfig(r=16, lora_alpha=32))
```
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from layercard import processes
from layercard.card.card import LayerCard, PhaseInfo
from layercard.checkpoint import SCHEMA, State, opened
from layercard.cost.measure import measure_cost, usual_batch
from layercard.cost.model import CostModel
from layercard.data.checks import check_ids, check_labels
from layercard.data.load import Dataset, Example, load_data
from layercard.errors import DataError, ModelError
from layercard.measure import Phases
from layercard.models.load import BaseModel, Progress, load_model, wrap_model
from layercard.profiling.assemble_card import Assembly
from layercard.profiling.fit import Fit, HeldOut, fit_pass, form
from layercard.profiling.held_out import held_out_pass
from layercard.profiling.step_probe import ProbeTraining, ReplayedSet, Step, StepProbe, step_probe
from layercard.profiling.training_probe import TrainingProbe, training_probes
from layercard.settings import ProfileSettings, TrainSettings
from layercard.statistics.coupling import curvature, descent

# ---- profiling

REPLAYED = 0.05
"""How far losses of blocks that were entered may lie from those of the whole forward, as a share: more than rounding in bfloat16."""


def probe_training(settings: ProfileSettings) -> ProbeTraining:
    """How the training probe trains: adapters of the card's rank, with twice the rank as alpha."""
    return ProbeTraining(steps=settings.probe_steps, rank=settings.rank, alpha=2.0 * settings.rank, seed=settings.seed)


def profile_records(
    base: BaseModel,
    dataset: Dataset,
    settings: ProfileSettings | None = None,
    progress: Progress | None = None,
    *,
    state: Path | None = None,
) -> LayerCard:
    """Make the Layer Card of a model on a reference data set.

    The model is bit for bit the same afterwards: weights, hooks, `requires_grad`, `.grad`, modes and random state. Started by `torchrun`
    or `accelerate launch`, the processes share records and layers, and all return the card of one process, to rounding.

    Args:
        base: The model.
        dataset: Reference records, at least 4.
        settings: How.
        progress: Told of each phase.
        state: Folder where the parts are kept as they are finished; what an interrupted call of the same model, data and settings left
            there is used, to the same card bit for bit (on a CPU). It is the caller's to remove (`state.discard`).

    Raises:
        DataError: Fewer than 4 records, one without a labelled token or with ids that the model does not have, or a loss that is not
            finite.
        ModelError: Activations or gradients are not finite: half precision overflows.
        OutputError: `state` is something else, another run works there, or it cannot be written.
        TrainingError: A loss of the training probe is not finite.
    """
    settings = settings or ProfileSettings()
    check_ids(base.model, dataset)
    split = split_records(dataset, settings)
    with processes.joined(base.device), opened(state, plan_of(base, dataset, settings), form(base)) as kept:
        return _Profile(base, dataset, settings, *split, kept, progress if processes.is_first() else None).card()


class _Profile:
    """One card on its way; each part is made once and kept."""

    def __init__(
        self,
        base: BaseModel,
        dataset: Dataset,
        settings: ProfileSettings,
        fit_examples: list[Example],
        held_examples: list[Example],
        state: State,
        progress: Progress | None,
    ) -> None:
        self.base, self.dataset, self.settings, self.state, self.progress = base, dataset, settings, state, progress
        self.fit_examples, self.held_examples = fit_examples, held_examples
        self.phases = Phases()

    def card(self) -> LayerCard:
        """All parts in turn."""
        settings, once = self.settings, self._once
        fit: Fit = once("fit", self._fit)
        for name in ("fit-pass", "steps"):
            self.state.drop(f"{name}-{processes.rank()}")
        held_out: HeldOut = once("held-out", lambda: self._held_out(fit))
        probe: StepProbe | None = once("step-probe", lambda: self._step_probe(fit, held_out)) if settings.probe != "none" else None
        trained = None
        if settings.probe == "train":
            with self.phases.phase("training-probe"):
                trained = self._training_probe()
        made_with = asdict(settings) | ({"training_probe": asdict(probe_training(settings))} if trained is not None else {})
        card = Assembly(self.base, self.dataset, made_with, fit, held_out, probe, trained, len(self.fit_examples)).card()
        if not settings.cost:
            return card
        card = card.with_cost(CostModel.from_json(once("cost", self._cost)))
        return card.model_copy(update={"phases": tuple(PhaseInfo(**phase) for phase in self.state.once("phases", self.phases.to_json))})

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """A part of the state, its making measured."""
        with self.phases.phase(name):
            return self.state.once(name, make)

    def _fit(self) -> Fit:
        settings = self.settings
        return fit_pass(
            self.base,
            self.fit_examples,
            rank=settings.rank,
            ridge=settings.ridge,
            batch_size=settings.batch_size,
            progress=self.progress,
            state=self.state,
        )

    def _held_out(self, fit: Fit) -> HeldOut:
        settings = self.settings
        return held_out_pass(
            self.base,
            self.held_examples,
            fit,
            samples=settings.label_samples,
            seed=settings.seed,
            batch_size=settings.batch_size,
            progress=self.progress,
            state=self.state,
        )

    def _step_probe(self, fit: Fit, held_out: HeldOut) -> StepProbe:
        scaled, slopes = scaled_steps(fit, held_out)
        probed = self.held_examples[: self.settings.probe_records]
        entered = ReplayedSet(self.base, probed, range(len(self.base.blocks)), self.settings.batch_size, progress=self.progress)
        probe = step_probe(self.base, scaled, slopes, entered, self.progress, self.state)
        _check_replay(self.base, probe, held_out)
        return probe

    def _training_probe(self) -> TrainingProbe:
        settings, folder = self.settings, self.state.folder
        return training_probes(
            self.base,
            self.fit_examples,
            self.held_examples,
            probe_training(settings),
            key=f"{self.dataset.fingerprint} {len(self.dataset)} {settings.fit_share} {settings.seed}",
            batch_size=settings.batch_size,
            folder=None if folder is None else folder / "training-probe",
            progress=self.progress,
        )

    def _cost(self) -> dict[str, Any] | None:
        """Cost of a training step; the first process measures it, the others wait."""
        return processes.by_first(lambda: step_cost(self.base, self.dataset, self.settings, self.progress).to_json())


def step_cost(base: BaseModel, dataset: Dataset, settings: ProfileSettings, progress: Progress | None = None) -> CostModel:
    """What a training step costs on this machine, timed on a batch as training takes them by default."""
    batch = usual_batch(dataset.examples, TrainSettings().batch_size, base.pad_id, settings.seed)
    return measure_cost(base, batch, rank=settings.rank, repeats=1, progress=progress)


def plan_of(base: BaseModel, dataset: Dataset, settings: ProfileSettings) -> dict[str, Any]:
    """All that decides about a card: two calls with equal plans make the same one."""
    return {
        "schema": SCHEMA,
        "model": base.fingerprint,
        "data": dataset.fingerprint,
        "records": len(dataset),
        **asdict(settings),
        "device": base.device.type,
        "processes": processes.count(),
        "versions": {name: version(name) for name in ("layercard", "torch", "transformers", "peft")},
    }


def split_records(dataset: Dataset, settings: ProfileSettings) -> tuple[list[Example], list[Example]]:
    """Records that make the steps, and records that measure them; the split depends on the seed alone."""
    if len(dataset) < 4:
        raise DataError(f"{dataset.source} gives {len(dataset)} records; a card needs at least 4, and 64 are a good start")
    check_labels(dataset)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    cut = min(max(round(settings.fit_share * len(order)), 2), len(order) - 2)
    return [dataset.examples[row] for row in sorted(order[:cut])], [dataset.examples[row] for row in sorted(order[cut:])]


def _check_replay(base: BaseModel, probe: StepProbe, held_out: HeldOut) -> None:
    """Refuse a step probe whose losses without a step, which come from the last block alone, are not those of the whole forward.

    Raises:
        ModelError: They are not, so the blocks hand each other more than hidden states.
    """
    whole = held_out.nats[: len(probe.before)]
    apart = float((probe.before - whole).abs().sum() / whole.sum())
    if apart > REPLAYED:
        raise ModelError(
            f"the blocks of {type(base.model).__name__} hand each other more than hidden states: from the last block on the records' "
            f"losses lie {100 * apart:.0f} % from those of the whole forward; profile with probe 'none' (--probe none)"
        )


def scaled_steps(fit: Fit, held_out: HeldOut) -> tuple[list[Step], list[float]]:
    """Each layer's step at the length where the quadratic model puts its minimum, and the slope of the loss along it at 0."""
    lengths = step_lengths(fit, held_out).tolist()
    steps = [{path: (down * length, up) for path, (down, up) in step.items()} for step, length in zip(fit.steps, lengths, strict=True)]
    return steps, (descent(held_out.slopes, held_out.labelled) * torch.tensor(lengths)).tolist()


def step_lengths(fit: Fit, held_out: HeldOut) -> torch.Tensor:
    """`b_ℓ / K_ℓℓ: [L]`, the length at which the quadratic model puts the minimum along each layer's step."""
    k, b = curvature(held_out.drawn, held_out.labelled).diagonal(), descent(held_out.slopes, held_out.labelled)
    lengths = torch.where((k > 0) & (b > 0), b / k.clamp(min=1e-12), torch.full_like(b, math.nan))
    usual = lengths.nanmedian()
    return torch.where(lengths.isnan(), usual if not usual.isnan() else torch.ones_like(usual), lengths)


# ---- api

Model: TypeAlias = PreTrainedModel | BaseModel | str | os.PathLike[str]
"""A transformers model, what `load_model` gives, or a name that `load_model` takes."""
Records: TypeAlias = str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Dataset
"""A source that `load_data` takes: the name of a file or set, or records such as a list of dictionaries or a `datasets.Dataset`; or what
it gives."""


def profile(
    model: Model,
    tokenizer: Any,
    data: Records,
    *,
    records: int | None = 64,
    max_length: int = 1024,
    separator: str = "\n",
    rank: int = 8,
    ridge: float = 1.0,
    batch_size: int = 8,
    fit_share: float = 0.6,
    label_samples: int = 3,
    probe: str = "step",
    probe_steps: int = 48,
    probe_records: int = 16,
    cost: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
    state: str | os.PathLike[str] | None = None,
) -> LayerCard:
    """Make the Layer Card of a model on reference records.

    The model is the same afterwards: weights, modes of its modules, `requires_grad`, `.grad`, hooks and random state, also where this
    raises. It is profiled on its device and in its dtype.

    Args:
        model: A transformers model, without adapters; or a name as `load_model` takes it (then in float32, on the best device here).
        tokenizer: Its tokenizer; `None` where the model is given by name, for the one that comes with it.
        data: Records with `prompt` and `completion`, `messages` or `text`, as `load_data` takes them, or a `Dataset` that it gave.
        records: Profile the first so many, `None` for all. A `Dataset` is taken whole.
        max_length: Longest record in tokens; what goes beyond is cut. A `Dataset` is cut already.
        separator: Put between prompt and completion; empty where the prompts end as they do in training.
        rank: Rank of the steps: that of the adapter one means to train.
        ridge: Regularisation of each input's covariance, as a share of its usual energy.
        batch_size: Records in a batch.
        fit_share: Share of the records that make the steps; the others measure them.
        label_samples: How often labels are drawn from the model for the coupling; each is one more backward pass.
        probe: `none`, `step` (the step probe) or `train` (the step probe, then the training probe).
        probe_steps: Training steps of the training probe.
        probe_records: Held-out records that the step probe measures on.
        cost: Whether to time a few training steps, in seconds and bytes; else costs are relative, from shapes. Times differ from call
            to call, so a card that must come out the same again does without.
        seed: Of the split, the drawn labels and the bootstrap.
        progress: Called with a phase's name, how much is done and how much there is.
        state: Folder for what is finished; an interrupted call with the same arguments goes on from there. It is the caller's to remove.

    Raises:
        ModelError: The model carries adapters, is of no kind that can be profiled, or has no tokenizer.
        DataError: The records cannot be used, or are fewer than 4.
        OutputError: `state` is something else, another run works there, or it cannot be written.
        TrainingError: An unknown probe, or a loss of the training probe that is not finite.
    """
    settings = ProfileSettings(
        rank=rank,
        ridge=ridge,
        batch_size=batch_size,
        fit_share=fit_share,
        label_samples=label_samples,
        probe=probe,
        probe_steps=probe_steps,
        probe_records=probe_records,
        cost=cost,
        seed=seed,
    )
    with _modes_kept(model) if isinstance(model, nn.Module) else nullcontext():
        base = _base(model, tokenizer, progress)
        if not isinstance(data, Dataset):
            data = load_data(data, base.tokenizer, records=records, max_length=max_length, separator=separator, classes=base.classes)
        return profile_records(base, data, settings, progress, state=None if state is None else Path(state))


def _base(model: Model, tokenizer: Any, progress: Progress | None) -> BaseModel:
    """The model with what profiling must know of it.

    Raises:
        ModelError: It is none, carries adapters, or lacks a tokenizer.
    """
    if isinstance(model, BaseModel):
        return _with_tokenizer(model, tokenizer)
    if isinstance(model, str | os.PathLike):
        return _with_tokenizer(load_model(model, progress=progress), tokenizer)
    if isinstance(model, PeftModel):
        raise ModelError("the model carries adapters, and a card is of a base model; pass model.unload(), or profile before adding them")
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"expected a transformers model or its name, found {type(model).__name__}; pass the model inside the wrapper")
    adapted = next((name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if adapted is not None:
        raise ModelError(f"the model carries an adapter on {adapted}, and a card is of a base model; profile before adding adapters")
    if tokenizer is None:
        raise ModelError("a model at hand needs its tokenizer: layercard.profile(model, tokenizer, data)")
    return wrap_model(model, tokenizer, name=model.name_or_path or "in-memory")


def _with_tokenizer(base: BaseModel, tokenizer: Any) -> BaseModel:
    return base if tokenizer is None else replace(base, tokenizer=tokenizer)


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module back into train or eval mode as it was."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
