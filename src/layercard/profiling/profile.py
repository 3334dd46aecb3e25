"""From a model and records to a Layer Card: the first call of the way through.

```python
card = layercard.profile(model, tokenizer, records)
placement = layercard.select(card, k=5)
model = layercard.apply(model, placement, LoraConfig(r=16, lora_alpha=32))
```

`profile_records` is the main path: one half of the records makes a step for each layer (`fit`), the other half measures it and makes
steps that the first half measures (`held_out`), the probes try them out (`step_probe`, `training_probe`), and all of it becomes a card
(`assemble_card`).
For a model whose weights stay on disk, `streamed` goes the same way block by block.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from layercard import processes
from layercard.card.card import LayerCard, PhaseInfo
from layercard.checkpoint import SCHEMA, Form, opened
from layercard.cost.measure import measure_cost, usual_batch
from layercard.cost.model import CostModel
from layercard.data.checks import check_ids, check_labels
from layercard.data.load import Dataset, Example, load_data
from layercard.errors import DataError, ModelError, TrainingError
from layercard.files import alone
from layercard.measure import Phases
from layercard.models.load import BaseModel, Progress, load_model, wrap_model
from layercard.models.streamed import StreamedModel
from layercard.models.streamed_pass import Boundaries
from layercard.profiling.assemble_card import assemble_card, step_lengths
from layercard.profiling.fit import Fit, Step, fit_pass, form, solved
from layercard.profiling.held_out import HeldOut, held_out_pass
from layercard.profiling.step_probe import ReplayedSet, StepProbe, probed_layers, step_probe
from layercard.profiling.streamed import folder_between_blocks, stream_passes, stream_step_probe, streamed_cost
from layercard.profiling.training_probe import ProbeTraining, TrainingProbe, training_probes
from layercard.settings import ProfileSettings, TrainSettings
from layercard.statistics.coupling import descent
from layercard.statistics.coverage import blended, coverage, demand, greedy_layers
from layercard.statistics.ranks import spearman

T = TypeVar("T")
FEWEST_RECORDS = 16
"""Records with which `profile_until_stable` begins; it doubles them."""
SAME_COVERAGE, SAME_ORDER, COMPARED_LAYERS = 0.99, 0.9, 5
"""When a choice is stable: its five layers cover so much of what those of the later card cover there, and Spearman's correlation of both
cards' gain estimates is at least that."""
REPLAY_ERROR = 0.05
"""How far losses from the last block alone may lie from those of the whole forward, as a share: more than rounding in bfloat16."""

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
    records: int | Literal["auto"] | None = 64,
    most_records: int = 256,
    max_length: int = 1024,
    separator: str = "\n",
    rank: int = 8,
    ridge: float = 1.0,
    batch_size: int = 8,
    label_samples: int = 1,
    probe: str = "step",
    probe_steps: int = 48,
    probe_records: int = 12,
    probe_layers: int = 8,
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
        records: Profile the first so many, `None` for all; "auto": as many as it takes until the choice of layers is stable
            (`profile_until_stable`). A `Dataset` is taken whole unless "auto".
        most_records: With "auto": at most so many.
        max_length: Longest record in tokens; what goes beyond is cut. A `Dataset` is cut already.
        separator: Put between prompt and completion; empty where the prompts end as they do in training.
        rank, ridge, batch_size, label_samples, probe, probe_steps, probe_records, probe_layers, cost, seed: As in `ProfileSettings`.
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
        label_samples=label_samples,
        probe=probe,
        probe_steps=probe_steps,
        probe_records=probe_records,
        probe_layers=probe_layers,
        cost=cost,
        seed=seed,
    )
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        base = _base_model(model, tokenizer, progress)
        if not isinstance(data, Dataset):
            count = most_records if records == "auto" else records
            data = load_data(data, base.tokenizer, records=count, max_length=max_length, separator=separator, classes=base.classes)
        make = profile_until_stable if records == "auto" else profile_records
        return make(base, data, settings, progress, state=None if state is None else Path(state))
    finally:
        for module, training in modes:
            module.training = training


def _base_model(model: Model, tokenizer: Any, progress: Progress | None) -> BaseModel:
    """The model with what profiling must know of it."""
    if isinstance(model, str | os.PathLike):
        model = load_model(model, progress=progress)
    if isinstance(model, BaseModel):
        return model if tokenizer is None else replace(model, tokenizer=tokenizer)
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


def profile_records(
    model: BaseModel | StreamedModel,
    dataset: Dataset,
    settings: ProfileSettings | None = None,
    progress: Progress | None = None,
    *,
    state: Path | None = None,
    boundaries: Path | None = None,
) -> LayerCard:
    """Make the Layer Card of a model on a reference data set.

    The model is bit for bit the same afterwards: weights, hooks, `requires_grad`, `.grad`, modes and random state. Started by `torchrun`
    or `accelerate launch`, the processes share records and layers, and all return the card of one process, to rounding.

    Of a streamed model one block at a time is in memory; its card is the same. Memory: the largest of block with its moments, embedding,
    and head with the logits of a batch; and what goes from block to block, `blocks × tokens × width` numbers, unless that is on disk.
    Each block is read twice for the signals and three times more for the step probe.

    Args:
        model: The model, in memory or streamed. A streamed one cannot have the training probe, which needs the model in memory; its costs
            are estimated from the shapes and this device's rates, for the same reason.
        dataset: Reference records, at least 4.
        settings: How.
        progress: Told of each phase.
        state: Folder where the parts are kept as they are finished; what an interrupted call of the same model, data and settings left
            there is used, to the same card bit for bit (on a CPU). It is the caller's to remove (`checkpoint.discard`).
        boundaries: Of a streamed model, the folder for hidden states and gradients between blocks, which this run has for itself; they are
            gone at the end. When not given they are in memory, or in `state` where they would take more than a
            quarter of what is free.

    Raises:
        DataError: Fewer than 4 records, one without a labelled token or with ids that the model does not have, or a loss that is not
            finite.
        ModelError: Activations or gradients are not finite: half precision overflows; or the blocks hand each other more than hidden
            states.
        OutputError: A folder is something else, another run works there, or it cannot be written.
        TrainingError: A loss of the training probe is not finite, or a streamed model is to be trained.
    """
    settings = settings or ProfileSettings()
    streamed = model if isinstance(model, StreamedModel) else None
    base = streamed.base if streamed else model
    assert isinstance(base, BaseModel)
    if streamed and settings.probe == "train":
        raise TrainingError("the training probe needs the model in memory, and --stream leaves it on disk; use --probe step or none")
    check_ids(base.model, dataset)
    halves = split_records(dataset, settings)
    plan = plan_of(base, dataset, settings) | ({"device": streamed.device.type, "streamed": True} if streamed else {})
    progress = progress if processes.is_first() else None
    made_with, phases = asdict(settings), Phases()
    with ExitStack() as stack:
        stack.enter_context(processes.joined(base.device))
        parts = stack.enter_context(opened(state, plan, form(base, HeldOut, StepProbe)))

        def once(name: str, make: Callable[[], T]) -> T:
            """A part of the state, its making measured."""
            with phases.phase(name):
                return parts.once(name, make)

        # Steps 1 and 2: one half of the records makes a step for each layer. The other half measures it and makes steps of its own, which
        # the first half measures: three passes over halves.
        fits: tuple[Fit, Fit]
        held_out: HeldOut
        if streamed:
            boundaries = boundaries or folder_between_blocks(streamed, dataset, state)
            if boundaries is not None:
                stack.enter_context(alone(boundaries))
            between = Boundaries(boundaries)
            fits, held_out, reading = parts.once(
                "passes",
                lambda: stream_passes(streamed, halves, settings, between, progress, parts, phases),
            )
            streamed.go_on(reading)
        else:

            def cross() -> tuple[HeldOut, Fit]:
                measured, sums = held_out_pass(base, halves[1], fit, settings, progress, parts, half=1, phase="cross pass")
                tokens = sum(len(example.input_ids) for example in halves[1])
                return measured, solved(base, sums, tokens, settings, progress, parts)

            def drop(*names: str) -> None:
                for name in names:
                    parts.drop(f"{name}-{processes.rank()}")

            fit = once("fit", lambda: fit_pass(base, halves[0], settings, progress, parts))
            drop("fit-pass", "steps")
            second, crossed = once("cross", cross)
            drop("cross-pass", "steps")
            first = once("held-out", lambda: held_out_pass(base, halves[0], crossed, settings, progress, parts)[0])
            fits, held_out = (fit, crossed), HeldOut.joined(first, second)

        # Step 3: what each layer's step does to the loss of records of the other half.
        def probe_steps() -> tuple[StepProbe, dict[str, int]]:
            layers = probed_layers(len(base.blocks), settings.probe_layers)
            wanted = (-(-settings.probe_records // 2), settings.probe_records // 2)
            counts = [min(len(half), count) for half, count in zip(halves, wanted, strict=True)]
            rows = torch.cat([torch.arange(counts[0]), len(halves[0]) + torch.arange(counts[1])])
            chosen = [half[:count] for half, count in zip(halves, counts, strict=True)]
            steps, slopes = scaled_steps(fits, held_out)
            if streamed:
                probe = stream_step_probe(streamed, steps, slopes, layers, chosen, rows, settings.batch_size, between, progress, parts)
                return probe, streamed.reading
            entered = []
            for number, examples in enumerate(chosen, 1):
                entered.append(ReplayedSet(base, examples, layers, settings.batch_size))
                if progress:
                    progress("entries", number, len(chosen))
            probe = step_probe(base, list(zip(reversed(steps), entered, strict=True)), slopes, layers, rows, progress, parts)
            _check_replay(base, probe, held_out)
            return probe, {}

        probe: StepProbe | None = None
        if settings.probe != "none":
            probe, reading = once("step-probe", probe_steps)
            if streamed:
                streamed.go_on(reading)

        # Step 4: what a few training steps in each layer do.
        trained: TrainingProbe | None = None
        if settings.probe == "train":
            training = probe_training(settings)
            made_with["training_probe"] = asdict(training)
            with phases.phase("training-probe"):
                trained = training_probes(
                    base,
                    *halves,
                    training,
                    key=f"{dataset.fingerprint} {len(dataset)} {settings.seed}",
                    batch_size=settings.batch_size,
                    folder=None if parts.folder is None else parts.folder / "training-probe",
                    progress=progress,
                )

        # Step 5: the card, and what placements cost on this machine.
        card = assemble_card(base, dataset, made_with, fits, held_out, probe, trained)
        if streamed:
            card = card.model_copy(update={"settings": card.settings | {"device": streamed.device.type, "stream": streamed.reading}})
        if not settings.cost:
            return card
        if streamed:
            card = card.with_cost(streamed_cost(streamed, dataset, settings))
        else:  # the first process measures it, the others wait
            cost = once("cost", lambda: processes.by_first(lambda: step_cost(base, dataset, settings, progress).to_json()))
            card = card.with_cost(CostModel.from_json(cost))
        return card.model_copy(update={"phases": tuple(PhaseInfo(**phase) for phase in parts.once("phases", phases.to_json))})


def profile_until_stable(
    model: BaseModel | StreamedModel,
    dataset: Dataset,
    settings: ProfileSettings | None = None,
    progress: Progress | None = None,
    *,
    state: Path | None = None,
    boundaries: Path | None = None,
) -> LayerCard:
    """Profile the first 16 records, then twice as many, and so on, until the choice of layers is stable or the records are used up.

    It is stable once the five layers that the card before would choose cover at least 99 % of what the new card's own five cover there,
    and both rank layers alike. All of it takes at most twice as long as the last card. Arguments and errors are those of
    `profile_records`; the card's settings say after how many records it stopped.
    """
    base = model.base if isinstance(model, StreamedModel) else model
    plan = plan_of(base, dataset, settings or ProfileSettings()) | {"until": "the choice is stable"}
    card: LayerCard | None = None
    count = min(FEWEST_RECORDS, len(dataset))
    with processes.joined(base.device), opened(state, plan, Form()):
        while True:
            part = replace(dataset, examples=dataset.examples[:count], fingerprint=f"{dataset.fingerprint}-{count}")
            is_last = count == len(dataset)
            earlier, folder = card, None if state is None else state / f"records-{count}"
            card = profile_records(model, dataset if is_last else part, settings, progress, state=folder, boundaries=boundaries)
            stable = earlier is not None and same_choice(earlier, card)
            if stable or is_last:
                return card.model_copy(update={"settings": card.settings | {"records": "auto", "choice_stable": stable}})
            count = min(2 * count, len(dataset))


def same_choice(earlier: LayerCard, card: LayerCard) -> bool:
    """Whether a card of more records would choose layers as one of fewer did (`profile_until_stable`)."""

    def parts(each: LayerCard) -> tuple[Any, Any]:
        gains = each.values("predicted_gain" if each.layers[0].step_probe is None else "step_probe")
        return blended(each.coupling), demand(gains)

    similar, weights = parts(card)
    before, after = (coverage(similar, weights, greedy_layers(*each, COMPARED_LAYERS)) for each in (parts(earlier), (similar, weights)))
    order = spearman(np.array(earlier.values("gain_estimate")), np.array(card.values("gain_estimate")))
    return before >= SAME_COVERAGE * after and order >= SAME_ORDER


def probe_training(settings: ProfileSettings) -> ProbeTraining:
    """How the training probe trains: adapters of the card's rank, with twice the rank as alpha."""
    return ProbeTraining(steps=settings.probe_steps, rank=settings.rank, alpha=2.0 * settings.rank, seed=settings.seed)


def step_cost(base: BaseModel, dataset: Dataset, settings: ProfileSettings, progress: Progress | None = None) -> CostModel:
    """What a training step costs on this machine, timed on a batch as training takes them by default; `layercard cost` repeats more."""
    batch = usual_batch(dataset.examples, TrainSettings().batch_size, base.pad_id, settings.seed)
    return measure_cost(base, batch, rank=settings.rank, repeats=0, progress=progress)


def plan_of(base: BaseModel, dataset: Dataset, settings: ProfileSettings) -> dict[str, Any]:
    """All that decides about a card: two calls with equal plans make the same one."""
    return {
        "schema": SCHEMA,
        "model": base.fingerprint,
        "dtype": str(base.model.dtype),
        **({"day": dataset.day} if dataset.day else {}),
        "data": dataset.fingerprint,
        "records": len(dataset),
        **asdict(settings),
        "device": base.device.type,
        "processes": processes.count(),
        "versions": {name: version(name) for name in ("layercard", "torch", "transformers", "peft")},
    }


def split_records(dataset: Dataset, settings: ProfileSettings) -> tuple[list[Example], list[Example]]:
    """Two halves of the records, each in the order of the data set; the split depends on the seed alone."""
    if len(dataset) < 4:
        raise DataError(f"{dataset.source} gives {len(dataset)} records; a card needs at least 4, and 64 are a good start")
    check_labels(dataset)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    cut = len(order) // 2
    return [dataset.examples[row] for row in sorted(order[:cut])], [dataset.examples[row] for row in sorted(order[cut:])]


def scaled_steps(fits: Sequence[Fit], held_out: HeldOut) -> tuple[list[list[Step]], list[float]]:
    """Each half's step of every layer at the length where the quadratic model puts its minimum, and the slope of the loss along it at 0.

    The lengths are `b_ℓ / K_ℓℓ` of all records together, or their median where a step leads uphill.
    """
    lengths = step_lengths(held_out)
    steps = [
        [
            {path: (down * length, up) for path, (down, up) in layer.step.items()}
            for layer, length in zip(fit.layers, lengths.tolist(), strict=True)
        ]
        for fit in fits
    ]
    return steps, (descent(held_out.slopes, held_out.labelled) * lengths).tolist()


def _check_replay(base: BaseModel, probe: StepProbe, held_out: HeldOut) -> None:
    """Refuse a step probe whose losses without a step, which come from the last block alone, are not those of the whole forward."""
    nats = held_out.nats[probe.rows]
    error = float((probe.before - nats).abs().sum() / nats.sum())
    if error > REPLAY_ERROR:
        raise ModelError(
            f"the blocks of {type(base.model).__name__} hand each other more than hidden states: from the last block on the records' "
            f"losses lie {100 * error:.0f} % from those of the whole forward; profile with probe 'none' (--probe none)"
        )
