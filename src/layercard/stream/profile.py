"""From a model on disk and records to a Layer Card."""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from layercard.assembly import Assembly
from layercard.card import LayerCard, PhaseInfo
from layercard.cost import CostModel
from layercard.data import Dataset
from layercard.errors import TrainingError
from layercard.files import alone
from layercard.loading import Progress
from layercard.meta import device_rates, estimated_cost, free_bytes
from layercard.phases import Phases
from layercard.probe import StepProbe
from layercard.profiling import ProfileSettings, plan_of, scaled_steps, split_records
from layercard.settings import TrainSettings
from layercard.signals import Fit, HeldOut, form
from layercard.soundness import check_ids
from layercard.state import opened
from layercard.stream.boundaries import Boundaries
from layercard.stream.passes import stream_passes
from layercard.stream.probe import stream_step_probe
from layercard.stream.streamed import StreamedModel
from layercard.timing import device_name, usual_batch

ROOM = 0.25
"""Share of the free memory that what goes from block to block may take."""


def stream_profile(
    streamed: StreamedModel,
    dataset: Dataset,
    settings: ProfileSettings | None = None,
    progress: Progress | None = None,
    *,
    boundaries: Path | None = None,
    state: Path | None = None,
) -> LayerCard:
    """As `profiling.profile`, with one block of the model in memory at a time.

    Memory: the largest of block with its moments, embedding, and head with the logits of a batch; and what goes from block to block,
    `blocks × tokens × width` numbers, or nothing where `boundaries` names a folder for it. Each block is read twice for the signals and
    three times more for the step probe.

    Args:
        streamed: The model.
        dataset: Reference records, at least 4.
        settings: How. The training probe cannot be had, since it needs the model in memory; costs are estimated from the shapes and
            this device's rates, for the same reason.
        progress: Told of each phase.
        boundaries: Folder for hidden states and gradients, which this run has for itself; they are gone at the end. When not given they
            are in memory, or in `state` where they would take more than `ROOM` of it.
        state: Folder where finished parts are kept, as for `profile`.

    Raises:
        TrainingError: The training probe is asked for.
        OutputError: A folder cannot be written, or another run is at work in it.
        DataError, ModelError: As `stream_passes`.
    """
    settings = settings or ProfileSettings()
    if settings.probe == "train":
        raise TrainingError("the training probe needs the model in memory, and --stream leaves it on disk; use --probe step or none")
    base = streamed.base
    check_ids(base.model, dataset)
    fit_examples, held_examples = split_records(dataset, settings)
    if boundaries is None and state is not None and _passing_bytes(streamed, dataset) > ROOM * free_bytes(torch.device("cpu")):
        boundaries = state / "boundaries"
    kept, phases = Boundaries(boundaries), Phases()
    with ExitStack() as stack:
        plan = plan_of(base, dataset, settings) | {"device": streamed.device.type, "streamed": True}
        parts = stack.enter_context(opened(state, plan, form(base)))
        if boundaries is not None:
            stack.enter_context(alone(boundaries))
        fit: Fit
        held_out: HeldOut
        fit, held_out = parts.once(
            "passes",
            lambda: stream_passes(
                streamed,
                fit_examples,
                held_examples,
                rank=settings.rank,
                ridge=settings.ridge,
                batch_size=settings.batch_size,
                samples=settings.label_samples,
                seed=settings.seed,
                boundaries=kept,
                progress=progress,
                state=parts,
                phases=phases,
            ),
        )

        def probed() -> StepProbe:
            steps, slopes = scaled_steps(fit, held_out)
            examples = held_examples[: settings.probe_records]
            with phases.phase("step-probe"):
                return stream_step_probe(
                    streamed, steps, slopes, examples, settings.batch_size, boundaries=kept, progress=progress, state=parts
                )

        probe: StepProbe | None = parts.once("step-probe", probed) if settings.probe == "step" else None
        took = parts.once("phases", phases.to_json)
    card = Assembly(base, dataset, asdict(settings), fit, held_out, probe, None, len(fit_examples)).card()
    card = card.model_copy(update={"settings": card.settings | _read(streamed)})
    if not settings.cost:
        return card
    card = card.with_cost(_cost(streamed, dataset, settings))
    return card.model_copy(update={"phases": tuple(PhaseInfo(**phase) for phase in took)})


def _passing_bytes(streamed: StreamedModel, dataset: Dataset) -> int:
    """Bytes of the hidden states between all blocks, padding not counted."""
    width = streamed.base.model.get_input_embeddings().weight.shape[1]
    return (len(streamed.blocks) + 1) * dataset.tokens * width * streamed.dtype.itemsize


def _cost(streamed: StreamedModel, dataset: Dataset, settings: ProfileSettings) -> CostModel:
    """What a training step would cost with the model in memory, from its shapes and what this device reaches."""
    base, size = streamed.base, TrainSettings().batch_size
    length = usual_batch(dataset.examples, size, base.pad_id, settings.seed).input_ids.shape[1]
    flops, bandwidth = device_rates(streamed.device, streamed.dtype, rows=size * length)
    return estimated_cost(
        base.model,
        flops=flops,
        bandwidth=bandwidth,
        name=base.name,
        dtype=str(streamed.dtype).removeprefix("torch."),
        device=device_name(streamed.device),
        batch_size=size,
        length=length,
        rank=settings.rank,
    )


def _read(streamed: StreamedModel) -> dict[str, Any]:
    """What a card says of how the model was read."""
    return {
        "device": streamed.device.type,
        "stream": {"bytes_read": streamed.weights.bytes_read, "peak_weights_bytes": streamed.peak_bytes},
    }
