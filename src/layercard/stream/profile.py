"""From a model on disk and records to a Layer Card."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from layercard.assembly import Assembly
from layercard.card import LayerCard
from layercard.data import Dataset
from layercard.errors import TrainingError
from layercard.loading import Progress
from layercard.probe import StepProbe
from layercard.profiling import ProfileSettings, plan_of, scaled_steps, split_records
from layercard.signals import Fit, HeldOut, form
from layercard.state import opened
from layercard.stream.boundaries import Boundaries
from layercard.stream.passes import stream_passes
from layercard.stream.probe import stream_step_probe
from layercard.stream.streamed import StreamedModel


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
        settings: How; neither the training probe nor the timing of steps can be had, since both need the model in memory.
        progress: Told of each phase.
        boundaries: Folder for hidden states and gradients.
        state: Folder where finished parts are kept, as for `profile`.

    Raises:
        TrainingError: The training probe or timing is asked for.
        DataError, ModelError: As `stream_passes`.
    """
    settings = settings or ProfileSettings()
    if settings.probe == "train":
        raise TrainingError("the training probe needs the model in memory, and --stream leaves it on disk; use --probe step or none")
    if settings.cost:
        raise TrainingError("timing a training step needs the model in memory, and --stream leaves it on disk; use --no-cost")
    base, kept = streamed.base, Boundaries(boundaries)
    fit_examples, held_examples = split_records(dataset, settings)
    with opened(state, plan_of(base, dataset, settings) | {"device": streamed.device.type, "streamed": True}, form(base)) as parts:
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
            ),
        )

        def probed() -> StepProbe:
            steps, slopes = scaled_steps(fit, held_out)
            examples = held_examples[: settings.probe_records]
            return stream_step_probe(streamed, steps, slopes, examples, settings.batch_size, boundaries=kept, progress=progress)

        probe: StepProbe | None = parts.once("step-probe", probed) if settings.probe == "step" else None
    card = Assembly(base, dataset, asdict(settings), fit, held_out, probe, None, len(fit_examples)).card()
    return card.model_copy(update={"settings": card.settings | _read(streamed)})


def _read(streamed: StreamedModel) -> dict[str, Any]:
    """What a card says of how the model was read."""
    return {
        "device": streamed.device.type,
        "stream": {"bytes_read": streamed.weights.bytes_read, "peak_weights_bytes": streamed.peak_bytes},
    }
