"""The step probe over a model on disk: the steps of all layers at once, so that each block is read twice however many layers there are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from layercard.capture import stepped
from layercard.data import Example
from layercard.loading import Progress
from layercard.probe import Step, StepProbe, second_length
from layercard.state import State
from layercard.stream.boundaries import Boundaries
from layercard.stream.streamed import StreamedModel
from layercard.stream.walk import BlockByBlock, enter, forward, head_of, walking

PART = "streamed-step-probe"
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
        enter(streamed, (walk,))
        forward(streamed, (walk,), None)
        with streamed.loaded([head_of(streamed)]):
            before, tokens = _losses(walk, "probe", depth)
        sweeps.restore(state.load(PART))
        while sweeps.trial < 2:
            sweeps.run(progress, state)
            with streamed.loaded([head_of(streamed)]):
                sweeps.finish()
            if sweeps.trial == 1:
                means = (before.sum() - sweeps.after[:, 0].sum(dim=1)) / tokens.sum()
                lengths = [second_length(slope, reduction) for slope, reduction in zip(slopes, means.tolist(), strict=True)]
                sweeps.alphas[:, 1] = torch.tensor(lengths)
    kept.clear()
    state.drop(PART)
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
        depth = len(walk.streamed.blocks)
        self.walk, self.steps, self.trial, self.next = walk, steps, 0, 0
        self.alphas = torch.ones(depth, 2, dtype=torch.float64)
        self.after = torch.zeros(depth, 2, records, dtype=torch.float64)

    def run(self, progress: Progress | None, state: State) -> None:
        """Once through the blocks."""
        streamed, batches = self.walk.streamed, len(self.walk.batches)
        whole = batches * len(streamed.blocks) * (len(streamed.blocks) + 1) // 2
        for block in streamed.blocks[self.next :]:
            with streamed.loaded([block.module]):
                for at in range(batches):
                    self._advance(at, block.index)
                    if progress:
                        done = batches * block.index * (block.index + 1) // 2 + (at + 1) * (block.index + 1)
                        progress("step probe", self.trial * whole + done, 2 * whole)
            self.next = block.index + 1
            state.snapshot(PART, self._done)

    def _advance(self, at: int, index: int) -> None:
        """Let a batch through a block: with the steps of the layers below, and with the block's own."""
        walk, kept = self.walk, self.walk.boundaries
        for layer in range(index):
            moved = walk.run(at, index, kept.get(f"step-{layer}", at, index, walk.streamed.device))
            kept.put(f"step-{layer}", at, index + 1, moved)
            kept.drop(f"step-{layer}", at, index)
        with stepped(walk.streamed.blocks[index], self.steps[index], float(self.alphas[index, self.trial])):
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
        for logits, targets, rows, _ in walk.logits(at, walk.boundaries.get(kind, at, depth, walk.streamed.device)):
            record = torch.tensor(batch.rows)[rows.cpu()]
            nats.index_add_(0, record, cross_entropy(logits.float(), targets, reduction="none").double().cpu())
            tokens.index_add_(0, record, torch.ones(len(record), dtype=torch.float64))
    return nats, tokens
