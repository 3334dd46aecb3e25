"""The step probe over a model on disk: the steps of all layers at once, so that each block is read twice however many layers there are."""

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from layercard.capture import stepped
from layercard.data import Example
from layercard.loading import Progress
from layercard.probe import Step, StepProbe, second_length
from layercard.stream.boundaries import Boundaries
from layercard.stream.passes import BlockByBlock, enter, forward, head_of, walking
from layercard.stream.streamed import StreamedModel


def stream_step_probe(
    streamed: StreamedModel,
    steps: Sequence[Step],
    slopes: Sequence[float],
    examples: Sequence[Example],
    batch_size: int,
    *,
    boundaries: Boundaries | None = None,
    progress: Progress | None = None,
) -> StepProbe:
    """As `probe.step_probe`. The blocks are computed as often as there: from each layer on, for two lengths.

    Args:
        streamed: The model.
        steps: For each layer its low-rank step.
        slopes: For each layer the decrease of the held-out loss per unit of α at α = 0, nats per labelled token.
        examples: Records that had no part in making the steps.
        batch_size: Records in a batch.
        boundaries: Where hidden states are kept; in memory when not given.
        progress: Told of blocks, `step probe`.
    """
    kept, depth = boundaries or Boundaries(), len(streamed.blocks)
    walk = BlockByBlock(streamed, examples, batch_size, kept, "probe")
    alphas = torch.ones(depth, 2, dtype=torch.float64)
    after = torch.zeros(depth, 2, len(examples), dtype=torch.float64)
    with torch.no_grad(), walking(streamed):
        enter(streamed, (walk,))
        forward(streamed, (walk,), None)
        with streamed.loaded([head_of(streamed)]):
            before, tokens = _losses(walk, "probe", depth)
        for trial in range(2):
            _sweep(walk, steps, alphas[:, trial], progress, trial * depth)
            with streamed.loaded([head_of(streamed)]):
                for layer in range(depth):
                    after[layer, trial], _ = _losses(walk, f"step-{layer}", depth)
            if trial == 0:
                means = (before.sum() - after[:, 0].sum(dim=1)) / tokens.sum()
                lengths = [second_length(slope, reduction) for slope, reduction in zip(slopes, means.tolist(), strict=True)]
                alphas[:, 1] = torch.tensor(lengths)
    return StepProbe(alphas, before, after, tokens)


def _sweep(walk: BlockByBlock, steps: Sequence[Step], alphas: torch.Tensor, progress: Progress | None, done: int) -> None:
    """Let all batches through all blocks once for every layer, with the step in that layer alone."""
    streamed, kept = walk.streamed, walk.boundaries
    for block in streamed.blocks:
        at_block = block.index
        with streamed.loaded([block.module]):
            for at in range(len(walk.batches)):
                for layer in range(at_block):
                    moved = walk.run(at, at_block, kept.get(f"step-{layer}", at, at_block, streamed.device))
                    kept.put(f"step-{layer}", at, at_block + 1, moved)
                    kept.drop(f"step-{layer}", at, at_block)
                with stepped(block, steps[at_block], float(alphas[at_block])):
                    kept.put(f"step-{at_block}", at, at_block + 1, walk.run(at, at_block, walk.hidden(at, at_block)))
        if progress:
            progress("step probe", done + at_block + 1, 2 * len(streamed.blocks))


def _losses(walk: BlockByBlock, kind: str, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss (nats) and labelled tokens of each record, `[records]`, where the last block gives what is kept as `kind`."""
    records = sum(len(batch.rows) for batch in walk.batches)
    nats, tokens = torch.zeros(records, dtype=torch.float64), torch.zeros(records, dtype=torch.float64)
    for at, batch in enumerate(walk.batches):
        logits, targets, rows = walk.logits(at, walk.boundaries.get(kind, at, depth, walk.streamed.device))
        record = torch.tensor(batch.rows)[rows.cpu()]
        nats.index_add_(0, record, cross_entropy(logits.float(), targets, reduction="none").double().cpu())
        tokens.index_add_(0, record, torch.ones(len(record), dtype=torch.float64))
    return nats, tokens
