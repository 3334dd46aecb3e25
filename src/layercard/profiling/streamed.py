"""The two passes of a profile over a model on disk: forward block by block, then backward block by block.

Each block is read twice. Forward, all batches go through it before the next one is read, and what enters each block is kept. Backward, a
block runs once more on what entered it, with its graph this time: the gradient of what left it gives the gradient of what entered it, and
on the way the signals of its maps. The batches that make the steps come first, so that the steps of the block are known when the
held-out batches reach it. The numbers are those of the passes over a model in memory (`layercard.signals`), to rounding.

The step probe over a model on disk: the steps of all layers at once, so that each block is read twice however many layers there are.

From a model on disk and records to a Layer Card.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from layercard.card.card import LayerCard, PhaseInfo
from layercard.checkpoint import State, opened
from layercard.cost.estimate import device_rates, estimated_cost, free_bytes
from layercard.cost.measure import device_name, usual_batch
from layercard.cost.model import CostModel
from layercard.data.checks import check_ids
from layercard.data.load import IGNORED, Batch, Dataset, Example
from layercard.errors import DataError, TrainingError
from layercard.files import alone
from layercard.measure import Phases
from layercard.models.hooks import capturing, stepped
from layercard.models.load import Progress
from layercard.models.streamed import StreamedModel
from layercard.models.streamed_pass import BlockByBlock, Boundaries, forward, walking
from layercard.profiling.assemble_card import Assembly
from layercard.profiling.fit import Fit, FitSums, HeldOut, fit_sink, form, solve_layer
from layercard.profiling.held_out import HeldOutSums, drawn_slopes, label_thresholds
from layercard.profiling.profile import plan_of, scaled_steps, split_records
from layercard.profiling.step_probe import Step, StepProbe, second_length
from layercard.settings import ProfileSettings, TrainSettings

# ---- stream.passes

PART = "streamed-passes"
"""Name of the part that a `State` keeps."""


def stream_passes(
    streamed: StreamedModel,
    fit_examples: Sequence[Example],
    held_examples: Sequence[Example],
    *,
    rank: int,
    ridge: float,
    batch_size: int,
    samples: int,
    seed: int,
    boundaries: Boundaries | None = None,
    progress: Progress | None = None,
    state: State | None = None,
    phases: Phases | None = None,
) -> tuple[Fit, HeldOut]:
    """Both passes of a profile over a model on disk.

    Args:
        streamed: The model.
        fit_examples: Records to make the steps from.
        held_examples: Records that measure them.
        rank: Rank of the steps.
        ridge: λ as a share of `ridge_scale`.
        batch_size: Records in a batch.
        samples: How many times labels are drawn from the model.
        seed: Of the draws.
        boundaries: Where hidden states and gradients are kept; in memory when not given.
        progress: Told of blocks: `forward`, then `backward`.
        state: Where the blocks that are done are kept from time to time; a later call runs forward to the next one only.
        phases: Where time and memory of `forward`, `head` and `backward` are noted.

    Raises:
        DataError: The loss is not finite.
        ModelError: The blocks hand on more than hidden states.
    """
    kept, state, phases = boundaries or Boundaries(), state or State(), phases or Phases()
    fit = BlockByBlock(streamed, fit_examples, batch_size, kept, "fit")
    held = BlockByBlock(streamed, held_examples, batch_size, kept, "held")
    passes = _Passes(streamed, fit, held, samples, seed, kept)
    with walking(streamed):
        done = state.load(PART)
        if done is not None:
            passes.restore(done)
        with phases.phase("forward"):
            forward(streamed, (fit, held), progress, until=passes.next)
        if done is None:
            with phases.phase("head"), streamed.loaded([streamed.head()]):
                passes.head(len(held_examples))
        with phases.phase("backward"):
            return passes.backward(rank, ridge, progress, state)


def _gradient_of(hidden: torch.Tensor, value: torch.Tensor, slope: torch.Tensor | None, *, keep: bool) -> torch.Tensor:
    """What `value.backward(slope)` gives to `hidden`; the graph stays where it is to be kept."""
    return torch.autograd.grad(value, hidden, slope, retain_graph=keep)[0]


class _Passes:
    """From the losses down to the first block."""

    def __init__(
        self, streamed: StreamedModel, fit: BlockByBlock, held: BlockByBlock, samples: int, seed: int, boundaries: Boundaries
    ) -> None:
        self.streamed, self.fit, self.held, self.samples, self.seed, self.boundaries = streamed, fit, held, samples, seed, boundaries
        self.labelled, self.nats, self.tokens = 0, 0.0, 0
        self.sums: HeldOut | None = None
        self.parts: dict[str, Fit] = {}
        self.next = len(streamed.blocks)

    def restore(self, done: dict[str, Any]) -> None:
        """Go on from what `_done` gave; the hidden states below its last block must be made anew."""
        self.labelled, self.nats, self.tokens, self.next = done["labelled"], done["nats"], done["tokens"], done["next"]
        self.sums, self.parts = done["sums"], done["parts"]
        for name, gradient in done["gradients"].items():
            kind, which, at = name.split("-")
            self.boundaries.put(f"{kind}-gradient-{which}", int(at), self.next, gradient)

    def _done(self) -> dict[str, Any]:
        kinds = [("fit", 0, self.fit), *(("held", which, self.held) for which in range(self.samples + 1))]
        return {
            "labelled": self.labelled,
            "nats": self.nats,
            "tokens": self.tokens,
            "next": self.next,
            "sums": self.sums,
            "parts": self.parts,
            "gradients": {
                f"{kind}-{which}-{at}": self._gradient(kind, at, which, self.next).cpu()
                for kind, which, walk in kinds
                for at in range(len(walk.batches))
            },
        }

    def head(self, records: int) -> None:
        """Losses, and the gradients of what leaves the last block: of the losses and, held out, of those under drawn labels."""
        top = len(self.streamed.blocks)
        for at, batch in enumerate(self.fit.batches):
            hidden = self.fit.hidden(at, top).requires_grad_(True)
            for logits, targets, _, _ in self.fit.logits(at, hidden):
                loss = cross_entropy(logits.float(), targets, reduction="sum")
                del logits
                loss.backward()
                self.labelled, self.nats = self.labelled + len(targets), self.nats + float(loss.detach())
            self.tokens += int(batch.attention_mask.sum())
            self._keep("fit", at, 0, top, hidden)
        if not math.isfinite(self.nats):
            name = self.streamed.base.name
            raise DataError(f"the loss of {name} on these records is {self.nats}; check the weights and records, or use --dtype float32")
        self.sums = HeldOut.empty(top, records, self.samples, ())
        for at, batch in enumerate(self.held.batches):
            self._held_out_head(at, batch, self.sums, top)

    def _held_out_head(self, at: int, batch: Batch, sums: HeldOut, top: int) -> None:
        hidden = self.held.hidden(at, top).requires_grad_(True)
        sums.tokens.index_add_(0, torch.tensor(batch.rows), batch.attention_mask.sum(dim=1).double().cpu())
        rows = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)[0]
        thresholds = label_thresholds(torch.tensor(batch.rows)[rows.cpu()], self.samples, self.seed)
        slopes = [torch.zeros_like(hidden) for _ in range(self.samples + 1)]
        for logits, targets, rows, chosen in self.held.logits(at, hidden):
            losses = cross_entropy(logits.float(), targets, reduction="none")
            record = torch.tensor(batch.rows)[rows.cpu()]
            sums.nats.index_add_(0, record, losses.detach().double().cpu())
            sums.labelled.index_add_(0, record, torch.ones(len(record), dtype=torch.float64))
            slopes[0] += _gradient_of(hidden, losses.sum(), None, keep=self.samples > 0)
            for sample, slope in enumerate(drawn_slopes(logits, thresholds[:, chosen.cpu()])):
                slopes[sample + 1] += _gradient_of(hidden, logits, slope, keep=sample + 1 < self.samples)
        for which, slope in enumerate(slopes):
            self.boundaries.put(f"held-gradient-{which}", at, top, slope)

    def _keep(self, kind: str, at: int, which: int, block: int, hidden: torch.Tensor) -> None:
        """Keep the gradient of what enters a block, and clear it; `which` is 0 for the true labels, else the sample counted from 1."""
        assert hidden.grad is not None
        self.boundaries.put(f"{kind}-gradient-{which}", at, block, hidden.grad)
        self.boundaries.drop(f"{kind}-gradient-{which}", at, block + 1)
        self.boundaries.drop(kind, at, block + 1)
        hidden.grad = None

    def backward(self, rank: int, ridge: float, progress: Progress | None, state: State) -> tuple[Fit, HeldOut]:
        """Down through the blocks."""
        assert self.sums is not None
        for block in reversed(self.streamed.blocks[: self.next]):
            with self.streamed.loaded([block.module]):
                part = self.parts[str(block.index)] = Fit(self.tokens, self.labelled, self.nats / self.labelled)
                moments = self._fit_block(block.index)
                solve_layer(part, block, moments.leaders, moments.inputs, moments.gradients, rank, ridge)
                self._held_out_block(block.index, part)
            self.next = block.index
            state.snapshot(PART, self._done)
            if progress:
                progress("backward", len(self.streamed.blocks) - block.index, len(self.streamed.blocks))
        whole = Fit(self.tokens, self.labelled, self.nats / self.labelled)
        for block in self.streamed.blocks:
            whole.extend(self.parts[str(block.index)])
        self.boundaries.clear()
        return whole, self.sums

    def _fit_block(self, index: int) -> FitSums:
        sums = FitSums()
        block = self.streamed.blocks[index]
        with capturing(self.streamed.base.model, [block]) as capture:
            sink = fit_sink(sums, capture, [block], self.tokens)
            for at, batch in enumerate(self.fit.batches):
                hidden = self.fit.hidden(at, index).requires_grad_(True)
                capture.start(batch.attention_mask, sink)
                self.fit.run(at, index, hidden).backward(self._gradient("fit", at, 0, index + 1))
                self._keep("fit", at, 0, index, hidden)
            sums.leaders = dict(capture.leaders)
        return sums

    def _held_out_block(self, index: int, part: Fit) -> None:
        assert self.sums is not None
        block = self.streamed.blocks[index]
        self.sums.inputs.update({path: torch.zeros(4, len(self.sums.nats), dtype=torch.float64) for path in part.input_directions})
        sums = HeldOutSums(self.streamed.base, part, self.sums)
        with capturing(self.streamed.base.model, [block]) as capture:
            for at, batch in enumerate(self.held.batches):
                hidden = self.held.hidden(at, index).requires_grad_(True)
                sums.enter(batch)
                capture.start(batch.attention_mask, sums.true_labels, keep=self.samples > 0)
                out = self.held.run(at, index, hidden)
                for which in range(self.samples + 1):
                    if which:
                        capture.sink, capture.keep = sums.drawn_labels(which - 1), which < self.samples
                    out.backward(self._gradient("held", at, which, index + 1), retain_graph=which < self.samples)
                    self._keep("held", at, which, index, hidden)

    def _gradient(self, kind: str, at: int, which: int, block: int) -> torch.Tensor:
        return self.boundaries.get(f"{kind}-gradient-{which}", at, block, self.streamed.device)


# ---- stream.probe

PART_PROBE = "streamed-step-probe"
"""Name of the part that a `State` keeps."""


def stream_step_probe(
    streamed: StreamedModel,
    steps: Sequence[Step],
    slopes: Sequence[float],
    examples: Sequence[Example],
    batch_size: int,
    *,
    boundaries: Boundaries | None = None,
    progress: Progress | None = None,
    state: State | None = None,
) -> StepProbe:
    """As `probe.step_probe`. The blocks are computed as often as there: from each layer on, for two lengths.

    Args:
        streamed: The model.
        steps: For each layer its low-rank step.
        slopes: For each layer the decrease of the held-out loss per unit of α at α = 0, nats per labelled token.
        examples: Records that had no part in making the steps.
        batch_size: Records in a batch.
        boundaries: Where hidden states are kept; in memory when not given.
        progress: Told of batches that were let through a block, `step probe`.
        state: Where it is kept from time to time how far the steps have come.
    """
    kept, state, depth = boundaries or Boundaries(), state or State(), len(streamed.blocks)
    walk = BlockByBlock(streamed, examples, batch_size, kept, "probe")
    sweeps = _Sweeps(walk, steps, len(examples))
    with torch.no_grad(), walking(streamed):
        forward(streamed, (walk,))
        with streamed.loaded([streamed.head()]):
            before, tokens = _losses(walk, "probe", depth)
        sweeps.restore(state.load(PART_PROBE))
        while sweeps.trial < 2:
            sweeps.run(progress, state)
            with streamed.loaded([streamed.head()]):
                sweeps.finish()
            if sweeps.trial == 1:
                means = (before.sum() - sweeps.after[:, 0].sum(dim=1)) / tokens.sum()
                lengths = [second_length(slope, reduction) for slope, reduction in zip(slopes, means.tolist(), strict=True)]
                sweeps.alphas[:, 1] = torch.tensor(lengths)
    kept.clear()
    state.drop(PART_PROBE)
    return StepProbe(sweeps.alphas, before, sweeps.after, tokens)


class _Sweeps:
    """Twice through all blocks, each time once for every layer with the step in that layer alone.

    Attributes:
        alphas: Lengths of the steps, `[layers, 2]`.
        after: Summed losses, `[layers, 2, records]`.
        trial: Which of the two times.
        next: The block that comes next.
    """

    def __init__(self, walk: BlockByBlock, steps: Sequence[Step], records: int) -> None:
        depth = len(walk.model.blocks)
        self.walk, self.steps, self.trial, self.next = walk, steps, 0, 0
        self.alphas = torch.ones(depth, 2, dtype=torch.float64)
        self.after = torch.zeros(depth, 2, records, dtype=torch.float64)

    def run(self, progress: Progress | None, state: State) -> None:
        """Once through the blocks."""
        streamed, batches = self.walk.model, len(self.walk.batches)
        whole = batches * len(streamed.blocks) * (len(streamed.blocks) + 1) // 2
        for block in streamed.blocks[self.next :]:
            with streamed.loaded([block.module]):
                for at in range(batches):
                    self._advance(at, block.index)
                    if progress:
                        done = batches * block.index * (block.index + 1) // 2 + (at + 1) * (block.index + 1)
                        progress("step probe", self.trial * whole + done, 2 * whole)
            self.next = block.index + 1
            state.snapshot(PART_PROBE, self._done)

    def _advance(self, at: int, index: int) -> None:
        """Let a batch through a block: with the steps of the layers below, and with the block's own."""
        walk, kept = self.walk, self.walk.boundaries
        for layer in range(index):
            moved = walk.run(at, index, kept.get(f"step-{layer}", at, index, walk.model.device))
            kept.put(f"step-{layer}", at, index + 1, moved)
            kept.drop(f"step-{layer}", at, index)
        with stepped(walk.model.blocks[index], self.steps[index], float(self.alphas[index, self.trial])):
            kept.put(f"step-{index}", at, index + 1, walk.run(at, index, walk.hidden(at, index)))

    def finish(self) -> None:
        """Losses at the end of one time through; the head must be in memory."""
        depth = len(self.steps)
        for layer in range(depth):
            self.after[layer, self.trial], _ = _losses(self.walk, f"step-{layer}", depth)
            for at in range(len(self.walk.batches)):
                self.walk.boundaries.drop(f"step-{layer}", at, depth)
        self.trial, self.next = self.trial + 1, 0

    def _done(self) -> dict[str, Any]:
        cpu = torch.device("cpu")
        found = {
            f"{layer}-{at}": self.walk.boundaries.get(f"step-{layer}", at, self.next, cpu)
            for layer in range(self.next)
            for at in range(len(self.walk.batches))
        }
        return {"trial": self.trial, "next": self.next, "alphas": self.alphas, "after": self.after, "hidden": found}

    def restore(self, done: dict[str, Any] | None) -> None:
        """Go on from what `_done` gave."""
        if done is None:
            return
        self.trial, self.next, self.alphas, self.after = done["trial"], done["next"], done["alphas"], done["after"]
        for name, hidden in done["hidden"].items():
            layer, at = name.split("-")
            self.walk.boundaries.put(f"step-{layer}", int(at), self.next, hidden)


def _losses(walk: BlockByBlock, kind: str, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss (nats) and labelled tokens of each record, `[records]`, where the last block gives what is kept as `kind`."""
    records = sum(len(batch.rows) for batch in walk.batches)
    nats, tokens = torch.zeros(records, dtype=torch.float64), torch.zeros(records, dtype=torch.float64)
    for at, batch in enumerate(walk.batches):
        for logits, targets, rows, _ in walk.logits(at, walk.boundaries.get(kind, at, depth, walk.model.device)):
            record = torch.tensor(batch.rows)[rows.cpu()]
            nats.index_add_(0, record, cross_entropy(logits.float(), targets, reduction="none").double().cpu())
            tokens.index_add_(0, record, torch.ones(len(record), dtype=torch.float64))
    return nats, tokens


# ---- stream.profile

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
