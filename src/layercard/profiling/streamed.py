"""The passes and the step probe over a model on disk, one block in memory at a time.

Each block is read twice for the signals. Forward, all batches go through it before the next one is read, and what enters each block is
kept. Backward, a block runs once more on what entered it, with its graph this time: the gradient of what left it gives the gradient of
what entered it, and on the way the signals of its modules. While the block is in memory the first half of the records makes its step, the
second half measures that and makes a step of its own, and the first half runs once more to measure this one. Sums and solving are those of
`fit` and `held_out`, so the numbers are the same, to rounding.

The step probe takes the steps of all its layers at once, so that each block is read twice however many layers there are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from layercard.checkpoint import State
from layercard.cost.estimate import device_rates, estimated_cost, free_bytes
from layercard.cost.measure import device_name, usual_batch
from layercard.cost.model import CostModel
from layercard.data.load import IGNORED, Dataset, Example
from layercard.measure import Phases
from layercard.models.hooks import capturing, stepped
from layercard.models.load import Progress
from layercard.models.streamed import StreamedModel
from layercard.models.streamed_pass import BlockByBlock, Boundaries, forward, walking
from layercard.profiling.fit import Fit, FitSums, LayerSignals, Step, solve_layer
from layercard.profiling.held_out import HeldOut, HeldOutSums, backward_starts, label_thresholds
from layercard.profiling.step_probe import StepProbe, joined, second_length
from layercard.settings import ProfileSettings, TrainSettings

PASSES, PROBE = "streamed-passes", "streamed-step-probe"
"""Names of the parts of a `State`."""
ROOM = 0.25
"""Share of the free memory that what goes from block to block may take."""


def stream_passes(
    streamed: StreamedModel,
    halves: Sequence[Sequence[Example]],
    settings: ProfileSettings,
    between: Boundaries,
    progress: Progress | None,
    state: State,
    phases: Phases,
) -> tuple[tuple[Fit, Fit], HeldOut, dict[str, int]]:
    """`fit_pass` and `held_out_pass` over a model on disk: what both halves made, what they measured, and what was read until then
    (`StreamedModel.reading`).

    Hidden states and gradients are kept in `between`, and finished blocks from time to time in `state`: a later call runs forward only to
    the block that comes next. `progress` is told of blocks, forward and backward; `phases` note time and memory.

    Raises:
        DataError: The loss is not finite.
        ModelError: The blocks hand on more than hidden states.
    """
    base, depth, samples = streamed.base, len(streamed.blocks), settings.label_samples
    walks = [BlockByBlock(streamed, examples, settings.batch_size, between, f"half-{half}") for half, examples in enumerate(halves)]
    tokens = [sum(len(example.input_ids) for example in examples) for examples in halves]

    def gradient_kind(half: int, backward: int) -> str:
        """Under which name gradients of what enters a block are kept: 0 under the true labels, else of the sample counted from 1."""
        return f"gradient-{half}-{backward}"

    kinds = {gradient_kind(half, backward): half for half in (0, 1) for backward in range(samples + 1)}

    def keep_gradient(half: int, backward: int, number: int, block: int, gradient: torch.Tensor | None) -> None:
        """Keep what has come down to the input of a block, in place of what had come to its output."""
        assert gradient is not None
        kind = gradient_kind(half, backward)
        between.put(kind, number, block, gradient)
        between.drop(kind, number, block + 1)
        between.drop(walks[half].kind, number, block + 1)

    def snapshot() -> dict[str, Any]:
        cpu = torch.device("cpu")
        gradients = {
            kind: [between.get(kind, n, done["next"], cpu) for n in range(len(walks[half].batches))] for kind, half in kinds.items()
        }
        return done | {"reading": streamed.reading, "gradients": gradients}

    empty = {
        "next": depth,
        "held_out": [HeldOut.empty(depth, len(examples), samples, half) for half, examples in enumerate(halves)],
        "layers": [{}, {}],
    }
    done: dict[str, Any] = state.load(PASSES) or empty
    for kind, gradients in done.pop("gradients", {}).items():
        for number, gradient in enumerate(gradients):
            between.put(kind, number, done["next"], gradient)
    held_out: list[HeldOut] = done["held_out"]
    layers: list[dict[str, LayerSignals]] = done["layers"]

    with walking(streamed):
        # Step 1: forward, as far as backward has not come down yet.
        with phases.phase("forward"):
            forward(streamed, walks, progress, until=done["next"])
        if "reading" in done:
            streamed.go_on(done["reading"])

        # Step 2: the losses, and the gradients of what leaves the last block.
        if done["next"] == depth:
            with phases.phase("head"), streamed.loaded([streamed.head()]):
                for half, walk in enumerate(walks):
                    for number, batch in enumerate(walk.batches):
                        hidden = walk.hidden(number, depth).requires_grad_(True)
                        held_out[half].tokens.index_add_(0, torch.tensor(batch.rows), batch.attention_mask.sum(dim=1).double().cpu())
                        rows = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)[0]
                        thresholds = label_thresholds(torch.tensor(batch.rows)[rows.cpu()], samples, 2 * settings.seed + half)
                        slopes = [torch.zeros_like(hidden) for _ in range(samples + 1)]
                        for logits, targets, rows, chosen in walk.logits(number, hidden):
                            record = torch.tensor(batch.rows)[rows.cpu()]
                            starts = backward_starts(held_out[half], record, logits, targets, thresholds[:, chosen.cpu()])
                            for slope, (tensor, gradient, again) in zip(slopes, starts, strict=True):
                                slope += torch.autograd.grad(tensor, hidden, gradient, retain_graph=again)[0]
                        for backward, slope in enumerate(slopes):
                            keep_gradient(half, backward, number, depth, slope)
        sums = [FitSums(labelled=int(each.labelled.sum()), nats=float(each.nats.sum())) for each in held_out]
        for each in sums:
            each.check_loss(base)

        # Step 3: backward, block by block.
        with phases.phase("backward"):
            for block in reversed(streamed.blocks[: done["next"]]):
                with streamed.loaded([block.module]), capturing(base.model, [block]) as capture:
                    for maker, measurer in ((0, None), (1, 0), (None, 1)):
                        # The records of half `maker or measurer` make steps, and measure those of half `measurer`.
                        half = 0 if measurer in (None, 1) else 1
                        walk, of_block = walks[half], FitSums(labelled=sums[half].labelled)
                        make = None if maker is None else of_block.sink(capture, [block], tokens[half])
                        records = None
                        if measurer is not None:
                            records = HeldOutSums(held_out[half], {block.index: layers[measurer][str(block.index)]})
                        for number, batch in enumerate(walk.batches):
                            hidden = walk.hidden(number, block.index).detach().requires_grad_(True)  # half 0 comes twice
                            capture.start(batch.attention_mask, make or (lambda *_: None), keep=records is not None and samples > 0)
                            output = walk.run(number, block.index, hidden)
                            if records is None:
                                output.backward(between.get(gradient_kind(half, 0), number, block.index + 1, streamed.device))
                                continue
                            records.enter(batch)
                            for backward in range(samples + 1):
                                again = backward < samples
                                capture.sink, capture.keep = records.sink(backward, None if backward else make), again
                                gradient = between.get(gradient_kind(half, backward), number, block.index + 1, streamed.device)
                                output.backward(gradient, retain_graph=again)
                                keep_gradient(half, backward, number, block.index, hidden.grad)
                                hidden.grad = None
                        if maker is not None:
                            of_block.leaders = dict(capture.leaders)
                            layers[half][str(block.index)] = solve_layer(block, of_block, tokens[half], settings)
                done["next"] = block.index
                state.snapshot(PASSES, snapshot)
                if progress:
                    progress("backward", depth - block.index, depth)
    between.clear()
    fits = [
        Fit(tokens[half], sums[half].labelled, sums[half].nats / sums[half].labelled, [layers[half][str(index)] for index in range(depth)])
        for half in (0, 1)
    ]
    return (fits[0], fits[1]), HeldOut.joined(*held_out), streamed.reading


def stream_step_probe(
    streamed: StreamedModel,
    steps: Sequence[Sequence[Step]],
    slopes: Sequence[float],
    layers: Sequence[int],
    halves: Sequence[Sequence[Example]],
    rows: torch.Tensor,
    batch_size: int,
    between: Boundaries,
    progress: Progress | None,
    state: State,
) -> StepProbe:
    """As `step_probe.step_probe`; `steps` are those that the records of each half made, `halves` the examples to measure on.

    The blocks are computed as often as there: from each of the layers on, for two lengths. `progress` is told of batches that were let
    through a block; `state` keeps from time to time how far the steps have come.
    """
    depth = len(streamed.blocks)
    walks = [BlockByBlock(streamed, examples, batch_size, between, f"probe-{half}") for half, examples in enumerate(halves)]
    places = [(half, number) for half, walk in enumerate(walks) for number in range(len(walk.batches))]
    runs = len(places) * sum(depth - layer for layer in layers)

    def kind(half: int, layer: int) -> str:
        """Under which name hidden states with the step of a layer are kept."""
        return f"step-{half}-{layer}"

    def snapshot() -> dict[str, Any]:
        cpu, begun = torch.device("cpu"), [layer for layer in layers if layer < done["next"]]
        hidden = [[between.get(kind(half, layer), number, done["next"], cpu) for half, number in places] for layer in begun]
        return done | {"reading": streamed.reading, "hidden": hidden}

    done = state.load(PROBE) or {
        "trial": 0,
        "next": 0,
        "alphas": torch.ones(len(layers), 2, dtype=torch.float64),
        "after": torch.zeros(len(layers), 2, len(rows), dtype=torch.float64),
    }
    alphas, after = done["alphas"], done["after"]
    for layer, of_layer in zip(layers, done.pop("hidden", ()), strict=False):
        for (half, number), hidden in zip(places, of_layer, strict=True):
            between.put(kind(half, layer), number, done["next"], hidden)
    with torch.no_grad(), walking(streamed):
        forward(streamed, walks)
        with streamed.loaded([streamed.head()]):
            before = joined([walk.losses(walk.kind) for walk in walks])
        if "reading" in done:
            streamed.go_on(done["reading"])
        blocks_run = done["trial"] * runs + len(places) * sum(min(done["next"], depth) - layer for layer in layers if layer < done["next"])
        for trial in range(done["trial"], 2):
            # Once through all blocks: a batch goes on with the steps of the layers below, and begins with the block's own.
            for block in streamed.blocks[done["next"] :]:
                with streamed.loaded([block.module]):
                    for half, number in places:
                        walk = walks[half]
                        for layer in layers:
                            if layer < block.index:
                                hidden = between.get(kind(half, layer), number, block.index, streamed.device)
                                between.put(kind(half, layer), number, block.index + 1, walk.run(number, block.index, hidden))
                                between.drop(kind(half, layer), number, block.index)
                            elif layer == block.index:
                                with stepped(block, steps[1 - half][layer], float(alphas[layers.index(layer), trial])):
                                    stepped_on = walk.run(number, block.index, walk.hidden(number, block.index))
                                between.put(kind(half, layer), number, block.index + 1, stepped_on)
                            blocks_run += layer <= block.index
                        if progress:
                            progress("step probe", blocks_run, 2 * runs)
                done["trial"], done["next"] = trial, block.index + 1
                state.snapshot(PROBE, snapshot)
            with streamed.loaded([streamed.head()]):
                for place, layer in enumerate(layers):
                    after[place, trial] = joined([walk.losses(kind(half, layer)) for half, walk in enumerate(walks)]).nats
                    for half, number in places:
                        between.drop(kind(half, layer), number, depth)
            done["next"] = 0
            if trial == 0:
                reductions = (before.nats.sum() - after[:, 0].sum(dim=1)) / before.tokens.sum()
                lengths = [second_length(slopes[layer], each) for layer, each in zip(layers, reductions.tolist(), strict=True)]
                alphas[:, 1] = torch.tensor(lengths)
    between.clear()
    state.drop(PROBE)
    half = torch.repeat_interleave(torch.arange(2), torch.tensor([len(examples) for examples in halves]))
    return StepProbe(depth, tuple(layers), rows, half, alphas, before.nats, after, before.tokens)


def folder_between_blocks(streamed: StreamedModel, dataset: Dataset, state: Path | None) -> Path | None:
    """A folder in `state` for hidden states and gradients between blocks, where they would take too much memory."""
    width = streamed.base.model.get_input_embeddings().weight.shape[1]
    size = (len(streamed.blocks) + 1) * dataset.tokens * width * streamed.dtype.itemsize  # hidden states, padding not counted
    return state / "boundaries" if state is not None and size > ROOM * free_bytes(torch.device("cpu")) else None


def streamed_cost(streamed: StreamedModel, dataset: Dataset, settings: ProfileSettings) -> CostModel:
    """What a training step would cost with the model in memory, from its shapes and what this device reaches."""
    base, size = streamed.base, TrainSettings().batch_size
    batch = usual_batch(dataset.examples, size, base.pad_id, settings.seed)
    length = batch.input_ids.shape[1]
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
        labelled=int((batch.labels[:, 1:] != IGNORED).sum()),
        rank=settings.rank,
    )
