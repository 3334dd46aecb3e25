"""The passes and the step probe over a model on disk, one block in memory at a time.

Each block is read twice for the signals. Forward, all batches go through it before the next one is read, and what enters each block is
kept. Backward, a block runs once more on what entered it, with its graph this time: the gradient of what left it gives the gradient of
what entered it, and on the way the signals of its modules. The batches that make the steps come first, so that the step of the block is
known when the held-out batches reach it. Sums and solving are those of `fit` and `held_out`, so the numbers are the same, to rounding.

The step probe takes the steps of all layers at once, so that each block is read twice however many layers there are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

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
from layercard.profiling.step_probe import StepProbe, second_length
from layercard.settings import ProfileSettings, TrainSettings

PASSES, PROBE = "streamed-passes", "streamed-step-probe"
"""Names of the parts of a `State`."""
ROOM = 0.25
"""Share of the free memory that what goes from block to block may take."""


def stream_passes(
    streamed: StreamedModel,
    fit_examples: Sequence[Example],
    held_out_examples: Sequence[Example],
    settings: ProfileSettings,
    between: Boundaries,
    progress: Progress | None,
    state: State,
    phases: Phases,
) -> tuple[Fit, HeldOut, dict[str, int]]:
    """`fit_pass` and `held_out_pass` over a model on disk, and what was read until then (`StreamedModel.reading`).

    Hidden states and gradients are kept in `between`, and finished blocks from time to time in `state`: a later call runs forward only to
    the block that comes next. `progress` is told of blocks, forward and backward; `phases` note time and memory.

    Raises:
        DataError: The loss is not finite.
        ModelError: The blocks hand on more than hidden states.
    """
    base, depth, samples = streamed.base, len(streamed.blocks), settings.label_samples
    fit = BlockByBlock(streamed, fit_examples, settings.batch_size, between, "fit")
    held = BlockByBlock(streamed, held_out_examples, settings.batch_size, between, "held")
    tokens = sum(len(example.input_ids) for example in fit_examples)
    # Gradients of what enters a block, by kind: 0 under the true labels, else of the sample counted from 1.
    walks = {"fit-gradient-0": fit, **{f"held-gradient-{backward}": held for backward in range(samples + 1)}}

    def keep_gradient(kind: str, number: int, block: int, gradient: torch.Tensor | None) -> None:
        """Keep what has come down to the input of a block, in place of what had come to its output."""
        assert gradient is not None
        between.put(kind, number, block, gradient)
        between.drop(kind, number, block + 1)
        between.drop(walks[kind].kind, number, block + 1)

    def snapshot() -> dict[str, Any]:
        cpu = torch.device("cpu")
        gradients = {kind: [between.get(kind, n, done["next"], cpu) for n in range(len(walk.batches))] for kind, walk in walks.items()}
        return done | {"reading": streamed.reading, "gradients": gradients}

    empty = {"next": depth, "sums": FitSums(), "held_out": HeldOut.empty(depth, len(held_out_examples), samples), "layers": {}}
    done: dict[str, Any] = state.load(PASSES) or empty
    for kind, gradients in done.pop("gradients", {}).items():
        for number, gradient in enumerate(gradients):
            between.put(kind, number, done["next"], gradient)
    sums: FitSums = done["sums"]
    held_out: HeldOut = done["held_out"]
    layers: dict[str, LayerSignals] = done["layers"]

    with walking(streamed):
        # Step 1: forward, as far as backward has not come down yet.
        with phases.phase("forward"):
            forward(streamed, (fit, held), progress, until=done["next"])
        if "reading" in done:
            streamed.go_on(done["reading"])

        # Step 2: the losses, and the gradients of what leaves the last block.
        if done["next"] == depth:
            with phases.phase("head"), streamed.loaded([streamed.head()]):
                for number in range(len(fit.batches)):
                    hidden = fit.hidden(number, depth).requires_grad_(True)
                    for logits, targets, _, _ in fit.logits(number, hidden):
                        loss = cross_entropy(logits.float(), targets, reduction="sum")
                        del logits  # the graph keeps what it needs
                        loss.backward()
                        sums.labelled, sums.nats = sums.labelled + len(targets), sums.nats + float(loss.detach())
                    keep_gradient("fit-gradient-0", number, depth, hidden.grad)
                sums.check_loss(base)
                for number, batch in enumerate(held.batches):
                    hidden = held.hidden(number, depth).requires_grad_(True)
                    held_out.tokens.index_add_(0, torch.tensor(batch.rows), batch.attention_mask.sum(dim=1).double().cpu())
                    rows = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)[0]
                    thresholds = label_thresholds(torch.tensor(batch.rows)[rows.cpu()], samples, settings.seed)
                    slopes = [torch.zeros_like(hidden) for _ in range(samples + 1)]
                    for logits, targets, rows, chosen in held.logits(number, hidden):
                        record = torch.tensor(batch.rows)[rows.cpu()]
                        starts = backward_starts(held_out, record, logits, targets, thresholds[:, chosen.cpu()])
                        for slope, (tensor, gradient, again) in zip(slopes, starts, strict=True):
                            slope += torch.autograd.grad(tensor, hidden, gradient, retain_graph=again)[0]
                    for backward, slope in enumerate(slopes):
                        keep_gradient(f"held-gradient-{backward}", number, depth, slope)

        # Step 3: backward, block by block: the fit batches make the step, then the held-out batches measure it.
        with phases.phase("backward"):
            for block in reversed(streamed.blocks[: done["next"]]):
                with streamed.loaded([block.module]), capturing(base.model, [block]) as capture:
                    of_block = FitSums(labelled=sums.labelled)
                    sink = of_block.sink(capture, [block], tokens)
                    for number, batch in enumerate(fit.batches):
                        hidden = fit.hidden(number, block.index).requires_grad_(True)
                        capture.start(batch.attention_mask, sink)
                        fit.run(number, block.index, hidden).backward(
                            between.get("fit-gradient-0", number, block.index + 1, streamed.device)
                        )
                        keep_gradient("fit-gradient-0", number, block.index, hidden.grad)
                    of_block.leaders = dict(capture.leaders)
                    layers[str(block.index)] = solve_layer(block, of_block, tokens, settings)
                    records = HeldOutSums(held_out, {block.index: layers[str(block.index)]})
                    for number, batch in enumerate(held.batches):
                        hidden = held.hidden(number, block.index).requires_grad_(True)
                        records.enter(batch)
                        capture.start(batch.attention_mask, records.sink(0), keep=samples > 0)
                        output = held.run(number, block.index, hidden)
                        for backward in range(samples + 1):
                            kind, again = f"held-gradient-{backward}", backward < samples
                            capture.sink, capture.keep = records.sink(backward), again
                            output.backward(between.get(kind, number, block.index + 1, streamed.device), retain_graph=again)
                            keep_gradient(kind, number, block.index, hidden.grad)
                            hidden.grad = None
                done["next"] = block.index
                state.snapshot(PASSES, snapshot)
                if progress:
                    progress("backward", depth - block.index, depth)
    between.clear()
    of_layers = [layers[str(index)] for index in range(depth)]
    return Fit(tokens, sums.labelled, sums.nats / sums.labelled, of_layers), held_out, streamed.reading


def stream_step_probe(
    streamed: StreamedModel,
    steps: Sequence[Step],
    slopes: Sequence[float],
    examples: Sequence[Example],
    batch_size: int,
    between: Boundaries,
    progress: Progress | None,
    state: State,
) -> StepProbe:
    """As `step_probe.step_probe`. The blocks are computed as often as there: from each layer on, for two lengths.

    `progress` is told of batches that were let through a block; `state` keeps from time to time how far the steps have come.
    """
    depth = len(streamed.blocks)
    walk = BlockByBlock(streamed, examples, batch_size, between, "probe")
    numbers = range(len(walk.batches))
    runs = len(numbers) * depth * (depth + 1) // 2

    def snapshot() -> dict[str, Any]:
        cpu = torch.device("cpu")
        hidden = [[between.get(f"step-{layer}", number, done["next"], cpu) for number in numbers] for layer in range(done["next"])]
        return done | {"reading": streamed.reading, "hidden": hidden}

    done = state.load(PROBE) or {
        "trial": 0,
        "next": 0,
        "alphas": torch.ones(depth, 2, dtype=torch.float64),
        "after": torch.zeros(depth, 2, len(examples), dtype=torch.float64),
    }
    alphas, after = done["alphas"], done["after"]
    for layer, of_layer in enumerate(done.pop("hidden", ())):
        for number, hidden in enumerate(of_layer):
            between.put(f"step-{layer}", number, done["next"], hidden)
    with torch.no_grad(), walking(streamed):
        forward(streamed, (walk,))
        with streamed.loaded([streamed.head()]):
            before = walk.losses("probe")
        if "reading" in done:
            streamed.go_on(done["reading"])
        for trial in range(done["trial"], 2):
            # Once through all blocks: a batch goes on with the steps of the layers below, and begins with the block's own.
            for block in streamed.blocks[done["next"] :]:
                with streamed.loaded([block.module]):
                    for number in numbers:
                        for layer in range(block.index):
                            hidden = between.get(f"step-{layer}", number, block.index, streamed.device)
                            between.put(f"step-{layer}", number, block.index + 1, walk.run(number, block.index, hidden))
                            between.drop(f"step-{layer}", number, block.index)
                        with stepped(block, steps[block.index], float(alphas[block.index, trial])):
                            stepped_on = walk.run(number, block.index, walk.hidden(number, block.index))
                        between.put(f"step-{block.index}", number, block.index + 1, stepped_on)
                        if progress:
                            below = len(numbers) * block.index * (block.index + 1) // 2
                            progress("step probe", trial * runs + below + (number + 1) * (block.index + 1), 2 * runs)
                done["trial"], done["next"] = trial, block.index + 1
                state.snapshot(PROBE, snapshot)
            with streamed.loaded([streamed.head()]):
                for layer in range(depth):
                    after[layer, trial] = walk.losses(f"step-{layer}").nats
                    for number in numbers:
                        between.drop(f"step-{layer}", number, depth)
            done["next"] = 0
            if trial == 0:
                reductions = (before.nats.sum() - after[:, 0].sum(dim=1)) / before.tokens.sum()
                lengths = [second_length(slope, reduction) for slope, reduction in zip(slopes, reductions.tolist(), strict=True)]
                alphas[:, 1] = torch.tensor(lengths)
    between.clear()
    state.drop(PROBE)
    return StepProbe(alphas, before.nats, after, before.tokens)


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
